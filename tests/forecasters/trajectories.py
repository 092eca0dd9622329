"""Small trajectories with what real ones have: tensors of all sizes, constant starts, frozen parts, buffers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farcli.fitting.descent import descend
from farcli.fitting.solving import solve
from farcli.forecasters.base import (
    Coupling,
    FittedForecaster,
    Forecaster,
    Known,
    Prefix,
    Problem,
    SolvedForecaster,
    TrainedForecaster,
    TrainingLoss,
)
from farcli.forecasters.table import FORECASTERS
from farcli.layout import Layout, layout_of
from farcli.registry import resolve

LAYOUT = layout_of(
    [
        ("conv.weight", (6, 3, 3), "float32", "parameter"),
        ("conv.bias", (6,), "float32", "parameter"),  # starts at 0
        ("norm.weight", (6,), "float32", "parameter"),  # starts at 1
        ("head.weight", (5, 9), "float32", "parameter"),
        ("frozen", (7,), "float32", "parameter"),  # never moves
        ("norm.running_mean", (6,), "float32", "buffer"),
    ]
)
NINO = str(Path(__file__).with_name("nino_width4.pt"))
"""A file with tensors named like NiNo's, of width 4, random: `torch.manual_seed(0)`, 0.3 × normal."""
REQUIRED: dict[str, dict[str, Any]] = {"nino-mlp": {"weights": NINO}, "loss-lfd": {"updates": 3}}
"""Options without which a method cannot work, or would take long."""
STEPS_C = (0, 20, 35, 40, 60)
STEPS_H = (80, 100, 130, 160)


@dataclass(frozen=True)
class Data:
    layout: Layout
    steps_C: tuple[int, ...]
    steps_H: tuple[int, ...]
    weights_BTD: Tensor

    @property
    def runs(self) -> int:
        return self.weights_BTD.shape[0]

    def problem(self, memory: int = 10**9) -> Problem:
        return Problem(
            layout=self.layout,
            coordinates=self.layout.parameters,
            runs=self.runs,
            steps_C=self.steps_C,
            steps_H=self.steps_H,
            memory=memory,
        )

    def block(self, runs: Sequence[int], start: int, stop: int) -> tuple[Prefix, Tensor]:
        own_BTD = self.weights_BTD[list(runs), :, start:stop]
        count = len(self.steps_C)
        prefix = Prefix(
            weights_BCD=own_BTD[:, :count], steps_C=self.steps_C, layout=self.layout, start=start, runs_B=tuple(runs)
        )
        return prefix, own_BTD[:, count:]

    def prefix(self) -> Prefix:
        return self.block(range(self.runs), 0, self.layout.size)[0]

    def observed(self, forecaster: Forecaster) -> tuple["Data", Problem]:
        """What is read for a method, and its problem: the snapshots it looks at."""
        steps_C = forecaster.observed(self.steps_C)
        rows = [*(self.steps_C.index(step) for step in steps_C), *range(len(self.steps_C), self.weights_BTD.shape[1])]
        data = replace(self, steps_C=steps_C, weights_BTD=self.weights_BTD[:, rows])
        return data, data.problem()

    def passes(
        self, cuts: Sequence[int] = (), runs: Sequence[Sequence[int]] | None = None
    ) -> Callable[[], Iterable[tuple[Prefix, Tensor]]]:
        """Blocks cut at columns `cuts` and grouped by `runs`; buffers are there, though they are not fitted."""
        bounds = sorted({0, *cuts, self.layout.size})
        groups = runs if runs is not None else [range(self.runs)]
        return lambda: (self.block(group, start, stop) for group in groups for start, stop in pairwise(bounds))


def drifting(seed: int, runs: int = 5, dtype: torch.dtype = torch.float32) -> Data:
    """Runs that move towards something of their own, slower and slower, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    start_BD, end_BD = normal(runs, LAYOUT.size), normal(runs, LAYOUT.size)
    start_BD[:, LAYOUT.slice_of("conv.bias")] = 0
    start_BD[:, LAYOUT.slice_of("norm.weight")] = 1
    end_BD[:, LAYOUT.slice_of("norm.weight")] += 1
    pace_T = 1 - torch.exp(-torch.tensor(STEPS_C + STEPS_H, dtype=torch.float64) / 150)
    weights_BTD = start_BD[:, None] + pace_T[None, :, None] * (end_BD - start_BD)[:, None]
    weights_BTD[:, 1:] += 0.02 * normal(runs, len(pace_T) - 1, LAYOUT.size)
    weights_BTD[..., LAYOUT.slice_of("frozen")] = start_BD[:, None, LAYOUT.slice_of("frozen")]
    return Data(LAYOUT, STEPS_C, STEPS_H, weights_BTD.to(dtype))


class Bowl(TrainingLoss):
    """½ ‖w − 1‖², whatever the run and batch."""

    batches = 2

    def at(self, weights_D: Tensor, run: int, batch: int) -> Tensor:
        return 0.5 * (weights_D - 1).square().mean()


KNOWN = Known(loss=Bowl)
"""What tests know of training runs beside their weights."""


def create(name: str, **options: Any) -> Forecaster:
    cls = resolve("forecaster", name, FORECASTERS)
    return cls(cls.Config(**options))


def fitted(data: Data, name: str, **options: Any) -> Forecaster:
    """The method, fitted on the parameters of all runs where it is fitted at all, on the snapshots it looks at.

    Those fitted by gradient only begin to: what is tested of all methods holds from the first update.
    """
    forecaster = create(name, **options)
    if isinstance(forecaster, FittedForecaster):
        forecaster = forecaster.prepared(data.problem(), KNOWN)
    if isinstance(forecaster, TrainedForecaster):
        forecaster = create(name, **{"epochs": 2, **options})
        assert isinstance(forecaster, TrainedForecaster)
        observed, problem = data.observed(forecaster)
        return descend(forecaster, problem, observed.passes()).forecaster
    if isinstance(forecaster, SolvedForecaster):
        problem = replace(data.problem(), steps_C=forecaster.observed(data.steps_C))
        return solve(forecaster, problem, data.passes())
    assert not isinstance(forecaster, FittedForecaster)
    return forecaster


def is_joint(forecaster: Forecaster) -> bool:
    return forecaster.coupling is Coupling.JOINT
