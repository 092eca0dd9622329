"""How sure a forecast is: intervals of 90 %, calibrated on runs that were left out.

Split-conformal: the half-width is that quantile of |ŵ − w| / scale over training runs, each forecast without itself,
under which 90 % of a new run's coordinates must fall if runs are exchangeable (Vovk et al. 2005; Lei et al. 2018).
Counted in bins of log |r|, so that counts of blocks add up and any number of coordinates takes no memory.

Shape suffixes: B runs, R runs, S tensors, H horizons, N coordinates, Q bins.
"""

import math
from typing import Any

import torch
from torch import Tensor

from farcli.forecasters.base import Sums

LEVEL = 0.9
"""The share of a new run's coordinates that lie within."""
_PER_OCTAVE, _LOWEST, _OCTAVES = 16, -24, 40
_BINS = _PER_OCTAVE * _OCTAVES


def rank(count: int | Tensor) -> int | Tensor:
    """Which of so many residuals, from 1 in order of size, a further one is below with probability 90 %."""
    if isinstance(count, int):
        return min(count, math.ceil(LEVEL * (count + 1) - 1e-9))
    return torch.minimum(count, torch.ceil(LEVEL * (count + 1) - 1e-9).long())


def quantile(residuals_RN: Tensor) -> Tensor:
    """The half-width, [N], that the calibration residuals of R runs ask for."""
    place = rank(len(residuals_RN))
    assert isinstance(place, int)
    return residuals_RN.abs().sort(0).values[place - 1]


class Counts:
    """How many calibration residuals are of what size, per tensor and horizon."""

    def __init__(self, tensors: int, horizons: int) -> None:
        self.counts_SHQ = torch.zeros(tensors, horizons, _BINS, dtype=torch.long)

    def add(self, slot: int, ratios_BHN: Tensor) -> None:
        """Take in |residual| / scale of one tensor's coordinates."""
        sizes_HM = ratios_BHN.transpose(0, 1).flatten(1).abs().cpu().double()
        places_HM = ((sizes_HM.clamp(min=2.0**_LOWEST).log2() - _LOWEST) * _PER_OCTAVE).long().clamp(max=_BINS - 1)
        self.counts_SHQ[slot].scatter_add_(1, places_HM, torch.ones_like(places_HM))

    def merge(self, other: "Counts") -> None:
        """Add another part's counts."""
        self.counts_SHQ += other.counts_SHQ

    def quantile(self) -> Tensor:
        """The half-width, [S, H], in units of the scale: its bin's upper end, at most 4.4 % more; 0 for no data."""
        total_SH1 = self.counts_SHQ.sum(-1, keepdim=True)
        place_SH = (self.counts_SHQ.cumsum(-1) >= rank(total_SH1)).long().argmax(-1)
        width_SH = 2.0 ** ((place_SH + 1) / _PER_OCTAVE + _LOWEST)
        return torch.where((total_SH1[..., 0] > 0) & (place_SH > 0), width_SH, 0.0).double()


class CountedErrors(Sums):
    """Sums that count errors on runs left out; `add` is the forecaster's own."""

    def __init__(self, tensors: int, horizons: int) -> None:
        self.counts = Counts(tensors, horizons)

    def merge(self, other: Any) -> None:
        """Add another part's counts."""
        self.counts.merge(other.counts)

    @property
    def finite(self) -> bool:
        """True: the pass before has seen to it."""
        return True
