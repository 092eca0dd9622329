"""SIGTERM and SIGUSR1: a command that can save its state does so and exits 75; others clean up and exit 128+N."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """A signal arrived. Like KeyboardInterrupt it unwinds the stack, which removes whatever is half-written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_SIGNALS = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


def unwind_on_signals() -> None:
    """Turn SIGTERM and SIGUSR1 into `Terminated`, so that `with` blocks clean up."""

    def handler(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    for number in _SIGNALS:
        signal.signal(number, handler)


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM, SIGUSR1 and SIGINT only raise a flag, which the yielded function reads."""
    stopped = False

    def handler(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signals = [*_SIGNALS, signal.SIGINT]
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield lambda: stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old)
