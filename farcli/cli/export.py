"""`farcli export`."""

from typing import Annotated

import typer

from farcli.cli.options import Force, FormatOption, Output, Partial, Quiet


def export(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A recording or a forecast.")],
    output: Output,
    step: Annotated[int | None, typer.Option("--step", help="The snapshot to write; the last one if not said.")] = None,
    run: Annotated[int | None, typer.Option("--run", help="The run to write; needed where there are several.")] = None,
    partial: Partial = False,
    force: Force = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Write one snapshot as safetensors, ready for load_state_dict.

    Example: farcli export runs/digits.zarr --run 8 --step 600 -o model.safetensors
    """
    from farcli.cli.output import emit_made, saying
    from farcli.verbs.export import export as write

    row = write(store, output, step=step, run=run, replace=force, partial=partial, warn=saying(quiet))
    emit_made(row, form=format, quiet=quiet)
