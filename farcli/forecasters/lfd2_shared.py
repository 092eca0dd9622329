"""LFD-2 with one map for all coordinates (or one per tensor): exact sums in one pass, solved afterwards.

The displacement from w_n is fitted in the basis z = (w_0, w_n − w_0, 1). This basis, and not (w_0, w_n, 1),
since w_0 and w_n are nearly collinear early on; and since tensors that start constant (norms at 1, biases
at 0) then give a column that is exactly constant and is dropped, not one that is nearly collinear.

Shape suffixes: B runs of a block, R runs, S tensors of the layout, K groups of coordinates (1, or S), P basis
columns (3, or 2 without the bias), H horizons, N columns of a tile, F = 6 products of two basis columns.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from farcli.config import format_size
from farcli.errors import ResourceError
from farcli.forecasters.acceleration import Acceleration
from farcli.forecasters.base import Prefix, Problem, Sums, SumsInParts
from farcli.forecasters.intervals import CountedErrors
from farcli.forecasters.least_squares import normal_equations, penalised
from farcli.forecasters.leave_one_out import PENALTIES, LeftOut, squared_errors
from farcli.forecasters.lfd2_guard import RangeSums
from farcli.forecasters.update_growth import decaying, update_growth
from farcli.layout import Segment

_TILE = {"cpu": 1 << 19}
_TILE_ELSEWHERE = 1 << 22
"""Float64 numbers of one tile: 4 MiB on a CPU, so that what is converted is used again from its caches."""
_LONG, _LONG_OF_FEW, _FEW_RUNS = 4096, 64, 16
"""Coordinates of one tensor from which runs are taken in one by one: in general, and where they are few."""
_LONG_WIDTH, _LONG_NUMBERS = 1 << 16, 1 << 18
"""Columns, and numbers of the targets, of a tile of those: it stays in a core's own cache, calls are long enough not to
hand the interpreter over all the time, and products short enough for BLAS to do without packing and without threads."""
_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
_SCALE_FLOOR = 1e-3
"""A tensor's scale is at least this part of the scale over all tensors: else those that hardly move, whose
motion is mostly rounding, would outweigh all others."""
_L1_FLOOR = 1e-6
"""Residuals below this part of the mean displacement weigh alike when reweighted: the L1 loss is a Huber loss
with a corner of this width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedOptions:
    """The options of `Lfd2.Config` that a shared map knows."""

    l1: bool
    beta: float
    scaled: bool
    grouped: bool
    bias: bool
    ridge: float | None
    """None: chosen by leaving each run out."""
    max_passes: int
    tolerance: float
    guarded: bool
    intervals: bool

    @property
    def bound(self) -> bool:
        """Whether the map has coefficients of its own for each tensor."""
        return self.grouped or (self.scaled and self.bias)


@final
class SquaredSums(SumsInParts):
    """Per run and tensor: Gram matrix of the basis, its products with the displacements, and their squares."""

    def __init__(self, problem: Problem, absolute: bool, *, ranges: bool = False) -> None:
        runs, tensors, horizons = problem.runs, len(problem.layout.floats), len(problem.steps_H)
        per_run = 8 * tensors * (3 * (3 + horizons) + horizons)
        if runs * per_run > problem.memory:
            raise ResourceError(
                f"lfd2: the sums of {runs} runs, {tensors} tensors and {horizons} target steps need "
                f"{format_size(runs * per_run)}, but the budget is {format_size(problem.memory)}, "
                f"which allows {problem.memory // per_run} runs.",
                "Raise --memory, or forecast fewer steps with --to.",
            )
        self._coordinates = problem.coordinates
        self._absolute = absolute
        self.products_RSPQ = torch.zeros(runs, tensors, 3, 3 + horizons, dtype=torch.float64)
        """zᵀ(z, y − w_n)."""
        self.squares_RSH = torch.zeros(runs, tensors, horizons, dtype=torch.float64)
        """‖y − w_n‖²."""
        self.absolutes_SH = torch.zeros(tensors, horizons, dtype=torch.float64)
        """‖y − w_n‖₁; only where the loss needs it."""
        self.ranges = RangeSums(problem) if ranges else None
        """Only where forecasts are guarded."""
        self._bases: dict[tuple[int, int], np.ndarray] = {}
        """Of prefixes whose targets come in parts: by run and first coordinate."""
        self._bases_used = False
        """Whether the last block was a further part of one."""
        self._room = np.empty(0, np.int8)
        """For the displacements of a tile."""

    def add(self, prefix: Prefix, truth_BHD: Tensor, first: int = 0) -> None:
        """Take one block in, or its targets from the index `first` on."""
        prefix, truth_BHD = _computable(prefix, truth_BHD)
        if self.ranges is not None:
            self.ranges.add(prefix, truth_BHD, first)
        device = truth_BHD.device
        self._move(device)
        horizons = truth_BHD.shape[1]
        targets = slice(first, first + horizons)
        segments = prefix.segments
        if first == 0 and self._bases_used:
            self._bases.clear()
        self._bases_used = first > 0
        if device.type == "cpu":
            least = _LONG if len(prefix.runs_B) > _FEW_RUNS else _LONG_OF_FEW
            long = [segment for segment in segments if segment.stop - segment.start >= least]
            with np.errstate(over="ignore", invalid="ignore"):  # `finite` tells
                for row in range(len(prefix.runs_B)):
                    for segment in long:
                        self._add_long(prefix, truth_BHD, targets, row, segment)
            segments = [segment for segment in segments if segment not in long]
        for tile in tiles(prefix, truth_BHD, self._coordinates, 3 + horizons, segments) if segments else ():
            columns_BQN, runs_B = tile.columns_BQN, torch.tensor(tile.runs_B, device=device)
            products_BPQ = torch.bmm(columns_BQN[:, :3], columns_BQN.mT)
            products_RPQ = self.products_RSPQ[:, tile.slot]
            if first == 0:
                products_RPQ[..., :3].index_add_(0, runs_B, products_BPQ[..., :3])
            products_RPQ[..., 3:][..., targets].index_add_(0, runs_B, products_BPQ[..., 3:])
            targets_BHN = columns_BQN[:, 3:]
            squares_BH = torch.linalg.vecdot(targets_BHN, targets_BHN)
            self.squares_RSH[:, tile.slot, targets].index_add_(0, runs_B, squares_BH)
            if self._absolute:
                self.absolutes_SH[tile.slot, targets] += targets_BHN.abs().sum(dim=(0, 2))

    def _add_long(self, prefix: Prefix, truth_BHD: Tensor, targets: slice, row: int, segment: Segment) -> None:
        """Take in many coordinates of one tensor of one run, on the CPU: as fast as they can be read.

        The same sums as below, but that differences and products with the targets are taken in the weights' own
        format, tile by tile, and only the tiles are added in float64: of float32 weights, 16,777,216 of them,
        each sum is then right to 2e-9 of the product of its factors' norms. And through numpy: its BLAS
        multiplies such flat matrices twice as fast as the one in torch's wheels (AMD). By `np.dot`, since `@` holds
        the interpreter while it works, so that neither the readers nor other sums get on. (So does `np.vecdot`, but
        for less than it costs to hand it over for every row.)
        """
        stop = min(segment.stop, self._coordinates - prefix.start)
        run, slot = prefix.runs_B[row], segment.slot
        weights_CD, truth_HD = prefix.weights_BCD[row].numpy(), truth_BHD[row].numpy()
        products_PQ, squares_H = self.products_RSPQ.numpy()[run, slot], self.squares_RSH.numpy()[run, slot, targets]
        absolutes_H = self.absolutes_SH.numpy()[slot, targets]
        gram_PP, products_PH = products_PQ[:, :3], products_PQ[:, 3:][:, targets]
        own = np.promote_types(truth_HD.dtype, np.float32)
        if self._room.dtype != own:
            self._room = np.empty(_LONG_NUMBERS, own)
        for start in range(segment.start, stop, _LONG_WIDTH):
            part = slice(start, min(start + _LONG_WIDTH, stop))
            last_N = weights_CD[-1, part]
            basis_PN = self._bases.get((run, prefix.start + start))
            if basis_PN is None:
                exact_PN = np.ones((3, len(last_N)))
                np.copyto(exact_PN[0], weights_CD[0, part])
                np.subtract(last_N, exact_PN[0], out=exact_PN[1])
                gram_PP += np.dot(exact_PN, exact_PN.T)
                basis_PN = exact_PN.astype(own)
                if len(truth_HD) < self.squares_RSH.shape[2]:
                    self._bases[run, prefix.start + start] = basis_PN
            rows = _LONG_NUMBERS // len(last_N)
            for first in range(0, len(truth_HD), rows):
                some = slice(first, first + rows)
                y_GN = self._room[: len(truth_HD[some]) * len(last_N)].reshape(-1, len(last_N))
                np.subtract(truth_HD[some, part], last_N, out=y_GN, dtype=own)
                products_PH[:, some] += np.dot(basis_PN, y_GN.T)
                squares_H[some] += np.vecdot(y_GN, y_GN)
                if self._absolute:
                    absolutes_H[some] += np.abs(y_GN).sum(axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        return self.products_RSPQ.nbytes + self.squares_RSH.nbytes

    def _move(self, device: torch.device) -> None:
        # The sums live where the blocks are: no transfer, and no wait, for each block.
        if self.products_RSPQ.device != device:
            self.products_RSPQ = self.products_RSPQ.to(device)
            self.squares_RSH = self.squares_RSH.to(device)
            self.absolutes_SH = self.absolutes_SH.to(device)

    def merge(self, other: Any) -> None:
        """Add another part's sums."""
        device = self.products_RSPQ.device
        self.products_RSPQ += other.products_RSPQ.to(device)
        self.squares_RSH += other.squares_RSH.to(device)
        self.absolutes_SH += other.absolutes_SH.to(device)
        if self.ranges is not None:
            self.ranges.merge(other.ranges)

    @property
    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(self.products_RSPQ.isfinite().all() & self.squares_RSH.isfinite().all())


@final
class WeightedSums(Sums):
    """Per tensor and horizon: the sums for least squares with each residual r weighted by 1/|r|."""

    def __init__(self, problem: Problem, delta_K3H: Tensor, scale_S: Tensor, floor_H: Tensor) -> None:
        tensors, horizons = len(problem.layout.floats), len(problem.steps_H)
        self._coordinates = problem.coordinates
        self._delta_S3H = delta_K3H.expand(tensors, -1, -1)
        self._scale_S = scale_S
        self._floor_H = floor_H
        self.gram_SHF = torch.zeros(tensors, horizons, len(_PAIRS), dtype=torch.float64)
        """Σ w z zᵀ, the products of `_PAIRS`."""
        self.cross_SHP = torch.zeros(tensors, horizons, 3, dtype=torch.float64)
        """Σ w z (y − w_n)."""
        self.absolutes_SH = torch.zeros(tensors, horizons, dtype=torch.float64)
        """Σ |r| of the map that these weights come from, in units of the tensor's scale."""
        self.count = 0

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        prefix, truth_BHD = _computable(prefix, truth_BHD)
        device, horizons = truth_BHD.device, truth_BHD.shape[1]
        delta_SH3, floor_H1 = self._delta_S3H.mT.to(device), self._floor_H[:, None].to(device)
        # A tile holds the columns, residuals, weights and products of columns.
        for tile in tiles(prefix, truth_BHD, self._coordinates, 3 + 4 * horizons + len(_PAIRS)):
            columns_BPN, targets_BHN = tile.columns_BQN[:, :3], tile.columns_BQN[:, 3:]
            residuals_BHN = targets_BHN - delta_SH3[tile.slot] @ columns_BPN
            residuals_BHN.abs_().div_(float(self._scale_S[tile.slot]))
            absolutes_H = residuals_BHN.sum(dim=(0, 2))
            weights_BHN = torch.maximum(residuals_BHN, floor_H1).reciprocal_()
            pairs_BFN = torch.stack([columns_BPN[:, i] * columns_BPN[:, j] for i, j in _PAIRS], dim=1)
            gram_HF = torch.bmm(weights_BHN, pairs_BFN.mT).sum(0)
            cross_HP = torch.bmm(weights_BHN.mul_(targets_BHN), columns_BPN.mT).sum(0)
            self.absolutes_SH[tile.slot] += absolutes_H.cpu()
            self.gram_SHF[tile.slot] += gram_HF.cpu()
            self.cross_SHP[tile.slot] += cross_HP.cpu()
            self.count += columns_BPN.shape[0] * columns_BPN.shape[-1]

    def merge(self, other: Any) -> None:
        """Add another part's sums."""
        self.gram_SHF += other.gram_SHF
        self.cross_SHP += other.cross_SHP
        self.absolutes_SH += other.absolutes_SH
        self.count += other.count

    @property
    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool((self.gram_SHF.sum() + self.cross_SHP.sum() + self.absolutes_SH.sum()).isfinite())


@final
class ResidualSums(CountedErrors):
    """Per tensor and horizon: how large the errors on runs left out are, in units of a scale."""

    def __init__(self, problem: Problem, without_RK3H: Tensor, scale_SH: Tensor) -> None:
        tensors = len(problem.layout.floats)
        super().__init__(tensors, len(problem.steps_H))
        self._coordinates = problem.coordinates
        self._without_RSH3 = without_RK3H.expand(-1, tensors, -1, -1).mT
        self._scale_SH = scale_SH

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        prefix, truth_BHD = _computable(prefix, truth_BHD)
        for tile in tiles(prefix, truth_BHD, self._coordinates, 3 + 3 * truth_BHD.shape[1]):
            maps_BH3 = self._without_RSH3[list(tile.runs_B), tile.slot].to(truth_BHD.device)
            residuals_BHN = tile.columns_BQN[:, 3:] - maps_BH3 @ tile.columns_BQN[:, :3]
            self.counts.add(tile.slot, residuals_BHN / self._scale_SH[tile.slot, :, None].to(truth_BHD.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A part of a block that lies in one tensor and fits the cache.

    Attributes:
        slot: index of the tensor in `layout.floats`.
        runs_B: positions of the runs.
        columns_BQN: float64: w_0, w_n − w_0, 1, and y − w_n of each horizon. Overwritten by the next tile.
    """

    slot: int
    runs_B: tuple[int, ...]
    columns_BQN: Tensor


def tiles(
    prefix: Prefix, truth_BHD: Tensor, coordinates: int, rows: int, segments: Sequence[Segment] | None = None
) -> Iterator[Tile]:
    """Cut a block at the bounds of tensors and to the size of a cache, in float64.

    Differences are taken in float64, where those of float32 numbers are exact.

    Args:
        prefix: the block; its first and last snapshots are used.
        truth_BHD: the true weights.
        coordinates: where, in the whole vector, the fitted ones end.
        rows: how many float64 rows per run the caller holds for a tile.
        segments: the parts of the block to cut; all of it when None.
    """
    first_BD, last_BD = prefix.weights_BCD[:, 0], prefix.weights_BCD[:, -1]
    runs, horizons = truth_BHD.shape[:2]
    budget = _TILE.get(truth_BHD.device.type, _TILE_ELSEWHERE)
    columns_BQN = truth_BHD.new_empty((0, 0, 0), dtype=torch.float64)
    for segment in prefix.segments if segments is None else segments:
        stop = min(segment.stop, coordinates - prefix.start)
        width = max(1, min(stop - segment.start, budget // rows))
        group = max(1, min(runs, budget // (rows * width)))
        for run in range(0, runs, group):
            for start in range(segment.start, stop, width):
                some, part = slice(run, run + group), slice(start, min(start + width, stop))
                own_B = prefix.runs_B[some]
                shape = (len(own_B), 3 + horizons, part.stop - part.start)
                if columns_BQN.shape != shape:
                    columns_BQN = columns_BQN.new_empty(shape)
                    columns_BQN[:, 2] = 1
                columns_BQN[:, 0].copy_(first_BD[some, part])
                columns_BQN[:, 1].copy_(last_BD[some, part])
                columns_BQN[:, 3:].copy_(truth_BHD[some, :, part])
                columns_BQN[:, 3:].sub_(columns_BQN[:, 1:2])
                columns_BQN[:, 1].sub_(columns_BQN[:, 0])
                yield Tile(slot=segment.slot, runs_B=own_B, columns_BQN=columns_BQN)


def _computable(prefix: Prefix, truth_BHD: Tensor) -> tuple[Prefix, Tensor]:
    if truth_BHD.device.type != "mps":
        return prefix, truth_BHD
    # MPS has no float64; sums in float32 would not be exact.
    return replace(prefix, weights_BCD=prefix.weights_BCD.cpu()), truth_BHD.cpu()


@final
class SharedFit:
    """A fitted map, and what further passes need.

    Attributes:
        delta_K3H: coefficients of w_0, w_n − w_0 and 1 in ŵ_h − w_n, in the weights' units.
        left: the runs left out, where the penalty is chosen on them or intervals are wanted; errors in scaled units.
        ranges: of the training runs, where forecasts are guarded.
        width_SH: half-widths of 90 % intervals, where they are wanted, after the pass that calibrates them.
        objective: L where the loss is L1, of the best map whose residuals a pass has seen.
        unsettled: whether another pass would improve the solution.
    """

    def __init__(self, options: SharedOptions, problem: Problem, sums: SquaredSums) -> None:
        """Solve the squared loss, from the sums of the first pass."""
        self._options = options
        self._problem = problem
        products_RSPQ, self._squares_RSH = sums.products_RSPQ.cpu(), sums.squares_RSH.cpu()
        count = problem.runs * problem.coordinates
        assert int(products_RSPQ[..., 2, 2].sum()) == count, "every run and coordinate comes once"
        self._seen_S = products_RSPQ[..., 2, 2].sum(0) > 0
        self._scale_S = _scales(products_RSPQ) if options.scaled else torch.ones(products_RSPQ.shape[1]).double()
        self._unit_S3 = torch.stack([1 / self._scale_S, 1 / self._scale_S, torch.ones_like(self._scale_S)], dim=-1)
        scaled_RSPQ = products_RSPQ * self._unit_S3[..., None]
        self._basis = 3 if options.bias else 2
        cross_RSPH = scaled_RSPQ[..., : self._basis, 3:] / self._scale_S[:, None, None]
        grams_RSPP = (scaled_RSPQ[..., :3] * self._unit_S3[:, None])[..., : self._basis, : self._basis]
        cross_SPH = cross_RSPH.sum(0)
        squares = float((self._squares_RSH / self._scale_S[:, None] ** 2).sum())
        self._absolutes = float((sums.absolutes_SH.cpu() / self._scale_S[:, None]).sum())
        floor_H = (sums.absolutes_SH.cpu() / self._scale_S[:, None]).sum(0) * (_L1_FLOOR / count)
        self._floor_H = torch.where(floor_H > 0, floor_H, 1.0)
        # Norms are root mean squares in units of the true displacement's, so that one beta fits every network.
        horizons = len(problem.steps_H)
        norm = squares / (count * horizons) * problem.coordinates
        self._grams_RKPP = self._grouped(grams_RSPP, 1) / (norm or 1.0)
        gaps_H = torch.tensor((problem.steps_C[-1], *problem.steps_H), dtype=torch.float64).diff()
        self._gaps_H = gaps_H / gaps_H.mean()
        self._passes = 1
        self._path: Acceleration | None = None
        self.objective = float("nan")
        self.unsettled = options.l1 and self._absolutes > 0 and options.max_passes > 1

        self.ranges, self.width_SH = sums.ranges, None
        self.left: LeftOut | None = None
        gram_KPP, cross_KPH = self._grouped(grams_RSPP.sum(0), 0), self._grouped(cross_SPH, 0)
        squares_RSH = self._squares_RSH / self._scale_S[:, None] ** 2
        if options.ridge is None or options.intervals:
            self.left = self._left_out(*(self._grouped(part, 1) for part in (grams_RSPP, cross_RSPH, squares_RSH)))
            self._theta_KPH = self.left.theta_KPH
            self.unsettled = options.intervals
            without_RSPH = self.left.without_RKPH.expand(-1, len(self._scale_S), -1, -1)
            errors_RSH = squared_errors(without_RSPH, grams_RSPP, cross_RSPH, squares_RSH)
            count_S1 = products_RSPQ[..., 2, 2].sum(0)[:, None]
            self._error_SH = (errors_RSH.sum(0) / count_S1.clamp(min=1)).sqrt() * self._scale_S[:, None]
        else:
            self._theta_KPH = self._solved(gram_KPP, cross_KPH)
        if options.beta and squares:
            gram_KHPP = self._penalised(gram_KPP)[:, None].expand(-1, horizons, -1, -1) / squares
            self._theta_KPH = self._decaying(self._theta_KPH, self._theta_KPH, gram_KHPP)
        if options.ridge is None:
            pooled = (part.sum(1, keepdim=True) for part in (grams_RSPP, cross_RSPH, squares_RSH))
            pooled_1PH = self._left_out(*pooled).theta_KPH if options.bound else self._theta_KPH
        else:
            pooled_1PH = self._solved(grams_RSPP.sum((0, 1))[None], cross_SPH.sum(0)[None])
        self.delta_K3H = self._in_weights(self._theta_KPH, pooled_1PH)

    def sums(self) -> WeightedSums | ResidualSums:
        """Empty sums for one more pass: reweighted by the present residuals, or of the errors on runs left out."""
        if self.left is not None:
            scale_SH = torch.where(self._error_SH > 0, self._error_SH, 1.0)
            return ResidualSums(self._problem, self.without_each(), scale_SH)
        return WeightedSums(self._problem, self.delta_K3H, self._scale_S, self._floor_H)

    def without_each(self) -> Tensor:
        """The maps fitted without one run, in the weights' units: [R, K, 3, H]."""
        assert self.left is not None
        none_1PH = torch.zeros_like(self.left.theta_KPH[:1])  # of tensors that are not fitted nothing is said
        return torch.stack([self._in_weights(theta_KPH, none_1PH) for theta_KPH in self.left.without_RKPH])

    def calibrated(self, sums: ResidualSums) -> "SharedFit":
        """The same fit, with intervals."""
        fit = copy(self)
        fit.unsettled = False
        fit.width_SH = sums.counts.quantile() * self._error_SH
        return fit

    def reweighted(self, sums: WeightedSums) -> "SharedFit":
        """The fit after one more pass: Σ r²/(2|r₀|) + |r₀|/2, which bounds Σ |r| from above, is minimised.

        Such a step cannot raise the L1 loss, but successive ones are slow, so they are accelerated.
        """
        options = self._options
        assert sums.count == self._problem.runs * self._problem.coordinates, "every run and coordinate comes once"
        index_PP = torch.tensor([[0, 1, 2], [1, 3, 4], [2, 4, 5]])[: self._basis, : self._basis]
        unit_SP = self._unit_S3[:, : self._basis]
        gram_SHPP = sums.gram_SHF[..., index_PP] * unit_SP[:, None, :, None] * unit_SP[:, None, None, :]
        cross_SHP = sums.cross_SHP[..., : self._basis] * (unit_SP / self._scale_S[:, None])[:, None]
        gram_KHPP, cross_KHP = self._grouped(gram_SHPP, 0), self._grouped(cross_SHP, 0)
        curvature_KHPP = self._penalised(gram_KHPP) / (2 * self._absolutes)
        lowest_KPH = self._solved(gram_KHPP, cross_KHP[..., None]).squeeze(-1).mT

        absolutes_KH = self._grouped(sums.absolutes_SH, 0) / self._absolutes
        if options.beta:
            mapped_KPH = self._decaying(lowest_KPH, self._theta_KPH, curvature_KHPP)
            before, after = (
                _quadratic(theta_KPH - lowest_KPH, curvature_KHPP).sum() + options.beta * self._growth(theta_KPH)
                for theta_KPH in (self._theta_KPH, mapped_KPH)
            )
            objective, gain = absolutes_KH.sum() + options.beta * self._growth(self._theta_KPH), before - after
        else:
            mapped_KPH = lowest_KPH
            objective, gain = absolutes_KH, _quadratic(self._theta_KPH - lowest_KPH, curvature_KHPP)

        # Horizons and groups are independent problems, but for the regulariser, which ties all into one.
        shape = mapped_KPH.mT.shape
        flat = (-1,) if options.beta else shape
        point, mapped = self._theta_KPH.mT.reshape(flat), mapped_KPH.mT.reshape(flat)
        fit = copy(self)
        fit._passes = self._passes + 1
        fit._path = (
            self._path.take(point, mapped, objective, gain)
            if self._path
            else Acceleration.begin(point, mapped, objective, gain)
        )
        fit.objective = float(fit._path.objective.sum())
        fit.unsettled = fit._passes < options.max_passes and bool(
            fit._path.gain.sum() > options.tolerance * fit.objective
        )
        lengths = curvature_KHPP.diagonal(dim1=-2, dim2=-1).sqrt().reshape(flat)
        chosen = fit._path.proposal(lengths) if fit.unsettled else fit._path.mapped_P
        fit._theta_KPH = chosen.reshape(shape).mT
        pooled_1PH = self._solved(gram_SHPP.sum(0), cross_SHP.sum(0)[..., None]).squeeze(-1).mT[None]
        fit.delta_K3H = fit._in_weights(fit._theta_KPH, pooled_1PH)
        return fit

    def growth(self) -> float:
        """L_grad of the fitted map."""
        return float(self._growth(self._theta_KPH))

    def _growth(self, theta_KPH: Tensor) -> Tensor:
        return update_growth(theta_KPH, self._grams_RKPP, self._gaps_H)

    def _grouped(self, values: Tensor, axis: int) -> Tensor:
        return values if self._options.grouped else values.sum(axis, keepdim=True)

    def _left_out(self, grams_RKPP: Tensor, cross_RKPH: Tensor, squares_RKH: Tensor) -> LeftOut:
        penalties = PENALTIES if self._options.ridge is None else (self._options.ridge,)
        return LeftOut.solve(grams_RKPP, cross_RKPH, squares_RKH, bias=self._options.bias, penalties=penalties)

    def _solved(self, gram_PP: Tensor, cross_PM: Tensor) -> Tensor:
        assert self._options.ridge is not None
        return normal_equations(gram_PP, cross_PM, ridge=self._options.ridge, bias=self._options.bias)

    def _penalised(self, gram_PP: Tensor) -> Tensor:
        assert self._options.ridge is not None
        return penalised(gram_PP, ridge=self._options.ridge, bias=self._options.bias)

    def _decaying(self, theta_KPH: Tensor, start_KPH: Tensor, gram_KHPP: Tensor) -> Tensor:
        return decaying(theta_KPH, start_KPH, gram_KHPP, self._grams_RKPP, self._gaps_H, beta=self._options.beta)

    def _in_weights(self, theta_KPH: Tensor, pooled_1PH: Tensor) -> Tensor:
        """Coefficients in the weights' units; tensors that were not fitted (buffers) get the map of all others."""
        theta_K3H = torch.nn.functional.pad(theta_KPH, (0, 0, 0, 3 - self._basis))
        if not self._options.bound:
            return theta_K3H.contiguous()
        pooled_13H = torch.nn.functional.pad(pooled_1PH, (0, 0, 0, 3 - self._basis))
        theta_S3H = torch.where(self._seen_S[:, None, None], theta_K3H, pooled_13H)
        unit_S3 = torch.stack([torch.ones_like(self._scale_S)] * 2 + [self._scale_S], dim=-1)
        return (theta_S3H * unit_S3[..., None]).contiguous()


def _quadratic(theta_KPH: Tensor, gram_KHPP: Tensor) -> Tensor:
    return torch.einsum("kph,khpq,kqh->kh", theta_KPH, gram_KHPP, theta_KPH)


def _scales(products_RSPQ: Tensor) -> Tensor:
    """Root mean square of w_n − w_0 of each tensor over runs; that of all tensors where one does not move."""
    moved_S, count_S = products_RSPQ[..., 1, 1].sum(0), products_RSPQ[..., 2, 2].sum(0)
    pooled = float((moved_S.sum() / count_S.sum()).sqrt()) or 1.0
    own_S = (moved_S / count_S.clamp(min=1)).sqrt()
    return torch.where(own_S > 0, own_S.clamp(min=_SCALE_FLOOR * pooled), pooled)
