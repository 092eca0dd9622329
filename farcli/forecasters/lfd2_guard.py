"""What keeps a fitted map within what it has seen: prefixes and forecasts are clipped to the training runs' range.

A line fitted on few runs is right where they were. One run beyond them is enough to ruin an average: on SCIENCE's
protocol D2 one unseen sign of Adam's first update gave an error of 57 where .01 was usual.

Shape suffixes: B runs, S tensors (or 1 for all of them), F = 2 features (w_0, w_n − w_0), H horizons, N coordinates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from farcli.forecasters.base import Prefix, Problem, stored

_FEATURES_WIDTH = 1.3
"""Clipped features may span so many times the training range."""
_FORECAST_MARGIN = 0.75
"""Forecasts may leave the training finals' range by so many of their standard deviations."""


class RangeSums:
    """Least and largest features and finals of each tensor, and the finals' moments."""

    def __init__(self, problem: Problem) -> None:
        tensors, horizons = len(problem.layout.floats), len(problem.steps_H)
        self._coordinates = problem.coordinates
        self.low_SQ = torch.full((tensors, 2 + horizons), torch.inf, dtype=torch.float64)
        """Of w_0, w_n − w_0 and w_h."""
        self.high_SQ = -self.low_SQ
        self.moments_S3H = torch.zeros(tensors, 3, horizons, dtype=torch.float64)
        """Count, Σ w_h, Σ w_h²."""

    def add(self, prefix: Prefix, truth_BHD: Tensor, first: int = 0) -> None:
        """Take one block in, or its targets from the index `first` on."""
        first_BD, last_BD = prefix.weights_BCD[:, 0], prefix.weights_BCD[:, -1]
        targets = range(first, first + truth_BHD.shape[1])
        columns_Q = [0, 1, *(2 + target for target in targets)]
        for segment in prefix.segments:
            stop = min(segment.stop, self._coordinates - prefix.start)
            if stop <= segment.start:
                continue
            part = slice(segment.start, stop)
            finals_BHN = truth_BHD[..., part].cpu().double()
            first_BN = first_BD[:, part].cpu().double()
            columns = [first_BN[:, None], (last_BD[:, part].cpu().double() - first_BN)[:, None], finals_BHN]
            low_Q, high_Q = torch.cat(columns, dim=1).transpose(0, 1).flatten(1).aminmax(dim=1)
            lowest_Q, highest_Q = self.low_SQ[segment.slot], self.high_SQ[segment.slot]
            lowest_Q[columns_Q] = torch.minimum(lowest_Q[columns_Q], low_Q)
            highest_Q[columns_Q] = torch.maximum(highest_Q[columns_Q], high_Q)
            sums = [torch.full_like(low_Q[2:], finals_BHN[:, 0].numel()), finals_BHN.sum((0, 2))]
            part_3H = torch.stack([*sums, finals_BHN.square().sum((0, 2))])
            self.moments_S3H[segment.slot, :, targets.start : targets.stop] += part_3H

    def merge(self, other: "RangeSums") -> None:
        """Take in another part's."""
        self.low_SQ = torch.minimum(self.low_SQ, other.low_SQ)
        self.high_SQ = torch.maximum(self.high_SQ, other.high_SQ)
        self.moments_S3H += other.moments_S3H


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """The bounds: of features [S, 2], of forecasts [S, H], each a pair (low, high) on the leading axis."""

    features_2SF: Tensor
    forecasts_2SH: Tensor

    @classmethod
    def of(cls, sums: RangeSums, *, pooled: bool) -> Self:
        """The bounds that the training runs set, for each tensor or for all together."""
        low_SQ, high_SQ, moments_S3H = sums.low_SQ, sums.high_SQ, sums.moments_S3H
        all_Q = low_SQ.amin(0, keepdim=True), high_SQ.amax(0, keepdim=True), moments_S3H.sum(0, keepdim=True)
        if pooled:
            low_SQ, high_SQ, moments_S3H = all_Q
        else:  # tensors that were not fitted (buffers) get the bounds of all others
            unseen_S1 = moments_S3H[:, 0, :1] == 0
            low_SQ, high_SQ = torch.where(unseen_S1, all_Q[0], low_SQ), torch.where(unseen_S1, all_Q[1], high_SQ)
            moments_S3H = torch.where(unseen_S1[..., None], all_Q[2], moments_S3H)
        count_SH, sum_SH, square_SH = moments_S3H.unbind(1)
        std_SH = (square_SH / count_SH - (sum_SH / count_SH).square()).clamp(min=0).sqrt()
        room_SF = (_FEATURES_WIDTH - 1) / 2 * (high_SQ - low_SQ)[:, :2]
        return cls(
            features_2SF=torch.stack([low_SQ[:, :2] - room_SF, high_SQ[:, :2] + room_SF]),
            forecasts_2SH=torch.stack(
                [low_SQ[:, 2:] - _FORECAST_MARGIN * std_SH, high_SQ[:, 2:] + _FORECAST_MARGIN * std_SH]
            ),
        )

    def features(self, slot: int, first_BN: Tensor, last_BN: Tensor) -> tuple[Tensor, Tensor]:
        """w_0 and w_0 + (w_n − w_0), each clipped."""
        low_F, high_F = self.features_2SF[:, slot].tolist()
        clipped_BN = first_BN.clamp(low_F[0], high_F[0])
        return clipped_BN, clipped_BN + (last_BN - first_BN).clamp(low_F[1], high_F[1])

    def forecasts(self, slot: int, rows_H: list[int], forecast_BHN: Tensor) -> None:
        """Clip forecasts, in place."""
        low_H1, high_H1 = self.forecasts_2SH[:, slot, rows_H, None].to(forecast_BHN.dtype).to(forecast_BHN.device)
        forecast_BHN.clamp_(low_H1, high_H1)

    def tensors(self) -> dict[str, Tensor]:
        """What a file must store."""
        return {"guard_features": self.features_2SF, "guard_forecasts": self.forecasts_2SH}

    @classmethod
    def restore(cls, groups: int, horizons: int, tensors: Mapping[str, Tensor]) -> Self:
        """The bounds that `tensors` came from."""
        return cls(
            features_2SF=stored("lfd2", tensors, "guard_features", (2, groups, 2)),
            forecasts_2SH=stored("lfd2", tensors, "guard_forecasts", (2, groups, horizons)),
        )
