"""k steps forward, one step back."""

from dataclasses import dataclass, field
from typing import final

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class Lookahead(Predictor):
    """Back to w_{t−P} + α(w_t − w_{t−P}): an interpolation, the leap that is none.

    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (arXiv 1907.08610).
    Differs: the running average moves along.
    """

    reference = "k steps forward, one step back (arXiv 1907.08610): a leap backwards"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        alpha: float = field(default=0.5, metadata={"help": "what is kept of the displacement"})

    _config: Config

    @property
    def context(self) -> int:
        """Two points."""
        return 2

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """(α − 1)(w_t − w_{t−P})."""
        return Proposal(move_D=seen.displacement().mul_((self._config.alpha - 1) * strength))
