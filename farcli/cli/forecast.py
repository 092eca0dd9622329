"""`farcli forecast`."""

from pathlib import Path
from typing import Annotated

import typer

from farcli.cli.options import (
    Context,
    Device,
    DryRun,
    Force,
    FormatOption,
    From,
    Memory,
    Output,
    Partial,
    Quiet,
    Resume,
    Runs,
    Settings,
    To,
    Transfer,
    complete_methods,
    steps_text,
)
from farcli.policies import Buffers


def forecast(
    method: Annotated[
        str,
        typer.Argument(
            metavar="FILE|METHOD", help="A fitted forecaster, or a method by name.", autocompletion=complete_methods
        ),
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Recorded runs whose prefix is observed.")],
    output: Output,
    start: From = None,
    to: To = None,
    runs: Runs = None,
    context: Context = None,
    settings: Settings = None,
    buffers: Annotated[
        Buffers, typer.Option("--buffers", help="BatchNorm statistics: keep the last observed, or forecast them too.")
    ] = "keep",
    transfer: Transfer = False,
    device: Device = "auto",
    memory: Memory = "2G",
    partial: Partial = False,
    intervals: Annotated[
        Path | None,
        typer.Option("--intervals", metavar="HALF.zarr", help="Store half-widths of 90 % intervals as well."),
    ] = None,
    force: Force = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Forecast weights from the prefix of recorded runs.

    Example: farcli forecast lfd2.safetensors runs/digits.zarr -o forecast.zarr --runs 8:12
    """
    from farcli.cli.output import emit_made, saying
    from farcli.cli.progress import progress
    from farcli.config import parse_assignments, parse_size
    from farcli.verbs.forecast import forecast as run

    with progress("forecast", quiet) as report:
        row = run(
            method,
            store,
            output,
            start=start,
            targets=steps_text(to),
            context=context,
            runs=runs,
            options=parse_assignments(settings or []),
            buffers=buffers,
            transfer=transfer,
            device=device,
            memory=parse_size(memory),
            replace=force,
            resume=resume,
            dry_run=dry_run,
            partial=partial,
            intervals=intervals,
            warn=saying(quiet),
            report=report,
        )
    emit_made(row, form=format, quiet=quiet)
