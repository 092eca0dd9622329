"""Describe a store or a forecaster file: header first, like `ncdump -h`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from farcli.errors import StoreError
from farcli.store import Trajectory, is_store


def inspect(path: str) -> dict[str, Any]:
    """Everything a store or file says of itself, without reading weights.

    Args:
        path: a trajectory store (finished or not), or a file that `fit` wrote.

    Returns:
        For a store: path, kind, finished, runs, steps, snapshots, parameters, layout, storage, provenance, …
        For a file: path, kind "forecaster", method, options, context, targets, coefficients, provenance.

    Raises:
        StoreError: it is neither, or damaged.
    """
    if Path(path).is_file():
        return _forecaster(path)
    if not is_store(path) and not Path(path).exists():
        raise StoreError(f"{path}: no such store or file.")
    trajectory = Trajectory.open(path, partial=True)
    layout = trajectory.layout
    return {
        "path": path,
        "kind": trajectory.kind,
        "finished": trajectory.finished,
        "runs": trajectory.runs,
        "steps": trajectory.steps,
        "snapshots": trajectory.snapshots,
        "parameters": layout.parameters,
        "buffers": layout.size - layout.parameters,
        "integers": layout.integers,
        "storage": trajectory.describe(),
        "layout": layout.to_json(),
        "header": {key: value for key, value in trajectory.header.items() if key != "layout"},
    }


def _exported(path: str) -> dict[str, Any] | None:
    """What a snapshot that `export` wrote says of itself; None for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("farcli", "{}"))
            tensors = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return None
    if not isinstance(header, dict) or "step" not in header:
        return None
    return {"path": path, **header, "kind": "snapshot", "of": header.get("kind"), "tensors": tensors}


def _forecaster(path: str) -> dict[str, Any]:
    from farcli.artefact import load
    from farcli.forecasters.base import FittedForecaster

    exported = _exported(path)
    if exported is not None:
        return exported
    artefact = load(Path(path))
    forecaster = artefact.forecaster
    row: dict[str, Any] = {
        "path": path,
        "kind": "forecaster",
        "method": artefact.method,
        "reference": forecaster.reference,
        "options": asdict(forecaster.config),
        "coupling": forecaster.coupling.value,
        "parameters": artefact.problem.coordinates,
        "context": list(artefact.context),
        "observed": list(artefact.problem.steps_C),
        "targets": list(artefact.problem.steps_H),
        "provenance": artefact.provenance,
    }
    if isinstance(forecaster, FittedForecaster):
        row["coefficients"] = forecaster.coefficients()
    return row
