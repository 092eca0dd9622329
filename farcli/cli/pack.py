"""`farcli pack`."""

from pathlib import Path
from typing import Annotated

import typer

from farcli.cli.options import Force, FormatOption, Memory, Quiet, Runs


def pack(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A finished recording or forecast.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write; must not exist yet.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Put the packed store where the other was, once it is whole.")
    ] = False,
    codec: Annotated[
        str, typer.Option("--codec", help="none, zstd, pcodec (lossless), or bitround:N (keeps N mantissa bits).")
    ] = "zstd",
    steps: Annotated[
        str | None, typer.Option("--steps", help="Steps to keep: 0:600, or every second of these, 0:600:2.")
    ] = None,
    runs: Runs = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Cast to float64, float32 or float16.")] = None,
    chunk: Annotated[
        str | None, typer.Option("--chunk", help="Chunk of RUNS,STEPS,COORDINATES instead of the chosen one.")
    ] = None,
    memory: Memory = "2G",
    force: Force = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Rewrite a store for keeping: chunks over time, compressed, thinned, cast.

    Lossless unless bitround or --dtype say otherwise, and compared bit for bit while it is written. The result is a
    store like any other; it can be read by every command, but no longer be resumed.

    Example: farcli pack runs/digits.zarr -o packed.zarr
    """
    from farcli.cli.output import emit_made
    from farcli.cli.progress import progress
    from farcli.config import parse_size
    from farcli.errors import UsageError
    from farcli.verbs.pack import pack as run

    shape = None
    if chunk is not None:
        try:
            per_run, per_step, width = (int(part) for part in chunk.split(","))
        except ValueError:
            raise UsageError(f"--chunk {chunk!r}: expected RUNS,STEPS,COORDINATES like 1,64,4096.") from None
        shape = per_run, per_step, width
    with progress("pack", quiet) as report:
        row = run(
            store,
            output,
            in_place=in_place,
            codec=codec,
            steps=steps,
            runs=runs,
            dtype=dtype,
            chunk=shape,
            memory=parse_size(memory),
            replace=force,
            report=report,
        )
    emit_made(row, form=format, quiet=quiet)
