"""Real scripts, run as real processes, with and without recording."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from farcli.recording.picture import read_once
from farcli.store import Trajectory
from farcli.weights import unflatten
from tests.conftest import PROGRAM, Outcome

PRELUDE = r"""
import sys, torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(model, optimizer, steps=12, after=lambda step: None):
    for step in range(1, steps + 1):
        rows = torch.randint(0, 64, (16,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sys.stdout.write(f"{step} {loss.item()!r}\n")  # one write: two processes share the pipe
        sys.stdout.flush()
        after(step)
"""


@dataclass(frozen=True)
class Ran:
    """A recorded script."""

    folder: Path
    code: int
    out: str
    err: str

    def store(self, name="run.zarr", *, partial=False) -> Trajectory:
        return Trajectory.open(self.folder / name, partial=partial)

    def state(self, step=None, name="run.zarr", *, partial=False) -> dict[str, torch.Tensor]:
        """The state dict of a snapshot, of the last by default."""
        return state_of(self.store(name, partial=partial), step)

    def saved(self, name="final.pt") -> dict[str, torch.Tensor]:
        """What the script saved itself."""
        return torch.load(self.folder / name)

    @property
    def said(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("farcli: ")]


def state_of(store: Trajectory, step=None) -> dict[str, torch.Tensor]:
    step = store.steps[-1] if step is None else step
    vector = torch.from_numpy(store.read([store.runs[0]], [step])[0, 0])
    integers = torch.from_numpy(store.integers(store.runs[0], step))
    return unflatten(vector, integers, store.layout) | read_once(store.path, store.header)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit, names and dtypes included."""
    assert sorted(a) == sorted(b)
    for name, tensor in a.items():
        mine, theirs = tensor.contiguous().reshape(-1), b[name].contiguous().reshape(-1)
        assert (mine.dtype, tensor.shape) == (theirs.dtype, b[name].shape), name
        if not torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
            return False
    return True


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}


@dataclass(frozen=True)
class Bench:
    """Where scripts are written and run."""

    folder: Path

    def write(self, text: str, name="train.py") -> None:
        (self.folder / name).write_text(PRELUDE + textwrap.dedent(text))

    def plain(self, *words: object) -> Outcome:
        """Run a command without recording."""
        words = words or (sys.executable, "train.py")
        done = subprocess.run(
            [*map(str, words)], cwd=self.folder, env=environment(), capture_output=True, text=True, check=False
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def record(self, *options: object, command=None, env=None) -> Ran:
        """Run a command (train.py by default) recorded to run.zarr."""
        words = [PROGRAM, "record", "-o", "run.zarr", *map(str, options), "--", *map(str, command or self.python())]
        done = subprocess.run(
            words, cwd=self.folder, env=environment(**(env or {})), capture_output=True, text=True, check=False
        )
        return Ran(self.folder, done.returncode, done.stdout, done.stderr)

    def compared(self, *options: object, command=None, heard: Callable[[str], list[str]] = str.splitlines) -> Ran:
        """Run a command twice, the second time recorded: nothing of it may differ, and its end is the last snapshot.

        Args:
            options: of the recording.
            command: train.py by default; it prints its losses, and saves its weights as final.pt.
            heard: the lines of its output that are the same each time; of several processes they come in any order.
        """
        plain = self.plain(*(command or self.python()))
        assert plain.code == 0, plain.err
        lines = sorted(heard(plain.out))
        assert lines
        (self.folder / "final.pt").rename(self.folder / "plain.pt")
        ran = self.record(*options, command=command)
        assert (ran.code, ran.said) == (0, []), ran.err
        assert sorted(heard(ran.out)) == lines
        assert same(ran.saved(), ran.saved("plain.pt"))
        assert same(ran.state(), ran.saved())
        return ran

    def python(self) -> list[str]:
        return [sys.executable, "train.py"]

    def interrupted(self, *options: object, at="8 ", number=signal.SIGTERM) -> Ran:
        """Record train.py and send it a signal once it has printed a line that begins with `at`."""
        words = [PROGRAM, "record", "-o", "run.zarr", *map(str, options), "--", *self.python()]
        with subprocess.Popen(
            words, cwd=self.folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(at):
                    time.sleep(0.05)
                    process.send_signal(number)
                    break
            out, err = process.communicate(timeout=60)
        return Ran(self.folder, process.returncode, "".join(lines) + out, err)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)
