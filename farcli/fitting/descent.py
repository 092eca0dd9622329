"""Forecasters fitted by gradient: one loop for all, for one network and for ensembles.

Shape suffixes: M networks, N examples (runs, or (run, coordinate) pairs), H horizons, K coordinates of an example.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from torch import Generator

from farcli.errors import NonFiniteError, StoppedError, StoreError, UsageError
from farcli.files import staged_file
from farcli.fitting.examples import Examples, take
from farcli.fitting.networks import Alone, InTraining, State, Together, fitted_together, network_bytes
from farcli.fitting.passes import Passes
from farcli.forecasters.base import Descent, Problem, TrainedForecaster, require_fitted

TrainedT = TypeVar("TrainedT", bound=TrainedForecaster)

_NOISE = 0x5EED
"""Added to the seed of the random numbers that the validation loss is measured with, the same every epoch."""


@final
class Saved:
    """Where a descent that was stopped goes on: a file beside its output, written now and then at the end of an epoch.

    Args:
        path: of the file.
        identity: what the fit is of; a file that says otherwise is refused.
        resume: whether to go on from the file, where there is one.
        every: seconds between writes.
    """

    def __init__(self, path: Path, identity: str, *, resume: bool, every: float = 30.0) -> None:
        self.path, self._identity, self._resume, self._every = path, identity, resume, every
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """What was saved; None where nothing was, or a new start was asked for.

        Raises:
            UsageError: the file holds another fit.
            StoreError: the file is damaged.
        """
        if not self._resume or not self.path.exists():
            return None
        try:
            state = torch.load(self.path, weights_only=True)
            identity = state.pop("identity")
        except Exception as error:  # torch raises what it likes on damaged files
            raise StoreError(f"{self.path}: is no state of a fit.", "Remove it, or fit anew with --force.") from error
        if identity != self._identity:
            raise UsageError(
                f"{self.path}: holds another fit than the one asked for.", "Remove it, or fit anew with --force."
            )
        return state

    @property
    def due(self) -> bool:
        """Whether the last time is long enough ago."""
        return time.monotonic() - self._last >= self._every

    def save(self, state: dict[str, Any]) -> None:
        """Write a state."""
        with staged_file(self.path, replace=True) as temporary:
            torch.save({**state, "identity": self._identity}, temporary)
        self._last = time.monotonic()

    def remove(self) -> None:
        """The fit is done."""
        self.path.unlink(missing_ok=True)


@final
class DivergedError(NonFiniteError, Generic[TrainedT]):
    """A fit whose loss or parameters stopped being finite.

    Attributes:
        best: the forecaster of the best state before that; None where there is none of every network.
    """

    def __init__(self, message: str, hint: str, best: TrainedT | None) -> None:
        super().__init__(message, hint)
        self.best = best


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How one network came about.

    Attributes:
        losses: mean training loss of every epoch.
        validation: validation loss after every epoch; empty without validation runs.
        epoch: the epoch, from 1, after which the network had the state that was kept.
        updates: updates made in all.
    """

    losses: tuple[float, ...]
    validation: tuple[float, ...]
    epoch: int
    updates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Generic[TrainedT]):
    """What a descent found.

    Attributes:
        forecaster: the fitted forecaster.
        courses: of each network.
    """

    forecaster: TrainedT
    courses: tuple[Course, ...]

    def summary(self) -> dict[str, int | float | None]:
        """Epochs and updates made, the epoch kept, its losses; of an ensemble, most, all, latest and means."""
        count = len(self.courses)
        judged = [course.validation[course.epoch - 1] for course in self.courses if course.validation]
        return {
            "epochs": max(len(course.losses) for course in self.courses),
            "updates": sum(course.updates for course in self.courses),
            "epoch": max(course.epoch for course in self.courses),
            "loss": sum(course.losses[course.epoch - 1] for course in self.courses) / count,
            "validation_loss": sum(judged) / count if judged else None,
        }


def descend(
    forecaster: TrainedT,
    problem: Problem,
    passes: Passes,
    *,
    device: torch.device | None = None,
    saved: Saved | None = None,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> Fitted[TrainedT]:
    """Fit a forecaster by gradient: Adam on mini-batches, as its options (`Descent`) say.

    Examples that fit into `problem.memory` are held. Of larger data, coordinate-wise forecasters get a uniform
    sample of coordinates, all runs of each, drawn in one pass; for joint ones every epoch is a pass that shuffles
    runs within blocks. Equal seeds give equal bits on the same machine; torch's global generator stays as it was.

    Each network of an ensemble is the one that its seed gives by itself: initial values, validation runs and the
    order of examples are its own, and it ends when its own validation says so. (Only a sample of coordinates is
    drawn once, by the first seed.) Where that is faster, all are updated in one go, which sums in another order.

    Args:
        forecaster: an unfitted forecaster.
        problem: what it is fitted for.
        passes: called once per pass; a block's tensors need to be valid until the next one is asked for.
        device: where the networks and the blocks are.
        saved: where to go on from, and to save to; a fit that was stopped and went on has the bits of one that was not.
        stop: asked after each epoch whether to save and stop; only where there is something to save to.
        report: called after each epoch with (updates done, updates in all, losses).

    Returns:
        The fitted forecaster, and how it came about: the last state, or the best on the validation runs.

    Raises:
        DivergedError: the loss or the parameters stopped being finite; holds the best state.
        StoppedError: `stop` said so.
        NonFiniteError: the data hold NaN or Inf; names the run and tensor.
        ResourceError: the network needs more than `problem.memory`; names the largest D possible.
        UsageError: the problem does not fit the options, or the runs are too few to split.
    """
    options, device = forecaster.config, device or torch.device("cpu")
    seeds = range(options.seed, options.seed + options.ensemble)
    left = problem.memory - network_bytes(forecaster, problem)
    held_out = [_validation_runs(forecaster.name, problem.runs, options, seed) for seed in seeds]
    generators = [Generator().manual_seed(seed) for seed in seeds]
    split = take(forecaster, problem, passes, left, generators[0])
    examples = [split(runs) for runs in held_out]
    members: list[TrainedT] = []
    for seed, own in zip(seeds, examples, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed: devices keep theirs
            network = forecaster.network(problem).to(device)
        members.append(forecaster.with_networks(problem, [network]))
        members[-1].measure(own.parts(training=True))
    together = fitted_together(forecaster, problem) and all(own.aligned for own in examples)
    groups = [range(len(seeds))] if together else [range(place, place + 1) for place in range(len(seeds))]
    whole = forecaster.with_networks(problem, [require_fitted(own.name, own.trained).network for own in members])
    state = (saved.load() if saved is not None else None) or {"finished": [], "courses": [], "current": None}
    courses = [Course(**course) for course in state["courses"]]
    for member, values in zip(members, state["finished"], strict=False):
        Alone(member).load([values])
    for group in groups[len(courses) :]:  # of an ensemble in one go, all courses end together
        networks = Together([members[place] for place in group]) if together else Alone(members[group[0]])
        one_of = f"network {group[0] + 1} of {len(seeds)}, " if len(group) < len(seeds) else ""
        descent = _Descent(
            networks, [examples[i] for i in group], [generators[i] for i in group], problem, [seeds[i] for i in group]
        )
        if state["current"] is not None:
            descent.load(state["current"])
            state["current"] = None
        try:
            while not descent.ended:
                text = descent.epoch()
                report(group[0] * descent.total + len(group) * descent.done, len(seeds) * descent.total, one_of + text)
                stopped = stop() and not descent.ended
                if saved is not None and (saved.due or stopped):
                    finished = [Alone(member).states()[0] for member in members[: group[0]]]
                    known = [asdict(course) for course in courses]
                    saved.save({"finished": finished, "courses": known, "current": descent.state()})
                    if stopped:
                        raise StoppedError(
                            f"{forecaster.name}: stopped after {one_of}{text}; its state is in {saved.path}.",
                            "Run it again with --resume.",
                        )
            courses += descent.finish()
        except DivergedError as error:
            if len(seeds) in (1, group[-1] + 1) and descent.restore():
                error.best = whole
            raise
    return Fitted(forecaster=whole, courses=tuple(courses))


class _Descent:
    """Networks that are updated at the same time, on their way."""

    def __init__(
        self,
        networks: InTraining,
        examples: list[Examples],
        generators: list[Generator],
        problem: Problem,
        seeds: list[int],
    ) -> None:
        self._networks, self._examples, self._generators, self._problem = networks, examples, generators, problem
        self._seeds = seeds
        self._options = networks.forecasters[0].config
        self._optimizer = torch.optim.Adam(networks.parameters, lr=self._options.lr, fused=True)
        self._validated = bool(self._options.validation)
        self._ways = [_Way() for _ in examples]
        self.done = 0
        total = self._options.epochs * examples[0].updates
        self.total = min(total, self._options.updates) if self._options.updates else total

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to do."""
        return self.done >= self.total or not any(self._going(way) for way in self._ways)

    def _going(self, way: "_Way") -> bool:
        patience = self._options.patience
        return not patience or len(way.losses) - way.epoch < patience

    def epoch(self) -> str:
        """Every example once, or what updates are left; says what the losses were.

        Raises:
            DivergedError: a loss or a parameter is not finite; it holds no forecaster.
        """
        going, validated = [place for place, way in enumerate(self._ways) if self._going(way)], self._validated
        forecasters, generators, steps_H = self._networks.forecasters, self._generators, self._problem.steps_H
        self._networks.train()
        # A training loss is that of the state before the updates, a validation loss that of the one after.
        states = [] if validated else self._networks.states()
        sums, count = [0.0] * len(self._ways), 0
        epochs = [own.epoch(generator) for own, generator in zip(self._examples, generators, strict=True)]
        for batches in zip(*epochs, strict=True):
            size = len(batches[0][0].runs_B)
            draws = [torch.rand(size, generator=own) if forecasters[0].draws else None for own in generators]
            self._optimizer.zero_grad(set_to_none=True)
            losses_M = self._networks.losses(batches, draws, steps_H)
            values = losses_M.detach().tolist()
            for place in going:
                if not isfinite(values[place]):
                    raise self._diverged(place, f"the loss is {values[place]} at update {self.done + 1}")
                self._ways[place].last = values[place]
                sums[place] += values[place] * size
            losses_M.sum().backward()
            self._optimizer.step()
            self.done += 1
            count += size
            if self.done == self.total:
                break
        finite = self._networks.finite
        for place in going:
            if not finite[place]:
                raise self._diverged(place, f"parameters are not finite at update {self.done}")
        if validated:
            states = self._networks.states()
        for place in going:
            way = self._ways[place]
            way.losses.append(sums[place] / count)
            way.updates = self.done
            if validated:
                way.judged.append(self._validation_loss(place))
            way.see(way.judged[-1] if validated else way.losses[-1], states[place])
        text = f"epoch {max(len(way.losses) for way in self._ways)}, loss {self._mean(going, 'losses'):.4g}"
        return text + (f", validation {self._mean(going, 'judged'):.4g}" if validated else "")

    def _mean(self, places: list[int], which: str) -> float:
        return sum(getattr(self._ways[place], which)[-1] for place in places) / len(places)

    @torch.no_grad()
    def _validation_loss(self, place: int) -> float:
        """Mean loss over the validation examples, with the same random numbers every time."""
        forecaster, steps_H = self._networks.forecasters[place], self._problem.steps_H
        generator = Generator().manual_seed(self._seeds[place] + _NOISE)
        require_fitted(forecaster.name, forecaster.trained).network.eval()
        total, count = 0.0, 0
        for prefix, truth_NHK in self._examples[place].parts(training=False):
            size = len(prefix.runs_B)
            random_N = torch.rand(size, generator=generator) if forecaster.draws else None
            total += float(forecaster.loss(prefix, steps_H, truth_NHK, random_N)) * size
            count += size
        return total / count

    def finish(self) -> list[Course]:
        """Take the states that are to be kept.

        Raises:
            DivergedError: a validation loss was never finite.
        """
        for place, way in enumerate(self._ways):
            if self._validated and way.epoch == 0:
                raise self._diverged(place, "the validation loss was never finite")
        if self._validated:
            self.restore()
        else:
            self._networks.settle()
        return [
            Course(
                losses=tuple(way.losses),
                validation=tuple(way.judged),
                epoch=way.epoch if self._validated else len(way.losses),
                updates=way.updates,
            )
            for way in self._ways
        ]

    def restore(self) -> bool:
        """Take the best states, where every network has one."""
        if not all(way.epoch for way in self._ways):
            return False
        self._networks.load([way.state for way in self._ways])
        self._networks.settle()
        return True

    def state(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            "networks": self._networks.states(),
            "optimizer": self._optimizer.state_dict(),
            "generators": [generator.get_state() for generator in self._generators],
            "ways": [vars(way) for way in self._ways],
            "done": self.done,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._networks.load(state["networks"])
        self._optimizer.load_state_dict(state["optimizer"])
        for generator, value in zip(self._generators, state["generators"], strict=True):
            generator.set_state(value)
        for way, values in zip(self._ways, state["ways"], strict=True):
            vars(way).update(values)
        self.done = state["done"]

    def _diverged(self, place: int, what: str) -> DivergedError[Any]:
        way, options = self._ways[place], self._options
        found = f"the last finite loss was {way.last:.4g}" if isfinite(way.last) else "no loss was finite before"
        if way.epoch:
            found += f", the best epoch was {way.epoch} with {way.loss:.4g}"
        usual = float(type(options)().lr)
        which = f"the fit of seed {self._seeds[place]}" if options.ensemble > 1 else "the fit"
        name = self._networks.forecasters[0].name
        return DivergedError(
            f"{name}: {which} diverged: {what}; {found}.",
            f"Lower the learning rate: --set lr={min(options.lr / 10, usual):g}.",
            None,
        )


class _Way:
    """What one network has come through, and its state at the lowest loss so far."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.judged: list[float] = []
        self.updates = 0
        self.last = float("nan")
        self.state: State = {}
        self.loss = float("inf")
        self.epoch = 0

    def see(self, loss: float, state: State) -> None:
        """The state at the end of an epoch, and its loss."""
        if loss < self.loss:
            self.loss, self.state, self.epoch = loss, state, len(self.losses)


def _validation_runs(who: str, runs: int, options: Descent, seed: int) -> frozenset[int]:
    """Positions of the runs that are held out, drawn by the seed."""
    if not options.validation:
        return frozenset()
    count = max(1, round(runs * options.validation))
    if count >= runs:
        raise UsageError(
            f"{who}: validation = {options.validation} of {runs} training runs leaves {runs - count} to learn from, "
            f"expected at least 1 on each side.",
            "Record more runs, or lower the share: --set validation=0 holds none out.",
        )
    # A generator of its own, so that methods and batch sizes share one split.
    order = torch.randperm(runs, generator=Generator().manual_seed(seed))
    return frozenset(order[:count].tolist())
