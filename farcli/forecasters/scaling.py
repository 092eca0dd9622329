"""What networks see of weights, and how what they say becomes a forecast.

Shape suffixes: N examples, C snapshots of the context, H horizons, K channels of an example: all D coordinates
of a run for joint networks, one coordinate for those shared by all.
"""

from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import Tensor, nn

from farcli.forecasters.base import Prefix

_CHUNK = 1 << 14
"""Examples a network forecasts at once: its hidden layers are far wider than an example."""


@final
class Scaling(nn.Module):
    """Standardises: (w − mean)/std goes in, w_n + moved·y comes out. Or not at all: w goes in, y comes out.

    Mean and standard deviation are those of the observed snapshots of the training runs, `moved` the root mean square
    displacement from w_n to the targets, each channel's own. Channels that never move get 1.

    `unit` is the mean square displacement over all channels: a squared error of 1 unit is persistence's.

    Args:
        channels: K.
        standardise: false leaves weights as they are.
    """

    mean_K: Tensor
    std_K: Tensor
    moved_K: Tensor
    unit: Tensor

    def __init__(self, channels: int, *, standardise: bool) -> None:
        super().__init__()
        self._standardise = standardise
        for name, value in (("mean_K", 0.0), ("std_K", 1.0), ("moved_K", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("unit", torch.ones(()))

    def measure(self, examples: Iterable[tuple[Prefix, Tensor]]) -> None:
        """Take the statistics of the training examples, in one pass."""
        width = self.mean_K.shape[0]
        sum_K, square_K, moved_K = (torch.zeros(width, dtype=torch.float64) for _ in range(3))
        observed, targets = 0, 0
        for prefix, targets_NHK in examples:
            # On the CPU: MPS has no float64.
            seen_NCK, truth_NHK = prefix.weights_BCD.cpu().double(), targets_NHK.cpu().double()
            sum_K += seen_NCK.sum((0, 1))
            square_K += seen_NCK.square().sum((0, 1))
            moved_K += (truth_NHK - seen_NCK[:, -1:]).square().sum((0, 1))
            observed += seen_NCK.shape[0] * seen_NCK.shape[1]
            targets += truth_NHK.shape[0] * truth_NHK.shape[1]
        mean_K = sum_K / observed
        if self._standardise:
            variance_K = square_K / observed - mean_K.square()
            alive_K = variance_K > 1e-12 * square_K / observed
            self.mean_K.copy_(mean_K)
            self.std_K.copy_(torch.where(alive_K, variance_K, 1.0).sqrt())
            self.moved_K.copy_(torch.where(moved_K > 0, moved_K / targets, 1.0).sqrt())
        unit = float(moved_K.mean() / targets)
        self.unit.fill_(unit if unit > 0 else 1.0)

    def inputs(self, weights_NCK: Tensor) -> Tensor:
        """What the network sees."""
        if not self._standardise:
            return weights_NCK.float()
        return ((weights_NCK - self.mean_K) / self.std_K).float()

    def displacement(self, outputs_NHK: Tensor, last_N1K: Tensor) -> Tensor:
        """The forecast displacement ŵ − w_n of what the network said."""
        return outputs_NHK * self.moved_K if self._standardise else outputs_NHK - last_N1K.float()


def forecast_channels(
    prefix: Prefix, rows_H: list[int], displacement: Callable[[Tensor], Tensor], channels: int | None
) -> Tensor:
    """Forecasts [B, H, D] of a network that sees examples [N, C, K].

    Args:
        prefix: the block.
        rows_H: the fitted horizons wanted.
        displacement: from examples [N, C, K] to ŵ − w_n at every fitted horizon, [N, H, K].
        channels: how many coordinates, the first ones, the network sees together; the rest keep w_n. None
            where it sees each coordinate alone.
    """
    weights_BCD = prefix.weights_BCD
    forecast_BHD = weights_BCD[:, -1:].repeat(1, len(rows_H), 1)
    with torch.no_grad():
        if channels is not None:
            forecast_BHD[..., :channels] += displacement(weights_BCD[..., :channels])[:, rows_H]
            return forecast_BHD
        runs, context, size = weights_BCD.shape
        width = max(1, _CHUNK // runs)
        for start in range(0, size, width):
            part_BCW = weights_BCD[..., start : start + width]
            examples_NC1 = part_BCW.transpose(1, 2).reshape(-1, context, 1)
            moved_NH = displacement(examples_NC1)[:, rows_H, 0]
            forecast_BHD[..., start : start + width] += moved_NH.unflatten(0, (runs, -1)).transpose(1, 2)
    return forecast_BHD
