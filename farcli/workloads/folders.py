"""Where data lie: folders to look in, and archives to read from as they are. Nothing is ever downloaded."""

import os
import tarfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path

from farcli.errors import UsageError

VARIABLE = "FARCLI_DATA"
"""Environment variable with the folders to look in, separated as in PATH; `data` in the current one comes last."""


def folders() -> list[Path]:
    """The folders to look in, in order; they need not exist."""
    return [*(Path(text) for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text), Path("data")]


def find(patterns: Sequence[str], what: str, hint: str) -> Path:
    """The first file or folder with one of these names in the folders to look in.

    Args:
        patterns: names, with `*` for any characters.
        what: the data, for the message.
        hint: how to get them.

    Raises:
        UsageError: it is in none of them.
    """
    for folder in folders():
        for pattern in patterns:
            found = sorted(folder.glob(pattern))
            if found:
                return found[-1]
    looked = ", ".join(str(folder) for folder in folders())
    raise UsageError(f"{what}: {' or '.join(patterns)} is in none of the folders {looked}.", hint)


def members(path: Path, pattern: str) -> dict[str, bytes]:
    """The files of a folder, a tar archive or a zip archive (a wheel is one), by name, sorted.

    Args:
        path: of the folder or archive.
        pattern: for the names within it, with `*` for any characters, "/" too.

    Raises:
        UsageError: it is none of these, is damaged, or has no such file.
    """
    try:
        if path.is_dir():
            names = {str(each.relative_to(path)): each for each in path.rglob("*") if each.is_file()}
            found = {name: names[name].read_bytes() for name in sorted(names) if _fits(name, pattern)}
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found = {name: archive.read(name) for name in sorted(archive.namelist()) if _fits(name, pattern)}
        else:
            found = tar_members(path.read_bytes(), pattern)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UsageError(f"{path}: cannot be read as a folder or archive ({error}).") from error
    if not found:
        raise UsageError(f"{path}: holds no {pattern}.")
    return found


def one_of(path: Path, *patterns: str) -> bytes:
    """The file of a folder or archive that fits the first of the patterns that any fits; the one that lies least deep.

    Raises:
        UsageError: as `members`.
    """
    found: dict[str, bytes] = {}
    for pattern in patterns[:-1]:
        with suppress(UsageError):
            found = found or members(path, pattern)
    found = found or members(path, patterns[-1])
    return found[min(found, key=lambda name: (name.count("/"), name))]


def absolute(path: str | None) -> str | None:
    """An option that is a path, so that it holds from any folder; None stays."""
    return None if path is None else str(Path(path).resolve())


def tar_members(data: bytes, pattern: str) -> dict[str, bytes]:
    """The files of a tar archive in memory, by name, sorted.

    Raises:
        tarfile.TarError: it is none.
    """
    found = {}
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and _fits(member.name, pattern):
                content = archive.extractfile(member)
                assert content is not None  # a file has one
                found[member.name] = content.read()
    return dict(sorted(found.items()))


def _fits(name: str, pattern: str) -> bool:
    """Whether a name matches, be it in the folder that the pattern begins with or further down."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}")
