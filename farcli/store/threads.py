"""The threads that read, check, encode and decode: as many as there are processors, shared by all stores.

Reads, checksums and codecs let go of the interpreter, so threads are enough, and cheaper than processes.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_MOST_THREADS = 8
"""Threads beyond which the memory bus, not the processor, sets the pace."""
_pool: ThreadPoolExecutor | None = None
_own = threading.local()


def count() -> int:
    """How many threads there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, min(_MOST_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1))


@contextmanager
def readers(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each read for themselves; a single one has its reads shared among the threads of all stores."""
    with ThreadPoolExecutor(number, "farcli-read", initializer=_mark if number > 1 else None) as pool:
        yield pool


def _threads() -> ThreadPoolExecutor:
    global _pool  # noqa: PLW0603 - one pool a process, made when first needed
    if _pool is None:
        _pool = ThreadPoolExecutor(count(), thread_name_prefix="farcli-store", initializer=_mark)
    return _pool


def _mark() -> None:
    _own.is_one = True


def _forget() -> None:
    global _pool  # noqa: PLW0603
    _pool = None


if hasattr(os, "register_at_fork"):
    # A forked child has the pool but not its threads, and would wait for ever.
    os.register_at_fork(after_in_child=_forget)


def run_all(work: Callable[[Sequence[ItemT]], None], items: Sequence[ItemT]) -> None:
    """Have `work` done on all items, each thread taking a part of them; an error ends its part and is raised.

    Within one of the threads all is done by that thread: were it to wait for the others, none might be left.
    """
    parts = 1 if getattr(_own, "is_one", False) else min(count(), len(items))
    if parts < 2:
        work(items)
        return
    # One hand-over a thread, not one an item: a hand-over costs as much as reading 100 kB.
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    futures = [_threads().submit(work, items[low:high]) for low, high in pairwise(bounds[1:])]
    try:
        work(items[: bounds[1]])
    finally:
        # The others are waited for, even after an error: the buffers they write to are the caller's.
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def map_ordered(
    work: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    *,
    pool: ThreadPoolExecutor | None = None,
    ahead: int | None = None,
) -> Iterator[ResultT]:
    """The results of `work`, in the order of the items; `ahead` items, one more than threads, are under way at once."""
    ahead = ahead or count() + 1
    waiting: deque[Future[ResultT]] = deque()
    try:
        for item in items:
            waiting.append((pool or _threads()).submit(work, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
