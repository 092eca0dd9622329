"""Record how the weights of a built-in workload move while it trains."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farcli.errors import (
    FarcliError,
    NonFiniteError,
    ResourceError,
    StoppedError,
    StoreError,
    UnfinishedError,
    UsageError,
)
from farcli.files import check_outcome
from farcli.layout import Layout
from farcli.provenance import provenance
from farcli.recording.recorder import MOMENTS
from farcli.store import Trajectory, TrajectoryWriter, is_store
from farcli.store.disk import Sync
from farcli.training import TrainingRun, completed, describe_workload, run_seed, workload_from
from farcli.workloads.base import Workload

_STATE = "training.pt"
"""The file in an unfinished store that holds the interrupted run's training."""


def record(
    workload: str,
    output: Path,
    *,
    runs: int = 1,
    steps: int | None = None,
    every: int | None = None,
    at: Sequence[int] | None = None,
    log_spaced: int | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    with_optimizer: bool = False,
    max_bytes: int | None = None,
    replace: bool = False,
    resume: bool = False,
    sync: Sync = "commit",
    time_limit: float | None = None,
    dry_run: bool = False,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Train a workload from its seed, some runs over, and store a snapshot of the weights now and then.

    A stop saves the training beside the snapshots, and resuming goes on from there. Where a recording ended
    without (killed, or on a machine with another torch), the interrupted run is trained again from its seed and
    has to give the snapshots already stored bit for bit. Finished runs are kept.

    Args:
        workload: a name in the table of workloads, or "package.module:Class".
        output: the store to write.
        runs: how many; run r has the seed `run_seed(seed, r)`.
        steps: optimiser steps of each run; the workload's own number, or the last of `at`, when None.
        every: steps between snapshots; the first is at step 0, the last at the last step.
        at: instead, the steps of the snapshots; the last step is added.
        log_spaced: instead, so many snapshots evenly spaced in log(step), and step 0; fewer where they coincide.
        seed: of everything random.
        options: `--set` options of the workload.
        with_optimizer: also store Adam's moments, in `optimizer.zarr` within the store; there are none at step 0.
        max_bytes: refuse to write more.
        replace: an existing store gives way once the new one is finished; what is unfinished of it is then
            not kept when the recording stops.
        resume: go on with an unfinished store of the same command; create it where there is none.
        sync: how durable each snapshot is made, see the store.
        time_limit: seconds after which to stop as if by a signal.
        dry_run: write nothing, return the row that would come out; bytes are uncompressed.
        stop: asked before every step; true saves and stops.
        report: called with (steps done, steps in all, text).

    Returns:
        A row: path, workload, runs, steps, snapshots (of each run), parameters, buffers, dtype, bytes,
        seconds, seed.

    Raises:
        UsageError: an argument cannot be meant, the output exists, or it holds another recording.
        NonFiniteError: a run diverged; what came before stays readable with `partial`.
        StoppedError: `stop` or `time_limit` said so; the store can be resumed.
        StoreError: a resumed run gives other weights than the stored ones.
        ResourceError: no space left.
    """
    began = time.monotonic()
    for name, value, least in (
        ("runs", runs, 1),
        ("steps", steps, 1),
        ("every", every, 1),
        ("log-spaced", log_spaced, 1),
        ("seed", seed, 0),
    ):
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: expected a whole number of at least {least}.")
    if not replace and not resume and is_store(output) and not (output / "zarr.json").exists():
        raise UsageError(
            f"{output}: already exists, unfinished.", "Pass --resume to go on with it, or --force to replace it."
        )
    check_outcome(output, replace=replace, resume=resume)
    if steps is None and at:
        steps = at[-1]
        if steps < 1:
            raise UsageError(f"--at {steps}: expected a step of at least 1 to train to.")
    task = workload_from(workload, options or {}, steps=steps)
    steps = steps or task.default_steps
    if every is None and not at and log_spaced is None:
        every = task.default_every
    schedule = _schedule(steps, every, at, log_spaced)

    seeds = [run_seed(seed, run) for run in range(runs)]
    training = TrainingRun(task, seeds[: runs if task.lockstep else 1])
    layout = training.layout
    moments = _layout_of_moments(training, workload) if with_optimizer else None
    del training  # its memory is wanted
    dtype = "float64" if any(slot.dtype == "float64" for slot in layout.floats) else "float32"
    row = {
        "path": str(output),
        "workload": workload,
        "runs": runs,
        "steps": steps,
        "snapshots": len(schedule),
        "parameters": layout.parameters,
        "buffers": layout.size - layout.parameters,
        "integers": layout.integers,
        "dtype": dtype,
        "bytes": runs * len(schedule) * (layout.size * np.dtype(dtype).itemsize + layout.integers * 8),
        "seconds": None,
        "seed": seed,
    }
    if moments is not None:
        row["bytes"] += runs * sum(step > 0 for step in schedule) * moments.size * np.dtype(dtype).itemsize
    if max_bytes is not None and row["bytes"] > max_bytes:
        raise UsageError(
            f"{output}: needs {row['bytes']} bytes, more than --max-bytes {max_bytes}.",
            "Take fewer snapshots: a larger --every, or --log-spaced.",
        )
    if dry_run:
        return row
    header = {
        "workload": describe_workload(workload, task),
        "seed": seed,
        "seeds": seeds,
        "recording": {"steps": steps, "snapshots": _spacing(every, at, log_spaced)}
        | ({"with_optimizer": True} if with_optimizer else {}),
        "provenance": provenance(threads=task.threads or torch.get_num_threads()),
    }
    replacing = replace and output.exists()
    if resume and is_store(output):
        writer = _resume(output, header, layout, sync)
    else:
        writer = TrajectoryWriter.create(
            output,
            layout,
            list(range(runs)),
            kind="run",
            header=header,
            dtype=dtype,
            planned_steps=schedule,
            lockstep=task.lockstep,
            sync=sync,
            replace=replace,
        )
    saved = output / _STATE
    if writer is not None:
        deadline = began + time_limit if time_limit is not None else float("inf")
        try:
            with (
                writer,
                nullcontext()
                if moments is None
                else _moments_writer(writer, moments, schedule, dtype, task.lockstep, sync) as inner,
            ):
                recording = _Recording(
                    writer=writer,
                    moments=inner,
                    state=None if replacing else saved,
                    schedule=schedule,
                    total=steps * (1 if task.lockstep else runs),
                    stop=lambda: stop() or time.monotonic() > deadline,
                    report=report,
                )
                if task.lockstep:
                    recording.train(task, seeds, range(runs))
                else:
                    for run in range(runs):
                        recording.train(task, seeds[run : run + 1], [run])
                if inner is not None:
                    inner.finish()  # first: finishing may rename the outer one
                writer.finish()
        except ResourceError as error:
            raise ResourceError(str(error), "Free some space and run the same command again with --resume.") from error
    saved.unlink(missing_ok=True)
    return row | {"bytes": Trajectory.open(output).nbytes, "seconds": time.monotonic() - began}


def _schedule(steps: int, every: int | None, at: Sequence[int] | None, log_spaced: int | None) -> list[int]:
    """The steps of the snapshots, ascending, the last step among them."""
    given = [name for name, value in (("--every", every), ("--at", at), ("--log-spaced", log_spaced)) if value]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} contradict each other: choose one.")
    if at:
        if any(low >= high for low, high in pairwise(at)) or at[0] < 0 or at[-1] > steps:
            raise UsageError(f"--at {','.join(map(str, at))}: expected ascending steps between 0 and {steps}.")
        chosen = set(at)
    elif log_spaced:
        chosen = {0, *(int(step) for step in np.geomspace(1, steps, log_spaced).round())}
    else:
        assert every is not None
        chosen = set(range(0, steps + 1, every))
    return sorted(chosen | {steps})


def _spacing(every: int | None, at: Sequence[int] | None, log_spaced: int | None) -> dict[str, Any]:
    if at:
        return {"at": list(at)}
    return {"every": every} if log_spaced is None else {"log_spaced": log_spaced}


def _layout_of_moments(training: TrainingRun, workload: str) -> Layout:
    """The layout of what its optimiser keeps, found by a step of training that counts for nothing.

    Raises:
        UsageError: it keeps nothing.
    """
    training.advance(1)
    layout, _ = training.moments()
    if not layout.size:
        raise UsageError(
            f"--with-optimizer: the optimiser of {workload}, {type(training.optimizer).__name__}, keeps no moments.",
            "Choose one that does: --set optimizer=adam.",
        )
    return layout


def _moments_writer(
    outer: TrajectoryWriter, layout: Layout, schedule: Sequence[int], dtype: str, lockstep: bool, sync: Sync
) -> TrajectoryWriter:
    """The writer of the moments: of a new store within the other's folder, or of the one that is there."""
    path = outer.home / MOMENTS
    if is_store(path):
        return TrajectoryWriter.resume(path, sync=sync)
    planned = [step for step in schedule if step > 0]
    return TrajectoryWriter.create(
        path, layout, outer.runs, kind="optimizer", dtype=dtype, planned_steps=planned, lockstep=lockstep, sync=sync
    )


def _resume(path: Path, header: Mapping[str, Any], layout: Layout, sync: Sync) -> TrajectoryWriter | None:
    """The writer of an unfinished store of the same recording; None where it is finished."""
    try:
        stored, finished = Trajectory.open(path), True
    except UnfinishedError:
        stored, finished = Trajectory.open(path, partial=True), False
    for name in ("workload", "seed", "seeds", "recording"):
        before = stored.header.get(name)
        if name == "workload" and isinstance(before, Mapping):
            before = completed(before)
        difference = _difference(before, header[name], name)
        if difference is not None:
            raise UsageError(
                f"{path}: holds another recording: {difference}.",
                "Give the options it was begun with, or another -o; --force replaces it.",
            )
    if stored.layout != layout:
        raise UsageError(f"{path}: holds another network, D = {stored.layout.size} instead of {layout.size}.")
    return None if finished else TrajectoryWriter.resume(path, sync=sync)


def _difference(found: Any, wanted: Any, name: str) -> str | None:
    """What differs first, in words."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            difference = _difference(found.get(key), wanted.get(key), str(key))
            if difference is not None:
                return difference
        return None
    if found == wanted:
        return None
    if name == "seeds" and isinstance(found, list):
        return f"{len(found)} runs instead of {len(wanted)}"
    return f"{name} is {found}, not {wanted}"


class _Recording:
    """One pass over all runs: trains them, and stores or checks each snapshot."""

    def __init__(
        self,
        *,
        writer: TrajectoryWriter,
        moments: TrajectoryWriter | None,
        state: Path | None,
        schedule: list[int],
        total: int,
        stop: Callable[[], bool],
        report: Callable[[float, float, str], None],
    ) -> None:
        self.path = writer.path
        self.writer = writer
        self.moments = moments
        self.state = state
        self.schedule = schedule
        self.total = total
        self.stop = stop
        self.report = report
        self.done = 0

    def train(self, workload: Workload, seeds: Sequence[int], runs: Sequence[int]) -> None:
        """Train one run, or all at once; snapshots stored before are checked, not written."""
        first = sum(step == 0 for step in self.schedule)
        committed = _committed(self.writer, runs)
        if self.moments is not None:  # a killed process may have left one ahead of the other
            committed = min(committed, first + _committed(self.moments, runs))
        if committed < len(self.schedule):
            training = TrainingRun(workload, seeds)
            if self.state is not None and self.state.exists():
                # further than the snapshots: power was lost before these reached the disk
                training.restore(self.state, most=self.schedule[committed] - 1)
            losses = np.full(len(runs), np.nan)
            for index, step in enumerate(self.schedule):
                if step < training.step:
                    continue
                while training.step < step:
                    if self.stop():
                        self._stopped(training, runs)
                    losses = training.advance(1)
                    self.report(self.done + training.step, self.total, f"{_label(runs)}, step {training.step}")
                vectors, integers = training.vectors(), training.integers()
                self._require_finite(vectors, runs, step, losses)
                if self.moments is not None and index >= first:
                    self._put(self.moments, runs, index - first, step, training.moments()[1], None)
                self._put(self.writer, runs, index, step, vectors, integers)
        self.done += self.schedule[-1]

    def _put(
        self,
        writer: TrajectoryWriter,
        runs: Sequence[int],
        index: int,
        step: int,
        vectors: np.ndarray,
        integers: np.ndarray | None,
    ) -> None:
        """Append a snapshot, or compare it with the one that is there."""
        if index < _committed(writer, runs):
            self._compare(Trajectory.open(writer.home, partial=True), runs, step, vectors, integers)
        elif len(runs) > 1 or writer.runs == list(runs):
            writer.append(step, vectors, integers)
        else:
            writer.append(step, vectors[0], None if integers is None else integers[0], run=runs[0])

    def _stopped(self, training: TrainingRun, runs: Sequence[int]) -> None:
        where = f"{self.path}: stopped at step {training.step} of {_label(runs)}"
        if self.state is None:
            raise FarcliError(f"{where}; the store it was to replace is kept, nothing of the new one is.")
        if self.moments is not None:
            self.moments.close()
        self.writer.close()  # says so when the disk is full; leaving the writer's block would not
        training.save(self.state)
        saved, planned = sum(self.writer.snapshots), len(self.writer.snapshots) * len(self.schedule)
        raise StoppedError(f"{where}; {saved} of {planned} snapshots are saved.", "Run it again with --resume.")

    def _require_finite(self, vectors: np.ndarray, runs: Sequence[int], step: int, losses: np.ndarray) -> None:
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            index = int(finite.argmin())
            raise NonFiniteError(
                f"{self.path}: run {runs[index]} diverged: its weights are not finite at step {step} "
                f"(training loss {losses[index]:g}).",
                "Try a lower learning rate."
                + (" The snapshots before can be read with --partial." if self.state is not None else ""),
            )

    def _compare(
        self, stored: Trajectory, runs: Sequence[int], step: int, vectors: np.ndarray, integers: np.ndarray | None
    ) -> None:
        before = stored.read(list(runs), [step], 0, stored.layout.size)[:, 0]
        for index, run in enumerate(runs):
            same = before[index].tobytes() == vectors[index].astype(before.dtype).tobytes()
            if not (same and (integers is None or np.array_equal(stored.integers(run, step), integers[index]))):
                raise StoreError(
                    f"{self.path}: run {run}, trained again, differs from what is stored at step {step}.",
                    "Was it begun with other versions, or on another machine? `farcli inspect` shows them; "
                    "--force records everything anew.",
                )


def _committed(writer: TrajectoryWriter, runs: Sequence[int]) -> int:
    return min(writer.snapshots[writer.runs.index(run)] for run in runs)


def _label(runs: Sequence[int]) -> str:
    return f"run {runs[0]}" if len(runs) == 1 else f"runs {runs[0]}…{runs[-1]}"
