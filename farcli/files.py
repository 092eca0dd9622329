"""Writing files whole or not at all. Standard library only."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from farcli.errors import FarcliError, ResourceError, UsageError


def refuse_existing(path: Path, replace: bool) -> None:
    """Check, before any work, that an output may be written.

    Raises:
        UsageError: it exists and `replace` is false, or its folder cannot hold it.
    """
    if path.exists() and not replace:
        raise UsageError(f"{path}: already exists.", hint="Pass --force to replace it, or choose another -o.")
    if path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"{path}: {path.parent} is not a folder.")


def check_outcome(path: Path, *, replace: bool, resume: bool, inputs: Sequence[str] = ()) -> None:
    """Check, before any work, that `--force` and `--resume` say what may happen to an existing output.

    Args:
        path: the output.
        replace: whether `--force` was given.
        resume: whether `--resume` was given.
        inputs: what the command reads.

    Raises:
        UsageError: both are given, or neither and it exists; or the output would replace or lie inside an input.
    """
    place = path.resolve()
    for text in inputs:
        source = Path(text).resolve()
        if source.exists() and (place == source or source in place.parents or place in source.parents):
            raise UsageError(f"{path}: would be written over its own input {text}.", hint="Choose another -o.")
    if replace and resume:
        raise UsageError("--force and --resume contradict each other: choose one.")
    if not resume:
        refuse_existing(path, replace)


def disk_error(path: object, error: OSError) -> FarcliError:
    """What the user is told when the system refuses a write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"{path}: no space left to write it.", hint="Free some space and run the command again.")
    return UsageError(f"{path}: cannot be written ({error.strerror or error}).")


@contextmanager
def staged_file(path: Path, replace: bool) -> Iterator[Path]:
    """A temporary sibling to write to; renamed to `path` when the block ends well, removed when not.

    Raises:
        UsageError: `path` exists and `replace` is false, or the system refuses.
        ResourceError: no space left.
    """
    refuse_existing(path, replace)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # as the umask has it, whoever wrote the file
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        refuse_existing(path, replace)
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with suppress(OSError):  # of a folder that cannot be written, what was raised above says more
            temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, *, replace: bool) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        UsageError: it exists and `replace` is false, or the system refuses.
        ResourceError: no space left.
    """
    with staged_file(path, replace) as temporary:
        temporary.write_bytes(data)
