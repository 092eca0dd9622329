"""Dynamic mode decomposition of each run's own prefix.

Shape suffixes: B runs, C snapshots of the context, H horizons, D coordinates; M differences; R modes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from farcli.forecasters.aitken import geometric_sum
from farcli.forecasters.base import Coupling, Forecaster, Prefix
from farcli.forecasters.spacing import evenly_spaced

_NOISE = 1e-10
"""Singular values below this part of the largest are rounding noise of float64 differences."""


@final
class Dmd(Forecaster):
    """ŵ = w_n + Σ_{j=1..k} A^j d_n with the A that best maps each difference d_i = w_i − w_{i−1} to the next.

    Per run: no other run is looked at. modes=vector finds A on the span of the differences (their leading `rank`
    directions), modes=coordinate one number for each weight: the least-squares form of Aitken. k counts intervals
    between the evenly spaced snapshots at the end of the context; for fractions the eigenvalues' powers are taken.
    Modes that grow, |λ| > 1, are left out (they count as converged), so that no forecast explodes.

    Source: Schmid (2010); exact DMD, Tu et al. (2014).
    Differs: on differences instead of weights, so that an affine map w ↦ Aw + b and its fixed point need no mode
    of their own.
    """

    reference = "dynamic mode decomposition (Schmid 2010) of the run's own differences"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        modes: Literal["vector", "coordinate"] = field(
            default="vector", metadata={"help": "vector: of whole vectors; coordinate: of each weight by itself, any D"}
        )
        rank: int = field(default=0, metadata={"help": "modes kept for vectors; 0 for all that the prefix shows"})

        def __post_init__(self) -> None:
            if self.rank < 0:
                raise ValueError(f"rank = {self.rank}, expected 0 (all) or more.")
            if self.rank and self.modes == "coordinate":
                raise ValueError(f"rank = {self.rank} is for modes = vector.")

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Joint for whole vectors."""
        return Coupling.JOINT if self._config.modes == "vector" else Coupling.COORDINATEWISE

    @property
    def min_context(self) -> int:
        """Three snapshots: two differences."""
        return 3

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The evenly spaced ones that end at the last."""
        return evenly_spaced("dmd", 3, steps_C)

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Go on with the modes: [B, H, D]."""
        prefix.require("dmd", self.min_context, steps_H)
        steps = self.observed(prefix.steps_C)
        weights_BCD = prefix.weights_BCD[:, [prefix.steps_C.index(step) for step in steps]]
        counts_H = [(step - steps[-1]) / (steps[-1] - steps[-2]) for step in steps_H]
        differences_BMD = weights_BCD.diff(dim=1)
        if self._config.modes == "coordinate":
            moved_BHD = _by_coordinate(differences_BMD, counts_H)
        else:
            # On the CPU: MPS has no float64.
            moved_BHD = _by_vector(differences_BMD.cpu().double(), counts_H, self._config.rank).to(weights_BCD)
        return moved_BHD.add_(weights_BCD[:, -1:])


def _by_coordinate(differences_BMD: Tensor, counts_H: list[float]) -> Tensor:
    before_BMD, after_BMD = differences_BMD[:, :-1], differences_BMD[:, 1:]
    square_BD = before_BMD.square().sum(dim=1)
    moving_BD = square_BD > 0
    ratio_BD = torch.where(moving_BD, (before_BMD * after_BMD).sum(dim=1) / torch.where(moving_BD, square_BD, 1.0), 0.0)
    ratio_BD = torch.where(ratio_BD.abs() < 1, ratio_BD, 0.0)
    return torch.stack([geometric_sum(ratio_BD, count) * differences_BMD[:, -1] for count in counts_H], dim=1)


def _by_vector(differences_BMD: Tensor, counts_H: list[float], rank: int) -> Tensor:
    before_BDM, after_BDM = differences_BMD[:, :-1].mT, differences_BMD[:, 1:].mT
    left_BDR, values_BR, right_BRM = torch.linalg.svd(before_BDM, full_matrices=False)
    if rank:
        left_BDR, values_BR, right_BRM = left_BDR[..., :rank], values_BR[:, :rank], right_BRM[:, :rank]
    alive_BR = values_BR > _NOISE * values_BR[:, :1].clamp(min=torch.finfo(values_BR.dtype).tiny)
    inverse_BR = torch.where(alive_BR, 1 / torch.where(alive_BR, values_BR, 1.0), 0.0)
    map_BRR = (left_BDR.mT @ after_BDM @ right_BRM.mT) * (inverse_BR[:, None] * alive_BR[:, :, None])
    lambda_BR, modes_BRR = torch.linalg.eig(map_BRR)
    start_BR1 = (left_BDR.mT @ after_BDM[..., -1:]).to(modes_BRR.dtype)
    along_BR = (torch.linalg.pinv(modes_BRR) @ start_BR1).squeeze(-1)
    lambda_BR = torch.where(lambda_BR.abs() <= 1, lambda_BR, 0.0)
    moved = [modes_BRR @ (_power_sum(lambda_BR, count) * along_BR)[..., None] for count in counts_H]
    return (left_BDR @ torch.cat(moved, dim=-1).real).mT.contiguous()


def _power_sum(lambda_BR: Tensor, count: float) -> Tensor:
    """λ + λ² + … + λ^count, for complex λ; `count` where λ = 1."""
    fixed_BR = (lambda_BR - 1).abs() < 1e-12
    safe_BR = torch.where(fixed_BR, 0.5, lambda_BR)
    power_BR = torch.where(safe_BR == 0, 0.0, torch.exp(count * torch.log(torch.where(safe_BR == 0, 1.0, safe_BR))))
    return torch.where(fixed_BR, count, safe_BR * (1 - power_BR) / (1 - safe_BR))
