"""Least squares from sums: normal equations solved so that near-collinear and constant columns do no harm.

Shape suffixes: leading axes are a batch; P columns, Q columns without the bias, M right-hand sides.
"""

import torch
from torch import Tensor

_CONSTANT = 1e-12
"""A column whose variance is below this part of its mean square (a relative deviation of 1e-6) is taken for
constant: sums of 1e9 terms round at about 1e-13, and float32 weights resolve deviations of 6e-8 at best."""


def normal_equations(gram_PP: Tensor, cross_PM: Tensor, *, ridge: float, bias: bool) -> Tensor:
    """Minimise ‖Zx − y‖² + ridge · Σ_p ‖centred z_p‖² x_p², given only ZᵀZ and Zᵀy.

    Columns are centred (which eliminates the bias) and scaled to unit length before the solution, so
    the condition number is that of their correlations. Directions that the data leave open get 0.

    Args:
        gram_PP: ZᵀZ, float64 [..., P, P]; the last column of Z is a constant where `bias`.
        cross_PM: Zᵀy, float64 [..., P, M].
        ridge: penalty relative to each centred column's own sum of squares; the bias carries none.
        bias: whether the last column is a bias.

    Returns:
        x of shape [..., P, M].
    """
    if not bias:
        return _unit_solve(gram_PP, cross_PM, gram_PP.diagonal(dim1=-2, dim2=-1), ridge)
    mean_Q1, inner_QQ = _centred(gram_PP)
    inner_QM = cross_PM[..., :-1, :] - mean_Q1 @ cross_PM[..., -1:, :]
    raw_Q = gram_PP.diagonal(dim1=-2, dim2=-1)[..., :-1]
    solution_QM = _unit_solve(inner_QQ, inner_QM, raw_Q, ridge)
    mean_1M = cross_PM[..., -1:, :] / _safe(gram_PP[..., -1:, -1:])
    return torch.cat([solution_QM, mean_1M - mean_Q1.mT @ solution_QM], dim=-2)


def penalised(gram_PP: Tensor, *, ridge: float, bias: bool) -> Tensor:
    """The Gram matrix with the ridge of `normal_equations` on its diagonal, [..., P, P]."""
    own_Q = (_centred(gram_PP)[1] if bias else gram_PP).diagonal(dim1=-2, dim2=-1)
    gram_PP = gram_PP.clone()
    gram_PP.diagonal(dim1=-2, dim2=-1)[..., : own_Q.shape[-1]] += ridge * own_Q.clamp(min=0)
    return gram_PP


def whitening(gram_PP: Tensor) -> Tensor:
    """W with WᵀGW = 1 on the directions that the Gram matrix G determines, and columns of 0 for the rest."""
    inverse_P = _safe(gram_PP.diagonal(dim1=-2, dim2=-1)).rsqrt()
    values_P, vectors_PP = torch.linalg.eigh(gram_PP * inverse_P[..., None] * inverse_P[..., None, :])
    return inverse_P[..., None] * vectors_PP * inverse_spectrum(values_P, 0.0).sqrt()[..., None, :]


def inverse_spectrum(values_P: Tensor, ridge: float) -> Tensor:
    """1/(λ + ridge) for ascending eigenvalues λ of a Gram matrix, and 0 for those that are rounding noise."""
    if not values_P.shape[-1]:
        return values_P
    alive_P = values_P > 16 * torch.finfo(values_P.dtype).eps * values_P.shape[-1] * values_P[..., -1:]
    return torch.where(alive_P, 1 / torch.where(alive_P, values_P + ridge, 1.0), 0.0)


def unit_scale(own_Q: Tensor, raw_Q: Tensor) -> Tensor:
    """1/length of each centred column, and 0 for constant ones, from centred and raw sums of squares."""
    alive_Q = own_Q > _CONSTANT * raw_Q
    return torch.where(alive_Q, torch.where(alive_Q, own_Q, 1.0).rsqrt(), 0.0)


def _unit_solve(gram_QQ: Tensor, cross_QM: Tensor, raw_Q: Tensor, ridge: float) -> Tensor:
    scale_Q = unit_scale(gram_QQ.diagonal(dim1=-2, dim2=-1), raw_Q)
    values_Q, vectors_QQ = torch.linalg.eigh(gram_QQ * scale_Q[..., None] * scale_Q[..., None, :])
    along_QM = vectors_QQ.mT @ (scale_Q[..., None] * cross_QM)
    return scale_Q[..., None] * (vectors_QQ @ (inverse_spectrum(values_Q, ridge)[..., None] * along_QM))


def _centred(gram_PP: Tensor) -> tuple[Tensor, Tensor]:
    mean_Q1 = gram_PP[..., :-1, -1:] / _safe(gram_PP[..., -1:, -1:])
    return mean_Q1, gram_PP[..., :-1, :-1] - mean_Q1 @ gram_PP[..., -1:, :-1]


def _safe(positive: Tensor) -> Tensor:
    return torch.where(positive > 0, positive, 1.0)
