"""Back to the running average."""

from dataclasses import dataclass
from typing import final

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class ToAverage(Predictor):
    """Weights become the running average: lower in loss at once, and often behind a little later.

    Source: as LAWA and EMA evaluate (Kasimbeg et al. 2025), but training goes on from there.
    """

    reference = "go on from the running average: passes at once, often worse later"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No options."""

    _config: Config

    @property
    def context(self) -> int:
        """One point."""
        return 1

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """ē − w; the average stays."""
        return Proposal(move_D=(seen.average_D - seen.now).mul_(strength), average=False)
