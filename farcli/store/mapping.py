"""Files mapped into memory, so that what the system already holds is checked and used in place, copied nowhere.

Reading into a buffer moves every byte once more than checking it does; where the memory bus is the limit, that is half
of the time (scripts/LOG.md, 2026-11-22). Whole files are mapped, those of several snapshots at equal distances: the
same chunk of all of them is then one strided array, wherever in its file it begins.

What is mapped can fail when it is touched, and the system then kills the process (SIGBUS). So bytes are first
populated, which reports a bad disk, or a file cut short, as an error; that needs Linux 5.14. What remains is a file
that somebody else cuts short or writes over between check and use: no writer of ours does, since they replace files
by renaming.
"""

import ctypes
import errno
import mmap
import os
import sys
from functools import lru_cache

import numpy as np

_PRIVATE = 0x2 | 0x4000
"""MAP_PRIVATE, so that who writes to an array changes no file, and MAP_NORESERVE, since nobody should."""
_ANONYMOUS, _FIXED = 0x20, 0x10
_POPULATE_READ = 22
_HUGE = 2 << 20
"""Large pages: where a file lies in them (it was written, or is read, in such pieces), one step maps 512 small ones."""
_MOST_FILES = 8192
"""Files mapped at once: an eighth of the mappings that Linux allows a process by default."""


class MappedFiles:
    """The first bytes of files of one kind, one above the other. Unmapped when no array of them is left.

    Attributes:
        data: uint8 [files, distance from one to the next]; zeros until a file is mapped there.

    Args:
        count: of files.
        size: bytes of each.

    Raises:
        OSError: the system refuses, or cannot populate.
    """

    def __init__(self, count: int, size: int) -> None:
        if count > _MOST_FILES or not can_populate():
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        self._size = size
        self._pitch = -(-size // _HUGE) * _HUGE
        room = np.frombuffer(mmap.mmap(-1, count * self._pitch + _HUGE, flags=_PRIVATE | _ANONYMOUS), np.uint8)
        skip = -room.ctypes.data % _HUGE
        self.data = room[skip : skip + count * self._pitch].reshape(count, self._pitch)
        self._address = self.data.ctypes.data

    def map(self, number: int, file: int) -> None:
        """Map a file, which has the size at least; its descriptor may be closed afterwards.

        Raises:
            OSError: the system refuses.
        """
        at = self._address + number * self._pitch
        if _libc().mmap(at, self._size, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE | _FIXED, file, 0) != at:
            raise _error()
        _libc().madvise(at, self._size, mmap.MADV_HUGEPAGE)  # what is read from the disk comes in large pages

    def populate(self, number: int, start: int, stop: int) -> None:
        """Have bytes of a file in memory.

        Raises:
            OSError: they cannot be read, or are no longer there.
        """
        low = start // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise(number, low, stop, _POPULATE_READ)

    def release(self, number: int, start: int, stop: int) -> None:
        """Let go of the pages that end between these bytes; touched again, they are read again, unchecked."""
        low, high = (at // mmap.PAGESIZE * mmap.PAGESIZE for at in (start, stop))
        self._advise(number, low, high, mmap.MADV_DONTNEED)

    def _advise(self, number: int, low: int, high: int, advice: int) -> None:
        # Not by `mmap.madvise`, which lets no other thread run meanwhile.
        if _libc().madvise(self._address + number * self._pitch + low, high - low, advice):
            raise _error()


@lru_cache(maxsize=1)
def can_populate() -> bool:
    """Whether this system maps files safely: Linux from 5.14 on, and addresses enough."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return False
    probe = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        probe.madvise(_POPULATE_READ)
    except OSError:
        return False
    return True


def _error() -> OSError:
    number = ctypes.get_errno()
    # "Bad address" is what populating says of pages that no file, or no disk, gives any more.
    return OSError(number, "cut short, or the disk fails" if number == errno.EFAULT else os.strerror(number))


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, number = ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, size, number, number, number, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, size, number]
    return libc
