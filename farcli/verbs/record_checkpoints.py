"""Turn checkpoints that a training saved into a trajectory."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from farcli.errors import StoreError, UnfinishedError, UsageError
from farcli.files import refuse_existing
from farcli.provenance import provenance
from farcli.recording.checkpoints import fill, find_checkpoints, layout_of_state, read_checkpoint
from farcli.recording.plan import DTYPES, selects
from farcli.store import Trajectory, TrajectoryWriter, is_store
from farcli.store.disk import Sync


def record_checkpoints(
    patterns: Sequence[str],
    output: Path,
    *,
    params: Sequence[str] = (),
    dtype: str = "keep",
    max_bytes: int | None = None,
    replace: bool = False,
    resume: bool = False,
    sync: Sync = "commit",
    dry_run: bool = False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Store the weights of existing checkpoints, a snapshot each, in order of the steps their names tell.

    Memory is one checkpoint and one vector of it. Pickles are read with `weights_only=True`.

    Args:
        patterns: paths of files (.safetensors, .pt, .pth, .bin, .ckpt) and folders, with wildcards.
        output: the store to write.
        params: patterns of tensor names to store; "!pattern" excludes.
        dtype: "keep" holds every tensor exactly, "float32" rounds float64, "bfloat16" to 8 bits of precision.
        max_bytes: refuse to write more.
        replace: replace an existing store, atomically.
        resume: go on with an unfinished one.
        sync: how durable each snapshot is made.
        dry_run: read the first checkpoint only, write nothing.
        report: called with (checkpoints done, all, text).

    Returns:
        A row: path, checkpoints, snapshots, steps (first, last), parameters, dtype, bytes, seconds.

    Raises:
        StoreError: no checkpoint matches, one cannot be read, or they are not of one network.
        UsageError: the output exists.
    """
    began = time.monotonic()
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r}: expected {', '.join(DTYPES)}.")
    if replace and resume:
        raise UsageError("--force and --resume contradict each other: choose one.")
    if not resume:
        refuse_existing(output, replace)
    found = find_checkpoints(patterns)
    steps = [step for step, _ in found]

    def read(path: Path) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in read_checkpoint(path).items() if selects(params, name)}

    first = read(found[0][1])
    if not first:
        raise UsageError(f"{found[0][1]}: has no tensor that matches --params {' '.join(params)}.")
    layout = layout_of_state(first)
    wide = dtype == "keep" and any(slot.dtype == "float64" for slot in layout.floats)
    kind = torch.float64 if wide else torch.float32
    total = len(found) * (layout.size * kind.itemsize + layout.integers * 8)
    row: dict[str, Any] = {
        "path": str(output),
        "checkpoints": len(found),
        "snapshots": len(found),
        "first_step": steps[0],
        "last_step": steps[-1],
        "parameters": layout.parameters,
        "buffers": layout.size - layout.parameters + layout.integers,
        "dtype": str(kind).removeprefix("torch."),
        "bytes": total,
        "seconds": None,
    }
    if max_bytes is not None and total > max_bytes:
        raise UsageError(f"{output}: needs {total} bytes, more than --max-bytes {max_bytes}.")
    if dry_run:
        return row
    rounded = {"rounded": dtype} if dtype == "bfloat16" else {}
    header = {
        "recording": {"door": "checkpoints", "from": list(patterns)} | rounded,
        "checkpoints": [str(path) for _, path in found],
        "provenance": provenance(),
    }
    writer: TrajectoryWriter | None
    if resume and is_store(output):
        writer = _resume(output, layout, steps, sync)
    else:
        writer = TrajectoryWriter.create(
            output,
            layout,
            [0],
            header=header,
            dtype=row["dtype"],
            planned_steps=steps,
            sync=sync,
            replace=replace,
            staged=not resume,
        )
    if writer is not None:
        floats, integers = torch.empty(layout.size, dtype=kind), torch.empty(layout.integers, dtype=torch.int64)
        with writer:
            for number in range(len(writer.steps), len(found)):
                step, path = found[number]
                fill(first if number == 0 else read(path), layout, floats, integers, path)
                if rounded:
                    floats = floats.bfloat16().to(kind)
                writer.append(step, floats.numpy(), integers.numpy() if layout.integers else None, run=0)
                first = {}
                report(number + 1, len(found), f"step {step}")
            writer.finish()
    return row | {"bytes": Trajectory.open(output).nbytes, "seconds": time.monotonic() - began}


def _resume(path: Path, layout: Any, steps: Sequence[int], sync: Sync) -> TrajectoryWriter | None:
    try:
        stored, finished = Trajectory.open(path), True
    except UnfinishedError:
        stored, finished = Trajectory.open(path, partial=True), False
    if stored.layout != layout or stored.steps != list(steps)[: len(stored.steps)]:
        raise StoreError(f"{path}: was begun with other checkpoints.", "--force records everything anew.")
    if finished and len(stored.steps) == len(steps):
        return None
    return TrajectoryWriter.resume(path, planned_steps=steps, sync=sync)
