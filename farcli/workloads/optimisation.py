"""How a workload is optimised: update rule, learning rate and its schedule, number format; the same options for all.

A workload's `Config` inherits `TrainingOptions` and says which defaults are its own:

    @final
    @dataclass(frozen=True, slots=True, kw_only=True)
    class FooConfig(TrainingOptions):
        optimizer: Rule = field(default="adam", metadata=RULE_HELP)
        lr: float | None = field(default=None, metadata=rate_help(_LR))
        weight_decay: float | None = field(default=None, metadata=decay_help(_WEIGHT_DECAY))

and its `__init__` keeps `resolved(config, lr=_LR, weight_decay=_WEIGHT_DECAY, span=self.default_steps)`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import cos, isfinite, pi
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

Rule = Literal["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"]
Schedule = Literal["constant", "cosine", "wsd", "cyclical"]

RULE_HELP = {"help": "update rule, from torch.optim; momentum is SGD with momentum 0.9"}


def rate_help(lr: Mapping[str, float], more: str = "") -> dict[str, str]:
    """Metadata of the field `lr` of a workload: its default by update rule, and what more there is to say."""
    return {"help": f"learning rate; none means {_listed(lr)}{more}"}


def decay_help(weight_decay: Mapping[str, float]) -> dict[str, str]:
    """Metadata of the field `weight_decay` of a workload: its default by update rule, 0 for those left out."""
    return {"help": f"weight decay; none means {_listed(weight_decay)}{', else ' if weight_decay else ''}0"}


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} for {rule}" for rule, value in values.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """Options that every workload has."""

    optimizer: Rule = field(default="sgd", metadata=RULE_HELP)
    lr: float | None = field(default=None, metadata={"help": "learning rate"})
    weight_decay: float | None = field(default=None, metadata={"help": "weight decay"})
    schedule: Schedule = field(
        default="constant",
        metadata={
            "help": "learning rate over the run: constant; cosine; wsd: constant, then down a line (warm-up-stable-"
            "decay); cyclical: up and down a triangle"
        },
    )
    warmup: int = field(
        default=0, metadata={"help": "steps over which the rate rises to its full value, in any schedule"}
    )
    span: int | None = field(
        default=None, metadata={"help": "steps the schedule is laid out for; none means those of the recording"}
    )
    decay: float = field(default=0.25, metadata={"help": "share of the span, at its end, over which wsd goes down"})
    cycles: int = field(default=4, metadata={"help": "triangles of cyclical in the span"})
    floor: float = field(
        default=0.0, metadata={"help": "share of the rate that cosine, wsd and cyclical go down to: 0.1 is a tenth"}
    )
    dtype: Literal["float32", "float64", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of weights and training"}
    )

    def __post_init__(self) -> None:
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if value is not None and not (isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}, expected a finite number of at least 0.")
        for name, value, least in (("warmup", self.warmup, 0), ("span", self.span, 1), ("cycles", self.cycles, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected at least {least}.")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay}, expected a share of the span above 0 and at most 1.")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor}, expected a share of the rate between 0 and 1.")
        if self.schedule != "constant" and self.span is not None and self.warmup >= self.span:
            raise ValueError(f"warmup={self.warmup}, expected fewer than the {self.span} steps of the schedule.")


OptionsT = TypeVar("OptionsT", bound=TrainingOptions)


def resolved(options: OptionsT, *, lr: Mapping[str, float], weight_decay: Mapping[str, float], span: int) -> OptionsT:
    """The options with learning rate, weight decay and span filled in where they are none.

    Args:
        options: of a workload.
        lr: its learning rate by update rule, one for each.
        weight_decay: its weight decay by update rule; 0 for those it leaves out.
        span: steps of a schedule that says nothing; a constant rate has no span, so that runs of any
            length are the same training.
    """
    rule = options.optimizer
    return replace(
        spanning(options, span),
        lr=lr[rule] if options.lr is None else options.lr,
        weight_decay=weight_decay.get(rule, 0.0) if options.weight_decay is None else options.weight_decay,
    )


def spanning(options: OptionsT, steps: int) -> OptionsT:
    """The options with the schedule laid out for so many steps, unless they say themselves or the rate is constant.

    Raises:
        ValueError: the warm-up takes all of them.
    """
    if options.schedule == "constant" or options.span is not None:
        return options
    return replace(options, span=steps)


def build_optimizer(options: TrainingOptions, parameters: Iterable[nn.Parameter], *, fused: bool = False) -> Optimizer:
    """The chosen update rule of `torch.optim`, with torch's defaults for what is no option.

    Args:
        options: resolved ones.
        parameters: to be trained.
        fused: use torch's fused kernels where the rule has them: faster, and rounded differently.
    """
    assert options.lr is not None, "resolve the options first"
    common: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.optimizer in ("sgd", "momentum") and options.dtype == "bfloat16":
        fused = False  # pytorch #191763: up to 2.13 it leaves bfloat16 weights as they are on a CPU
    fast: dict[str, Any] = {"fused": True} if fused else {}
    match options.optimizer:
        case "sgd":
            return SGD(parameters, **common, **fast)
        case "momentum":
            return SGD(parameters, momentum=0.9, **common, **fast)
        case "adam":
            return Adam(parameters, **common, **fast)
        case "adamw":
            return AdamW(parameters, **common, **fast)
        case "rmsprop":
            return RMSprop(parameters, alpha=0.99, **common)
        case "adagrad":
            return Adagrad(parameters, **common, **fast)


def rate_multiple(options: TrainingOptions, step: int) -> float:
    """What the learning rate is multiplied by in the update that leads from `step` to `step + 1`.

    The warm-up rises by equal amounts and reaches 1 at its last step. After it, with floor f:

    - cosine falls from 1 to f over the rest of the span (Loshchilov and Hutter, arXiv 1608.03983, one cycle);
    - wsd stays at 1 and falls to f on a line over the last `decay` of the span (Hu et al., arXiv 2404.06395;
      Hägele et al., arXiv 2405.18392);
    - cyclical goes from f up to 1 and back, `cycles` times (Smith, arXiv 1506.01186). Taken in the middle of a
      step, so that it is never quite f: with f = 0 a step would be lost.

    Beyond the span cosine and wsd stay at f, cyclical goes on.
    """
    warmup, span, floor = options.warmup, options.span, options.floor
    if step < warmup:
        return (step + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    assert span is not None, "resolve the options first"
    match options.schedule:
        case "cosine":
            share = (1 + cos(pi * min(1.0, (step - warmup) / (span - warmup)))) / 2
        case "wsd":
            share = min(1.0, max(0, span - step) / (options.decay * span))
        case "cyclical":
            share = 1 - abs(2 * ((step - warmup + 0.5) * options.cycles / (span - warmup) % 1) - 1)
    return floor + (1 - floor) * share


def dtype_of(options: TrainingOptions) -> torch.dtype:
    """Torch's name of the number format."""
    return getattr(torch, options.dtype)
