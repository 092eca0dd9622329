"""From buffers to a store, in a thread of its own: the training waits for a copy of its weights, not for a disk."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from farcli.errors import FarcliError
from farcli.files import disk_error
from farcli.recording.regions import FirstPart, OtherPart
from farcli.store import TrajectoryWriter

JOURNAL = "snapshots.ndjson"
"""File inside a store: a line for each snapshot with its time, learning rates and loss."""
BUFFERS = 2


@dataclass(slots=True, eq=False)
class Buffer:
    """Room for one snapshot.

    Attributes:
        floats: vector of floats.
        integers: vector of integers.
        ready: what to wait for before reading, or None.
        note: what the journal says of it.
    """

    floats: Tensor
    integers: Tensor
    ready: Any = None
    note: dict[str, Any] = field(default_factory=dict)

    def differs(self, other: "Buffer") -> bool:
        """Whether two snapshots differ in any bit."""
        pairs = ((self.floats, other.floats), (self.integers, other.integers))
        for mine, theirs in pairs:
            a, b = (np.atleast_1d(each.numpy()).view(np.uint8) for each in (mine, theirs))
            if any(not np.array_equal(a[i : i + (1 << 20)], b[i : i + (1 << 20)]) for i in range(0, a.size, 1 << 20)):
                return True
        return False


class Background:
    """Writes snapshots in the order they come. One thread fills buffers, one of ours writes them.

    Large ones go past the page cache, which takes least from the training, until it once had to wait for the disk.

    Args:
        writer: of the store, or of this process's part of it; used by our thread only, and by `close` when that has
            ended.
        make: makes a pair of vectors.
        on_error: called once, in our thread, with the error that ended the writing.
    """

    def __init__(
        self,
        writer: "TrajectoryWriter | FirstPart | OtherPart",
        make: Callable[[], tuple[Tensor, Tensor]],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.writer = writer
        self.error: Exception | None = None
        self._behind = False
        self._on_error = on_error
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        self._work: SimpleQueue[tuple[int, Buffer, bool] | None] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(Buffer(*make()))
        # A daemon: should nobody close us, the interpreter must still be able to end.
        if isinstance(writer, TrajectoryWriter):
            writer.past_cache(on=True)
        self._thread = threading.Thread(target=self._run, name="farcli-recorder", daemon=True)
        self._thread.start()

    def take(self) -> Buffer:
        """A free buffer; waits while all are being written.

        Buffers come back in order, so the other one still holds the snapshot submitted last.
        """
        try:
            return self._free.get_nowait()
        except Empty:
            self._behind = True
            return self._free.get()

    def put_back(self, buffer: Buffer) -> None:
        """Return a buffer unused."""
        self._free.put(buffer)

    def submit(self, step: int, buffer: Buffer, *, again: bool = False) -> None:
        """Hand a filled buffer over.

        Args:
            step: of the snapshot.
            buffer: from `take`.
            again: it replaces the last snapshot, which has the same step.
        """
        self._work.put((step, buffer, again))

    def flush(self) -> None:
        """Wait until everything submitted is written and committed."""
        buffers = [self._free.get() for _ in range(BUFFERS)]
        for buffer in buffers:
            self._free.put(buffer)

    def close(self, *, finish: bool) -> None:
        """Write what is left and close the store, finished or to be resumed. Errors go to `on_error`."""
        self._work.put(None)
        self._thread.join()
        if self.error is None:
            try:
                if finish:
                    self.writer.finish()
                else:
                    self.writer.close()
            except FarcliError as error:
                self._fail(error)

    def hurry(self) -> None:
        """Other processes that write parts may be gone: do not wait long for them."""
        if not isinstance(self.writer, TrajectoryWriter):
            self.writer.hurry()

    def _fail(self, error: Exception) -> None:
        self.error = error
        with contextlib.suppress(FarcliError):  # the first error is the one to report
            self.writer.close()
        self._on_error(error)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            step, buffer, again = item
            if self.error is None:
                try:
                    self._write(step, buffer, again)
                except Exception as error:  # whatever it is, the training must go on
                    self._fail(error)
            self._free.put(buffer)

    def _write(self, step: int, buffer: Buffer, again: bool) -> None:
        if buffer.ready is not None:
            buffer.ready.synchronize()
            buffer.ready = None
        if self._behind and isinstance(self.writer, TrajectoryWriter):
            self.writer.past_cache(on=False)
        if again:
            self.writer.rewind(len(self.writer.steps) - 1)
        integers = buffer.integers.numpy() if self.writer.layout.integers else None
        self.writer.append(step, buffer.floats.numpy(), integers, run=self.writer.runs[0])
        if not isinstance(self.writer, OtherPart):
            write_note(self.writer.home, {"step": step, **buffer.note})


def write_note(store: Path, note: dict[str, Any]) -> None:
    """Add a line to a store's journal.

    Raises:
        ResourceError: no space left.
    """
    line = json.dumps({"time": time.time(), **note}).encode() + b"\n"
    try:
        fd = os.open(store / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)
    except OSError as error:
        raise disk_error(store, error) from error


def read_journal(store: str | Path) -> dict[int, dict[str, Any]]:
    """Time, learning rates and loss of each snapshot, by step; of a step that was recorded again, the last.

    Lines that a killed writer left unfinished are left out, and so may be the steps of other tools' stores.
    """
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = (Path(store) / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            note = json.loads(line)
            found[int(note["step"])] = note
        except (ValueError, KeyError, TypeError):
            continue
    return found
