"""A recurrent network over the observed snapshots.

Shape suffixes: N examples, C snapshots of the context, H horizons, K channels of an example.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from torch import Tensor, nn

from farcli.forecasters.base import Coupling, Descent, Prefix, Problem, Trained, TrainedForecaster, require_fitted
from farcli.forecasters.scaling import Scaling, forecast_channels


@final
class Recurrent(nn.Module):
    """LSTM layers over the snapshots, and one linear map from the last state to all horizons."""

    def __init__(self, channels: int, horizons: int, *, hidden: int, layers: int, standardise: bool) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(channels, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, horizons * channels)
        self.scaling = Scaling(channels, standardise=standardise)

    def forward(self, weights_NCK: Tensor) -> Tensor:
        """ŵ − w_n: [N, H, K]."""
        states_NCS, _ = self.recurrent(self.scaling.inputs(weights_NCK))
        outputs_NHK = self.head(states_NCS[:, -1]).unflatten(-1, (-1, weights_NCK.shape[-1]))
        return self.scaling.displacement(outputs_NHK, weights_NCK[:, -1:])


@final
class Lstm(TrainedForecaster):
    """ŵ at all horizons from the last state of an LSTM over w_0 … w_n.

    Squared error, relative to persistence's.

    Source: the LSTM baseline of GFM (arXiv 2505.20221, Table 5): 2 layers, hidden size 16, a fully connected
    layer; there lr=1e-4, batch 16 or 32, and, on our reading, channels=joint and scale=none.
    Differs: by default one network is shared by all coordinates, and weights are standardised. Published figures
    are those of an undertrained network (SCIENCE, section 7).
    """

    name = "lstm"
    reference = "LSTM baseline of Gradient Flow Matching (arXiv 2505.20221, Table 5)"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Descent):
        """Options."""

        channels: Literal["shared", "joint"] = field(
            default="shared",
            metadata={"help": "shared: one network for every coordinate alone, any D; joint: it sees whole vectors"},
        )
        scale: Literal["data", "none"] = field(
            default="data",
            metadata={"help": "data: standardised weights in, displacements out; none: raw weights in and out"},
        )
        hidden: int = field(default=16, metadata={"help": "size of a layer's state"})
        layers: int = field(default=2, metadata={"help": "LSTM layers"})

        def __post_init__(self) -> None:
            Descent.__post_init__(self)
            for name in ("hidden", "layers"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} = {getattr(self, name)}, expected 1 or more.")

    def __init__(self, config: Config, trained: Trained[Recurrent] | None = None) -> None:
        self._config, self._trained = config, trained

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def trained(self) -> Trained[Recurrent] | None:
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
        """One snapshot."""
        return 1

    def network(self, problem: Problem) -> Recurrent:
        """A fresh network."""
        config = self._config
        return Recurrent(
            problem.coordinates if config.channels == "joint" else 1,
            len(problem.steps_H),
            hidden=config.hidden,
            layers=config.layers,
            standardise=config.scale == "data",
        )

    def measure(self, examples: Iterable[tuple[Prefix, Tensor]]) -> None:
        """Means and standard deviations."""
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
