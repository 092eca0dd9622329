"""LFD-2 with one dense map of the whole vector per horizon: (2D + 1) → D, the reading of GFM's Table 5.

Solved from whichever is smaller: the rows of all runs (the dual form; R runs are few), or the Gram matrix
of the 2D + 1 columns (the primal form; D is small). Both give the same map, with the same ridge.

Shape suffixes: B runs of a block, R runs, D coordinates, H horizons, X = 2D columns (w_0, w_n − w_0), P = X + 1
with the bias, Y = H·D targets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Self, final

import torch
from torch import Tensor

from farcli.config import format_size
from farcli.errors import ResourceError
from farcli.forecasters.base import Prefix, Problem, Sums, stored
from farcli.forecasters.least_squares import inverse_spectrum, normal_equations, unit_scale
from farcli.forecasters.leave_one_out import NAME_A_PENALTY, PENALTIES, require_runs

_GRAM_COPIES = 6
"""Copies of the Gram matrix and its right-hand sides that solving them holds, LAPACK's among them."""
_CHUNK = 1 << 18
"""Numbers of the targets that are worked on at once."""


def use_rows(problem: Problem, *, required: bool = False) -> bool:
    """Whether the rows of all runs are smaller than the Gram matrix, or `required`.

    Raises:
        ResourceError: neither fits `problem.memory`; names the largest D that does.
    """
    runs, horizons, size = problem.runs, len(problem.steps_H), problem.coordinates
    # What is held at most while they are solved: data, copies and the solution; and the spectrum of R × R numbers.
    rows_each = 8 * (runs * (4 + horizons + max(2, horizons)) + horizons + 6)
    spectrum = 8 * 4 * runs**2
    rows, gram = rows_each * size + spectrum, _GRAM_COPIES * 8 * (2 * size + 1) * ((2 * size + 1) + horizons * size)
    if (need := rows if required else min(rows, gram)) > problem.memory:
        by_gram = 0 if required else _largest_by_gram(problem.memory, horizons)
        largest = max(0, (problem.memory - spectrum) // rows_each, by_gram)
        raise ResourceError(
            f"lfd2: a dense map for D = {size} parameters, {horizons} target steps and {problem.runs} runs needs "
            f"{format_size(need)}, but the budget is {format_size(problem.memory)}, which allows D = {largest}.",
            "Raise --memory, forecast fewer steps with --to, or use the shared map (--set map=shared).",
        )
    return required or rows <= gram


def _largest_by_gram(memory: int, horizons: int) -> int:
    """The largest D with 8·6·(2D + 1)·((2 + H)·D + 1) ≤ memory."""
    size = isqrt(memory // (_GRAM_COPIES * 8 * (4 + 2 * horizons)))
    return size - (_GRAM_COPIES * 8 * (2 * size + 1) * ((2 + horizons) * size + 1) > memory)


def _columns(prefix: Prefix, size: int) -> tuple[Tensor, Tensor]:
    """Basis [B, X] and last weights [B, D] in float64, on the CPU (whole vectors of limited D; MPS has no float64)."""
    first_BD = prefix.weights_BCD[:, 0, :size].cpu().double()
    last_BD = prefix.weights_BCD[:, -1, :size].cpu().double()
    return torch.cat([first_BD, last_BD - first_BD], dim=-1), last_BD


@final
class RowSums(Sums):
    """The basis and displacements of every run, by its position: rows of other parts are 0, so parts add up."""

    def __init__(self, problem: Problem) -> None:
        size, horizons = problem.coordinates, len(problem.steps_H)
        self.basis_RX = torch.zeros(problem.runs, 2 * size, dtype=torch.float64)
        self.targets_RY = torch.zeros(problem.runs, horizons * size, dtype=torch.float64)
        self.seen = 0

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        size, runs_B = self.basis_RX.shape[1] // 2, list(prefix.runs_B)
        basis_BX, last_BD = _columns(prefix, size)
        self.basis_RX[runs_B] = basis_BX
        displaced_BHD = truth_BHD[..., :size].cpu().double() - last_BD[:, None]
        self.targets_RY[runs_B] = displaced_BHD.flatten(1)
        self.seen += len(runs_B)

    def merge(self, other: Any) -> None:
        """Take in another part's runs."""
        self.basis_RX += other.basis_RX
        self.targets_RY += other.targets_RY
        self.seen += other.seen

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return bool(self.basis_RX.sum().isfinite() & self.targets_RY.sum().isfinite())


@final
class GramSums(Sums):
    """Gram matrix of the columns (w_0, w_n − w_0, 1), and their products with the displacements."""

    def __init__(self, problem: Problem) -> None:
        size, horizons = problem.coordinates, len(problem.steps_H)
        self.gram_PP = torch.zeros(2 * size + 1, 2 * size + 1, dtype=torch.float64)
        self.cross_PY = torch.zeros(2 * size + 1, horizons * size, dtype=torch.float64)
        self.seen = 0

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        size = self.gram_PP.shape[0] // 2
        basis_BX, last_BD = _columns(prefix, size)
        basis_BP = torch.cat([basis_BX, torch.ones_like(basis_BX[:, :1])], dim=-1)
        displaced_BHD = truth_BHD[..., :size].cpu().double() - last_BD[:, None]
        self.gram_PP.addmm_(basis_BP.T, basis_BP)
        self.cross_PY.addmm_(basis_BP.T, displaced_BHD.flatten(1))
        self.seen += len(prefix.runs_B)

    def merge(self, other: Any) -> None:
        """Add another part's sums."""
        self.gram_PP += other.gram_PP
        self.cross_PY += other.cross_PY
        self.seen += other.seen

    @property
    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(self.gram_PP.sum().isfinite() & self.cross_PY.sum().isfinite())


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMap:
    """ŵ − w_n = x·inner·outer + intercept, with x = (w_0, w_n − w_0); inner alone in the primal form.

    Attributes:
        inner_XV: [2D, V]; V = Y in the primal form, R in the dual form.
        outer_RY: [R, Y] in the dual form, else None.
        intercept_Y: [Y].
    """

    inner_XV: Tensor
    outer_RY: Tensor | None
    intercept_Y: Tensor

    def forecast(self, prefix: Prefix, rows_H: list[int], horizons: int) -> Tensor:
        """Weights [B, H, D] at the fitted horizons `rows_H`; coordinates that were not fitted keep w_n."""
        size = self.intercept_Y.shape[0] // horizons
        basis_BX, last_BD = _columns(prefix, size)
        displaced_BY = basis_BX @ self.inner_XV
        if self.outer_RY is not None:
            displaced_BY = displaced_BY @ self.outer_RY
        displaced_BHD = (displaced_BY + self.intercept_Y).unflatten(-1, (horizons, size))[:, rows_H]
        forecast_BHD = prefix.weights_BCD[:, -1:].repeat(1, len(rows_H), 1)
        forecast_BHD[..., :size] = (displaced_BHD + last_BD[:, None]).to(forecast_BHD.dtype)
        return forecast_BHD

    def tensors(self) -> dict[str, Tensor]:
        """What a file must store."""
        found = {"inner": self.inner_XV, "intercept": self.intercept_Y}
        return found if self.outer_RY is None else {**found, "outer": self.outer_RY}

    @classmethod
    def restore(cls, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The map that `tensors` came from."""
        inputs, outputs = 2 * problem.coordinates, len(problem.steps_H) * problem.coordinates
        dual = "outer" in tensors
        return cls(
            inner_XV=stored("lfd2", tensors, "inner", (inputs, problem.runs if dual else outputs)),
            outer_RY=stored("lfd2", tensors, "outer", (problem.runs, outputs)) if dual else None,
            intercept_Y=stored("lfd2", tensors, "intercept", (outputs,)),
        )


def solve_gram(sums: GramSums, problem: Problem, *, ridge: float, bias: bool) -> DenseMap:
    """The primal solution."""
    assert sums.seen == problem.runs, "every run comes once"
    keep = slice(None) if bias else slice(-1)
    solution_PY = normal_equations(sums.gram_PP[keep, keep], sums.cross_PY[keep], ridge=ridge, bias=bias)
    size = sums.gram_PP.shape[0] - 1
    intercept_Y = solution_PY[-1] if bias else torch.zeros_like(sums.cross_PY[-1])
    return DenseMap(inner_XV=solution_PY[:size].contiguous(), outer_RY=None, intercept_Y=intercept_Y.contiguous())


def solve_rows(sums: RowSums, problem: Problem, *, ridge: float | None, bias: bool) -> DenseMap:
    """The dual solution: xᵀ·S²·Xᵀ(X·S²·Xᵀ + ridge)⁻¹Y with centred X, Y and S = 1/length of X's columns.

    Without a ridge, that of `PENALTIES` with the least exact leave-one-run-out error.
    """
    assert sums.seen == problem.runs, "every run comes once"
    basis_RX, targets_RY = sums.basis_RX, sums.targets_RY
    mean_X = basis_RX.mean(0) if bias else torch.zeros_like(basis_RX[0])
    raw_X = basis_RX.square().sum(0)
    unit_RX = basis_RX - mean_X
    scale_X = unit_scale(unit_RX.square().sum(0), raw_X)
    unit_RX *= scale_X
    values_R, vectors_RR = torch.linalg.eigh(unit_RX @ unit_RX.T)
    unit_RX *= scale_X
    inner_XR = unit_RX.T.contiguous()
    del unit_RX
    if ridge is None:
        ridge = _least_left_out(values_R, vectors_RR, targets_RY, bias=bias)
    inverse_RR = vectors_RR * inverse_spectrum(values_R, ridge)
    outer_RY, intercept_Y = torch.empty_like(targets_RY), torch.empty_like(targets_RY[0])
    for part, mean_N, centred_RN in _centred_parts(targets_RY, bias=bias):
        outer_RY[:, part] = inverse_RR @ (vectors_RR.T @ centred_RN)
        intercept_Y[part] = mean_N - (mean_X @ inner_XR) @ outer_RY[:, part]
    return DenseMap(inner_XV=inner_XR, outer_RY=outer_RY, intercept_Y=intercept_Y)


def _centred_parts(targets_RY: Tensor, *, bias: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some columns of the targets after the other, which are as large as memory: where, their mean, and without it."""
    width = max(1, _CHUNK // len(targets_RY))
    for start in range(0, targets_RY.shape[1], width):
        part = slice(start, start + width)
        targets_RN = targets_RY[:, part]
        mean_N = targets_RN.mean(0) if bias else torch.zeros_like(targets_RN[0])
        yield part, mean_N, targets_RN - mean_N


def _least_left_out(values_R: Tensor, vectors_RR: Tensor, targets_RY: Tensor, *, bias: bool) -> float:
    """The penalty with the least leave-one-out error, r / (1 − h) with h the diagonal of the hat matrix.

    The columns keep their lengths when a run is left out; else it is exact.
    """
    runs = len(values_R)
    require_runs("lfd2", runs, NAME_A_PENALTY)
    shrinks = [values_R * inverse_spectrum(values_R, penalty) for penalty in PENALTIES]
    leverages = [vectors_RR.square() @ shrink_R + (1 / runs if bias else 0) for shrink_R in shrinks]
    errors = [0.0] * len(PENALTIES)
    for _, _, centred_RN in _centred_parts(targets_RY, bias=bias):
        along_RN = vectors_RR.T @ centred_RN
        for number, (shrink_R, leverage_R) in enumerate(zip(shrinks, leverages, strict=True)):
            residual_RN = centred_RN - vectors_RR @ (shrink_R[:, None] * along_RN)
            errors[number] += float((residual_RN / (1 - leverage_R).clamp(min=1e-12)[:, None]).square().sum())
    return PENALTIES[errors.index(min(errors))]
