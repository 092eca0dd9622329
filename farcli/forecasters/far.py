"""farcli's own forecaster: the best way we know for the runs at hand, and w_n where their like advise against any.

Shape suffixes: B runs of a block, R training runs, C snapshots, H horizons, D coordinates, S tensors, P unknowns.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, final

import torch
from torch import Tensor

from farcli.errors import FarcliError, UsageError
from farcli.forecasters import noiseless
from farcli.forecasters.base import (
    Coupling,
    Known,
    Prefix,
    Problem,
    SolvedForecaster,
    Sums,
    TrainingLoss,
    require_fitted,
    require_future,
    stored,
)
from farcli.forecasters.identification import (
    UNEXPLAINED,
    Experiment,
    Population,
    forecast,
    forecast_left_out,
    identify,
)
from farcli.forecasters.intervals import CountedErrors, quantile
from farcli.forecasters.leave_one_out import LeftOut, require_runs
from farcli.forecasters.lfd2 import Lfd2
from farcli.forecasters.loss_lfd import LossLfd, PrefixRows, believed
from farcli.forecasters.mean import Mean
from farcli.forecasters.update_rules import UpdateRule

_LARGEST = 4
"""Parameters up to which a loss is identified: a Hessian has half their square, and 15 took over twenty minutes."""
_LONGEST = 20_000
"""Updates up to which an optimiser is run on."""
_HALF, _BELIEF = 0.5, 0.25
"""Before the training runs speak, LFD-2's share of the average with identification: mean and standard deviation."""
_BELIEF_ALONE = 0.5
"""That standard deviation where w_0 is all that is seen, and the train mean stands in LFD-2's place."""
_MARGIN = 3.0
"""Identified forecasts may leave the range of the training runs' targets by so many standard deviations."""
_LARGEST_BY_LOSS = 1_000_000
"""Parameters up to which forecasts are judged, and leaps fitted, on training loss where that was not asked for: it
takes thousands of forward passes."""
_PART = 1 << 20
"""Coordinates forecast at once where forecasts are judged: LFD-2 takes them in float64."""
_KEEP, _LFD2, _LEAP = 0, 1, 2
"""What may be forecast at a horizon."""
_EXACT, _MOST_UNEXPLAINED = 0.01, 0.1
"""Training is free of noise where quadratics pass through all but so many training runs, and forecast their targets
with less than this part of LFD-2's squared error."""


@final
class Runs(Sums):
    """The runs themselves, by position: rows of other parts are 0, so parts add up. For tiny networks."""

    def __init__(self, problem: Problem, plain: Sums) -> None:
        self.plain = plain
        runs, size = problem.runs, problem.coordinates
        self.prefix_RCD = torch.zeros(runs, len(problem.steps_C), size, dtype=torch.float64)
        self.truth_RHD = torch.zeros(runs, len(problem.steps_H), size, dtype=torch.float64)
        self.rounding = 0.0

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        self.plain.add(prefix, truth_BHD)
        size, runs_B = self.prefix_RCD.shape[-1], list(prefix.runs_B)
        columns = slice(prefix.start, min(size, prefix.start + truth_BHD.shape[-1]))
        width = max(0, columns.stop - columns.start)
        self.prefix_RCD[runs_B, :, columns] = prefix.weights_BCD[..., :width].cpu().double()
        self.truth_RHD[runs_B, :, columns] = truth_BHD[..., :width].cpu().double()
        self.rounding = torch.finfo(truth_BHD.dtype).eps

    def merge(self, other: Any) -> None:
        """Take in another part's runs."""
        self.plain.merge(other.plain)
        self.prefix_RCD += other.prefix_RCD
        self.truth_RHD += other.truth_RHD
        self.rounding = max(self.rounding, other.rounding)

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return self.plain.finite


@final
class Rows(Sums):
    """LFD-2's sums of a pass; of the first one also what leaps start from, of the second one how far they are off."""

    def __init__(
        self,
        plain: Sums,
        rows: PrefixRows | None = None,
        leapt: "LeapErrors | None" = None,
        kept: "KeptErrors | None" = None,
    ) -> None:
        self.plain, self.rows, self.leapt, self.kept = plain, rows, leapt, kept
        self._parts = [part for part in (plain, rows, leapt, kept) if part is not None]

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        for part in self._parts:
            part.add(prefix, truth_BHD)

    def merge(self, other: Any) -> None:
        """Take in another part's."""
        for own, theirs in zip(self._parts, other._parts, strict=True):
            own.merge(theirs)

    @property
    def finite(self) -> bool:
        """Whether all of it is finite."""
        return all(part.finite for part in self._parts)


class ScaledErrors(CountedErrors):
    """How large errors on training runs are, in units of a scale of each tensor."""

    def __init__(self, problem: Problem, scale_S: Tensor) -> None:
        super().__init__(len(scale_S), len(problem.steps_H))
        self._coordinates, self._scale_S = problem.coordinates, scale_S

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        start, stop = prefix.start, min(prefix.start + truth_BHD.shape[-1], self._coordinates)
        if stop <= start:
            return  # buffers are not forecast
        for row in range(len(truth_BHD)):
            error_HD = truth_BHD[row, :, : stop - start].cpu() - self.forecast(prefix, row, stop)
            for segment in prefix.layout.segments(start, stop):
                error_HN = error_HD[:, segment.start : segment.stop] / self._scale_S[segment.slot]
                self.counts.add(segment.slot, error_HN[None])

    @abstractmethod
    def forecast(self, prefix: Prefix, row: int, stop: int) -> Tensor:
        """Of one run of a block, of the coordinates up to `stop`: [D], on the CPU."""


@final
class LeapErrors(ScaledErrors):
    """Of leaps fitted without a run, on that run."""

    def __init__(self, problem: Problem, scale_S: Tensor, leap: LossLfd, rows: PrefixRows) -> None:
        super().__init__(problem, scale_S)
        self._leap, self._rows = leap, rows

    def forecast(self, prefix: Prefix, row: int, stop: int) -> Tensor:
        """The leap."""
        return self._leap.leapt_without(self._rows, prefix.runs_B[row], prefix.start, stop)


@final
class KeptErrors(ScaledErrors):
    """Of keeping w_n."""

    def forecast(self, prefix: Prefix, row: int, stop: int) -> Tensor:
        """w_n."""
        return prefix.weights_BCD[row, -1, : stop - prefix.start].cpu()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What the intervals need where w_n is kept by its loss.

    Attributes:
        scale_S: how far each tensor moved in the prefix.
        width_SH: half-widths of 90 % intervals; None until calibrated.
    """

    scale_S: Tensor
    width_SH: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leap:
    """A leap fitted on loss, and what its intervals need.

    Attributes:
        forecaster: the leap.
        rows: the training runs' snapshots, while fitting.
        scale_S: how far each tensor moved in the prefix.
        width_SH: half-widths of 90 % intervals; None until calibrated.
    """

    forecaster: LossLfd
    rows: PrefixRows | None
    scale_S: Tensor
    width_SH: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Physics:
    """An identified population, its share of the average, and the bounds and intervals of forecasts.

    Attributes:
        experiment: the optimiser, and when weights were looked at.
        population: what runs have in common; None where training has no noise and each run says all by itself.
        share_H: share of LFD-2, or of the train mean, in the average.
        bounds_2HD: least and largest forecasts of the identified part.
        stretch_HD: half-width of the 90 % interval in predicted standard deviations.
    """

    experiment: Experiment
    population: Population | None
    share_H: Tensor
    bounds_2HD: Tensor
    stretch_HD: Tensor


@final
class Far(SolvedForecaster):
    """Optimiser-aware system identification where that can be, guarded LFD-2 otherwise, w_n where neither helps.

    method=identify: for at most 4 parameters, runs seen from step 0 and a known update rule. See `identification`:
    per run the quadratic loss is estimated whose known optimiser explains w_0 … w_n, and the optimiser is run on.
    Averaged with LFD-2; its share is ½ before, and after what the training runs, left out one by one, say. Where
    training has no noise (full batch) the equations are solved instead: see `noiseless`. A new run that has no
    solution is forecast by LFD-2. Where w_0 is all that is seen, the optimiser is run on quadratics drawn from what
    runs have in common, and the train mean stands in LFD-2's place.

    method=lfd2: for everything else the shared map of `lfd2` with ridge=loo, guard=true, intervals=true, with one map
    for all tensors or one for each, whichever forecasts runs left out better.

    method=loss: where the runs' loss can be computed, for at most 1,000,000 parameters unless asked for: that map, or
    the leap of `loss-lfd` (or the plain drift or an average where that gains more), at each horizon the one that lowers
    the loss of runs left out more, on data that were held back from training where the workload holds any back, else
    on training data.

    Every horizon is judged on the training runs, each left out of its own forecast, by loss with method=loss and by
    squared error otherwise: where that is not below that of keeping w_n, w_n is kept. By loss it must be so by one
    standard error and for 95 % of the runs, or by two standard errors. `fit` says at which horizons w_n is kept.

    Source: ours; the parts' sources stand where they are.
    Differs: in leaving a run out of an identified population its moments are taken out; the other runs' estimates, the
    noise, the first guess and the bounds, which saw it, stay as they are. From w_0 alone, with 10 training runs and
    fewer, that would make errors on runs left out too small: there the others are identified anew without each.
    """

    reference = "ours: optimiser-aware identification of tiny runs, guarded LFD-2 otherwise, w_n where neither helps"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        method: Literal["auto", "identify", "loss", "lfd2"] = field(
            default="auto",
            metadata={
                "help": "how to forecast; auto: identify where it can be done, else loss where that can, else lfd2"
            },
        )
        optimizer: str = field(
            default="",
            metadata={"help": 'update rule of the training runs, "sgd lr=0.1 momentum=0.9"; empty: from the store'},
        )
        updates: int = field(default=200, metadata={"help": "updates of each fit of a leap, with method=loss"})
        lr: float = field(
            default=0.05, metadata={"help": "learning rate of these fits, see loss-lfd; with fewer updates raise it"}
        )
        trends: bool = field(
            default=True,
            metadata={
                "help": "whether leaps take averages and slopes of contexts of 7 snapshots and more, see loss-lfd"
            },
        )

        def __post_init__(self) -> None:
            if self.optimizer:
                UpdateRule.parse(self.optimizer)
            LossLfd.Config(updates=self.updates, lr=self.lr)  # says what is wrong with them

    def __init__(self, config: Config) -> None:
        self._config = config
        self._problem: Problem | None = None
        self._plain: tuple[Lfd2 | Mean, ...] = (_lfd2("none"), _lfd2("tensor"))
        """What knows no optimiser and no loss: candidates while fitting, the chosen one after."""
        self._physics: _Physics | None = None
        self._loss: TrainingLoss | None = None
        self._leap: _Leap | None = None
        self._kept: _Kept | None = None
        self._leaps_coupling = Coupling.COORDINATEWISE
        self._choice_H: Tensor | None = None
        self._width_HD: Tensor | None = None
        """Half-widths of 90 % intervals of the train mean."""
        self._reason = ""

    @property
    def config(self) -> Config:
        """The options; once prepared, with nothing left open."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Joint for identification, coordinate-wise for LFD-2, as they are for leaps."""
        if self._leap is not None:
            return self._leap.forecaster.coupling
        return Coupling.JOINT if self._config.method == "identify" else self._leaps_coupling

    @property
    def transferable(self) -> bool:
        """Whether it is LFD-2 with one map for all tensors."""
        return self._config.method == "lfd2" and len(self._plain) == 1 and self._plain[0].transferable

    @property
    def min_context(self) -> int:
        """w_0 to identify, and w_n for LFD-2; w_{n−1} and w_{n−2} too where leaps are fitted on loss."""
        return {"lfd2": 2, "loss": 3}.get(self._config.method, 1)

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """All for identification, those of `loss-lfd` for leaps, the first and the last for LFD-2."""
        require_future("far", self.min_context, steps_C, ())
        match self._config.method:
            case "identify":
                return tuple(steps_C)
            case "loss":
                return self._leaps.observed(steps_C)
            case _:
                return tuple(sorted({steps_C[0], steps_C[-1]}))

    @property
    def _plain_name(self) -> str:
        return "mean" if isinstance(self._plain[0], Mean) else "lfd2"

    @property
    def _leaps(self) -> LossLfd:
        return LossLfd(LossLfd.Config(updates=self._config.updates, lr=self._config.lr, trends=self._config.trends))

    def prepared(self, problem: Problem, known: Known) -> Self:
        """Choose the method.

        Raises:
            UsageError: too few runs to leave one out; identification was asked for, or is all that could be, but
                cannot.
        """
        config = self._config
        require_runs("far", problem.runs)
        if config.method == "lfd2":
            asked = type(self)(config)
            asked._reason = "asked for"
            return asked
        against, rule = "", None
        if problem.coordinates > _LARGEST:
            against = f"D = {problem.coordinates} parameters are more than {_LARGEST}"
        elif problem.steps_C[0] != 0:
            against = f"the context begins at step {problem.steps_C[0]}, where the optimiser's state is unknown"
        elif problem.steps_H[-1] > _LONGEST:
            against = f"step {problem.steps_H[-1]} is more than {_LONGEST} updates away"
        else:
            rule = UpdateRule.parse(config.optimizer) if config.optimizer else known.optimizer()
            if config.method == "loss":
                rule, against = None, "asked to judge by loss"
            elif rule is None:
                against = "the stores name no update rule of constant rate that is known here"
        if rule is None and config.method == "identify":
            raise UsageError(
                f"far: method = identify cannot be: {against}.",
                'Leave method at auto, or name the rule: --set "optimizer=sgd lr=0.1".',
            )
        prepared = type(self)(replace(config, method="identify", optimizer=rule.text) if rule else config)
        prepared._reason = against or f"D = {problem.coordinates}, from step 0, by {rule.name if rule else ''}"
        alone = len(problem.steps_C) == 1
        if rule is None and alone:
            raise UsageError(
                f"far: from a single snapshot nothing but identification forecasts, which cannot be: {against}.",
                'Give a --context of 2 or more; where only the rule is missing, name it: --set "optimizer=sgd lr=0.1".',
            )
        if rule is None:
            prepared._take_loss(problem, known)
        elif alone:
            prepared._plain = (Mean(Mean.Config()),)
        return prepared

    def _take_loss(self, problem: Problem, known: Known) -> None:
        """Judge by loss where that can be; LFD-2 by its weights otherwise.

        Raises:
            UsageError: method = loss was asked for, but cannot be.
        """
        against = ""
        if self._config.method == "auto" and problem.coordinates > _LARGEST_BY_LOSS:
            against = f"D = {problem.coordinates} parameters are more than {_LARGEST_BY_LOSS}"
        elif len(problem.steps_C) < self._leaps.min_context:
            against = f"a context of {len(problem.steps_C)} snapshots is too short for leaps"
        else:
            try:
                PrefixRows.require_room(replace(problem, steps_C=self._leaps.observed(problem.steps_C)))
                self._loss = known.loss()
                against = "" if self._loss else "the stores name no workload"
            except FarcliError as error:
                against = str(error).removesuffix(".")
        if against and self._config.method == "loss":
            raise UsageError(f"far: method = loss cannot be: {against}.", "Leave method at auto.")
        self._config = replace(self._config, method="lfd2" if against else "loss")
        if not against:
            self._leaps_coupling = self._leaps.coupling_in(problem.steps_C)
        self._reason += f"; not by loss: {against}" if against else "; judged by loss"

    def sums(self, problem: Problem) -> Sums:
        """Empty sums: those of LFD-2; for identification the runs themselves, for leaps what they start from."""
        require_future("far", self.min_context, problem.steps_C, problem.steps_H)
        with _named():
            sums = self._plain[0].sums(problem)
        first = self._problem is None
        method, leap = self._config.method, self._leap
        if method == "identify" and first:
            return Runs(problem, sums)
        if method == "loss" and first:
            return Rows(sums, PrefixRows(problem))
        leapt = LeapErrors(problem, leap.scale_S, leap.forecaster, leap.rows) if leap and leap.rows else None
        kept = KeptErrors(problem, self._kept.scale_S) if self._kept else None
        return Rows(sums, leapt=leapt, kept=kept) if leapt or kept else sums

    def solved(self, problem: Problem, sums: Any) -> Self:
        """The forecaster that the sums determine."""
        own: Any = sums.plain if isinstance(sums, Runs | Rows) else sums
        with _named():
            solved: list[Lfd2 | Mean] = [candidate.solved(problem, own) for candidate in self._plain]
        if len(solved) > 1:
            solved = [min(solved, key=lambda candidate: float(_left_out(candidate).errors_RKH.sum()))]
        plain = solved[0]
        fitted = type(self)(self._config)
        fitted._problem, fitted._reason, fitted._plain = problem, self._reason, (plain,)
        fitted._leap, fitted._kept = self._leap, self._kept
        if self._choice_H is not None:
            fitted._choice_H = self._choice_H
        elif isinstance(plain, Lfd2):
            left = _left_out(plain)
            useful_H = left.errors_RKH.sum((0, 1)) < left.persistence_RKH.sum((0, 1))
            fitted._choice_H = torch.where(useful_H, _LFD2, _KEEP)
        if isinstance(sums, Runs):
            try:
                fitted._identify(problem, sums)
            except UNEXPLAINED as error:
                instead = "the train mean" if isinstance(plain, Mean) else "LFD-2"
                why = str(error) if isinstance(error, ArithmeticError) else "no quadratic explains the runs"
                fitted._reason = f"identification failed ({why}), {instead} instead"
        elif isinstance(sums, Rows):
            if sums.rows is not None:
                fitted._judge(problem, sums.rows, require_fitted("far", self._loss))
            if sums.leapt is not None and (leap := self._leap) is not None:
                width_SH = sums.leapt.counts.quantile() * leap.scale_S[:, None]
                fitted._leap = replace(leap, rows=None, width_SH=width_SH)
            if sums.kept is not None and (kept := self._kept) is not None:
                fitted._kept = replace(kept, width_SH=sums.kept.counts.quantile() * kept.scale_S[:, None])
        return fitted

    def _judge(self, problem: Problem, rows: PrefixRows, loss: TrainingLoss) -> None:
        """Choose at each horizon what lowers the loss of runs left out most, or w_n."""
        rows_RCD, runs, lfd2 = rows.rows_RCD, problem.runs, self._plain[0]
        assert isinstance(lfd2, Lfd2)
        leap = self._leaps.prepared(problem, Known(loss=lambda: loss)).solved(problem, rows)
        leap = max([leap, *leap.alone(rows)], key=lambda candidate: candidate.gain_left_out)
        ends = (problem.steps_C[0], problem.steps_C[-1])
        kept_R, leapt_R = leap.judged
        gain_2RH = torch.zeros(2, runs, len(problem.steps_H), dtype=torch.float64)
        gain_2RH[1] = (kept_R - leapt_R)[:, None]
        for run in range(runs):
            blocks = [
                Prefix(weights_BCD=part_CD[None], steps_C=ends, layout=problem.layout, start=_PART * number,
                       runs_B=(run,))
                for number, part_CD in enumerate(rows_RCD[run, [0, -1]].split(_PART, dim=-1))
            ]  # fmt: skip
            for h, step in enumerate(problem.steps_H):
                parts = [lfd2.forecasts_left_out(block, (step,)).to(rows_RCD.dtype) for block in blocks]
                gain_2RH[0, run, h] = kept_R[run] - leap.loss_at(torch.cat(parts, dim=-1)[0, 0], run)
        sound_2H = torch.stack([believed(gain_RH) for gain_RH in gain_2RH])
        best_H = torch.where(sound_2H, gain_2RH.mean(1), -torch.inf).argmax(0)
        self._choice_H = torch.where(sound_2H.any(0), best_H + _LFD2, _KEEP)
        scale_S = torch.ones(len(problem.layout.floats), dtype=torch.float64)
        for segment in problem.layout.segments(0, problem.coordinates):
            part = slice(segment.start, segment.stop)
            moved = (rows_RCD[:, -1, part] - rows_RCD[:, 0, part]).double().square().mean().sqrt()
            scale_S[segment.slot] = moved if moved > 0 else 1.0
        if bool((self._choice_H == _LEAP).any()):
            self._leap = _Leap(forecaster=leap, rows=rows, scale_S=scale_S, width_SH=None)
        if bool((self._choice_H == _KEEP).any()):
            self._kept = _Kept(scale_S=scale_S, width_SH=None)

    def _identify(self, problem: Problem, sums: Runs) -> None:
        prefix_RCD, truth_RHD = sums.prefix_RCD, sums.truth_RHD
        moved = float((truth_RHD[:, -1] - prefix_RCD[:, 0]).square().mean().sqrt())
        rounding = sums.rounding * float(truth_RHD.square().mean().sqrt())
        std_HD = truth_RHD.std(0, correction=0)
        bounds_2HD = torch.stack([truth_RHD.amin(0) - _MARGIN * std_HD, truth_RHD.amax(0) + _MARGIN * std_HD])
        theirs_RHD = self._plain_without_each(problem, sums)
        if self._choice_H is None:  # the mean alone would be judged so, should identification fail
            self._choice_H = _chosen(theirs_RHD - truth_RHD, sums)
            self._width_HD = quantile((theirs_RHD - truth_RHD).flatten(1)).view_as(std_HD)
        if not self._solve_without_noise(problem, rounding, bounds_2HD, prefix_RCD, truth_RHD, theirs_RHD):
            experiment = self._experiment(problem, max(1e-9 * moved, rounding, 1e-30))
            found = identify(experiment, prefix_RCD, truth_RHD)
            ours_RHD, std_RHD = forecast_left_out(experiment, found, prefix_RCD, truth_RHD)
            ours_RHD = ours_RHD.clamp(*bounds_2HD)
            belief = _BELIEF if experiment.seen else _BELIEF_ALONE
            share_H = _share(ours_RHD - truth_RHD, theirs_RHD - truth_RHD, belief)
            error_RHD = ours_RHD + share_H[:, None] * (theirs_RHD - ours_RHD) - truth_RHD
            self._physics = _Physics(
                experiment=experiment,
                population=found.population,
                share_H=share_H,
                bounds_2HD=bounds_2HD,
                stretch_HD=quantile((error_RHD / std_RHD.clamp(min=experiment.precision)).flatten(1)).view_as(std_HD),
            )
            self._choice_H = _chosen(error_RHD, sums)

    def _plain_without_each(self, problem: Problem, sums: Runs) -> Tensor:
        """What LFD-2, or the train mean, says of each training run when fitted without it: [R, H, D]."""
        plain, truth_RHD = self._plain[0], sums.truth_RHD
        if isinstance(plain, Mean):
            return (truth_RHD.sum(0) - truth_RHD) / (problem.runs - 1)
        block = Prefix(
            weights_BCD=sums.prefix_RCD,
            steps_C=problem.steps_C,
            layout=problem.layout,
            start=0,
            runs_B=tuple(range(problem.runs)),
        )
        return plain.forecasts_left_out(block, problem.steps_H)

    def _solve_without_noise(
        self,
        problem: Problem,
        rounding: float,
        bounds_2HD: Tensor,
        prefix_RCD: Tensor,
        truth_RHD: Tensor,
        theirs_RHD: Tensor,
    ) -> bool:
        """Take training for free of noise, if solving each run's prefix forecasts the training runs' targets so well.

        What is solved is a prefix alone, so that each training run is judged as a new one would be.
        """
        if prefix_RCD[0, 1:].numel() <= noiseless.unknowns(problem.coordinates):
            return False  # so few numbers are always explained
        physics = _Physics(
            experiment=self._experiment(problem, max(rounding, 1e-30)),
            population=None,
            share_H=torch.zeros(len(problem.steps_H), dtype=torch.float64),
            bounds_2HD=bounds_2HD,
            stretch_HD=torch.ones_like(truth_RHD[0]),
        )
        ours_RHD, std_RHD, sound_R = _identified(physics, prefix_RCD)
        if float(sound_R.double().mean()) < 1 - _MOST_UNEXPLAINED:
            return False
        error_RHD = (ours_RHD - truth_RHD)[sound_R]
        theirs = (theirs_RHD - truth_RHD)[sound_R].square().sum((0, 2))
        if not bool((error_RHD.square().sum((0, 2)) <= _EXACT * theirs).all()):
            return False
        stretch_HD = quantile((error_RHD / std_RHD[sound_R]).flatten(1)).view_as(bounds_2HD[0])
        self._physics = replace(physics, stretch_HD=stretch_HD)
        self._choice_H = torch.full((len(problem.steps_H),), _LFD2)
        return True

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
        return self._physics is None and len(self._plain) == 1 and self._plain[0].unsettled

    def notes(self) -> dict[str, str | float | list[float]]:
        """Which method and why; the steps at which w_n is kept, and why, or leaps are made; LFD-2's share."""
        problem, choice_H = require_fitted("far", self._problem), require_fitted("far", self._choice_H)

        def at(choice: int) -> list[float]:
            pairs = zip(problem.steps_H, choice_H.tolist(), strict=True)
            return [float(step) for step, chosen in pairs if chosen == choice]

        found: dict[str, str | float | list[float]] = {
            "chosen": "identify" if self._physics else self._config.method.replace("identify", self._plain_name),
            "because": self._reason,
            "keeps_w_n_at": at(_KEEP),
        }
        if found["keeps_w_n_at"]:
            found["kept_because"] = (
                "nothing lowers the loss of runs left out surely enough"
                if self._config.method == "loss"
                else "the squared error on runs left out is not below that of w_n"
            )
        if self._leap is not None:
            found["leaps_at"] = at(_LEAP)
        if self._physics is not None:
            found["noise"] = "none" if self._physics.population is None else "estimated"
            found[f"share_of_{self._plain_name}"] = self._physics.share_H.tolist()
        return found

    def warning(self, known: Known) -> str:
        """That these runs were trained by another rule than the one that is run on, or by a rate that changes."""
        if self._physics is None:
            return ""
        if (step := known.rate_change()) is not None:
            return (
                f"runs an optimiser on at one rate, but a schedule changes that of these runs at step {step}: "
                "fit on runs like these."
            )
        own, theirs = self._physics.experiment.rule, known.optimizer()
        if theirs is None or theirs == own:
            return ""
        return (
            f"was fitted on runs by {own.apart_from(theirs)}, but these are by {theirs.apart_from(own)}, "
            "and it runs that optimiser on: fit on runs like these."
        )

    def coefficients(self) -> list[dict[str, str | int | float]]:
        """Those of LFD-2."""
        require_fitted("far", self._problem)
        return self._plain[0].coefficients()

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Weights [B, H, D]; w_n at steps where the training runs advise against a forecast."""
        rows_H = self._rows(prefix, steps_H)
        forecast_BHD = self._plain[0].forecast(prefix, steps_H)
        if self._physics is not None:
            ours_BHD, _, sound_B = _identified(self._physics, prefix.weights_BCD.cpu().double())
            share_BH1 = torch.where(sound_B[:, None], self._physics.share_H[rows_H], 1.0)[..., None]
            mixed_BHD = ours_BHD[:, rows_H] + share_BH1 * (forecast_BHD.cpu().double() - ours_BHD[:, rows_H])
            forecast_BHD = mixed_BHD.to(forecast_BHD.dtype).to(forecast_BHD.device)
        choice_H1 = require_fitted("far", self._choice_H)[rows_H, None].to(forecast_BHD.device)
        if self._leap is not None:
            leapt_BHD = self._leap.forecaster.forecast(prefix, steps_H)
            forecast_BHD = torch.where(choice_H1 == _LEAP, leapt_BHD, forecast_BHD)
        return torch.where(choice_H1 == _KEEP, prefix.weights_BCD[:, -1:], forecast_BHD)

    def half_width(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor | None:
        """Half of the 90 % interval; of the forecast that is not kept back where w_n is kept for its squared error."""
        rows_H = self._rows(prefix, steps_H)
        physics = self._physics
        if physics is None:
            if self._width_HD is not None:
                width_HD = self._width_HD[rows_H].to(prefix.weights_BCD)
                return width_HD.expand(len(prefix.weights_BCD), -1, -1)
            half_BHD = self._plain[0].half_width(prefix, steps_H)
            choice_H1 = require_fitted("far", self._choice_H)[rows_H, None]
            for choice, own in ((_LEAP, self._leap), (_KEEP, self._kept)):
                if half_BHD is None or own is None or own.width_SH is None:
                    continue
                parts = [
                    own.width_SH[part.slot, rows_H, None].expand(-1, part.stop - part.start) for part in prefix.segments
                ]
                chosen_H1 = (choice_H1 == choice).to(half_BHD.device)
                half_BHD = torch.where(chosen_H1, torch.cat(parts, dim=-1).to(half_BHD), half_BHD)
            return half_BHD
        _, std_BHD, sound_B = _identified(physics, prefix.weights_BCD.cpu().double())
        half_BHD = physics.stretch_HD * std_BHD.clamp(min=physics.experiment.precision)
        widest_HD = (physics.bounds_2HD[1] - physics.bounds_2HD[0]) / 2
        half_BHD = torch.where(sound_B[:, None, None], half_BHD, widest_HD)[:, rows_H]
        return half_BHD.to(prefix.weights_BCD.dtype).to(prefix.weights_BCD.device)

    def _rows(self, prefix: Prefix, steps_H: Sequence[int]) -> list[int]:
        prefix.require("far", self.min_context, steps_H)
        problem = require_fitted("far", self._problem)
        if not self.transferable:
            problem.require_layout("far", prefix.layout)
        if self._physics is not None and prefix.steps_C != problem.steps_C:
            raise UsageError(
                f"far was fitted on snapshots at {_steps(problem.steps_C)}, but this context has "
                f"{_steps(prefix.steps_C)}: the optimiser's state is known from its start alone.",
                "Give the context it was fitted on, or fit with a --context of 2 or more and --set method=lfd2.",
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
        """LFD-2's and the leap's, what is chosen at each horizon, and what was identified."""
        choice_H = require_fitted("far", self._choice_H)
        found = {"choice": choice_H.double()}
        found |= {f"{self._plain_name}.{key}": value for key, value in self._plain[0].tensors().items()}
        if self._leap is not None:
            found |= {f"leap.{key}": value for key, value in self._leap.forecaster.tensors().items()}
            found |= {"leap_width": require_fitted("far", self._leap.width_SH).contiguous()}
        if self._kept is not None:
            found |= {"kept_width": require_fitted("far", self._kept.width_SH).contiguous()}
        if (physics := self._physics) is None:
            return found if self._width_HD is None else found | {"width": self._width_HD.contiguous()}
        found |= {
            "precision": torch.tensor([physics.experiment.precision], dtype=torch.float64),
            "share": physics.share_H.contiguous(),
            "bounds": physics.bounds_2HD.contiguous(),
            "stretch": physics.stretch_HD.contiguous(),
        }
        if (population := physics.population) is None:
            return found
        return found | {
            "mean": population.mean_RP[0].contiguous(),
            "covariance": population.covariance_RPP[0].contiguous(),
            "noise": population.noise.contiguous(),
        }

    @classmethod
    def restore(cls, config: Config, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from."""
        fitted = cls(config)
        horizons, size = len(problem.steps_H), problem.coordinates
        fitted._problem = problem
        fitted._choice_H = stored("far", tensors, "choice", (horizons,)).long()
        if "leap_width" in tensors:
            own = {key.removeprefix("leap."): value for key, value in tensors.items() if key.startswith("leap.")}
            width_SH = stored("far", tensors, "leap_width", (len(problem.layout.floats), horizons))
            leap = LossLfd.restore(LossLfd.Config(), problem, own)
            fitted._leap = _Leap(forecaster=leap, rows=None, scale_S=torch.ones(len(width_SH)), width_SH=width_SH)
        if "kept_width" in tensors:
            width_SH = stored("far", tensors, "kept_width", (len(problem.layout.floats), horizons))
            fitted._kept = _Kept(scale_S=torch.ones(len(width_SH)), width_SH=width_SH)
        lead = "mean." if len(problem.steps_C) == 1 else "lfd2."
        own = {key.removeprefix(lead): value for key, value in tensors.items() if key.startswith(lead)}
        if lead == "mean.":
            fitted._plain = (Mean.restore(Mean.Config(), problem, own),)
        else:
            grouped = "delta" in own and len(own["delta"]) > 1
            inner = _lfd2("tensor" if grouped else "none", intervals="width" in own)
            fitted._plain = (type(inner).restore(inner.config, problem, own),)
        if "width" in tensors:
            fitted._width_HD = stored("far", tensors, "width", (horizons, size))
        if "precision" in tensors:
            unknowns = noiseless.unknowns(size)
            population = None
            if "mean" in tensors:
                population = Population(
                    mean_RP=stored("far", tensors, "mean", (unknowns,))[None],
                    covariance_RPP=stored("far", tensors, "covariance", (unknowns, unknowns))[None],
                    noise=stored("far", tensors, "noise", (2,)),
                )
            fitted._physics = _Physics(
                experiment=fitted._experiment(problem, float(stored("far", tensors, "precision", (1,)))),
                population=population,
                share_H=stored("far", tensors, "share", (horizons,)),
                bounds_2HD=stored("far", tensors, "bounds", (2, horizons, size)),
                stretch_HD=stored("far", tensors, "stretch", (horizons, size)),
            )
        return fitted


def _identified(physics: _Physics, prefix_RCD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Forecasts at all fitted targets within bounds, their standard deviations, [R, H, D], and which runs have one.

    In float64, on the CPU (MPS has no float64).
    """
    experiment, bounds_2HD = physics.experiment, physics.bounds_2HD
    try:
        if physics.population is None:
            rule, precision = experiment.rule, experiment.precision
            solved = noiseless.solve(rule, prefix_RCD, experiment.seen, bounds_2HD[:, -1], precision)
            found_RHD, std_RHD = noiseless.forecast(rule, solved, prefix_RCD[:, 0], experiment.targets, precision)
            sound_R = solved.explained_R & (found_RHD.isfinite() & std_RHD.isfinite()).all(-1).all(-1)
        else:
            found_RHD, std_RHD = forecast(experiment, physics.population, prefix_RCD)
            sound_R = torch.ones(len(prefix_RCD), dtype=torch.bool)
    except UNEXPLAINED:
        found_RHD = prefix_RCD[:, -1:].repeat(1, len(experiment.targets), 1)
        std_RHD, sound_R = torch.ones_like(found_RHD), torch.zeros(len(prefix_RCD), dtype=torch.bool)
    return torch.nan_to_num(found_RHD).clamp(*bounds_2HD), std_RHD, sound_R


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _lfd2(groups: Literal["none", "tensor"], *, intervals: bool = True) -> Lfd2:
    return Lfd2(Lfd2.Config(ridge="loo", guard=True, intervals=intervals, groups=groups))


def _left_out(candidate: Lfd2 | Mean) -> LeftOut:
    assert isinstance(candidate, Lfd2)
    assert candidate.left_out is not None
    return candidate.left_out


def _chosen(error_RHD: Tensor, sums: Runs) -> Tensor:
    """At which horizons to forecast: where these errors on runs left out are less than those of keeping w_n."""
    kept_RHD = sums.prefix_RCD[:, -1:] - sums.truth_RHD
    return torch.where(error_RHD.square().sum((0, 2)) < kept_RHD.square().sum((0, 2)), _LFD2, _KEEP)


def _share(ours_RHD: Tensor, theirs_RHD: Tensor, belief: float) -> Tensor:
    """The second's share of the average of two forecasts with these errors, [H]: the most probable one in [0, 1].

    The best share is a regression on the difference of the errors; its own uncertainty is weighed against a
    belief in equal parts, since runs are few: on SCIENCE's protocol D2 the least squares alone did worse.
    """
    between_RHD = ours_RHD - theirs_RHD
    square_H = between_RHD.square().sum((0, 2)).clamp(min=1e-300)
    best_H = (ours_RHD * between_RHD).sum((0, 2)) / square_H
    residual_RHD = ours_RHD - best_H[:, None] * between_RHD
    variance_H = (residual_RHD.square().mean((0, 2)) / square_H).clamp(min=1e-300)
    weight_H, prior = 1 / variance_H, 1 / belief**2
    return ((weight_H * best_H + prior * _HALF) / (weight_H + prior)).clamp(0, 1)


@contextmanager
def _named() -> Iterator[None]:
    """Within it, errors of a part are said in our name."""
    try:
        yield
    except FarcliError as error:
        raise type(error)(f"far: {str(error).removeprefix('lfd2: ').removeprefix('mean: ')}", error.hint) from error
