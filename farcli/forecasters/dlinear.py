"""DLinear: linear maps along the time axis, of a moving average and of what is left.

Shape suffixes: N examples, C snapshots of the context, H horizons, K channels of an example.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor, nn

from farcli.forecasters.base import (
    Coupling,
    Descent,
    Prefix,
    Problem,
    Trained,
    TrainedForecaster,
    require_fitted,
    require_future,
)
from farcli.forecasters.scaling import Scaling, forecast_channels

_EPSILON = 1e-5
"""RevIN's, added to variances: channels that do not move stay where they are."""


@final
class Decomposition(nn.Module):
    """RevIN, trend and remainder, a linear map C → H for each (and K → K where channels mix), RevIN undone."""

    def __init__(self, channels: int, context: int, horizons: int, *, window: int, mixed: bool) -> None:
        super().__init__()
        self._window = min(window, 2 * context - 1) | 1
        self.trend = nn.Linear(context, horizons)
        self.remainder = nn.Linear(context, horizons)
        self.trend_channels = nn.Linear(channels, channels) if mixed else nn.Identity()
        self.remainder_channels = nn.Linear(channels, channels) if mixed else nn.Identity()
        self.gain_K = nn.Parameter(torch.ones(channels))
        self.shift_K = nn.Parameter(torch.zeros(channels))
        self.scaling = Scaling(channels, standardise=False)

    def forward(self, weights_NCK: Tensor) -> Tensor:
        """ŵ − w_n: [N, H, K]."""
        last_N1K = weights_NCK[:, -1:]
        # RevIN's mean is taken off after w_n, so that far smaller displacements keep their digits in float32.
        moved_NCK = (weights_NCK - last_N1K).float()
        mean_N1K = moved_NCK.mean(dim=1, keepdim=True)
        std_N1K = (moved_NCK.var(dim=1, keepdim=True, unbiased=False) + _EPSILON).sqrt()
        x_NKC = ((moved_NCK - mean_N1K) / std_N1K * self.gain_K + self.shift_K).mT
        edge = self._window // 2
        padded_NKC = torch.cat([x_NKC[..., :1].expand(-1, -1, edge), x_NKC, x_NKC[..., -1:].expand(-1, -1, edge)], -1)
        trend_NKC = padded_NKC.unfold(-1, self._window, 1).mean(dim=-1)
        y_NHK = self.trend_channels(self.trend(trend_NKC).mT) + self.remainder_channels(
            self.remainder(x_NKC - trend_NKC).mT
        )
        # The sign of the gain does not matter, its zero would.
        gain_K = torch.where(self.gain_K.abs() < _EPSILON, _EPSILON, self.gain_K)
        return (y_NHK - self.shift_K) / gain_K * std_N1K + mean_N1K


@final
class DLinear(TrainedForecaster):
    """ŵ = W_trend·(moving average of x) + W_rest·(x − moving average), on each run's own normalised prefix x.

    RevIN: x = (w − mean)/std over the prefix, scaled and shifted by learned numbers for each channel; undone at
    the end. Squared error, relative to persistence's.

    Source: DLinear (arXiv 2205.13504) with RevIN (Kim et al., ICLR 2022), as the baseline of GFM (arXiv 2505.20221,
    Table 5: 2 temporal and 2 channel maps; there lr=1e-4, batch 16 or 32, and, on our reading, channels=joint).
    Differs: by default maps are shared by all coordinates and channels do not mix, as in DLinear's own paper. Its
    moving average is over 25 time steps; prefixes here have about 5, hence 3.
    """

    name = "dlinear"
    reference = "DLinear (arXiv 2205.13504) with RevIN, a baseline of GFM (arXiv 2505.20221, Table 5)"
    vectorised_batch = 1024

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Descent):
        """Options."""

        channels: Literal["shared", "joint"] = field(
            default="shared",
            metadata={"help": "shared: one map for every coordinate alone, any D; joint: D → D maps mix them"},
        )
        window: int = field(default=3, metadata={"help": "snapshots of the moving average, an odd number"})

        def __post_init__(self) -> None:
            Descent.__post_init__(self)
            if self.window < 1 or self.window % 2 == 0:
                raise ValueError(f"window = {self.window}, expected an odd number of 1 or more.")

    def __init__(self, config: Config, trained: Trained[Decomposition] | None = None) -> None:
        self._config, self._trained = config, trained

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def trained(self) -> Trained[Decomposition] | None:
        """The network."""
        return self._trained

    @property
    def coupling(self) -> Coupling:
        """Coordinate-wise, or joint with channels=joint."""
        return Coupling.JOINT if self._config.channels == "joint" else Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """Whether the network is shared by all coordinates."""
        return self._config.channels == "shared"

    @property
    def min_context(self) -> int:
        """Two snapshots: one has no standard deviation."""
        return 2

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """All of them."""
        require_future(self.name, self.min_context, steps_C, ())
        return tuple(steps_C)

    def network(self, problem: Problem) -> Decomposition:
        """A fresh network."""
        config = self._config
        return Decomposition(
            problem.coordinates if config.channels == "joint" else 1,
            len(problem.steps_C),
            len(problem.steps_H),
            window=config.window,
            mixed=config.channels == "joint",
        )

    def measure(self, examples: Iterable[tuple[Prefix, Tensor]]) -> None:
        """The error of persistence."""
        require_fitted(self.name, self._trained).network.scaling.measure(examples)

    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, random_B: Tensor | None) -> Tensor:
        """Mean squared error over persistence's."""
        network = require_fitted(self.name, self._trained).network
        moved_BHD = (truth_BHD - prefix.weights_BCD[:, -1:]).float()
        return (network(prefix.weights_BCD) - moved_BHD).square().mean() / network.scaling.unit

    def forecast_alone(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The network's output: [B, H, D]."""
        rows_H, trained = self.rows(prefix, steps_H), require_fitted(self.name, self._trained)
        channels = trained.problem.coordinates if self._config.channels == "joint" else None
        return forecast_channels(prefix, rows_H, trained.network, channels)
