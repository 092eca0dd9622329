"""`farcli plot`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from farcli.cli.evaluate import Inputs
from farcli.cli.options import Context, Force, FormatOption, From, Memory, Output, Quiet, Runs, Settings, To


def plot(
    inputs: Inputs,
    output: Output,
    runs: Runs = None,
    to: To = None,
    start: From = None,
    context: Context = None,
    settings: Settings = None,
    quantity: Annotated[
        Literal["loss", "mse", "accuracy"], typer.Option("--quantity", help="What to draw against the horizon.")
    ] = "loss",
    memory: Memory = "2G",
    force: Force = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw held-out loss against horizon for every method, with the true future, to PNG, SVG or PDF.

    Takes what `eval` takes, or one NDJSON file that `eval` printed; or a store of `leap`, and stores of its controls:
    then loss against step, with every leap marked.

    Example: farcli plot forecast.zarr runs/digits.zarr -o forecast.png

    Example: farcli plot leap.zarr control.zarr -o leap.png
    """
    from farcli.cli.evaluate import evaluated
    from farcli.cli.options import steps_text
    from farcli.cli.output import emit_made
    from farcli.files import refuse_existing
    from farcli.verbs.plot import plot as draw

    refuse_existing(output, force)
    if (Path(inputs[0]) / "ledger" / "zarr.json").exists():
        from farcli.verbs.plot_leap import plot_leap

        row = plot_leap(Path(inputs[0]), [Path(each) for each in inputs[1:]], output, replace=force)
        emit_made(row, form=format, quiet=quiet)
        return
    if len(inputs) == 1 and inputs[0].endswith((".ndjson", ".jsonl", ".json")):
        rows = _read(inputs[0])
    else:
        rows = evaluated(
            inputs,
            quiet,
            runs=runs,
            targets=steps_text(to) or "all",
            start=start,
            context=context,
            settings=settings,
            memory=memory,
        )
    draw(rows, output, quantity=quantity, replace=force)
    emit_made({"path": str(output), "quantity": quantity, "rows": len(rows)}, form=format, quiet=quiet)


def _read(path: str) -> list[dict]:
    import json

    from farcli.errors import StoreError

    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise StoreError(f"{path}: is not NDJSON ({error}).") from error
    needed = {"step", "ahead", "method", "role", "tensor", "runs"}
    if not rows or any(not isinstance(row, dict) or not needed <= row.keys() for row in rows):
        raise StoreError(f"{path}: does not hold rows of `farcli eval --format ndjson`.")
    return rows
