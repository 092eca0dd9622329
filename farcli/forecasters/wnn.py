"""Weight Nowcaster Network: five values of one weight and their four differences, in two streams.

Shape suffixes: N examples, C = 5 snapshots, H horizons, X inputs and F features of a layer; the last axis of weights
is one coordinate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import final

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
from farcli.forecasters.scaling import forecast_channels

_VALUES = 5
_EPSILON = 1e-5
_LEAK = 0.3  # of Keras's LeakyReLU
_WEIGHT_DECAY, _BIAS_DECAY = 1e-6, 0.1


def _dense(inputs: int, outputs: int) -> nn.Linear:
    """Dense as the authors draw it: uniform with variance 0.1/inputs, no bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.uniform_(layer.weight, -sqrt(0.3 / inputs), sqrt(0.3 / inputs))
    nn.init.zeros_(layer.bias)
    return layer


def _glorot(inputs: int, outputs: int) -> nn.Linear:
    """Dense with Keras's own initial values."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@final
class ActivationNetwork(nn.Module):
    """a(z) + b(z)·exp(c(z)·x), with a, b and c linear in z = ReLU(Linear(64 → 8)(x))."""

    def __init__(self, features: int, compressed: int) -> None:
        super().__init__()
        self.compress = _glorot(features, compressed)
        self.offset, self.factor, self.rate = (_glorot(compressed, features) for _ in range(3))

    def forward(self, x_NF: Tensor) -> Tensor:
        """[N, F] as given."""
        z_NX = self.compress(x_NF).relu()
        return self.offset(z_NX) + self.factor(z_NX) * (self.rate(z_NX) * x_NF).exp()


@final
class TwoStreams(nn.Module):
    """Values and differences, each Dense 64, activation network, Dense 32, LeakyReLU; together tanh."""

    def __init__(self, horizons: int) -> None:
        super().__init__()
        self.streams = nn.ModuleList(
            nn.Sequential(_dense(inputs, 64), ActivationNetwork(64, 8), _dense(64, 32), nn.LeakyReLU(_LEAK))
            for inputs in (_VALUES, _VALUES - 1)
        )
        self.head = _glorot(64, horizons)

    def forward(self, weights_NC1: Tensor) -> Tensor:
        """ŵ − w_4: [N, H, 1]."""
        scaled_NC, unit_N = scaled(weights_NC1)
        return (self.deltas(scaled_NC) * unit_N[:, None])[..., None]

    def deltas(self, scaled_NC: Tensor) -> Tensor:
        """x̂′ − x′_4, the forecast in scaled units: [N, H]."""
        features = [stream(x) for stream, x in zip(self.streams, (scaled_NC, scaled_NC.diff(dim=1)), strict=True)]
        return self.head(torch.cat(features, dim=-1)).tanh()

    def penalty(self) -> Tensor:
        """The authors' L1 penalty on the layers of 64 and 32."""
        layers = [layer for layer in self.streams.modules() if isinstance(layer, nn.Linear)]
        dense = [
            layer for layer in layers if layer.in_features in (_VALUES, _VALUES - 1, 64) and layer.out_features > 8
        ]
        return sum(
            (_WEIGHT_DECAY * layer.weight.abs().sum() + _BIAS_DECAY * layer.bias.abs().sum() for layer in dense),
            start=self.head.bias.new_zeros(()),
        )


def scaled(weights_NC1: Tensor) -> tuple[Tensor, Tensor]:
    """x′ = (x − x_0)/(range + 1e-5)/2 [N, C], and what a difference of 1 in it is in weights, [N]."""
    moved_NC = (weights_NC1 - weights_NC1[:, :1])[..., 0].float()
    unit_N = 2 * (moved_NC.amax(dim=1) - moved_NC.amin(dim=1) + _EPSILON)
    return moved_NC / unit_N[:, None], unit_N


@final
class Wnn(TrainedForecaster):
    """x̂ = x_4 + 2·(range + 1e-5)·f(x′, Δx′), with x′ = (x − x_0)/(range + 1e-5)/2, range that of the five values.

    L1 loss in scaled units, and the authors' L1 penalties.

    Source: Jang et al., "Learning to boost training by periodic nowcasting near future weights", ICML 2023, and the
    authors' code (github.com/jjh6297/WNN): layers, their initial values, penalties; Adam 1e-3 (Keras's), 9,425
    parameters for one horizon.
    Differs: one net is shared by all tensors instead of one each for convolutions, full connections and biases: what
    it sees is free of units, so it also works on other networks. All horizons at once instead of 5 epochs ahead. The
    authors' code undoes the scaling of biases from the unscaled x_4; here all are undone alike.
    """

    name = "wnn"
    reference = "Weight Nowcaster Network (ICML 2023)"
    vectorised_batch = 256

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Descent):
        """Options."""

        penalty: float = field(default=1.0, metadata={"help": "factor on the authors' L1 penalties; 0 for none"})

        def __post_init__(self) -> None:
            Descent.__post_init__(self)
            if not 0 <= self.penalty < float("inf"):
                raise ValueError(f"penalty = {self.penalty}, expected a finite number of 0 or more.")

    def __init__(self, config: Config, trained: Trained[TwoStreams] | None = None) -> None:
        self._config, self._trained = config, trained

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def trained(self) -> Trained[TwoStreams] | None:
        """The network."""
        return self._trained

    @property
    def coupling(self) -> Coupling:
        """Coordinate-wise."""
        return Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """True: one network for all weights."""
        return True

    @property
    def min_context(self) -> int:
        """Five snapshots."""
        return _VALUES

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The last five."""
        require_future(self.name, self.min_context, steps_C, ())
        return tuple(steps_C[-_VALUES:])

    def network(self, problem: Problem) -> TwoStreams:
        """A fresh network."""
        return TwoStreams(len(problem.steps_H))

    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, random_B: Tensor | None) -> Tensor:
        """Mean absolute error in scaled units, and the penalties."""
        network = require_fitted(self.name, self._trained).network
        scaled_NC, unit_N = scaled(prefix.weights_BCD)
        wanted_NH = (truth_BHD - prefix.weights_BCD[:, -1:])[..., 0].float() / unit_N[:, None]
        return (network.deltas(scaled_NC) - wanted_NH).abs().mean() + self._config.penalty * network.penalty()

    def forecast_alone(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The network's output: [B, H, D]."""
        rows_H = self.rows(self.seen(prefix), steps_H)
        return forecast_channels(self.seen(prefix), rows_H, require_fitted(self.name, self._trained).network, None)
