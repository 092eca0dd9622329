"""Writing a trajectory: snapshot after snapshot, or column block by column block."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from farcli.errors import FarcliError, StoreError, UnfinishedError, UsageError
from farcli.files import disk_error
from farcli.layout import Layout
from farcli.provenance import provenance
from farcli.store import disk
from farcli.store.disk import SYNC_POLICIES, Sync
from farcli.store.metadata import (
    DIMENSIONS,
    DOCUMENT,
    FLOATS,
    INTEGER_DIMENSIONS,
    KEY,
    ArrayMetadata,
    array_document,
    encode,
    group_document,
    header_values,
    parse_array,
    parse_header,
    read_document,
    read_record,
)
from farcli.store.native import NativeArray, SnapshotFile, write_chunk

BIG_BYTES = 1 << 20
"""Snapshots from this size on get a file each."""
_INNER = 65536
"""Most coordinates of an inner chunk of a big snapshot."""
_INNER_MULTIPLE = 4096
_CHUNK_BYTES = 1 << 20
"""Aimed-at size of a chunk of many tiny snapshots; each flush rewrites the one being filled."""
_MOST_CHUNK_BYTES = 4 << 20
_UNPLANNED_STEPS = 256
"""Steps in a chunk where nobody knows how many there will be; a chunk is stored at full size."""
_INTEGER_CHUNK_BYTES = 64 << 10
_FLUSH_SECONDS = 0.5
_DIRECT_FROM = 16 << 20
"""Bytes of a snapshot from which it may be written past the page cache; small ones are the page cache's business."""
_BUFFER_BYTES = 64 << 20
"""Most bytes of unfilled chunks, or of a sink's columns, held in memory."""
_CHUNK_NAME = re.compile(r"c\.(\d+)\.(\d+)\.\d+")


def choose_chunks(
    runs: int, coordinates: int, itemsize: int, *, planned: int | None, lockstep: bool
) -> tuple[int, int, int]:
    """Shape (runs, steps, coordinates) of the chunks that suit a trajectory.

    A big snapshot is a file of its own, cut into chunks of at most 64 Ki coordinates (equal ones, so that
    the last is not mostly padding). Of tiny snapshots one chunk holds many steps, and many runs where
    all runs advance together.
    """
    row = max(1, coordinates) * itemsize
    if row >= BIG_BYTES:
        width = equal_parts(coordinates, _INNER)
        return 1, 1, -(-width // _INNER_MULTIPLE) * _INNER_MULTIPLE
    per_run = equal_parts(runs, max(1, _MOST_CHUNK_BYTES // row)) if lockstep else 1
    steps = equal_parts(planned or _UNPLANNED_STEPS, max(1, _CHUNK_BYTES // (per_run * row)))
    return per_run, steps, max(1, coordinates)


def equal_parts(count: int, most: int) -> int:
    """The size of the fewest equal parts of `count` that are no larger than `most`."""
    return -(-count // -(-count // most))


class TrajectoryWriter:
    """A trajectory being written by this process alone. Not thread-safe: one thread appends.

    Opened by `create` or `resume`. What is committed survives a killed process; a snapshot of 1 MiB or more
    is committed by its `append`, smaller ones at most every 0.5 s, when a planned run is complete, and by
    `close` and `finish`. Leaving it as a context manager closes it.

    Attributes:
        path: where the store is or, when staged, will be.
        layout: where each tensor lies in the vector.
        runs: labels of axis 0.
        steps: steps appended so far.
        snapshots: how many of them each run has.
    """

    def __init__(
        self,
        path: Path,
        home: Path,
        lock: disk.Lock,
        weights: ArrayMetadata,
        header: dict[str, Any],
        steps: Sequence[int],
        snapshots: Sequence[int],
        *,
        sync: Sync,
        replace: bool = False,
        finished: bool = False,
    ) -> None:
        parsed = parse_header(header, path)
        self.path = path
        self.layout: Layout = parsed.layout
        self.runs = parsed.runs
        self.planned_steps = parsed.planned_steps
        self.steps = list(steps)
        self.snapshots = list(snapshots)
        self._home = home
        self._lock = lock
        self._sync: Sync = sync
        self._replace = replace
        self._header = header
        self._finished = finished
        self._open = True
        self._dirty = False
        self._flushed = -float("inf")
        self._index = {label: index for index, label in enumerate(self.runs)}
        self._weights = _Cells(home, "weights", weights, self, sync=self._fsync)
        self._integers: _Cells | None = None
        self._integer_steps = -1
        """Axis 1 of `integers/zarr.json` on disk."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        layout: Layout,
        runs: Sequence[int],
        *,
        kind: str = "run",
        header: dict[str, Any] | None = None,
        dtype: str = "float32",
        planned_steps: Sequence[int] | None = None,
        lockstep: bool = False,
        chunk: tuple[int, int, int] | None = None,
        parts: int = 1,
        sync: Sync = "commit",
        replace: bool = False,
        staged: bool = False,
    ) -> "TrajectoryWriter":
        """Start a new store.

        Args:
            path: of the store; missing parent folders are made.
            layout: where each tensor lies in the vectors.
            runs: labels of the runs, in the order of axis 0.
            kind: "run" or "forecast".
            header: JSON values to store beside ours (`provenance`, workload, source, …); `provenance` is filled
                in when missing.
            dtype: "float32", "float64" or "float16".
            planned_steps: steps every run will have, where known.
            lockstep: whether all runs advance together (`append` without `run`); decides the chunks only.
            chunk: shape (runs, steps, coordinates) of the chunks instead of the chosen one. Fewer coordinates than D
                mean a file per snapshot cut into such chunks; then runs and steps must be 1.
            parts: files that a snapshot with a file of its own is cut into, at bounds of chunks, so that as many
                processes can write it; fewer where there are fewer chunks. Tiny snapshots are not cut.
            sync: "none" leaves writing to the disk to the system (a power loss may cost snapshots), "commit" waits
                for the disk at each commit, "always" also commits at each append, however small.
            replace: an existing store gives way, at the instant the new one is finished; implies `staged` then.
            staged: build it in a hidden sibling folder and give it its name in `finish`; closing it unfinished
                removes it. Such a store cannot be resumed.

        Raises:
            UsageError: `path` exists (and is a store, when replacing), or is being written by another process,
                or the arguments do not fit together.
            ResourceError: no space left.
        """
        path = Path(path)
        if dtype not in FLOATS:
            raise UsageError(f"dtype {dtype!r}: expected {' or '.join(FLOATS)}.")
        if sync not in SYNC_POLICIES:
            raise UsageError(f"sync {sync!r}: expected {', '.join(SYNC_POLICIES)}.")
        if not runs:
            raise UsageError(f"{path}: there are no runs to store.")
        chunk = _checked_chunk(chunk, layout.size) or choose_chunks(
            len(runs),
            layout.size,
            np.dtype(dtype).itemsize,
            planned=len(planned_steps) if planned_steps is not None else None,
            lockstep=lockstep,
        )
        more = dict(header or {})
        more.setdefault("provenance", provenance())
        labels = [int(run) for run in runs]
        planned = [int(step) for step in planned_steps] if planned_steps is not None else None
        values = header_values(kind, layout, labels, planned, more)
        parse_header(values, path)

        sharded = chunk[2] < layout.size
        chunks = -(-layout.size // chunk[2])
        file = -(-chunks // parts) * chunk[2]
        document = array_document(
            shape=(len(labels), 0, layout.size),
            dtype=np.dtype(dtype),
            outer=(1, 1, file) if sharded else chunk,
            inner=chunk if sharded else None,
            dimensions=DIMENSIONS,
        )
        exists = check_target(path, replace=replace)
        home = disk.staging_path(path) if staged or exists else path
        weights = parse_array(document, "weights", DIMENSIONS, path)
        if home != path and home.exists():
            raise disk.being_written(path, os.getpid())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.remove_abandoned(path)
            (home / "weights").mkdir(parents=True, exist_ok=True)
            lock = disk.Lock(home / "weights", path)
            if (home / "weights" / DOCUMENT).exists():
                lock.release()  # somebody was faster by a hair
                raise _exists(path)
        except OSError as error:
            _remove_empty(home)
            raise disk_error(path, error) from error
        except FarcliError:
            _remove_empty(home)
            raise
        try:
            writer = cls(path, home, lock, weights, values, [], [0] * len(labels), sync=sync, replace=replace)
            writer._write_record()
        except FarcliError:
            shutil.rmtree(home, ignore_errors=True)
            lock.release()
            raise
        return writer

    @classmethod
    def resume(
        cls, path: str | Path, *, planned_steps: Sequence[int] | None = None, sync: Sync = "commit"
    ) -> "TrajectoryWriter":
        """Go on with a store: an unfinished one, or a finished one to extend.

        Whatever was not committed is dropped. A finished store stays finished until the first append.

        Args:
            path: of the store.
            planned_steps: a new plan; the stored one when None.
            sync: see `create`.

        Raises:
            StoreError: there is no store, or it was rewritten by another tool and cannot grow.
            UsageError: another process is writing it, or the new plan contradicts what is recorded.
        """
        path = Path(path)
        finished = (path / DOCUMENT).is_file()
        if not (path / "weights" / DOCUMENT).is_file():
            raise StoreError(f"{path}: is not there or no trajectory store; nothing to resume.")
        lock = disk.Lock(path / "weights", path)
        try:
            record = read_record(path, finished=finished)
            weights = record.weights
            _check_growth(weights, path)
            values = {key: value for key, value in record.header.values.items() if key != "steps"}
            if planned_steps is not None:
                values["planned_steps"] = [int(step) for step in planned_steps]
                if values["planned_steps"][: len(record.steps)] != record.steps:
                    raise UsageError(f"{path}: its recorded steps are not the first ones of the new plan.")
            writer = cls(
                path, path, lock, weights, values, record.steps, record.snapshots, sync=sync, finished=finished
            )
            writer._recover()
        except OSError as error:
            lock.release()
            raise disk_error(path, error) from error
        except FarcliError:
            lock.release()
            raise
        return writer

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # The error under way is the one to report; what could not be flushed is lost with it.
            with contextlib.suppress(FarcliError):
                self.close()

    @property
    def header(self) -> dict[str, Any]:
        """The store's attributes; see `Trajectory.header`."""
        return self._header

    @property
    def home(self) -> Path:
        """The folder that holds the store while it is written: `path`, or the hidden one where it is staged."""
        return self._home

    @property
    def _arrays(self) -> "list[_Cells]":
        return [self._weights] if self._integers is None else [self._integers, self._weights]

    @property
    def _fsync(self) -> bool:
        return self._sync != "none"

    @property
    def parts(self) -> list[slice]:
        """The coordinates in each file of a snapshot that has files of its own; one part where it has none."""
        size, file = self.layout.size, self._weights.metadata.outer[2]
        return [slice(start, min(start + file, size)) for start in range(0, max(size, 1), file)]

    def past_cache(self, *, on: bool) -> None:
        """Write large snapshots past the page cache from now on, or no longer: see `disk.Direct`."""
        weights = self._weights.metadata
        large = weights.sharded and prod(weights.outer) * weights.dtype.itemsize >= _DIRECT_FROM
        if on and large and self._weights.direct is None and hasattr(os, "O_DIRECT"):
            self._weights.direct = disk.Direct()
        elif not on:
            self._weights.direct = None

    def append(
        self,
        step: int,
        vectors: np.ndarray,
        integers: np.ndarray | None = None,
        *,
        run: int | None = None,
        parts: Sequence[Path] = (),
    ) -> None:
        """Append one snapshot of one run, or of all runs at once.

        Args:
            step: its optimiser step. The run that is ahead defines the steps; the others follow.
            vectors: [D] for one run, [len(runs), D] for all; cast to the store's dtype.
            integers: integer buffers, [layout.integers] or [len(runs), layout.integers]; given always or never.
            run: label of the run; None for all runs.
            parts: files that other processes have written with `write_part`: all parts of one run's snapshot but
                the first, which alone is in `vectors` then. They are moved into the store.

        Raises:
            UsageError: wrong shape, run or step.
            ResourceError: no space left. The snapshot is not in the store; what was committed is.
        """
        rows = list(range(len(self.runs))) if run is None else [self._run_at(run)]
        shape = (len(rows),) if run is None else ()
        assert not parts or (len(rows) == 1 and len(parts) == len(self.parts) - 1)
        width = self.parts[0].stop if parts else self.layout.size
        vectors = self._shaped("vector", vectors, (*shape, width)).reshape(len(rows), -1)
        if integers is not None:
            integers = self._shaped("integers", integers, (*shape, self.layout.integers)).reshape(len(rows), -1)
        with self._appending(rows, [int(step)], integers is not None) as places:
            for at, vector in enumerate(vectors):
                self._weights.put(rows[at], places[rows[at]], vector, parts)
                if self._integers is not None and integers is not None:
                    self._integers.put(rows[at], places[rows[at]], integers[at])
            if self._is_due(rows):
                self._commit()

    @contextlib.contextmanager
    def columns(self, runs: Sequence[int], steps: Sequence[int]) -> Iterator["ColumnSink"]:
        """Append several snapshots of several runs at once, column block by column block.

        Memory is about one block. The snapshots are committed when the block ends well, and none of them
        when it does not.

        Args:
            runs: labels; they must have equally many snapshots so far.
            steps: the steps to append to each of them.

        Raises:
            UsageError: wrong runs or steps, or not all columns were written.
            ResourceError: no space left.
        """
        rows = [self._run_at(run) for run in runs]
        if len(set(rows)) != len(rows) or not rows:
            raise UsageError(f"{self.path}: runs {list(runs)} are empty or repeat one.")
        new = [int(step) for step in steps]
        for first in {self.snapshots[row] for row in rows}:
            self._check_steps(first, new)
        sink = ColumnSink(self._weights, self.path, {row: self.snapshots[row] for row in rows}, len(new), self.layout)
        try:
            yield sink
            integers = sink.given_integers
            with self._appending(rows, new, integers is not None) as places:
                sink.commit(places)
                if self._integers is not None and integers is not None:
                    for i, row in enumerate(rows):
                        for j in range(len(new)):
                            self._integers.put(row, places[row] + j, integers[i, j])
                self._commit()
        finally:
            sink.discard()

    def rewind(self, count: int) -> None:
        """Forget every run's snapshots behind the first `count`; a finished store becomes an unfinished one.

        For a training that goes on from an earlier step than was recorded.

        Raises:
            ResourceError: no space left.
        """
        assert self._open
        if count >= len(self.steps):
            return
        if self._dirty:
            self._commit()
        if self._finished:
            self._reopen()
        self.steps = self.steps[:count]
        self.snapshots = [min(snapshots, count) for snapshots in self.snapshots]
        self._write_record()  # first what counts, then the files: a killed process leaves a whole store
        for array in self._arrays:
            array.rewind(self.snapshots)

    def finish(self) -> None:
        """Commit everything, write the coordinates and then the completion marker, and close.

        Raises:
            UnfinishedError: a run lacks snapshots.
            ResourceError: no space left.
        """
        assert self._open
        planned = self.steps if self.planned_steps is None else self.planned_steps
        for run, count in zip(self.runs, self.snapshots, strict=True):
            if count < len(planned) or not planned:
                raise UnfinishedError(f"{self.path}: run {run} has {count} of {len(planned)} snapshots, not finished.")
        if not self._finished:
            self._commit()
            arrays = {"weights": self._document({})}
            if self._integers is not None:
                arrays["integers"] = self._integers.document(len(self.steps))
            for name, labels in (("run", self.runs), ("step", self.steps)):
                arrays[name] = self._write_coordinate(name, labels)
            header = {key: value for key, value in self._header.items() if key != "planned_steps"}
            marker = encode(group_document(header | {"steps": self.steps}, arrays))
            disk.replace_file(self._home / DOCUMENT, marker, sync=self._fsync)
            self._finished = True
        self._release()
        if self._home != self.path:
            try:
                check_target(self.path, replace=self._replace)
                disk.put_in_place(self._home, self.path)
                if self._fsync:
                    disk.sync_folder(self.path.parent)
            except FarcliError:
                shutil.rmtree(self._home, ignore_errors=True)
                raise

    def close(self) -> None:
        """Commit everything and leave the store as it is: resumable, or gone when it is staged.

        Raises:
            ResourceError: no space left; what was committed before stays.
        """
        if not self._open:
            return
        try:
            if self._home == self.path and self._dirty:
                self._commit()
        finally:
            self._abandon(remove=self._home != self.path)

    def _abandon(self, *, remove: bool) -> None:
        self._release()
        if remove:
            shutil.rmtree(self._home, ignore_errors=True)

    def _release(self) -> None:
        self._open = False
        for array in self._arrays:
            array.take_back(self.snapshots)
        self._lock.release()

    def _run_at(self, run: int) -> int:
        try:
            return self._index[run]
        except KeyError:
            raise UsageError(f"{self.path}: there is no run {run}; its runs are {self.runs}.") from None

    def _shaped(self, what: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        values = np.asarray(values)
        if values.shape != shape:
            raise UsageError(f"{self.path}: {what} of shape {values.shape}, expected {shape}.")
        return values

    @contextlib.contextmanager
    def _appending(self, rows: list[int], steps: list[int], with_integers: bool) -> Iterator[dict[int, int]]:
        """Reserve places for `steps` of some runs; taken back when the block fails.

        Yields:
            For each row the index along axis 1 of its first new snapshot.
        """
        if not self._open:
            raise UsageError(f"{self.path}: is closed.")
        places = {row: self.snapshots[row] for row in rows}
        for first in set(places.values()):
            self._check_steps(first, steps)
        self._want_integers(with_integers)
        if self._finished:
            self._reopen()
        before = (list(self.steps), list(self.snapshots), self._dirty)
        try:
            longest = max(places.values())
            self.steps.extend(steps[len(self.steps) - longest :])
            for row in rows:
                self.snapshots[row] += len(steps)
            self._dirty = True
            yield places
        except BaseException:
            self.steps[:], self.snapshots[:], self._dirty = before
            for array in self._arrays:
                array.take_back(self.snapshots)
            raise

    def _check_steps(self, first: int, steps: list[int]) -> None:
        planned = self.planned_steps
        for at, step in enumerate(steps, first):
            if planned is not None and (at >= len(planned) or planned[at] != step):
                expected = f"step {planned[at]}" if at < len(planned) else "no more"
                raise UsageError(f"{self.path}: step {step} does not follow the plan, expected {expected}.")
            if at < len(self.steps) and self.steps[at] != step:
                raise UsageError(
                    f"{self.path}: step {step} differs from the other runs' snapshot {at}, which is of step "
                    f"{self.steps[at]}."
                )
            before = steps[at - first - 1] if at > first else (self.steps[at - 1] if at else None)
            if before is not None and step <= before:
                raise UsageError(f"{self.path}: step {step} does not come after step {before}.")

    def _want_integers(self, given: bool) -> None:
        if given and not self.layout.integers:
            return
        if self._integers is None and given:
            if any(self.snapshots):
                raise UsageError(f"{self.path}: the first snapshots came without integer buffers.")
            self._integers = self._integer_cells()
        elif self._integers is not None and not given:
            raise UsageError(f"{self.path}: integer buffers are missing; the first snapshots had some.")

    def _integer_cells(self) -> "_Cells":
        runs = self._weights.metadata.outer[0]
        row = self.layout.integers * 8
        planned = len(self.planned_steps) if self.planned_steps else _UNPLANNED_STEPS
        steps = max(1, min(planned, _INTEGER_CHUNK_BYTES // (runs * row)))
        document = array_document(
            shape=(len(self.runs), 0, self.layout.integers),
            dtype=np.dtype("int64"),
            outer=(runs, steps, self.layout.integers),
            inner=None,
            dimensions=INTEGER_DIMENSIONS,
        )
        try:
            (self._home / "integers").mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(self.path, error) from error
        metadata = parse_array(document, "integers", INTEGER_DIMENSIONS, self.path)
        return _Cells(self._home, "integers", metadata, self, sync=self._fsync)

    def _recover(self) -> None:
        """Drop what a killed writer left uncommitted."""
        self._weights.drop_uncommitted()
        path = self._home / "integers" / DOCUMENT
        if path.is_file() and any(self.snapshots):
            metadata = parse_array(read_document(path, self._home), "integers", INTEGER_DIMENSIONS, self.path)
            _check_growth(metadata, self.path)
            self._integers = _Cells(self._home, "integers", metadata, self, sync=self._fsync)
            self._integers.drop_uncommitted()
            self._integer_steps = metadata.shape[1]
        elif path.parent.is_dir():
            shutil.rmtree(path.parent)

    def _reopen(self) -> None:
        """Turn a finished store into an unfinished one: record first, then no marker."""
        self._write_record()
        try:
            (self._home / DOCUMENT).unlink()
        except OSError as error:
            raise disk_error(self.path, error) from error
        self._finished = False

    def _is_due(self, rows: list[int]) -> bool:
        """Whether what was just appended to these rows should be committed now."""
        planned = self.planned_steps
        complete = planned is not None and all(self.snapshots[row] == len(planned) for row in rows)
        elapsed = time.monotonic() - self._flushed
        return self._weights.pending or self._sync == "always" or complete or elapsed >= _FLUSH_SECONDS

    def _commit(self) -> None:
        """Data first, then the record that makes them count."""
        for array in self._arrays:
            array.flush()
        if self._integers is not None and self._integer_steps != len(self.steps):
            document = encode(self._integers.document(len(self.steps)))
            disk.replace_file(self._home / "integers" / DOCUMENT, document, sync=self._fsync)
            self._integer_steps = len(self.steps)
        self._write_record()
        self._dirty = False
        self._flushed = time.monotonic()

    def _write_record(self) -> None:
        attributes = {"steps": self.steps, "snapshots": self.snapshots, KEY: self._header}
        disk.replace_file(self._home / "weights" / DOCUMENT, encode(self._document(attributes)), sync=self._fsync)

    def _document(self, attributes: dict[str, Any]) -> dict[str, Any]:
        return self._weights.document(len(self.steps)) | {"attributes": attributes}

    def _write_coordinate(self, name: str, labels: list[int]) -> dict[str, Any]:
        values = np.asarray(labels, "<i8")
        document = array_document(
            shape=values.shape, dtype=values.dtype, outer=values.shape, inner=None, dimensions=(name,)
        )
        folder = self._home / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(self.path, error) from error
        write_chunk(folder / "c.0", values, sync=self._fsync)
        disk.replace_file(folder / DOCUMENT, encode(document), sync=self._fsync)
        return document


def _checked_chunk(chunk: tuple[int, int, int] | None, coordinates: int) -> tuple[int, int, int] | None:
    if chunk is None:
        return None
    if len(chunk) != 3 or min(chunk) < 1 or (chunk[2] < coordinates and chunk[:2] != (1, 1)):
        raise UsageError(
            f"chunk {chunk}: expected (runs, steps, coordinates), runs and steps being 1 where coordinates are fewer "
            f"than D = {coordinates}."
        )
    return chunk[0], chunk[1], min(chunk[2], max(coordinates, 1))


def check_target(path: Path, *, replace: bool) -> bool:
    """Whether something to be replaced is at `path`.

    Raises:
        UsageError: something is there that must not be replaced.
    """
    if not os.path.lexists(path) or _is_vacant(path):
        return False
    if disk.is_locked(path / "weights"):
        raise disk.being_written(path, disk.owner(path / "weights"))
    if not replace:
        raise _exists(path)
    if not _is_ours(path):
        raise UsageError(f"{path}: exists and is not a trajectory store; it is not replaced.")
    return True


def _exists(path: Path) -> UsageError:
    return UsageError(
        f"{path}: already exists.", hint="Pass --force to replace it, --resume to go on, or choose another -o."
    )


def _remove_empty(home: Path) -> None:
    with contextlib.suppress(OSError):
        (home / "weights").rmdir()
        home.rmdir()


def _is_vacant(path: Path) -> bool:
    """An empty folder, or what remains of a `create` that was killed before its first record."""
    if not path.is_dir() or path.is_symlink():
        return False
    if not set(os.listdir(path)) <= {"weights"}:
        return False
    leftovers = {disk.LOCK, disk.temporary_name(Path(DOCUMENT)).name}
    weights = path / "weights"
    return not weights.exists() or (
        weights.is_dir() and set(os.listdir(weights)) <= leftovers and not disk.is_locked(weights)
    )


def _is_ours(path: Path) -> bool:
    """Whether a folder is a farcli store, damaged or not: --force must not remove anything else."""
    for document in (path / DOCUMENT, path / "weights" / DOCUMENT):
        with contextlib.suppress(OSError):
            if f'"{KEY}"'.encode() in document.read_bytes():
                return True
    return False


def _check_growth(metadata: ArrayMetadata, path: Path) -> None:
    """Refuse arrays whose files are not laid out as we write them."""
    files_of_ours = (
        metadata.outer[:2] == (1, 1) if metadata.sharded else metadata.outer[2] >= metadata.shape[2]
    ) and metadata.separator == "."
    if not (metadata.native and metadata.decode is None and files_of_ours):
        raise StoreError(f"{path}: was rewritten since it was recorded (packed or rechunked) and cannot grow.")


def write_part(home: Path, part: int, values: np.ndarray, path: Path, *, sync: bool) -> None:
    """Write one part of a snapshot of a store that another process is writing, for its `append` to take over.

    Args:
        home: folder of the store while it is written.
        part: number of the part.
        values: its coordinates, cast to the store's dtype.
        path: of the file; on the same file system as the store.
        sync: wait for the disk.

    Raises:
        StoreError: there is no such store, or its snapshots have no such part.
        ResourceError: no space left.
    """
    metadata = parse_array(read_document(home / "weights" / DOCUMENT, home), "weights", DIMENSIONS, home)
    start = part * metadata.outer[2]
    expected = min(metadata.outer[2], metadata.shape[2] - start)
    if not metadata.sharded or values.shape != (expected,):
        raise StoreError(f"{home}: part {part} of shape {list(values.shape)}, expected [{expected}].")
    file = SnapshotFile(path, metadata, sync=sync)
    file.write(np.ascontiguousarray(values, metadata.dtype), last=True)
    file.publish()


class _Cells:
    """The files of one array while it grows: a file per snapshot, or chunks of many snapshots."""

    def __init__(self, home: Path, name: str, metadata: ArrayMetadata, writer: TrajectoryWriter, *, sync: bool) -> None:
        self.metadata = metadata
        self.folder = home / name
        self._reader = NativeArray(home, name, metadata, writer.runs, writer.steps)
        self._written = list(writer.snapshots)
        """Snapshots put so far, of each run."""
        self._sync = sync
        self.direct: disk.Direct | None = None
        """How files are written that come whole; None for the page cache."""
        self._files: list[SnapshotFile] = []
        self._given: list[tuple[Path, Path]] = []
        """Files of other processes, and what they shall be called."""
        self._chunks: dict[tuple[int, int], np.ndarray] = {}
        self._changed: set[tuple[int, int]] = set()

    @property
    def pending(self) -> bool:
        """Whether snapshots wait that should be committed at once: files of their own, or too many bytes."""
        return bool(self._files) or len(self._changed) * self.metadata.chunk_bytes >= _BUFFER_BYTES

    def document(self, steps: int) -> dict[str, Any]:
        """The array's `zarr.json` when axis 1 has this length."""
        shape = [self.metadata.shape[0], steps, self.metadata.shape[2]]
        return self.metadata.document | {"shape": shape, "attributes": {}}

    def new_files(self, run: int, step: int) -> "list[SnapshotFile]":
        """The files of one snapshot, one for each part; `flush` publishes them."""
        count = -(-self.metadata.shape[2] // self.metadata.outer[2])
        paths = [self.folder / self.metadata.key(run, step, part) for part in range(count)]
        return [SnapshotFile(path, self.metadata, sync=self._sync, direct=self.direct) for path in paths]

    def add(self, file: SnapshotFile) -> None:
        """Take charge of a completed file."""
        self._files.append(file)

    def put(self, run: int, step: int, vector: np.ndarray, parts: Sequence[Path] = ()) -> None:
        """Take one snapshot: written to its files now, or kept in its chunk until `flush`."""
        if self.metadata.sharded:
            files = self.new_files(run, step)
            self._given.extend(zip(parts, (file.path for file in files[1:]), strict=False))
            width = self.metadata.outer[2]
            for number, file in enumerate(files[:1] if parts else files):
                part = vector[number * width : (number + 1) * width]
                file.write(np.ascontiguousarray(part, self.metadata.dtype), last=True)
                self.add(file)
            return
        assert step == self._written[run]
        outer = self.metadata.outer
        key = (run // outer[0], step // outer[1])
        if key not in self._chunks:
            if len(self._chunks) * self.metadata.chunk_bytes >= _BUFFER_BYTES:
                self.flush()
                self._chunks.clear()
            self._chunks[key] = self._load(key)
        self._chunks[key][run % outer[0], step % outer[1], : len(vector)] = vector
        self._changed.add(key)
        self._written[run] = step + 1

    def flush(self) -> None:
        """Give every new or changed file its name; on the disk itself, if so asked."""
        if not self._files and not self._changed:
            return
        while self._files:
            self._files[-1].publish()
            self._files.pop()
        while self._given:
            found, path = self._given.pop()
            try:
                found.replace(path)
            except OSError as error:
                raise disk_error(path, error) from error
        for key in sorted(self._changed):
            write_chunk(self.folder / self.metadata.key(*key, 0), self._chunks[key], sync=self._sync)
            self._changed.remove(key)
            if all(self._written[run] >= (key[1] + 1) * self.metadata.outer[1] for run in self._runs_of(key)):
                del self._chunks[key]
        if self._sync:
            disk.sync_folder(self.folder)

    def take_back(self, snapshots: Sequence[int]) -> None:
        """Forget snapshots put beyond these counts."""
        while self._files:
            self._files.pop().discard()
        self._given.clear()
        self._written = list(snapshots)

    def rewind(self, snapshots: Sequence[int]) -> None:
        """Drop the snapshots beyond these counts, which were committed."""
        self._written = list(snapshots)
        self._chunks.clear()  # read again as far as they still count
        self.drop_uncommitted()

    def drop_uncommitted(self) -> None:
        """Remove half-written files and those in which no snapshot counts."""
        disk.remove_temporaries(self.folder)
        for path in self.folder.iterdir():
            found = _CHUNK_NAME.fullmatch(path.name)
            if found:
                key = int(found[1]), int(found[2])
                first = key[1] * self.metadata.outer[1]
                if not any(self._written[run] > first for run in self._runs_of(key)):
                    path.unlink()

    def _runs_of(self, key: tuple[int, int]) -> range:
        per_chunk = self.metadata.outer[0]
        return range(key[0] * per_chunk, min((key[0] + 1) * per_chunk, self.metadata.shape[0]))

    def _load(self, key: tuple[int, int]) -> np.ndarray:
        """A chunk as far as it has been filled; the rest is fill value, whatever a killed writer left there."""
        meta = self.metadata
        chunk = np.full(meta.outer, np.nan if meta.dtype.kind == "f" else 0, meta.dtype)
        first = key[1] * meta.outer[1]
        for at, run in enumerate(self._runs_of(key)):
            count = min(max(self._written[run] - first, 0), meta.outer[1])
            if count:
                out = chunk[at : at + 1, :count, : meta.shape[2]]
                self._reader.read([run], range(first, first + count), 0, meta.shape[2], out)
        return chunk


class ColumnSink:
    """Takes several snapshots at once, block of coordinates by block, in order; see `TrajectoryWriter.columns`."""

    def __init__(self, cells: _Cells, path: Path, places: dict[int, int], steps: int, layout: Layout) -> None:
        self._cells = cells
        self._path = path
        self._places = places
        self._steps = steps
        self._layout = layout
        self._next = 0
        self._files: list[list[list[SnapshotFile]]] = []
        self._spool = np.empty(0)
        self.given_integers: np.ndarray | None = None
        if cells.metadata.sharded:
            self._files = [[cells.new_files(row, first + j) for j in range(steps)] for row, first in places.items()]
        else:
            self._spool = self._make_spool((len(places), steps, layout.size), cells.metadata.dtype)

    def _make_spool(self, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
        """Room for all columns of tiny snapshots: in memory while it is little, else in a nameless file."""
        size = prod(shape) * dtype.itemsize
        if size <= _BUFFER_BYTES:
            return np.empty(shape, dtype)
        try:
            with tempfile.TemporaryFile(dir=self._cells.folder) as file:
                if sys.platform == "linux":
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk shall be an error, not a SIGBUS
                else:
                    file.truncate(size)
                return np.memmap(file, dtype, "r+", shape=shape)
        except OSError as error:
            raise disk_error(self._path, error) from error

    def write(self, start: int, block_RTd: np.ndarray) -> None:
        """Take the next coordinates of all runs and steps.

        Args:
            start: first coordinate; where the last block ended.
            block_RTd: [runs, steps, coordinates]; cast to the store's dtype.

        Raises:
            UsageError: the block has another shape or place.
            ResourceError: no space left.
        """
        stop = start + block_RTd.shape[-1]
        expected = (len(self._places), self._steps)
        if start != self._next or stop > self._layout.size or block_RTd.shape[:-1] != expected:
            raise UsageError(
                f"{self._path}: block {list(block_RTd.shape)} at coordinate {start}, expected "
                f"[{expected[0]}, {expected[1]}, …] at {self._next} of {self._layout.size}."
            )
        if self._files:
            width = self._cells.metadata.outer[2]
            for files_T, rows in zip(self._files, block_RTd, strict=True):
                for files, row in zip(files_T, rows, strict=True):
                    for number in range(start // width, -(-stop // width)):
                        low, high = max(start, number * width), min(stop, (number + 1) * width)
                        values = np.ascontiguousarray(row[low - start : high - start], self._cells.metadata.dtype)
                        files[number].write(values, last=high in (self._layout.size, (number + 1) * width))
        else:
            self._spool[:, :, start:stop] = block_RTd
        self._next = stop

    def integers(self, values: np.ndarray) -> None:
        """Give the integer buffers of all snapshots: [runs, steps, layout.integers].

        Raises:
            UsageError: another shape.
        """
        expected = (len(self._places), self._steps, self._layout.integers)
        if values.shape != expected:
            raise UsageError(f"{self._path}: integers of shape {values.shape}, expected {expected}.")
        self.given_integers = np.array(values, np.int64)

    def commit(self, places: dict[int, int]) -> None:
        """Hand everything over to the array."""
        if self._next != self._layout.size:
            raise UsageError(f"{self._path}: {self._next} of {self._layout.size} coordinates were written.")
        assert places == self._places, "snapshots were appended while columns were being written"
        if self._files:
            for file in self._all_files():
                self._cells.add(file)
            self._files = []
            return
        for i, (row, first) in enumerate(places.items()):
            for j in range(self._steps):
                self._cells.put(row, first + j, self._spool[i, j])

    def discard(self) -> None:
        """Drop what was not handed over."""
        for file in self._all_files():
            file.discard()
        self._files = []
        self._spool = np.empty(0)

    def _all_files(self) -> Iterator[SnapshotFile]:
        return (file for files_T in self._files for files in files_T for file in files)
