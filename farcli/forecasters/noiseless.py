"""Identification without noise: the one quadratic loss whose known optimiser passes through what was stored.

Full-batch training repeats itself exactly, so that w_0 … w_n, D numbers each, are equations for the gradient at w_0
and the Hessian, D + D(D + 1)/2 unknowns. They are solved to the last digit stored: for rules that divide by a
gradient's size the only trace of that size is ε, a relative 10⁻⁸ of the first update, which float64 keeps and
float32 does not. No prior is needed, and the future is not looked at.

    minimise over θ = (g, H):  ‖y − f(θ)‖² / precision²,   f: updates along the gradient g + H (w − w_0)

by Levenberg–Marquardt from several random θ. In g and H, unlike in w* and H, what the first updates say is nearly
linear: from w* most starts end in a curved valley.

Source: ours; Levenberg–Marquardt with unit columns after Moré (1978).

Shape suffixes: R runs, N problems, D coordinates, P unknowns of a run, Y numbers observed of a run, H targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farcli.forecasters.update_rules import UpdateRule, roll

_STARTS, _ROUNDS, _STEPS = 8, 12, 40
"""Random starts of a run in a round; rounds, for runs without a solution yet; steps from each start."""
_DECADES = 3.0
"""First Hessians are between 10⁻³ and 10³."""
_EXPLAINED = 100.0
"""A run is explained where no number differs by more than so many times its rounding."""
_SEED = 0x5EED


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What was found of each run.

    Attributes:
        theta_RP: g and the lower triangle of H.
        covariance_RPP: what rounding leaves open of it.
        explained_R: whether it passes through all that was stored.
    """

    theta_RP: Tensor
    covariance_RPP: Tensor
    explained_R: Tensor


def unknowns(size: int) -> int:
    """P for D coordinates."""
    return size + size * (size + 1) // 2


def solve(rule: UpdateRule, prefix_RCD: Tensor, marks: Sequence[int], optima_2D: Tensor, precision: float) -> Solved:
    """Solve for the gradient at w_0 and the Hessian of each run.

    Args:
        rule: the optimiser.
        prefix_RCD: w_0 … w_n, float64.
        marks: updates from w_0 to each later snapshot.
        optima_2D: least and largest weights among which first guesses place the optimum.
        precision: rounding of what is stored.
    """
    runs, _, size = prefix_RCD.shape
    generator = torch.Generator().manual_seed(_SEED)
    found = Solved(
        theta_RP=prefix_RCD.new_zeros(runs, unknowns(size)),
        covariance_RPP=prefix_RCD.new_zeros(runs, unknowns(size), unknowns(size)),
        explained_R=torch.zeros(runs, dtype=torch.bool),
    )
    for _ in range(_ROUNDS):
        left = (~found.explained_R).nonzero()[:, 0]
        start_ND = prefix_RCD[left, 0].repeat(_STARTS, 1)
        seen_NY = prefix_RCD[left, 1:].flatten(1).repeat(_STARTS, 1)
        theta_NP = _first(start_ND, optima_2D, generator)
        theta_NP, covariance_NPP, error_N = _descended(rule, theta_NP, start_ND, seen_NY, marks, precision)
        best = error_N.view(_STARTS, -1).argmin(0) * len(left) + torch.arange(len(left))
        found.theta_RP[left], found.covariance_RPP[left] = theta_NP[best], covariance_NPP[best]
        found.explained_R[left] = error_N[best] < _EXPLAINED
        if bool(found.explained_R.all()) or not bool(found.explained_R.any()):
            break
    return found


def forecast(
    rule: UpdateRule, solved: Solved, start_RD: Tensor, targets: Sequence[int], precision: float
) -> tuple[Tensor, Tensor]:
    """Run the optimiser on: weights at the targets, and their standard deviation, both [R, H, D]."""
    value_RY, slope_RYP = _linearised(rule, solved.theta_RP, start_RD, targets)
    spread_RY = torch.einsum("ryp,rpq,ryq->ry", slope_RYP, solved.covariance_RPP, slope_RYP).clamp(min=0)
    shape = (len(targets), start_RD.shape[1])
    return value_RY.unflatten(1, shape), (spread_RY + precision**2).sqrt().unflatten(1, shape)


def _first(start_ND: Tensor, optima_2D: Tensor, generator: torch.Generator) -> Tensor:
    """Random g and H, [N, P]: an optimum within bounds, curvatures over decades, a little correlation."""
    problems, size = start_ND.shape
    low_D, high_D = optima_2D

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    optimum_ND = low_D + (high_D - low_D) * uniform(problems, size)
    root_ND = 10 ** (_DECADES / 2 * (2 * uniform(problems, 1) - 1)) * 3 ** (uniform(problems, size) - 0.5)
    factor_NDD = root_ND[..., None] * (
        torch.eye(size, dtype=torch.float64) + 0.5 * (uniform(problems, size, size) - 0.5).tril(-1)
    )
    hessian_NDD = factor_NDD @ factor_NDD.mT
    gradient_ND = (hessian_NDD @ (start_ND - optimum_ND)[..., None])[..., 0]
    row, column = torch.tril_indices(size, size)
    return torch.cat([gradient_ND, hessian_NDD[:, row, column]], dim=1)


def _simulated(rule: UpdateRule, theta_NP: Tensor, start_ND: Tensor, marks: Sequence[int]) -> Tensor:
    """Weights after each count of updates, [N, Y]."""
    size = start_ND.shape[1]
    row, column = torch.tril_indices(size, size)
    places = torch.zeros(size, size, dtype=torch.long)
    places[row, column] = places[column, row] = torch.arange(len(row))
    hessian_NDD = theta_NP[:, size:][:, places]

    def gradient(weights_ND: Tensor, count: int) -> Tensor:
        return theta_NP[:, :size] + (hessian_NDD * (weights_ND - start_ND)[:, None]).sum(-1)

    return roll(rule, start_ND, marks, gradient).flatten(1)


def _linearised(rule: UpdateRule, theta_NP: Tensor, start_ND: Tensor, marks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """f(θ) [N, Y] and its exact slope [N, Y, P]."""
    with torch.enable_grad():
        theta_NP = theta_NP.detach().requires_grad_(True)
        value_NY = _simulated(rule, theta_NP, start_ND, marks)
        # Problems do not touch each other: one backward pass of a sum gives the slopes of one number in all of them.
        slopes = [
            torch.autograd.grad(number_N.sum(), theta_NP, retain_graph=True)[0] for number_N in value_NY.unbind(1)
        ]
    return value_NY.detach(), torch.stack(slopes, dim=1)


def _descended(
    rule: UpdateRule, theta_NP: Tensor, start_ND: Tensor, seen_NY: Tensor, marks: Sequence[int], precision: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Levenberg–Marquardt: θ [N, P], its covariance [N, P, P], and the largest error in units of `precision`, [N]."""
    damping_N = torch.full((len(theta_NP),), 1e-3, dtype=torch.float64)
    value_NY, slope_NYP = _linearised(rule, theta_NP, start_ND, marks)
    objective_N = _or_infinite((seen_NY - value_NY).square().sum(1))
    error_N = torch.full_like(objective_N, torch.inf)
    for _ in range(_STEPS):
        stacked_NMP, unit_NP = _unit_columns(slope_NYP / precision, damping_N)
        q_NMP, r_NPP = torch.linalg.qr(stacked_NMP)
        right_NP = (q_NMP[:, : seen_NY.shape[1]].mT @ ((seen_NY - value_NY) / precision)[..., None])[..., 0]
        step_NP = unit_NP * torch.linalg.solve_triangular(r_NPP, right_NP[..., None], upper=True)[..., 0]
        tried_NP = theta_NP + torch.nan_to_num(step_NP, nan=0.0, posinf=0.0, neginf=0.0)
        tried_NY, tried_NYP = _linearised(rule, tried_NP, start_ND, marks)
        tried_N = _or_infinite((seen_NY - tried_NY).square().sum(1))
        better_N = (tried_N < objective_N) & tried_NYP.isfinite().all(-1).all(-1)
        theta_NP = torch.where(better_N[:, None], tried_NP, theta_NP)
        value_NY = torch.where(better_N[:, None], tried_NY, value_NY)
        slope_NYP = torch.where(better_N[:, None, None], tried_NYP, slope_NYP)
        objective_N = torch.where(better_N, tried_N, objective_N)
        damping_N = torch.where(better_N, damping_N / 5, damping_N * 4).clamp(1e-30, 1e10)
        error_N = _or_infinite((seen_NY - value_NY).abs().amax(1) / precision)
        if bool((error_N.view(_STARTS, -1).amin(0) < 1).all()):  # of each run one start is through
            break
    stacked_NMP, unit_NP = _unit_columns(slope_NYP / precision, torch.full_like(damping_N, 1e-20))
    inverse_NPP = unit_NP[..., None] * torch.linalg.pinv(stacked_NMP)
    return theta_NP, inverse_NPP @ inverse_NPP.mT, error_N


def _unit_columns(slope_NYP: Tensor, damping_N: Tensor) -> tuple[Tensor, Tensor]:
    """The slope with columns of length 1, above the root of the damping on a diagonal, and what they were divided by.

    Problems whose slope is not finite get one that leaves them where they are.
    """
    finite_N11 = slope_NYP.isfinite().all(-1).all(-1)[:, None, None]
    slope_NYP = torch.where(finite_N11, slope_NYP, 0.0)
    unit_NP = slope_NYP.square().sum(1).clamp(min=1e-300).rsqrt()
    diagonal_NPP = torch.diag_embed(damping_N.sqrt()[:, None].expand_as(unit_NP))
    return torch.cat([slope_NYP * unit_NP[:, None], diagonal_NPP], dim=1), unit_NP


def _or_infinite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=torch.inf)
