"""Trajectories with known content, for the tests of the store."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from farcli.layout import Layout, layout_of
from farcli.store import TrajectoryWriter


def layout(size: int, integers: int = 0) -> Layout:
    tensors: list[Any] = [
        ("w", (size - size // 4,), "float32", "parameter"),
        ("mean", (size // 4,), "float32", "buffer"),
    ]
    if integers:
        tensors.append(("count", (integers,), "int64", "integer"))
    return layout_of(tensors)


def weights(runs: int, steps: int, size: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((runs, steps, size)).astype(dtype)


@dataclass(frozen=True)
class Case:
    """A layout on disk."""

    size: int
    lockstep: bool = False
    chunk: tuple[int, int, int] | None = None
    dtype: str = "float32"
    integers: int = 0
    labels: tuple[int, ...] = (8, 9, 11)
    steps: tuple[int, ...] = (0, 10, 20, 35, 40, 50, 1000)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return layout(self.size, self.integers)

    @cached_property
    def weights(self) -> np.ndarray:
        return weights(len(self.labels), len(self.steps), self.size, self.dtype)

    @cached_property
    def counts(self) -> np.ndarray:
        shape = (len(self.labels), len(self.steps), self.integers)
        return np.arange(np.prod(shape), dtype=np.int64).reshape(shape) + 2**53 + 1  # not exact as float64

    def create(self, path: Path, **options: Any) -> TrajectoryWriter:
        options = {"sync": "none", "lockstep": self.lockstep, "chunk": self.chunk, **self.options, **options}
        return TrajectoryWriter.create(path, self.layout, self.labels, dtype=self.dtype, **options)

    def append(self, writer: TrajectoryWriter, first: int = 0, last: int | None = None) -> None:
        """Append snapshots first:last of every run."""
        counts = self.counts if self.integers else None
        steps = range(first, len(self.steps) if last is None else last)
        if self.lockstep:
            for t in steps:
                writer.append(self.steps[t], self.weights[:, t], None if counts is None else counts[:, t])
            return
        for r, label in enumerate(self.labels):
            for t in steps:
                writer.append(self.steps[t], self.weights[r, t], None if counts is None else counts[r, t], run=label)

    def write(self, path: Path, **options: Any) -> Path:
        with self.create(path, **options) as writer:
            self.append(writer)
            writer.finish()
        return path


CASES = {
    "tiny lockstep": Case(15, lockstep=True, integers=2),
    "tiny one by one": Case(15, integers=2),
    "planned": Case(15, options={"planned_steps": (0, 10, 20, 35, 40, 50, 1000)}),
    "chunks of 2 runs, 3 steps": Case(15, lockstep=True, chunk=(2, 3, 15), integers=1),
    "file per snapshot": Case(1000, chunk=(1, 1, 64), integers=2),
    "file per snapshot, lockstep": Case(1000, chunk=(1, 1, 100), lockstep=True),
    "big": Case(300_001, lockstep=True, integers=1),
    "float64": Case(140_000, dtype="float64"),
    "float16": Case(15, dtype="float16"),
}


def files(store: Path) -> dict[str, bytes]:
    """Everything in a store."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}
