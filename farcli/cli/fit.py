"""`farcli fit`."""

from typing import Annotated

import typer

from farcli.cli.options import (
    Device,
    DryRun,
    Force,
    FormatOption,
    From,
    Memory,
    Output,
    Partial,
    Quiet,
    Settings,
    To,
    complete_methods,
    steps_text,
)


def fit(
    method: Annotated[str, typer.Argument(help="A method (see `farcli methods`).", autocompletion=complete_methods)],
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Recorded runs to learn from.")],
    output: Output,
    context: Annotated[int, typer.Option("--context", help="Snapshots of the observed prefix.")] = 5,
    start: From = None,
    to: To = None,
    horizon: Annotated[int | None, typer.Option("--horizon", help="Forecast the next so many snapshots.")] = None,
    train_runs: Annotated[str | None, typer.Option("--train-runs", help="Runs to learn from: 0:8 or 0,2,5.")] = None,
    settings: Settings = None,
    device: Device = "auto",
    memory: Memory = "2G",
    partial: Partial = False,
    force: Force = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a fit by gradient that was stopped; do nothing where the output is there already and is "
            "what was asked for.",
        ),
    ] = False,
    dry_run: DryRun = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit a forecaster on recorded runs.

    Example: farcli fit lfd2 runs/digits.zarr -o lfd2.safetensors --context 5 --train-runs 0:8
    """
    from farcli.cli.output import emit_made
    from farcli.cli.progress import progress
    from farcli.cli.signals import stop_flag
    from farcli.config import parse_assignments, parse_size
    from farcli.verbs.fit import fit as run

    with progress(f"fit {method}", quiet) as report:
        row = run(
            method,
            stores,
            output,
            context=context,
            start=start,
            targets=steps_text(to),
            horizon=horizon,
            train_runs=train_runs,
            options=parse_assignments(settings or []),
            device=device,
            memory=parse_size(memory),
            replace=force,
            resume=resume,
            dry_run=dry_run,
            partial=partial,
            stopping=stop_flag,
            report=report,
        )
    emit_made(row, form=format, quiet=quiet)
