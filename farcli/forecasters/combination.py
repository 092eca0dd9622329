"""Forecasts that are a fixed combination of snapshots: ŵ_h = Σ_j A_hj w_j, with Σ_j A_hj = 1.

Shape suffixes: B runs, C snapshots of the context, H horizons, D coordinates of the block, J the
snapshots that are combined.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from farcli.forecasters.base import Prefix


def combine(prefix: Prefix, steps_J: Sequence[int], rows_HJ: Sequence[Sequence[float]]) -> Tensor:
    """Combine snapshots with the same coefficients for every coordinate.

    Computed as w_n + Σ_j A_hj (w_j − w_n): rows sum to 1, and displacements are far smaller than
    weights, so far horizons do not lose float32's last digits to cancellation.

    Args:
        prefix: snapshots of B runs, among them those at `steps_J`.
        steps_J: steps of the snapshots to combine, without the last one, w_n.
        rows_HJ: one row of coefficients per horizon; that of w_n is what is missing to 1.

    Returns:
        Weights of shape [B, H, D].
    """
    last_B1D = prefix.weights_BCD[:, -1:]
    columns_J = [prefix.steps_C.index(step) for step in steps_J]
    displacements_BJD = torch.stack([prefix.weights_BCD[:, c] for c in columns_J], dim=1).sub_(last_B1D)
    return torch.matmul(last_B1D.new_tensor(rows_HJ), displacements_BJD).add_(last_B1D)
