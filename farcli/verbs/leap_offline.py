"""Leaps on a recorded run: what Leap+Verify (arXiv 2602.19580) would have accepted, and what that would be worth.

Nothing is trained. At each recorded snapshot every predictor says where the weights will be K steps later; the
held-out loss there is compared with the present one, as the paper does, and with the recorded run itself, as it does
not: a leap of K steps that is worth fewer than K steps of training was no gain.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from farcli.config import parse_selection
from farcli.errors import NonFiniteError, UsageError
from farcli.evaluation import Measure, measure_of_function, measure_of_workload
from farcli.metrics import LossCurve
from farcli.regimes import Probe, Regime, Thresholds, displacement_cosine, regimes, similarity
from farcli.registry import unknown
from farcli.speculation.offline import CRITERIA, causal_spread, past_share, reached
from farcli.store import Trajectory
from farcli.verbs.leap_offline_predictors import LeapPredictor, Past, predictors_of
from farcli.verbs.leap_offline_summary import summary_rows

PREDICTORS = ("momentum", "linear", "quadratic")
AHEAD = (5, 10, 25, 50, 75, 100)
CASCADES = ((4, 25), (2, 50), (10, 10))
YARDSTICK = "persistence"
HISTORY = 5
"""Earlier outcomes that the signal `past_outcomes` is the share of."""
_LEAST = 3
"""Snapshots that the displacement cosine takes."""

Warn = Callable[[str], None]
Report = Callable[[float, float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaps:
    """What is tried at every snapshot.

    Attributes:
        predictors: what leaps; the yardstick among them.
        ahead: K, steps of each leap.
        cascades: pairs (depth, K).
        context: snapshots that are needed, the present one included.
        delta: steps between them.
        window: losses that the adaptive criterion's σ is taken over; None for all up to now.
        criteria: names in `CRITERIA`.
    """

    predictors: tuple[LeapPredictor, ...]
    ahead: tuple[int, ...]
    cascades: tuple[tuple[int, int], ...]
    context: int
    delta: int
    window: int | None
    criteria: tuple[str, ...]


def leap_offline(
    store: str,
    *,
    predictors: Sequence[str] = PREDICTORS,
    ahead: Sequence[int] = AHEAD,
    cascades: Sequence[tuple[int, int]] = CASCADES,
    criteria: Sequence[str] = ("strict", "adaptive", "proximity"),
    runs: str | None = None,
    steps: str | None = None,
    delta: int | None = None,
    context: int = 5,
    probes: int = 100,
    high: float | None = None,
    low: float | None = None,
    percentiles: tuple[float, float] = (30.0, 70.0),
    window: int | None = None,
    options: Mapping[str, str] | None = None,
    loss: str | None = None,
    measure: Measure | None = None,
    partial: bool = False,
    warn: Warn = lambda text: None,
    report: Report = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Judge leaps from every snapshot of a recording.

    A snapshot at step t is leapt from where steps t, t − Δ, t − 2Δ, … are recorded, as many as the most demanding
    predictor needs: the same snapshots for all of them. The same held-out data decides acceptance and worth, as in
    the paper, so that what is accepted looks a little better than it is.

    Args:
        store: the recording.
        predictors: momentum (also -uncorrected, -bf16, -fp16, -as-coded, -printed), linear, quadratic,
            quadratic-printed, or methods of `farcli methods` that need no fitting; persistence is always added.
        ahead: K, the steps of a leap.
        cascades: pairs (depth, K): leaps of K steps one after another, each judged against the one before it. The
            predictor goes on along its own path, so that leap j is its forecast for j·K steps.
        criteria: names in `CRITERIA`.
        runs: runs to judge, as typed.
        steps: snapshots to leap from, as typed; all that can be when None.
        delta: Δ; the recording's interval when None.
        context: snapshots that methods see which make use of more than they need.
        probes: held-out inputs whose activations are the fingerprint, at most as many as the workload holds out.
        high: similarity above which training is stable; a percentile of the run's own when None.
        low: similarity below which it is chaotic; likewise.
        percentiles: the two percentiles, in hindsight.
        window: losses that σ is taken over; all up to the present one when None.
        options: `--set` options of the predictors.
        loss: "package.module:function" measuring a state_dict, for stores without a workload; then there are no
            activations, hence no regimes.
        measure: how to measure the held-out loss, instead of as the store's workload or `loss` does.
        partial: accept an unfinished store.
        warn: called with a line the user should read.
        report: called with (done, total, text).

    Returns:
        Rows, told apart by "kind":

        - "leap", one for each snapshot, predictor and K: run, step, predictor, ahead, regime, similarity (activation
          cosine), displacement_cosine, past_outcomes (share of the last five strict verdicts), loss_now,
          loss_forecast, inflation (of the loss, a factor), accepted_… by each criterion, equivalent_steps (training
          steps of the recorded run from the present loss to the forecast's), bounded (that is only a bound),
          worth_k (at least K of them; None where the recording ends before), verification_steps (two held-out
          evaluations, in training steps), net_steps (equivalent less verification).
        - "cascade": run, step, predictor, depth, ahead, regime, reached, complete, equivalent_steps of the last leap
          that held, bounded, verification_steps.
        - "summary", "cascades", "auc" and "regimes": see `summary_rows`.

    Raises:
        UsageError: an argument cannot be meant, or the store lacks what a predictor needs.
        StoreError: the store cannot be read.
        NonFiniteError: recorded weights or moments are not finite.
    """
    truth = Trajectory.open(store, partial=partial)
    chosen_runs = parse_selection(runs, truth.runs, "runs") if runs else list(truth.runs)
    if not criteria:
        raise UsageError(f"--criteria: none given, expected one of {', '.join(CRITERIA)}.")
    for name in criteria:
        if name not in CRITERIA:
            raise unknown("criterion", name, CRITERIA)
    _check_numbers(ahead, cascades, probes, context, window)
    if measure is None:
        measure = measure_of_function(truth, loss) if loss is not None else measure_of_workload(truth, "stored")
    if measure is None:
        raise UsageError(
            f"{store}: names no workload, so nobody knows how good its weights are.",
            "Pass --loss package.module:function, from a state_dict to its held-out loss.",
        )
    names = [YARDSTICK, *(name for name in predictors if name != YARDSTICK)]
    found = tuple(predictors_of(names, truth, context=context, options=options or {}))
    interval = _interval(truth, delta)
    plan = Leaps(
        predictors=found,
        ahead=tuple(sorted(set(ahead))),
        cascades=tuple(cascades),
        context=max(_LEAST, *(predictor.context for predictor in found)),
        delta=interval,
        window=window,
        criteria=tuple(criteria),
    )
    starts = _starts(truth, plan, steps)
    probe = _probe(measure, probes, (high, low) != (None, None), warn)
    total = len(chosen_runs) * (len(truth.steps) + len(starts) * (len(found) - 1) * len(plan.ahead))
    rows: list[dict[str, Any]] = []
    thresholds: dict[int, Thresholds] = {}
    for number, run in enumerate(chosen_runs):
        pass_ = _Pass(truth, run, plan, starts, measure, probe)
        begun = number * total // len(chosen_runs)
        pass_.go(lambda done, text, begun=begun: report(begun + done, total, text))
        if probe is not None:
            thresholds[run] = _thresholds(list(pass_.similarities.values()), low, high, percentiles)
        rows += pass_.rows(thresholds.get(run))
    return rows + summary_rows(rows, plan.criteria, thresholds)


def parse_cascades(text: str) -> list[tuple[int, int]]:
    """Pairs (depth, K) of "4x25,2x50"; none of "none".

    Raises:
        UsageError: it is not that.
    """
    try:
        pairs = [tuple(int(number) for number in part.split("x")) for part in text.split(",") if text != "none"]
        return [(depth, ahead) for depth, ahead in pairs]
    except ValueError:
        raise UsageError(f"--cascades {text!r}: expected DEPTHxK like 4x25,2x50, or none.") from None


def _check_numbers(
    ahead: Sequence[int], cascades: Sequence[tuple[int, int]], probes: int, context: int, window: int | None
) -> None:
    if not ahead or min(ahead) < 1:
        raise UsageError(f"--K {','.join(map(str, ahead))}: expected numbers of steps of at least 1.")
    for depth, each in cascades:
        if depth < 1 or each < 1:
            raise UsageError(f"--cascades {depth}x{each}: expected a depth and a K of at least 1.")
    for name, value, least in (("probes", probes, 1), ("context", context, 1), ("window", window, 2)):
        if value is not None and value < least:
            raise UsageError(f"--{name} {value}: expected at least {least}.")


def _interval(truth: Trajectory, delta: int | None) -> int:
    """Δ: given, or the smallest gap between snapshots."""
    if delta is not None and delta < 1:
        raise UsageError(f"--delta {delta}: expected at least 1 step.")
    if len(truth.steps) < _LEAST:
        raise UsageError(f"{truth.path}: has {len(truth.steps)} snapshots, expected at least {_LEAST} to leap from.")
    return delta or int(np.diff(truth.steps).min())


def _starts(truth: Trajectory, plan: Leaps, steps: str | None) -> list[int]:
    """The snapshots with enough history."""
    recorded = set(truth.steps)
    able = [step for step in truth.steps if all(step - back * plan.delta in recorded for back in range(plan.context))]
    if not able:
        raise UsageError(
            f"{truth.path}: no snapshot has {plan.context - 1} others {plan.delta} steps apart before it; it has "
            f"{len(truth.steps)} snapshots, steps {truth.steps[0]}…{truth.steps[-1]}.",
            "Record with --every, name a spacing that is there with --delta, or give a smaller --context.",
        )
    return able if steps is None else sorted(parse_selection(steps, able, "steps"))


def _probe(measure: Measure, probes: int, needed: bool, warn: Warn) -> Probe | None:
    """What listens to activations; None, and a warning, where there are none to listen to."""
    why = "--loss shows no activations"
    if measure.network is not None:
        try:
            return Probe(measure.network.model, probes)
        except UsageError as error:
            why = str(error).removesuffix(".")
    if needed:
        raise UsageError(f"--high and --low need activations: {why}.")
    warn(f"no regimes: {why}.")
    return None


def _thresholds(
    similarities: Sequence[float], low: float | None, high: float | None, percentiles: tuple[float, float]
) -> Thresholds:
    own = Thresholds.of_percentiles(similarities, *percentiles)
    if low is None and high is None:
        return own
    return Thresholds(own.low if low is None else low, own.high if high is None else high)


class _Pass:
    """One run, read once from its first snapshot to its last."""

    def __init__(
        self, truth: Trajectory, run: int, plan: Leaps, starts: Sequence[int], measure: Measure, probe: Probe | None
    ) -> None:
        self._truth = truth
        self._run = run
        self._plan = plan
        self._starts = starts
        self._measure = measure
        self._probe = probe
        self._held: dict[int, np.ndarray] = {}
        self._last = np.empty(0), np.nan
        """The vector last measured, and its loss."""
        self._cost = None if measure.cost is None else 2 * measure.cost
        self.losses: dict[int, float] = {}
        self.similarities: dict[int, float] = {}
        self.cosines: dict[int, float] = {}
        self.forecast: dict[tuple[int, str, int], float] = {}
        """(step, predictor, K) → held-out loss."""

    def go(self, report: Callable[[float, str], None]) -> None:
        """Measure the run at every snapshot, and every leap from those with enough history."""
        truth, plan, done = self._truth, self._plan, 0
        delta, fingerprints = plan.delta, {}
        for step in truth.steps:
            self._held = {at: kept for at, kept in self._held.items() if at > step - plan.context * delta}
            self._held[step] = self._vector(step)
            with self._probe or nullcontext() as listening:
                self.losses[step] = self._measured(self._held[step], step)
            done += 1
            if listening is not None:
                fingerprints[step] = listening.fingerprint()
                if step - delta in fingerprints:
                    self.similarities[step] = similarity(fingerprints[step - delta], fingerprints[step])
            if step not in self._starts:
                continue
            past = self._past(step)
            self.cosines[step] = displacement_cosine(*past.weights_CD[-3:])
            for predictor in plan.predictors:
                for ahead in plan.ahead:
                    report(done, f"run {self._run}, step {step}, {predictor.name}")
                    self._leap(predictor, past, ahead)
                    done += predictor.name != YARDSTICK
                for depth, ahead in plan.cascades:
                    before = self.losses[step]
                    for leaps in range(1, depth + 1):
                        loss = self._leap(predictor, past, leaps * ahead)
                        if not reached([loss], before):
                            break
                        before = loss

    def _vector(self, step: int) -> np.ndarray:
        vector = self._truth.read([self._run], [step])[0, 0]
        if not np.isfinite(vector).all():
            raise NonFiniteError(
                f"{self._truth.path}: run {self._run}, step {step}: its weights are not finite.",
                "Choose other runs with --runs.",
            )
        return vector

    def _past(self, step: int) -> Past:
        parameters = self._truth.layout.parameters
        steps = tuple(step - back * self._plan.delta for back in reversed(range(self._plan.context)))
        return Past(
            run=self._run,
            steps_C=steps,
            weights_CD=[self._held[at][:parameters] for at in steps],
            layout=self._truth.layout,
        )

    def _measured(self, vector: np.ndarray, step: int) -> float:
        return self._measure.of(vector, self._truth.integers(self._run, step), self._run)["loss"]

    def _leap(self, predictor: LeapPredictor, past: Past, ahead: int) -> float:
        """Held-out loss of one leap; buffers stay as they are."""
        step = past.steps_C[-1]
        key = step, predictor.name, ahead
        if key not in self.forecast:
            now = self._held[step]
            vector = now.copy()
            with np.errstate(over="ignore", invalid="ignore"):
                vector[: len(past.weights_CD[-1])] = predictor.forecast(past, ahead)
            for known, loss in ((now, self.losses[step]), self._last):
                if np.array_equal(vector, known):  # averages are the same whatever K
                    self.forecast[key] = loss
                    break
            else:
                self.forecast[key] = self._measured(vector, step)
                self._last = vector, self.forecast[key]
        return self.forecast[key]

    def rows(self, thresholds: Thresholds | None) -> list[dict[str, Any]]:
        """Rows of kinds "leap" and "cascade"."""
        curve = LossCurve.of(list(self.losses), list(self.losses.values()))
        regime = self._regimes(thresholds)
        losses = list(self.losses.values())
        spread = dict(zip(self.losses, causal_spread(losses, self._plan.window), strict=True))
        published = float(np.std(losses))
        rows = []
        for predictor in self._plan.predictors:
            for ahead in self._plan.ahead:
                found = [self.forecast[step, predictor.name, ahead] for step in self._starts]
                verdicts = [
                    CRITERIA["strict"].holds(loss, self.losses[step], 0.0)
                    for step, loss in zip(self._starts, found, strict=True)
                ]
                history = past_share(verdicts, HISTORY)
                for step, loss, before in zip(self._starts, found, history, strict=True):
                    now = self.losses[step]
                    worth = self._worth(curve, step, loss)
                    accepted = {
                        f"accepted_{name}": CRITERIA[name].holds(
                            loss, now, published if CRITERIA[name].foresees else spread[step]
                        )
                        for name in self._plan.criteria
                    }
                    rows.append(
                        {
                            "kind": "leap",
                            **self._place(step, predictor, ahead, regime),
                            "similarity": self.similarities.get(step),
                            "displacement_cosine": self.cosines[step],
                            "past_outcomes": None if np.isnan(before) else before,
                            "loss_now": now,
                            "loss_forecast": loss,
                            "inflation": loss / now if now else float("nan"),
                            **accepted,
                            **worth,
                            "worth_k": _at_least(worth, ahead),
                            "verification_steps": self._cost,
                            "net_steps": None if self._cost is None else worth["equivalent_steps"] - self._cost,
                        }
                    )
            rows += [
                self._cascade(step, predictor, depth, ahead, regime, curve)
                for depth, ahead in self._plan.cascades
                for step in self._starts
            ]
        return rows

    def _regimes(self, thresholds: Thresholds | None) -> dict[int, Regime | None]:
        if thresholds is None:
            return {}
        found = regimes(list(self.similarities.values()), thresholds)
        return dict(zip(self.similarities, found, strict=True))

    def _place(
        self, step: int, predictor: LeapPredictor, ahead: int, regime: Mapping[int, Regime | None]
    ) -> dict[str, Any]:
        return {
            "run": self._run,
            "step": step,
            "predictor": predictor.name,
            "ahead": ahead,
            "regime": regime.get(step),
        }

    def _cascade(
        self,
        step: int,
        predictor: LeapPredictor,
        depth: int,
        ahead: int,
        regime: Mapping[int, Regime | None],
        curve: LossCurve,
    ) -> dict[str, Any]:
        losses = [
            self.forecast[key]
            for leaps in range(1, depth + 1)
            if (key := (step, predictor.name, leaps * ahead)) in self.forecast
        ]
        held = reached(losses, self.losses[step])
        tried = min(held + 1, depth)
        return {
            "kind": "cascade",
            **self._place(step, predictor, ahead, regime),
            "depth": depth,
            "reached": held,
            "complete": held == depth,
            **self._worth(curve, step, losses[held - 1] if held else self.losses[step]),
            "verification_steps": None if self._cost is None else self._cost / 2 * (1 + tried),
        }

    def _worth(self, curve: LossCurve, step: int, loss: float) -> dict[str, Any]:
        """Training steps of this run between the present loss and another."""
        to, bounded = curve.steps_to(loss)
        since, _ = curve.steps_to(self.losses[step])
        return {"equivalent_steps": to - since, "bounded": bounded}


def _at_least(worth: Mapping[str, Any], ahead: int) -> bool | None:
    """Whether a leap is worth its K steps; None where the recording ends too early to say."""
    if worth["equivalent_steps"] >= ahead:
        return True
    return None if worth["bounded"] and worth["equivalent_steps"] > 0 else False
