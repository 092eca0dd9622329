"""Small convolutional networks made of NAS-Bench-201 cells, on images.

A cell has 4 nodes; node 0 is its input, each later node sums one operation on every earlier node, node 3 is its
output. The network: convolution 3×3 of stride 2 to `width` channels, `cells` cells, ReLU and another such convolution
to twice as many channels, as many cells, ReLU, mean over the image, linear layer. All cells of a network are alike.

Source: Dong and Yang, NAS-Bench-201 (arXiv 2001.00326), for cells, operations and their notation; Gradient Flow
Matching (arXiv 2505.20221), which has CNNs of such cells with 5,418 parameters on CIFAR-10.
Differs: the skeleton around the cells is ours, since that paper does not give one. Its 5,418 is what ours has without
its cells, at a width of 16: 448 + 4,640 + 330. Of all skeletons of one to three stages that we counted this is the
plainest that gives the number; no choice of NAS-Bench-201's own skeleton does. So cells of `none`, `skip_connect`
and `avg_pool_3x3`, like the default, have 5,418 parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import final

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from farcli.workloads.images import ImageOptions, ImageWorkload
from farcli.workloads.optimisation import RULE_HELP, Rule, decay_help, dtype_of, rate_help
from farcli.workloads.randomness import seeded, stream

_LR = {"sgd": 0.05, "momentum": 0.01, "adam": 0.003, "adamw": 0.003, "rmsprop": 0.001, "adagrad": 0.03}
_WEIGHT_DECAY = {"adamw": 0.01}

FREE = ("none", "skip_connect", "avg_pool_3x3")
"""Operations without parameters."""
_KERNELS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
_EDGES = ((1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
"""(node, earlier node), in the order of the notation."""
_DEFAULT = "|skip_connect~0|+|avg_pool_3x3~0|skip_connect~1|+|skip_connect~0|avg_pool_3x3~1|skip_connect~2|"

Cell = tuple[str, ...]
"""The operation of each edge."""


def parse_cell(text: str) -> Cell:
    """The operations that NAS-Bench-201's notation names, "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|…~0|…~1|…~2|".

    Raises:
        ValueError: it is not that notation, or no way leads from the input to the output.
    """
    nodes = text.split("+")
    named = [part.split("~") for node in nodes for part in node.strip().strip("|").split("|")]
    operations = tuple(part[0] for part in named)
    if len(nodes) != 3 or text != format_cell(operations):
        raise ValueError(f"arch={text!r}, expected NAS-Bench-201's notation, like {_DEFAULT}")
    for operation in operations:
        if operation not in (*FREE, *_KERNELS):
            raise ValueError(f"arch: unknown operation {operation!r}; there are {', '.join((*FREE, *_KERNELS))}.")
    if not _connected(operations):
        raise ValueError(f"arch={text}: no way leads from the input to the output.")
    return operations


def format_cell(operations: Sequence[str]) -> str:
    """The notation of a cell."""
    nodes: dict[int, str] = {}
    for (node, source), operation in zip(_EDGES, operations, strict=False):
        nodes[node] = f"{nodes.get(node, '|')}{operation}~{source}|"
    return "+".join(nodes.values())


def _connected(cell: Cell) -> bool:
    reached = {0}
    for (node, source), operation in zip(_EDGES, cell, strict=True):
        if source in reached and operation != "none":
            reached.add(node)
    return 3 in reached


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class NasCnnConfig(ImageOptions):
    """Options of `nas-cnn`."""

    optimizer: Rule = field(default="sgd", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata=rate_help(_LR))
    weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))
    arch: str = field(
        default=_DEFAULT,
        metadata={
            "help": "the cell in NAS-Bench-201's notation, |op~0|+|op~0|op~1|+|op~0|op~1|op~2| with op "
            f"{', '.join((*FREE, *_KERNELS))}; or random: each run's own, of operations without parameters"
        },
    )
    width: int = field(default=16, metadata={"help": "channels of the first stage; the second has twice as many"})
    cells: int = field(default=1, metadata={"help": "cells of each stage"})
    stride: int = field(
        default=2, metadata={"help": "of the first convolution; 1 keeps all pixels, at four times the cost"}
    )

    def __post_init__(self) -> None:
        ImageOptions.__post_init__(self)
        for name, value, least in (("width", self.width, 1), ("cells", self.cells, 0), ("stride", self.stride, 1)):
            if value < least:
                raise ValueError(f"{name}={value}, expected at least {least}.")
        if self.arch != "random":
            parse_cell(self.arch)


class NasNetwork(nn.Module):
    """A network of cells.

    Args:
        cell: the operations.
        channels: of the images.
        config: the other options.

    Attributes:
        cell: the operations; may be replaced by others with the same parameters.
    """

    def __init__(self, cell: Cell, channels: int, config: NasCnnConfig) -> None:
        super().__init__()
        width, cells = config.width, config.cells
        self.cell = cell
        self.stem = nn.Conv2d(channels, width, 3, stride=config.stride, padding=1)
        self.first = nn.ModuleList(_operations(cell, width) for _ in range(cells))
        self.reduction = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.second = nn.ModuleList(_operations(cell, 2 * width) for _ in range(cells))
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [N, 10]."""
        hidden = self.stem(images)
        for operations in self.first:
            hidden = self._through(operations, hidden)
        hidden = self.reduction(relu(hidden))
        for operations in self.second:
            hidden = self._through(operations, hidden)
        return self.classifier(relu(hidden).mean((2, 3)))

    def _through(self, operations: nn.Module, images: Tensor) -> Tensor:
        nodes: list[Tensor | None] = [images, None, None, None]
        for index, ((node, source), name) in enumerate(zip(_EDGES, self.cell, strict=True)):
            before = nodes[source]
            if before is None or name == "none":
                continue
            match name:
                case "skip_connect":
                    after = before
                case "avg_pool_3x3":
                    after = avg_pool2d(before, 3, stride=1, padding=1, count_include_pad=False)
                case _:
                    after = operations.get_submodule(str(index))(before)
            so_far = nodes[node]
            nodes[node] = after if so_far is None else so_far + after
        assert nodes[3] is not None  # a way leads there
        return nodes[3]


def _operations(cell: Cell, width: int) -> nn.Module:
    """The convolutions of a cell by the number of their edge: ReLU, convolution without bias, BatchNorm."""
    return nn.ModuleDict(
        {
            str(index): nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(width, width, _KERNELS[name], padding=_KERNELS[name] // 2, bias=False),
                nn.BatchNorm2d(width),
            )
            for index, name in enumerate(cell)
            if name in _KERNELS
        }
    )


@final
class NasCnn(ImageWorkload):
    """A CNN of NAS-Bench-201 cells: 5,418 parameters at its defaults on CIFAR-10."""

    Config = NasCnnConfig
    name = "nas-cnn"
    summary = "CNN of NAS-Bench-201 cells (GFM's 5,418 parameters) on CIFAR-10, Fashion-MNIST or digits"
    default_steps = 600
    default_every = 20
    threads = 1

    def __init__(self, config: NasCnnConfig) -> None:
        self._config = self._prepare(config, _LR, _WEIGHT_DECAY)

    @property
    def config(self) -> NasCnnConfig:
        """The options, with what depends on the update rule and the data filled in."""
        return self._config

    def cell(self, seed: int) -> Cell:
        """The operations of a run's cells."""
        if self._config.arch != "random":
            return parse_cell(self._config.arch)
        possible = [cell for cell in product(FREE, repeat=len(_EDGES)) if _connected(cell)]
        return possible[int(stream(seed, "data").integers(len(possible)))]

    def model(self, seeds: Sequence[int]) -> nn.Module:
        """Torch's own initialisation, drawn from the seed."""
        (seed,) = seeds
        with seeded(seed):
            network = NasNetwork(self.cell(seed), self.shape[0], self._config)
        return network.to(dtype_of(self._config))

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Cross-entropy and accuracy on the held-out images, the same for every run, through the run's own cells."""
        assert isinstance(model, NasNetwork)
        before, model.cell = model.cell, self.cell(seed)
        try:
            return super().evaluate(model, seed)
        finally:
            model.cell = before
