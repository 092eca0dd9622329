"""`farcli diff`."""

from typing import Annotated

import typer

from farcli.cli.options import FormatOption, Memory, Partial, Quiet


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A store or a safetensors file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    step: Annotated[int | None, typer.Option("--step", help="Compare this snapshot only.")] = None,
    run: Annotated[int | None, typer.Option("--run", help="Compare this run only.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 5 unless all is equal bit for bit.")] = False,
    memory: Memory = "1G",
    partial: Partial = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Compare stores or safetensors files, tensor by tensor.

    Two stores are compared over the runs and steps they share; a store and a file at --run and --step (the only
    run and the last step if not said). The exit code is 0 whatever is found, unless --check asks for 5.
    """
    from farcli.cli.output import Column, chosen_format, emit
    from farcli.cli.progress import progress
    from farcli.config import parse_size
    from farcli.errors import CheckFailedError
    from farcli.verbs.diff import diff as run_diff

    with progress("diff", quiet) as report:
        rows = run_diff(a, b, run=run, step=step, memory=parse_size(memory), partial=partial, report=report)
    unequal = [row for row in rows if row["state"] != "equal"]
    if chosen_format(format) == "table":
        columns = [
            Column(key="tensor", heading="tensor"),
            Column(key="state", heading="state"),
            Column(key="max_abs", heading="max |a−b|", form=".3g"),
            Column(key="relative_l2", heading="relative L2", form=".3g"),
            Column(key="differing", heading="differing"),
            Column(key="snapshots", heading="of"),
            Column(key="detail", heading="detail", wrap=True),
        ]
        columns = [c for c in columns if any(row[c.key] is not None for row in rows)]
        same = sum(row["state"] == "equal" for row in rows)
        emit(unequal or rows, columns, form=format, notes=[f"{same} of {len(rows)} rows are equal bit for bit."])
    else:
        emit(rows, form=format)
    if check and unequal:
        raise CheckFailedError(f"{a} and {b}: {len(unequal)} of {len(rows)} rows are not equal.")
