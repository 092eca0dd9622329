"""What all tests share: two threads, and the real command in a real process."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from tests.forked import Forked

settings.register_profile("farcli", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("farcli")

PROGRAM = str(Path(sys.executable).with_name("farcli"))
FORKED = Forked(PROGRAM) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(1)


def run_farcli(*words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Outcome:
    """Run the installed program in a process of its own, no terminal; from its first import, where `env` is given."""
    texts, whole = [str(word) for word in words], {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(env or {})}
    if FORKED is not None and env is None:
        return Outcome(*FORKED.run(texts, cwd or Path.cwd(), whole))
    done = subprocess.run(
        [PROGRAM, *texts], cwd=cwd, env=whole, capture_output=True, text=True, timeout=240, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def farcli() -> Callable[..., Outcome]:
    return run_farcli


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small recorded digits store, a linreg store, a fitted file and a forecast."""
    folder = tmp_path_factory.mktemp("small")
    for words in (
        ("record", "digits-cnn", "-o", "digits.zarr", "--runs", 4, "--steps", 60, "--every", 5, "--seed", 3),
        ("record", "linreg", "-o", "linreg.zarr", "--runs", 6, "--steps", 20, "--seed", 1),
        ("fit", "lfd2", "digits.zarr", "-o", "lfd2.safetensors", "--context", 4, "--train-runs", "0:2"),
        ("forecast", "lfd2.safetensors", "digits.zarr", "-o", "forecast.zarr", "--runs", "2:4"),
    ):
        outcome = run_farcli(*words, cwd=folder)
        assert outcome.code == 0, outcome.err
    return folder
