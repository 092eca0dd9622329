"""Anderson mixing of the last points."""

from dataclasses import dataclass, field
from typing import final

import torch

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class Anderson(Predictor):
    """Regularised nonlinear acceleration: the combination of points whose displacements cancel best.

    With points w_0 … w_k and displacements r_i = w_{i+1} − w_i, c minimises ‖Σ c_i r_i‖² + λ‖R‖²‖c‖² under Σ c_i = 1;
    the leap goes to Σ c_i w_{i+1}.

    Source: Scieur, d'Aspremont and Bach, "Regularized nonlinear acceleration" (arXiv 1606.04133), algorithm 2.
    Differs: it combines w_{i+1} (Anderson's mixing of 1), where the paper combines w_i.
    """

    reference = "regularised nonlinear acceleration (arXiv 1606.04133) of the last points"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        points: int = field(default=5, metadata={"help": "points combined"})
        ridge: float = field(default=1e-3, metadata={"help": "λ, in units of the displacements' Gram matrix"})

        def __post_init__(self) -> None:
            if self.points < 3:
                raise ValueError(f"points = {self.points}, expected 3 or more.")
            if not self.ridge > 0:
                raise ValueError(f"ridge = {self.ridge}, expected more than 0.")

    _config: Config

    @property
    def context(self) -> int:
        """So many points."""
        return self._config.points

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """Σ c_i w_{i+1} − w_k."""
        count = self._config.points - 1
        residuals = seen.displacements(count)
        gram = torch.tensor([[float(a @ b) for b in residuals] for a in residuals], dtype=torch.float64)
        ridge = self._config.ridge * max(float(torch.linalg.matrix_norm(gram, 2)), 1e-300)
        solved = torch.linalg.solve(
            gram + ridge * torch.eye(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64)
        )
        shares = (solved / solved.sum()).tolist()
        move_D = torch.zeros_like(seen.now)
        for share, point in zip(shares, seen.weights_CD[-count:], strict=True):
            move_D.add_(point - seen.now, alpha=share)
        return Proposal(move_D=move_D.mul_(strength), average=False)
