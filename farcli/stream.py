"""The one place where stored trajectories become torch tensors: blocks within a memory budget, read ahead.

Shape suffixes: B runs of a block, C snapshots of the context, H horizons, D coordinates of the block.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from farcli.config import format_size
from farcli.errors import NonFiniteError, ResourceError, StoreError, UsageError
from farcli.forecasters.base import Coupling, Prefix
from farcli.store import MappedChunks, Trajectory
from farcli.store import threads as store_threads

ResultT = TypeVar("ResultT")

_LARGEST_BLOCK = 16 << 20
"""Bytes beyond which a larger block no longer reads faster but delays the first result."""
_MOST_READERS = 4
"""Blocks read at once; each costs a block of memory."""
_LEAST_MAPPED = 2 << 20
"""Bytes of a block below which mapping it costs more than copying."""
_SMALL_ROW, _SMALL_BLOCK = 512 << 10, 4 << 20
"""Bytes of a snapshot, and of some targets, that one thread reads at once where it uses them itself: they stay in its
cache, and to fetch less costs more in calls."""
_PART_BYTES = 64 << 20
"""Bytes of what one thread works through before its result is asked for."""
_MAPPED_MORE = 4 << 20
"""Bytes of a file that count as ours beside what is asked for: large pages, of 2 MiB, are mapped whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Some runs of one store."""

    trajectory: Trajectory
    runs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block of coordinates of some runs of one source.

    Attributes:
        prefix: what was observed.
        truth_BHD: the recorded weights at the stream's `steps_H`; H = 0 where none were asked for.
        source: index of the source.
        runs: labels of the runs, in the order of axis B.
        stop: index, in the whole vector, one past the block's last coordinate.
        first: index, in the stream's `steps_H`, of the first step of `truth_BHD`.
    """

    prefix: Prefix
    truth_BHD: Tensor
    source: int
    runs: tuple[int, ...]
    stop: int
    first: int = 0


_Request = tuple[int, tuple[int, ...], int, int, int]
"""A block to read: index of the source, labels of its runs, runs before them, first coordinate, last plus one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a source is cut: `runs` runs and `width` coordinates a block, `bytes` of host memory in all.

    `readers` blocks are read at once while another is used. One reader shares its block among the store's threads;
    several have a block each, which spares them from waiting for one another at the end of every block. Where blocks
    are `mapped`, they are checked and used where the system holds the files, and copied nowhere; a reader then takes
    several at once, each of one chunk.
    """

    runs: int
    width: int
    bytes: int
    readers: int
    mapped: bool = False


def resolve_device(name: str) -> torch.device:
    """The device a name stands for; "auto" takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: the name is no device, or the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r}: expected auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: this machine has no CUDA device that torch can use.")
    return device


class Stream:
    """Blocks of chosen runs, snapshots and coordinates of one or more stores.

    Iterating reads each source once, group of runs by group of runs and, within a group, coordinates in
    order; the next block is read while the current one is used. Tensors of a block are valid until the
    next one is asked for.

    Args:
        sources: stores and the runs to take of each.
        coupling: JOINT gives whole vectors, COORDINATEWISE blocks of them.
        steps_C: steps of the observed snapshots.
        steps_H: steps of the true future to read along; may be empty.
        coordinates: how many coordinates, from the first; all of the vector when None.
        device: where the tensors shall be.
        memory: bytes of host memory that the user allows.
        share: which part of it the blocks may take.
        extra_rows: rows like those of a run that the consumer will hold per run beside the block
            (its forecasts), counted against `memory`.
        dtype: dtype of the tensors; the store's own when None.
        mapped: whether finished stores may be used where the system holds them, instead of copied.

    Raises:
        UsageError: a step or run is not in a store, or the stores' vectors differ in length.
        ResourceError: not even the smallest block fits into `memory`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        coupling: Coupling,
        steps_C: Sequence[int],
        steps_H: Sequence[int] = (),
        coordinates: int | None = None,
        device: torch.device | None = None,
        memory: int = 2_000_000_000,
        share: float = 1.0,
        extra_rows: int = 0,
        dtype: torch.dtype | None = None,
        mapped: bool = True,
    ) -> None:
        assert sources
        assert steps_C
        self.sources = tuple(sources)
        self.coupling = coupling
        self.steps_C = tuple(steps_C)
        self.steps_H = tuple(steps_H)
        self.device = device or torch.device("cpu")
        self.dtype = dtype
        self._may_map = mapped and self.device.type == "cpu"
        first = self.sources[0].trajectory
        self.coordinates = first.layout.size if coordinates is None else coordinates
        for source in self.sources:
            _check_source(source, self.steps_C + self.steps_H)
            if source.trajectory.layout.size < self.coordinates:
                raise UsageError(
                    f"{source.trajectory.path} has D = {source.trajectory.layout.size} coordinates, "
                    f"but {first.path} has D = {first.layout.size}; stores taken together must hold the same network."
                )
        self._memory = int(memory * share)
        self._given = memory
        self._extra_rows = extra_rows
        self.plans = tuple(self._plan(source) for source in self.sources)

    @property
    def runs(self) -> int:
        """Number of runs over all sources."""
        return sum(len(source.runs) for source in self.sources)

    @property
    def bytes(self) -> int:
        """Bytes read from the stores in one pass."""
        rows = len(self.steps_C) + len(self.steps_H)
        return sum(len(s.runs) * rows * self.coordinates * s.trajectory.dtype.itemsize for s in self.sources)

    def _plan(self, source: Source) -> Plan:
        trajectory, item = source.trajectory, source.trajectory.dtype.itemsize
        rows = len(self.steps_C) + len(self.steps_H)
        chunk = max(1, min(trajectory.column_chunk, self.coordinates))
        unit = self.coordinates if self.coupling is Coupling.JOINT else chunk

        def row_bytes(readers: int) -> int:
            return (rows * (1 + readers) + self._extra_rows) * item

        if row_bytes(1) * unit > self._memory:
            advice = (
                "The method needs whole vectors; give more memory or choose a coordinate-wise method."
                if self.coupling is Coupling.JOINT
                else "Give more memory, or forecast fewer steps at once with --to."
            )
            factor = self._given / max(1, self._memory)
            largest = self._memory // row_bytes(1)
            raise ResourceError(
                f"--memory {format_size(self._given)}: too small for one block of {trajectory.path} "
                f"({rows} snapshots of {unit} coordinates, read ahead): "
                f"at least {format_size(row_bytes(1) * unit * factor * 1.01)} is needed"
                + (f"; it allows D = {largest}." if self.coupling is Coupling.JOINT else "."),
                hint=advice,
            )

        def plan(readers: int) -> Plan:
            budget = min(self._memory, _LARGEST_BLOCK * (1 + readers))
            runs = max(1, min(len(source.runs), budget // (row_bytes(readers) * unit)))
            width = unit
            if self.coupling is Coupling.COORDINATEWISE:
                width = min(self.coordinates, max(1, budget // (row_bytes(readers) * runs * chunk)) * chunk)
            return Plan(runs=runs, width=width, bytes=row_bytes(readers) * runs * width, readers=readers)

        if self._may_map and trajectory.mappable and self.coupling is Coupling.COORDINATEWISE:
            mapped = self._plan_mapped(source, rows, rows * chunk * item, self._extra_rows * chunk * item)
            if mapped is not None:
                return mapped
        several = plan(min(store_threads.count(), _MOST_READERS))
        blocks = -(-len(source.runs) // several.runs) * -(-self.coordinates // several.width)
        if several.bytes > self._memory or blocks < 2 * several.readers:
            return plan(1)
        return several

    def _plan_mapped(self, source: Source, files: int, size: int, extra: int) -> Plan | None:
        """Blocks of one chunk: of `files` files and `size` bytes a run, and `extra` that the consumer holds of each."""
        runs = max(1, min(len(source.runs), _LARGEST_BLOCK // size))
        chunks = max(1, _LARGEST_BLOCK // (runs * size))
        width = min(chunks * source.trajectory.column_chunk, self.coordinates)
        # As many as may be, whatever the processors: what is not in memory yet is waited for by all of them at once.
        for readers in range(_MOST_READERS, 0, -1):
            taken = runs * (chunks * size * (1 + readers) + extra + files * _MAPPED_MORE)
            if runs * size >= _LEAST_MAPPED and taken <= self._memory:
                return Plan(runs=runs, width=width, bytes=taken, readers=readers, mapped=True)
        return None

    def _requests(self, plans: Sequence[Plan]) -> Iterator[_Request]:
        before = 0
        for index, (source, plan) in enumerate(zip(self.sources, plans, strict=True)):
            for first in range(0, len(source.runs), plan.runs):
                runs = source.runs[first : first + plan.runs]
                for start in range(0, self.coordinates, plan.width):
                    yield index, runs, before + first, start, min(start + plan.width, self.coordinates)
            before += len(source.runs)

    def __iter__(self) -> Iterator[Block]:
        readers = min(plan.readers for plan in self.plans)
        buffers: list[np.ndarray | None] = [None] * (1 + readers)
        steps = [*self.steps_C, *self.steps_H]

        def read(slot: int, request: _Request, chunks: MappedChunks | None) -> list[np.ndarray]:
            index, runs, _, start, stop = request
            trajectory = self.sources[index].trajectory
            if chunks is not None:
                return chunks.read(start // trajectory.column_chunk, -(-stop // trajectory.column_chunk))
            shape = (len(runs), len(steps), stop - start)
            count = shape[0] * shape[1] * shape[2]
            buffer = buffers[slot]
            if buffer is None or buffer.size < count or buffer.dtype != trajectory.dtype:
                buffer = buffers[slot] = self._buffer(count, trajectory.dtype)
            out = buffer[:count].reshape(shape)
            return [trajectory.read(runs, steps, start, stop, out=out)]

        with store_threads.readers(readers) as pool:
            ahead: deque[tuple[_Request, MappedChunks | None, Future[list[np.ndarray]]]] = deque()
            chunks = None
            try:
                for number, following in enumerate(self._requests(self.plans)):
                    if following[3] == 0:
                        chunks = self._mapped(following, steps)
                    # Its slot held the block last given, which the caller has let go of by asking for another.
                    ahead.append((following, chunks, pool.submit(read, number % len(buffers), following, chunks)))
                    if len(ahead) > readers:
                        yield from self._blocks(*ahead.popleft())
                while ahead:
                    yield from self._blocks(*ahead.popleft())
            finally:
                for _, _, future in ahead:
                    future.cancel()

    def _buffer(self, count: int, dtype: np.dtype) -> np.ndarray:
        """Memory to read into: such as the device copies from by itself, where it is a CUDA device."""
        if self.device.type != "cuda":
            return np.empty(count, dtype)
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(count, dtype=kind, pin_memory=True).numpy()

    @property
    def spreads(self) -> bool:
        """Whether `spread` can be asked for: big snapshots, each in a file of its own, on the CPU."""
        if self.device.type != "cpu" or self.dtype is not None or self.coupling is not Coupling.COORDINATEWISE:
            return False
        return all(s.trajectory.by_snapshot and self._small_blocks(s)[0].bytes <= self._memory for s in self.sources)

    def spread(self, work: Callable[[Iterator[Block]], ResultT], *, threads: int) -> Iterator[tuple[ResultT, int]]:
        """Have the data worked through part by part, each part by a thread that reads it itself.

        For work that takes as long as reading does, and takes targets in parts: all threads do both, and what one has
        just read is still in its cache. Parts are the same however many threads there are.

        Args:
            work: is given the blocks of a part: of one run, the context and a few targets, `Block.first` says which.
                Those of one context come one behind the other.
            threads: that work at the same time, where the memory has room for as many.

        Yields:
            What `work` returned for each part, in order, and how many coordinates of how many runs that was.
        """
        cuts = [self._small_blocks(source) for source in self.sources]
        parts: list[list[_Request]] = []
        left = 0
        for request in self._requests([plan for plan, _ in cuts]):
            size = request[4] - request[3]
            if left < size:
                parts.append([])
                left = _PART_BYTES // (4 * (len(self.steps_C) + len(self.steps_H)))
            parts[-1].append(request)
            left -= size
        threads = max(1, min(threads, len(parts), self._memory // max(plan.bytes for plan, _ in cuts)))

        def done(part: list[_Request]) -> tuple[ResultT, int]:
            blocks = (block for request in part for block in self._in_turn(request, cuts[request[0]][1]))
            return work(blocks), sum(stop - start for _, _, _, start, stop in part)

        with store_threads.readers(threads) as pool:
            yield from store_threads.map_ordered(done, parts, pool=pool, ahead=threads + 1)

    def _small_blocks(self, source: Source) -> tuple[Plan, int]:
        """How one thread reads a source for itself, and how many targets at a time."""
        trajectory = source.trajectory
        width = trajectory.column_chunk
        chunks = max(1, _SMALL_ROW // (width * trajectory.dtype.itemsize))
        targets = max(1, _SMALL_BLOCK // (chunks * width * trajectory.dtype.itemsize))
        taken = (len(self.steps_C) + targets) * chunks * trajectory.chunk_room
        return Plan(runs=1, width=chunks * width, bytes=taken, readers=1), targets

    def _in_turn(self, request: _Request, targets: int) -> Iterator[Block]:
        """The chunks of a request, with some targets after the other, in the same memory."""
        index, runs, position, start, stop = request
        trajectory, context = self.sources[index].trajectory, len(self.steps_C)
        first, last = start // trajectory.column_chunk, -(-stop // trajectory.column_chunk)
        room = np.empty((context + targets, (last - first) * trajectory.chunk_room), np.uint8)
        steps = [*self.steps_C, *self.steps_H[:targets]]
        chunks = trajectory.read_chunks(runs[0], steps, first, last, room[: len(steps)])
        width = trajectory.column_chunk
        bounds = [(low, min(low + width, stop)) for low in range(start, stop, width)]
        blocks = [
            self._block((index, runs, position, low, high), chunk[..., : high - low])
            for chunk, (low, high) in zip(chunks, bounds, strict=True)
        ]
        yield from blocks
        for at in range(targets, len(self.steps_H), targets):
            some = self.steps_H[at : at + targets]
            trajectory.read_chunks(runs[0], some, first, last, room[context : context + len(some)])
            for block in blocks:
                yield replace(block, truth_BHD=block.truth_BHD[:, : len(some)], first=at)

    def _mapped(self, request: _Request, steps: Sequence[int]) -> MappedChunks | None:
        index, runs, _, _, _ = request
        return self.sources[index].trajectory.map(runs, steps) if self.plans[index].mapped else None

    def _blocks(
        self, request: _Request, chunks: MappedChunks | None, future: Future[list[np.ndarray]]
    ) -> Iterator[Block]:
        index, runs, position, start, stop = request
        at = start
        for values in future.result():
            part = values[..., : stop - at]
            yield self._block((index, runs, position, at, at + part.shape[-1]), part)
            at += part.shape[-1]
        if chunks is not None:
            width = self.sources[index].trajectory.column_chunk
            chunks.release(start // width, -(-stop // width))

    def _block(self, request: _Request, values: np.ndarray) -> Block:
        index, runs, position, start, stop = request
        weights = torch.from_numpy(values)
        if self.dtype is not None or self.device.type != "cpu":
            weights = weights.to(device=self.device, dtype=self.dtype)
        context = len(self.steps_C)
        prefix = Prefix(
            weights_BCD=weights[:, :context],
            steps_C=self.steps_C,
            layout=self.sources[index].trajectory.layout,
            start=start,
            runs_B=tuple(range(position, position + len(runs))),
        )
        return Block(prefix=prefix, truth_BHD=weights[:, context:], source=index, runs=runs, stop=stop)


def _check_source(source: Source, steps: Sequence[int]) -> None:
    trajectory = source.trajectory
    recorded = set(trajectory.steps)
    for step in steps:
        if step not in recorded:
            span = f"{trajectory.steps[0]}…{trajectory.steps[-1]}" if trajectory.steps else "none"
            raise UsageError(
                f"{trajectory.path}: step {step} is not recorded; "
                f"it has {len(trajectory.steps)} snapshots, steps {span}."
            )
    for run in source.runs:
        if run not in trajectory.runs:
            raise UsageError(f"{trajectory.path}: there is no run {run}; it has runs {_span(trajectory.runs)}.")


def _span(values: Sequence[int]) -> str:
    return f"{values[0]}…{values[-1]}" if values else "none"


def require_finite(weights_BTD: Tensor, block: Block, path: object, steps: Sequence[int]) -> None:
    """Refuse NaN and Inf in a block.

    Raises:
        NonFiniteError: names the store, run, step and tensor of the first one.
    """
    # A sum is finite unless something in it is not (or it overflows, which the exact check below decides).
    if _sum_is_finite(weights_BTD) or bool(torch.isfinite(weights_BTD).all()):
        return
    b, t, d = (int(i) for i in torch.nonzero(~torch.isfinite(weights_BTD))[0])
    layout = block.prefix.layout
    segment = next(s for s in block.prefix.segments if s.start <= d < s.stop)
    raise NonFiniteError(
        f"{path}: run {block.runs[b]}, step {steps[t]}: tensor {layout.floats[segment.slot].name!r} "
        f"holds {float(weights_BTD[b, t, d])}.",
        hint="Choose other runs (--runs, --train-runs) or steps (--to), or record that run again.",
    )


def _sum_is_finite(weights_BTD: Tensor) -> bool:
    if weights_BTD.device.type != "cpu":
        return bool(torch.isfinite(weights_BTD.sum()))
    with np.errstate(over="ignore", invalid="ignore"):  # numpy: torch would start threads in the reader's way
        return all(bool(np.isfinite(rows_TD.sum())) for rows_TD in weights_BTD.numpy())


def open_sources(paths: Sequence[str], runs: str | None, *, partial: bool = False) -> list[Source]:
    """Open stores and choose the same runs of each.

    Raises:
        StoreError: a store cannot be opened, or holds nothing.
        UsageError: runs are out of range.
    """
    from farcli.config import parse_selection

    sources = []
    for path in paths:
        trajectory = Trajectory.open(path, partial=partial)
        if not trajectory.steps:
            raise StoreError(f"{path}: holds no snapshots.")
        chosen = parse_selection(runs, trajectory.runs, "runs") if runs else trajectory.runs
        sources.append(Source(trajectory=trajectory, runs=tuple(chosen)))
    return sources
