"""Gradient Flow Matching's 15-parameter networks: two architectures on one task, all runs trained at once.

Every run fits a line of its own (`farcli.workloads.lines`) with a fully connected network of hidden sizes 2, 2, 1
("3-layer") or 4, 1 ("2-layer"). R runs, N points, I and O inputs and outputs of a layer, P parameters.

Source: arXiv 2505.20221, section 5.2 and appendix C: a forecaster is fitted on 30 three-layer networks and judged
on 20 two-layer ones. The sizes give the 15 parameters of the text only with an output layer 1 → 1 behind them:
4 + 6 + 3 + 2 and 8 + 5 + 2.
Differs: activation and initialisation are not in the text; they are options, and the defaults are those that train
well (of 50 three-layer networks with ReLU about 40 never leave the constant). The learning rate is 0.001 in section
5.2, 0.01 in appendix C, which is the default; 0.1 for Adagrad, as on its linear regression.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, prod, sqrt
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from farcli.workloads.base import Batch, Workload, evaluating
from farcli.workloads.lines import HELD_OUT, Lines
from farcli.workloads.optimisation import RULE_HELP, Rule, TrainingOptions, decay_help, dtype_of, rate_help, resolved
from farcli.workloads.randomness import stream

_LR = {"sgd": 0.01, "momentum": 0.01, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.01, "adagrad": 0.1}
_WEIGHT_DECAY = {"adamw": 0.01, "rmsprop": 0.01}
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "elu": nn.functional.elu}


def hidden_sizes(text: str, like: str) -> list[int]:
    """The sizes that an option `hidden` holds, separated by commas.

    Raises:
        ValueError: they are none; says what was expected, `like` as the example.
    """
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) for size in sizes):
        raise ValueError(f"hidden={text!r}, expected sizes of at least 1 like {like}.")
    return [int(size) for size in sizes]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MlpConfig(TrainingOptions):
    """Options of `mlp`."""

    optimizer: Rule = field(default="adam", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata=rate_help(_LR))
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    hidden: str = field(
        default="2,2,1",
        metadata={"help": "sizes of the hidden layers; 2,2,1 and 4,1 are the paper's, 15 parameters each"},
    )
    pad: int | None = field(
        default=None,
        metadata={
            "help": "keep all weights in one vector of so many, zeros behind those of the network: networks of any "
            "shape then have one layout, and one forecaster serves them; none keeps a tensor for each"
        },
    )
    activation: Literal["tanh", "relu", "elu"] = field(default="tanh", metadata={"help": "after each hidden layer"})
    init: Literal["torch", "normal", "xavier_normal", "xavier_uniform"] = field(
        default="xavier_normal",
        metadata={"help": "first weights: those of nn.Linear (torch); or N(0, 1) or Xavier with biases of 0"},
    )
    batch: int = field(
        default=100, metadata={"help": "points a step; fewer than all are drawn by reshuffling every epoch"}
    )
    noise: float = field(default=0.1, metadata={"help": "standard deviation of the noise in y"})
    points: int = field(default=100, metadata={"help": "training points of each run"})
    dtype: Literal["float32", "float64"] = field(
        default="float32", metadata={"help": "number format of weights and training"}
    )

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        if self.points < 1 or self.batch < 1:
            raise ValueError(f"points={self.points}, batch={self.batch}, expected at least 1.")
        if not (isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise={self.noise}, expected a standard deviation of at least 0.")
        hidden_sizes(self.hidden, "2,2,1")
        if self.pad is not None and self.pad < self.parameters:
            raise ValueError(f"pad={self.pad}, but hidden={self.hidden} has {self.parameters} parameters.")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, in order: weight [O, I] and bias [O] of each layer."""
        sizes = [1, *hidden_sizes(self.hidden, "2,2,1"), 1]
        shapes: dict[str, tuple[int, ...]] = {}
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            shapes |= {f"{index}.weight": (outputs, inputs), f"{index}.bias": (outputs,)}
        return shapes

    @property
    def parameters(self) -> int:
        """P without padding."""
        return sum(prod(shape) for shape in self.shapes.values())


class StackedMlp(nn.Module):
    """R fully connected networks with one input and one output.

    Args:
        config: their shape.
        weights_RP: their first weights, those of `config.shapes` one after the other.
        dtype: of the weights.
    """

    def __init__(self, config: MlpConfig, weights_RP: np.ndarray, dtype: torch.dtype) -> None:
        super().__init__()
        self._shapes, self._padded = config.shapes, config.pad is not None
        self._activation = _ACTIVATIONS[config.activation]
        whole_RP = torch.tensor(weights_RP, dtype=dtype)
        if config.pad is not None:
            padding = config.pad - config.parameters
            self.weights = nn.Parameter(nn.functional.pad(whole_RP, (0, padding)))
            return
        for name, part in self._parts(whole_RP).items():
            layer, kind = name.split(".")
            if not hasattr(self, layer):
                self.add_module(layer, nn.Module())
            self.get_submodule(layer).register_parameter(kind, nn.Parameter(part.clone()))

    def _parts(self, weights_RP: Tensor) -> dict[str, Tensor]:
        counts = [prod(shape) for shape in self._shapes.values()]
        parts = weights_RP[:, : sum(counts)].split(counts, dim=1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def forward(self, x_RN: Tensor) -> Tensor:
        """Each run's prediction for its own points, [R, N]."""
        parts = self._parts(self.weights) if self._padded else dict(self.named_parameters())
        hidden_RIN = x_RN[:, None]
        for index in range(len(parts) // 2):
            if index:
                hidden_RIN = self._activation(hidden_RIN)
            weight_ROI, bias_RO = parts[f"{index}.weight"], parts[f"{index}.bias"]
            # element by element, not bmm: whose sums may depend on how many runs there are
            products = [weight_ROI[:, :, i, None] * hidden_RIN[:, i, None] for i in range(weight_ROI.shape[2])]
            hidden_RIN = torch.stack(products).sum(dim=0) + bias_RO[..., None]
        return hidden_RIN[:, 0]


@final
class Mlp(Workload):
    """Fully connected networks on lines: 15 parameters a run."""

    Config = MlpConfig
    lockstep = True
    summary = (
        "15-parameter MLPs, hidden 2,2,1 or 4,1, one line to fit a run, all runs in one pass (GFM's synthetic data)"
    )
    default_steps = 199
    default_every = 1
    threads = 1

    def __init__(self, config: MlpConfig) -> None:
        self._config = resolved(config, lr=_LR, weight_decay=_WEIGHT_DECAY, span=self.default_steps)
        self._lines = Lines(noise=config.noise, dtype=dtype_of(config))

    @property
    def config(self) -> MlpConfig:
        """The options, with what depends on the update rule filled in."""
        return self._config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """All runs' networks, stacked."""
        return StackedMlp(self._config, np.stack([self._start(seed) for seed in seeds]), self._lines.dtype)

    def _start(self, seed: int) -> np.ndarray:
        """The first weights of one run, shape [P]."""
        generator, parts = stream(seed, "init"), []
        inputs = outputs = 1
        for shape in self._config.shapes.values():
            if len(shape) == 2:
                outputs, inputs = shape
            match self._config.init:
                case "torch":
                    part = generator.uniform(-1 / sqrt(inputs), 1 / sqrt(inputs), shape)
                case "normal":
                    part = generator.normal(size=shape)
                case "xavier_normal":
                    part = generator.normal(scale=sqrt(2 / (inputs + outputs)), size=shape)
                case "xavier_uniform":
                    part = generator.uniform(-1, 1, shape) * sqrt(6 / (inputs + outputs))
            parts.append(part.reshape(-1) if len(shape) == 2 or self._config.init == "torch" else np.zeros(shape))
        return np.concatenate(parts)

    def batches(self, seeds: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """Pairs (x, y) of shape [R, batch]; the last batch of an epoch may be smaller."""
        return self._lines.batches(seeds, self._config.points, self._config.batch, start)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of each run."""
        x_RN, y_RN = batch
        return (model(x_RN) - y_RN).square().mean(dim=1)

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Mean squared error on 1,000 fresh points of the same task; the noise variance is the least to be had."""
        x, y = self._lines.points(seed, "held-out", HELD_OUT)
        with evaluating(model):
            return {"loss": float(self.loss(model, (x[None], y[None])).squeeze(0))}

    def verification(self, seed: int, draw: int, batches: int) -> Sequence[Batch]:
        """Fresh points of the same task; no two draws share any."""
        return self._lines.verification(seed, draw, batches, min(self._config.batch, self._config.points))

    def chance(self) -> dict[str, float]:
        """Mean over tasks of the best constant's error."""
        return {"loss": self._lines.chance()}

    def evaluation_cost(self) -> float:
        """A forward pass over the held-out points."""
        return HELD_OUT / min(self._config.batch, self._config.points) / 3
