"""What a predictor is: where training has been in, a leap out.

Shape suffixes: C points of the history (oldest first), D trained coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from farcli.errors import UsageError
from farcli.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Adam's state as the optimiser has it.

    Attributes:
        first_D: exp_avg.
        second_D: exp_avg_sq.
        updates: how many updates they have seen.
        betas: their decays.
        epsilon: added to the root of the second.
    """

    first_D: Tensor
    second_D: Tensor
    updates: int
    betas: tuple[float, float]
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What training has shown so far.

    The history holds the weights at points `every` steps apart. When a leap is made, the points before it move
    along, so that differences between points are what training did, never what a leap did.

    Attributes:
        steps_C: optimiser steps of the points; the last is now.
        weights_CD: the weights there; one tensor [D] a point.
        average_D: the running average of the weights now.
        layout: of the vectors.
        tables: names of the tensors that are looked up row by row (embeddings), and are no maps between spaces.
        rate: learning rate now.
        moments: Adam's moments now.
        gradient: loss and its gradient [D], on the next fresh training batch, at any weights; a step's cost each.
    """

    steps_C: tuple[int, ...]
    weights_CD: Sequence[Tensor]
    average_D: Tensor
    layout: Layout
    tables: frozenset[str]
    rate: float
    moments: Callable[[], Moments]
    gradient: Callable[[Tensor], tuple[float, Tensor]]

    @property
    def now(self) -> Tensor:
        """The weights now, [D]."""
        return self.weights_CD[-1]

    def displacement(self) -> Tensor:
        """What training did since the last point but one, [D]; a new tensor."""
        return self.weights_CD[-1] - self.weights_CD[-2]

    def displacements(self, count: int) -> list[Tensor]:
        """The last so many, oldest first, [D] each."""
        return [after - before for before, after in pairwise(self.weights_CD[-count - 1 :])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A leap, before it is made: what to add.

    Attributes:
        move_D: to the weights.
        average: whether the running average moves along; a leap *to* an average leaves it where it is.
        cost: of making the proposal, in training steps.
    """

    move_D: Tensor
    average: bool = True
    cost: float = 0.0


class Predictor(ABC):
    """Proposes where to leap. Implementations are final; options are the fields of the frozen dataclass `Config`."""

    Config: ClassVar[type]
    reference: ClassVar[str]
    """One line: where the method comes from."""
    takes_batches: ClassVar[bool] = False
    """Whether it takes gradients on fresh batches, which a script's door has none of."""

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    @abstractmethod
    def context(self) -> int:
        """How many points of the history it needs, now included."""

    @abstractmethod
    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """A leap from here.

        Args:
            seen: at least `context` points.
            ahead: steps to leap, for predictors that know where training will be at a step.
            strength: what the move is multiplied by.

        """

    def require(self, seen: Observed, *, every: int, ahead: int) -> None:  # noqa: B027 - most need nothing more
        """See whether it can ever leap in this training; asked once, after the first step.

        Args:
            seen: what there is by then: layout, moments; of points, one.
            every: steps between points.
            ahead: steps to leap.

        Raises:
            UsageError: it cannot.
        """

    def operations(self, layout: Layout, tables: frozenset[str]) -> float | None:
        """Floating-point operations of a proposal's matrix products, known before the first.

        None has them counted, or timed. What goes through the vectors element by element counts as nothing, here as
        in a training step.

        Args:
            layout: of the vectors.
            tables: names of embeddings.
        """
        return 0.0

    def rejected(self) -> None:  # noqa: B027 - most remember nothing
        """Its last proposal was not made: what it remembers of it is to be forgotten."""

    def state(self) -> Mapping[str, Tensor]:
        """What it remembers from one proposal to the next, by name."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Remember what `state` returned; nothing for an empty mapping."""


def no_moments(optimizer: object) -> UsageError:
    """The error for an optimiser that has no moments to extrapolate."""
    return UsageError(
        f"moments: {type(optimizer).__name__} keeps no exp_avg and exp_avg_sq, which this predictor goes along.",
        "Train with Adam or AdamW, or choose another predictor.",
    )
