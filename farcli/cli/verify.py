"""`farcli verify`."""

from typing import Annotated

import typer

from farcli.cli.options import FormatOption, Partial, Quiet


def verify(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Recordings or forecasts.")],
    allow_non_finite: Annotated[
        bool, typer.Option("--allow-non-finite", help="Take NaN and Inf in weights for no fault; they are still named.")
    ] = False,
    partial: Partial = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Read stores whole: files, checksums, order of steps, NaN and Inf.

    Exit code 3 if bytes are missing or wrong; 4 if all bytes are as written but some weights are NaN or Inf, which
    `record` stores as they come and `fit`, `forecast` and `eval` refuse.
    """
    from farcli.cli.output import Column, emit
    from farcli.cli.progress import progress
    from farcli.errors import DamagedError, NonFiniteError
    from farcli.verbs.verify import verify as run

    with progress("verify", quiet) as report:
        rows = run(stores, partial=partial, report=report)
    columns = [
        Column(key="store", heading="store"),
        Column(key="state", heading="state"),
        Column(key="runs", heading="runs"),
        Column(key="snapshots", heading="snapshots"),
        Column(key="bytes", heading="bytes", form=","),
        Column(key="seconds", heading="seconds", form=".1f"),
        Column(key="problem", heading="problem", wrap=True),
    ]
    emit(rows, [c for c in columns if any(row[c.key] is not None for row in rows)], form=format)
    wrong = {state: [row for row in rows if row["state"] == state] for state in ("damaged", "unreadable", "non-finite")}
    bad = list(dict.fromkeys(row["store"] for row in wrong["damaged"] + wrong["unreadable"]))
    if bad:
        raise DamagedError(
            f"{', '.join(bad)}: damaged or unreadable; see the rows.",
            hint="Runs and steps that are not named are sound; choose them with --runs and --to, or record again.",
        )
    if wrong["non-finite"] and not allow_non_finite:
        raise NonFiniteError(
            f"{wrong['non-finite'][0]['store']}: holds NaN or Inf; see the rows.",
            hint="They were recorded so. Leave those runs out with --runs, or pass --allow-non-finite.",
        )
