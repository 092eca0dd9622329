"""Killed writers and full disks: what was committed is whole, and recording goes on from there."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from farcli.errors import FarcliError, ResourceError, UnfinishedError
from farcli.store import Trajectory, TrajectoryWriter
from tests.store.cases import CASES, Case, files

CHILD = """
import sys
from pathlib import Path
from farcli.store import TrajectoryWriter
from tests.store.test_store_crash import LONG
case, path = LONG[sys.argv[1]], Path(sys.argv[2])
writer = TrajectoryWriter.resume(path, sync=sys.argv[3])
print("ready", flush=True)
case.append(writer, writer.snapshots[0])
writer.finish()
"""
STEPS = tuple(range(0, 4000, 10))
LONG = {
    "file per snapshot": Case(2000, lockstep=True, chunk=(1, 1, 64), integers=2, labels=(0, 1), steps=STEPS),
    "chunks": Case(50, lockstep=True, chunk=(2, 90, 50), integers=2, labels=(0, 1, 2), steps=STEPS),
}


@pytest.mark.parametrize("name", LONG)
def test_killed_writer_loses_nothing_committed(name: str, tmp_path: Path) -> None:
    case = LONG[name]
    provenance = {"provenance": {"id": "abc"}}
    path = tmp_path / "a.zarr"
    case.create(path, header=provenance).close()
    seen = 0
    for kill in range(6):
        # "always" commits every append, so that the kill falls into the middle of one.
        sync = "none" if kill % 2 else "always"
        command = [sys.executable, "-c", CHILD, name, str(path), sync]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            assert child.stdout.readline() == "ready\n"
            while sync == "always" and len(Trajectory.open(path, partial=True).steps) <= seen and child.poll() is None:
                time.sleep(0.001)
            time.sleep(0.02 + 0.013 * kill)
            child.kill()
        if (path / "zarr.json").exists():
            break
        partial = Trajectory.open(path, partial=True)
        assert partial.steps == list(STEPS[: len(partial.steps)])
        assert len(partial.steps) >= seen
        seen = len(partial.steps)
        np.testing.assert_array_equal(partial.read(partial.runs, partial.steps), case.weights[:, :seen])
        for t in range(0, seen, 37):
            np.testing.assert_array_equal(partial.integers(1, STEPS[t]), case.counts[1, t])
        assert list(partial.verify()) == []
    assert seen > 0
    if not (path / "zarr.json").exists():
        with TrajectoryWriter.resume(path, sync="none") as writer:
            left = [p.name for p in (path / "weights").iterdir() if p.name.startswith(".") and p.name != ".lock"]
            assert left == []
            case.append(writer, writer.snapshots[0])
            writer.finish()
    case.write(tmp_path / "whole.zarr", header=provenance)
    ours, whole = files(path), files(tmp_path / "whole.zarr")
    ours.pop("weights/.lock", None)
    assert ours == whole


def test_killed_create_does_not_block(tmp_path: Path) -> None:
    weights = tmp_path / "a.zarr" / "weights"
    weights.mkdir(parents=True)
    (weights / ".lock").write_text("1\n")
    (weights / ".zarr.json.partial").write_text("{")
    case = CASES["tiny lockstep"]
    case.write(tmp_path / "a.zarr")
    assert list(Trajectory.open(tmp_path / "a.zarr").verify()) == []


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Refuse writes behind `size` bytes with EFBIG, as a full quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["file per snapshot, lockstep", "chunks of 2 runs, 3 steps", "tiny lockstep"])
def test_refused_write_leaves_the_committed_whole(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "a.zarr"
    with case.create(path, sync="always") as writer:
        case.append(writer, 0, 3)
        committed = (path / "weights" / "zarr.json").stat().st_size
        for limit in (100, committed + 1, 1500):  # in the data; sometimes in the record
            with largest_file(limit), pytest.raises(ResourceError, match="no space left to write it") as caught:
                case.append(writer, writer.snapshots[0])
            assert caught.value.exit_code == 6
            assert "a.zarr" in str(caught.value)
            partial = Trajectory.open(path, partial=True)
            done = partial.snapshots[0]
            np.testing.assert_array_equal(partial.read(case.labels, partial.steps), case.weights[:, :done])
            assert list(partial.verify()) == []
            assert writer.snapshots == partial.snapshots
        case.append(writer, writer.snapshots[0])  # room again: the same writer goes on
        writer.finish()
    assert not list(path.rglob(".*"))
    np.testing.assert_array_equal(Trajectory.open(path).read(case.labels, case.steps), case.weights)


def test_refused_columns_leave_nothing(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    with (
        pytest.raises(ResourceError),
        case.create(tmp_path / "a.zarr", staged=True) as writer,
        largest_file(2000),
        writer.columns(case.labels, case.steps) as sink,
    ):
        sink.write(0, case.weights)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", mount], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small disk needs privileges")
    yield mount
    subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("name", ["big", "tiny one by one"])
def test_full_disk(name: str, small_disk: Path) -> None:
    case = CASES[name]
    path = small_disk / "a.zarr"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1024 << 10 if name == "big" else 1900 << 10))
    with pytest.raises(ResourceError, match="no space left"), case.create(path, sync="always") as writer:  # noqa: PT012
        case.append(writer, 0, 1)
        ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 + ballast.stat().st_size - 8192))
        case.append(writer, 1)
    with pytest.raises(UnfinishedError):
        Trajectory.open(path)
    done = Trajectory.open(path, partial=True)
    assert list(done.verify()) == []
    for run, count in zip(done.runs, done.snapshots, strict=True):
        read = done.read([run], done.steps[:count])[0]
        np.testing.assert_array_equal(read, case.weights[done.runs.index(run), :count])
    ballast.unlink()
    with TrajectoryWriter.resume(path) as writer:
        assert writer.snapshots == done.snapshots


def test_no_space_even_to_begin(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    with pytest.raises(FarcliError, match="no space left") as caught:
        CASES["tiny lockstep"].create(small_disk / "a.zarr")
    assert caught.value.exit_code == 6
    assert not (small_disk / "a.zarr").exists()
