"""LFD-2's gradient-decay regulariser, computed exactly from Gram matrices.

A forecast of LFD-2 is linear in its basis, so the norm of an update over the whole weight vector is a
quadratic form in the few coefficients, with the run's Gram matrix of the basis:
‖ŵ_{j+1} − ŵ_j‖² = (θ_{j+1} − θ_j)ᵀ G_r (θ_{j+1} − θ_j). One pass over the data gives every G_r; the
regularised fit is then a small optimisation that never sees the data again.

Shape suffixes: R runs, K groups of coordinates, P basis columns, H horizons.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from farcli.forecasters.least_squares import whitening

_SMOOTHING = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
"""Widths of the smoothed hinge, in units of the mean displacement: quasi-Newton steps need a gradient that
is continuous, and following the solution to small widths ends at the hinge itself."""
_STILL = 1e-24
"""Added under the root, in squared displacements, so that an update of 0 has a gradient."""


def update_growth(theta_KPH: Tensor, grams_RKPP: Tensor, gaps_H: Tensor, smoothing: float = 0.0) -> Tensor:
    """L_grad: how much updates grow from one horizon to the next.

    L_grad = mean over runs of Σ_j max(u_{j+1} − u_j, 0), u_j = ‖ŵ_j − ŵ_{j−1}‖ / gap_j, ŵ_0 = w_n.

    Args:
        theta_KPH: coefficients of the displacement from w_n in the basis.
        grams_RKPP: each run's Gram matrices of the basis.
        gaps_H: steps from one horizon to the next, the first from w_n, in units of their mean.
        smoothing: width of a smooth hinge (x + √(x² + width²))/2; 0 for the hinge.

    Returns:
        A scalar, in units of the root of `grams_RKPP`.
    """
    updates_KPH = torch.cat([theta_KPH[..., :1], theta_KPH.diff(dim=-1)], dim=-1)
    squares_RH = torch.einsum("kph,rkpq,kqh->rh", updates_KPH, grams_RKPP, updates_KPH)
    speeds_RH = (squares_RH.clamp(min=0) + _STILL).sqrt() / gaps_H
    growth_RH = speeds_RH.diff(dim=-1)
    hinge_RH = (growth_RH + (growth_RH.square() + smoothing**2).sqrt()) / 2 if smoothing else growth_RH.clamp(min=0)
    return hinge_RH.sum(dim=-1).mean()


def decaying(
    theta_KPH: Tensor,
    start_KPH: Tensor,
    gram_KHPP: Tensor,
    grams_RKPP: Tensor,
    gaps_H: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Minimise Σ_kh (x_kh − θ_kh)ᵀ G_kh (x_kh − θ_kh) + β · L_grad(x) over the coefficients x.

    L-BFGS in coordinates that make the first term a sphere. The hinge of a difference of norms is not
    convex; the result is a local minimum, and no worse than either starting point.

    Args:
        theta_KPH: the minimum without the regulariser.
        start_KPH: where else to start from: the solution of the last pass, or `theta_KPH` again.
        gram_KHPP: G, the curvature of the prediction loss.
        grams_RKPP: each run's Gram matrices, for L_grad.
        gaps_H: see `update_growth`.
        beta: weight of L_grad.

    Returns:
        x of shape [K, P, H].
    """
    white_KHPP = whitening(gram_KHPP)

    def point(phi_KHP: Tensor) -> Tensor:
        return theta_KPH + (white_KHPP @ phi_KHP[..., None]).squeeze(-1).mT

    def objective(phi_KHP: Tensor, smoothing: float) -> Tensor:
        growth = update_growth(point(phi_KHP), grams_RKPP, gaps_H, smoothing)
        return phi_KHP.square().sum() + beta * growth

    away_KHP = (start_KPH - theta_KPH).mT
    starts = [torch.zeros_like(away_KHP), (white_KHPP.mT @ gram_KHPP @ away_KHP[..., None]).squeeze(-1)]
    best = min(starts, key=lambda phi: float(objective(phi, 0.0)))
    # A start of its own is a solution already, but for the last reweighting: the narrow hinges suffice.
    widths = _SMOOTHING[-2:] if away_KHP.any() else _SMOOTHING
    phi_KHP = starts[-1].clone(memory_format=torch.contiguous_format).requires_grad_()
    for smoothing in widths:
        _descend(phi_KHP, lambda phi, width=smoothing: objective(phi, width))
        best = min(best, phi_KHP.detach().clone(), key=lambda phi: float(objective(phi, 0.0)))
    return point(best)


def _descend(phi: Tensor, objective: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        [phi],
        max_iter=100,
        tolerance_grad=1e-11,
        tolerance_change=1e-14,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(phi)
        value.backward()
        return value

    optimizer.step(closure)
