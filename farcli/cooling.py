"""The control that forecasts are held against: the same runs trained on, with a rate that falls.

A run at a constant rate rattles about its path, and whatever stops that lowers its loss: an average of snapshots, or
a rate that falls. Steps read off the run's own curve credit all of it to the forecast; steps of this control do not.
Nor is it fair to hold a forecast against a run at rest: training goes on from it, too, and ends with a rate that falls.
So both are finished alike, and what counts is how many steps the one saves the other.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import final

import numpy as np

from farcli.errors import UsageError
from farcli.store import Trajectory
from farcli.training import TrainingRun, workload_from, workload_of
from farcli.workloads.base import Workload

Results = dict[int, dict[int, dict[str, float]]]
"""run → step → measures."""

_DOUBLINGS = 8
"""Of the rate, at most."""


def require_constant_rate(truth: Trajectory, origin: int, last: int) -> Workload:
    """The workload that a store was recorded from, if its rate is constant from step `origin` to `last`.

    Raises:
        UsageError: it is not, or there is none.
    """
    workload = workload_of(truth.header)
    if workload is None:
        raise UsageError(f"--control: {truth.path} names no workload, so there is no training to go on with.")
    if workload.rate_change(last, origin) is not None:
        raise UsageError(
            f"--control: the rate of {truth.path} is not constant after step {origin}, so that its true future is "
            "the control.",
            hint="Leave --control out.",
        )
    return workload


@final
class FallingRate:
    """Runs of a recording trained on from one step, their rate falling to 0 on a line.

    First every run is trained again from its seed, for its optimiser's state and the order of its data.

    Args:
        folder: for both, as large as the runs' weights and moments, and as large again for those of a forecast.
        truth: the recording, of a workload at a constant rate.
        runs: labels of runs.
        origin: step that all go on from.
        last: step that any goes on to.
        measure: (vector [D], integers [I], run) → {"loss": …, …}.
        warn: called where a run trained again is not what was recorded.
        report: called with (done, total, text).

    Raises:
        UsageError: the recording is of no workload, or its rate is not constant from `origin` to `last`.
    """

    def __init__(
        self,
        folder: Path,
        truth: Trajectory,
        runs: Sequence[int],
        origin: int,
        last: int,
        measure: Callable[[np.ndarray, np.ndarray, int], dict[str, float]],
        warn: Callable[[str], None] = lambda text: None,
        report: Callable[[float, float, str], None] = lambda done, total, text: None,
    ) -> None:
        self._constant = require_constant_rate(truth, origin, last)
        self._folder, self._truth, self._runs, self._origin = folder, truth, tuple(runs), origin
        self._measure, self._report = measure, report
        self._seeds = dict(zip(truth.runs, truth.header["seeds"], strict=True))
        self._states = ("kept",)
        for number, run in enumerate(self._runs):
            report(number, len(self._runs), "control: training again")
            training = TrainingRun(self._constant, [self._seeds[run]])
            if origin:
                training.advance(origin)
            last_D = truth.read([run], [origin])[0, 0]
            if not np.allclose(training.vectors()[0], last_D, rtol=1e-2, atol=1e-4):
                warn(
                    f"{truth.path}: run {run} trained again has other weights at step {origin} than were recorded "
                    "(on another machine?); the control goes on from those."
                )
            if training.moments()[0].slots:
                self._states = ("kept", "new")
            self._begin(training, run, last_D, "recorded")

    def _file(self, run: int, whose: str) -> Path:
        return self._folder / f"{whose}-{run}.pt"

    def _begin(self, training: TrainingRun, run: int, vector: np.ndarray, whose: str) -> None:
        integers = self._truth.integers(run, self._origin)[None] if self._truth.has_integers else None
        training.load(vector[None], integers)
        training.save(self._file(run, whose))

    def trained(self, ends: Sequence[int], begun: Iterable[tuple[int, np.ndarray]] | None = None) -> Results:
        """Held-out measures of the runs at steps where their rate is 0, each a training of its own.

        Each end has its own tuning, that with the lowest mean loss: the optimiser's state kept or new (which under
        Adam may be much better), and the rate to begin with, the recording's, doubled for as long as that lowers the
        loss at any end, since a rate that falls may begin higher than one that does not.

        Args:
            ends: steps.
            begun: every run, and weights of shape [D] to go on from; the recorded ones when None.

        Returns:
            Measures by run and end.
        """
        whose = "recorded"
        if begun is not None:
            whose = "forecast"
            for run, vector in begun:
                training = TrainingRun(self._constant, [self._seeds[run]])
                assert training.restore(self._file(run, "recorded"), self._origin)
                self._begin(training, run, vector, whose)
        most = _DOUBLINGS if "lr" in self._truth.header["workload"]["options"] else 0
        best: dict[int, float] = {}
        found: Results = {run: {} for run in self._runs}
        for state in self._states:
            for doubling in range(most + 1):
                lower = False
                for end in ends:
                    results = self._trained(end, whose, state, 2.0**doubling)
                    loss = float(np.mean([measures["loss"] for measures in results.values()]))
                    if end not in best or loss < best[end] or np.isnan(best[end]):
                        best[end], lower = loss, True
                        for run, measures in results.items():
                            found[run][end] = measures
                if not lower:
                    break
        return found

    def _trained(self, end: int, whose: str, state: str, raised: float) -> dict[int, dict[str, float]]:
        """Of one tuning: measures by run."""
        entry = self._truth.header["workload"]
        ahead = end - self._origin
        falling = {"schedule": "wsd", "span": str(end), "decay": repr(ahead / end), "floor": "0"}
        rate = {} if raised == 1 else {"lr": repr(raised * float(entry["options"]["lr"]))}
        workload = workload_from(entry["name"], {**entry["options"], **falling, **rate})
        found = {}
        for number, run in enumerate(self._runs):
            tuning = f"{ahead} steps, its state {state}, {raised:g} × the rate"
            self._report(number, len(self._runs), f"control: trained on, the rate falling ({tuning})")
            training = TrainingRun(workload, [self._seeds[run]])
            assert training.restore(self._file(run, whose), self._origin)
            if state == "new":
                training.optimizer = workload.optimizer(training.model)
            training.advance(ahead)
            found[run] = self._measure(training.vectors()[0], training.integers()[0], run)
        return found


def steps_to_reach(loss: float, kept: float, control: Sequence[tuple[int, float]]) -> float | None:
    """Steps within which the control's mean loss falls from `kept` to `loss`, on lines between those it was given.

    Args:
        loss: to be reached.
        kept: the loss after 0 steps.
        control: pairs of steps, increasing, and mean losses.

    Returns:
        0 where `loss` is no less than `kept`, or not a number; None where the control does not reach it.
    """
    if not loss < kept:
        return 0.0
    before, last = 0.0, kept
    for steps, found in control:
        if found <= loss:
            return before + (steps - before) * (last - loss) / (last - found)
        before, last = float(steps), found
    return None
