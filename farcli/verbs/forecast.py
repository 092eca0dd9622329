"""Forecast the weights of recorded runs and store the forecast as a trajectory of its own."""

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

from farcli.files import refuse_existing
from farcli.forecasting import (
    Method,
    check_targets,
    choose_targets,
    forecast_stream,
    resolve_method,
)
from farcli.policies import Buffers
from farcli.provenance import provenance
from farcli.store import Trajectory, TrajectoryWriter
from farcli.stream import Source, open_sources, resolve_device


def forecast(
    method: str,
    store: str,
    output: Path,
    *,
    start: int | None = None,
    targets: str | None = None,
    context: int | None = None,
    runs: str | None = None,
    options: Mapping[str, str] | None = None,
    buffers: Buffers = "keep",
    transfer: bool = False,
    device: str = "auto",
    memory: int = 2_000_000_000,
    replace: bool = False,
    partial: bool = False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Forecast runs of a store from their prefix.

    Args:
        method: a file that `fit` wrote, or the name of a method that needs no fitting.
        store: recorded runs.
        output: the store to write; it has the schema of a recording, with kind "forecast".
        start: step of the last observed snapshot.
        targets: steps to forecast, as typed; all that were fitted, or all later recorded ones, when None.
        context: snapshots of the prefix, for methods that were not fitted.
        runs: runs to forecast, as typed; all when None.
        options: `--set` options, for methods that were not fitted.
        buffers: what becomes of BatchNorm statistics.
        transfer: allow a map fitted on another network.
        device: where to compute.
        memory: bytes that the data may take.
        replace: replace an existing output.
        partial: accept an unfinished store.
        report: called with (done, total, text).

    Returns:
        A row: path, method, runs, start, targets, parameters, seconds, …

    Raises:
        FarcliError: see the exit codes.
    """
    refuse_existing(output, replace)
    [source] = open_sources([store], runs, partial=partial)
    trajectory = source.trajectory
    resolved = resolve_method(method, trajectory, start=start, context=context, options=options, transfer=transfer)
    if targets is None and resolved.targets is not None:
        steps_H = resolved.targets
    else:
        steps_H = choose_targets(trajectory, resolved.start, targets, recorded=False)
    check_targets(resolved, steps_H)
    began = time.perf_counter()
    with TrajectoryWriter.create(
        output,
        trajectory.layout,
        list(source.runs),
        kind="forecast",
        header=_header(resolved, trajectory, source, buffers, options),
        dtype=trajectory.dtype.name,
        planned_steps=list(steps_H),
        lockstep=len(source.runs) > 1,
        replace=replace,
        staged=True,
    ) as writer:
        done = 0
        blocks = forecast_stream(
            resolved, source, steps_H, buffers=buffers, memory=memory, device=resolve_device(device)
        )
        for group, members in groupby(blocks, key=lambda pair: pair[0].runs):
            with ExitStack() as stack:
                sink = stack.enter_context(writer.columns(list(group), list(steps_H)))
                for block, weights_BHD in members:
                    sink.write(block.prefix.start, weights_BHD.cpu().numpy())
                    done += len(group) * (block.stop - block.prefix.start)
                    report(done, len(source.runs) * trajectory.layout.size, str(output))
                if trajectory.layout.integers:
                    sink.integers(_kept_integers(trajectory, group, resolved.start, len(steps_H)))
        writer.finish()
    return {
        "path": str(output),
        "method": resolved.label,
        "runs": list(source.runs),
        "from": resolved.start,
        "context": list(resolved.context),
        "targets": list(steps_H),
        "parameters": trajectory.layout.parameters,
        "buffers": buffers,
        "seconds": time.perf_counter() - began,
    }


def _kept_integers(trajectory: Trajectory, runs: tuple[int, ...], start: int, horizons: int) -> Any:
    import numpy as np

    rows = np.stack([trajectory.integers(run, start) for run in runs])
    return np.repeat(rows[:, None], horizons, axis=1)


def _header(
    method: Method,
    trajectory: Trajectory,
    source: Source,
    buffers: Buffers,
    options: Mapping[str, str] | None,
) -> dict[str, Any]:
    return {
        "provenance": provenance(),
        "forecast": {
            "method": method.label,
            "source": method.source,
            "options": {**{k: str(v) for k, v in _options(method).items()}, **(options or {})},
            "store": {"id": trajectory.id, "path": str(trajectory.path), "runs": list(source.runs)},
            "from": method.start,
            "context": list(method.context),
            "buffers": buffers,
            "training": [data.to_json() for data in method.training],
        },
    }


def _options(method: Method) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(method.forecaster.config)
