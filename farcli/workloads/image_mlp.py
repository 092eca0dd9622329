"""A fully connected network on images.

Source: SCIENCE, section 7, "real small networks": 2,130 parameters on scikit-learn's 8×8 digits, hidden layers of 24
and 16, are the default here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import final

from torch import nn

from farcli.workloads.images import ImageOptions, ImageWorkload
from farcli.workloads.mlp import hidden_sizes
from farcli.workloads.optimisation import RULE_HELP, Rule, decay_help, dtype_of, rate_help
from farcli.workloads.randomness import seeded

# Lowest held-out loss within 600 steps on the digits, of three or four rates, 3 runs whose seeds nothing else uses.
_LR = {"sgd": 0.4, "momentum": 0.02, "adam": 0.003, "adamw": 0.003, "rmsprop": 0.003, "adagrad": 0.1}
_WEIGHT_DECAY = {"adamw": 0.01}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMlpConfig(ImageOptions):
    """Options of `image-mlp`."""

    optimizer: Rule = field(default="adam", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata=rate_help(_LR))
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    data: str = field(default="digits", metadata=dict(ImageOptions.__dataclass_fields__["data"].metadata))
    batch: int = field(default=64, metadata=dict(ImageOptions.__dataclass_fields__["batch"].metadata))
    hidden: str = field(default="24,16", metadata={"help": "sizes of the hidden layers, ReLU behind each"})

    def __post_init__(self) -> None:
        ImageOptions.__post_init__(self)
        hidden_sizes(self.hidden, "24,16")


@final
class ImageMlp(ImageWorkload):
    """Pixels in, classes out: 2,130 parameters on the digits."""

    Config = ImageMlpConfig
    name = "image-mlp"
    summary = "fully connected network on images: digits, Fashion-MNIST or CIFAR-10"
    default_steps = 600
    default_every = 20
    threads = 1

    def __init__(self, config: ImageMlpConfig) -> None:
        self._config = self._prepare(config, _LR, _WEIGHT_DECAY)

    @property
    def config(self) -> ImageMlpConfig:
        """The options, with nothing about training and data left open."""
        return self._config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """Torch's own initialisation, drawn from the seed."""
        (seed,) = seeds
        sizes = [prod(self.shape), *hidden_sizes(self._config.hidden, "24,16")]
        with seeded(seed):
            layers = [layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], 10)).to(dtype_of(self._config))
