"""Rewriting a store for keeping: chunks over time, compressed, thinned, cast; proved while it is written.

Shape suffixes: R runs and T steps of a chunk, N coordinates.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from farcli.config import format_size
from farcli.errors import DamagedError, NonFiniteError, ResourceError, UsageError
from farcli.files import disk_error
from farcli.layout import Layout
from farcli.store import disk
from farcli.store.codecs import Codec, choose, decoder, round_mantissa
from farcli.store.metadata import (
    DIMENSIONS,
    DOCUMENT,
    FLOATS,
    INTEGER_DIMENSIONS,
    array_document,
    encode,
    group_document,
)
from farcli.store.threads import count, map_ordered
from farcli.store.trajectory import Trajectory
from farcli.store.writer import BIG_BYTES, check_target, choose_chunks, equal_parts

_CHUNK_BYTES = 1 << 20
"""Aimed-at size of a chunk: one block of the compressor."""
_MOST_STEPS = 64
"""Steps in a chunk: more gain nothing, and make a single snapshot dearer to read."""
_MULTIPLE = 1024
_FILE_BYTES = 256 << 20
"""Most bytes, before compression, of a file."""
_BLOCK_BYTES = 64 << 20
"""Bytes read at once, where memory allows."""
_COPIES = 3
"""Of a block: as read, and of what is under way as cast, encoded and decoded again."""

Report = Callable[[float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What was made.

    Attributes:
        bytes: of all files of weights.
        raw_bytes: what the same snapshots take uncompressed, in the dtype of the source.
        chunk: (runs, steps, coordinates) of a chunk.
        loss: what was lost, in units of the typical update; None where nothing was.
    """

    bytes: int
    raw_bytes: int
    chunk: tuple[int, int, int]
    loss: dict[str, Any] | None


def pack(
    source: Trajectory,
    path: Path,
    *,
    codec: str = "zstd",
    runs: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    dtype: str | None = None,
    chunk: tuple[int, int, int] | None = None,
    memory: int = 2_000_000_000,
    replace: bool = False,
    report: Report = lambda done, total: None,
) -> Packed:
    """Write some snapshots of a finished store to another, in another form.

    Every chunk is decoded again and compared bit for bit before it counts, every file is read back, and zarr-python
    reads the first and the last chunk. The new store appears at `path` at one instant, or not at all.

    Args:
        source: a finished store; may lie at `path` itself when replacing.
        path: the store to write.
        codec: a name of `CODECS`, with its argument.
        runs: runs to keep, all when None.
        steps: steps to keep, all when None.
        dtype: to cast to; the source's own when None.
        chunk: shape of the chunks (runs, steps, coordinates) instead of the chosen one.
        memory: bytes that data may take.
        replace: an existing store gives way.
        report: called with (bytes of weights done, bytes in all).

    Raises:
        UsageError: `path` exists or is being written, or the arguments make no sense.
        ResourceError: not even one chunk fits into `memory`, or no space is left.
        DamagedError: the source is damaged, or what was written does not read back.
        NonFiniteError: finite weights become infinite in `dtype`.
    """
    job = _Job(source, path, codec, runs, steps, dtype, chunk, memory)
    exists = check_target(path, replace=replace)
    home = disk.staging_path(path)
    own = disk.Lock(path / "weights", path) if exists else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.remove_abandoned(path)
        home.mkdir()
        packed = job.write(home, report)
        if own is None:
            check_target(path, replace=replace)
        disk.put_in_place(home, path)
        disk.sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        shutil.rmtree(home, ignore_errors=True)
        if own is not None:
            own.release()
    return packed


def packed_chunks(runs: int, steps: int, coordinates: int, itemsize: int) -> tuple[int, int, int]:
    """Shape (runs, steps, coordinates) of the chunks that compress best: about 1 MiB, over time."""
    if coordinates * itemsize < BIG_BYTES // 16:
        per_run, per_step, width = choose_chunks(runs, coordinates, itemsize, planned=steps, lockstep=True)
        return min(per_run, runs), min(per_step, steps), width
    per_step = equal_parts(steps, _MOST_STEPS)
    width = max(1, _CHUNK_BYTES // (per_step * itemsize) // _MULTIPLE) * _MULTIPLE
    return 1, per_step, min(width, coordinates)


@dataclass(slots=True)
class _Losses:
    """Errors and updates, summed per tensor."""

    layout: Layout
    errors: np.ndarray = field(init=False)
    updates: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)
    worst: float = 0.0

    def __post_init__(self) -> None:
        self.errors, self.updates = np.zeros(len(self.layout.floats)), np.zeros(len(self.layout.floats))
        self.counts = np.zeros((2, len(self.layout.floats)))

    def take(self, start: int, truth_RTN: np.ndarray, stored_RTN: np.ndarray) -> None:
        """Compare what a chunk was with what it became."""
        truth_RTN, stored_RTN = truth_RTN.astype(np.float64), stored_RTN.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error_RTN = np.nan_to_num(stored_RTN - truth_RTN, nan=0.0, posinf=0.0, neginf=0.0)
            update_RTN = np.nan_to_num(np.diff(truth_RTN, axis=1), nan=0.0, posinf=0.0, neginf=0.0)
        self.worst = max(self.worst, float(np.abs(error_RTN).max(initial=0.0)))
        for part in self.layout.segments(start, start + truth_RTN.shape[-1]):
            error, update = error_RTN[..., part.start : part.stop], update_RTN[..., part.start : part.stop]
            self.errors[part.slot] += float(np.square(error).sum())
            self.updates[part.slot] += float(np.square(update).sum())
            self.counts[:, part.slot] += error.size, update.size

    def merge(self, other: "_Losses") -> None:
        """Add what another thread saw."""
        self.errors += other.errors
        self.updates += other.updates
        self.counts += other.counts
        self.worst = max(self.worst, other.worst)

    def to_json(self) -> dict[str, Any]:
        """The bound, in units of the typical update from one kept snapshot to the next."""
        error = math.sqrt(self.errors.sum() / max(self.counts[0].sum(), 1))
        update = math.sqrt(self.updates.sum() / max(self.counts[1].sum(), 1))
        found: dict[str, Any] = {"max_error": self.worst, "rms_error": error, "typical_update": update or None}
        if update:
            found["rms_error_in_updates"] = error / update
            moving = self.updates > 0
            ratios = np.full(len(self.errors), -1.0)
            ratios[moving] = np.sqrt(
                self.errors[moving] / self.counts[0][moving] * self.counts[1][moving] / self.updates[moving]
            )
            at = int(ratios.argmax())
            found["worst_tensor"] = self.layout.floats[at].name
            found["worst_tensor_in_updates"] = float(ratios[at])
        return found


class _Job:
    """One store to be packed: what goes where."""

    def __init__(
        self,
        source: Trajectory,
        path: Path,
        codec: str,
        runs: Sequence[int] | None,
        steps: Sequence[int] | None,
        dtype: str | None,
        chunk: tuple[int, int, int] | None,
        memory: int,
    ) -> None:
        self.source = source
        self.path = path
        self.runs = list(source.runs if runs is None else runs)
        self.steps = list(source.steps if steps is None else steps)
        if dtype is not None and dtype not in FLOATS:
            raise UsageError(f"dtype {dtype!r}: expected {' or '.join(FLOATS)}.")
        if not self.runs or not self.steps or len(set(self.runs)) < len(self.runs):
            raise UsageError(f"{source.path}: no runs or steps are left to pack, or a run is named twice.")
        if self.steps != sorted(set(self.steps)):
            raise UsageError(f"{source.path}: the steps to pack do not increase.")
        self.dtype = np.dtype(dtype or source.dtype.name).newbyteorder("<")
        self.codec: Codec = choose(codec, self.dtype)
        size = source.size
        self.chunk = self._chunk(chunk)
        across = math.ceil(size / self.chunk[2])
        per_file = max(1, min(across, _FILE_BYTES // max(1, prod(self.chunk) * self.dtype.itemsize)))
        self.sharded = across > 1
        self.file_width = per_file * self.chunk[2] if self.sharded else self.chunk[2]
        decode = decoder(list(self.codec.chain))
        assert decode is not None, "whoever writes a codec can read it"
        self.decode = decode
        self.width = self._block_width(memory)
        self.losses = _Losses(source.layout)
        self._room = np.empty(0, source.dtype)  # used again: fresh memory costs more than reading into it

    def _chunk(self, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
        size, item = max(self.source.size, 1), self.dtype.itemsize
        if given is not None:
            if min(given) < 1:
                raise UsageError(f"chunk {given}: expected three numbers of at least 1.")
            return min(given[0], len(self.runs)), min(given[1], len(self.steps)), min(given[2], size)
        if self.codec.name == "none":
            runs, steps, width = choose_chunks(len(self.runs), size, item, planned=len(self.steps), lockstep=True)
            return min(runs, len(self.runs)), min(steps, len(self.steps)), min(width, size)
        return packed_chunks(len(self.runs), len(self.steps), size, item)

    @property
    def is_lossy(self) -> bool:
        """Whether values may differ from those of the source."""
        own = self.source.dtype
        return self.codec.keep_bits is not None or not np.can_cast(own, self.dtype, "safe")

    def _block_width(self, memory: int) -> int:
        """Coordinates read at once: whole chunks of ours, and of the source as far as memory allows."""
        per_column = self.chunk[0] * self.chunk[1] * max(self.source.dtype.itemsize, self.dtype.itemsize)
        least = per_column * self.chunk[2] * (_COPIES + (3 if self.is_lossy else 0)) * (count() + 1)
        if least > memory:
            raise ResourceError(
                f"--memory {format_size(memory)}: too small to pack {self.source.path} in chunks of "
                f"{'×'.join(map(str, self.chunk))}, which takes {format_size(least)}.",
                hint="Give more memory or a smaller --chunk.",
            )
        wanted = max(self.chunk[2], min(_BLOCK_BYTES, memory - least) // per_column)
        wide = wanted // self.chunk[2] * self.chunk[2]
        aligned = math.lcm(self.chunk[2], self.source.column_chunk)
        return max(self.chunk[2], wide // aligned * aligned if wide >= aligned else wide)

    def write(self, home: Path, report: Report) -> Packed:
        """Write the whole store into an empty folder."""
        total = len(self.runs) * len(self.steps) * self.source.size * self.source.dtype.itemsize
        done = 0
        weights = home / "weights"
        weights.mkdir()
        size = 0
        chunk = self.chunk
        for a, first_run in enumerate(range(0, len(self.runs), chunk[0])):
            runs = self.runs[first_run : first_run + chunk[0]]
            for b, first_step in enumerate(range(0, len(self.steps), chunk[1])):
                steps = self.steps[first_step : first_step + chunk[1]]
                for c, low in enumerate(range(0, self.source.size, self.file_width)):
                    high = min(low + self.file_width, self.source.size)
                    size += self._write_file(weights / f"c.{a}.{b}.{c}", runs, steps, low, high)
                    done += len(runs) * len(steps) * (high - low) * self.source.dtype.itemsize
                    report(done, total)
        arrays = {"weights": self._document()}
        disk.replace_file(weights / DOCUMENT, encode(arrays["weights"]), sync=True)
        disk.sync_folder(weights)
        if self.source.has_integers:
            arrays["integers"] = self._write_integers(home)
        for name, labels in (("run", self.runs), ("step", self.steps)):
            arrays[name] = _write_array(home / name, np.asarray(labels, "<i8"), (name,))
        packed = Packed(bytes=size, raw_bytes=total, chunk=self.chunk, loss=self._loss())
        header = {k: v for k, v in self.source.header.items() if k not in ("planned_steps", "steps", "runs", "pack")}
        header |= {"runs": self.runs, "pack": self._note(packed), "steps": self.steps}
        disk.replace_file(home / DOCUMENT, encode(group_document(header, arrays)), sync=True)
        self._judge(home)
        return packed

    def _loss(self) -> dict[str, Any] | None:
        if not self.is_lossy:
            return None
        bits = self.codec.keep_bits
        bound = {} if bits is None else {"relative_bound": 2.0 ** -(bits + 1)}
        return bound | self.losses.to_json()

    def _note(self, packed: Packed) -> dict[str, Any]:
        """What the header says of it; kept over repeated packing, since losses add up."""
        before = self.source.header.get("pack")
        return {
            "codec": self.codec.name,
            "lossless": not self.is_lossy,
            "raw_bytes": packed.raw_bytes,
            "bytes": packed.bytes,
            "thinned": len(self.steps) < len(self.source.steps) or len(self.runs) < len(self.source.runs),
            **(packed.loss or {}),
            **({"before": before} if before else {}),
        }

    def _document(self) -> dict[str, Any]:
        outer = (*self.chunk[:2], self.file_width)
        return array_document(
            shape=(len(self.runs), len(self.steps), self.source.size),
            dtype=self.dtype,
            outer=outer,
            inner=self.chunk if self.sharded else None,
            dimensions=DIMENSIONS,
            chain=self.codec.chain,
        )

    def _write_file(self, path: Path, runs: Sequence[int], steps: Sequence[int], low: int, high: int) -> int:
        """Write the chunks of some coordinates one behind the other; returns the file's size."""
        found = 0
        size = 0

        def pieces() -> Iterator[Any]:
            nonlocal found, size
            entries = []
            for data, checksum in self._encoded(runs, steps, low, high):
                trailer = checksum.to_bytes(4, "little")
                entries.append((size, len(data) + 4))
                for piece in (data, trailer):
                    found = crc32c(piece, found)
                    size += len(piece)
                    yield piece
            if self.sharded:
                absent = self.file_width // self.chunk[2] - len(entries)  # behind the end of the vector
                index = np.array(entries + [(2**64 - 1, 2**64 - 1)] * absent, "<u8").tobytes()
                ending = index + crc32c(index).to_bytes(4, "little")
                found = crc32c(ending, found)
                size += len(ending)
                yield ending

        disk.write_temporary(path, pieces(), sync=True)
        disk.publish(path)
        if _checksum(path) != found:
            raise DamagedError(f"{path}: does not read back as it was written; the disk or memory is at fault.")
        return size

    def _encoded(self, runs: Sequence[int], steps: Sequence[int], low: int, high: int) -> Iterator[tuple[Any, int]]:
        """The chunks of a file, encoded and proved, with their checksums."""
        width = self.chunk[2]
        for start in range(low, high, self.width):
            stop = min(start + self.width, high)
            shape = (len(runs), len(steps), stop - start)
            if self._room.size < prod(shape):
                self._room = np.empty(prod(shape), self.source.dtype)
            block_RTN = self._room[: prod(shape)].reshape(shape)
            self.source.read(runs, steps, start, stop, out=block_RTN)
            parts = [
                (at, block_RTN[..., at - start : min(at + width, stop) - start]) for at in range(start, stop, width)
            ]
            for data, checksum, losses in map_ordered(self._encode, parts):
                if losses is not None:
                    self.losses.merge(losses)
                yield data, checksum

    def _encode(self, part: tuple[int, np.ndarray]) -> tuple[Any, int, _Losses | None]:
        start, truth_RTN = part
        with np.errstate(over="ignore", invalid="ignore"):
            values = truth_RTN.astype(self.dtype, order="C")
        if self.codec.keep_bits is not None:
            round_mantissa(values, self.codec.keep_bits)
        losses = None
        if self.is_lossy:
            losses = _Losses(self.source.layout)
            losses.take(start, truth_RTN, values)
            if np.any(np.isfinite(truth_RTN) & ~np.isfinite(values)):
                raise NonFiniteError(f"{self.source.path}: holds weights too large for {self.dtype.name}.")
        if values.shape != self.chunk:
            padded = np.full(self.chunk, np.nan, self.dtype)
            padded[: values.shape[0], : values.shape[1], : values.shape[2]] = values
            values = padded
        data = self.codec.encode(values)
        again = np.empty_like(values)
        self.decode(memoryview(data), again)
        if not np.array_equal(again.view(f"u{values.itemsize}"), values.view(f"u{values.itemsize}")):
            raise DamagedError(
                f"{self.source.path}: codec {self.codec.name} does not give coordinates from {start} back.",
                hint="This is a fault of the codec; choose another with --codec.",
            )
        return data, crc32c(data), losses

    def _write_integers(self, home: Path) -> dict[str, Any]:
        values = np.array(
            [[self.source.integers(run, step) for step in self.steps] for run in self.runs], np.int64
        ).reshape(len(self.runs), len(self.steps), self.source.layout.integers)
        return _write_array(home / "integers", values, INTEGER_DIMENSIONS)

    def _judge(self, home: Path) -> None:
        """Let zarr-python read the first and the last chunk, and compare."""
        import warnings

        import zarr

        staged = Trajectory.open(home)
        with warnings.catch_warnings():  # "… is not in the Zarr version 3 specification"
            warnings.simplefilter("ignore")
            array = zarr.open_array(str(home / "weights"), mode="r", zarr_format=3)
            for at in (0, -1):
                low = (staged.size - 1) // self.chunk[2] * self.chunk[2] if at else 0
                high = min(low + self.chunk[2], staged.size)
                own = staged.read([self.runs[at]], [self.steps[at]], low, high)[0, 0]
                row, column = at % len(self.runs), at % len(self.steps)
                judged = np.asarray(array[row, column, low:high])
                if own.tobytes() != judged.tobytes():
                    raise DamagedError(f"{self.path}: zarr-python reads codec {self.codec.name} differently.")


def _write_array(folder: Path, values: np.ndarray, dimensions: Sequence[str]) -> dict[str, Any]:
    """Write a small array as one chunk."""
    folder.mkdir()
    document = array_document(
        shape=values.shape, dtype=values.dtype, outer=values.shape, inner=None, dimensions=dimensions
    )
    data = np.ascontiguousarray(values).tobytes()
    name = ".".join(("c", *("0" for _ in values.shape)))
    disk.replace_file(folder / name, data + crc32c(data).to_bytes(4, "little"), sync=True)
    disk.replace_file(folder / DOCUMENT, encode(document), sync=True)
    return document


def _checksum(path: Path) -> int:
    found = 0
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(_CHUNK_BYTES)
        while size := file.readinto(buffer):
            found = crc32c(memoryview(buffer)[:size], found)
    return found
