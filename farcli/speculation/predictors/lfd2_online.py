"""LFD-2's linear map, fitted while training to the training itself."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

import torch

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class Lfd2Online(Predictor):
    """Each tensor's displacement goes on by the factor that its last ones went on by.

    One coefficient a for each tensor, by least squares over its coordinates and the last points: d_{i+1} ≈ a·d_i, with
    d_i = w_{i+1} − w_i. The leap of K steps is Σ a^j d over the K/P intervals ahead, a fraction of the last one where
    they are not whole; a is kept within 0 and 1, since a displacement that grows for ever is none that was seen.

    Source: LFD-2 (arXiv 2505.02714) in the form ŵ = w_n + A(w_n − w_0), per tensor.
    Differs: fitted on the run's own past, one interval ahead, and iterated; the paper fits it across runs.
    """

    reference = "LFD-2 (arXiv 2505.02714) per tensor, fitted online to the run's own displacements"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        points: int = field(default=4, metadata={"help": "points that coefficients are fitted to"})

        def __post_init__(self) -> None:
            if self.points < 3:
                raise ValueError(f"points = {self.points}, expected 3 or more.")

    _config: Config

    @property
    def context(self) -> int:
        """So many points."""
        return self._config.points

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """Σ_j a^j d for each tensor."""
        done = seen.displacements(self._config.points - 1)
        intervals = ahead / (seen.steps_C[-1] - seen.steps_C[-2])
        move_D = torch.empty_like(seen.now)
        for slot in seen.layout.floats:
            rows = slice(slot.offset, slot.stop)
            product = sum(float(later[rows] @ earlier[rows]) for earlier, later in pairwise(done))
            square = sum(float(earlier[rows] @ earlier[rows]) for earlier in done[:-1])
            a = min(1.0, max(0.0, product / square)) if square > 0 else 0.0
            whole = int(intervals)
            factor = sum(a**j for j in range(1, whole + 1)) + (intervals - whole) * a ** (whole + 1)
            torch.mul(done[-1][rows], factor * strength, out=move_D[rows])
        return Proposal(move_D=move_D)
