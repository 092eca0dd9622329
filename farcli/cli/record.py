"""`farcli record`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from farcli.cli.options import Force, FormatOption, Output, Quiet, Settings

_NO_WORKLOAD = ""


class RecordCommand(TyperCommand):
    """The option parser of `record`: what follows `--` is a command of its own, options and all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Mark the place of `--`, which the parser itself forgets."""
        if "--" in args:
            at = args.index("--")
            args = [*args[: at + 1], _NO_WORKLOAD, *args[at + 1 :]]
        return super().parse_args(ctx, args)


def _complete(incomplete: str) -> list[str]:
    from farcli.workloads.table import WORKLOADS

    return [name for name in WORKLOADS if name.startswith(incomplete)]


def record(
    output: Output,
    workload: Annotated[
        str | None, typer.Argument(help="A workload (see `farcli workloads`).", autocompletion=_complete)
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- CMD…", help="Or an unmodified training script, as you would run it."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", help="Or checkpoints there are: 'ckpts/checkpoint-*'; repeatable."),
    ] = None,
    runs: Annotated[int | None, typer.Option("--runs", help="Independent runs of a workload to train.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimiser steps of each run; of a command only for --log-spaced.")
    ] = None,
    every: Annotated[int | None, typer.Option("--every", help="Steps between snapshots.")] = None,
    at: Annotated[str | None, typer.Option("--at", help="Snapshots at these steps: 0,1,2,5,10.")] = None,
    log_spaced: Annotated[
        int | None,
        typer.Option(
            "--log-spaced", help="So many snapshots, spaced logarithmically; per factor of ten if no --steps."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Decides initialisation, data order and tasks of a workload.")
    ] = None,
    settings: Settings = None,
    params: Annotated[
        list[str] | None, typer.Option("--params", help="Tensors to store: GLOB, or !GLOB to exclude; repeatable.")
    ] = None,
    trainable_only: Annotated[
        bool, typer.Option("--trainable-only", help="Store neither buffers nor frozen parameters.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="keep (exact), float32 (rounds float64) or bfloat16 (8 bits).")
    ] = "keep",
    max_bytes: Annotated[
        str | None,
        typer.Option("--max-bytes", help="Most that the store may take, 4G or 500M: a command's recording ends there."),
    ] = None,
    start_step: Annotated[
        int | None, typer.Option("--start-step", help="Steps a resumed script has taken, if its optimiser forgets.")
    ] = None,
    with_optimizer: Annotated[
        bool, typer.Option("--with-optimizer", help="Store Adam's moments as well, in RUN.zarr/optimizer.zarr.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="An error of the recording ends the training.")] = False,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a recording was stopped.")] = False,
    sync: Annotated[
        str | None,
        typer.Option("--sync", help="When to force data to disk: none (a command's), commit (the default), always."),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option("--time-limit", help="Stop by the clock and exit 75: 3h50m, 90s; a command gets SIGTERM."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its size; train nothing.")] = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Record how weights move: of a workload, of an unmodified training script, or of checkpoints.

    A script keeps its process id, exit code and signals, and trains exactly as without recording.

    Example: farcli record digits-cnn -o runs/digits.zarr --runs 12 --steps 600 --every 20 --seed 0

    Example: farcli record -o run.zarr --every 50 -- python train.py --lr 0.1

    Example: farcli record --from 'ckpts/checkpoint-*' -o run.zarr
    """
    from farcli.cli.output import emit_made
    from farcli.cli.progress import progress
    from farcli.cli.signals import stop_flag
    from farcli.config import parse_assignments, parse_duration, parse_size
    from farcli.errors import UsageError
    from farcli.verbs.record_command import expand_output

    words = command or []
    given = [bool(workload), workload == _NO_WORKLOAD or bool(words[:1] == [_NO_WORKLOAD]), bool(source)]
    if sum(given) != 1:
        what = "give one of" if any(given) else "nothing to record: give"
        raise UsageError(f"record: {what} a WORKLOAD, a command behind `--`, or --from CHECKPOINTS.")
    if workload and words:
        raise UsageError(f"record {workload}: unexpected {words[0]!r}.", "A command goes behind `--`.")
    if given[1] and not words:
        raise UsageError("record: there is no command behind `--`.")
    of_workload = {"--runs": runs, "--set": settings}
    of_command = {
        "--trainable-only": trainable_only,
        "--start-step": start_step is not None,
        "--strict": strict,
    }
    of_both = {"--params": params, "--dtype": dtype != "keep"}
    of_training = {
        "--every": every,
        "--at": at,
        "--log-spaced": log_spaced,
        "--steps": steps,
        "--time-limit": time_limit,
    }
    unfit, where = (of_command | of_both, "a workload") if workload else (of_workload, "a command")
    if source:
        unfit, where = of_workload | of_command | of_training | {"--with-optimizer": with_optimizer}, "--from"
    for name, value in unfit.items():
        if value:
            raise UsageError(f"record: {name} does not go with {where}.")
    if sync not in (None, "none", "commit", "always"):
        raise UsageError(f"--sync {sync!r}: expected none, commit or always.")
    try:
        chosen = [int(part) for part in at.split(",")] if at is not None else None
    except ValueError:
        raise UsageError(f"--at {at!r}: expected steps like 0,1,2,5,10.") from None
    path = Path(expand_output(str(output), seed=0 if workload and seed is None else seed, launches=bool(words)))
    limit = parse_duration(time_limit) if time_limit else None
    most = parse_size(max_bytes) if max_bytes else None

    if words:
        import time

        from farcli.recording.plan import Plan
        from farcli.verbs.record_command import record_command

        plan = Plan(
            output=str(path),
            every=every,
            at=tuple(chosen or ()),
            log_spaced=log_spaced,
            steps=steps,
            params=tuple(params or ()),
            trainable_only=trainable_only,
            dtype=dtype,
            start_step=start_step,
            resume=resume,
            replace=force,
            max_bytes=most,
            with_optimizer=with_optimizer,
            strict=strict,
            sync=sync or "none",
            seed=seed,
            until=time.time() + limit if limit is not None else None,
        )
        emit_made(record_command(words, plan, dry_run=dry_run), form=format, quiet=quiet)
        return

    if source:
        from farcli.verbs.record_checkpoints import record_checkpoints

        with progress("record checkpoints", quiet) as report:
            row = record_checkpoints(
                source,
                path,
                params=params or (),
                dtype=dtype,
                max_bytes=most,
                replace=force,
                resume=resume,
                sync=sync or "commit",
                dry_run=dry_run,
                report=report,
            )
        emit_made(row, form=format, quiet=quiet)
        return

    assert workload
    with stop_flag() as stop, progress(f"record {workload}", quiet) as report:
        from farcli.verbs.record import record as run  # within: a signal while torch loads is kept for later

        row = run(
            workload,
            path,
            runs=1 if runs is None else runs,
            steps=steps,
            every=every,
            at=chosen,
            log_spaced=log_spaced,
            seed=0 if seed is None else seed,
            options=parse_assignments(settings or []),
            with_optimizer=with_optimizer,
            max_bytes=most,
            replace=force,
            resume=resume,
            sync=sync or "commit",
            time_limit=limit,
            dry_run=dry_run,
            report=report,
            stop=stop,
        )
    emit_made(row, form=format, quiet=quiet)
