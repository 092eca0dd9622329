"""Coefficients fitted on loss, in the span of recent displacements."""

from dataclasses import dataclass, field
from typing import final

import torch

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class LossSpan(Predictor):
    """w + Σ c_i d_i, with d_i the last displacements and the way to the average, c fitted by gradient on fresh batches.

    Every gradient on a fresh training batch gives the slopes along all d_i at once. From c = 0, `tries` steps of
    normalised gradient descent on c, in units of each d_i's length; each costs one training step.

    Source: ours, after loss-fitted coefficients (farcli's `loss-lfd`); a subspace step as in Narkiss and
    Zibulevsky (2005).
    """

    takes_batches = True
    reference = "coefficients of recent displacements fitted on fresh batches: ours"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        points: int = field(default=3, metadata={"help": "displacements in the span, beside the way to the average"})
        tries: int = field(default=3, metadata={"help": "gradients taken, a training step each"})
        length: float = field(default=0.25, metadata={"help": "of the first step, in lengths of a displacement"})

        def __post_init__(self) -> None:
            if self.points < 1 or self.tries < 1:
                raise ValueError(f"points = {self.points}, tries = {self.tries}, expected 1 or more.")

    _config: Config

    @property
    def context(self) -> int:
        """So many displacements."""
        return self._config.points + 1

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """Σ c_i d_i."""
        span = [*seen.displacements(self._config.points), seen.average_D - seen.now]
        span = [each / length for each in span if (length := float(each.norm())) > 0]
        move_D = torch.zeros_like(seen.now)
        if not span:
            return Proposal(move_D=move_D)
        typical = float(seen.displacement().norm())
        for attempt in range(self._config.tries):
            _, gradient_D = seen.gradient(seen.now + move_D)
            slopes = torch.tensor([float(gradient_D @ each) for each in span])
            size = float(slopes.norm())
            if not size > 0:
                break
            length = self._config.length * typical / (1 + attempt) / size
            for slope, each in zip(slopes.tolist(), span, strict=True):
                move_D.add_(each, alpha=-slope * length)
        return Proposal(move_D=move_D.mul_(strength), cost=float(self._config.tries))
