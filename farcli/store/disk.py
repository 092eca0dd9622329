"""Files and folders that appear whole or not at all, and the lock of a store being written."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from farcli.errors import UsageError
from farcli.files import disk_error

Sync = Literal["none", "commit", "always"]
SYNC_POLICIES: tuple[Sync, ...] = get_args(Sync)

WRITE_BYTES = 2 << 20
"""Most bytes handed to one write(): pieces of this size, from the start of a file on, lie in large pages afterwards,
which readers map in one step (Linux)."""
_MOST_PIECES = 512
"""Most buffers in one call; the system refuses more than IOV_MAX = 1024."""
_DIRECT_BYTES = 4 << 20
_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems say that cannot write past the page cache, or only from other addresses."""
LOCK = ".lock"
_TEMPORARY = ".partial"

Buffer = bytes | bytearray | memoryview


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`; hidden, in the same folder."""
    return path.with_name(f".{path.name}{_TEMPORARY}")


def write_all(fd: int, pieces: Iterable[Buffer]) -> None:
    """Write pieces one behind the other, in calls of at most `WRITE_BYTES`."""
    batch: list[memoryview] = []
    size = 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest.nbytes:
            part = rest[: WRITE_BYTES - size]
            rest = rest[part.nbytes :]
            batch.append(part)
            size += part.nbytes
            if size == WRITE_BYTES or len(batch) == _MOST_PIECES:
                _write_batch(fd, batch)
                batch, size = [], 0
    _write_batch(fd, batch)


def _write_batch(fd: int, batch: list[memoryview]) -> None:
    while batch:
        written = os.writev(fd, batch)
        while batch and written >= batch[0].nbytes:
            written -= batch.pop(0).nbytes
        if written:  # the disk is filling up: the next call says so
            batch[0] = batch[0][written:]


class Direct:
    """Writes files past the page cache, through an aligned buffer that is used again.

    A snapshot of 91 MB then costs 20 ms of processor time beside a training; into file pages that a virtual
    machine's host has taken back it costs 200 to 350 (scripts/LOG.md, 2026-11-22). It takes as long as the disk does,
    and who reads the file later reads it from there. Where the file system refuses, writes are ordinary ones.
    """

    def __init__(self) -> None:
        self._buffer = memoryview(mmap.mmap(-1, _DIRECT_BYTES))
        self._buffer[:] = bytes(_DIRECT_BYTES)  # touched now, not beside the training's first step

    def open(self, path: Path) -> int:
        """Open a new file; a descriptor for `write`."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            return os.open(path, flags, 0o666)

    def write(self, fd: int, pieces: Iterable[Buffer]) -> None:
        """Write a whole file, pieces one behind the other."""
        held = 0
        for piece in pieces:
            rest = memoryview(piece)
            while rest.nbytes:
                part = rest[: _DIRECT_BYTES - held]
                self._buffer[held : held + part.nbytes] = part
                rest = rest[part.nbytes :]
                held += part.nbytes
                if held == _DIRECT_BYTES:
                    self._put(fd, held)
                    held = 0
        aligned = held // mmap.PAGESIZE * mmap.PAGESIZE
        if aligned:
            self._put(fd, aligned)
        _no_longer_direct(fd)  # the rest is part of a page, which no other write touches
        _write_batch(fd, [self._buffer[aligned:held]] if held > aligned else [])

    def _put(self, fd: int, size: int) -> None:
        batch = [self._buffer[:size]]
        try:
            batch[0] = batch[0][os.write(fd, batch[0]) :]
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
        if batch[0].nbytes:  # refused, or the disk is filling up: the next call says so
            _no_longer_direct(fd)
            _write_batch(fd, batch)


def _no_longer_direct(fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))


def reserve(fd: int, size: int) -> None:
    """Have the file system set room aside for a new file, where it can.

    Writing into reserved room takes a quarter less time (Linux, ext4), and a full disk shows before any work.

    Raises:
        OSError: there is no such room.
    """
    if sys.platform != "linux":
        return
    # Not os.posix_fallocate, which writes into every block where the file system cannot reserve.
    keep_size = 1
    if _libc().fallocate(fd, keep_size, ctypes.c_long(0), ctypes.c_long(size)):
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def write_temporary(path: Path, pieces: Iterable[Buffer], *, sync: bool) -> Path:
    """Write the file that is to become `path` under its temporary name.

    Raises:
        ResourceError: no space left; nothing stays behind.
        UsageError: the system refuses the write.
    """
    temporary = temporary_name(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(fd, pieces)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    return temporary


def publish(path: Path) -> None:
    """Give a finished temporary file its name."""
    try:
        os.replace(temporary_name(path), path)
    except OSError as error:
        raise disk_error(path, error) from error


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Replace `path` by `data` at one instant; with `sync`, on the disk itself when this returns.

    Raises:
        ResourceError: no space left; the old file stays.
    """
    write_temporary(path, [data], sync=sync)
    publish(path)
    if sync:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power loss."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise disk_error(path, error) from error


def remove_temporaries(folder: Path) -> None:
    """Drop the files a killed writer left half-written."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(_TEMPORARY):
            os.unlink(entry.path)


class Lock:
    """The right to write one store, held until `release` or the end of the process.

    The system drops a flock when its process dies, so a killed writer blocks nobody; the process id
    in the file only serves the message.

    Raises:
        UsageError: another writer holds it.
    """

    def __init__(self, folder: Path, store: Path) -> None:
        self._path = folder / LOCK
        self._fd = -1
        try:
            while not self._acquire(store):
                pass
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            self.release()
            raise disk_error(store, error) from error

    def _acquire(self, store: Path) -> bool:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise being_written(store, owner(self._path.parent)) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            # A file system without locks: writing without one beats not writing at all.
        if self._is_current():
            return True
        self._close()
        return False

    def _is_current(self) -> bool:
        # The former owner may have removed the file between our open and our flock.
        try:
            return os.fstat(self._fd).st_ino == os.stat(self._path).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the right back; the file disappears."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1


def being_written(store: Path, pid: int | None) -> UsageError:
    """The error of a second writer."""
    return UsageError(
        f"{store}: is being written by process {pid if pid is not None else '(unknown)'}.",
        hint="Wait for it to end, or choose another -o.",
    )


def is_locked(folder: Path) -> bool:
    """Whether somebody writes the store whose lock lies in `folder`."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def owner(folder: Path) -> int | None:
    """Process id of the living process that writes the store whose lock lies in `folder`, if any."""
    try:
        pid = int((folder / LOCK).read_text())
    except (OSError, ValueError):
        return None
    return pid if is_alive(pid) else None


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def staging_path(path: Path) -> Path:
    """The hidden sibling in which an output is built before it gets its name."""
    return path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")


def remove_abandoned(path: Path) -> None:
    """Drop the staging folders of `path` whose process is gone."""
    prefix = f".{path.name}."
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(prefix) and entry.name.endswith(_TEMPORARY):
                pid = entry.name[len(prefix) : -len(_TEMPORARY)]
                if pid.isdigit() and not is_alive(int(pid)):
                    shutil.rmtree(entry.path, ignore_errors=True)


def put_in_place(staging: Path, path: Path) -> None:
    """Rename a finished folder to `path`; what was there is removed only when the new one stands.

    Raises:
        UsageError: the system refuses.
    """
    try:
        if not os.path.lexists(path):
            os.rename(staging, path)
        elif _exchange(staging, path):
            _remove(staging)
        else:
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, aside)
            os.rename(staging, path)
            _remove(aside)
    except OSError as error:
        raise disk_error(path, error) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at one instant, where the system can (Linux renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
