"""The least-squares line through the whole prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix, require_future
from farcli.forecasters.combination import combine


@final
class LsqLine(Forecaster):
    """The line that is nearest, in squares, to all snapshots of the prefix, over optimiser steps.

    ŵ(t) = Σ_c (1/C + (t − t̄)(t_c − t̄)/Σ(t − t̄)²) w_c. It averages the snapshots' noise, which the
    line through two of them amplifies; unlike that one it does not pass through w_n.

    Source: ordinary least squares on the time axis.
    """

    reference = "ordinary least squares over the prefix"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No options."""

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
        """Two snapshots."""
        return 2

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """All of them."""
        require_future("lsq-line", self.min_context, steps_C, ())
        return tuple(steps_C)

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Go on along the line: [B, H, D]."""
        prefix.require("lsq-line", self.min_context, steps_H)
        count = len(prefix.steps_C)
        centre = sum(prefix.steps_C) / count
        spread = sum((step - centre) ** 2 for step in prefix.steps_C)
        earlier_J = prefix.steps_C[:-1]
        rows_HJ = [[1 / count + (step - centre) * (own - centre) / spread for own in earlier_J] for step in steps_H]
        return combine(prefix, earlier_J, rows_HJ)
