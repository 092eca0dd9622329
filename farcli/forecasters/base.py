"""What a forecaster is: observed weights of a prefix in, weights at future steps out.

Shape suffixes used throughout: B runs, C snapshots of the context, H horizons, D coordinates of the
block at hand. A forecaster never opens files, prints, or moves tensors between devices; blocks
come to it from `farcli.stream`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import Tensor, device, float64, nn

from farcli.errors import StoreError, UsageError
from farcli.forecasters.update_rules import UpdateRule
from farcli.layout import Layout, Segment

T = TypeVar("T")
NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Coupling(Enum):
    """Whether coordinates are forecast one by one or together; the property that decides streaming."""

    COORDINATEWISE = "coordinatewise"
    """Each coordinate's forecast depends on its own prefix alone: any D streams in blocks."""

    JOINT = "joint"
    """A forecast needs the whole vector of a fixed, limited D."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """What has been observed of some runs: one block of coordinates, C snapshots.

    Attributes:
        weights_BCD: the observed weights; float32 or float64, on the device to work on.
        steps_C: optimiser step of each snapshot, increasing.
        layout: layout of the whole vector.
        start: index, in the whole vector, of the block's first coordinate; 0 for joint forecasters.
        runs_B: position of each run in the whole list of runs of this pass (0, 1, … across stores).
    """

    weights_BCD: Tensor
    steps_C: tuple[int, ...]
    layout: Layout
    start: int
    runs_B: tuple[int, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Which columns of the block belong to which tensor (index into `layout.floats`)."""
        return self.layout.segments(self.start, self.start + self.weights_BCD.shape[-1])

    def require(self, who: str, snapshots: int, steps_H: Sequence[int]) -> None:
        """Refuse a context that is too short, or steps that are not in its future.

        Args:
            who: the method's name, for the message.
            snapshots: how many snapshots it needs.
            steps_H: the steps asked for.

        Raises:
            UsageError: the context is shorter, or a step is not later than its last one.
        """
        require_future(who, snapshots, self.steps_C, steps_H)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a forecaster is fitted for, known before the first block is read.

    Attributes:
        layout: layout of the vectors.
        coordinates: how many coordinates are fitted: the first ones of the vector.
        runs: number of training runs, over all stores.
        steps_C: steps of the context.
        steps_H: steps to forecast.
        memory: bytes the forecaster may hold of its own.
    """

    layout: Layout
    coordinates: int
    runs: int
    steps_C: tuple[int, ...]
    steps_H: tuple[int, ...]
    memory: int

    def require_layout(self, who: str, layout: Layout) -> None:
        """Refuse a network other than the one fitted on.

        Raises:
            UsageError: `layout` differs from the problem's.
        """
        if layout is self.layout or layout == self.layout:
            return
        if layout.size != self.layout.size:
            found = f"was fitted on D = {self.layout.size} parameters, but this network has D = {layout.size}."
        else:
            pairs = zip(self.layout.slots, layout.slots, strict=False)
            own, other = next(((a, b) for a, b in pairs if a != b), (None, None))
            found = (
                f"was fitted on a network with {own.name!r} of shape {list(own.shape)} where this one has "
                f"{other.name!r} of shape {list(other.shape)}."
                if own and other
                else "was fitted on a network with other tensors than this one."
            )
        raise UsageError(f"{who} {found}", "Fit it on runs of this network.")


def require_future(who: str, snapshots: int, steps_C: Sequence[int], steps_H: Sequence[int]) -> None:
    """Refuse a context of fewer than `snapshots` snapshots, or steps that are not in its future.

    Raises:
        UsageError: the context is shorter, or a step is not later than its last one.
    """
    if len(steps_C) < snapshots:
        raise UsageError(f"{who} needs a context of at least {snapshots} snapshots, but got {len(steps_C)}.")
    past = next((step for step in steps_H if step <= steps_C[-1]), None)
    if past is not None:
        raise UsageError(
            f"{who}: step {past} is not in the future; the context ends at step {steps_C[-1]}, "
            "expected steps later than that."
        )


def require_fitted(who: str, fitted: T | None) -> T:
    """What was learned.

    Raises:
        UsageError: nothing was, yet.
    """
    if fitted is None:
        raise UsageError(f"{who} has not been fitted.", f"Fit it first: farcli fit {who} STORE -o FILE.")
    return fitted


def stored(who: str, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name` of a file, on the CPU in float64.

    Raises:
        StoreError: it is missing or has another shape.
    """
    if name not in tensors:
        raise StoreError(f"{who}: tensor {name!r} is missing; found {', '.join(sorted(tensors)) or 'none'}.")
    if tuple(tensors[name].shape) != shape:
        raise StoreError(f"{who}: tensor {name!r} has shape {list(tensors[name].shape)}, expected {list(shape)}.")
    return tensors[name].to("cpu", float64).contiguous()


class Forecaster(ABC):
    """Forecasts weights at future steps from a prefix.

    Implementations are final. Their options are the fields of the frozen dataclass `Config`, each with
    `metadata={"help": …}`; `Config` raises ValueError for values that make no sense.
    """

    Config: ClassVar[type]
    reference: ClassVar[str]
    """One line: where the method comes from."""

    @abstractmethod
    def __init__(self, config: Any) -> None: ...

    @property
    @abstractmethod
    def config(self) -> Any:
        """The options, an instance of `Config`."""

    @property
    @abstractmethod
    def coupling(self) -> Coupling:
        """Whether it streams blocks of coordinates or needs whole vectors. May depend on the options."""

    @property
    def transferable(self) -> bool:
        """Whether it works on networks other than the one it was fitted on, of any layout."""
        return True

    @property
    @abstractmethod
    def min_context(self) -> int:
        """How many snapshots the whole context needs at least."""

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The snapshots of a context that the method looks at; only these are read and passed in.

        Raises:
            UsageError: the context has fewer than `min_context` snapshots.
        """
        return tuple(steps_C)

    @abstractmethod
    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Forecast the weights at `steps_H`.

        Args:
            prefix: the snapshots of B runs that `observed` names, or the whole context they belong to.
            steps_H: optimiser steps to forecast, each later than the last of the prefix.

        Returns:
            Weights of shape [B, H, D], dtype and device of the prefix.

        Raises:
            UsageError: the method was not fitted for these steps or this network.
        """


JUDGING = 3
"""Batches of each run, its last ones, that no fit sees."""


class TrainingLoss(ABC):
    """The loss of the training runs, at any weights: never of what forecasts are reported on.

    The last batches are of data that was held back from training, where there is such: to judge by, not to fit on. The
    others are so too where enough was held back.
    """

    @abstractmethod
    def at(self, weights_D: Tensor, run: int, batch: int) -> Tensor:
        """A scalar that gradients flow through.

        Args:
            weights_D: parameters, without buffers; those are the run's own at the last observed snapshot.
            run: its position among the training runs.
            batch: which of its `batches` batches.
        """

    @property
    @abstractmethod
    def batches(self) -> int:
        """How many batches each run has."""

    @property
    def fitting(self) -> int:
        """How many of them, the first ones, are to fit on; with a single one, it is to judge by too."""
        return max(1, self.batches - JUDGING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of the training runs beside their weights; looked up only by methods that ask.

    Attributes:
        optimizer: the update rule of all training runs, constant over training; None where the stores do not say.
        rate_change: the first update that a schedule gives another rate; None where none is known to.
        loss: their training loss; None where no workload is named, a FarcliError where it cannot be built here.
    """

    optimizer: Callable[[], UpdateRule | None] = lambda: None
    rate_change: Callable[[], int | None] = lambda: None
    loss: Callable[[], TrainingLoss | None] = lambda: None


class FittedForecaster(Forecaster):
    """A forecaster that holds what it learned from training runs."""

    def prepared(self, problem: Problem, known: Known) -> Self:
        """The forecaster with its choices made that depend on the problem, before anything is read.

        Raises:
            UsageError: what it needs to know is not known.
        """
        return self

    def notes(self) -> dict[str, str | float | list[float]]:
        """What a user should know of how it was fitted, by name; goes into the row that `fit` returns and its file."""
        return {}

    def warning(self, known: Known) -> str:
        """Why its forecasts of other runs may mislead, going by what is known of these; empty where nothing says so."""
        return ""

    @property
    @abstractmethod
    def transferable(self) -> bool:
        """Whether nothing it learned is bound to the layout it was fitted on."""

    def half_width(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor | None:
        """How sure it is: ŵ ± this holds 90 % of a new run's weights.

        Args:
            prefix: what `forecast` gets.
            steps_H: steps it forecasts.

        Returns:
            Half of the interval's width, [B, H, D]; None where it was not calibrated.
        """
        return None

    def coefficients(self) -> list[dict[str, str | int | float]]:
        """What was learned, as rows to print; empty where there is nothing short to show."""
        return []

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file must store, by name; contiguous CPU tensors."""

    @classmethod
    @abstractmethod
    def restore(cls, config: Any, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from.

        Args:
            config: the options it was fitted with.
            problem: the problem it was fitted for.
            tensors: what `tensors()` returned.

        Raises:
            StoreError: tensors are missing or have other shapes than the problem asks for.
        """


class Sums(ABC):
    """What one pass over the training data is reduced to. Sums of parts add up to the sums of the whole."""

    @abstractmethod
    def add(self, prefix: Prefix, truth_BHD: Tensor) -> None:
        """Take one block in: the observed prefix and the true weights at the problem's `steps_H`."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in the sums of another part of the data: of the same class, made for the same problem."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Whether every sum is a finite number; one NaN in the data that is used makes it false."""


class SumsInParts(Sums):
    """Sums that also take the targets of a block in parts, so that each is used while it is in the cache."""

    @abstractmethod
    def add(self, prefix: Prefix, truth_BHD: Tensor, first: int = 0) -> None:
        """Take one block in, or a part of it: targets from the index `first` on.

        Parts of one block come one behind the other, the one with the first target first.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes they take."""


class SolvedForecaster(FittedForecaster):
    """A forecaster fitted exactly from sums, in one pass over the data (or a few, reweighted).

    The engine calls `sums`, adds every block, calls `solved`, and repeats while `unsettled` is true.
    """

    @abstractmethod
    def sums(self, problem: Problem) -> Sums:
        """Empty sums for one pass, given what was solved so far.

        Raises:
            ResourceError: the problem needs more memory than `problem.memory`; names the largest D possible.
            UsageError: the problem does not fit the options.
        """

    @abstractmethod
    def solved(self, problem: Problem, sums: Any) -> Self:
        """The forecaster that the sums determine."""

    @property
    def unsettled(self) -> bool:
        """Whether another pass would improve the solution."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """How a forecaster is fitted by gradient (Adam); the `Config` of every trained forecaster extends it.

    An example is a run for joint forecasters, a (run, coordinate) pair for coordinate-wise ones.
    """

    lr: float = field(default=1e-3, metadata={"help": "Adam's learning rate"})
    batch: int = field(default=1024, metadata={"help": "examples a mini-batch"})
    epochs: int = field(default=1000, metadata={"help": "passes over the training examples"})
    updates: int = field(
        default=20_000, metadata={"help": "updates after which the fit ends whatever the epochs; 0 for no limit"}
    )
    validation: float = field(
        default=0.0,
        metadata={"help": "share of the runs held out: the fit ends with the state best on them; 0 for the last state"},
    )
    patience: int = field(
        default=0, metadata={"help": "epochs without a better validation loss after which the fit ends; 0 for never"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random in the fit"})
    ensemble: int = field(
        default=1, metadata={"help": "networks, with the seeds seed, seed + 1, …; the forecast is the mean of theirs"}
    )

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr = {self.lr}, expected a finite number above 0.")
        for name, least in (("batch", 1), ("epochs", 1), ("updates", 0), ("patience", 0), ("seed", 0), ("ensemble", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}, expected {least} or more.")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation = {self.validation}, expected a share of the runs: 0 or more, less than 1.")
        if self.patience and not self.validation:
            raise ValueError(f"patience = {self.patience} needs validation runs; validation is 0.")


@dataclass(frozen=True, slots=True)
class Trained(Generic[NetworkT]):
    """Networks, one or an ensemble, and what they were fitted for."""

    problem: Problem
    networks: tuple[NetworkT, ...]

    @property
    def network(self) -> NetworkT:
        """The only network; of an ensemble, the first."""
        return self.networks[0]


class TrainedForecaster(FittedForecaster):
    """A forecaster fitted by gradient: a network, and a loss on mini-batches.

    Networks are float32, and what inputs are scaled by are buffers of theirs, so that a network's
    `state_dict` is all that was learned. The engine builds the `network`, hands it to `with_networks`,
    calls `measure` once, then descends on `loss`. Of an ensemble, each network is first a forecaster by itself;
    `measure`, `loss` and `forecast_alone` are only ever asked of those.
    """

    name: ClassVar[str]
    """What messages call it."""
    draws: ClassVar[bool] = False
    """Whether its loss takes random numbers."""
    vectorised_batch: ClassVar[int] = 0
    """Examples a mini-batch up to which an ensemble is fitted faster by `torch.func.vmap` than one network after the
    other: measured (`make bench-ensembles`)."""

    @abstractmethod
    def __init__(self, config: Any, trained: Any = None) -> None: ...

    @property
    @abstractmethod
    def config(self) -> Descent:
        """The options."""

    @property
    @abstractmethod
    def trained(self) -> Trained[Any] | None:
        """What was fitted; None before."""

    @abstractmethod
    def network(self, problem: Problem) -> nn.Module:
        """A fresh network, drawn from torch's default generator, which the engine seeds and puts back.

        Raises:
            UsageError: the problem does not fit the options.
        """

    def with_networks(self, problem: Problem, networks: Sequence[nn.Module]) -> Self:
        """The forecaster of the same options that forecasts with these networks."""
        return type(self)(self.config, Trained(problem, tuple(networks)))

    def vectorised(self, problem: Problem) -> bool:
        """Whether an ensemble is to be fitted in one go."""
        return self.config.batch <= self.vectorised_batch

    def measure(self, examples: Iterable[tuple[Prefix, Tensor]]) -> None:
        """Set what inputs are scaled by, from training examples as `loss` gets them."""

    @abstractmethod
    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, random_B: Tensor | None) -> Tensor:
        """Loss of one mini-batch, a scalar.

        Args:
            prefix: whole vectors for joint forecasters, without buffers; for coordinate-wise ones sampled (run,
                coordinate) pairs, as so many runs of a single coordinate, of which `start` says nothing.
            steps_H: the problem's target steps.
            truth_BHD: the weights at those steps.
            random_B: from [0, 1), on the CPU; None unless it `draws`.
        """

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The mean of what the networks say: [B, H, D]."""
        trained = require_fitted(self.name, self.trained)
        first, *others = (self.with_networks(trained.problem, [network]) for network in trained.networks)
        forecast_BHD = first.forecast_alone(prefix, steps_H)
        for count, other in enumerate(others, 2):
            forecast_BHD.lerp_(other.forecast_alone(prefix, steps_H), 1 / count)
        return forecast_BHD

    @abstractmethod
    def forecast_alone(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """What the only network says, as `forecast` has it."""

    def tensors(self) -> dict[str, Tensor]:
        """The network's parameters and buffers; of an ensemble, those of all, behind their number and a point."""
        networks = require_fitted(self.name, self.trained).networks
        return {
            lead + key: value.detach().cpu().contiguous()
            for lead, network in zip(_leads(len(networks)), networks, strict=True)
            for key, value in network.state_dict().items()
        }

    @classmethod
    def restore(cls, config: Any, problem: Problem, tensors: Mapping[str, Tensor]) -> Self:
        """The forecaster that `tensors` came from."""
        forecaster = cls(config)
        networks: list[nn.Module] = []
        for lead in _leads(forecaster.config.ensemble):
            with device("meta"):  # no memory, no random numbers
                network = forecaster.network(problem)
            values = {
                key: stored(cls.name, tensors, lead + key, tuple(value.shape)).to(value.dtype)
                for key, value in network.state_dict().items()
            }
            network.load_state_dict(values, assign=True)
            networks.append(network.requires_grad_(False).eval())
        return forecaster.with_networks(problem, networks)

    def seen(self, prefix: Prefix) -> Prefix:
        """The prefix with nothing but the snapshots that `observed` names.

        Raises:
            UsageError: it is too short.
        """
        trained = require_fitted(self.name, self.trained)
        steps = self.observed(prefix.steps_C)
        if len(prefix.steps_C) == len(trained.problem.steps_C):  # they are chosen already
            return prefix
        rows = [prefix.steps_C.index(step) for step in steps]
        return replace(prefix, weights_BCD=prefix.weights_BCD[:, rows], steps_C=steps)

    def rows(self, prefix: Prefix, steps_H: Sequence[int]) -> list[int]:
        """Which of the fitted targets the steps are, counted from the last observed step.

        Raises:
            UsageError: nothing was fitted, or not for these steps, this spacing or this network.
        """
        prefix.require(self.name, self.min_context, steps_H)
        problem = require_fitted(self.name, self.trained).problem
        if not self.transferable:
            problem.require_layout(self.name, prefix.layout)
        gaps, fitted_gaps = ([step - steps[0] for step in steps] for steps in (prefix.steps_C, problem.steps_C))
        if gaps != fitted_gaps:
            raise UsageError(
                f"{self.name} was fitted on snapshots at steps {_listed(problem.steps_C)}, but this context has "
                f"{_listed(prefix.steps_C)}, spaced otherwise.",
                "Give a context with the same spacing, or fit again.",
            )
        shift = prefix.steps_C[-1] - problem.steps_C[-1]
        targets = [step + shift for step in problem.steps_H]
        for step in steps_H:
            if step not in targets:
                raise UsageError(
                    f"{self.name} was fitted to forecast {_listed(targets)} steps; step {step} is not among them.",
                    "Fit again with that step in --to.",
                )
        return [targets.index(step) for step in steps_H]


def _leads(count: int) -> list[str]:
    """What the names of each network's tensors begin with."""
    return [f"{number}." for number in range(count)] if count > 1 else [""]


def _listed(steps: Sequence[int]) -> str:
    if len(steps) <= 5:
        return ", ".join(map(str, steps))
    return f"{steps[0]}, {steps[1]}, …, {steps[-1]}"
