"""Forecast the weights of recorded runs and store the forecast as a trajectory of its own."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from dataclasses import replace as replaced
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import UsageError
from farcli.files import check_outcome
from farcli.forecasters.base import Prefix
from farcli.forecasting import (
    Method,
    check_targets,
    choose_targets,
    forecast_stream,
    interval_block,
    resolve_method,
)
from farcli.policies import Buffers
from farcli.provenance import provenance
from farcli.store import Trajectory, TrajectoryWriter
from farcli.stream import Source, open_sources, resolve_device
from farcli.verbs.update_rule import warnings_of

HALF_WIDTH = "half-width of a 90 % interval"
"""What a store of intervals says it holds."""


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
    resume: bool = False,
    dry_run: bool = False,
    partial: bool = False,
    intervals: Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
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
        resume: where this very forecast exists already, do nothing and return its row.
        dry_run: write nothing, return the row that would come out.
        partial: accept an unfinished store.
        intervals: another store to write: half-widths of 90 % intervals, 0 for buffers.
        warn: called with a line the user should read.
        report: called with (done, total, text).

    Returns:
        A row: path, method, runs, from, context, targets, parameters, buffers, bytes, seconds (None where nothing
        was written); with intervals also their path and mean widths at each target.

    Raises:
        FarcliError: see the exit codes.
    """
    check_outcome(output, replace=replace, resume=resume, inputs=[store, method])
    if intervals is not None:
        check_outcome(intervals, replace=replace, resume=resume, inputs=[store, method, str(output)])
        if intervals.resolve() == output.resolve():
            raise UsageError(f"{intervals}: is named twice, for the forecast and for its intervals.")
    [source] = open_sources([store], runs, partial=partial)
    trajectory = source.trajectory
    resolved = resolve_method(method, trajectory, start=start, context=context, options=options, transfer=transfer)
    if targets is None and resolved.targets is not None:
        steps_H = resolved.targets
    else:
        steps_H = choose_targets(trajectory, resolved.start, targets, recorded=False)
    check_targets(resolved, steps_H)
    for text in warnings_of(resolved, source, steps_H[-1]):
        warn(text)
    header = _header(resolved, trajectory, source, buffers)
    row = {
        "path": str(output),
        "method": resolved.label,
        "runs": list(source.runs),
        "from": resolved.start,
        "context": list(resolved.context),
        "targets": list(steps_H),
        "parameters": trajectory.layout.parameters,
        "buffers": buffers,
        "bytes": len(source.runs) * len(steps_H) * trajectory.layout.size * trajectory.dtype.itemsize,
        "seconds": None,
    }
    if resume and output.exists() and (intervals is None or intervals.exists()):
        _require_same(output, header, source, steps_H)
        return row
    if dry_run:
        return row
    began = time.perf_counter()
    gives_way = replace or (resume and output.exists())

    def begun(path: Path, header: Mapping[str, Any]) -> TrajectoryWriter:
        return TrajectoryWriter.create(
            path,
            trajectory.layout,
            list(source.runs),
            kind="forecast",
            header={"provenance": provenance(), "forecast": header},
            dtype=trajectory.dtype.name,
            planned_steps=list(steps_H),
            lockstep=len(source.runs) > 1,
            replace=gives_way,
            staged=True,
        )

    with ExitStack() as stack:
        writer = stack.enter_context(begun(output, header))
        halves = None
        if intervals is not None:
            halves = stack.enter_context(begun(intervals, {**header, "quantity": HALF_WIDTH}))
        done = 0
        width_H = np.zeros(len(steps_H))
        blocks = forecast_stream(
            resolved, source, steps_H, buffers=buffers, memory=memory, device=resolve_device(device)
        )
        for group, members in groupby(blocks, key=lambda pair: pair[0].runs):
            with ExitStack() as sinks:
                columns = list(group), list(steps_H)
                sink = sinks.enter_context(writer.columns(*columns))
                half_sink = sinks.enter_context(halves.columns(*columns)) if halves is not None else None
                for block, weights_BHD in members:
                    sink.write(block.prefix.start, weights_BHD.cpu().numpy())
                    if half_sink is not None:
                        half_BHD = _half_widths(resolved, block.prefix, steps_H)
                        half_sink.write(block.prefix.start, half_BHD)
                        width_H += 2 * half_BHD.sum((0, 2), dtype=np.float64)
                    done += len(group) * (block.stop - block.prefix.start)
                    report(done, len(source.runs) * trajectory.layout.size, str(output))
                if trajectory.layout.integers:
                    for each in (sink, half_sink):
                        if each is not None:
                            each.integers(_kept_integers(trajectory, group, resolved.start, len(steps_H)))
        if halves is not None:
            halves.finish()
            row |= {
                "intervals": str(intervals),
                "width": (width_H / (len(source.runs) * trajectory.layout.parameters)).tolist(),
            }
        writer.finish()
    return row | {"seconds": time.perf_counter() - began}


def _half_widths(method: Method, prefix: Prefix, steps_H: Sequence[int]) -> np.ndarray:
    """Half-widths of 90 % intervals of one block, [B, H, D]; 0 for buffers.

    Raises:
        UsageError: the method has none.
    """
    runs, _, size = prefix.weights_BCD.shape
    half_BHD = np.zeros((runs, len(steps_H), size), np.float32)
    moving = min(size, max(0, prefix.layout.parameters - prefix.start))
    if moving:
        inner = replaced(prefix, weights_BCD=prefix.weights_BCD[..., :moving])
        found_BHD = interval_block(method, inner, steps_H)
        if found_BHD is None:
            raise UsageError(
                f"{method.source}: has no intervals.", "Fit far, or lfd2 with --set intervals=true, or leave it out."
            )
        half_BHD[..., :moving] = found_BHD.cpu().numpy()
    return half_BHD


def _require_same(output: Path, header: Mapping[str, Any], source: Source, steps_H: Sequence[int]) -> None:
    """Refuse to take another forecast for the one asked for."""
    stored = Trajectory.open(output)
    found = {**stored.header.get("forecast", {}), "runs": stored.runs, "steps": stored.steps}
    for key, wanted in {**header, "runs": list(source.runs), "steps": list(steps_H)}.items():
        if found.get(key) != wanted:
            raise UsageError(
                f"{output}: holds another forecast: its {key} is {found.get(key)}, not {wanted}.",
                hint="Choose another -o, or pass --force to replace it.",
            )


def _kept_integers(trajectory: Trajectory, runs: tuple[int, ...], start: int, horizons: int) -> Any:
    rows = np.stack([trajectory.integers(run, start) for run in runs])
    return np.repeat(rows[:, None], horizons, axis=1)


def _header(method: Method, trajectory: Trajectory, source: Source, buffers: Buffers) -> dict[str, Any]:
    return {
        "method": method.label,
        "source": method.source,
        "options": {key: str(value) for key, value in asdict(method.forecaster.config).items()},
        "store": {"id": trajectory.id, "path": str(trajectory.path), "runs": list(source.runs)},
        "from": method.start,
        "context": list(method.context),
        "buffers": buffers,
        "training": [data.to_json() for data in method.training],
    }
