"""Adam's next steps, taken all at once."""

from dataclasses import dataclass, field
from typing import final

from farcli.speculation.base import Observed, Predictor, Proposal


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

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """−K·lr·m̂/(√v̂ + ε)."""
        moments = seen.moments()
        first_D, second_D = moments.first_D, moments.second_D
        if self._config.corrected:
            first_D = first_D / (1 - moments.betas[0] ** moments.updates)
            second_D = second_D / (1 - moments.betas[1] ** moments.updates)
        move_D = first_D / (second_D.sqrt() + moments.epsilon)
        return Proposal(move_D=move_D.mul_(-ahead * seen.rate * strength))
