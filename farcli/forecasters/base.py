"""What a forecaster is: observed weights of a prefix in, weights at future steps out.

Shape suffixes used throughout: B runs, C snapshots of the context, H horizons, D coordinates of the
block at hand. A forecaster never opens files, prints, or moves tensors between devices; blocks
come to it from `farcli.stream`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Self

from torch import Tensor

from farcli.layout import Layout, Segment


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


class Forecaster(ABC):
    """Forecasts weights at future steps from a prefix.

    Implementations are final. Their options are the fields of the frozen dataclass `Config`, each with
    `metadata={"help": …}`; `Config` raises ValueError for values that make no sense.
    """

    Config: ClassVar[type]
    coupling: ClassVar[Coupling]
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
    def min_context(self) -> int:
        """How many snapshots the prefix needs at least."""

    @abstractmethod
    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Forecast the weights at `steps_H`.

        Args:
            prefix: C >= min_context snapshots of B runs.
            steps_H: optimiser steps to forecast, each later than the last of the prefix.

        Returns:
            Weights of shape [B, H, D], dtype and device of the prefix.

        Raises:
            UsageError: the method was not fitted for these steps or this network.
        """


class FittedForecaster(Forecaster):
    """A forecaster that holds what it learned from training runs."""

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
    def merge(self, other: Self) -> None:
        """Take in the sums of another part of the data."""


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
