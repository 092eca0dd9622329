"""farcli's own forecaster: the best way we know for the runs at hand, and w_n where their like advise against any.

Shape suffixes: B runs of a block, R training runs, C snapshots, H horizons, D coordinates, S tensors, P unknowns.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor

from farcli.errors import FarcliError, UsageError
from farcli.forecasters.base import (
    Coupling,
    Known,
    Prefix,
    Problem,
    SolvedForecaster,
    Sums,
    require_fitted,
    require_future,
    stored,
)
from farcli.forecasters.identification import UNEXPLAINED, Experiment, Population, forecast, identify
from farcli.forecasters.intervals import quantile
from farcli.forecasters.lfd2 import Lfd2
from farcli.forecasters.update_rules import UpdateRule

_LARGEST = 4
"""Parameters up to which a loss is identified: a Hessian has half their square, and 15 took over twenty minutes."""
_LONGEST = 20_000
"""Updates up to which an optimiser is run on."""
_HALF, _BELIEF = 0.5, 0.25
"""Before the training runs speak, LFD-2's share of the average with identification: mean and standard deviation."""
_MARGIN = 3.0
"""Identified forecasts may leave the range of the training runs' targets by so many standard deviations."""


@final
class Runs(Sums):
    """The runs themselves, by position: rows of other parts are 0, so parts add up. For tiny networks."""

    def __init__(self, problem: Problem, lfd2: Sums) -> None:
        self.lfd2 = lfd2
        runs, size = problem.runs, problem.coordinates
        self.prefix_RCD = torch.zeros(runs, len(problem.steps_C), size, dtype=torch.float64)
        self.truth_RHD = torch.zeros(runs, len(problem.steps_H), size, dtype=torch.float64)
        self.rounding = 0.0

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        self.lfd2.add(prefix, truth_BHD)
        size, runs_B = self.prefix_RCD.shape[-1], list(prefix.runs_B)
        columns = slice(prefix.start, min(size, prefix.start + truth_BHD.shape[-1]))
        width = max(0, columns.stop - columns.start)
        self.prefix_RCD[runs_B, :, columns] = prefix.weights_BCD[..., :width].cpu().double()
        self.truth_RHD[runs_B, :, columns] = truth_BHD[..., :width].cpu().double()
        self.rounding = torch.finfo(truth_BHD.dtype).eps

    def merge(self, other: Any) -> None:
        """Take in another part's runs."""
        self.lfd2.merge(other.lfd2)
        self.prefix_RCD += other.prefix_RCD
        self.truth_RHD += other.truth_RHD
        self.rounding = max(self.rounding, other.rounding)

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return self.lfd2.finite


@dataclass(frozen=True, slots=True, kw_only=True)
class _Physics:
    """An identified population, its share of the average, and the bounds and intervals of forecasts.

    Attributes:
        experiment: the optimiser, and when weights were looked at.
        population: what runs have in common.
        share_H: LFD-2's share of the average.
        bounds_2HD: least and largest forecasts of the identified part.
        stretch_HD: half-width of the 90 % interval in predicted standard deviations.
    """

    experiment: Experiment
    population: Population
    share_H: Tensor
    bounds_2HD: Tensor
    stretch_HD: Tensor


@final
class Far(SolvedForecaster):
    """Optimiser-aware system identification where that can be, guarded LFD-2 otherwise, w_n where neither helps.

    method=identify: for at most 4 parameters, runs seen from step 0 and a known update rule. See `identification`:
    per run the quadratic loss is estimated whose known optimiser explains w_0 … w_n, and the optimiser is run on.
    Averaged with LFD-2; its share is ½ before, and after what the training runs, left out one by one, say.

    method=lfd2: for everything else the shared map of `lfd2` with ridge=loo, guard=true, intervals=true, with one map
    for all tensors or one for each, whichever forecasts runs left out better.

    Every horizon is judged on the training runs, each left out of its own forecast: where the squared error is not
    below that of keeping w_n, w_n is kept. `fit` says which these are.

    Source: ours; the parts' sources stand where they are.
    Differs: in leaving a run out of an identified population its moments are taken out, and the other runs'
    estimates stay as they are.
    """

    reference = "ours: optimiser-aware identification of tiny runs, guarded LFD-2 otherwise, w_n where neither helps"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        method: Literal["auto", "identify", "lfd2"] = field(
            default="auto", metadata={"help": "how to forecast; auto: identify where it can be done, else lfd2"}
        )
        optimizer: str = field(
            default="",
            metadata={"help": 'update rule of the training runs, "sgd lr=0.1 momentum=0.9"; empty: from the store'},
        )

        def __post_init__(self) -> None:
            if self.optimizer:
                UpdateRule.parse(self.optimizer)

    def __init__(self, config: Config) -> None:
        self._config = config
        self._problem: Problem | None = None
        self._lfd2: tuple[Lfd2, ...] = (_lfd2("none"), _lfd2("tensor"))
        """Candidates while fitting, the chosen one after."""
        self._physics: _Physics | None = None
        self._useful_H: Tensor | None = None
        self._reason = ""

    @property
    def config(self) -> Config:
        """The options; once prepared, with nothing left open."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Joint for identification, coordinate-wise for LFD-2."""
        return Coupling.JOINT if self._config.method == "identify" else Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """Whether it is LFD-2 with one map for all tensors."""
        return self._config.method != "identify" and len(self._lfd2) == 1 and self._lfd2[0].transferable

    @property
    def min_context(self) -> int:
        """w_0 and w_n."""
        return 2

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """All for identification, the first and the last for LFD-2."""
        require_future("far", self.min_context, steps_C, ())
        return tuple(steps_C) if self._config.method == "identify" else (steps_C[0], steps_C[-1])

    def prepared(self, problem: Problem, known: Known) -> Self:
        """Choose the method.

        Raises:
            UsageError: method = identify was asked for, but cannot be.
        """
        config = self._config
        if config.method == "lfd2":
            return self
        against, rule = "", None
        if problem.coordinates > _LARGEST:
            against = f"D = {problem.coordinates} parameters are more than {_LARGEST}"
        elif problem.steps_C[0] != 0:
            against = f"the context begins at step {problem.steps_C[0]}, where the optimiser's state is unknown"
        elif problem.steps_H[-1] > _LONGEST:
            against = f"step {problem.steps_H[-1]} is more than {_LONGEST} updates away"
        else:
            rule = UpdateRule.parse(config.optimizer) if config.optimizer else known.optimizer()
            if rule is None:
                against = "the stores name no update rule of constant rate that is known here"
        if rule is None and config.method == "identify":
            raise UsageError(
                f"far: method = identify cannot be: {against}.",
                'Leave method at auto, or name the rule: --set "optimizer=sgd lr=0.1".',
            )
        chosen = (
            replace(config, method="lfd2") if rule is None else replace(config, method="identify", optimizer=rule.text)
        )
        prepared = type(self)(chosen)
        prepared._reason = against or f"D = {problem.coordinates}, from step 0, by {rule.name if rule else ''}"
        return prepared

    def sums(self, problem: Problem) -> Sums:
        """Empty sums: those of LFD-2, and for identification the runs themselves."""
        require_future("far", self.min_context, problem.steps_C, problem.steps_H)
        with _named():
            sums = self._lfd2[0].sums(problem)
        first = len(self._lfd2) > 1
        return Runs(problem, sums) if first and self._config.method == "identify" else sums

    def solved(self, problem: Problem, sums: Any) -> Self:
        """The forecaster that the sums determine."""
        own = sums.lfd2 if isinstance(sums, Runs) else sums
        with _named():
            solved = [candidate.solved(problem, own) for candidate in self._lfd2]
        if len(solved) > 1:
            solved = [min(solved, key=_error_left_out)]
        fitted = type(self)(self._config)
        fitted._problem, fitted._reason, fitted._lfd2 = problem, self._reason, tuple(solved)
        left = solved[0].left_out
        assert left is not None
        fitted._useful_H = left.errors_RKH.sum((0, 1)) < left.persistence_RKH.sum((0, 1))
        if isinstance(sums, Runs):
            try:
                fitted._identify(problem, sums)
            except UNEXPLAINED as error:
                fitted._reason = f"identification failed ({error}), LFD-2 instead"
        return fitted

    def _identify(self, problem: Problem, sums: Runs) -> None:
        prefix_RCD, truth_RHD = sums.prefix_RCD, sums.truth_RHD
        moved = float((truth_RHD[:, -1] - prefix_RCD[:, 0]).square().mean().sqrt())
        rounding = sums.rounding * float(truth_RHD.square().mean().sqrt())
        experiment = self._experiment(problem, max(1e-9 * moved, rounding, 1e-30))
        found = identify(experiment, prefix_RCD, truth_RHD[:, -1])
        std_HD = truth_RHD.std(0, correction=0)
        bounds_2HD = torch.stack([truth_RHD.amin(0) - _MARGIN * std_HD, truth_RHD.amax(0) + _MARGIN * std_HD])
        ours_RHD, std_RHD = forecast(experiment, found.without_each(), prefix_RCD)
        ours_RHD = ours_RHD.clamp(*bounds_2HD)
        block = Prefix(
            weights_BCD=prefix_RCD,
            steps_C=problem.steps_C,
            layout=problem.layout,
            start=0,
            runs_B=tuple(range(problem.runs)),
        )
        theirs_RHD = self._lfd2[0].forecasts_left_out(block, problem.steps_H)
        share_H = _share(ours_RHD - truth_RHD, theirs_RHD - truth_RHD)
        error_RHD = ours_RHD + share_H[:, None] * (theirs_RHD - ours_RHD) - truth_RHD
        self._physics = _Physics(
            experiment=experiment,
            population=found.population,
            share_H=share_H,
            bounds_2HD=bounds_2HD,
            stretch_HD=quantile((error_RHD / std_RHD.clamp(min=experiment.precision)).flatten(1)).view_as(std_HD),
        )
        kept_RHD = prefix_RCD[:, -1:] - truth_RHD
        self._useful_H = error_RHD.square().sum((0, 2)) < kept_RHD.square().sum((0, 2))

    def _experiment(self, problem: Problem, precision: float) -> Experiment:
        return Experiment(
            rule=UpdateRule.parse(self._config.optimizer),
            seen=tuple(step - problem.steps_C[0] for step in problem.steps_C[1:]),
            targets=tuple(step - problem.steps_C[0] for step in problem.steps_H),
            precision=precision,
        )

    @property
    def unsettled(self) -> bool:
        """Whether LFD-2's intervals are yet to be calibrated."""
        return self._physics is None and len(self._lfd2) == 1 and self._lfd2[0].unsettled

    def notes(self) -> dict[str, str | float | list[float]]:
        """Which method and why; the steps at which w_n is kept; LFD-2's share."""
        problem, useful_H = require_fitted("far", self._problem), require_fitted("far", self._useful_H)
        kept = [step for step, useful in zip(problem.steps_H, useful_H.tolist(), strict=True) if not useful]
        found: dict[str, str | float | list[float]] = {
            "chosen": "identify" if self._physics else "lfd2",
            "because": self._reason,
            "keeps_w_n_at": [float(step) for step in kept],
        }
        if self._physics is not None:
            found["share_of_lfd2"] = self._physics.share_H.tolist()
        return found

    def coefficients(self) -> list[dict[str, str | int | float]]:
        """Those of LFD-2."""
        require_fitted("far", self._problem)
        return self._lfd2[0].coefficients()

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Weights [B, H, D]; w_n at steps where the training runs advise against a forecast."""
        rows_H = self._rows(prefix, steps_H)
        forecast_BHD = self._lfd2[0].forecast(prefix, steps_H)
        if self._physics is not None:
            ours_BHD, _ = self._identified(prefix, rows_H)
            share_H1 = self._physics.share_H[rows_H, None]
            mixed_BHD = ours_BHD + share_H1 * (forecast_BHD.cpu().double() - ours_BHD)
            forecast_BHD = mixed_BHD.to(forecast_BHD.dtype).to(forecast_BHD.device)
        keep_H11 = ~require_fitted("far", self._useful_H)[rows_H, None].to(forecast_BHD.device)
        return torch.where(keep_H11, prefix.weights_BCD[:, -1:], forecast_BHD)

    def half_width(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor | None:
        """Half of the 90 % interval; of the forecast that is not kept back where w_n is kept."""
        rows_H = self._rows(prefix, steps_H)
        if self._physics is None:
            return self._lfd2[0].half_width(prefix, steps_H)
        _, std_BHD = self._identified(prefix, rows_H)
        half_BHD = self._physics.stretch_HD[rows_H] * std_BHD.clamp(min=self._physics.experiment.precision)
        return half_BHD.to(prefix.weights_BCD.dtype).to(prefix.weights_BCD.device)

    def _identified(self, prefix: Prefix, rows_H: list[int]) -> tuple[Tensor, Tensor]:
        """Forecasts and their standard deviations, float64, on the CPU (MPS has no float64); w_n where they diverge."""
        physics = self._physics
        assert physics is not None
        prefix_BCD = prefix.weights_BCD.cpu().double()
        try:
            found_BHD, std_BHD = forecast(physics.experiment, physics.population, prefix_BCD)
        except UNEXPLAINED:
            found_BHD = prefix_BCD[:, -1:].expand(-1, len(physics.experiment.targets), -1)
            std_BHD = (physics.bounds_2HD[1] - physics.bounds_2HD[0]).expand_as(found_BHD)
        return found_BHD.clamp(*physics.bounds_2HD)[:, rows_H], std_BHD[:, rows_H]

    def _rows(self, prefix: Prefix, steps_H: Sequence[int]) -> list[int]:
        prefix.require("far", self.min_context, steps_H)
        problem = require_fitted("far", self._problem)
        if not self.transferable:
            problem.require_layout("far", prefix.layout)
        if self._physics is not None and prefix.steps_C != problem.steps_C:
            raise UsageError(
                f"far was fitted on snapshots at steps {', '.join(map(str, problem.steps_C))}, but this context has "
                f"{', '.join(map(str, prefix.steps_C))}: the optimiser's state is known from its start alone.",
                "Give the context it was fitted on, or fit with --set method=lfd2.",
            )
        shift = prefix.steps_C[-1] - problem.steps_C[-1]
        targets = [step + shift for step in problem.steps_H]
        missing = next((step for step in steps_H if step not in targets), None)
        if missing is not None:
            raise UsageError(
                f"far was fitted to forecast {', '.join(map(str, targets))} steps; step {missing} is not among them.",
                "Fit again with that step in --to.",
            )
        return [targets.index(step) for step in steps_H]

    def tensors(self) -> dict[str, Tensor]:
        """LFD-2's, the useful horizons, and what was identified."""
        useful_H = require_fitted("far", self._useful_H)
        found = {"useful": useful_H.double()} | {f"lfd2.{key}": value for key, value in self._lfd2[0].tensors().items()}
        if (physics := self._physics) is None:
            return found
        return found | {
            "mean": physics.population.mean_RP[0].contiguous(),
            "covariance": physics.population.covariance_RPP[0].contiguous(),
            "noise": physics.population.noise.contiguous(),
            "precision": torch.tensor([physics.experiment.precision], dtype=torch.float64),
            "share": physics.share_H.contiguous(),
            "bounds": physics.bounds_2HD.contiguous(),
            "stretch": physics.stretch_HD.contiguous(),
        }

    @classmethod
    def restore(cls, config: Config, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from."""
        fitted = cls(config)
        horizons, size = len(problem.steps_H), problem.coordinates
        fitted._problem = problem
        fitted._useful_H = stored("far", tensors, "useful", (horizons,)) > 0
        parts = {key.removeprefix("lfd2."): value for key, value in tensors.items() if key.startswith("lfd2.")}
        grouped = "delta" in parts and len(parts["delta"]) > 1
        inner = _lfd2("tensor" if grouped else "none", intervals="width" in parts)
        fitted._lfd2 = (type(inner).restore(inner.config, problem, parts),)
        if "mean" in tensors:
            unknowns = size + size * (size + 1) // 2
            fitted._physics = _Physics(
                experiment=fitted._experiment(problem, float(stored("far", tensors, "precision", (1,)))),
                population=Population(
                    mean_RP=stored("far", tensors, "mean", (unknowns,))[None],
                    covariance_RPP=stored("far", tensors, "covariance", (unknowns, unknowns))[None],
                    noise=stored("far", tensors, "noise", (2,)),
                ),
                share_H=stored("far", tensors, "share", (horizons,)),
                bounds_2HD=stored("far", tensors, "bounds", (2, horizons, size)),
                stretch_HD=stored("far", tensors, "stretch", (horizons, size)),
            )
        return fitted


def _lfd2(groups: Literal["none", "tensor"], *, intervals: bool = True) -> Lfd2:
    return Lfd2(Lfd2.Config(ridge="loo", guard=True, intervals=intervals, groups=groups))


def _error_left_out(candidate: Lfd2) -> float:
    assert candidate.left_out is not None
    return float(candidate.left_out.errors_RKH.sum())


def _share(ours_RHD: Tensor, theirs_RHD: Tensor) -> Tensor:
    """LFD-2's share of the average of two forecasts with these errors, [H]: the most probable one in [0, 1].

    The best share is a regression on the difference of the errors; its own uncertainty is weighed against a
    belief in equal parts, since runs are few: on SCIENCE's protocol D2 the least squares alone did worse.
    """
    between_RHD = ours_RHD - theirs_RHD
    square_H = between_RHD.square().sum((0, 2)).clamp(min=1e-300)
    best_H = (ours_RHD * between_RHD).sum((0, 2)) / square_H
    residual_RHD = ours_RHD - best_H[:, None] * between_RHD
    variance_H = (residual_RHD.square().mean((0, 2)) / square_H).clamp(min=1e-300)
    weight_H, belief = 1 / variance_H, 1 / _BELIEF**2
    return ((weight_H * best_H + belief * _HALF) / (weight_H + belief)).clamp(0, 1)


@contextmanager
def _named() -> Iterator[None]:
    """Within it, errors of a part are said in our name."""
    try:
        yield
    except FarcliError as error:
        raise type(error)(f"far: {error}", error.hint) from error
