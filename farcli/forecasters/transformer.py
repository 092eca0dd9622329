"""A small Transformer over the observed snapshots.

Shape suffixes: N examples, C snapshots of the context, H horizons, K channels of an example, S width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from torch import Tensor, nn

from farcli.forecasters.base import Coupling, Descent, Prefix, Problem, Trained, TrainedForecaster, require_fitted
from farcli.forecasters.scaling import Scaling, forecast_channels


@final
class Encoder(nn.Module):
    """Each snapshot embedded, a learned place added, encoder layers, one linear map from all to all horizons."""

    def __init__(
        self, channels: int, context: int, horizons: int, *, width: int, heads: int, layers: int, standardise: bool
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.decode = nn.Linear(context * width, horizons * channels)
        self.places = nn.Embedding(context, width)
        self.scaling = Scaling(channels, standardise=standardise)

    def forward(self, weights_NCK: Tensor) -> Tensor:
        """ŵ − w_n: [N, H, K]."""
        tokens_NCS = self.embed(self.scaling.inputs(weights_NCK)) + self.places.weight
        for layer in self.layers:
            tokens_NCS = layer(tokens_NCS)
        outputs_NHK = self.decode(tokens_NCS.flatten(1)).unflatten(-1, (-1, weights_NCK.shape[-1]))
        return self.scaling.displacement(outputs_NHK, weights_NCK[:, -1:])


@final
class Transformer(TrainedForecaster):
    """ŵ at all horizons from an encoder's view of w_0 … w_n.

    Squared error, relative to persistence's.

    Source: the Transformer baseline of GFM (arXiv 2505.20221, Table 5): embedding, 1 encoder layer, decoder,
    width 32; there lr=1e-4, batch 16 or 32, and, on our reading, channels=joint and scale=none.
    Differs: the decoder, of which nothing more is said, is one linear map of all encoded snapshots; 4 heads, a
    feed-forward part of 4 × width and learned places are ours. By default one network is shared by all coordinates,
    and weights are standardised.
    """

    name = "transformer"
    reference = "Transformer baseline of Gradient Flow Matching (arXiv 2505.20221, Table 5)"
    vectorised_batch = 64

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
        width: int = field(default=32, metadata={"help": "numbers a snapshot is embedded in"})
        heads: int = field(default=4, metadata={"help": "attention heads; they divide width"})
        layers: int = field(default=1, metadata={"help": "encoder layers"})

        def __post_init__(self) -> None:
            Descent.__post_init__(self)
            for name in ("width", "heads", "layers"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} = {getattr(self, name)}, expected 1 or more.")
            if self.width % self.heads:
                raise ValueError(f"width = {self.width} is no multiple of heads = {self.heads}.")

    def __init__(self, config: Config, trained: Trained[Encoder] | None = None) -> None:
        self._config, self._trained = config, trained

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def trained(self) -> Trained[Encoder] | None:
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

    def network(self, problem: Problem) -> Encoder:
        """A fresh network."""
        config = self._config
        return Encoder(
            problem.coordinates if config.channels == "joint" else 1,
            len(problem.steps_C),
            len(problem.steps_H),
            width=config.width,
            heads=config.heads,
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
