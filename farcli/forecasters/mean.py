"""What does not look at the prefix: the training runs' mean weights at the target step, and their mean motion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from farcli.config import format_size
from farcli.errors import ResourceError, UsageError
from farcli.forecasters.base import (
    Coupling,
    Prefix,
    Problem,
    SolvedForecaster,
    Sums,
    require_fitted,
    require_future,
    stored,
)


@final
class MeanSums(Sums):
    """Per coordinate and target step, the sum over runs of truth / runs: the mean itself, when all are in.

    Args:
        problem: what is fitted.
        moved: whether of truth less w_n instead.
    """

    def __init__(self, problem: Problem, *, moved: bool = False) -> None:
        self._runs = problem.runs
        self._moved = moved
        self.seen = 0
        """(run, coordinate) pairs taken in."""
        self.mean_HD = torch.zeros(len(problem.steps_H), problem.coordinates, dtype=torch.float64)

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        stop = min(prefix.start + truth_BHD.shape[-1], self.mean_HD.shape[-1])
        width = max(stop - prefix.start, 0)
        last_BD = prefix.weights_BCD[:, -1]
        if truth_BHD.device.type == "mps":  # it has no float64
            truth_BHD, last_BD = truth_BHD.cpu(), last_BD.cpu()
        total_HD = truth_BHD[..., :width].sum(0, dtype=torch.float64)
        if self._moved:
            total_HD -= last_BD[..., :width].sum(0, dtype=torch.float64)
        self.mean_HD[:, prefix.start : stop] += total_HD.div_(self._runs).cpu()
        self.seen += len(prefix.runs_B) * width

    def merge(self, other: Any) -> None:
        """Add another part's sums."""
        self.mean_HD += other.mean_HD
        self.seen += other.seen

    @property
    def finite(self) -> bool:
        """Whether every mean is finite."""
        return bool(self.mean_HD.sum().isfinite())


class Climatology(SolvedForecaster):
    """A mean over training runs, per coordinate and target step; w_n for coordinates that were not fitted."""

    name: str
    moved: bool
    """Whether of how far they move from w_n, else of where they are."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """No options."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._fit: tuple[Problem, Tensor] | None = None

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Coordinate-wise."""
        return Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """False: coordinates of another network are other coordinates."""
        return False

    @property
    def min_context(self) -> int:
        """One snapshot."""
        return 1

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The last one."""
        return (steps_C[-1],)

    def sums(self, problem: Problem) -> MeanSums:
        """Empty sums: H × D float64 numbers."""
        require_future(self.name, self.min_context, problem.steps_C, problem.steps_H)
        horizons, size = len(problem.steps_H), problem.coordinates
        if (need := horizons * size * 8) > problem.memory:
            raise ResourceError(
                f"{self.name}: {horizons} target steps of D = {size} parameters need {format_size(need)}, but the "
                f"budget is {format_size(problem.memory)}, which allows D = {problem.memory // (8 * horizons)} for "
                f"{horizons} target steps, or {problem.memory // (8 * size)} target steps for this D.",
                "Raise --memory, or forecast fewer steps with --to.",
            )
        return MeanSums(problem, moved=self.moved)

    def solved(self, problem: Problem, sums: MeanSums) -> Self:
        """The forecaster of these means."""
        assert sums.seen == problem.runs * problem.coordinates, "every run and coordinate comes once"
        return self._with(problem, sums.mean_HD)

    def _with(self, problem: Problem, mean_HD: Tensor) -> Self:
        fitted = type(self)(self._config)
        fitted._fit = problem, mean_HD
        return fitted

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Weights [B, H, D]."""
        prefix.require(self.name, self.min_context, steps_H)
        problem, mean_HD = require_fitted(self.name, self._fit)
        problem.require_layout(self.name, prefix.layout)
        missing = next((step for step in steps_H if step not in problem.steps_H), None)
        if missing is not None:
            raise UsageError(
                f"{self.name} was fitted to forecast steps {', '.join(map(str, problem.steps_H))}; "
                f"step {missing} is not among them."
            )
        forecast_BHD = prefix.weights_BCD[:, -1:].repeat(1, len(steps_H), 1)
        stop = min(prefix.start + forecast_BHD.shape[-1], mean_HD.shape[-1])
        if stop > prefix.start:
            rows_H = [problem.steps_H.index(step) for step in steps_H]
            mean_HD = mean_HD[rows_H, prefix.start : stop].to(forecast_BHD.dtype)  # on the CPU: MPS has no float64
            own_BHD = forecast_BHD[..., : stop - prefix.start]
            own_BHD.copy_(own_BHD + mean_HD.to(own_BHD.device) if self.moved else mean_HD.expand_as(own_BHD))
        return forecast_BHD

    def tensors(self) -> dict[str, Tensor]:
        """The means, float64 [H, D]."""
        return {"mean": require_fitted(self.name, self._fit)[1]}

    @classmethod
    def restore(cls, config: Config, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from."""
        shape = (len(problem.steps_H), problem.coordinates)
        return cls(config)._with(problem, stored(cls.name, tensors, "mean", shape))


@final
class Mean(Climatology):
    """ŵ_h = mean over training runs of w_h, whatever the prefix shows.

    The yardstick for runs that start alike or converge to one point: on Gradient Flow Matching's
    synthetic task it beats most published figures (SCIENCE, section 7).

    Source: the climatological mean of forecast verification.
    """

    name = "mean"
    moved = False
    reference = "climatology: the training runs' mean weights at the target step"


@final
class Drift(Climatology):
    """ŵ_h = w_n + mean over training runs of (w_h − w_n).

    The yardstick for runs that go one way from wherever they are, as fine-tunings of one pretrained network do.

    Source: the drift method of forecasting (Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 5.2).
    Differs: the mean motion is that of other runs after w_n, not the run's own before.
    """

    name = "drift"
    moved = True
    reference = "climatology: w_n moved on by the training runs' mean motion"
