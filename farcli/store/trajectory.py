"""Opening and reading a stored trajectory."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial as bind
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from farcli.errors import DamagedError, StoreError, UnfinishedError, UsageError
from farcli.layout import Layout
from farcli.store.disk import owner
from farcli.store.metadata import (
    DIMENSIONS,
    DOCUMENT,
    INTEGER_DIMENSIONS,
    ArrayMetadata,
    Header,
    Record,
    parse_array,
    read_document,
    read_record,
)
from farcli.store.native import MappedChunks, NativeArray
from farcli.store.threads import map_ordered

if TYPE_CHECKING:
    from farcli.store.foreign import ForeignArray

_VERIFY_BYTES = 4 << 20
"""Bytes that a thread of `verify` reads at once; they stay in the cache until they are searched for NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a store.

    Attributes:
        what: the sentence for the user; it names the store.
        run: label of the run it concerns, if one.
        step: step it concerns, if one.
        kind: "damage" for bytes that are missing or wrong, "non-finite" for NaN and Inf that were recorded so.
    """

    what: str
    run: int | None = None
    step: int | None = None
    kind: Literal["damage", "non-finite"] = "damage"


class Trajectory:
    """A trajectory of weights over (run, step, parameter), open for reading.

    Opened by `Trajectory.open`. Reading is thread-safe; an instance can be sent to a spawned process, which
    then opens the store itself. What was committed when the store was opened is what it shows.

    Attributes:
        path: where it is.
        kind: "run" or "forecast".
        layout: where each tensor lies in the vector.
        header: the store's attributes: schema, kind, layout, runs, provenance and what its maker added.
        dtype: of the weights.
        runs: labels of axis 0.
        steps: optimiser steps of axis 1, increasing.
        snapshots: how many of the steps each run has.
        finished: whether every run has every planned snapshot.
        column_chunk: coordinates that are stored and checked together; blocks aligned to it read fastest.
    """

    def __init__(self, path: Path, record: Record, *, finished: bool) -> None:
        header, weights = record.header, record.weights
        self.path = path
        self.kind = header.kind
        self.layout: Layout = header.layout
        self.header: dict[str, Any] = header.values
        self.planned_steps = header.planned_steps
        self.runs = header.runs
        self.steps = record.steps
        self.snapshots = record.snapshots
        self.finished = finished
        self.dtype = weights.dtype
        self.column_chunk = min(weights.inner[2], header.layout.size)
        self._run_index = {label: index for index, label in enumerate(self.runs)}
        self._step_index = {step: index for index, step in enumerate(self.steps)}
        self._integer_array: NativeArray | ForeignArray | None = None  # opened when first needed
        self._weights = open_array(path, "weights", weights, self.runs, self.steps)

    @classmethod
    def open(cls, path: str | Path, *, partial: bool = False) -> "Trajectory":
        """Open a store.

        Args:
            path: of the store.
            partial: accept one whose recording has not finished, with the snapshots it has.

        Raises:
            StoreError: there is no store, or not one this farcli can read, or its metadata contradict
                each other.
            UnfinishedError: its recording has not finished and `partial` is false.
            DamagedError: files are missing or unreadable.
        """
        path = Path(path)
        finished = (path / DOCUMENT).is_file()
        if not finished and not (path / "weights" / DOCUMENT).is_file():
            raise _not_a_store(path)
        record = read_record(path, finished=finished)
        if not finished and not partial:
            raise _unfinished(path, record.header, record.steps, record.snapshots)
        trajectory = cls(path, record, finished=finished)
        if record.snapshots[0] and trajectory.size:
            trajectory._weights.check_first()
        return trajectory

    def __reduce__(self) -> tuple[Callable[..., "Trajectory"], tuple[Path]]:
        return bind(Trajectory.open, partial=not self.finished), (self.path,)

    def __repr__(self) -> str:
        return f"<Trajectory {self.path}: {self.kind}, {len(self.runs)} runs × {len(self.steps)} steps × {self.size}>"

    @property
    def size(self) -> int:
        """Length D of the stored vectors."""
        return self.layout.size

    @property
    def id(self) -> str:
        """The store's own identifier, from its provenance; empty where it has none."""
        found = self.header.get("provenance")
        return str(found.get("id", "")) if isinstance(found, dict) else ""

    def read(
        self,
        runs: Sequence[int],
        steps: Sequence[int],
        start: int = 0,
        stop: int | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read coordinates [start, stop) of chosen snapshots, every checksum compared.

        Only the chunks that hold them are read. Memory beside the result: one chunk.

        Args:
            runs: labels of runs.
            steps: steps.
            start: first coordinate.
            stop: one past the last coordinate; D when None.
            out: where to put the result, of the store's dtype and contiguous along its last axis.

        Returns:
            Array [len(runs), len(steps), stop − start]; `out` where it was given.

        Raises:
            UsageError: the store has no such run, step or coordinate.
            DamagedError: a file is missing, too short or fails its checksum, or a run of an unfinished store
                has not got that far.
        """
        stop = self.size if stop is None else stop
        if not 0 <= start <= stop <= self.size:
            raise UsageError(f"{self.path}: coordinates {start}:{stop} are out of range, there are {self.size}.")
        at_runs, at_steps = self._locate(runs, steps)
        shape = (len(at_runs), len(at_steps), stop - start)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape or out.dtype != self.dtype or (out.size and out.strides[-1] != out.itemsize):
            raise ValueError(
                f"out is {out.dtype}{list(out.shape)}, expected {self.dtype}{list(shape)}, rows contiguous"
            )
        if out.size:
            self._weights.read(at_runs, at_steps, start, stop, out)
        return out

    @property
    def by_snapshot(self) -> bool:
        """Whether each snapshot has a file of its own, so that `read_chunks` can be asked for."""
        return self.size > 0 and isinstance(self._weights, NativeArray) and self._weights.by_snapshot

    def read_chunks(self, run: int, steps: Sequence[int], first: int, last: int, room: np.ndarray) -> list[np.ndarray]:
        """Read the chunks [first, last) of snapshots of a run: see `NativeArray.read_chunks`.

        Args:
            run: label.
            steps: labels.
            first: number of the first chunk, of `column_chunk` coordinates.
            last: one past the number of the last.
            room: uint8 [len(steps), (last − first) · `chunk_room`].
        """
        assert isinstance(self._weights, NativeArray)
        (at_run,), at_steps = self._locate([run], steps)
        return self._weights.read_chunks(at_run, at_steps, first, last, room)

    @property
    def chunk_room(self) -> int:
        """Bytes that `read_chunks` takes for a chunk of a snapshot."""
        assert isinstance(self._weights, NativeArray)
        return self._weights.chunk_room

    @property
    def mappable(self) -> bool:
        """Whether `map` may find what it needs."""
        return self.finished and self.size > 0 and isinstance(self._weights, NativeArray) and self._weights.mappable

    def map(self, runs: Sequence[int], steps: Sequence[int]) -> MappedChunks | None:
        """Chosen snapshots of a mappable store where the system holds them, to be read chunk by chunk without a copy.

        Chunk i is the coordinates from i · `column_chunk` on. None where the system refuses; `read` always works.

        Raises:
            UsageError: the store has no such run or step.
            DamagedError: a file is missing or too short.
        """
        assert isinstance(self._weights, NativeArray)
        return self._weights.map(*self._locate(runs, steps))

    def integers(self, run: int, step: int) -> np.ndarray:
        """The integer buffers of one snapshot: int64 [layout.integers].

        Raises:
            StoreError: the store holds none, though its network has some (a forecast made without them).
            UsageError: the store has no such run or step.
            DamagedError: they cannot be read.
        """
        at_runs, at_steps = self._locate([run], [step])
        out = np.empty((1, 1, self.layout.integers), np.int64)
        if out.size:
            array = self._integers()
            if array is None:
                raise StoreError(f"{self.path}: holds no integer buffers.")
            array.read(at_runs, at_steps, 0, self.layout.integers, out)
        return out[0, 0]

    @property
    def has_integers(self) -> bool:
        """Whether integer buffers were stored."""
        return (self.path / "integers" / DOCUMENT).is_file()

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(
            os.lstat(os.path.join(folder, file)).st_size for folder, _, files in os.walk(self.path) for file in files
        )

    def describe(self) -> dict[str, Any]:
        """What `inspect` shows of how it is stored: shape, dimensions, dtype, chunks, codecs, size, state."""
        meta = self._weights.metadata
        return {
            "path": str(self.path),
            "kind": self.kind,
            "id": self.id,
            "schema": self.header["schema"],
            "finished": self.finished,
            "dimensions": list(DIMENSIONS),
            "shape": list(meta.shape),
            "dtype": meta.dtype.name,
            "file": list(meta.outer),
            "chunk": list(meta.inner),
            "sharded": meta.sharded,
            "codecs": _codec_names(meta.document["codecs"]),
            "reader": "farcli" if meta.native else "zarr",
            "bytes": self.nbytes,
            "raw_bytes": sum(self.snapshots) * self.size * meta.dtype.itemsize,
            "snapshots": list(self.snapshots),
            "planned": sum(self.snapshots) if self.finished else _planned(self.runs, self.steps, self.planned_steps),
            "integers": self.layout.integers if self.has_integers else 0,
        }

    def verify(self, report: Callable[[float, float], None] = lambda done, total: None) -> Iterator[Problem]:
        """Read everything and yield what is wrong: files, checksums, order of steps, NaN and Inf.

        At most one problem per file and run-step pair. Several threads, with a few megabytes each.

        Args:
            report: called with (bytes of weights read, bytes of weights in all).
        """
        yield from self._verify_metadata()
        inner = self._weights.metadata.inner
        cells = list(self._cells(inner[0], inner[1])) if self.size else []
        row = self.size * self.dtype.itemsize
        total = sum(len(runs) * len(steps) for runs, steps in cells) * row
        done = 0
        for (runs, steps), problems in zip(cells, map_ordered(self._verify_cell, cells), strict=True):
            yield from problems
            done += len(runs) * len(steps) * row
            report(done, total)
        yield from self._verify_integers()

    def _verify_cell(self, cell: tuple[list[int], list[int]]) -> list[Problem]:
        """Read the snapshots of one row of chunks."""
        chunk_runs, chunk_steps = cell
        rows, chunk = len(chunk_runs) * len(chunk_steps), self._weights.metadata.inner[2]
        width = max(1, _VERIFY_BYTES // (rows * self.dtype.itemsize * chunk)) * chunk
        buffer = np.empty(rows * min(width, self.size), self.dtype)
        problems: list[Problem] = []
        infinite: set[tuple[int, int]] = set()
        for start in range(0, self.size, width):
            stop = min(start + width, self.size)
            block = buffer[: rows * (stop - start)].reshape(len(chunk_runs), len(chunk_steps), stop - start)
            try:
                self._weights.read(chunk_runs, chunk_steps, start, stop, block)
            except DamagedError as error:
                run, step = self.runs[chunk_runs[0]], self.steps[chunk_steps[0]]
                return [*problems, Problem(what=str(error), run=run, step=step)]
            for i, j in _infinite_rows(block):
                run, step = self.runs[chunk_runs[i]], self.steps[chunk_steps[j]]
                if (run, step) not in infinite:
                    infinite.add((run, step))
                    at = start + int(np.flatnonzero(~np.isfinite(block[i, j]))[0])
                    problems.append(Problem(what=self._infinite(run, step, at), run=run, step=step, kind="non-finite"))
        return problems

    def _infinite(self, run: int, step: int, at: int) -> str:
        slot = self.layout.floats[self.layout.segments(at, at + 1)[0].slot]
        return f"{self.path}: run {run}, step {step} holds NaN or Inf (tensor {slot.name!r}, coordinate {at})."

    def _verify_metadata(self) -> Iterator[Problem]:
        if not self.finished:
            return
        document = read_document(self.path / DOCUMENT, self.path)
        consolidated = (document.get("consolidated_metadata") or {}).get("metadata") or {}
        for name, copy in consolidated.items():
            try:
                own = read_document(self.path / name / DOCUMENT, self.path)
            except DamagedError as error:
                yield Problem(what=str(error))
                continue
            if any(own.get(key) != copy.get(key) for key in ("shape", "data_type", "chunk_grid", "codecs")):
                yield Problem(what=f"{self.path}: {name}/{DOCUMENT} and the copy in {DOCUMENT} differ.")
        for name, labels in (("run", self.runs), ("step", self.steps)):
            if not (self.path / name).exists():
                continue  # a copy made by another tool may lack the coordinates; we do not need them
            try:
                found = _coordinate(self.path, name)
            except StoreError as error:
                yield Problem(what=str(error))
                continue
            if found != labels:
                yield Problem(what=f"{self.path}: its coordinate {name!r} differs from the header.")

    def _verify_integers(self) -> Iterator[Problem]:
        if not self.has_integers:
            return
        try:
            array = self._integers()
        except StoreError as error:
            yield Problem(what=str(error))
            return
        assert array is not None
        inner = array.metadata.inner
        for chunk_runs, chunk_steps in self._cells(inner[0], inner[1]):
            block = np.empty((len(chunk_runs), len(chunk_steps), self.layout.integers), np.int64)
            try:
                array.read(chunk_runs, chunk_steps, 0, self.layout.integers, block)
            except DamagedError as error:
                yield Problem(what=str(error), run=self.runs[chunk_runs[0]], step=self.steps[chunk_steps[0]])

    def _cells(self, per_run: int, per_step: int) -> Iterator[tuple[list[int], list[int]]]:
        """The recorded cells, chunk by chunk: (indices of runs, indices of steps)."""
        for first_run in range(0, len(self.runs), per_run):
            runs = range(first_run, min(first_run + per_run, len(self.runs)))
            for count in sorted({self.snapshots[run] for run in runs}):
                same = [run for run in runs if self.snapshots[run] == count]
                for first in range(0, count, per_step):
                    yield same, list(range(first, min(first + per_step, count)))

    def _locate(self, runs: Sequence[int], steps: Sequence[int]) -> tuple[list[int], list[int]]:
        try:
            at_runs = [self._run_index[run] for run in runs]
        except KeyError as error:
            raise UsageError(f"{self.path}: there is no run {error}; its runs are {_span(self.runs)}.") from None
        try:
            at_steps = [self._step_index[step] for step in steps]
        except KeyError as error:
            raise UsageError(f"{self.path}: step {error} is not recorded; its steps are {_span(self.steps)}.") from None
        if not self.finished:
            for run in at_runs:
                for step in at_steps:
                    if step >= self.snapshots[run]:
                        raise DamagedError(
                            f"{self.path}: run {self.runs[run]}, step {self.steps[step]} is not recorded yet "
                            f"({self.snapshots[run]} of {len(self.steps)} snapshots)."
                        )
        return at_runs, at_steps

    def _integers(self) -> "NativeArray | ForeignArray | None":
        if not self.has_integers:
            return None
        if self._integer_array is None:
            document = read_document(self.path / "integers" / DOCUMENT, self.path)
            meta = parse_array(document, "integers", INTEGER_DIMENSIONS, self.path)
            # It is written before the commit record, so an unfinished one may be a commit ahead.
            steps = max(meta.shape[1], len(self.steps)) if not self.finished else len(self.steps)
            if meta.shape != (len(self.runs), steps, self.layout.integers):
                raise StoreError(
                    f"{self.path}: its integers have shape {meta.shape}, expected "
                    f"{(len(self.runs), len(self.steps), self.layout.integers)}."
                )
            self._integer_array = open_array(self.path, "integers", meta, self.runs, self.steps)
        return self._integer_array


def open_array(
    store: Path, name: str, metadata: ArrayMetadata, runs: Sequence[int], steps: Sequence[int]
) -> "NativeArray | ForeignArray":
    """The reader for an array's layout."""
    if metadata.native:
        return NativeArray(store, name, metadata, runs, steps)
    from farcli.store.foreign import ForeignArray

    return ForeignArray(store, name, metadata, runs, steps)


def _not_a_store(path: Path) -> StoreError:
    if not path.exists():
        return StoreError(f"{path}: not found.")
    if not path.is_dir():
        return StoreError(f"{path}: is a file, expected a trajectory store (a folder).")
    found = "Zarr v2" if (path / ".zgroup").exists() else f"no {DOCUMENT} in it"
    return StoreError(f"{path}: is not a trajectory store ({found}).")


def _unfinished(path: Path, header: Header, steps: list[int], snapshots: list[int]) -> UnfinishedError:
    planned = _planned(header.runs, steps, header.planned_steps)
    progress = f"{sum(snapshots)} of {planned} snapshots" if planned else f"{sum(snapshots)} snapshots so far"
    writer = owner(path / "weights")
    return UnfinishedError(
        f"{path}: recording is not finished ({progress}{f'; process {writer} is writing it' if writer else ''}).",
        hint="Run the same command again with --resume, or pass --partial.",
    )


def _planned(runs: list[int], steps: list[int], planned_steps: list[int] | None) -> int | None:
    """How many snapshots the finished store will have, where that is known."""
    if planned_steps is not None:
        return len(runs) * max(len(planned_steps), len(steps))
    return None


def _codec_names(codecs: Any) -> list[str]:
    names: list[str] = []
    for codec in codecs:
        if isinstance(codec, str):
            names.append(codec)
        elif codec["name"] == "sharding_indexed":
            names.append(f"sharding_indexed({', '.join(_codec_names(codec['configuration']['codecs']))})")
        else:
            names.append(codec["name"])
    return names


def _span(values: list[int]) -> str:
    return f"{values[0]}…{values[-1]}" if values else "none"


def _infinite_rows(block: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions of the rows of a block that hold NaN or Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        suspects = ~np.isfinite(block.sum(axis=-1))  # a sum may overflow; NaN and Inf always show in it
    for i, j in np.argwhere(suspects):
        if not np.isfinite(block[i, j]).all():
            yield int(i), int(j)


def _coordinate(store: Path, name: str) -> list[int]:
    import zarr

    try:
        return np.asarray(zarr.open_array(str(store / name), mode="r", zarr_format=3)[:]).tolist()
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise DamagedError(f"{store}: coordinate {name!r} cannot be read ({error}).") from error
