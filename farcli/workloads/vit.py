"""A small vision transformer on images.

Square patches of an image are the tokens: linear embedding, learned positions, `depth` encoder layers of torch
(post-norm, ReLU, 2 heads, inner width 2 × hidden), mean over the tokens, linear layer.

Source: Gradient Flow Matching (arXiv 2505.20221): Transformers of depth 1–4, hidden size 64–1024, dropout 0, 0.1 or
0.3, 2 heads, MLP ratio 2 on CIFAR-10, with 924,554 parameters. Only `--set depth=4 --set hidden=128 --set patch=32`
has that number within this grid: the whole image is one token, so that attention has nothing to choose from.
393,344 + 4 × 132,480 + 1,290. A single token has no position.
Differs: patches of 8 pixels by default, which is a vision transformer (Dosovitskiy et al., arXiv 2010.11929), there
with a class token and pre-norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn

from farcli.errors import UsageError
from farcli.workloads.images import ImageOptions, ImageWorkload
from farcli.workloads.optimisation import RULE_HELP, Rule, decay_help, dtype_of, rate_help
from farcli.workloads.randomness import seeded

_LR = {"sgd": 0.2, "momentum": 0.03, "adam": 0.001, "adamw": 0.001, "rmsprop": 0.001, "adagrad": 0.01}
_WEIGHT_DECAY = {"adamw": 0.01}
_RATIO = 2


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig(ImageOptions):
    """Options of `vit`."""

    optimizer: Rule = field(default="adam", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata=rate_help(_LR))
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    depth: int = field(default=2, metadata={"help": "encoder layers"})
    hidden: int = field(default=64, metadata={"help": "width of the tokens"})
    heads: int = field(default=2, metadata={"help": "of the attention"})
    dropout: float = field(default=0.0, metadata={"help": "share of activations dropped in training"})
    patch: int = field(default=8, metadata={"help": "pixels along a side of a patch; 32 makes the image one token"})

    def __post_init__(self) -> None:
        ImageOptions.__post_init__(self)
        for name in ("depth", "hidden", "heads", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1.")
        if self.hidden % self.heads:
            raise ValueError(f"hidden={self.hidden}, expected a multiple of heads={self.heads}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}, expected a share of at least 0 and below 1.")


class VisionTransformer(nn.Module):
    """An encoder over the patches of an image.

    Args:
        config: its options.
        shape: [C, H, W] of the images.
    """

    def __init__(self, config: VitConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        tokens = height // config.patch * (width // config.patch)
        self._patch = config.patch
        self.embedding = nn.Linear(channels * config.patch**2, config.hidden)
        if tokens > 1:
            self.positions = nn.Parameter(0.02 * torch.randn(tokens, config.hidden))
        else:
            self.register_parameter("positions", None)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.hidden, config.heads, _RATIO * config.hidden, dropout=config.dropout, batch_first=True
            )
            for _ in range(config.depth)
        )
        self.classifier = nn.Linear(config.hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, 10]."""
        patches = nn.functional.unfold(images, self._patch, stride=self._patch)
        tokens = self.embedding(patches.transpose(1, 2))
        if self.positions is not None:
            tokens = tokens + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        return self.classifier(tokens.mean(1))


@final
class Vit(ImageWorkload):
    """A vision transformer: 80,970 parameters at its defaults on CIFAR-10."""

    Config = VitConfig
    name = "vit"
    summary = "vision transformer (GFM's grid, with its 924,554 parameters) on CIFAR-10, Fashion-MNIST or digits"
    default_steps = 600
    default_every = 20

    def __init__(self, config: VitConfig) -> None:
        self._config = self._prepare(config, _LR, _WEIGHT_DECAY)
        _, height, width = self.shape
        if height % config.patch or width % config.patch:
            raise UsageError(f"vit: patch={config.patch} does not divide images of {height}×{width} pixels.")

    @property
    def config(self) -> VitConfig:
        """The options, with what depends on the update rule and the data filled in."""
        return self._config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """Torch's own initialisation, and positions from N(0, 0.02²), drawn from the seed."""
        (seed,) = seeds
        with seeded(seed):
            return VisionTransformer(self._config, self.shape).to(dtype_of(self._config))
