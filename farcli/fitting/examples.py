"""Training and validation examples of a fit by gradient, as mini-batches.

Shape suffixes: N examples (runs, or (run, coordinate) pairs), C snapshots of the context, H horizons, K
coordinates of an example, J sampled coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import ceil
from typing import ClassVar, final

import torch
from torch import Generator, Tensor

from farcli.config import format_size
from farcli.errors import ResourceError
from farcli.fitting.passes import Batch, Passes, not_finite
from farcli.forecasters.base import Coupling, Prefix, Problem, TrainedForecaster

_RUN, _PLACES = 8, 16
"""Bytes beside its weights that holding an example takes: its run; for each network its place, and that in a shuffled
order."""
_PART = 1 << 13
"""Examples handed over at once where no gradient is taken: hidden layers are far wider than an example."""


class Examples(ABC):
    """Training and validation examples of one network, as mini-batches."""

    aligned: ClassVar[bool]
    """Whether mini-batches of several networks have the same sizes in turn, and cost no pass over the data each."""
    updates: int
    """Mini-batches of one epoch."""

    @abstractmethod
    def epoch(self, generator: Generator) -> Iterator[Batch]:
        """All training examples once, in random order."""

    @abstractmethod
    def parts(self, *, training: bool) -> Iterator[Batch]:
        """All training or all validation examples once, in order, in parts that are not too large."""


Split = Callable[[frozenset[int]], Examples]
"""The examples of a network for which these runs, by position, are held out."""


def take(
    forecaster: TrainedForecaster,
    problem: Problem,
    passes: Passes,
    memory: int,
    generator: Generator,
) -> Split:
    """Hold what fits into `memory`, once for all networks.

    Args:
        forecaster: an unfitted forecaster.
        problem: what it is fitted for.
        passes: called once per pass.
        memory: bytes.
        generator: draws the coordinates to hold, where not all of them fit.

    Raises:
        ResourceError: not even one mini-batch fits.
        NonFiniteError: the data hold NaN or Inf.
    """
    like = next(iter(passes()))[1].new_empty(0)
    each = (len(problem.steps_C) + len(problem.steps_H)) * like.element_size()
    batch = forecaster.config.batch
    if forecaster.coupling is Coupling.JOINT:
        if problem.runs * problem.coordinates * each <= memory:
            return _held_runs(problem, passes, like, batch)
        return partial(_Streamed, problem, passes, batch)
    each += _RUN + _PLACES * forecaster.config.ensemble
    if memory < min(batch, problem.coordinates * problem.runs) * each:
        raise ResourceError(
            f"{forecaster.name}: a mini-batch of {batch} examples takes {format_size(batch * each)}, but the budget "
            f"leaves {format_size(memory)} for examples, which allows {memory // each}.",
            "Raise --memory, or take smaller ones: --set batch=N.",
        )
    size, most = problem.coordinates, max(1, memory // (each * problem.runs))
    whole = size <= most
    columns_J = torch.arange(size) if whole else torch.randint(size, (most,), generator=generator).unique()
    return _held_pairs(problem, passes, like, batch, columns_J)


def _held_runs(problem: Problem, passes: Passes, like: Tensor, batch: int) -> Split:
    """Whole vectors of all runs."""
    weights_RCD, truth_RHD = _empty(problem, like, problem.runs, problem.coordinates)
    for prefix, truth_BHD in _finite(problem, passes):
        runs_B = list(prefix.runs_B)
        weights_RCD[runs_B] = prefix.weights_BCD
        truth_RHD[runs_B] = truth_BHD
    return partial(_Held, problem, weights_RCD, truth_RHD, torch.arange(problem.runs), batch)


def _held_pairs(problem: Problem, passes: Passes, like: Tensor, batch: int, columns_J: Tensor) -> Split:
    """All runs of the coordinates `columns_J`, which increase."""
    runs, count = problem.runs, len(columns_J)
    weights_NC1, truth_NH1 = _empty(problem, like, runs * count, 1)
    weights_RJC, truth_RJH = weights_NC1.view(runs, count, -1), truth_NH1.view(runs, count, -1)
    for prefix, truth_BHD in _finite(problem, passes):
        bounds = torch.tensor([prefix.start, prefix.start + truth_BHD.shape[-1]])
        low, high = torch.searchsorted(columns_J, bounds).tolist()
        own_W = (columns_J[low:high] - prefix.start).to(truth_BHD.device)
        runs_B = list(prefix.runs_B)
        weights_RJC[runs_B, low:high] = prefix.weights_BCD[..., own_W].mT
        truth_RJH[runs_B, low:high] = truth_BHD[..., own_W].mT
    return partial(_Held, problem, weights_NC1, truth_NH1, torch.arange(runs).repeat_interleave(count), batch)


def _empty(problem: Problem, like: Tensor, examples: int, width: int) -> tuple[Tensor, Tensor]:
    shapes = ((examples, len(problem.steps_C), width), (examples, len(problem.steps_H), width))
    weights_NCK, truth_NHK = (like.new_empty(shape) for shape in shapes)
    return weights_NCK, truth_NHK


def _finite(problem: Problem, passes: Passes) -> Iterator[Batch]:
    """One pass over what is fitted: without buffers, refusing NaN and Inf."""
    for prefix, all_BHD in passes():
        width = min(all_BHD.shape[-1], problem.coordinates - prefix.start)
        if width <= 0:
            continue
        weights_BCD, truth_BHD = prefix.weights_BCD[..., :width], all_BHD[..., :width]
        if not bool(weights_BCD.isfinite().all() & truth_BHD.isfinite().all()):
            raise not_finite(problem, passes)
        yield replace(prefix, weights_BCD=weights_BCD), truth_BHD


@final
class _Held(Examples):
    """Examples in memory, each with the position of its run."""

    aligned = True

    def __init__(
        self,
        problem: Problem,
        weights_NCK: Tensor,
        truth_NHK: Tensor,
        run_N: Tensor,
        batch: int,
        validation: frozenset[int],
    ) -> None:
        self._problem = problem
        self._weights_NCK, self._truth_NHK, self._run_N, self._batch = weights_NCK, truth_NHK, run_N, batch
        held_out_N = torch.isin(run_N, torch.tensor(sorted(validation), dtype=torch.long))
        self._training, self._validation = (mask_N.nonzero().squeeze(1) for mask_N in (~held_out_N, held_out_N))
        self.updates = ceil(len(self._training) / batch)

    def epoch(self, generator: Generator) -> Iterator[Batch]:
        order = self._training[torch.randperm(len(self._training), generator=generator)]
        return map(self._at, order.split(self._batch))

    def parts(self, *, training: bool) -> Iterator[Batch]:
        return map(self._at, (self._training if training else self._validation).split(_PART))

    def _at(self, rows: Tensor) -> Batch:
        there = rows.to(self._truth_NHK.device)
        return _batch(self._problem, self._weights_NCK[there], self._truth_NHK[there], self._run_N[rows])


@final
class _Streamed(Examples):
    """Whole vectors that do not fit into memory: every epoch reads them again, and shuffles within blocks."""

    aligned = False

    def __init__(self, problem: Problem, passes: Passes, batch: int, validation: frozenset[int]) -> None:
        self._problem, self._passes, self._validation, self._batch = problem, passes, validation, batch
        blocks = [len(self._rows(prefix, training=True)) for prefix, _ in _finite(problem, passes)]
        self.updates = sum(ceil(count / batch) for count in blocks)

    def epoch(self, generator: Generator) -> Iterator[Batch]:
        for prefix, truth_BHD in self._passes():
            rows = self._rows(prefix, training=True)
            order = rows[torch.randperm(len(rows), generator=generator)]
            yield from (self._at(prefix, truth_BHD, part) for part in order.split(self._batch) if len(part))

    def parts(self, *, training: bool) -> Iterator[Batch]:
        for prefix, truth_BHD in self._passes():
            rows = self._rows(prefix, training=training)
            if len(rows):
                yield self._at(prefix, truth_BHD, rows)

    def _rows(self, prefix: Prefix, *, training: bool) -> Tensor:
        chosen = [row for row, run in enumerate(prefix.runs_B) if (run not in self._validation) == training]
        return torch.tensor(chosen, dtype=torch.long)

    def _at(self, prefix: Prefix, truth_BHD: Tensor, rows: Tensor) -> Batch:
        size, there = self._problem.coordinates, rows.to(truth_BHD.device)
        runs_B = torch.tensor(prefix.runs_B)[rows]
        return _batch(self._problem, prefix.weights_BCD[there, :, :size], truth_BHD[there, :, :size], runs_B)


def _batch(problem: Problem, weights_NCK: Tensor, truth_NHK: Tensor, run_N: Tensor) -> Batch:
    dtype = torch.promote_types(weights_NCK.dtype, torch.float32)  # half-precision stores are computed in float32
    weights_NCK, truth_NHK = weights_NCK.to(dtype), truth_NHK.to(dtype)
    prefix = Prefix(
        weights_BCD=weights_NCK, steps_C=problem.steps_C, layout=problem.layout, start=0, runs_B=tuple(run_N.tolist())
    )
    return prefix, truth_NHK
