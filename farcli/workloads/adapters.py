"""Low-rank adapters: of a pretrained network, only small matrices beside its attention are trained, and its new head.

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1: W x becomes W x + α/r · B A x in the projections q and v of
each attention, A drawn from a Gaussian and B zero, so that the network starts as it was.
Differs: the paper gives no variance for A; here it is one over the number of inputs. I inputs, O outputs of a
projection, P projections in a layer, of rank r.
"""

import re
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from farcli.workloads.randomness import stream

ALPHA = 8.0
"""α of the scale α/r: the paper's for RoBERTa (appendix D, with r = 8; the scripts its authors published say 16)."""
FASTER = 10.0
"""How much higher the default learning rates are with adapters: one factor for all rules, ours. For AdamW it gives
5e-4, what the paper's authors take for RoBERTa-base on SST-2 (`roberta_base_sst2.sh`; 4e-4 on CoLA)."""
HELP = {
    "help": "rank of low-rank adapters on the attention's projections q and v, of a pretrained network; all else is "
    "frozen and not recorded, but for a new classifier; 0 trains everything"
}
"""Metadata of the option `adapters`."""


@final
class Adapted(nn.Module):
    """A frozen layer with adapters on some of the equal parts of its outputs.

    Args:
        layer: `nn.Linear`, or any other with inputs [..., I] and outputs [..., parts · O].
        down_PrI: A of each adapted part.
        outputs: O.
        parts: how many projections the layer computes side by side.
        adapted: which P of them have adapters.
    """

    def __init__(self, layer: nn.Module, down_PrI: Tensor, outputs: int, parts: int, adapted: Sequence[int]) -> None:
        super().__init__()
        count, rank, _ = down_PrI.shape
        self.layer = layer
        self.down = nn.Parameter(down_PrI)
        self.up = nn.Parameter(torch.zeros(count, outputs, rank, dtype=down_PrI.dtype))
        self._parts, self._adapted, self._scale = parts, tuple(adapted), ALPHA / rank

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layer says, and the adapters add."""
        pieces = list(self.layer(inputs).chunk(self._parts, dim=-1))
        for part, down_rI, up_Or in zip(self._adapted, self.down, self.up, strict=True):
            pieces[part] = pieces[part] + self._scale * (inputs @ down_rI.T @ up_Or.T)
        return torch.cat(pieces, dim=-1)


def adapt(
    model: nn.Module,
    layers: str,
    width: int,
    rank: int,
    seed: int,
    *,
    parts: int = 1,
    adapted: Sequence[int] = (0,),
    trained: tuple[str, ...] = (),
) -> None:
    """Freeze a network, in place, and put adapters on some of its layers.

    What is frozen becomes buffers outside `state_dict`: no optimiser sees them and no trajectory holds them.

    Args:
        model: the network, in its final number format.
        layers: pattern that the names of the layers match, to the end; each has `width` inputs.
        width: I, and O of each part.
        rank: r, at least 1.
        seed: what A is drawn from.
        parts: see `Adapted`.
        adapted: likewise.
        trained: beginnings of the names of parameters that are trained as they are.
    """
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not f"{prefix}.{name}".startswith(trained):
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
    generator = stream(seed, "init", 1)  # the network itself has drawn from the stream without a number
    for name, layer in modules.items():
        if re.search(f"(?:{layers})$", name):
            parent, _, own = name.rpartition(".")
            down_PrI = torch.from_numpy(generator.normal(scale=1 / np.sqrt(width), size=(len(adapted), rank, width)))
            dtype = layer.get_buffer("weight").dtype
            setattr(modules[parent], own, Adapted(layer, down_PrI.to(dtype), width, parts, adapted))
