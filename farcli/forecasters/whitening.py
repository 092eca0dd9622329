"""A way to go, less where training is noisy: matrix by matrix, as second-order optimisers do, from snapshots alone.

Shape suffixes: M moves, D coordinates of a tensor, O and N the sides of its matrix, K samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_SIDE = 1024
"""Where a side has more coordinates, and more samples, the diagonal of its covariance is taken."""
_FLOOR = 0.1
"""Of the mean eigenvalue of a covariance: what is added to each."""


def whitened(way_D: Tensor, moves_MD: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor's way over the root of the covariance of its noise on either side, as long as it was.

    A matrix S of O × N, or what a tensor of more axes is with all but the first taken together, becomes
    (L + .1)^(−1/2) S (R + .1)^(−1/2), with L = Σ m mᵀ and R = Σ mᵀ m over the moves m, each over its mean eigenvalue.
    A vector is divided by the root of its coordinates' mean squares, a tenth of their mean added. So is a side of more
    than 1,024 coordinates, of which there are more samples than that.

    Where moves are mostly noise of gradients, L and R are those of Shampoo (arXiv 1802.09568), and by Kronecker
    factors (K-FAC, arXiv 1503.05671) they say how curved the loss is.
    Differs: moves between snapshots for gradients, exponents of −1/2 for Shampoo's −1/4, the length kept.

    Args:
        way_D: the way, [D].
        moves_MD: moves from snapshot to snapshot, [M, D].
        shape: of the tensor.

    Returns:
        Of shape [D]; the way itself where something is not finite or nothing moves.
    """
    if way_D.device.type == "mps":  # which has no float64
        return whitened(way_D.cpu(), moves_MD.cpu(), shape).to(way_D.device)
    length, noise = (torch.linalg.vector_norm(values, dtype=torch.float64) for values in (way_D, moves_MD))
    if not bool(length.isfinite() & noise.isfinite() & (length > 0) & (noise > 0)):
        return way_D.clone()
    if len(shape) < 2:
        found_ON = _over_root(way_D.double()[None], moves_MD[:, None], by_diagonal=True)
    else:
        moves_MON = moves_MD.view(len(moves_MD), shape[0], -1)
        found_ON = _over_root(way_D.double().view(shape[0], -1), moves_MON)
        found_ON = _over_root(found_ON.T, moves_MON.transpose(1, 2)).T
    found_D = found_ON.reshape(-1)
    return found_D.mul_(length / torch.linalg.vector_norm(found_D)).to(way_D)


def _over_root(values_ON: Tensor, moves_MON: Tensor, *, by_diagonal: bool = False) -> Tensor:
    """Values times (ZᵀZ over its mean eigenvalue + .1)^(−1/2), Z the rows of all moves."""
    rows_MON = torch.empty(moves_MON.shape, dtype=values_ON.dtype, device=values_ON.device).copy_(moves_MON)
    samples_KN = rows_MON.view(-1, moves_MON.shape[-1])
    power = torch.linalg.vector_norm(samples_KN) ** 2 / samples_KN.shape[1]
    if by_diagonal or min(samples_KN.shape) > LARGEST_SIDE:
        return values_ON * (torch.linalg.vector_norm(samples_KN, dim=0) ** 2 / power + _FLOOR).rsqrt()
    # The smaller of ZᵀZ and ZZᵀ has all eigenvalues that are not 0; where they are 0, only the floor is left.
    few = len(samples_KN) < samples_KN.shape[1]
    eigen_K, basis_KK = torch.linalg.eigh((samples_KN @ samples_KN.T if few else samples_KN.T @ samples_KN) / power)
    eigen_K = eigen_K.clamp(min=torch.finfo(eigen_K.dtype).eps)
    more_K = (eigen_K + _FLOOR).rsqrt() - _FLOOR**-0.5
    if few:
        seen = values_ON @ samples_KN.T @ basis_KK * (more_K / (power * eigen_K)) @ basis_KK.T @ samples_KN
    else:
        seen = values_ON @ basis_KK * more_K @ basis_KK.T
    return seen.add_(values_ON, alpha=_FLOOR**-0.5)
