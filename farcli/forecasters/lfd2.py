"""LFD-2: future weights as a linear map of the first and the last observed ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, final

import numpy as np
import torch
from torch import Tensor

from farcli.errors import UsageError
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
from farcli.forecasters.leave_one_out import LeftOut
from farcli.forecasters.lfd2_dense import DenseMap, GramSums, RowSums, solve_gram, solve_rows, use_rows
from farcli.forecasters.lfd2_guard import Guard
from farcli.forecasters.lfd2_shared import ResidualSums, SharedFit, SharedOptions, SquaredSums, WeightedSums
from farcli.layout import Segment

_TILE = 1 << 18
"""Numbers a forecast works on at once, so that they are used again from the cache."""


@final
class Lfd2(SolvedForecaster):
    """ŵ_h = a_h w_0 + b_h w_n + c_h, fitted for each horizon h on other runs.

    The shared map has the same a, b, c for every coordinate; the dense map has matrices in their place.
    A fitted map applies from any start: what counts is steps ahead, and the steps from w_0 to w_n.

    L = L_pred + β·L_grad. L_pred is Σ r² (or Σ |r|) over runs, coordinates and horizons, relative to
    persistence's; L_grad = mean over runs of Σ_j max(u_{j+1} − u_j, 0) with u_j = ‖ŵ_j − ŵ_{j−1}‖, ŵ_0 = w_n,
    in units of the root mean square displacement y − w_n.

    Source: "farcasting", arXiv 2505.02714: X·A + b = Y on the columns {w_0, w_n}; L_pred + β·L_grad.
    Differs: the paper trains by gradient on L1; the squared loss here is solved exactly in one pass, L1 by
    reweighting over a few. The paper's exact L_grad, β and sampling could not be found: ours is the hinge
    above over whole vectors and all runs, exact through Gram matrices instead of sampled mini-batches;
    u_j is per step, so that unequal intervals are right; both terms are free of units, so that one β
    means the same for every network.
    """

    reference = "LFD-2, farcasting (arXiv 2505.02714), solved in closed form"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        map: Literal["shared", "dense"] = field(
            default="shared",
            metadata={"help": "shared: one map for all coordinates, any D; dense: a (2D+1)→D map of the whole vector"},
        )
        loss: Literal["squared", "l1"] = field(
            default="squared", metadata={"help": "squared: exact, in one pass; l1: reweighted, in several passes"}
        )
        beta: float = field(
            default=0.0, metadata={"help": "weight of the gradient-decay loss: a hinge on updates that grow"}
        )
        scale: Literal["none", "tensor"] = field(
            default="none",
            metadata={"help": "tensor: measure errors in each tensor's own motion, so that large ones do not dominate"},
        )
        groups: Literal["none", "tensor"] = field(
            default="none", metadata={"help": "tensor: coefficients of its own for each tensor"}
        )
        bias: bool = field(default=True, metadata={"help": "whether the map has a constant term"})
        ridge: float | Literal["loo"] = field(
            default=1e-12,
            metadata={
                "help": "penalty relative to each centred column's sum of squares; the default stands just above "
                "the rounding of the sums, so that only directions the data leave open feel it; loo: of 1e-5 to 100 "
                "the one that forecasts training runs best which are left out, for each group and horizon"
            },
        )
        guard: bool = field(
            default=False,
            metadata={"help": "clip prefixes to 1.3 times the training runs' range, forecasts to theirs ± .75 std"},
        )
        intervals: bool = field(
            default=False,
            metadata={"help": "90 % intervals, calibrated on training runs left out; takes a second pass"},
        )
        max_passes: int = field(default=50, metadata={"help": "passes over the data at most, for l1"})
        tolerance: float = field(
            default=1e-6, metadata={"help": "relative gain in the l1 loss below which passes stop"}
        )

        def __post_init__(self) -> None:
            for name in ("beta", *(["ridge"] if self.ridge != "loo" else []), "tolerance"):
                if not 0 <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} = {getattr(self, name)}, expected a finite number of 0 or more.")
            if self.max_passes < 1:
                raise ValueError(f"max_passes = {self.max_passes}, expected 1 or more.")
            if self.map == "dense":
                given = {"loss": self.loss != "squared", "beta": self.beta != 0}
                given |= {"scale": self.scale != "none", "groups": self.groups != "none"}
                given |= {"guard": self.guard, "intervals": self.intervals}
                for name, differs in given.items():
                    if differs:
                        raise ValueError(f"{name} = {getattr(self, name)} is for map = shared; map is dense.")
            elif self.loss != "squared" or self.beta:
                for name, differs in (("ridge", self.ridge == "loo"), ("intervals", self.intervals)):
                    if differs:
                        raise ValueError(f"{name} = {getattr(self, name)} is for loss = squared and beta = 0.")

    def __init__(self, config: Config) -> None:
        self._config = config
        self._problem: Problem | None = None
        self._delta_K3H: Tensor | None = None
        self._dense: DenseMap | None = None
        self._fit: SharedFit | None = None
        self._guard: Guard | None = None
        self._width_SH: Tensor | None = None

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Coordinate-wise for the shared map, joint for the dense one."""
        return Coupling.JOINT if self._config.map == "dense" else Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """Whether the map has no coefficients bound to a tensor or coordinate."""
        return self._config.map == "shared" and not self._options.bound

    @property
    def min_context(self) -> int:
        """w_0 and w_n."""
        return 2

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The first and the last."""
        require_future("lfd2", self.min_context, steps_C, ())
        return (steps_C[0], steps_C[-1])

    @property
    def _options(self) -> SharedOptions:
        config = self._config
        return SharedOptions(
            l1=config.loss == "l1",
            beta=config.beta,
            scaled=config.scale == "tensor",
            grouped=config.groups == "tensor",
            bias=config.bias,
            ridge=None if config.ridge == "loo" else float(config.ridge),
            max_passes=config.max_passes,
            tolerance=config.tolerance,
            guarded=config.guard,
            intervals=config.intervals,
        )

    def sums(self, problem: Problem) -> Sums:
        """Empty sums for one pass: squared at first, then reweighted by the residuals where the loss is L1."""
        require_future("lfd2", self.min_context, problem.steps_C, problem.steps_H)
        assert list(problem.steps_H) == sorted(set(problem.steps_H)), "steps_H increase"
        if self._config.beta and len(problem.steps_H) < 2:
            raise UsageError(
                f"lfd2: beta = {self._config.beta} needs at least 2 target steps, found 1: "
                "it compares each update with the one before.",
                "Add target steps with --to, or leave beta at 0.",
            )
        if self._config.map == "dense":
            by_rows = use_rows(problem, required=self._config.ridge == "loo")
            return RowSums(problem) if by_rows else GramSums(problem)
        if self._fit:
            return self._fit.sums()
        return SquaredSums(problem, absolute=self._options.l1, ranges=self._options.guarded)

    def solved(self, problem: Problem, sums: Any) -> Self:
        """The forecaster that the sums determine."""
        fitted = type(self)(self._config)
        fitted._problem = problem
        ridge, bias = self._options.ridge, self._config.bias
        match sums:
            case GramSums():
                assert ridge is not None
                fitted._dense = solve_gram(sums, problem, ridge=ridge, bias=bias)
            case RowSums():
                fitted._dense = solve_rows(sums, problem, ridge=ridge, bias=bias)
            case SquaredSums():
                fitted._fit = SharedFit(self._options, problem, sums)
            case WeightedSums():
                assert self._fit is not None
                fitted._fit = self._fit.reweighted(sums)
            case ResidualSums():
                assert self._fit is not None
                fitted._fit = self._fit.calibrated(sums)
            case _:
                raise AssertionError(f"not sums of lfd2: {type(sums).__name__}")
        if fitted._fit:
            fitted._delta_K3H, fitted._width_SH = fitted._fit.delta_K3H, fitted._fit.width_SH
            if fitted._fit.ranges is not None:
                fitted._guard = Guard.of(fitted._fit.ranges, pooled=self.transferable)
        return fitted

    @property
    def unsettled(self) -> bool:
        """Whether another pass would lower the L1 loss, or calibrate intervals."""
        return self._fit is not None and self._fit.unsettled

    @property
    def update_growth(self) -> float | None:
        """L_grad of the shared map just fitted, over the training runs; None where it was not computed."""
        return self._fit.growth() if self._fit else None

    @property
    def left_out(self) -> LeftOut | None:
        """What the shared map just fitted says of training runs left out; None where that was not asked for."""
        return self._fit.left if self._fit else None

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Apply the map: [B, H, D]."""
        prefix.require("lfd2", self.min_context, steps_H)
        problem = require_fitted("lfd2", self._problem)
        rows_H = _rows(problem, prefix.steps_C, steps_H)
        if not self.transferable:
            problem.require_layout("lfd2", prefix.layout)
        if self._dense is not None:
            return self._dense.forecast(prefix, rows_H, len(problem.steps_H))
        delta_K3H = require_fitted("lfd2", self._delta_K3H)
        first_BD, last_BD = prefix.weights_BCD[:, 0], prefix.weights_BCD[:, -1]
        runs, size = last_BD.shape
        forecast_BHD = last_BD.new_empty((runs, len(rows_H), size))
        parts = [Segment(slot=0, start=0, stop=size)] if self.transferable else prefix.segments
        width = max(1, _TILE // (runs * (len(rows_H) + 3)))
        for part in parts:
            map_3H = delta_K3H[part.slot][:, rows_H]
            # Cast on the CPU: MPS has no float64.
            linear_H2 = map_3H[:2].T.to(last_BD.dtype).to(last_BD.device)
            constant_H1 = map_3H[2, :, None].to(last_BD.dtype).to(last_BD.device)
            for start in range(part.start, part.stop, width):
                columns = slice(start, min(start + width, part.stop))
                first_BN, last_BN, out_BHN = first_BD[:, columns], last_BD[:, columns], forecast_BHD[..., columns]
                if self._guard is not None:
                    first_BN, last_BN = self._guard.features(part.slot, first_BN, last_BN)
                apply = _apply_on_cpu if last_BD.device.type == "cpu" else _apply
                apply(linear_H2, constant_H1, first_BN, last_BN, out_BHN)
                if self._guard is not None:
                    self._guard.forecasts(part.slot, rows_H, out_BHN)
        return forecast_BHD

    def forecasts_left_out(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """What maps fitted without them say of the training runs, in their order, just after the fit: [R, H, D]."""
        problem, fit = require_fitted("lfd2", self._problem), require_fitted("lfd2", self._fit)
        rows_H = _rows(problem, prefix.steps_C, steps_H)
        first_BD, last_BD = prefix.weights_BCD[:, 0].double(), prefix.weights_BCD[:, -1].double()
        basis_B3D = torch.stack([first_BD, last_BD - first_BD, torch.ones_like(first_BD)], dim=1)
        without_RK3H = fit.without_each()[list(prefix.runs_B)][..., rows_H]
        parts = [
            without_RK3H[:, min(part.slot, without_RK3H.shape[1] - 1)].mT @ basis_B3D[..., part.start : part.stop]
            for part in prefix.segments
        ]
        return torch.cat(parts, dim=-1) + last_BD[:, None]

    def half_width(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor | None:
        """Half of the 90 % interval, the same for all coordinates of a tensor; None on another network."""
        problem = require_fitted("lfd2", self._problem)
        if self._width_SH is None or prefix.layout != problem.layout:
            return None
        width_HS = self._width_SH[:, _rows(problem, prefix.steps_C, steps_H)].T.to(prefix.weights_BCD.dtype)
        parts = [width_HS[:, part.slot, None].expand(-1, part.stop - part.start) for part in prefix.segments]
        return torch.cat(parts, dim=-1).to(prefix.weights_BCD.device).expand(len(prefix.runs_B), -1, -1)

    def coefficients(self) -> list[dict[str, str | int | float]]:
        """Per horizon (and tensor, where they differ): a, b, c, beside the straight line's −j/n and 1 + j/n."""
        problem = require_fitted("lfd2", self._problem)
        if self._delta_K3H is None:
            return []
        span = problem.steps_C[-1] - problem.steps_C[0]
        names = ["all"] if self.transferable else [slot.name for slot in problem.layout.floats]
        rows: list[dict[str, str | int | float]] = []
        for group, name in enumerate(names):
            for h, step in enumerate(problem.steps_H):
                on_first, on_moved, constant = self._delta_K3H[group, :, h].tolist()
                ahead = step - problem.steps_C[-1]
                rows.append(
                    {
                        "tensor": name,
                        "step": step,
                        "ahead": ahead,
                        "a": on_first - on_moved,
                        "b": 1 + on_moved,
                        "c": constant,
                        "line_a": -ahead / span,
                        "line_b": 1 + ahead / span,
                    }
                )
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """Coefficients of w_0, w_n − w_0 and 1 in ŵ_h − w_n, float64 [1 or tensors, 3, H]; or the dense map."""
        if self._dense is not None:
            return self._dense.tensors()
        found = {"delta": require_fitted("lfd2", self._delta_K3H)}
        if self._guard is not None:
            found |= self._guard.tensors()
        return found if self._width_SH is None else {**found, "width": self._width_SH}

    @classmethod
    def restore(cls, config: Config, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from."""
        fitted = cls(config)
        fitted._problem = problem
        if config.map == "dense":
            fitted._dense = DenseMap.restore(problem, tensors)
        else:
            groups = 1 if fitted.transferable else len(problem.layout.floats)
            horizons = len(problem.steps_H)
            fitted._delta_K3H = stored("lfd2", tensors, "delta", (groups, 3, horizons))
            if config.guard:
                fitted._guard = Guard.restore(groups, horizons, tensors)
            if config.intervals:
                fitted._width_SH = stored("lfd2", tensors, "width", (len(problem.layout.floats), horizons))
        return fitted


def _apply(linear_H2: Tensor, constant_H1: Tensor, first_BN: Tensor, last_BN: Tensor, out_BHN: Tensor) -> None:
    basis_B2N = torch.stack([first_BN, last_BN - first_BN], dim=1)
    # w_n comes last: added first, it would round off the digits of small displacements.
    displaced_BHN = torch.bmm(linear_H2.expand(len(first_BN), -1, -1), basis_B2N).add_(constant_H1)
    torch.add(displaced_BHN, last_BN[:, None], out=out_BHN)


def _apply_on_cpu(linear_H2: Tensor, constant_H1: Tensor, first_BN: Tensor, last_BN: Tensor, out_BHN: Tensor) -> None:
    """The same through numpy: torch would start threads for each tile, which stand in the reader's and writer's way."""
    first, last = first_BN.numpy(), last_BN.numpy()
    displaced_BHN = np.matmul(linear_H2.numpy(), np.stack([first, last - first], axis=1))
    displaced_BHN += constant_H1.numpy()
    np.add(displaced_BHN, last[:, None], out=out_BHN.numpy())


def _rows(problem: Problem, steps_C: Sequence[int], steps_H: Sequence[int]) -> list[int]:
    """Which fitted horizons the steps are, counted from the last observed step."""
    span, fitted_span = steps_C[-1] - steps_C[0], problem.steps_C[-1] - problem.steps_C[0]
    if span != fitted_span:
        raise UsageError(
            f"lfd2 was fitted on a context of {fitted_span} steps ({problem.steps_C[0]} to {problem.steps_C[-1]}), "
            f"but this one spans {span} ({steps_C[0]} to {steps_C[-1]}).",
            "Give a context of the same length, or fit again.",
        )
    shift = steps_C[-1] - problem.steps_C[-1]
    fitted = [step + shift for step in problem.steps_H]
    for step in steps_H:
        if step not in fitted:
            raise UsageError(
                f"lfd2 was fitted to forecast {_listed(fitted)} steps; step {step} is not among them.",
                "Fit again with that step in --to.",
            )
    return [fitted.index(step) for step in steps_H]


def _listed(steps: Sequence[int]) -> str:
    if len(steps) <= 5:
        return ", ".join(map(str, steps))
    return f"{steps[0]}, {steps[1]}, …, {steps[-1]}"
