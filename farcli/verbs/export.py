"""Write one snapshot of a store as a safetensors file that `load_state_dict` takes strictly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from farcli import weights
from farcli.errors import UsageError
from farcli.files import check_outcome, write_file
from farcli.provenance import provenance
from farcli.recording.picture import read_once
from farcli.store import Trajectory


def export(
    store: str,
    output: Path,
    *,
    step: int | None = None,
    run: int | None = None,
    replace: bool = False,
    partial: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the network of one run at one step.

    Every name of the model's `state_dict` is there, tied ones included (each with bytes of its own, since
    safetensors refuses shared memory), so that `load_state_dict(strict=True)` takes the file as it is.

    Args:
        store: a recording or a forecast.
        output: the safetensors file to write.
        step: the snapshot; the last one when None.
        run: the run; the only one when None.
        replace: replace an existing file.
        partial: accept an unfinished store.
        warn: called with a line the user should read.

    Returns:
        A row: path, run, step, tensors, bytes.

    Raises:
        UsageError: no such run or step, or the file exists.
    """
    from safetensors.torch import save

    check_outcome(output, replace=replace, resume=False, inputs=[store])
    trajectory = Trajectory.open(store, partial=partial)
    if run is None:
        if len(trajectory.runs) > 1:
            raise UsageError(
                f"{store}: holds {len(trajectory.runs)} runs ({trajectory.runs[0]}…{trajectory.runs[-1]}).",
                hint="Choose one with --run.",
            )
        run = trajectory.runs[0]
    if run not in trajectory.runs:
        raise UsageError(f"{store}: has no run {run}; it has runs {trajectory.runs[0]}…{trajectory.runs[-1]}.")
    step = trajectory.steps[-1] if step is None else step
    if step not in trajectory.steps:
        near = min(trajectory.steps, key=lambda recorded: abs(recorded - step))
        raise UsageError(
            f"{store}: has no snapshot at step {step}; the nearest is {near} "
            f"({len(trajectory.steps)} snapshots, steps {trajectory.steps[0]}…{trajectory.steps[-1]})."
        )
    vector = torch.from_numpy(trajectory.read([run], [step])[0, 0])
    if not torch.isfinite(vector).all():
        at = int((~torch.isfinite(vector)).nonzero()[0])
        name = trajectory.layout.floats[trajectory.layout.segments(at, at + 1)[0].slot].name
        warn(f"{store}: run {run}, step {step} holds NaN or Inf (tensor {name!r}); written as they are.")
    integers = torch.from_numpy(trajectory.integers(run, step))
    state = weights.unflatten(vector, integers, trajectory.layout) | read_once(trajectory.path, trajectory.header)
    header = {
        "store": str(trajectory.path),
        "id": trajectory.id,
        "kind": trajectory.kind,
        "run": run,
        "step": step,
        "provenance": provenance(),
    }
    # Each alias gets memory of its own: safetensors refuses shared tensors, strict loading wants every name.
    aliases = {alias for alias, _ in (*trajectory.layout.tied, *trajectory.header.get("frozen", {}).get("tied", ()))}
    tensors = {name: tensor.clone() if name in aliases else tensor.contiguous() for name, tensor in state.items()}
    data = save(tensors, metadata={"format": "pt", "farcli": json.dumps(header)})
    write_file(output, data, replace=replace)
    return {
        "path": str(output),
        "store": store,
        "kind": trajectory.kind,
        "run": run,
        "step": step,
        "tensors": len(tensors),
        "bytes": len(data),
    }
