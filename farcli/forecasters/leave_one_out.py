"""Leave-one-run-out, exactly and without refitting on data: from the sums of each run.

What a ridge regression on all runs but one would have said of that one follows from the sums of all runs minus
its own. So the penalty can be chosen, and a forecast judged, on runs it has not seen, in no further pass.

Shape suffixes: R runs, K groups of coordinates, P basis columns, H horizons.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from farcli.errors import UsageError
from farcli.forecasters.least_squares import normal_equations

PENALTIES = tuple(10 ** (exponent / 4) for exponent in range(-20, 9))
"""From 1e-5, below which rare directions are left to noise (SCIENCE, section 7), to 100: next to no slope at all."""
LEAST_RUNS = 3
NAME_A_PENALTY = "Record more runs, or name a penalty: --set ridge=1e-3 (and --set intervals=false)."
"""What LFD-2 advises where runs are too few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A ridge regression, and what it says of each run when that run is left out.

    Attributes:
        theta_KPH: the solution on all runs.
        penalty_KH: the penalty, each group's and horizon's own, with the least error on runs left out.
        without_RKPH: the solutions without one run, at that penalty.
        errors_RKH: Σ(ŵ − y)² over the coordinates of the run left out.
        persistence_RKH: Σ(w_n − y)², the error of keeping w_n.
    """

    theta_KPH: Tensor
    penalty_KH: Tensor
    without_RKPH: Tensor
    errors_RKH: Tensor
    persistence_RKH: Tensor

    @classmethod
    def solve(
        cls,
        grams_RKPP: Tensor,
        cross_RKPH: Tensor,
        squares_RKH: Tensor,
        *,
        bias: bool,
        penalties: tuple[float, ...] = PENALTIES,
    ) -> Self:
        """Choose the penalty by the exact leave-one-run-out error, and solve.

        Args:
            grams_RKPP: ZᵀZ of each run; the last column of Z is a constant where `bias`.
            cross_RKPH: Zᵀy of each run, y = w_h − w_n.
            squares_RKH: yᵀy of each run.
            bias: whether the last column is a bias, which carries no penalty.
            penalties: to choose from, relative to each centred column's sum of squares.

        Raises:
            UsageError: fewer than 3 runs.
        """
        require_runs("lfd2", len(grams_RKPP), NAME_A_PENALTY)
        gram_KPP, cross_KPH = grams_RKPP.sum(0), cross_RKPH.sum(0)
        others_RKPP, others_RKPH = gram_KPP - grams_RKPP, cross_KPH - cross_RKPH
        best: LeftOut | None = None
        for penalty in penalties:
            theta_KPH = normal_equations(gram_KPP, cross_KPH, ridge=penalty, bias=bias)
            without_RKPH = normal_equations(others_RKPP, others_RKPH, ridge=penalty, bias=bias)
            errors_RKH = squared_errors(without_RKPH, grams_RKPP, cross_RKPH, squares_RKH)
            found = cls(
                theta_KPH=theta_KPH,
                penalty_KH=torch.full_like(theta_KPH[:, 0], penalty),
                without_RKPH=without_RKPH,
                errors_RKH=errors_RKH,
                persistence_RKH=squares_RKH,
            )
            best = found if best is None else best._or(found)
        assert best is not None
        return best

    def _or(self, other: Self) -> Self:
        """The better of two, group by group and horizon by horizon."""
        worse_KH = other.errors_RKH.sum(0) < self.errors_RKH.sum(0)
        return type(self)(
            theta_KPH=torch.where(worse_KH[:, None], other.theta_KPH, self.theta_KPH),
            penalty_KH=torch.where(worse_KH, other.penalty_KH, self.penalty_KH),
            without_RKPH=torch.where(worse_KH[:, None], other.without_RKPH, self.without_RKPH),
            errors_RKH=torch.where(worse_KH, other.errors_RKH, self.errors_RKH),
            persistence_RKH=self.persistence_RKH,
        )


def require_runs(who: str, runs: int, instead: str = "Record more runs.") -> None:
    """Refuse to leave one run out of too few.

    Raises:
        UsageError: fewer than 3 runs.
    """
    if runs < LEAST_RUNS:
        raise UsageError(
            f"{who}: leaving one run out needs at least {LEAST_RUNS} training runs, found {runs}.",
            instead,
        )


def squared_errors(theta_RKPH: Tensor, grams_RKPP: Tensor, cross_RKPH: Tensor, squares_RKH: Tensor) -> Tensor:
    """‖y − Zx‖² of each run, from its sums: ZᵀZ, Zᵀy, yᵀy."""
    quadratic_RKH = torch.einsum("rkph,rkpq,rkqh->rkh", theta_RKPH, grams_RKPP, theta_RKPH)
    return (squares_RKH - 2 * (theta_RKPH * cross_RKPH).sum(-2) + quadratic_RKH).clamp(min=0)
