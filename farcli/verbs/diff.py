"""Compare two stores, or snapshots as files, tensor by tensor."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import ResourceError, StoreError, UsageError
from farcli.layout import Slot
from farcli.store import Trajectory, is_store

Report = Callable[[float, float, str], None]
_PIECE_BYTES = 8 << 20
"""Bytes compared at once."""


@dataclass(slots=True)
class _Difference:
    """What has been found of one tensor so far."""

    max_abs: float = 0.0
    squares: float = 0.0
    reference: float = 0.0
    unequal: set[tuple[int | None, int | None]] = field(default_factory=set)
    worst: tuple[int | None, int | None] | None = None

    def take(self, a: np.ndarray, b: np.ndarray, where: tuple[int | None, int | None]) -> None:
        """Compare two flat pieces of one snapshot."""
        if a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b)):
            if a.dtype.kind == "f":
                self.reference += _square(a.astype(np.float64))
            return
        self.unequal.add(where)
        if a.dtype.kind in "iub" and b.dtype.kind in "iub":
            apart = int(np.abs(a.astype(object) - b.astype(object)).max()) if not np.array_equal(a, b) else 0
            most = float(apart)
        else:
            a, b = a.astype(np.float64), b.astype(np.float64)
            with np.errstate(invalid="ignore"):
                gap = np.abs(a - b)
            gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0  # Inf − Inf; two NaN with other bits
            gap[np.isnan(gap)] = math.inf  # a number against NaN
            most = float(gap.max(initial=0.0))
            self.squares += _square(gap)
            self.reference += _square(a)
        if self.worst is None or most > self.max_abs:
            self.worst, self.max_abs = where, max(most, self.max_abs)


def diff(
    a: str,
    b: str,
    *,
    run: int | None = None,
    step: int | None = None,
    memory: int = 1_000_000_000,
    partial: bool = False,
    report: Report = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Compare two stores over the runs and steps they share, or snapshots as safetensors files.

    Args:
        a: a store or a safetensors file; differences are relative to it.
        b: another.
        run: the run to compare; all that both have when None, or the only one where the other is a file.
        step: the snapshot to compare; all that both have when None, or the last where the other is a file.
        memory: bytes that data may take.
        partial: accept unfinished stores.
        report: called with (done, total, text).

    Returns:
        One row per tensor, run or step list that differs: tensor, state ("equal", "differs", "only in A",
        "only in B", "shape", "dtype", "runs", "steps"), max_abs, relative_l2, differing and snapshots (how many are
        not bit-equal, of how many), run and step of the largest difference, detail.

    Raises:
        UsageError: a run or step is not there, or the stores share none.
        StoreError: a store or file cannot be read.
        ResourceError: not even the smallest piece fits into `memory`.
    """
    if memory < 4 * _PIECE_BYTES:
        raise ResourceError(f"--memory {memory}: too small to compare, which takes {4 * _PIECE_BYTES} bytes.")
    one, two = (Trajectory.open(path, partial=partial) if _is_folder(path) else path for path in (a, b))
    if isinstance(one, Trajectory) and isinstance(two, Trajectory):
        return _stores(one, two, run, step, report)
    if isinstance(one, str) and isinstance(two, str) and (run is not None or step is not None):
        raise UsageError(f"{a} and {b}: are files; --run and --step choose from stores.")
    sides = [_Snapshot(s, run, step) if isinstance(s, Trajectory) else _File(s) for s in (one, two)]
    return _snapshots(sides[0], sides[1], report)


def _is_folder(path: str) -> bool:
    return is_store(path) or Path(path).is_dir() or not Path(path).exists()


def _stores(a: Trajectory, b: Trajectory, run: int | None, step: int | None, report: Report) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    runs = _shared("run", a.runs, b.runs, run, a, b, rows)
    steps = _shared("step", a.steps, b.steps, step, a, b, rows)
    if a.dtype != b.dtype:
        rows.append(_row(None, "dtype", detail=f"weights are stored as {a.dtype.name} and {b.dtype.name}"))
    cells = [
        (r, t)
        for r in runs
        for t in steps
        if a.steps.index(t) < a.snapshots[a.runs.index(r)] and b.steps.index(t) < b.snapshots[b.runs.index(r)]
    ]
    slots_a, slots_b = ({slot.name: slot for slot in side.layout.slots} for side in (a, b))
    common = _common(
        {n: (s.shape, s.dtype) for n, s in slots_a.items()}, {n: (s.shape, s.dtype) for n, s in slots_b.items()}, rows
    )
    found = {name: _Difference() for name in common}
    pairs = [(slots_a[name], slots_b[name]) for name in common if slots_a[name].role != "integer"]
    spans = list(_spans(pairs, _PIECE_BYTES // max(a.dtype.itemsize, b.dtype.itemsize)))
    for number, (r, t) in enumerate(cells):
        for start_a, start_b, size, parts in spans:
            own = a.read([r], [t], start_a, start_a + size)[0, 0]
            other = b.read([r], [t], start_b, start_b + size)[0, 0]
            if own.dtype == other.dtype and np.array_equal(_bits(own), _bits(other)):
                for name, low, high in parts:
                    found[name].reference += _square(own[low:high].astype(np.float64))
                continue
            for name, low, high in parts:
                found[name].take(own[low:high], other[low:high], (r, t))
        if any(slots_a[name].role == "integer" for name in common) and a.has_integers and b.has_integers:
            own, other = a.integers(r, t), b.integers(r, t)
            for name in common:
                if slots_a[name].role == "integer":
                    part_a, part_b = (own[a.layout.slice_of(name)], other[b.layout.slice_of(name)])
                    found[name].take(part_a, part_b, (r, t))
        report(number + 1, len(cells), f"{a.path} {b.path}")
    if a.has_integers != b.has_integers:
        holder = "A" if a.has_integers else "B"
        rows.append(_row(None, f"only in {holder}", detail="integer buffers are stored in one only"))
        found = {name: d for name, d in found.items() if slots_a[name].role != "integer"}
    return rows + [_found(name, difference, len(cells)) for name, difference in found.items()]


def _shared(
    what: str,
    own: Sequence[int],
    other: Sequence[int],
    chosen: int | None,
    a: Trajectory,
    b: Trajectory,
    rows: list[dict[str, Any]],
) -> list[int]:
    """The runs or steps to compare; those that one side lacks become a row."""
    if chosen is not None:
        for side, values in ((a, own), (b, other)):
            if chosen not in values:
                raise UsageError(f"{side.path}: has no {what} {chosen}; it has {what}s {values[0]}…{values[-1]}.")
        return [chosen]
    both = [value for value in own if value in set(other)]
    if not both:
        raise UsageError(f"{a.path} and {b.path}: share no {what}; nothing to compare.")
    lacking = [
        f"only in {name}: {', '.join(map(str, missing[:8]))}{', …' if len(missing) > 8 else ''} ({len(missing)})"
        for name, missing in (
            ("A", [v for v in own if v not in set(other)]),
            ("B", [v for v in other if v not in set(own)]),
        )
        if missing
    ]
    if lacking:
        rows.append(_row(None, f"{what}s", detail="; ".join(lacking)))
    return both


def _spans(pairs: Sequence[tuple[Slot, Slot]], most: int) -> Iterator[tuple[int, int, int, list[tuple[str, int, int]]]]:
    """Stretches that hold the same tensors in both vectors: (start in A, start in B, size, parts (name, low, high)).

    Tensors that follow each other on both sides are read together: a chunk is then read once.
    """
    start_a = start_b = size = 0
    parts: list[tuple[str, int, int]] = []
    for a, b in sorted(pairs, key=lambda pair: pair[0].offset):
        done = 0
        while done < a.size:
            at_a, at_b = a.offset + done, b.offset + done
            if parts and (at_a != start_a + size or at_b != start_b + size or size >= most):
                yield start_a, start_b, size, parts
                parts, size = [], 0
            if not parts:
                start_a, start_b = at_a, at_b
            count = min(a.size - done, most - size)
            parts.append((a.name, size, size + count))
            size += count
            done += count
    if parts:
        yield start_a, start_b, size, parts


class _Snapshot:
    """One snapshot of a store, tensor by tensor."""

    def __init__(self, trajectory: Trajectory, run: int | None, step: int | None) -> None:
        if run is None and len(trajectory.runs) > 1:
            raise UsageError(
                f"{trajectory.path}: holds {len(trajectory.runs)} runs ({trajectory.runs[0]}…{trajectory.runs[-1]}).",
                hint="Choose one with --run.",
            )
        self._trajectory = trajectory
        self._run = trajectory.runs[0] if run is None else run
        if self._run not in trajectory.runs:
            raise UsageError(f"{trajectory.path}: has no run {run}; it has {trajectory.runs[0]}…{trajectory.runs[-1]}.")
        recorded = trajectory.steps[: trajectory.snapshots[trajectory.runs.index(self._run)]]
        if not recorded:
            raise StoreError(f"{trajectory.path}: holds no snapshots of run {self._run}.")
        self._step = recorded[-1] if step is None else step
        self._slots = {slot.name: slot for slot in trajectory.layout.slots}
        self._names = {name: name for name in self._slots} | dict(trajectory.layout.tied)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name → shape and dtype of every tensor, tied ones under each name."""
        return {name: (self._slots[own].shape, self._slots[own].dtype) for name, own in self._names.items()}

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The values of a tensor, flat, piece by piece."""
        slot = self._slots[self._names[name]]
        if slot.role == "integer":
            yield self._trajectory.integers(self._run, self._step)[slot.offset : slot.stop]
            return
        count = _PIECE_BYTES // 4
        for start in range(slot.offset, slot.stop, count):
            stop = min(start + count, slot.stop)
            yield self._trajectory.read([self._run], [self._step], start, stop)[0, 0]


class _File:
    """A safetensors file, tensor by tensor."""

    def __init__(self, path: str) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        try:
            self._file = safe_open(path, framework="pt")
            self._open = self._file.__enter__()
            self._names = list(self._open.keys())
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path}: is neither a store nor a readable safetensors file ({error}).") from error

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name → shape and dtype of every tensor."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for name in self._names:
            part = self._open.get_slice(name)
            found[name] = (tuple(part.get_shape()), _DTYPES.get(str(part.get_dtype()), str(part.get_dtype())))
        return found

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The values of a tensor, flat, piece by piece."""
        import torch

        tensor = self._open.get_tensor(name).flatten()
        if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            tensor = tensor.float()  # numpy has no such type; every value of it is a float32
        values = tensor.numpy()
        count = _PIECE_BYTES // 4
        for start in range(0, max(len(values), 1), count):
            yield values[start : start + count]


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def _snapshots(a: "_Snapshot | _File", b: "_Snapshot | _File", report: Report) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    names = _common(a.tensors(), b.tensors(), rows)
    for number, name in enumerate(names):
        difference = _Difference()
        for own, other in zip(a.pieces(name), b.pieces(name), strict=True):
            if own.dtype != other.dtype and own.dtype.kind == other.dtype.kind:
                # A store keeps a bfloat16 or float16 tensor as float32, which is exact: by value they may be equal.
                difference.take(own.astype(np.float64), other.astype(np.float64), (None, None))
            else:
                difference.take(own, other, (None, None))
        rows.append(_found(name, difference, 1))
        report(number + 1, len(names), name)
    return rows


def _common(
    a: dict[str, tuple[tuple[int, ...], str]], b: dict[str, tuple[tuple[int, ...], str]], rows: list[dict[str, Any]]
) -> list[str]:
    """Names whose values can be compared; what is wrong with the others becomes rows."""
    common = []
    for name in dict.fromkeys([*a, *b]):
        if name not in b or name not in a:
            rows.append(_row(name, f"only in {'A' if name in a else 'B'}"))
        elif a[name][0] != b[name][0]:
            rows.append(_row(name, "shape", detail=f"{list(a[name][0])} and {list(b[name][0])}"))
        else:
            if a[name][1] != b[name][1]:
                rows.append(_row(name, "dtype", detail=f"{a[name][1]} and {b[name][1]}"))
            common.append(name)
    return common


def _found(name: str, difference: _Difference, snapshots: int) -> dict[str, Any]:
    run, step = difference.worst or (None, None)
    if difference.reference:
        relative = math.sqrt(difference.squares / difference.reference)
    else:
        relative = math.inf if difference.squares else 0.0
    return _row(
        name,
        "differs" if difference.unequal else "equal",
        max_abs=difference.max_abs,
        relative_l2=relative,
        differing=len(difference.unequal),
        snapshots=snapshots,
        run=run,
        step=step,
    )


def _row(tensor: str | None, state: str, **values: Any) -> dict[str, Any]:
    keys = ("max_abs", "relative_l2", "differing", "snapshots", "run", "step", "detail")
    return {"tensor": tensor, "state": state} | {key: values.get(key) for key in keys}


def _bits(values: np.ndarray) -> np.ndarray:
    """The values as unsigned integers, so that NaN equals itself and 0 differs from −0."""
    values = np.ascontiguousarray(values)
    return values.view(f"u{values.itemsize}") if values.dtype.kind != "b" else values.view(np.uint8)


def _square(values: np.ndarray) -> float:
    return float(np.dot(values, values))
