"""The control that forecasts are held against: the same runs trained on, with a rate that falls.

A run at a constant rate rattles about its path, and whatever stops that lowers its loss: an average of snapshots, or
a rate that falls. Steps read off the run's own curve credit all of it to the forecast; steps of this control do not.
"""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from farcli.errors import UsageError
from farcli.store import Trajectory
from farcli.training import TrainingRun, workload_from, workload_of

Results = dict[int, dict[int, dict[str, float]]]
"""run → step → measures."""


def cooled(
    truth: Trajectory,
    runs: Sequence[int],
    origin: int,
    ends: Sequence[int],
    measure: Callable[[np.ndarray, np.ndarray, int], dict[str, float]],
    *,
    warn: Callable[[str], None] = lambda text: None,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> Results:
    """Held-out measures of runs trained on from step `origin`, the rate falling to 0 on a line.

    Each run is trained again from its seed, for its optimiser's state and the order of its data, and goes on from the
    weights that were recorded. For each end there are two: with that state and with a new one (which under Adam may be
    much better); the one with the lower mean loss counts.

    Args:
        truth: the recording, of a workload at a constant rate.
        runs: labels of runs.
        origin: step that all go on from.
        ends: steps at which the rate is 0, each a training of its own.
        measure: (vector [D], integers [I], run) → {"loss": …, …}.
        warn: called where a run trained again is not what was recorded.
        report: called with (done, total, text).

    Returns:
        Measures by run and end.

    Raises:
        UsageError: the recording is of no workload, or its rate is not constant.
    """
    constant = workload_of(truth.header)
    if constant is None:
        raise UsageError(f"--control needs the training of a workload; {truth.path} names none.")
    if constant.rate_change(max(ends), origin) is not None:
        raise UsageError(
            f"--control: the rate of {truth.path} is not constant after step {origin}, so that its true future is "
            "the control.",
            hint="Leave --control out.",
        )
    entry = truth.header["workload"]
    falling = [
        workload_from(
            entry["name"],
            {
                **entry["options"],
                "schedule": "wsd",
                "span": str(end),
                "decay": repr((end - origin) / end),
                "floor": "0",
            },
        )
        for end in ends
    ]
    seeds = dict(zip(truth.runs, truth.header["seeds"], strict=True))
    found: dict[str, Results] = {}
    total = len(runs) * (origin + 2 * sum(end - origin for end in ends))
    done = 0
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "training.pt"
        for run in runs:
            training = TrainingRun(constant, [seeds[run]])
            if origin:
                training.advance(origin)
            last_D = truth.read([run], [origin])[0, 0]
            if not np.allclose(training.vectors()[0], last_D, rtol=1e-2, atol=1e-4):
                warn(
                    f"{truth.path}: run {run} trained again has other weights at step {origin} than were recorded "
                    "(on another machine?); the control goes on from those."
                )
            training.load(last_D[None], truth.integers(run, origin)[None] if truth.has_integers else None)
            training.save(saved)
            done += origin
            states = ("kept", "new") if training.moments()[0].slots else ("kept",)
            for state, (end, workload) in product(states, zip(ends, falling, strict=True)):
                report(done, total, "control: training on, the rate falling")
                training = TrainingRun(workload, [seeds[run]])
                assert training.restore(saved, origin)
                if state == "new":
                    training.optimizer = workload.optimizer(training.model)
                training.advance(end - origin)
                measures = measure(training.vectors()[0], training.integers()[0], run)
                found.setdefault(state, {}).setdefault(run, {})[end] = measures
                done += (end - origin) * 2 // len(states)
    best = {end: min(found, key=lambda state: _mean_loss(found[state], end)) for end in ends}
    return {run: {end: found[best[end]][run][end] for end in ends} for run in runs}


def _mean_loss(results: Results, end: int) -> float:
    loss = float(np.mean([measures[end]["loss"] for measures in results.values()]))
    return loss if np.isfinite(loss) else float("inf")


def steps_to_reach(loss: float, kept: float, control: Sequence[tuple[int, float]]) -> float | None:
    """Steps within which the control's mean loss falls from `kept` to `loss`, on lines between those it was given.

    Args:
        loss: to be reached.
        kept: the loss after 0 steps.
        control: pairs of steps, increasing, and mean losses.

    Returns:
        0 where `loss` is no less than `kept`; None where the control does not reach it.
    """
    if loss >= kept:
        return 0.0
    before, last = 0.0, kept
    for steps, found in control:
        if found <= loss:
            return before + (steps - before) * (last - loss) / (last - found)
        before, last = float(steps), found
    return None
