"""loss-lfd: a leap along a run's own recent motion, fitted on loss instead of on future weights.

Shape suffixes: B runs of a block, R training runs, C snapshots, D coordinates, H horizons, S tensors, X any leading
ones, J = 3 to 9 displacements, T = 5 trends.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from farcli.config import format_size
from farcli.errors import FarcliError, ResourceError, UsageError
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
from farcli.forecasters.leave_one_out import LEAST_RUNS
from farcli.forecasters.whitening import whitened
from farcli.layout import Layout, Segment

_FOLDS = 4
_SHRUNK = (1.0, 0.7, 0.4)
"""A leap is shortened to one of these, as runs left out advise."""
_SAFE = 0.95
"""A mean gain of one standard error is believed where this share of the runs left out is no worse off."""
_SURE = 2.0
"""A mean gain of so many standard errors is believed though more of them are."""
_WHOLE = "def"
"""Displacements that are meant to be taken once, not many times."""
_ROWS = 4
"""w_0, w_{n−2}, w_{n−1}, w_n."""
_LONG = 7
"""Snapshots of a context that says what is noise."""
_TRENDS = 5
"""The mean of the later half, the mean of all, the slope, the spread, the slope whitened."""
_SPREAD = 3
"""Which of them is the spread."""
_FLOOR = 0.1
"""Of a tensor's mean spread: what is added to that of each coordinate, so that none moves over ten times as far."""
_WORK = 32
"""Vectors that fitting and judging one run take beside the rows, the network's own apart; measured."""
_WORK_LONG = 64
"""The same in long contexts, where whole runs are read ahead and whitened; measured."""


@final
class PrefixRows(Sums):
    """Four snapshots of every run, and how far it moves after; by position: other parts hold 0 here, so parts add up.

    Attributes:
        rows_RCD: w_0, w_{n−2}, w_{n−1}, w_n.
        trends_RTD: of contexts of 7 and more, see `_trends`; None of shorter ones.
        moved_RD: w at the last target step less w_n.
    """

    def __init__(self, problem: Problem) -> None:
        self.require_room(problem)
        self.rows_RCD = torch.zeros(problem.runs, _ROWS, problem.coordinates)
        self.moved_RD = torch.zeros(problem.runs, problem.coordinates)
        long = _is_long(problem.steps_C)
        self.trends_RTD = torch.zeros(problem.runs, _TRENDS, problem.coordinates) if long else None

    @staticmethod
    def require_room(problem: Problem) -> None:
        """Refuse what the budget cannot hold.

        Raises:
            ResourceError: names the largest D.
        """
        long = _is_long(problem.steps_C)
        rows, work = (_ROWS + _TRENDS + 1, _WORK_LONG) if long else (_ROWS + 1, _WORK)
        held = rows * problem.runs + work
        read = 2 * (len(problem.steps_C) + len(problem.steps_H)) if long else 0  # of one run at once, and ahead
        need_each = 4 * max(held, read)
        if need_each * problem.coordinates > problem.memory:
            raise ResourceError(
                f"loss-lfd: {problem.runs} runs of D = {problem.coordinates} parameters need "
                f"{format_size(need_each * problem.coordinates)}, but the budget is {format_size(problem.memory)}, "
                f"which allows D = {problem.memory // need_each}.",
                "Raise --memory, or learn from fewer runs with --train-runs"
                + (", or of fewer snapshots with --set trends=false." if long else "."),
            )

    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in."""
        stop = min(prefix.start + prefix.weights_BCD.shape[-1], self.rows_RCD.shape[-1])
        width, runs_B = max(0, stop - prefix.start), list(prefix.runs_B)
        place = slice(prefix.start, prefix.start + width)
        own_BCD = _four(prefix)[..., :width].cpu().float()
        self.rows_RCD[runs_B, :, place] = own_BCD
        self.moved_RD[runs_B, place] = truth_BHD[:, -1, :width].cpu().float() - own_BCD[:, -1]
        if self.trends_RTD is not None:
            self.trends_RTD[runs_B, :, place] = _trends(prefix)[..., :width].cpu().float()

    def merge(self, other: Any) -> None:
        """Take in another part's runs."""
        for own, theirs in zip(self._parts, other._parts, strict=True):
            own.add_(theirs)

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(part.sum().isfinite()) for part in self._parts)

    @property
    def _parts(self) -> list[Tensor]:
        return [part for part in (self.rows_RCD, self.moved_RD, self.trends_RTD) if part is not None]

    def trends(self, run: int, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Of one run, of the coordinates from `start` to `stop`: [T, D]."""
        return None if self.trends_RTD is None else self.trends_RTD[run, :, start:stop]

    def spread(self, layout: Layout) -> Tensor | None:
        """The mean spread of each tensor's coordinates over all runs, 0 of buffers: [S], float64."""
        if self.trends_RTD is None:
            return None
        spread_S = torch.zeros(len(layout.floats), dtype=torch.float64)
        for part in layout.segments(0, self.trends_RTD.shape[-1]):
            spread_S[part.slot] = self.trends_RTD[:, _SPREAD, part.start : part.stop].mean(dtype=torch.float64)
        return spread_S

    def drift(self, runs: Sequence[int], start: int = 0, stop: int | None = None) -> "MeanMotion":
        """How some runs move on average, of the coordinates from `start` to `stop`."""
        own_RD = self.moved_RD[:, start:stop]
        total_D = own_RD.new_zeros(own_RD.shape[-1])
        for run in runs:  # one by one: choosing them would copy them all
            total_D += own_RD[run]
        return MeanMotion(moved_RD=own_RD, runs=frozenset(runs), total_D=total_D)

    @property
    def drift_explains(self) -> float:
        """The share of runs' motion, squared, that the mean motion of the others forecasts; below 0: it misleads."""
        runs = len(self.moved_RD)
        own = sum(_square(own_D) for own_D in self.moved_RD)
        total = _square(self.drift(range(runs)).total_D)
        return 1 - (runs**2 * own - runs * total) / ((runs - 1) ** 2 * own) if own else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanMotion:
    """How some runs move on average.

    Attributes:
        moved_RD: of every run.
        runs: which are meant.
        total_D: the sum of theirs.
    """

    moved_RD: Tensor
    runs: frozenset[int]
    total_D: Tensor

    def without(self, run: int) -> Tensor:
        """Of those that are meant but `run`: [D]."""
        if run in self.runs:
            return (self.total_D - self.moved_RD[run]).div_(len(self.runs) - 1)
        return self.total_D / len(self.runs)


@final
class LossLfd(SolvedForecaster):
    """ŵ = w_n + a (w_n − w_0) + b (w_n − w_{n−1}) + c (w_n − w_{n−2}) + d δ + …, with a, b, c, … of each tensor.

    δ is the drift: how far the training runs move on average from w_n to the last target step, a run itself left out.
    Fine-tunings of one pretrained network share much of their way, networks that begin anywhere little (a head, a
    normalisation). Where the drift of the others is no better a forecast of a run's motion than none, there is no d.

    Contexts of 7 snapshots and more say what is noise in training, as at a constant rate, and there are five more:
    e (w̄ − w_n), with the mean of the later half, and f, with the mean of all: the loss at an average is lower than at
    any snapshot. g T s, with s the least-squares slope over the context and T its length. And h T s ⊘ (v / v̄ + .1),
    with v the mean square of a coordinate's moves from snapshot to snapshot, v̄ its mean over the tensor and the runs:
    where the noise is that of gradients, v grows with the curvature, so this is Newton's step with a diagonal Hessian.
    i T s′, with s′ the slope whitened: matrix by matrix, over the root of what the moves say of the noise on either
    side, see `whitening`. Such forecasts need whole vectors.

    Fitted by gradient (Adam, rate falling to 0) on the training runs' loss at ŵ, on batches that no run was trained on
    where the workload has so many, else on training data; held-out data, which `eval` reports on, are never looked at.
    In long contexts it is done twice, for a to e and for d to i: all together know more by heart.
    The descent begins where one displacement leads to, doubled for as long as that lowers the loss, and its rate is in
    units of that length: a leap may be a hundred times as long as the context. The forecast is the same at every step:
    where loss is least along these directions. Runs are left out in up to 4 folds, and their loss is taken on others,
    held back from training where the workload holds any back: of the whole leaps and shorter ones that is chosen which
    lowers it most, or one by a standard error less that leaves 95 % of the runs no worse. It must lower it by one
    standard error, by two where more runs are worse; where none does, all are 0 and w_n is kept.

    Source: ours (SCIENCE, section 7, "loss-LFD"); the columns are LFD-2's (arXiv 2505.02714) and others.
    Differs: no target step; BatchNorm statistics are those at w_n.
    """

    reference = "ours: LFD-2's columns fitted on training loss at the forecast instead of on future weights"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        updates: int = field(default=200, metadata={"help": "updates of each fit"})
        batch: int = field(default=4, metadata={"help": "runs an update, each on one batch of its own"})
        lr: float = field(default=0.05, metadata={"help": "Adam's learning rate, times the length that doubling found"})
        seed: int = field(default=0, metadata={"help": "of the order of runs and batches"})
        trends: bool = field(
            default=True,
            metadata={"help": "whether contexts of 7 snapshots and more give averages and slopes; takes twice as long"},
        )

        def __post_init__(self) -> None:
            for name, least in (("updates", 1), ("batch", 1), ("seed", 0)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name} = {getattr(self, name)}, expected {least} or more.")
            if not 0 < self.lr < float("inf"):
                raise ValueError(f"lr = {self.lr}, expected a finite number above 0.")

    def __init__(self, config: Config) -> None:
        self._config = config
        self._loss: TrainingLoss | None = None
        self._problem: Problem | None = None
        self._theta_SJ: Tensor | None = None
        self._drift_D: Tensor | None = None
        self._spread_S: Tensor | None = None
        self._explains = 0.0
        self._without: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        """Coefficients fitted without a run, and the runs they were fitted on."""
        self._kept_R: Tensor | None = None
        self._leapt_R: Tensor | None = None
        self._gain = (float("nan"), float("nan"))
        self._diverged = ""

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Joint in long contexts, once it is known that they are, for whole matrices; else coordinate-wise."""
        return Coupling.COORDINATEWISE if self._problem is None else self.coupling_in(self._problem.steps_C)

    def coupling_in(self, steps_C: Sequence[int]) -> Coupling:
        """In this context."""
        return Coupling.JOINT if _is_long(self.observed(steps_C)) else Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """False: coefficients belong to tensors."""
        return False

    @property
    def min_context(self) -> int:
        """Three snapshots."""
        return 3

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """All of seven or more; of fewer, or with trends=false, w_0, w_{n−2}, w_{n−1}, w_n."""
        require_future("loss-lfd", self.min_context, steps_C, ())
        long = self._config.trends and len(steps_C) >= _LONG
        return tuple(steps_C) if long else tuple(dict.fromkeys((steps_C[0], *steps_C[-3:])))

    def prepared(self, problem: Problem, known: Known) -> Self:
        """Take the training loss.

        Raises:
            UsageError: there is none, or too few runs to leave some out.
        """
        instead = "Use lfd2, which is fitted on weights."
        try:
            loss = known.loss()
        except FarcliError as error:
            raise UsageError(f"loss-lfd: no loss to fit on: {error}", error.hint or instead) from error
        if loss is None:
            raise UsageError("loss-lfd: no loss to fit on: the stores name no workload.", instead)
        if problem.runs < LEAST_RUNS:
            raise UsageError(
                f"loss-lfd: leaving runs out needs at least {LEAST_RUNS} training runs, found {problem.runs}.",
                "Record more runs.",
            )
        prepared = type(self)(self._config)
        prepared._loss, prepared._problem = loss, problem
        return prepared

    def sums(self, problem: Problem) -> PrefixRows:
        """Empty rows: 4 × R × D numbers, 9 for long contexts."""
        require_future("loss-lfd", self.min_context, problem.steps_C, problem.steps_H)
        return PrefixRows(problem)

    def solved(self, problem: Problem, sums: PrefixRows) -> Self:
        """Fit on all runs, and on folds of them to see whether it helps."""
        runs = problem.runs
        fitted = type(self)(self._config)
        fitted._loss, fitted._problem, fitted._explains = self._loss, problem, sums.drift_explains
        fitted._spread_S = sums.spread(problem.layout)
        kept_R, losses, without = fitted._kept(sums), [], []
        for letters in fitted._alternatives:
            fitted._without = fitted._folds(problem, sums, letters)
            losses += [fitted._left_out(sums, share) for share in _SHRUNK]
            without.append(fitted._without)
        gain_RQ = kept_R[:, None] - torch.stack(losses, dim=1)
        chosen = choose(gain_RQ)
        mean, error = _mean_and_error(gain_RQ[:, chosen])
        fitted._gain = (float(mean), float(error))
        which, length = divmod(chosen, len(_SHRUNK))
        share = _SHRUNK[length] if bool(believed(gain_RQ[:, chosen])) else 0.0
        fitted._kept_R, fitted._leapt_R = kept_R, losses[chosen] if share else kept_R
        whole_SJ = fitted._descended(problem, sums, range(runs), fitted._alternatives[which])
        fitted._theta_SJ = share * whole_SJ.double()
        fitted._without = {run: (share * theta_SJ, inside) for run, (theta_SJ, inside) in without[which].items()}
        if fitted._drifts:
            fitted._drift_D = sums.drift(range(runs)).total_D / runs
        return fitted

    def _folds(self, problem: Problem, sums: PrefixRows, letters: str) -> dict[int, tuple[Tensor, tuple[int, ...]]]:
        """By run: coefficients fitted without it, and the runs they were fitted on."""
        runs, found = problem.runs, {}
        folds = min(_FOLDS, runs)
        for fold in range(folds):
            out = range(fold, runs, folds)
            inside = tuple(run for run in range(runs) if run not in out)
            found |= dict.fromkeys(out, (self._descended(problem, sums, inside, letters), inside))
        return found

    def alone(self, sums: PrefixRows) -> list[Self]:
        """The drift alone, d = 1, and averages, e = 1, f = 1, where they help runs left out; just after the fit."""
        problem, runs = require_fitted("loss-lfd", self._problem), range(len(sums.moved_RD))
        columns = [column for column, letter in enumerate(self._letters) if letter in _WHOLE]
        kept_R = require_fitted("loss-lfd", self._kept_R)
        found: list[Self] = []
        for column in columns:
            alone = type(self)(self._config)
            alone._loss, alone._problem, alone._explains = self._loss, problem, self._explains
            alone._theta_SJ = torch.zeros(len(problem.layout.floats), len(self._letters), dtype=torch.float64)
            alone._theta_SJ[:, column] = 1.0
            alone._without = dict.fromkeys(runs, (alone._theta_SJ.float(), tuple(runs)))
            alone._drift_D, alone._spread_S = self._drift_D, self._spread_S
            alone._kept_R, alone._leapt_R = kept_R, alone._left_out(sums)
            gain_R = kept_R - alone._leapt_R
            mean, error = _mean_and_error(gain_R)
            alone._gain = (float(mean), float(error))
            if bool(believed(gain_R)):
                found.append(alone)
        return found

    @property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Training runs' loss at w_n, and at leaps fitted without them, just after the fit: both [R]."""
        return require_fitted("loss-lfd", self._kept_R), require_fitted("loss-lfd", self._leapt_R)

    def _kept(self, sums: PrefixRows) -> Tensor:
        """Training runs' loss at w_n: [R]."""
        losses = [self.loss_at(rows_CD[-1], run) for run, rows_CD in enumerate(sums.rows_RCD)]
        return torch.tensor(losses, dtype=torch.float64)

    def _left_out(self, sums: PrefixRows, share: float = 1.0) -> Tensor:
        """Training runs' loss where a leap fitted without them leads, or a share of it: [R]."""
        runs = range(len(sums.rows_RCD))
        losses = [self.loss_at(self.leapt_without(sums, run, share=share), run) for run in runs]
        return torch.tensor(losses, dtype=torch.float64)

    @property
    def gain_left_out(self) -> float:
        """How much lower the mean loss of runs left out was at the leap than at w_n; 0 where w_n is kept."""
        return self._gain[0] if require_fitted("loss-lfd", self._theta_SJ).any() else 0.0

    @property
    def _drifts(self) -> bool:
        return self._explains > 0

    @property
    def _letters(self) -> str:
        """Of the coefficients that there are, by column."""
        long = _is_long(require_fitted("loss-lfd", self._problem).steps_C)
        return "abc" + "d" * self._drifts + "efghi" * long

    @property
    def _alternatives(self) -> tuple[str, ...]:
        """Coefficients that are fitted at once; the others are 0."""
        recent = "".join(letter for letter in self._letters if letter in "abcde")
        return (recent, self._letters[3:]) if "h" in self._letters else (recent,)

    def leapt_without(
        self, sums: PrefixRows, run: int, start: int = 0, stop: int | None = None, share: float = 1.0
    ) -> Tensor:
        """What a leap fitted without it says of a training run, just after the fit.

        Args:
            sums: all runs.
            run: its position.
            start: of the first coordinate.
            stop: of the last coordinate, and one more; all of them where it is not given.
            share: of the leap.

        Returns:
            Weights of shape [D].
        """
        theta_SJ, inside = self._without[run]
        rows_CD = sums.rows_RCD[run, :, start:stop]
        segments = require_fitted("loss-lfd", self._problem).layout.segments(start, start + rows_CD.shape[-1])
        drift_D = sums.drift(inside, start, stop).without(run) if self._drifts else None
        trends_TD = sums.trends(run, start, stop)
        return _leapt(rows_CD, segments, share * theta_SJ, drift_D, trends_TD, self._spread_S)

    def _descended(self, problem: Problem, sums: PrefixRows, runs: Sequence[int], letters: str) -> Tensor:
        config, loss = self._config, require_fitted("loss-lfd", self._loss)
        lost_by = self._objective(problem, sums, runs)
        columns = [self._letters.index(letter) for letter in letters]
        theta_SJ = self._begun(problem, lost_by, runs, columns).requires_grad_()
        fixed_J = torch.ones(len(self._letters), dtype=torch.bool)
        fixed_J[columns] = False
        lr = config.lr * max(1.0, float(theta_SJ.detach().abs().max()))
        optimizer = torch.optim.Adam([theta_SJ], lr=lr)
        generator = torch.Generator().manual_seed(config.seed)
        best, last = theta_SJ.detach().clone(), float("nan")
        for update in range(config.updates):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * update / config.updates)) / 2
            optimizer.zero_grad()
            total = torch.zeros(())
            for place in torch.randint(len(runs) * loss.fitting, (config.batch,), generator=generator).tolist():
                lost = lost_by(theta_SJ, runs[place // loss.fitting], place % loss.fitting) / config.batch
                lost.backward()  # one by one: only one run's passes are held
                total += lost.detach()
            if not bool(total.isfinite()):
                found = f"the loss is {float(total)} at update {update + 1}"
                self._diverged = f"{found}; the last finite loss was {last:.4g}"
                break  # what was best so far stands
            best, last = theta_SJ.detach().clone(), float(total)
            assert theta_SJ.grad is not None
            theta_SJ.grad[:, fixed_J] = 0.0
            optimizer.step()
        return best

    def _objective(
        self, problem: Problem, sums: PrefixRows, runs: Sequence[int]
    ) -> Callable[[Tensor, int, int], Tensor]:
        """The loss of one run's batch, by coefficients, of a leap that knows these runs."""
        loss, segments = require_fitted("loss-lfd", self._loss), problem.layout.segments(0, problem.coordinates)
        drift, spread_S = sums.drift(runs) if self._drifts else None, self._spread_S
        room_JD = torch.empty(len(self._letters), problem.coordinates)

        def lost_by(theta_SJ: Tensor, run: int, batch: int) -> Tensor:
            drift_D = drift.without(run) if drift else None
            known = (drift_D, sums.trends(run), spread_S)
            return loss.at(_leapt(sums.rows_RCD[run], segments, theta_SJ, *known, room_JD), run, batch)

        return lost_by

    @torch.no_grad()
    def _begun(
        self,
        problem: Problem,
        lost_by: Callable[[Tensor, int, int], Tensor],
        runs: Sequence[int],
        columns: Sequence[int],
    ) -> Tensor:
        """Where the descent begins: along one displacement, doubled for as long as that lowers the loss, or at 0."""
        fitting = require_fitted("loss-lfd", self._loss).fitting

        def lost(theta_SJ: Tensor) -> float:
            return sum(float(lost_by(theta_SJ, run, run % fitting)) for run in runs)

        begun_SJ = torch.zeros(len(problem.layout.floats), len(self._letters))
        least = kept = lost(begun_SJ)
        for column in columns:
            theta_SJ, before = torch.zeros_like(begun_SJ), kept
            theta_SJ[:, column] = 1.0
            while (now := lost(theta_SJ)) < before:
                if now < least:
                    begun_SJ, least = theta_SJ.clone(), now
                if self._letters[column] in _WHOLE:
                    break  # as long as it is meant to be
                theta_SJ, before = 2 * theta_SJ, now
        return begun_SJ

    @torch.no_grad()
    def loss_at(self, weights_D: Tensor, run: int) -> float:
        """A training run's loss at these weights, on its batches that no fit sees."""
        loss = require_fitted("loss-lfd", self._loss)
        judging = range(min(loss.fitting, loss.batches - 1), loss.batches)
        return sum(float(loss.at(weights_D, run, batch)) for batch in judging) / len(judging)

    def notes(self) -> dict[str, str | float | list[float]]:
        """How much lower the loss of runs left out was at the forecast than at w_n; its error; what drift explains."""
        mean, error = self._gain
        found: dict[str, str | float | list[float]] = {"gain_left_out": mean, "gain_error": error}
        if self._drifts:
            found["drift_explains"] = self._explains
        if self._diverged:
            found["diverged"] = self._diverged
        if not require_fitted("loss-lfd", self._theta_SJ).any():
            found["because"] = "no gain on runs left out: w_n is kept"
        return found

    def coefficients(self) -> list[dict[str, str | int | float]]:
        """a, b, c of each tensor; d where there is a drift, e to i where the context is long."""
        problem = require_fitted("loss-lfd", self._problem)
        theta_SJ = require_fitted("loss-lfd", self._theta_SJ)
        return [
            {"tensor": slot.name, **dict(zip(self._letters, row, strict=True))}
            for slot, row in zip(problem.layout.floats, theta_SJ.tolist(), strict=True)
        ]

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The leap, the same for every step: [B, H, D]."""
        prefix.require("loss-lfd", self.min_context, steps_H)
        problem = require_fitted("loss-lfd", self._problem)
        problem.require_layout("loss-lfd", prefix.layout)
        shift = prefix.steps_C[-1] - problem.steps_C[-1]
        missing = next((step for step in steps_H if step - shift not in problem.steps_H), None)
        if missing is not None:
            raise UsageError(
                f"loss-lfd was fitted to forecast {', '.join(str(s + shift) for s in problem.steps_H)} steps; "
                f"step {missing} is not among them.",
                "Fit again with that step in --to.",
            )
        theta_SJ = require_fitted("loss-lfd", self._theta_SJ)
        trends_BTD = None if self._spread_S is None else _trends(prefix)
        leapt_BD = _leapt(_four(prefix), prefix.segments, theta_SJ, self._drift_of(prefix), trends_BTD, self._spread_S)
        return leapt_BD[:, None].repeat(1, len(steps_H), 1)

    def _drift_of(self, prefix: Prefix) -> Tensor | None:
        """The drift of a block's coordinates; 0 for buffers."""
        if self._drift_D is None:
            return None
        own_D = self._drift_D[prefix.start : prefix.start + prefix.weights_BCD.shape[-1]]
        return pad(own_D, (0, prefix.weights_BCD.shape[-1] - len(own_D))).to(prefix.weights_BCD)

    def tensors(self) -> dict[str, Tensor]:
        """Coefficients of each tensor, float64 [S, J]; the gain and its error, [2]; drift, [D]; spread, [S]."""
        theta_SJ = require_fitted("loss-lfd", self._theta_SJ)
        found = {"theta": theta_SJ.contiguous(), "gain": torch.tensor(self._gain, dtype=torch.float64)}
        if self._spread_S is not None:
            found["spread"] = self._spread_S
        if self._drift_D is None:
            return found
        return found | {"drift": self._drift_D, "explains": torch.tensor([self._explains], dtype=torch.float64)}

    @classmethod
    def restore(cls, config: Config, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from."""
        fitted = cls(config)
        fitted._problem = problem
        if "drift" in tensors:
            fitted._drift_D = stored("loss-lfd", tensors, "drift", (problem.coordinates,)).float()
            fitted._explains = float(stored("loss-lfd", tensors, "explains", (1,)))
        if _is_long(problem.steps_C):
            fitted._spread_S = stored("loss-lfd", tensors, "spread", (len(problem.layout.floats),))
        shape = (len(problem.layout.floats), len(fitted._letters))
        fitted._theta_SJ = stored("loss-lfd", tensors, "theta", shape)
        mean, error = stored("loss-lfd", tensors, "gain", (2,)).tolist()
        fitted._gain = (mean, error)
        return fitted


def _four(prefix: Prefix) -> Tensor:
    """w_0, w_{n−2}, w_{n−1}, w_n: [B, 4, D]."""
    last = len(prefix.steps_C) - 1
    return prefix.weights_BCD[:, [0, last - 2, last - 1, last]]


def _is_long(steps_C: Sequence[int]) -> bool:
    """Whether what is observed of a context says what is noise."""
    return len(steps_C) >= _LONG


def _trends(prefix: Prefix) -> Tensor:
    """What a long context says of each coordinate: [B, T, D].

    In order: the mean of the later half of the snapshots; of all; their least-squares slope over steps, times the
    length of the context; the mean square of the moves from one to the next; the slope, whitened by these moves.
    """
    count = len(prefix.steps_C)
    steps_C = torch.tensor(prefix.steps_C, dtype=torch.float64)
    around_C = steps_C - steps_C.mean()
    slope_C = around_C * (steps_C[-1] - steps_C[0]) / around_C.square().sum()
    half_C = (torch.arange(count) >= count // 2).double()
    weights_TC = torch.stack([half_C / half_C.sum(), torch.full((count,), 1 / count), slope_C]).to(prefix.weights_BCD)
    rows = [_trends_of(own_CD, weights_TC @ own_CD, prefix) for own_CD in prefix.weights_BCD]
    return torch.stack(rows)


def _trends_of(own_CD: Tensor, means_TD: Tensor, prefix: Prefix) -> Tensor:
    """Of one run: the means, and what its moves make of them: [T, D]."""
    trends_TD = own_CD.new_empty(_TRENDS, own_CD.shape[-1])
    trends_TD[:_SPREAD] = means_TD
    for part in prefix.segments:
        place, slot = slice(part.start, part.stop), prefix.layout.floats[part.slot]
        assert part.stop - part.start == slot.size  # joint: tensors come whole
        moves_MD = own_CD[:, place].diff(dim=0)
        trends_TD[_SPREAD, place] = torch.linalg.vector_norm(moves_MD, dim=0).square_() / len(moves_MD)
        trends_TD[-1, place] = whitened(means_TD[-1, place], moves_MD, slot.shape)
    return trends_TD


def believed(gain_RX: Tensor) -> Tensor:
    """Whether runs left out gain: by a standard error where 95 % of them are no worse, else by two."""
    mean_X, error_X = _mean_and_error(gain_RX)
    return (mean_X > error_X) & (_harmless(gain_RX) | (mean_X > _SURE * error_X))


def choose(gain_RQ: Tensor) -> int:
    """The largest mean gain of those believed, or, within one standard error of it, of those that harm few runs."""
    mean_Q, sound_Q = torch.nan_to_num(gain_RQ.mean(0), nan=-torch.inf), believed(gain_RQ)
    open_Q = sound_Q if bool(sound_Q.any()) else torch.ones_like(sound_Q)
    best = int(torch.where(open_Q, mean_Q, -torch.inf).argmax())
    short_Q, error_Q = _mean_and_error(gain_RQ[:, best, None] - gain_RQ)
    near_Q = open_Q & _harmless(gain_RQ) & (short_Q <= error_Q)
    return int(torch.where(near_Q, mean_Q, -torch.inf).argmax()) if bool(near_Q.any()) else best


def _harmless(gain_RX: Tensor) -> Tensor:
    return (gain_RX >= 0).double().mean(0) >= _SAFE


def _mean_and_error(gain_RX: Tensor) -> tuple[Tensor, Tensor]:
    return gain_RX.mean(0), gain_RX.std(0) / math.sqrt(len(gain_RX))


def _square(values_D: Tensor) -> float:
    return float(torch.linalg.vector_norm(values_D, dtype=torch.float64)) ** 2


def _leapt(
    rows_XCD: Tensor,
    segments: Sequence[Segment],
    theta_SJ: Tensor,
    drift_D: Tensor | None,
    trends_XTD: Tensor | None,
    spread_S: Tensor | None,
    room_JD: Tensor | None = None,
) -> Tensor:
    """The forecast from what is known of a run, or of several; gradients flow to the coefficients: [D] or [B, D].

    Displacements are made in `room_JD` where that is given, anew for each call: of large networks, new memory takes
    longer than what is done with it.
    """
    last_XD = rows_XCD[..., 3, :]
    shape = (*last_XD.shape[:-1], theta_SJ.shape[1], last_XD.shape[-1])
    moved_XJD = rows_XCD.new_empty(shape) if room_JD is None else room_JD
    for column, row in enumerate((0, 2, 1)):
        torch.sub(last_XD, rows_XCD[..., row, :], out=moved_XJD[..., column, :])
    if drift_D is not None:
        moved_XJD[..., 3, :] = drift_D
    if trends_XTD is not None and spread_S is not None:
        late_XD, whole_XD, slope_XD, own_XD, quiet_XD = trends_XTD.unbind(-2)
        torch.sub(late_XD, last_XD, out=moved_XJD[..., -5, :])
        torch.sub(whole_XD, last_XD, out=moved_XJD[..., -4, :])
        moved_XJD[..., -3, :], moved_XJD[..., -1, :] = slope_XD, quiet_XD
        for part in segments:
            place, scale = slice(part.start, part.stop), float(spread_S[part.slot])
            over_XD = moved_XJD[..., -2, place]
            if scale > 0:
                torch.add(own_XD[..., place] / scale, _FLOOR, out=over_XD)
                torch.div(slope_XD[..., place], over_XD, out=over_XD)
            else:
                over_XD.zero_()  # nothing has moved
    theta_SJ = theta_SJ.to(moved_XJD)
    parts = [theta_SJ[part.slot] @ moved_XJD[..., part.start : part.stop] for part in segments]
    return last_XD + torch.cat(parts, dim=-1)
