"""The straight line through two snapshots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix, require_future
from farcli.forecasters.combination import combine


@final
class Linear(Forecaster):
    """The line through w_{n−span} and w_n, in optimiser steps, so that unequal intervals are right.

    ŵ(t) = w_n + (t − t_n) / (t_n − t_{n−span}) · (w_n − w_{n−span}).

    Source: with span = 0 (the whole prefix, w_0 and w_n), LFD-2's special case A_j = [−j/n, 1 + j/n],
    b = 0 (arXiv 2505.02714); with span = 1, Leap+Verify's linear predictor (arXiv 2602.19580).
    """

    reference = "Leap+Verify's linear (arXiv 2602.19580); span=0: LFD-2's special case (arXiv 2505.02714)"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        span: int = field(
            default=1, metadata={"help": "snapshots between the two points of the line; 0 for the whole prefix"}
        )

        def __post_init__(self) -> None:
            if self.span < 0:
                raise ValueError(f"span = {self.span}, expected 0 (the whole prefix) or more.")

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
        """Both points of the line."""
        return max(self._config.span, 1) + 1

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The two points of the line."""
        require_future("linear", self.min_context, steps_C, ())
        return (steps_C[-1 - self._config.span] if self._config.span else steps_C[0], steps_C[-1])

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Go on along the line: [B, H, D]."""
        points = prefix.steps_C if len(prefix.steps_C) == 2 else self.observed(prefix.steps_C)
        prefix.require("linear", 2, steps_H)
        t0, t1 = points
        return combine(prefix, (t0,), [[-(step - t1) / (t1 - t0)] for step in steps_H])
