"""`farcli record`."""

from typing import Annotated

import typer

from farcli.cli.options import Force, FormatOption, Output, Quiet, Settings


def _complete(incomplete: str) -> list[str]:
    from farcli.workloads.table import WORKLOADS

    return [name for name in WORKLOADS if name.startswith(incomplete)]


def record(
    workload: Annotated[str, typer.Argument(help="A workload (see `farcli workloads`).", autocompletion=_complete)],
    output: Output,
    runs: Annotated[int, typer.Option("--runs", help="Independent runs to train.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps of each run.")] = None,
    every: Annotated[int | None, typer.Option("--every", help="Steps between snapshots.")] = None,
    at: Annotated[str | None, typer.Option("--at", help="Snapshots at these steps: 0,1,2,5,10.")] = None,
    log_spaced: Annotated[
        int | None, typer.Option("--log-spaced", help="So many snapshots, spaced logarithmically.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides initialisation, data order and tasks.")] = 0,
    settings: Settings = None,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a recording was stopped.")] = False,
    sync: Annotated[str, typer.Option("--sync", help="When to force data to disk: none, commit or always.")] = "commit",
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", help="Stop by the clock and exit 75: 3h50m, 90s.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its size; train nothing.")] = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a workload and record its weights.

    Example: farcli record digits-cnn -o runs/digits.zarr --runs 12 --steps 600 --every 20 --seed 0
    """
    from farcli.cli.output import emit_made
    from farcli.cli.progress import progress
    from farcli.cli.signals import stop_flag
    from farcli.config import parse_assignments, parse_duration
    from farcli.errors import UsageError
    from farcli.verbs.record import record as run

    if sync not in ("none", "commit", "always"):
        raise UsageError(f"--sync {sync!r}: expected none, commit or always.")
    try:
        chosen = [int(part) for part in at.split(",")] if at else None
    except ValueError:
        raise UsageError(f"--at {at!r}: expected steps like 0,1,2,5,10.") from None
    with progress(f"record {workload}", quiet) as report, stop_flag() as stop:
        row = run(
            workload,
            output,
            runs=runs,
            steps=steps,
            every=every,
            at=chosen,
            log_spaced=log_spaced,
            seed=seed,
            options=parse_assignments(settings or []),
            replace=force,
            resume=resume,
            sync=sync,
            time_limit=parse_duration(time_limit) if time_limit else None,
            dry_run=dry_run,
            report=report,
            stop=stop,
        )
    emit_made(row, form=format, quiet=quiet)
