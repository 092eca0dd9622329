"""Progress on stderr: a bar on a terminal, a plain line every 30 seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[float, float, str], None]
"""Called with (done, total, what is being done)."""

_LOG_INTERVAL = 30.0


@contextmanager
def progress(what: str, quiet: bool = False) -> Iterator[Report]:
    """Show how far a command is; the yielded function takes (done, total, text)."""
    if quiet:
        yield lambda done, total, text: None
    elif sys.stderr.isatty():
        yield from _bar(what)
    else:
        yield from _lines(what)


def _bar(what: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    ) as bar:
        task = bar.add_task(what, total=None, text="")
        yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)


def _lines(what: str) -> Iterator[Report]:
    started = last = time.monotonic()

    def report(done: float, total: float, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LOG_INTERVAL:
            return
        last = now
        share = done / total if total else 0.0
        left = (now - started) * (1 - share) / share if share else float("inf")
        print(f"farcli: {what}: {share:.0%}, about {left:.0f} s left. {text}", file=sys.stderr, flush=True)

    yield report
