"""Geometric convergence of each weight by itself: Aitken's Δ² method, at any horizon."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from farcli.forecasters.base import Coupling, Forecaster, Prefix
from farcli.forecasters.spacing import evenly_spaced


@final
class Aitken(Forecaster):
    """ŵ = w_n + d·r(1 − r^k)/(1 − r): d the last difference, r its ratio to the one before, k intervals ahead.

    For k → ∞ that is Aitken's fixed point w_n + d·r/(1 − r) = w_n − d²/(d − d′). A weight whose differences do not
    shrink, |r| ≥ 1, or that did not move, has none: it keeps w_n. Where r < 0 the weight swings about its fixed
    point; between whole intervals r^k is |r|^k·cos(πk).

    Source: Aitken (1926), the Δ² process, on each coordinate of a run's own last three evenly spaced snapshots.
    Differs: evaluated at the horizon asked for, not at infinity.
    """

    reference = "Aitken's Δ² process per coordinate (1926), at finite horizons"

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
        """Three snapshots."""
        return 3

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The last three that are evenly spaced."""
        return evenly_spaced("aitken", 3, steps_C, most=3)

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Go on geometrically: [B, H, D]."""
        prefix.require("aitken", self.min_context, steps_H)
        steps = self.observed(prefix.steps_C)
        first, middle, last_BD = (prefix.weights_BCD[:, prefix.steps_C.index(step)] for step in steps)
        before_BD, difference_BD = middle - first, last_BD - middle
        converging_BD = difference_BD.abs() < before_BD.abs()
        ratio_BD = torch.where(converging_BD, difference_BD / torch.where(converging_BD, before_BD, 1.0), 0.0)
        moved_BHD = torch.stack(
            [geometric_sum(ratio_BD, (step - steps[-1]) / (steps[-1] - steps[-2])) for step in steps_H], dim=1
        )
        return moved_BHD.mul_(difference_BD[:, None]).add_(last_BD[:, None])


def geometric_sum(ratio: Tensor, count: float) -> Tensor:
    """Sum r + r² + … + r^count = r(1 − r^count)/(1 − r) for |r| < 1, continued to fractions of `count`."""
    size = ratio.abs()
    turn = torch.where(ratio < 0, torch.cos(torch.tensor(torch.pi * count, dtype=torch.float64)).to(ratio.dtype), 1.0)
    # −expm1(k·log r) and not 1 − r^k: near r = 1 that would lose all digits.
    shrunk = torch.where(
        ratio < 0, 1 - size**count * turn, -torch.expm1(count * torch.log(size.clamp(min=torch.finfo(size.dtype).tiny)))
    )
    return ratio * shrunk / (1 - ratio)
