"""Errors a user can cause, each with the exit code the command line documents for it.

A message reads: *which thing: what is wrong (with the value found), what was expected*. What to do
about it goes into `hint`, which the command line prints on a line of its own.
"""

from typing import ClassVar


class FarcliError(Exception):
    """Base of every error that is reported to the user as one line, without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(FarcliError):
    """The command or its options cannot be carried out as given, or an output already exists."""

    exit_code = 2


class StoreError(FarcliError):
    """A store or file is missing, unfinished, damaged or of a foreign schema."""

    exit_code = 3


class DamagedError(StoreError):
    """Stored bytes are missing, truncated or fail their checksum."""


class UnfinishedError(StoreError):
    """A store whose recording has not finished was opened where a finished one is needed."""


class NonFiniteError(FarcliError):
    """NaN or Inf where finite numbers are needed."""

    exit_code = 4


class CheckFailedError(FarcliError):
    """A check the user asked for (`eval --max`) did not hold."""

    exit_code = 5


class ResourceError(FarcliError):
    """The memory budget is too small, or the disk is full."""

    exit_code = 6


class StoppedError(FarcliError):
    """A signal stopped the command after its state was saved; run it again with --resume."""

    exit_code = 75
