"""Reading and writing the layouts farcli writes, straight from and to files.

All are standard Zarr v3: files of plain chunks (`bytes`, `crc32c`), and files of one shard
(`sharding_indexed` with `bytes`, `crc32c` inside and an index `bytes`, `crc32c` at the end). Libraries read
and write this pattern several times slower than the file system (STORAGE.md, 2). Packed stores have the same two
forms with a codec of `farcli.store.codecs` in place of plain bytes. Every byte that is
returned has passed its checksum, and what is missing is an error, never a fill value.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
from crc32c import crc32c

from farcli.errors import DamagedError
from farcli.files import disk_error
from farcli.store.disk import Buffer, Direct, publish, reserve, temporary_name, write_all, write_temporary
from farcli.store.mapping import MappedFiles, can_populate
from farcli.store.metadata import ArrayMetadata
from farcli.store.threads import run_all

_CRC = 4
_ENTRY = 16
"""Bytes of an index entry: offset and length, uint64."""
_ABSENT = 2**64 - 1
_BATCH_BYTES = 1 << 20
"""Bytes of chunks fetched by one call: few calls, and still in the cache when they are checked."""
_KEEP_GIL = 0
"""Checksums of what lies in the cache take 10 µs a chunk: less than to hand the interpreter over and get it back."""
_MOST_INDICES = 64
_MOST_OPEN = 256
"""Files kept open by all arrays together: a quarter of what Linux allows a process by default."""
_MOST_CHUNKS = 256
"""Chunks fetched by one call; the system refuses more than IOV_MAX = 1024 buffers."""
_PIECE_BYTES = 2 << 20
"""Bytes that one thread reads in a row: much more than it costs to open a file."""
_HOT_BYTES = 256 << 10
"""Bytes checksummed before they are written, so that they are still in the cache then."""


class NativeArray:
    """An array stored in one of our two layouts. Reads are thread-safe.

    Args:
        store: the store, for messages.
        name: of the array in it.
        metadata: of the array.
        runs: labels of axis 0, for messages.
        steps: labels of axis 1, for messages.
    """

    def __init__(
        self, store: Path, name: str, metadata: ArrayMetadata, runs: Sequence[int], steps: Sequence[int]
    ) -> None:
        assert metadata.native
        self.metadata = metadata
        self._store = store
        self._name = name
        self._folder = str(store / name)
        self._runs = runs
        self._steps = steps
        self._per_file = metadata.chunks_per_file
        self._chunk_bytes = metadata.chunk_bytes
        self._batch = max(1, min(_MOST_CHUNKS, _BATCH_BYTES // metadata.chunk_bytes))
        # Shards whose index is known to say "one chunk behind the other"; they are never changed once committed.
        self._in_order: set[str] = set()
        self._kept = _KeptFiles()
        self._indices: dict[str, np.ndarray] = {}
        """Indices of packed shards."""

    def read(self, runs: Sequence[int], steps: Sequence[int], start: int, stop: int, out: np.ndarray) -> None:
        """Read a selection into `out`, verified.

        Args:
            runs: indices along axis 0.
            steps: indices along axis 1.
            start: first coordinate.
            stop: one past the last coordinate.
            out: [len(runs), len(steps), stop − start], of our dtype, contiguous along the last axis.

        Raises:
            DamagedError: a file is missing, too short, or fails its checksum.
        """
        if stop <= start:
            return
        if self.metadata.inner[:2] == (1, 1) and self.metadata.decode is None:
            piece = self._piece
            bounds = range(start - start % piece, stop, piece)
            parts = [(max(start, bound), min(bound + piece, stop)) for bound in bounds]
            rows = [
                (run, step, low, high, out[i, j, low - start : high - start])
                for i, run in enumerate(runs)
                for j, step in enumerate(steps)
                for low, high in parts
            ]
            run_all(self._read_rows, rows)
        else:
            self._read_boxes(runs, steps, start, stop, out)

    @property
    def by_snapshot(self) -> bool:
        """Whether files hold a snapshot each, in plain chunks, and numbers stay aligned behind checksums."""
        meta = self.metadata
        whole = meta.outer[2] >= meta.shape[2] and meta.outer[:2] == (1, 1)
        return meta.sharded and whole and meta.decode is None and _CRC % meta.dtype.itemsize == 0

    @property
    def chunk_room(self) -> int:
        """Bytes of a chunk and its checksum."""
        return self._chunk_bytes + _CRC

    @property
    def mappable(self) -> bool:
        """Whether `map` can be asked for."""
        return self.by_snapshot and can_populate()

    def read_chunks(self, run: int, steps: Sequence[int], first: int, last: int, room: np.ndarray) -> list[np.ndarray]:
        """Read the chunks [first, last) of snapshots, where those are `by_snapshot`, with as few calls as can be.

        Args:
            run: index along axis 0.
            steps: indices along axis 1.
            first: number of the first chunk.
            last: one past the number of the last.
            room: uint8 [len(steps), (last − first) · (bytes of a chunk and its checksum)], contiguous.

        Returns:
            For each chunk [1, len(steps), coordinates], in `room`.

        Raises:
            DamagedError: a file is missing, too short, or fails its checksum.
        """
        assert self.by_snapshot
        chunks = _views(self.metadata, first, last, room.reshape(-1).data, 0, (1, len(steps)), room.shape[1])
        for row, step in enumerate(steps):
            cell = (run, step)
            with self._open((run, step, 0), cell) as (fd, size, key):
                offset, stride = self._place(fd, size, key, (0, 0, first), cell)
                if key in self._in_order:
                    records = room[row].data
                    self._fill(fd, [records], offset, cell, key)
                    wrong = _first_wrong(records, stride)
                    if wrong is not None:
                        raise self._damaged(cell, key, f"fails its checksum (at byte {offset + wrong})")
                    continue
            for number, chunk in enumerate(chunks, first):
                start = number * self.metadata.inner[2]
                self._read_row(run, step, start, start + chunk.shape[-1], chunk[0, row].data.cast("B"))
        return chunks

    def map(self, runs: Sequence[int], steps: Sequence[int]) -> "MappedChunks | None":
        """Whole snapshots where the system holds them; None where it refuses, or their chunks lie in another order.

        Raises:
            DamagedError: a file is missing or too short.
        """
        assert self.mappable
        cells = [(run, step) for run in runs for step in steps]
        damaged = []
        try:
            files = MappedFiles(len(cells), self._per_file[2] * (self._chunk_bytes + _CRC))
            for number, cell in enumerate(cells):
                with self._open((*cell, 0), cell) as (fd, size, key):
                    self._place(fd, size, key, (0, 0, 0), cell)
                    if key not in self._in_order:
                        return None
                    files.map(number, fd)
                    damaged.append(self._naming(cell, key))
        except OSError:
            return None
        return MappedChunks(files, self.metadata, len(runs), damaged)

    def _naming(self, cell: tuple[int, int], key: str) -> Callable[[str], DamagedError]:
        return lambda what: self._damaged(cell, key, what)

    @property
    def _piece(self) -> int:
        """Coordinates of a snapshot that one thread reads in a row."""
        return max(1, _PIECE_BYTES // self.metadata.chunk_bytes) * self.metadata.inner[2]

    def check_first(self) -> None:
        """Compare the size of the first file with what the metadata declares, before anyone allocates by it.

        Raises:
            DamagedError: it is missing or has another size.
        """
        with self._open((0, 0, 0), (0, 0)) as (fd, size, key):
            if self.metadata.sharded:
                self._place(fd, size, key, (0, 0, 0), (0, 0))

    def _damaged(self, cell: tuple[int, int], key: str, what: str) -> DamagedError:
        run, step = self._runs[cell[0]], self._steps[cell[1]]
        return DamagedError(f"{self._store}: run {run}, step {step} is damaged: file {self._name}/{key} {what}.")

    @contextmanager
    def _open(self, file: tuple[int, ...], cell: tuple[int, int]) -> Iterator[tuple[int, int, str]]:
        """Open the file of an outer chunk: descriptor, size and name."""
        key = self.metadata.key(*file)
        kept = self._kept.get(key)
        if kept is not None:
            yield *kept, key
            return
        try:
            fd = os.open(f"{self._folder}/{key}", os.O_RDONLY)
        except FileNotFoundError:
            raise self._damaged(cell, key, "is missing") from None
        except OSError as error:
            raise self._damaged(cell, key, f"cannot be read ({error.strerror})") from error
        keep = False
        try:
            size = os.fstat(fd).st_size
            least = _CRC + 1 if self.metadata.decode else self.metadata.chunk_bytes + _CRC
            least = self._index_bytes if self.metadata.sharded else least
            exact = not self.metadata.sharded and self.metadata.decode is None
            if size < least or (size > least and exact):
                found = "is empty" if size == 0 else f"has {size} bytes"
                raise self._damaged(cell, key, f"{found}, expected {least}" + " or more" * (not exact))
            yield fd, size, key
            keep = key in self._in_order and self._kept.put(key, fd, size)
        finally:
            if not keep:
                os.close(fd)

    @property
    def _index_bytes(self) -> int:
        return prod(self._per_file) * _ENTRY + _CRC

    def _place(self, fd: int, size: int, key: str, inner: tuple[int, ...], cell: tuple[int, int]) -> tuple[int, int]:
        """Offset in its file, and length with its checksum, of an inner chunk, given by its coordinates within it."""
        packed = self.metadata.decode is not None
        stride = self.metadata.chunk_bytes + _CRC
        if not self.metadata.sharded:
            return 0, size if packed else stride
        per_file = self._per_file
        number = (inner[0] * per_file[1] + inner[1]) * per_file[2] + inner[2]
        if key in self._in_order:
            return number * stride, stride
        index = self._indices.get(key)
        end = size - self._index_bytes
        if index is None:
            raw = bytearray(self._index_bytes)
            self._fill(fd, [memoryview(raw)], end, cell, key)
            if crc32c(memoryview(raw)[:-_CRC]).to_bytes(_CRC, "little") != raw[-_CRC:]:
                raise self._damaged(cell, key, "has an index that fails its checksum")
            index = np.frombuffer(raw, "<u8", count=2 * prod(per_file)).reshape(-1, 2)
        offset, length = (int(value) for value in index[number])
        if offset == length == _ABSENT:
            raise self._damaged(cell, key, f"lacks its part {number}")
        if (length <= _CRC if packed else length != stride) or offset + length > end:
            raise self._damaged(cell, key, f"declares {length} bytes at {offset} for its part {number}")
        if packed:
            if len(self._indices) >= _MOST_INDICES:
                self._indices.clear()
            self._indices[key] = index
        elif end == len(index) * stride and np.array_equal(
            index, np.frombuffer(_index(len(index), stride), "<u8", count=index.size).reshape(-1, 2)
        ):
            self._in_order.add(key)
        return offset, length

    def _fill(self, fd: int, views: Sequence[memoryview], offset: int, cell: tuple[int, int], key: str) -> None:
        """Fill buffers from a file, wholly."""
        try:
            found = _readv_at(fd, views, offset)
            expected = sum([view.nbytes for view in views])
            while found < expected:  # the end of the file, or more than one call can read (2 GiB)
                rest, skip = [], found
                for view in views:
                    if skip < view.nbytes:
                        rest.append(view[skip:])
                    skip = max(0, skip - view.nbytes)
                more = _readv_at(fd, rest, offset + found)
                if not more:
                    raise self._damaged(cell, key, f"ends after {offset + found} bytes, expected {offset + expected}")
                found += more
        except OSError as error:
            raise self._damaged(cell, key, f"cannot be read ({error.strerror})") from error

    def _fetch(self, fd: int, views: tuple[memoryview, ...], offset: int, cell: tuple[int, int], key: str) -> None:
        """Fill buffers with a chunk and compare its checksum, which goes to the last of them."""
        self._fill(fd, views, offset, cell, key)
        found = 0
        for view in views[:-1]:
            found = crc32c(view, found)
        if found != int.from_bytes(views[-1], "little"):
            raise self._damaged(cell, key, f"fails its checksum (at byte {offset})")

    def _read_rows(self, rows: Sequence[tuple[int, int, int, int, np.ndarray]]) -> None:
        """Read (run, step, start, stop, row) where each inner chunk belongs to one snapshot."""
        for run, step, start, stop, row in rows:
            self._read_row(run, step, start, stop, row.data.cast("B"))

    def _read_row(self, run: int, step: int, start: int, stop: int, body: memoryview) -> None:
        """Read one snapshot's coordinates.

        Whole chunks go straight into `body`; of a chunk cut by `start` or `stop` the rest goes to a
        scratch buffer, because its checksum needs it.
        """
        meta, per_file = self.metadata, self._per_file
        item, width, size = meta.dtype.itemsize, meta.inner[2], self._chunk_bytes
        inner = (run % meta.outer[0], step % meta.outer[1])
        trailer = memoryview(bytearray(_CRC))
        first, last = start // width, (stop - 1) // width
        for part in range(first // per_file[2], last // per_file[2] + 1):
            file = (run // meta.outer[0], step // meta.outer[1], part)
            with self._open(file, (run, step)) as (fd, file_size, key):
                chunk, end = max(first, part * per_file[2]), min(last + 1, (part + 1) * per_file[2])
                while chunk < end:
                    offset, _ = self._place(fd, file_size, key, (*inner, chunk % per_file[2]), (run, step))
                    low, high = chunk * width, (chunk + 1) * width
                    if start <= low and high <= stop:
                        most = min(end, stop // width, chunk + self._batch) - chunk if key in self._in_order else 1
                        view = body[(low - start) * item : (low - start) * item + most * size]
                        self._fetch_many(fd, view, most, offset, (run, step), key)
                        chunk += most
                        continue
                    view = body[max(0, low - start) * item : (min(stop, high) - start) * item]
                    before = max(0, start - low) * item
                    scratch = memoryview(bytearray(size - view.nbytes))
                    self._fetch(fd, (scratch[:before], view, scratch[before:], trailer), offset, (run, step), key)
                    chunk += 1

    def _fetch_many(self, fd: int, body: memoryview, count: int, offset: int, cell: tuple[int, int], key: str) -> None:
        """Fill a buffer with chunks that lie one behind the other, and compare their checksums."""
        size = self._chunk_bytes
        trailer = memoryview(bytearray(count * _CRC))
        chunks = [body[at : at + size] for at in range(0, count * size, size)]
        views = [view for i, chunk in enumerate(chunks) for view in (chunk, trailer[i * _CRC : (i + 1) * _CRC])]
        self._fill(fd, views, offset, cell, key)
        for i, chunk in enumerate(chunks):
            if crc32c(chunk, 0, _KEEP_GIL) != int.from_bytes(views[2 * i + 1], "little"):
                raise self._damaged(cell, key, f"fails its checksum (at byte {offset + i * (size + _CRC)})")

    def _read_boxes(self, runs: Sequence[int], steps: Sequence[int], start: int, stop: int, out: np.ndarray) -> None:
        """Read chunks that hold several runs or steps, or are packed, and pick the cells."""
        width = self.metadata.inner[2]
        boxes = [
            (a, b, c)
            for a in group(runs, self.metadata.inner[0]).items()
            for b in group(steps, self.metadata.inner[1]).items()
            for c in range(start // width, (stop - 1) // width + 1)
        ]

        def read(some: Sequence[tuple[_Group, _Group, int]]) -> None:
            scratch = np.empty(self.metadata.inner, self.metadata.dtype)
            for (a, (to_run, from_run)), (b, (to_step, from_step)), c in some:
                low, high = max(start, c * width), min(stop, (c + 1) * width)
                target = out[..., low - start : high - start]
                cells = (len(from_run), len(from_step))
                # All of it, in its own order: other chunks' cells are theirs to write.
                whole = target.shape == scratch.shape == (*cells, high - low)
                whole = whole and from_run == to_run and from_step == to_step
                if whole and target.flags.c_contiguous:  # as it lies in memory
                    self._read_box(a, b, c, (runs[0], steps[0]), target)
                    continue
                self._read_box(a, b, c, (runs[to_run[0]], steps[to_step[0]]), scratch)
                rows = scratch[..., low - c * width : high - c * width]
                _assign(target, to_run, to_step, rows, from_run, from_step)

        run_all(read, boxes)

    def _read_box(self, a: int, b: int, c: int, cell: tuple[int, int], out: np.ndarray) -> None:
        """Read, check and decode one inner chunk, given by its number along each axis."""
        per_file, decode = self._per_file, self.metadata.decode
        file = (a // per_file[0], b // per_file[1], c // per_file[2])
        inner = (a % per_file[0], b % per_file[1], c % per_file[2])
        with self._open(file, cell) as (fd, size, key):
            offset, length = self._place(fd, size, key, inner, cell)
            if decode is None:
                body = out.data.cast("B")
                self._fetch(fd, (body, memoryview(bytearray(_CRC))), offset, cell, key)
                return
            data = np.empty(length, np.uint8).data  # not a bytearray, which would be filled with zeros first
            body = data[:-_CRC]
            self._fetch(fd, (body, data[-_CRC:]), offset, cell, key)
        try:
            decode(body, out)
        except (ValueError, RuntimeError, TypeError) as error:
            raise self._damaged(cell, key, f"cannot be decoded ({error})") from error


class MappedChunks:
    """The chunks of mapped snapshots.

    Args:
        files: of the snapshots, run by run; chunks lie one behind the other.
        metadata: of the array.
        runs: how many.
        damaged: for each file, makes the error that says what is wrong with it.
    """

    def __init__(
        self, files: MappedFiles, metadata: ArrayMetadata, runs: int, damaged: Sequence[Callable[[str], DamagedError]]
    ) -> None:
        self._files = files
        self._bytes = files.data.reshape(-1).data
        self._metadata = metadata
        self._shape = (runs, len(damaged) // runs)
        self._damaged = damaged

    def read(self, first: int, last: int) -> list[np.ndarray]:
        """Chunks [first, last) of all snapshots, compared with their checksums where they lie.

        Good until they are released; the memory stays for as long as an array, or a part of it, does.

        Returns:
            For each chunk [runs, steps, coordinates].

        Raises:
            DamagedError: a file cannot be read or fails its checksum.
        """
        pitch, stride = self._files.data.shape[1], self._metadata.chunk_bytes + _CRC
        for file, damaged in enumerate(self._damaged):
            try:
                self._files.populate(file, first * stride, last * stride)
            except OSError as error:
                raise damaged(f"cannot be read ({error.strerror})") from error
            wrong = _first_wrong(self._bytes[file * pitch + first * stride : file * pitch + last * stride], stride)
            if wrong is not None:
                raise damaged(f"fails its checksum (at byte {first * stride + wrong})")
        return _views(self._metadata, first, last, self._bytes, first * stride, self._shape, pitch)

    def release(self, first: int, last: int) -> None:
        """Let go of the chunks [first, last), so that they no longer count as memory of this process."""
        stride = self._metadata.chunk_bytes + _CRC
        for file in range(len(self._damaged)):
            self._files.release(file, first * stride, last * stride)


def _views(
    meta: ArrayMetadata, first: int, last: int, data: memoryview, offset: int, shape: tuple[int, int], pitch: int
) -> list[np.ndarray]:
    """The chunks [first, last) in memory that holds them as files do, snapshot by snapshot at a distance of `pitch`."""
    strides = (shape[1] * pitch, pitch, meta.dtype.itemsize)
    widths = [min(meta.inner[2], meta.shape[2] - chunk * meta.inner[2]) for chunk in range(first, last)]
    return [
        np.ndarray((*shape, width), meta.dtype, data, offset + number * (meta.chunk_bytes + _CRC), strides)
        for number, width in enumerate(widths)
    ]


def _first_wrong(records: memoryview, stride: int) -> int | None:
    """Where the first chunk begins that does not fit the checksum behind it; None where all do.

    One checksum over all chunks and their checksums is a constant, since CRCs are linear: one call instead of many.
    """
    if crc32c(records) == _sound(records.nbytes // stride, stride):
        return None
    return next(
        at
        for at in range(0, records.nbytes, stride)
        if crc32c(records[at : at + stride - _CRC])
        != int.from_bytes(records[at + stride - _CRC : at + stride], "little")
    )


@lru_cache(maxsize=16)
def _sound(count: int, stride: int) -> int:
    """The CRC of so many chunks and their checksums, all of them right."""
    chunk = bytes(stride - _CRC)
    record = chunk + crc32c(chunk).to_bytes(_CRC, "little")
    found = 0
    for _ in range(count):
        found = crc32c(record, found)
    return found


class _KeptFiles:
    """Shards left open, because to open one costs as much as reading 100 kB of it; closed with the array.

    None is closed before, since another thread may be reading from it; beyond what the process may have open,
    files are simply not kept.
    """

    _room = threading.BoundedSemaphore(_MOST_OPEN)
    """Of all arrays of the process."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[int, int]] = {}
        weakref.finalize(self, self._close, self._files)

    def get(self, key: str) -> tuple[int, int] | None:
        """Descriptor and size of a file that is open."""
        return self._files.get(key)

    def put(self, key: str, fd: int, size: int) -> bool:
        """Keep a file open; false where there is no room, or another thread was first."""
        if key in self._files or not self._room.acquire(blocking=False):
            return False
        if self._files.setdefault(key, (fd, size))[0] != fd:
            self._room.release()
            return False
        return True

    @classmethod
    def _close(cls, files: dict[str, tuple[int, int]]) -> None:
        for fd, _ in files.values():
            os.close(fd)
            cls._room.release()


def _assign(
    target: np.ndarray,
    to_run: list[int],
    to_step: list[int],
    rows: np.ndarray,
    from_run: list[int],
    from_step: list[int],
) -> None:
    """Copy cells of a chunk to where they were asked for: by slices, which cost one call, wherever they are."""
    cut = [_as_slice(indices) for indices in (to_run, to_step, from_run, from_step)]
    if all(part is not None for part in cut):
        target[cut[0], cut[1]] = rows[cut[2], cut[3]]
        return
    for to, at in zip(to_run, from_run, strict=True):
        for later, earlier in zip(to_step, from_step, strict=True):
            target[to, later] = rows[at, earlier]


def _as_slice(indices: list[int]) -> slice | None:
    whole = indices == list(range(indices[0], indices[0] + len(indices)))
    return slice(indices[0], indices[0] + len(indices)) if whole else None


_Group = tuple[int, tuple[list[int], list[int]]]


def _readv_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, views, offset)
    os.lseek(fd, offset, os.SEEK_SET)  # not every Unix has preadv; the descriptor is ours alone
    return os.readv(fd, views)


def group(indices: Sequence[int], size: int) -> dict[int, tuple[list[int], list[int]]]:
    """Sort indices by the chunk they lie in: chunk → (positions in `indices`, indices within the chunk)."""
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for position, index in enumerate(indices):
        positions, within = groups.setdefault(index // size, ([], []))
        positions.append(position)
        within.append(index % size)
    return groups


@lru_cache(maxsize=4)
def _index(count: int, stride: int) -> bytes:
    """The index of a shard whose chunks lie one behind the other, with its checksum."""
    entries = np.empty((count, 2), "<u8")
    entries[:, 0] = np.arange(count, dtype=np.uint64) * stride
    entries[:, 1] = stride
    data = entries.tobytes()
    return data + crc32c(data).to_bytes(_CRC, "little")


class SnapshotFile:
    """One snapshot's shard while it is written, coordinate by coordinate, under its temporary name.

    Args:
        path: the file's final path.
        metadata: of the array; one snapshot a shard.
        sync: whether the bytes shall be on the disk itself when it is complete.
        direct: writes past the page cache what comes whole in one `write`.
    """

    def __init__(self, path: Path, metadata: ArrayMetadata, *, sync: bool, direct: Direct | None = None) -> None:
        assert metadata.sharded
        assert metadata.outer[:2] == (1, 1)
        self.path = path
        self._metadata = metadata
        self._sync = sync
        self._direct = direct
        self._written = 0
        self._crc = 0

    @property
    def coordinates(self) -> int:
        """How many coordinates have been written."""
        return self._written // self._metadata.dtype.itemsize

    def write(self, values: np.ndarray, *, last: bool = False) -> None:
        """Append coordinates; with `last`, complete the file.

        Raises:
            ResourceError: no space left; the file is gone.
        """
        stride = self._metadata.chunk_bytes + _CRC
        position = self._written // self._metadata.chunk_bytes * stride + self._written % self._metadata.chunk_bytes
        direct = self._direct if last and not self._written else None
        path = temporary_name(self.path)
        try:
            if direct is not None:
                fd = direct.open(path)
            else:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC * (self._written == 0), 0o666)
            try:
                if not self._written:
                    chunks = prod(self._metadata.chunks_per_file)
                    reserve(fd, chunks * (stride + _ENTRY) + _CRC)
                os.lseek(fd, position, os.SEEK_SET)
                pieces = self._checked(values.data.cast("B"))
                if last:
                    pieces = chain(pieces, self._ending())
                if direct is not None:
                    direct.write(fd, pieces)
                else:
                    write_all(fd, pieces)
                if last and self._sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self.discard()
            raise disk_error(self.path, error) from error

    def _checked(self, data: memoryview) -> Iterator[Buffer]:
        """Pieces of the data, with the checksum behind each chunk they complete."""
        chunk = self._metadata.chunk_bytes
        while data.nbytes:
            piece = data[: min(chunk - self._written % chunk, _HOT_BYTES)]
            data = data[piece.nbytes :]
            self._crc = crc32c(piece, self._crc)
            self._written += piece.nbytes
            yield piece
            if self._written % chunk == 0:
                yield self._crc.to_bytes(_CRC, "little")
                self._crc = 0

    def _ending(self) -> Iterator[Buffer]:
        """Fill values up to the end of the file, and the index."""
        meta, count = self._metadata, prod(self._metadata.chunks_per_file)
        missing = count * meta.chunk_bytes - self._written
        assert missing >= 0
        if missing:
            yield from self._checked(np.full(missing // meta.dtype.itemsize, np.nan, meta.dtype).data.cast("B"))
        yield _index(count, meta.chunk_bytes + _CRC)

    def publish(self) -> None:
        """Give the completed file its name."""
        publish(self.path)

    def discard(self) -> None:
        """Drop the file."""
        temporary_name(self.path).unlink(missing_ok=True)


def write_chunk(path: Path, values: np.ndarray, *, sync: bool) -> None:
    """Replace the file of one plain chunk.

    Raises:
        ResourceError: no space left; the old file stays.
    """
    data = values.data.cast("B")
    write_temporary(path, [data, crc32c(data).to_bytes(_CRC, "little")], sync=sync)
    publish(path)
