"""The forecast that nothing moves: the yardstick of every skill."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix


@final
class Persistence(Forecaster):
    """ŵ = w_n at every horizon.

    Source: the persistence (naive) forecast, the reference of forecast verification.
    """

    reference = "persistence: the last observed weights"

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
        """One snapshot."""
        return 1

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The last one."""
        return (steps_C[-1],)

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Repeat the last snapshot: [B, H, D]."""
        prefix.require("persistence", self.min_context, steps_H)
        return prefix.weights_BCD[:, -1:].repeat(1, len(steps_H), 1)
