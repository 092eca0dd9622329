"""Average of the latest snapshots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix, require_future
from farcli.forecasters.combination import combine


@final
class Lawa(Forecaster):
    """ŵ = mean of the last `latest` snapshots, of all where there are fewer, at every horizon.

    Source: latest weight averaging, Kaddour (2022).
    """

    reference = "latest weight averaging (Kaddour 2022): averaging, not forecasting"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        latest: int = field(default=6, metadata={"help": "snapshots averaged, at most"})

        def __post_init__(self) -> None:
            if self.latest < 2:
                raise ValueError(f"latest = {self.latest}, expected 2 or more.")

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
        """The latest."""
        require_future("lawa", self.min_context, steps_C, ())
        return tuple(steps_C[-self._config.latest :])

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The mean, repeated: [B, H, D]."""
        prefix.require("lawa", self.min_context, steps_H)
        earlier_J = self.observed(prefix.steps_C)[:-1]
        return combine(prefix, earlier_J, [[1 / (len(earlier_J) + 1)] * len(earlier_J)]).repeat(1, len(steps_H), 1)
