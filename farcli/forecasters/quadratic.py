"""The parabola through three snapshots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix, require_future
from farcli.forecasters.combination import combine


@final
class Quadratic(Forecaster):
    """The parabola through w_{n−2·span}, w_{n−span} and w_n, in Lagrange's form, for unequal steps too.

    Source: Leap+Verify's quadratic predictor (arXiv 2602.19580).
    Differs: as printed, its coefficient on the second difference is K(K − Δ)/(2Δ²) = s(s − 1)/2 with
    s = K/Δ, which misses the points it should pass through; the parabola has s(s + 1)/2.
    """

    reference = "Leap+Verify's quadratic (arXiv 2602.19580), with the parabola's own coefficient s(s+1)/2"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        span: int = field(default=1, metadata={"help": "snapshots between neighbouring points of the parabola"})

        def __post_init__(self) -> None:
            if self.span < 1:
                raise ValueError(f"span = {self.span}, expected 1 or more.")

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
        """All three points."""
        return 2 * self._config.span + 1

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The three points of the parabola."""
        require_future("quadratic", self.min_context, steps_C, ())
        span = self._config.span
        return (steps_C[-1 - 2 * span], steps_C[-1 - span], steps_C[-1])

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Go on along the parabola: [B, H, D]."""
        points = prefix.steps_C if len(prefix.steps_C) == 3 else self.observed(prefix.steps_C)
        prefix.require("quadratic", 3, steps_H)
        t0, t1, t2 = points
        rows_HJ = [
            [
                (t - t1) * (t - t2) / ((t0 - t1) * (t0 - t2)),
                (t - t0) * (t - t2) / ((t1 - t0) * (t1 - t2)),
            ]
            for t in steps_H
        ]
        return combine(prefix, (t0, t1), rows_HJ)
