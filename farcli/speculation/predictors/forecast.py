"""Any forecaster as a predictor: one that needs no fitting, or a file of one fitted on earlier runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

import torch

from farcli.artefact import Artefact
from farcli.errors import UsageError
from farcli.forecasters.base import FittedForecaster, Forecaster, Prefix
from farcli.layout import Layout
from farcli.speculation.base import Observed, Predictor, Proposal

_AVERAGERS = {"ema", "lawa"}
"""Forecasters that forecast an average of the past: the running average does not move along."""


@final
class Forecast(Predictor):
    """Leap to where a forecaster says training will be, K steps ahead, from the last points.

    One that was fitted sees as many points as it was fitted on, as far apart, leaps as far as it was fitted to, and
    knows only the network it was fitted on: whatever differs is refused.

    Args:
        name: of the forecaster, or its file.
        forecaster: it.
        points: of the past that it may see; those that it does not look at are not kept. Not used where `fitted`.
        fitted: the file's contents.

    Raises:
        UsageError: it has to be fitted, and is not.
    """

    reference = "any forecaster that needs no fitting, or the file of one that was fitted"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options beside the forecaster's own."""

        points: int = field(default=5, metadata={"help": "points that ema, lawa, lsq-line, dmd, … see"})

    def __init__(self, name: str, forecaster: Forecaster, points: int = 5, fitted: Artefact | None = None) -> None:
        if fitted is None and isinstance(forecaster, FittedForecaster):
            raise UsageError(
                f"predictor {name!r}: has to be fitted before it forecasts.",
                f"Name its file, which `farcli fit {name} RUNS.zarr -o {name}.safetensors` makes, or choose one that "
                "goes by the points alone: linear, quadratic, lsq-line, dmd, aitken, ema, lawa.",
            )
        self._name = name
        self._forecaster = forecaster
        self._fitted = fitted
        steps = fitted.context if fitted is not None else tuple(range(max(points, forecaster.min_context)))
        self._context = len(steps) - steps.index(forecaster.observed(steps)[0])

    @property
    def context(self) -> int:
        """From the earliest point that the forecaster looks at to now."""
        return self._context

    def operations(self, layout: Layout, tables: frozenset[str]) -> float | None:
        """Nothing, but for networks."""
        return None if self._fitted is not None or self._name == "nino-mlp" else 0.0

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """ŵ(t + K) − w_t."""
        points = dict(zip(seen.steps_C[-self._context :], seen.weights_CD[-self._context :], strict=True))
        steps_C, layout = tuple(points), seen.layout
        if self._fitted is not None:
            layout = self._fitted.problem.layout  # with buffers, unlike that of what is trained
            if _back(steps_C) != _back(self._fitted.context[-self._context :]):
                return Proposal(move_D=torch.zeros_like(seen.now))  # after a stop, until points are even again
        looked_C = self._forecaster.observed(steps_C)
        prefix = Prefix(
            weights_BCD=torch.stack([points[step] for step in looked_C])[None],
            steps_C=looked_C,
            layout=layout,
            start=0,
            runs_B=(0,),
        )
        move_D = self._forecaster.forecast(prefix, (steps_C[-1] + ahead,))[0, 0] - seen.now
        return Proposal(move_D=move_D.mul_(strength), average=self._name not in _AVERAGERS)

    def require(self, seen: Observed, *, every: int, ahead: int) -> None:
        """Network, spacing and horizon have to be those that it was fitted for."""
        fitted = self._fitted
        if fitted is None:
            return
        problem, who = fitted.problem, f"predictor {self._name}"
        own, this = (
            [(slot.name, slot.shape) for slot in layout.slots if slot.role == "parameter"]
            for layout in (problem.layout, seen.layout)
        )
        if own != this:
            problem.require_layout(who, seen.layout)
        gaps = {after - before for before, after in pairwise(fitted.context[-self._context :])}
        if gaps - {every}:
            raise UsageError(
                f"{who} was fitted on snapshots {', '.join(map(str, sorted(gaps)))} steps apart, but points are "
                f"{every} apart.",
                (f"Leap with --every {min(gaps)}, or fit" if len(gaps) == 1 else "Fit")
                + f" it on runs recorded every {every} steps.",
            )
        horizons = [step - fitted.context[-1] for step in problem.steps_H]
        if ahead not in horizons:
            nearest = min(horizons, key=lambda horizon: abs(horizon - ahead))
            raise UsageError(
                f"{who} was fitted to forecast {', '.join(map(str, horizons))} steps ahead, and {ahead} is not among "
                "them.",
                f"Leap with --K {nearest}, or fit it with --to.",
            )


def _back(steps_C: Sequence[int]) -> list[int]:
    """How far back from the last."""
    return [steps_C[-1] - step for step in steps_C]
