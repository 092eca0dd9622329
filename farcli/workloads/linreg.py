"""Gradient Flow Matching's synthetic linear regression, all runs trained at once.

Every run has a task of its own, y = a·x + b + noise with a ~ N(2, 0.1²), b ~ N(1, 0.1²), x ~ U(−1, 1),
and fits weight·x + bias by mean squared error. The optimisers of `torch.optim` work element by element,
so stepping the stacked weights of all runs equals stepping each run alone.

Source: arXiv 2505.20221, section 5.1 and appendix A. Defaults are its text with a noise std of 0.1, full
batch: the noise-free test bed of a forecaster, one step an epoch. The reading that fits its Table 1 best
(protocol D2) is `--steps 796 --every 4 --set batch=32 --set noise=0.31622776601683794`.
Differs: nothing is known of the paper's batches or initial bias; they are options here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from farcli.workloads.base import Batch, Workload, evaluating
from farcli.workloads.lines import HELD_OUT, Lines
from farcli.workloads.optimisation import (
    RULE_HELP,
    Rule,
    TrainingOptions,
    decay_help,
    dtype_of,
    rate_help,
    resolved,
)
from farcli.workloads.randomness import stream

_FIXED_WEIGHT = 0.5
_LR = {"sgd": 0.01, "momentum": 0.01, "adam": 0.01, "adamw": 0.01, "rmsprop": 0.01, "adagrad": 0.1}
_WEIGHT_DECAY = {"adamw": 0.01, "rmsprop": 0.01}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LinregConfig(TrainingOptions):
    """Options of `linreg`."""

    optimizer: Rule = field(default="sgd", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata=rate_help(_LR))
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    init: Literal["normal", "xavier_normal", "xavier_uniform", "fixed"] = field(
        default="normal",
        metadata={
            "help": f"first weight: N(0, 1); Xavier, which for one input and output is N(0, 1) again or U(−√3, √3); "
            f"or {_FIXED_WEIGHT} in every run of every seed"
        },
    )
    bias_init: Literal["zero", "normal"] = field(default="zero", metadata={"help": "first bias: 0 or N(0, 1)"})
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
        if self.init == "fixed" and self.bias_init == "normal":
            raise ValueError("init=fixed starts all runs at the same point, bias_init=normal does not; choose one.")


class StackedLinear(nn.Module):
    """R copies of `nn.Linear(1, 1)`; weight [R, 1, 1] and bias [R, 1], so that one run loads into the original."""

    def __init__(self, weight_R: np.ndarray, bias_R: np.ndarray, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight_R, dtype=dtype).reshape(-1, 1, 1))
        self.bias = nn.Parameter(torch.tensor(bias_R, dtype=dtype).reshape(-1, 1))

    def forward(self, x_RN: Tensor) -> Tensor:
        """Each run's prediction for its own points."""
        return self.weight[:, 0] * x_RN + self.bias


@final
class Linreg(Workload):
    """Linear regression in one dimension: 2 parameters a run."""

    Config = LinregConfig
    lockstep = True
    summary = "linear regression y = ax + b, one task a run, all runs in one pass (GFM's synthetic data)"
    default_steps = 199
    default_every = 1
    threads = 1

    def __init__(self, config: LinregConfig) -> None:
        self._config = resolved(config, lr=_LR, weight_decay=_WEIGHT_DECAY, span=self.default_steps)
        self._lines = Lines(noise=config.noise, dtype=dtype_of(config))

    @property
    def config(self) -> LinregConfig:
        """The options, with learning rate and weight decay filled in."""
        return self._config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """All runs' weights, stacked."""
        weights, biases = zip(*(self._start(seed) for seed in seeds), strict=True)
        return StackedLinear(np.array(weights), np.array(biases), self._lines.dtype)

    def _start(self, seed: int) -> tuple[float, float]:
        generator = stream(seed, "init")
        match self._config.init:
            case "normal" | "xavier_normal":  # std √(2 / (1 + 1)) = 1
                weight = generator.normal()
            case "xavier_uniform":  # bound √(6 / (1 + 1))
                weight = generator.uniform(-sqrt(3), sqrt(3))
            case "fixed":
                weight = _FIXED_WEIGHT
        return weight, generator.normal() if self._config.bias_init == "normal" else 0.0

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
