"""What a workload is: a real training run, complete with data, that farcli can repeat from a seed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from farcli.errors import UsageError
from farcli.workloads.optimisation import TrainingOptions, build_optimizer, rate_multiple

Batch = tuple[Tensor, ...]


class Workload(ABC):
    """A network, its data, its optimiser and its held-out measure.

    Implementations are final; options are the fields of the frozen dataclass `Config`, which inherits those of
    training, each with `metadata={"help": …}`. Everything random is drawn from the seeds given, never from global
    state. Only dropout and its like draw from torch's generator, in `loss`: training seeds it for them.

    Runs in lockstep: where `lockstep` is true, one model trains all runs at once and every parameter
    and buffer carries a leading axis over runs; elsewhere a model holds one run, and `seeds` has length 1.
    A lockstep workload draws nothing from torch's generator: it would make a run depend on its neighbours.
    """

    Config: ClassVar[type[TrainingOptions]]
    lockstep: ClassVar[bool]
    summary: ClassVar[str]
    """One line for listings: what is trained on what."""
    default_steps: ClassVar[int]
    default_every: ClassVar[int]
    needs: ClassVar[str | None] = None
    """The extra of the package that its data comes with ("demo"), None for none."""
    threads: ClassVar[int | None] = None
    """Threads that torch computes it with; a fixed number makes its runs equal on machines with other
    numbers of cores, and small networks train fastest with 1. None leaves torch's setting alone."""
    fused: ClassVar[bool] = False
    """Whether the optimiser uses torch's fused kernels: faster, but in lockstep not equal to each run alone."""

    @abstractmethod
    def __init__(self, config: Any) -> None:
        """Prepare the data.

        Raises:
            UsageError: the data or a package it needs is not there; says which and how to get it.
        """

    @property
    @abstractmethod
    def config(self) -> TrainingOptions:
        """The options, an instance of `Config` with nothing about training left open."""

    @abstractmethod
    def model(self, seeds: Sequence[int]) -> nn.Module:
        """A freshly initialised network, in training mode."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimiser that trains it, at the full learning rate."""
        return build_optimizer(self.config, model.parameters(), fused=self.fused)

    def rate(self, step: int) -> float:
        """What the optimiser's learning rates are multiplied by in the update that leads from `step` to `step + 1`."""
        return rate_multiple(self.config, step)

    def rate_change(self, last: int, start: int = 0) -> int | None:
        """The first of the steps `start` to `last` − 1 at which a schedule changes the rate; None if there is none."""
        return next((step for step in range(start, last) if self.rate(step) != 1), None)

    @abstractmethod
    def batches(self, seeds: Sequence[int], start: int = 0) -> Iterator[Batch]:
        """Endless training batches, one per optimiser step, in an order the seeds determine.

        Args:
            seeds: of the runs.
            start: batches to leave out, as cheaply as may be: a resumed run has had them.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Training loss of a batch: a scalar, or shape [runs] in lockstep."""

    @abstractmethod
    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Held-out measures of a network that holds one run; leaves its weights and buffers unchanged.

        Returns:
            "loss" always, "accuracy" (0 to 1) where it makes sense.
        """

    def verification(self, seed: int, draw: int, batches: int) -> Sequence[Batch]:
        """Held-out batches to verify a leap on: never trained on, and none of what `evaluate` reports.

        They differ from draw to draw, and no example is in two batches of a draw. Where the data are finite, a draw
        repeats examples of an earlier one only after all of them have been used.

        Args:
            seed: of the run, from which they are drawn in a stream of their own.
            draw: its number, from 0.
            batches: how many, at least 1.

        Returns:
            Batches for `loss` on a model that holds one run, as large as those of training; fewer, or one smaller
            batch, where there are not enough examples.

        Raises:
            UsageError: nothing is left to verify on; the hint says which option leaves some.
        """
        raise UsageError(f"{type(self).__name__}: has no data to verify leaps on.", "Implement Workload.verification.")

    def calibration(self, seed: int) -> Iterator[Batch]:
        """Training batches to re-estimate BatchNorm statistics from, always the same; none where there is none.

        Statistics are averaged over the batches with equal weight.
        """
        return iter(())

    def calibration_cost(self) -> float:
        """Cost of one pass over `calibration` in training steps."""
        return 0.0

    @abstractmethod
    def chance(self) -> dict[str, float]:
        """The same measures for the best guess that ignores the input: the line to be under."""

    @abstractmethod
    def evaluation_cost(self) -> float:
        """Cost of one `evaluate` in training steps (a forward pass is a third of a step)."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, a network is in evaluation mode, without gradients; afterwards each module's mode is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
