"""Weights and average moved together along what the average did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class Shift(Predictor):
    """Leap by share·(ē_t − ē_{t−P}): along the displacement of the running average since the last leap but this.

    The average has left out most of training's noise, so that its displacement says more of where training goes
    than that of the weights does.

    Source: ours; after "average first, then extrapolate" (arXiv 2605.26484).
    """

    reference = "weights and average moved along the average's displacement: ours, after arXiv 2605.26484"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        share: float = field(default=0.5, metadata={"help": "of the average's displacement"})

    _config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._before_D: Tensor | None = None
        self._stayed_D: Tensor | None = None

    @property
    def context(self) -> int:
        """One point."""
        return 1

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """share·(ē_t − ē_{t−P}); nothing the first time."""
        move_D = seen.average_D - (seen.average_D if self._before_D is None else self._before_D)
        move_D.mul_(self._config.share * strength)
        self._before_D = seen.average_D + move_D  # where the average will be after the leap
        self._stayed_D = seen.average_D.clone()
        return Proposal(move_D=move_D)

    def rejected(self) -> None:
        """The average stayed where it was."""
        self._before_D = self._stayed_D

    def state(self) -> Mapping[str, Tensor]:
        """The average after the last leap."""
        return {} if self._before_D is None else {"before": self._before_D}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        self._before_D = state["before"].clone() if "before" in state else None
