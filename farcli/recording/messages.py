"""What a recording says on stderr, a line at a time. Standard library only."""

import contextlib
import sys

from farcli.errors import FarcliError, ResourceError


def say(text: str) -> None:
    """One line for people on stderr; a closed stderr is no reason to fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"farcli: {text}", file=sys.stderr, flush=True)


def stopped(error: Exception, what: str = "recording") -> str:
    """The line that says that recording has ended and training has not; or another part of our work."""
    text = str(error) if isinstance(error, FarcliError) else f"{type(error).__name__}: {error}"
    kept = " What was recorded so far can be read with --partial." if isinstance(error, ResourceError) else ""
    return f"{what} stopped, the training goes on: {' '.join(text.split())}{kept}"
