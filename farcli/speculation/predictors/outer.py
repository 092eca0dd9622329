"""Slow momentum on what training did between leaps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from farcli.speculation.base import Observed, Predictor, Proposal
from farcli.speculation.predictors.slow_momentum import SlowMomentum


@final
class Outer(Predictor):
    """Nesterov momentum on displacements: with d = w_t − w_{t−P}, b ← μb + d, leap by η(d + μb) − d.

    Training's last displacement is taken as an outer gradient; μ = 0 and η = 1 leap nowhere. The strength
    multiplies the leap, not η.

    Source: SNOO (arXiv 2510.15830), after DiLoCo's outer optimiser (arXiv 2311.08105).
    Differs: the running average moves along.
    """

    reference = "Nesterov momentum on displacements: SNOO (arXiv 2510.15830), DiLoCo (arXiv 2311.08105)"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        momentum: float = field(default=0.6, metadata={"help": "μ, what is kept of earlier displacements"})
        rate: float = field(default=0.7, metadata={"help": "η, the outer learning rate"})

        def __post_init__(self) -> None:
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum = {self.momentum}, expected 0 or more and less than 1.")
            if not 0 < self.rate <= 2:
                raise ValueError(f"rate = {self.rate}, expected more than 0 and at most 2.")

    _config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._momentum = SlowMomentum(config.momentum)

    @property
    def context(self) -> int:
        """Two points."""
        return 2

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """η(d + μb) − d."""
        done_D = seen.displacement()
        move_D = self._momentum.ahead(done_D).mul_(self._config.rate).sub_(done_D)
        return Proposal(move_D=move_D.mul_(strength))

    def state(self) -> Mapping[str, Tensor]:
        """The momentum b."""
        return self._momentum.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take b back."""
        self._momentum.restore(state)
