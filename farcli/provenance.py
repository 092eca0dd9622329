"""What made an artefact: versions, command, machine, time, seeds. Standard library only."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from uuid import uuid4

import farcli

_PACKAGES = ("torch", "zarr", "numcodecs", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, farcli and the packages that decide an artefact's numbers."""
    found = {"python": platform.python_version(), "farcli": farcli.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def command() -> list[str]:
    """The command line as typed, the program by its bare name."""
    return [os.path.basename(sys.argv[0]) or "python", *sys.argv[1:]]


def provenance(**more: Any) -> dict[str, Any]:
    """A JSON object to store in an artefact; `more` holds seeds, configuration and sources."""
    return {
        "id": uuid4().hex,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "versions": versions(),
        "platform": platform.platform(),
        **more,
    }
