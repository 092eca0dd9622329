"""Exponential moving average of the prefix."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix, require_future
from farcli.forecasters.combination import combine


@final
class Ema(Forecaster):
    """ŵ = e_n at every horizon, e_0 = w_0, e_i = decay·e_{i−1} + (1 − decay)·w_i over the snapshots of the prefix.

    What a forecast has to beat where training noise dominates: averaging forecasts nothing and costs nothing.

    Source: Polyak and Juditsky (1992); as evaluated on AlgoPerf by Kasimbeg et al. (2025).
    Differs: over snapshots, not over every step.
    """

    reference = "exponential moving average of the snapshots: averaging, not forecasting"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        decay: float = field(default=0.5, metadata={"help": "what is kept of the average at each snapshot"})

        def __post_init__(self) -> None:
            if not 0 <= self.decay < 1:
                raise ValueError(f"decay = {self.decay}, expected 0 (the last snapshot) or more, and less than 1.")

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Coordinate-wise."""
        return Coupling.COORDINATEWISE

    @property
    def min_context(self) -> int:
        """Two snapshots: an average of one is none."""
        return 2

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """All of them."""
        require_future("ema", self.min_context, steps_C, ())
        return tuple(steps_C)

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The average, repeated: [B, H, D]."""
        prefix.require("ema", self.min_context, steps_H)
        decay, last = self._config.decay, len(prefix.steps_C) - 1
        row_J = [decay**last, *((1 - decay) * decay ** (last - i) for i in range(1, last))]
        return combine(prefix, prefix.steps_C[:-1], [row_J]).repeat(1, len(steps_H), 1)
