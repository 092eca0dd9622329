"""How to leap: the options of every predictor and gate alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from farcli.errors import UsageError
from farcli.speculation.gates import Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaping:
    """How to leap: options of every predictor and gate alike."""

    every: int = field(default=10, metadata={"help": "steps between the points that predictors see"})
    period: int = field(default=1, metadata={"help": "points between leaps"})
    ahead: int | None = field(
        default=None, metadata={"help": "K, steps to leap, for predictors that forecast; none means every × period"}
    )
    gate: Gate = field(
        default="delayed",
        metadata={
            "help": "strict, adaptive or proximity judge a leap at once; delayed judges a window of training with "
            "leaps in it by the running average, and rolls back; none keeps everything"
        },
    )
    window: int = field(default=100, metadata={"help": "steps from a leap to the delayed verdict, at least"})
    budget: float = field(default=0.01, metadata={"help": "share of the training's cost that verifying may take"})
    compute: float = field(
        default=0.02, metadata={"help": "share of the training's cost that proposing may take; leaps wait for it"}
    )
    tolerance: float = field(default=0.005, metadata={"help": "ε of proximity, as a share of the loss"})
    look: bool = field(
        default=True,
        metadata={
            "help": "delayed: a predictor's first leap has to lower the held-out loss at once, until a window was kept"
        },
    )
    margin: float = field(default=3.0, metadata={"help": "standard errors by which a window may lose before it is"})
    patience: int = field(default=2, metadata={"help": "windows lost in a row after which there are no more leaps"})
    memory: int = field(default=100, metadata={"help": "steps that the running average remembers"})
    stride: int = field(default=5, metadata={"help": "steps between updates of the running average"})
    start: int = field(default=0, metadata={"help": "first step to leap at"})
    until: int | None = field(default=None, metadata={"help": "last step to leap at; none for no end"})
    freeze: float = field(
        default=0.9,
        metadata={"help": "no leaps once the learning rate is below this share of its maximum; 0 for never"},
    )
    moments: Literal["keep", "reset", "shrink"] = field(
        default="keep",
        metadata={"help": "Adam's first moments and SGD's momentum after a leap: as they are, 0, or half"},
    )
    watch: float = field(
        default=1.5,
        metadata={
            "help": "mean t of the slopes along the last four leaps, in training's own gradients, above which leaps "
            "become half as long; 0 for not looking"
        },
    )
    seed: int = field(default=0, metadata={"help": "of the bandit that chooses among predictors"})

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("period", 1), ("window", 1), ("patience", 1), ("memory", 1), ("stride", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}, expected {least} or more.")
        if self.ahead is not None and self.ahead < 1:
            raise ValueError(f"ahead = {self.ahead}, expected 1 or more.")
        for name in ("budget", "tolerance", "margin", "freeze", "watch", "compute", "start"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)}, expected 0 or more.")


def last_leap(options: Leaping, steps: int) -> int:
    """The last step to leap at in a training of so many: as said, or the last point early enough for its verdict."""
    if options.until is not None:
        return options.until
    points = -(-options.window // options.every) if options.gate == "delayed" else 1
    return steps - points * options.every


def require_leaps(options: Leaping, contexts: Sequence[int], steps: int) -> None:
    """Refuse a training in which no predictor would get to a leap.

    Args:
        options: with `until`.
        contexts: of the predictors; none where nothing is to leap.
        steps: that the training takes.

    Raises:
        UsageError: the first leap that there are points for comes after the last that there is time for.
    """
    if not contexts:
        return
    spacing = options.every * options.period
    earliest = max(options.start, (min(contexts) - 1) * options.every, options.every)
    first = -(-earliest // spacing) * spacing
    last = last_leap(options, steps)
    if first > last:
        window = f", since a window of {options.window} has to follow" if options.gate == "delayed" else ""
        raise UsageError(
            f"leap: no leap fits into {steps} steps: the first could be at step {first}, but none after step "
            f"{max(0, last)}{window}.",
            "Train longer, or lower --every, --window or --leap start=; --predictors none trains without leaps.",
        )


def enough_to_verify(options: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """Keywords of `Leaper` with the last leap early enough for its verdict, where it is not said and can be known.

    Args:
        options: keywords.
        steps: that the training takes; None or less than 1 where nobody knows.
    """
    if steps is None or steps < 1:
        return dict(options)
    fields = {name: options[name] for name in ("gate", "window", "every", "until") if name in options}
    return {**options, "until": last_leap(replace(options.get("options") or Leaping(), **fields), steps)}
