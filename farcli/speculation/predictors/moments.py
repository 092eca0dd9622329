"""Adam's next steps, taken all at once."""

from dataclasses import dataclass, field
from typing import final

from farcli.speculation.base import Observed, Predictor, Proposal
from farcli.speculation.offline import along_moments


@final
class MomentsAlong(Predictor):
    """w − K·lr·m̂/(√v̂ + ε): K updates of Adam with moments that stand still.

    Source: Leap+Verify's momentum predictor (arXiv 2602.19580), printed as θ + K·m/(√v + ε).
    Differs: with the learning rate, against the gradient, and with Adam's bias corrections unless `corrected=false`.
    """

    reference = "Adam's moments, K updates at once: Leap+Verify's momentum (arXiv 2602.19580)"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        corrected: bool = field(default=True, metadata={"help": "correct the moments' bias, as Adam does"})

    _config: Config

    @property
    def context(self) -> int:
        """One point."""
        return 1

    def require(self, seen: Observed, *, every: int, ahead: int) -> None:
        """The optimiser has to keep moments."""
        seen.moments()

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """−K·lr·m̂/(√v̂ + ε)."""
        moments = seen.moments()
        direction_D = along_moments(
            moments.first_D,
            moments.second_D,
            updates=moments.updates,
            betas=moments.betas,
            epsilon=moments.epsilon,
            corrected=self._config.corrected,
        )
        return Proposal(move_D=direction_D.to(seen.now.dtype).mul_(ahead * seen.rate * strength))
