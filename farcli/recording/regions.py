"""A snapshot written by several processes: each writes the part of the vector that is its own.

For weights that are spread over processes. All of them take part in putting a tensor together, so each keeps
what lies in its region, and writes it to a file of its own; the first one moves the files into the store and
commits, so that a snapshot still counts wholly or not at all. Regions end where chunks do.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import StoreError
from farcli.layout import Layout
from farcli.recording.names import Place, is_sharded
from farcli.store import TrajectoryWriter, write_part

PARTS = "parts"
"""Folder inside a store being written, for what its other processes have written."""
_PATIENCE = 600.0
"""Seconds to wait for another process's part: they write at the same time, but not on the same disk."""
_HURRY = 5.0
"""The same once the processes have lost each other."""
_POLL = 0.002


@dataclass(frozen=True, slots=True)
class Region:
    """What one process writes.

    Attributes:
        home: folder of the store while it is written.
        part: number of its file.
        start: its first coordinate.
        stop: one past its last.
        snapshots: how many the store has when the recording begins.
    """

    home: Path
    part: int
    start: int
    stop: int
    snapshots: int

    def file(self, part: int, number: int) -> Path:
        """Where a part of the snapshot that is taken as `number` in this recording waits to be moved."""
        return self.home / PARTS / f"{part}-{number}"

    def failure(self, part: int) -> Path:
        """What a process leaves behind when it cannot write its part."""
        return self.home / PARTS / f"{part}-failed"


def spread(places: Sequence[Place]) -> bool:
    """Whether weights are spread over exactly all processes, so that all of them record."""
    from torch import distributed

    meshes = [tensor.device_mesh for place in places if is_sharded(tensor := place.tensor())]  # pyright: ignore
    return bool(meshes) and all(mesh.size() == distributed.get_world_size() for mesh in meshes)


def agree(writer: TrajectoryWriter | None) -> Region | None:
    """Tell all processes what each is to write; every process must call it.

    Args:
        writer: of the store, in the process that opened it; None in the others, and where that failed.

    Returns:
        This process's region; None where it has none.
    """
    from torch import distributed

    said: list[Any] = [None]
    if writer is not None:
        shutil.rmtree(writer.home / PARTS, ignore_errors=True)  # of a process that was killed
        (writer.home / PARTS).mkdir()
        said = [(str(writer.home.absolute()), [(p.start, p.stop) for p in writer.parts], len(writer.steps))]
    distributed.broadcast_object_list(said, src=0)
    if said[0] is None:
        return None
    home, parts, snapshots = said[0]
    rank = distributed.get_rank()
    if len(parts) > distributed.get_world_size():  # a store of more processes, resumed: one writes it all
        parts = [(0, parts[-1][1])]
    if rank >= len(parts):
        return None
    start, stop = parts[rank]
    return Region(Path(home), rank, start, stop, snapshots)


def any_says_so(mine: bool) -> bool:
    """Whether any process says yes; every process must call it."""
    from torch import distributed

    said: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(said, mine)
    return any(said)


class FirstPart:
    """The store, for the process that commits: it writes the first part and takes over the others.

    Args:
        writer: of the store.
        region: of this process.
        parts: how many files a snapshot has.
    """

    def __init__(self, writer: TrajectoryWriter, region: Region) -> None:
        self._writer = writer
        self._region = region
        self._others = range(1, len(writer.parts) if region.stop < writer.layout.size else 1)
        self._number = 0
        self._patience = _PATIENCE
        self.layout = writer.layout
        self.runs = writer.runs
        self.home = writer.home

    @property
    def steps(self) -> list[int]:
        """Steps appended so far."""
        return self._writer.steps

    def append(self, step: int, vector: np.ndarray, integers: np.ndarray | None, *, run: int) -> None:
        """Append a snapshot: the first part is given, the others are waited for.

        Raises:
            StoreError: another process could not write its part, or is gone.
        """
        number, self._number = self._number, self._number + 1
        paths = [self._region.file(part, number) for part in self._others]
        began = time.monotonic()
        for part, path in zip(self._others, paths, strict=True):
            while not path.exists():
                if self._region.failure(part).exists():
                    why = self._region.failure(part).read_text(encoding="utf-8", errors="replace")
                    raise StoreError(
                        f"{self._writer.path}: process {part} could not write its part of step {step}: {why}"
                    )
                if time.monotonic() - began > self._patience:
                    raise StoreError(f"{self._writer.path}: process {part} has not written its part of step {step}.")
                time.sleep(_POLL)
        self._writer.append(step, vector, integers, run=run, parts=paths)

    def rewind(self, count: int) -> None:
        """Forget snapshots."""
        self._writer.rewind(count)

    def finish(self) -> None:
        """Complete the store."""
        shutil.rmtree(self.home / PARTS, ignore_errors=True)
        self._writer.finish()

    def close(self) -> None:
        """Leave the store to be resumed."""
        shutil.rmtree(self.home / PARTS, ignore_errors=True)
        self._writer.close()

    def hurry(self) -> None:
        """Other processes may be gone: do not wait long for them."""
        self._patience = _HURRY


class OtherPart:
    """The store, for a process that writes one of the other parts."""

    def __init__(self, layout: Layout, region: Region, *, sync: bool) -> None:
        self.layout = layout
        self.runs = [0]
        self.home = region.home
        self._region = region
        self._sync = sync
        self._number = 0
        self.steps: list[int] = [-1] * region.snapshots

    def append(self, step: int, vector: np.ndarray, integers: np.ndarray | None, *, run: int) -> None:
        """Write this process's part of a snapshot.

        Raises:
            ResourceError: no space left.
        """
        number, self._number = self._number, self._number + 1
        region = self._region
        if not (region.home / PARTS).is_dir():
            return  # the process that commits has given up, and said so
        write_part(region.home, region.part, vector, region.file(region.part, number), sync=self._sync)
        self.steps.append(step)

    def tell(self, error: Exception) -> bool:
        """Let the process that commits say what went wrong here; false where that cannot be."""
        path = self._region.failure(self._region.part)
        try:
            path.with_suffix(".tmp").write_text(str(error), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        except OSError:
            return not path.parent.is_dir()  # it has given up itself
        return True

    def rewind(self, count: int) -> None:
        """The next part replaces one; the process that commits knows which."""
        del self.steps[count:]

    def finish(self) -> None:
        """Nothing is left to do here."""

    def close(self) -> None:
        """Nothing is left to do here."""

    def hurry(self) -> None:
        """Nobody is waited for here."""
