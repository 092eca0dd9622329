"""The store of a leaping training: weights, their running average, the ledger; and how it goes on after a stop.

A store in progress holds `leaping.pt` (what runs that have ended came to, and the leaper's state in the one that has
not) and `training.pt` (that run's training). A finished one holds the group `ledger`: one array of each quantity of
the proposals, and the held-out losses, the control's too, that any Zarr reader opens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn
from zipfile import BadZipFile

import numpy as np
import torch

from farcli.errors import NonFiniteError, StoppedError, StoreError, UnfinishedError, UsageError
from farcli.files import check_outcome, staged_file
from farcli.speculation.arrays import LEDGER, read_rows, write_ledger
from farcli.speculation.leaper import Leaper
from farcli.speculation.ledger import Entry
from farcli.store import Trajectory, TrajectoryWriter, is_store
from farcli.store.disk import Sync
from farcli.training import TrainingRun

AVERAGE = "average.zarr"
"""Store inside a store: the running average of the leaping runs, which is what to evaluate and keep."""
_STATE, _TRAINING = "leaping.pt", "training.pt"

Curve = list[tuple[int, float, float]]
"""(step, held-out loss of the weights, of their running average)."""


class Journal:
    """Where a leaping training writes to; nowhere, where there is no output.

    Args:
        output: the store, or None.
        header: what the store says of itself.
        schedule: steps of the snapshots.
        runs: how many.
        replace: replace an existing store once the new one is finished.
        resume: go on with an unfinished one.
        sync: how durable each snapshot is made.

    Attributes:
        finished: rows of all runs, where the store to resume is finished.
    """

    def __init__(
        self,
        output: Path | None,
        header: Mapping[str, Any],
        schedule: Sequence[int],
        runs: int,
        *,
        replace: bool,
        resume: bool,
        sync: Sync,
    ) -> None:
        self.output = output
        self.finished: list[dict[str, Any]] | None = None
        self._header = dict(header)
        self._schedule = list(schedule)
        self._runs = runs
        self._replace = replace
        self._sync: Sync = sync
        self._ended: dict[int, dict[str, Any]] = {}
        self._current: dict[str, Any] | None = None
        self._writers: tuple[TrajectoryWriter, TrajectoryWriter] | None = None
        self._stored: tuple[Trajectory, Trajectory] | None = None
        if output is None:
            return
        if not resume and not replace and is_store(output) and not (output / "zarr.json").exists():
            raise UsageError(
                f"{output}: already exists, unfinished.", "Pass --resume to go on with it, or --force to replace it."
            )
        check_outcome(output, replace=replace, resume=resume)
        if resume and is_store(output):
            self._reopen(output)

    def _reopen(self, output: Path) -> None:
        try:
            stored = Trajectory.open(output)
            self.finished = read_rows(output)
        except UnfinishedError:
            stored = Trajectory.open(output, partial=True)
        for name in ("workload", "seeds", "recording", "leap"):
            if stored.header.get(name) != json.loads(json.dumps(self._header[name])):
                raise UsageError(
                    f"{output}: holds another training: its {name} is another.",
                    "Give the options it was begun with, or another -o; --force replaces it.",
                )
        if self.finished is not None:
            return
        self._stored = (stored, Trajectory.open(output / AVERAGE, partial=True))
        self._writers = (
            TrajectoryWriter.resume(output, sync=self._sync),
            TrajectoryWriter.resume(output / AVERAGE, sync=self._sync),
        )
        if (output / _STATE).exists():
            state = _load(output / _STATE)
            self._ended, self._current = state["ended"], state["current"]

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers or ():
            writer.close()

    def ended(self, run: int) -> dict[str, Any] | None:
        """The row of a run that ended before a stop; None where it did not."""
        return self._ended[run]["row"] if run in self._ended else None

    def control(self, run: int) -> Curve:
        """Held-out losses of the control of the run that was stopped; empty where there are none."""
        current = self._current
        return [] if current is None or current["run"] != run else _curve(current["control"])

    def begin(self, run: int, training: TrainingRun, leaper: Leaper) -> Curve:
        """Open the store for a run, and bring it to where it was stopped.

        Returns:
            Its held-out losses so far.
        """
        if self.output is None:
            return []
        if self._writers is None:
            self._create(training)
        saved = self.output / _TRAINING
        current = self._current
        if current is None or current["run"] != run or not saved.exists():
            return []
        if not training.restore(saved, most=self._schedule[-1]):
            return []
        if training.step != current["leaper"]["step"]:
            raise StoreError(f"{saved}: is of step {training.step}, but {_STATE} of {current['leaper']['step']}.")
        leaper.load_state_dict(current["leaper"])
        return _curve(current["curve"])

    def _create(self, training: TrainingRun) -> None:
        assert self.output is not None
        wide = any(slot.dtype == "float64" for slot in training.layout.floats)
        common: dict[str, Any] = {
            "runs": range(self._runs),
            "dtype": "float64" if wide else "float32",
            "planned_steps": self._schedule,
            "sync": self._sync,
        }
        own = TrajectoryWriter.create(
            self.output, training.layout, header=self._header, replace=self._replace, **common
        )
        average = TrajectoryWriter.create(
            own.home / AVERAGE, training.layout, header=self._header | {"of": "running average"}, **common
        )
        self._writers = (own, average)

    def snapshot(self, run: int, step: int, training: TrainingRun, leaper: Leaper) -> None:
        """Store weights and average of a step; compare them, where a killed process has stored them already.

        Raises:
            NonFiniteError: they are not finite.
            StoreError: they differ from what is stored.
        """
        vectors, integers = training.vectors(), training.integers()
        if not np.isfinite(vectors).all():
            raise NonFiniteError(
                f"run {run} diverged: its weights are not finite at step {step}.", "Try a lower learning rate."
            )
        if self._writers is None:
            return
        with leaper.average():
            averaged = training.vectors()
        index = self._schedule.index(step)
        for which, values in enumerate((vectors, averaged)):
            writer = self._writers[which]
            if index >= writer.snapshots[run]:
                writer.append(step, values[0], integers[0], run=run)
                continue
            assert self._stored is not None
            before = self._stored[which].read([run], [step], 0, training.layout.size)[0, 0]
            if before.tobytes() != values[0].astype(before.dtype).tobytes():
                raise StoreError(
                    f"{self.output}: run {run}, trained again, differs from what is stored at step {step}.",
                    "Was it begun with other versions, or on another machine? --force begins anew.",
                )

    def stop(self, run: int, training: TrainingRun, leaper: Leaper, curve: Curve, control: Curve) -> NoReturn:
        """Save the training and the leaper, and stop.

        Raises:
            StoppedError: always.
        """
        where = f"stopped at step {training.step} of run {run}"
        if self.output is None or self._replace or self._writers is None:
            raise StoppedError(f"{where}; nothing was saved.", "Give a new -o to be able to go on.")
        for writer in self._writers:
            writer.close()
        training.save(self.output / _TRAINING)
        self._save({"run": run, "leaper": leaper.state_dict(), "curve": curve, "control": control})
        raise StoppedError(f"{self.output}: {where}; it is saved.", "Run it again with --resume.")

    def end(self, run: int, row: Mapping[str, Any], entries: Sequence[Entry], curve: Curve, control: Curve) -> None:
        """A run is over."""
        rows = [entry.row() for entry in entries]
        self._ended[run] = {"row": dict(row), "entries": rows, "curve": curve, "control": control}
        if self.output is not None and not self._replace:
            self._save(None)

    def finish(self) -> None:
        """Write the ledger and finish the store."""
        if self._writers is None:
            return
        own, average = self._writers
        average.finish()
        ended = sorted(self._ended.items())
        parts = {
            "proposal": [{"run": run, **entry} for run, each in ended for entry in each["entries"]],
            "snapshot": [loss for run, each in ended for loss in _losses(run, each["curve"])],
            "control": [loss for run, each in ended for loss in _losses(run, each["control"])],
        }
        write_ledger(own.home / LEDGER, [each["row"] for _, each in ended], parts)
        own.finish()
        assert self.output is not None
        for name in (_STATE, _TRAINING):
            (self.output / name).unlink(missing_ok=True)

    def _save(self, current: Mapping[str, Any] | None) -> None:
        assert self.output is not None
        with staged_file(self.output / _STATE, replace=True) as temporary, open(temporary, "wb") as file:
            torch.save({"ended": self._ended, "current": current}, file)


def _curve(rows: Sequence[Sequence[float]]) -> Curve:
    return [(int(step), float(own), float(average)) for step, own, average in rows]


def _losses(run: int, curve: Curve) -> list[dict[str, Any]]:
    return [{"run": run, "step": step, "loss": own, "average_loss": average} for step, own, average in curve]


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError, BadZipFile) as error:
        raise StoreError(
            f"{path}: the saved leaps cannot be read ({type(error).__name__}).",
            "Remove this file: the runs are then trained again from their seeds.",
        ) from error
