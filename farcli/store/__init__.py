"""Trajectories on disk: standard Zarr v3, appended crash-safely, read verified and block by block."""

from pathlib import Path

from farcli.store.metadata import DOCUMENT
from farcli.store.native import MappedChunks
from farcli.store.packing import Packed, pack
from farcli.store.trajectory import Problem, Trajectory
from farcli.store.writer import ColumnSink, TrajectoryWriter, write_part

__all__ = [
    "ColumnSink",
    "MappedChunks",
    "Packed",
    "Problem",
    "Trajectory",
    "TrajectoryWriter",
    "is_store",
    "pack",
    "write_part",
]


def is_store(path: str | Path) -> bool:
    """Whether a path looks like a store, finished or not; nothing is read."""
    path = Path(path)
    return (path / DOCUMENT).is_file() or (path / "weights" / DOCUMENT).is_file()
