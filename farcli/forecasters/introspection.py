"""Introspection: a small network that sees four past values of one weight.

Shape suffixes: N examples, C snapshots of the context, H horizons; the last axis is one coordinate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

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

_PLACES = (0.0, 0.4, 0.7, 1.0)
"""Where in the prefix the four values are taken."""


@final
class FourValues(nn.Module):
    """Linear(4 → hidden), ReLU, Linear(hidden → H)."""

    def __init__(self, horizons: int, *, hidden: int, standardise: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(len(_PLACES), hidden), nn.ReLU(), nn.Linear(hidden, horizons))
        self.scaling = Scaling(1, standardise=standardise)

    def forward(self, weights_NC1: Tensor) -> Tensor:
        """ŵ − w_n: [N, H, 1]."""
        outputs_NH = self.body(self.scaling.inputs(weights_NC1)[..., 0])
        return self.scaling.displacement(outputs_NH[..., None], weights_NC1[:, -1:])


@final
class Introspection(TrainedForecaster):
    """ŵ of one weight from four of its past values, by one network for all weights.

    L1 loss, relative to the root mean square displacement.

    Patent: the method is covered by US 10,755,199. It is here as a baseline to compare with in research, and is the
    default of nothing.

    Source: Sinha et al., "Introspection: accelerating neural network training by learning weight evolution",
    ICLR 2017, with the sizes of GFM's baseline (arXiv 2505.20221, Table 5): Linear(4 → 100), ReLU, Linear; there
    lr=1e-4, batch 16 or 32, and, on our reading, scale=none.
    Differs: it forecasts every target step at once, not twice the time only; the four values are the snapshots
    nearest to 0, .4, .7 and 1 of the prefix; weights are standardised by default; the loss is our choice.
    """

    name = "introspection"
    reference = "Introspection (ICLR 2017), for comparison only: patent US 10,755,199"
    vectorised_batch = 256

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Descent):
        """Options."""

        scale: Literal["data", "none"] = field(
            default="data",
            metadata={"help": "data: standardised weights in, displacements out; none: raw weights in and out"},
        )
        hidden: int = field(default=100, metadata={"help": "width of the hidden layer"})

        def __post_init__(self) -> None:
            Descent.__post_init__(self)
            if self.hidden < 1:
                raise ValueError(f"hidden = {self.hidden}, expected 1 or more.")

    def __init__(self, config: Config, trained: Trained[FourValues] | None = None) -> None:
        self._config, self._trained = config, trained

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def trained(self) -> Trained[FourValues] | None:
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
        """Four snapshots."""
        return len(_PLACES)

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The snapshots nearest to 0, .4, .7 and 1 of the prefix, by count."""
        require_future(self.name, self.min_context, steps_C, ())
        last = len(steps_C) - 1
        return tuple(steps_C[round(place * last)] for place in _PLACES)

    def network(self, problem: Problem) -> FourValues:
        """A fresh network."""
        return FourValues(len(problem.steps_H), hidden=self._config.hidden, standardise=self._config.scale == "data")

    def measure(self, examples: Iterable[tuple[Prefix, Tensor]]) -> None:
        """Mean and standard deviation of all weights."""
        require_fitted(self.name, self._trained).network.scaling.measure(examples)

    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, random_B: Tensor | None) -> Tensor:
        """Mean absolute error."""
        network = require_fitted(self.name, self._trained).network
        moved_BHD = (truth_BHD - prefix.weights_BCD[:, -1:]).float()
        return (network(prefix.weights_BCD) - moved_BHD).abs().mean() / network.scaling.unit.sqrt()

    def forecast_alone(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The network's output: [B, H, D]."""
        rows_H = self.rows(self.seen(prefix), steps_H)
        return forecast_channels(self.seen(prefix), rows_H, require_fitted(self.name, self._trained).network, None)
