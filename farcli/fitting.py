"""Every way a forecaster is fitted: solved from sums in as few passes as it takes, or by gradient.

Shape suffixes: N examples (runs, or (run, coordinate) pairs), C snapshots of the context, H horizons, K
coordinates of an example.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from farcli.config import format_size
from farcli.errors import NonFiniteError, ResourceError, StoreError, UsageError
from farcli.files import staged_file
from farcli.forecasters.base import (
    Coupling,
    Descent,
    Prefix,
    Problem,
    SolvedForecaster,
    Sums,
    SumsInParts,
    TrainedForecaster,
)
from farcli.stream import Block

SolvedT = TypeVar("SolvedT", bound=SolvedForecaster)
TrainedT = TypeVar("TrainedT", bound=TrainedForecaster)

Passes = Callable[[], Iterable[tuple[Prefix, Tensor]]]
"""Starts one pass over the training data: each block's prefix and the true weights at the problem's `steps_H`."""
Spread = Callable[[Callable[[Iterator[Block]], Sums]], Iterator[Sums]]
"""Has one pass worked through in parts, by several threads: `Stream.spread`."""
_SUMS_AT_ONCE = 10
"""Sums that a pass in parts holds at most: the whole, and those of eight threads and one part ahead."""


def solve(
    forecaster: SolvedT,
    problem: Problem,
    passes: Passes,
    *,
    spread: Spread | None = None,
    report: Callable[[int, int], None] | None = None,
) -> SolvedT:
    """Fit a forecaster from sums, pass after pass, until it is settled.

    Args:
        forecaster: an unfitted forecaster.
        problem: what it is fitted for.
        passes: called once per pass; a block's tensors need to be valid until the next one is asked for.
        spread: taken instead for sums that take targets in parts, where they are small; None where there is none.
        report: called after each block with the pass (1, 2, …) and the weights taken in during it so far.

    Returns:
        The fitted forecaster.

    Raises:
        NonFiniteError: the data hold NaN or Inf; names the run and tensor.
        ResourceError: the sums need more than `problem.memory`.
        UsageError: the problem does not fit the options.
    """
    count = 0
    while count == 0 or forecaster.unsettled:
        count += 1
        sums = forecaster.sums(problem)
        if spread is not None and isinstance(sums, SumsInParts) and sums.nbytes <= problem.memory // _SUMS_AT_ONCE:
            for part in spread(partial(_summed, forecaster, problem)):
                sums.merge(part)
        else:
            taken = 0
            for prefix, truth_BHD in passes():
                sums.add(prefix, truth_BHD)
                taken += prefix.weights_BCD.numel() + truth_BHD.numel()
                if report is not None:
                    report(count, taken)
        if not sums.finite:
            raise _not_finite(problem, passes)
        forecaster = forecaster.solved(problem, sums)
    return forecaster


def require_room(forecaster: SolvedForecaster | TrainedForecaster, problem: Problem) -> None:
    """Refuse what the method itself cannot hold, whatever the data take.

    Raises:
        ResourceError: more than `problem.memory`; names the largest D possible.
        UsageError: the problem does not fit the options.
    """
    if isinstance(forecaster, TrainedForecaster):
        _network_bytes(forecaster, problem)
    else:
        forecaster.sums(problem)


def _summed(forecaster: SolvedForecaster, problem: Problem, blocks: Iterator[Block]) -> Sums:
    sums = forecaster.sums(problem)
    assert isinstance(sums, SumsInParts)
    for block in blocks:
        sums.add(block.prefix, block.truth_BHD, block.first)
    return sums


def _not_finite(problem: Problem, passes: Passes) -> NonFiniteError:
    """Looks for the first NaN or Inf: another pass, but only for data that are wrong."""
    for prefix, truth_BHD in passes():
        width = problem.coordinates - prefix.start
        for weights_BTD, steps in ((prefix.weights_BCD, prefix.steps_C), (truth_BHD, problem.steps_H)):
            wrong = (~torch.isfinite(weights_BTD[..., :width])).nonzero()
            if len(wrong):
                run, time, column = (int(index) for index in wrong[0])
                slot = next(s.slot for s in prefix.segments if s.start <= column < s.stop)
                return NonFiniteError(
                    f"training run {prefix.runs_B[run]} (counted from 0): tensor "
                    f"{problem.layout.floats[slot].name!r} holds {float(weights_BTD[run, time, column])} "
                    f"at step {steps[time]}, expected finite weights.",
                    "Leave the run out with --train-runs, or end the steps before it diverged.",
                )
    return NonFiniteError("training data: weights are too large; their squares overflow float64.")


# ------------------------------------------------------------------ by gradient

_STATES = 12
"""Copies of a network that a fit takes: itself, its gradient, Adam's two moments, the best state, the latest, the one
before, and five for what backpropagation adds up and the allocator keeps, as measured (`make bench-fit`)."""
_NOISE = 0x5EED
"""Added to the seed of the random numbers that the validation loss is measured with, the same every epoch."""
_INDEX = 24
"""Bytes beside its weights that holding an example takes: its run, its place, and its place in a shuffled order."""
_PART = 1 << 13
"""Examples handed over at once where no gradient is taken: hidden layers are far wider than an example."""

Batch = tuple[Prefix, Tensor]


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
        best: the forecaster of the best state before that, None where no epoch ended well.
    """

    def __init__(self, message: str, hint: str, best: TrainedT | None) -> None:
        super().__init__(message, hint)
        self.best = best


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Generic[TrainedT]):
    """What a descent found.

    Attributes:
        forecaster: the fitted forecaster.
        losses: mean training loss of every epoch.
        validation: validation loss after every epoch; empty without validation runs.
        epoch: the epoch, from 1, after which the forecaster had this state.
        updates: updates made in all.
    """

    forecaster: TrainedT
    losses: tuple[float, ...]
    validation: tuple[float, ...]
    epoch: int
    updates: int

    def summary(self) -> dict[str, int | float | None]:
        """Epochs and updates made, the epoch kept, its losses."""
        kept = self.epoch - 1
        return {
            "epochs": len(self.losses),
            "updates": self.updates,
            "epoch": self.epoch,
            "loss": self.losses[kept],
            "validation_loss": self.validation[kept] if self.validation else None,
        }


def descend(
    forecaster: TrainedT,
    problem: Problem,
    passes: Passes,
    *,
    device: torch.device | None = None,
    saved: Saved | None = None,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> Fitted[TrainedT]:
    """Fit a forecaster by gradient: Adam on mini-batches, as its options (`Descent`) say.

    Examples that fit into `problem.memory` are held. Of larger data, coordinate-wise forecasters get a uniform
    sample of coordinates, all runs of each, drawn in one pass; for joint ones every epoch is a pass that shuffles
    runs within blocks. Equal seeds give equal bits on the same machine; torch's global generator stays as it was.

    Args:
        forecaster: an unfitted forecaster.
        problem: what it is fitted for.
        passes: called once per pass; a block's tensors need to be valid until the next one is asked for.
        device: where the network and the blocks are.
        saved: where to go on from, and to save to; a fit that was stopped and went on has the bits of one that was not.
        report: called after each epoch with (updates done, updates in all, losses).

    Returns:
        The fitted forecaster, and how it came about: the last state, or the best on the validation runs.

    Raises:
        DivergedError: the loss or the parameters stopped being finite; holds the best state.
        NonFiniteError: the data hold NaN or Inf; names the run and tensor.
        ResourceError: the network needs more than `problem.memory`; names the largest D possible.
        UsageError: the problem does not fit the options, or the runs are too few to split.
    """
    options, device = forecaster.config, device or torch.device("cpu")
    left = problem.memory - _network_bytes(forecaster, problem)
    validation = _validation_runs(forecaster.name, problem.runs, options)
    generator = torch.Generator().manual_seed(options.seed)
    examples = _examples(forecaster, problem, passes, left, validation, generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(options.seed)  # not torch.manual_seed: devices keep theirs
        network = forecaster.network(problem).to(device)
    forecaster = forecaster.with_network(problem, network)
    forecaster.measure(examples.parts(training=True))
    return _descend(forecaster, network, problem, examples, generator, bool(validation), saved, report)


def _descend(
    forecaster: TrainedT,
    network: nn.Module,
    problem: Problem,
    examples: "_Examples",
    generator: torch.Generator,
    validated: bool,
    saved: Saved | None,
    report: Callable[[float, float, str], None],
) -> Fitted[TrainedT]:
    options = forecaster.config
    optimizer = torch.optim.Adam(network.parameters(), lr=options.lr, fused=True)
    total = options.epochs * examples.updates
    total = min(total, options.updates) if options.updates else total
    best = _Best(network)
    losses: list[float] = []
    judged: list[float] = []
    done, last = 0, float("nan")
    if saved is not None and (state := saved.load()) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        best.see(state["best_loss"], state["best"], state["best_epoch"])
        losses, judged, done, last = state["losses"], state["judged"], state["done"], state["last"]
    while done < total and not (options.patience and len(losses) - best.epoch >= options.patience):
        network.train()
        before = _state(network)
        sum_of_losses, count = 0.0, 0
        for prefix, truth_NHK in examples.epoch(generator):
            optimizer.zero_grad(set_to_none=True)
            loss = forecaster.loss(prefix, problem.steps_H, truth_NHK, generator)
            value = float(loss.detach())
            if not isfinite(value):
                raise _diverged(forecaster, f"the loss is {value} at update {done + 1}", last, best)
            loss.backward()
            optimizer.step()
            last = value
            done += 1
            sum_of_losses += value * len(prefix.runs_B)
            count += len(prefix.runs_B)
            if done == total:
                break
        if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
            raise _diverged(forecaster, f"parameters are not finite at update {done}", last, best)
        losses.append(sum_of_losses / count)
        text = f"epoch {len(losses)}, loss {losses[-1]:.4g}"
        if validated:
            network.eval()
            judged.append(_validation_loss(forecaster, problem, examples))
            text += f", validation {judged[-1]:.4g}"
        # A training loss is that of the state before the updates, a validation loss that of the one after.
        best.see(*((judged[-1], _state(network)) if validated else (losses[-1], before)), len(losses))
        report(done, total, text)
        if saved is not None and saved.due:
            saved.save(
                {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                    "best": best.state,
                    "best_loss": best.loss,
                    "best_epoch": best.epoch,
                    "losses": losses,
                    "judged": judged,
                    "done": done,
                    "last": last,
                }
            )
    if validated:
        if best.epoch == 0:
            raise _diverged(forecaster, "the validation loss was never finite", last, best)
        best.restore()
    network.requires_grad_(False).eval()
    return Fitted(
        forecaster=forecaster,
        losses=tuple(losses),
        validation=tuple(judged),
        epoch=best.epoch if validated else len(losses),
        updates=done,
    )


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


class _Best:
    """The state of a network at its lowest loss so far."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.state: dict[str, Tensor] = {}
        self.loss = float("inf")
        self.epoch = 0

    def see(self, loss: float, state: dict[str, Tensor], epoch: int) -> None:
        if loss < self.loss:
            self.loss, self.state, self.epoch = loss, state, epoch

    def restore(self) -> None:
        self.network.load_state_dict(self.state)


def _diverged(forecaster: TrainedT, what: str, last: float, best: _Best) -> DivergedError[TrainedT]:
    found = f"the last finite loss was {last:.4g}" if isfinite(last) else "no loss was finite before"
    if best.epoch:
        best.restore()
        found += f", the best epoch was {best.epoch} with {best.loss:.4g}"
    best.network.requires_grad_(False).eval()
    return DivergedError(
        f"{forecaster.name}: the fit diverged: {what}; {found}.",
        f"Lower the learning rate: --set lr={forecaster.config.lr / 10:g}.",
        forecaster if best.epoch else None,
    )


@torch.no_grad()
def _validation_loss(forecaster: TrainedForecaster, problem: Problem, examples: "_Examples") -> float:
    """Mean loss over the validation examples, with the same random numbers every time."""
    generator = torch.Generator().manual_seed(forecaster.config.seed + _NOISE)
    total, count = 0.0, 0
    for prefix, truth_NHK in examples.parts(training=False):
        total += float(forecaster.loss(prefix, problem.steps_H, truth_NHK, generator)) * len(prefix.runs_B)
        count += len(prefix.runs_B)
    return total / count


def _validation_runs(who: str, runs: int, options: Descent) -> frozenset[int]:
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
    order = torch.randperm(runs, generator=torch.Generator().manual_seed(options.seed))
    return frozenset(order[:count].tolist())


def _network_bytes(forecaster: TrainedForecaster, problem: Problem) -> int:
    """Bytes that fitting takes beside the data.

    Raises:
        ResourceError: more than the budget.
    """

    def need(size: int) -> int:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # no memory is touched
            network = forecaster.network(replace(problem, coordinates=size))
        return _STATES * sum(p.numel() * p.element_size() for p in network.parameters())

    found = need(problem.coordinates)
    if found <= problem.memory:
        return found
    joint = forecaster.coupling is Coupling.JOINT
    low, high = 0, problem.coordinates if joint else 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= problem.memory else (low, middle)
    size = f"D = {problem.coordinates} parameters take" if joint else "the network takes"
    raise ResourceError(
        f"{forecaster.name}: {size} {format_size(found)} (the network, its gradient, Adam's moments, the best "
        f"state), but the budget is {format_size(problem.memory)}, which allows {f'D = {low}' if joint else 'none'}.",
        "Raise --memory" + (", or choose a coordinate-wise method, which takes any D." if joint else "."),
    )


class _Examples(ABC):
    """Training and validation examples of one fit, as mini-batches."""

    updates: int
    """Mini-batches of one epoch."""

    @abstractmethod
    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """All training examples once, in random order."""

    @abstractmethod
    def parts(self, *, training: bool) -> Iterator[Batch]:
        """All training or all validation examples once, in order, in parts that are not too large."""


def _examples(
    forecaster: TrainedForecaster,
    problem: Problem,
    passes: Passes,
    memory: int,
    validation: frozenset[int],
    generator: torch.Generator,
) -> _Examples:
    """Hold what fits into `memory`; see `descend`.

    Raises:
        ResourceError: not even one mini-batch fits.
        NonFiniteError: the data hold NaN or Inf.
    """
    like = next(iter(passes()))[1].new_empty(0)
    each = (len(problem.steps_C) + len(problem.steps_H)) * like.element_size()
    batch = forecaster.config.batch
    if forecaster.coupling is Coupling.JOINT:
        if problem.runs * problem.coordinates * each <= memory:
            return _held_runs(problem, passes, like, validation, batch)
        return _Streamed(problem, passes, validation, batch)
    each += _INDEX
    if memory < min(batch, problem.coordinates * problem.runs) * each:
        raise ResourceError(
            f"{forecaster.name}: a mini-batch of {batch} examples takes {format_size(batch * each)}, but the budget "
            f"leaves {format_size(memory)} for examples, which allows {memory // each}.",
            "Raise --memory, or take smaller ones: --set batch=N.",
        )
    size, most = problem.coordinates, max(1, memory // (each * problem.runs))
    whole = size <= most
    columns_J = torch.arange(size) if whole else torch.randint(size, (most,), generator=generator).unique()
    return _held_pairs(problem, passes, like, validation, batch, columns_J)


def _held_runs(problem: Problem, passes: Passes, like: Tensor, validation: frozenset[int], batch: int) -> "_Held":
    """Whole vectors of all runs."""
    weights_RCD, truth_RHD = _empty(problem, like, problem.runs, problem.coordinates)
    for prefix, truth_BHD in _finite(problem, passes):
        runs_B = list(prefix.runs_B)
        weights_RCD[runs_B] = prefix.weights_BCD
        truth_RHD[runs_B] = truth_BHD
    return _Held(problem, weights_RCD, truth_RHD, torch.arange(problem.runs), validation, batch)


def _held_pairs(
    problem: Problem, passes: Passes, like: Tensor, validation: frozenset[int], batch: int, columns_J: Tensor
) -> "_Held":
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
    return _Held(problem, weights_NC1, truth_NH1, torch.arange(runs).repeat_interleave(count), validation, batch)


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
            raise _not_finite(problem, passes)
        yield replace(prefix, weights_BCD=weights_BCD), truth_BHD


@final
class _Held(_Examples):
    """Examples in memory, each with the position of its run."""

    def __init__(
        self,
        problem: Problem,
        weights_NCK: Tensor,
        truth_NHK: Tensor,
        run_N: Tensor,
        validation: frozenset[int],
        batch: int,
    ) -> None:
        self._problem = problem
        self._weights_NCK, self._truth_NHK, self._run_N, self._batch = weights_NCK, truth_NHK, run_N, batch
        held_out_N = torch.isin(run_N, torch.tensor(sorted(validation), dtype=torch.long))
        self._training, self._validation = (mask_N.nonzero().squeeze(1) for mask_N in (~held_out_N, held_out_N))
        self.updates = ceil(len(self._training) / batch)

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        order = self._training[torch.randperm(len(self._training), generator=generator)]
        return map(self._at, order.split(self._batch))

    def parts(self, *, training: bool) -> Iterator[Batch]:
        return map(self._at, (self._training if training else self._validation).split(_PART))

    def _at(self, rows: Tensor) -> Batch:
        there = rows.to(self._truth_NHK.device)
        return _batch(self._problem, self._weights_NCK[there], self._truth_NHK[there], self._run_N[rows])


@final
class _Streamed(_Examples):
    """Whole vectors that do not fit into memory: every epoch reads them again, and shuffles within blocks."""

    def __init__(self, problem: Problem, passes: Passes, validation: frozenset[int], batch: int) -> None:
        self._problem, self._passes, self._validation, self._batch = problem, passes, validation, batch
        blocks = [len(self._rows(prefix, training=True)) for prefix, _ in _finite(problem, passes)]
        self.updates = sum(ceil(count / batch) for count in blocks)

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
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
