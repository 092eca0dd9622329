"""Fewer passes for a fixed-point iteration whose every step costs a pass over the data.

Shape suffixes: leading axes are a batch of independent problems; P unknowns, M remembered steps.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_MEMORY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceleration:
    """Anderson acceleration of x ← T(x), where T never raises an objective, made safe by that objective.

    A point that raises its problem's objective is rejected: that problem goes on from T of the best point
    and forgets its past.

    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49 (2011).

    Attributes:
        point_P: best point of each problem.
        mapped_P: T of it.
        objective: its objective, shape of the batch.
        gain: by how much at least T lowers it.
        moves_PM: differences of successive accepted points; 0 where forgotten.
        bends_PM: differences of their steps T(x) − x.
    """

    point_P: Tensor
    mapped_P: Tensor
    objective: Tensor
    gain: Tensor
    moves_PM: Tensor
    bends_PM: Tensor

    @classmethod
    def begin(cls, point_P: Tensor, mapped_P: Tensor, objective: Tensor, gain: Tensor) -> Self:
        """Start from a point, T of it, its objective and what T gains at least."""
        none_PM = point_P.new_zeros((*point_P.shape, 0))
        return cls(
            point_P=point_P, mapped_P=mapped_P, objective=objective, gain=gain, moves_PM=none_PM, bends_PM=none_PM
        )

    def take(self, point_P: Tensor, mapped_P: Tensor, objective: Tensor, gain: Tensor) -> "Acceleration":
        """Take in the next point, T of it, its objective and what T gains at least."""
        better = objective <= self.objective
        better_P1 = better[..., None, None]
        move_P1 = (point_P - self.point_P)[..., None]
        bend_P1 = (mapped_P - self.mapped_P)[..., None] - move_P1
        return Acceleration(
            point_P=torch.where(better[..., None], point_P, self.point_P),
            mapped_P=torch.where(better[..., None], mapped_P, self.mapped_P),
            objective=torch.where(better, objective, self.objective),
            gain=torch.where(better, gain, self.gain),
            moves_PM=(torch.cat([self.moves_PM, move_P1], dim=-1) * better_P1)[..., -_MEMORY:],
            bends_PM=(torch.cat([self.bends_PM, bend_P1], dim=-1) * better_P1)[..., -_MEMORY:],
        )

    def proposal(self, lengths_P: Tensor) -> Tensor:
        """The next point to try.

        Args:
            lengths_P: size of one unit of each unknown, in which steps are compared.
        """
        if not self.moves_PM.shape[-1]:
            return self.mapped_P
        step_P1 = (self.mapped_P - self.point_P)[..., None]
        shares_M1 = torch.linalg.pinv(self.bends_PM * lengths_P[..., None], rtol=1e-8) @ (
            step_P1 * lengths_P[..., None]
        )
        return self.mapped_P - ((self.moves_PM + self.bends_PM) @ shares_M1).squeeze(-1)
