"""Rewrite a store for keeping: chunks over time, compressed, thinned, cast."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from farcli.config import parse_selection
from farcli.errors import UsageError
from farcli.files import refuse_existing
from farcli.store import Trajectory
from farcli.store import pack as write


def pack(
    store: str,
    output: Path | None,
    *,
    in_place: bool = False,
    codec: str = "zstd",
    steps: str | None = None,
    runs: str | None = None,
    dtype: str | None = None,
    chunk: tuple[int, int, int] | None = None,
    memory: int = 2_000_000_000,
    replace: bool = False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Write a finished store again, smaller.

    It keeps the store's identity, so that what was fitted on the one knows the runs of the other. NaN and Inf are
    kept bit for bit.

    Args:
        store: a recording or a forecast.
        output: the store to write; None in place.
        in_place: put the packed store where the other was, once it is whole.
        codec: "none", "zstd", "pcodec" (lossless) or "bitround:N" (lossy).
        steps: steps to keep, as typed; all when None.
        runs: runs to keep, as typed; all when None.
        dtype: to cast to.
        chunk: shape of the chunks (runs, steps, coordinates) instead of the chosen one.
        memory: bytes that data may take.
        replace: replace an existing output; in place, allow what cannot be undone.
        report: called with (done, total, text).

    Returns:
        A row: path, codec, runs, snapshots, bytes, raw_bytes, ratio, lossless, loss (in units of the typical
        update), chunk, seconds.

    Raises:
        UsageError: there is no output, or two; or packing in place would lose something.
    """
    if (output is None) != in_place:
        raise UsageError("pack: give either -o OUTPUT or --in-place.")
    trajectory = Trajectory.open(store)
    path = Path(store) if output is None else output
    if output is not None:
        if output.exists() and output.resolve() == Path(store).resolve():
            raise UsageError(f"{output}: is the store itself.", hint="Pass --in-place instead of -o.")
        refuse_existing(output, replace)
    chosen_runs = parse_selection(runs, trajectory.runs, "runs") if runs else trajectory.runs
    chosen_steps = parse_selection(steps, trajectory.steps, "steps") if steps else trajectory.steps
    loses = {
        "--codec": codec.startswith("bitround"),
        "--steps": len(chosen_steps) < len(trajectory.steps),
        "--runs": len(chosen_runs) < len(trajectory.runs),
        "--dtype": dtype is not None and dtype != trajectory.dtype.name,
    }
    if in_place and any(loses.values()) and not replace:
        given = ", ".join(option for option, applies in loses.items() if applies)
        raise UsageError(
            f"{store}: {given} would lose data, and in place nothing of it is kept.",
            hint="Write another store with -o, or pass --force.",
        )
    began = time.perf_counter()
    packed = write(
        trajectory,
        path,
        codec=codec,
        runs=chosen_runs,
        steps=sorted(chosen_steps),
        dtype=dtype,
        chunk=chunk,
        memory=memory,
        replace=replace or in_place,
        report=lambda done, total: report(done, total, str(path)),
    )
    return {
        "path": str(path),
        "codec": codec,
        "runs": chosen_runs,
        "snapshots": len(chosen_runs) * len(chosen_steps),
        "bytes": packed.bytes,
        "raw_bytes": packed.raw_bytes,
        "ratio": packed.raw_bytes / packed.bytes,
        "lossless": packed.loss is None,
        "loss": packed.loss,
        "chunk": list(packed.chunk),
        "seconds": time.perf_counter() - began,
    }
