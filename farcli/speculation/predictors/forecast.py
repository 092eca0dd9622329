"""Any forecaster that needs no fitting, as a predictor."""

from dataclasses import dataclass, field
from typing import final

import torch

from farcli.errors import UsageError
from farcli.forecasters.base import FittedForecaster, Forecaster, Prefix
from farcli.layout import Layout
from farcli.speculation.base import Observed, Predictor, Proposal

_AVERAGERS = {"ema", "lawa"}
"""Forecasters that forecast an average of the past: the running average does not move along."""


@final
class Forecast(Predictor):
    """Leap to where a forecaster says training will be, K steps ahead, from the last points.

    Args:
        name: of the forecaster.
        forecaster: it.
        config: how many points it sees.
    """

    reference = "any forecaster that needs no fitting"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options beside the forecaster's own."""

        points: int = field(default=0, metadata={"help": "points the forecaster sees; 0 for as few as it needs"})

    def __init__(self, name: str, forecaster: Forecaster, config: Config | None = None) -> None:
        if isinstance(forecaster, FittedForecaster):
            raise UsageError(
                f"predictor {name!r}: has to be fitted before it forecasts.",
                "Choose one that goes by the points alone: linear, quadratic, lsq-line, dmd, aitken, ema, lawa.",
            )
        self._name = name
        self._forecaster = forecaster
        self._points = (config or self.Config()).points

    @property
    def context(self) -> int:
        """As many points as asked for, or as the forecaster needs."""
        return max(self._points, self._forecaster.min_context)

    def operations(self, layout: Layout, tables: frozenset[str]) -> float | None:
        """Nothing, but for networks."""
        return None if self._name == "nino-mlp" else 0.0

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """ŵ(t + K) − w_t."""
        count = self.context
        steps_C = seen.steps_C[-count:]
        prefix = Prefix(
            weights_BCD=torch.stack(list(seen.weights_CD[-count:]))[None],
            steps_C=steps_C,
            layout=seen.layout,
            start=0,
            runs_B=(0,),
        )
        move_D = self._forecaster.forecast(prefix, (steps_C[-1] + ahead,))[0, 0] - seen.now
        return Proposal(move_D=move_D.mul_(strength), average=self._name not in _AVERAGERS)
