"""Rules of appending, resuming, replacing, and building out of sight."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from farcli.errors import DamagedError, StoreError, UnfinishedError, UsageError
from farcli.layout import layout_of
from farcli.store import Trajectory, TrajectoryWriter, write_part
from farcli.store.disk import Direct
from tests.store.cases import CASES, Case, files, layout, weights

RESUMABLE = ("tiny lockstep", "tiny one by one", "chunks of 2 runs, 3 steps", "file per snapshot")
PROVENANCE = {"provenance": {"id": "abc"}}


def test_header_is_kept(tmp_path: Path) -> None:
    header = {"provenance": {"id": "abc", "seed": 3}, "workload": {"name": "digits", "lr": 1e-3}}
    CASES["planned"].write(tmp_path / "deep" / "er" / "a.zarr", header=header, kind="forecast")
    trajectory = Trajectory.open(tmp_path / "deep" / "er" / "a.zarr")
    assert trajectory.kind == "forecast"
    assert trajectory.id == "abc"
    assert {key: trajectory.header[key] for key in header} == header


def test_provenance_is_filled_in(tmp_path: Path) -> None:
    with CASES["planned"].create(tmp_path / "a.zarr") as writer:
        identifier = writer.header["provenance"]["id"]
    assert Trajectory.open(tmp_path / "a.zarr", partial=True).id == identifier


def test_unfinished_store_says_so(tmp_path: Path) -> None:
    case = CASES["planned"]
    with case.create(tmp_path / "a.zarr", sync="always") as writer:
        case.append(writer, 0, 2)
        with pytest.raises(UnfinishedError, match=rf"6 of 21 snapshots; process {os.getpid()} is writing it\)\.$"):
            Trajectory.open(tmp_path / "a.zarr")
        with pytest.raises(UnfinishedError, match="run 8 has 2 of 7 snapshots"):
            writer.finish()
    with pytest.raises(UnfinishedError, match=r"a\.zarr: recording is not finished \(6 of 21 snapshots\)\.$") as caught:
        Trajectory.open(tmp_path / "a.zarr")
    assert caught.value.hint == "Run the same command again with --resume, or pass --partial."
    partial = Trajectory.open(tmp_path / "a.zarr", partial=True)
    assert not partial.finished
    assert partial.steps == [0, 10]
    assert partial.describe()["planned"] == 21
    np.testing.assert_array_equal(partial.read(case.labels, [10, 0]), case.weights[:, [1, 0]])
    assert list(partial.verify()) == []


def test_uncommitted_cells_cannot_be_read(tmp_path: Path) -> None:
    case = CASES["tiny one by one"]
    with case.create(tmp_path / "a.zarr") as writer:
        for t in range(3):
            writer.append(case.steps[t], case.weights[0, t], case.counts[0, t], run=8)
        writer.append(0, case.weights[1, 0], case.counts[1, 0], run=9)
    partial = Trajectory.open(tmp_path / "a.zarr", partial=True)
    assert partial.snapshots == [3, 1, 0]
    np.testing.assert_array_equal(partial.read([9], [0])[0, 0], case.weights[1, 0])
    with pytest.raises(DamagedError, match=r"a\.zarr: run 9, step 10 is not recorded yet \(1 of 3 snapshots\)"):
        partial.read([8, 9], [0, 10])
    with pytest.raises(DamagedError, match="run 11, step 0 is not recorded yet"):
        partial.integers(11, 0)
    assert list(partial.verify()) == []


@pytest.mark.parametrize("name", RESUMABLE)
def test_resumed_store_equals_one_written_at_once(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.write(tmp_path / "whole.zarr", header=PROVENANCE)
    with case.create(tmp_path / "parts.zarr", header=PROVENANCE):
        pass
    for first, last in ((0, 2), (2, 2), (2, 4), (4, 7)):
        with TrajectoryWriter.resume(tmp_path / "parts.zarr", sync="none") as writer:
            assert writer.snapshots == [first] * 3
            assert writer.steps == list(case.steps[:first])
            case.append(writer, first, last)
    TrajectoryWriter.resume(tmp_path / "parts.zarr").finish()
    assert files(tmp_path / "parts.zarr") == files(tmp_path / "whole.zarr")


@pytest.mark.parametrize("name", RESUMABLE)
def test_finished_store_can_be_extended(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "a.zarr"
    with case.create(path, planned_steps=case.steps[:3]) as writer:
        case.append(writer, 0, 3)
        writer.finish()
    assert Trajectory.open(path).steps == list(case.steps[:3])
    before = files(path)
    TrajectoryWriter.resume(path).finish()
    TrajectoryWriter.resume(path, planned_steps=case.steps).close()
    assert files(path) == before
    with TrajectoryWriter.resume(path, planned_steps=case.steps) as writer:
        case.append(writer, 3, 4)
        with pytest.raises(UnfinishedError, match="of 21 snapshots"):
            Trajectory.open(path)
        case.append(writer, 4)
        writer.finish()
    trajectory = Trajectory.open(path)
    np.testing.assert_array_equal(trajectory.read(case.labels, case.steps), case.weights)
    assert list(trajectory.verify()) == []
    with pytest.raises(UsageError, match="not the first ones of the new plan"):
        TrajectoryWriter.resume(path, planned_steps=[0, 5])
    TrajectoryWriter.resume(path).close()  # the refused attempt has released the store


def test_store_someone_rewrote_cannot_grow(tmp_path: Path) -> None:
    path = CASES["tiny lockstep"].write(tmp_path / "a.zarr")
    document = path / "weights" / "zarr.json"
    document.write_text(document.read_text().replace('"separator": "."', '"separator": "/"'))
    with pytest.raises(StoreError, match="was rewritten since it was recorded"):
        TrajectoryWriter.resume(path)
    path = CASES["tiny one by one"].write(tmp_path / "c.zarr")
    (path / "weights" / "c.notes.txt").write_text("not ours, left alone")
    document = path / "integers" / "zarr.json"
    whole = document.read_text()
    document.write_text(whole.replace('"little"', '"big"'))
    with pytest.raises(StoreError, match="was rewritten since it was recorded"):
        TrajectoryWriter.resume(path)
    document.write_text(whole)
    TrajectoryWriter.resume(path).close()
    with pytest.raises(StoreError, match="nothing to resume"):
        TrajectoryWriter.resume(tmp_path / "b.zarr")


def test_refused_appends_change_nothing(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    vector, counts = case.weights[0, 0], case.counts[0, 0]
    with case.create(tmp_path / "a.zarr", planned_steps=(0, 10, 20)) as writer:
        writer.append(0, vector, counts, run=8)
        refused = {
            "there is no run 7": lambda: writer.append(10, vector, counts, run=7),
            r"vector of shape \(999,\), expected \(1000,\)": lambda: writer.append(10, vector[1:], counts, run=8),
            r"vector of shape \(1000,\), expected \(3, 1000\)": lambda: writer.append(0, vector, counts),
            r"integers of shape \(1,\), expected \(2,\)": lambda: writer.append(10, vector, counts[1:], run=8),
            "integer buffers are missing": lambda: writer.append(10, vector, run=8),
            "step 11 does not follow the plan, expected step 10": lambda: writer.append(11, vector, counts, run=8),
            "step 10 does not follow the plan, expected step 0": lambda: writer.append(10, vector, counts, run=9),
        }
        for message, attempt in refused.items():
            with pytest.raises(UsageError, match=message):
                attempt()
        assert writer.snapshots == [1, 0, 0]
        writer.append(10, vector, counts, run=8)
        writer.append(20, vector, counts, run=8)
        with pytest.raises(UsageError, match="expected no more"):
            writer.append(30, vector, counts, run=8)
    with pytest.raises(UsageError, match="is closed"):
        writer.append(0, vector, counts, run=9)
    with case.create(tmp_path / "b.zarr") as writer:
        writer.append(0, vector, run=8)
        with pytest.raises(UsageError, match="step 0 does not come after step 0"):
            writer.append(0, vector, run=8)
        with pytest.raises(UsageError, match="step 5 differs from the other runs' snapshot 0, which is of step 0"):
            writer.append(5, vector, run=9)
        with pytest.raises(UsageError, match="the first snapshots came without integer buffers"):
            writer.append(5, vector, counts, run=8)


@pytest.mark.parametrize("name", ["tiny lockstep", "file per snapshot", "big", "chunks of 2 runs, 3 steps"])
@pytest.mark.parametrize("width", [1, 64, 77, 10**9])
def test_columns_equal_appends(name: str, width: int, tmp_path: Path) -> None:
    case = CASES[name]
    if width * 2000 < case.size:
        width *= 1000
    case.write(tmp_path / "rows.zarr", header=PROVENANCE)
    with case.create(tmp_path / "columns.zarr", header=PROVENANCE) as writer:
        for steps in (slice(0, 2), slice(2, 7)):
            with writer.columns(case.labels, case.steps[steps]) as sink:
                for start in range(0, case.size, width):
                    sink.write(start, np.asfortranarray(case.weights[:, steps, start : start + width]))
                if case.integers:
                    sink.integers(case.counts[:, steps])
        writer.finish()
    assert files(tmp_path / "columns.zarr") == files(tmp_path / "rows.zarr")


def test_columns_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farcli.store.writer._BUFFER_BYTES", 100)
    case = CASES["chunks of 2 runs, 3 steps"]
    with case.create(tmp_path / "a.zarr") as writer:
        with writer.columns(case.labels, case.steps) as sink:
            for start in range(0, 15, 4):
                sink.write(start, case.weights[..., start : start + 4])
        writer.finish()
    np.testing.assert_array_equal(Trajectory.open(tmp_path / "a.zarr").read(case.labels, case.steps), case.weights)
    case.write(tmp_path / "b.zarr")
    np.testing.assert_array_equal(Trajectory.open(tmp_path / "b.zarr").read(case.labels, case.steps), case.weights)


@pytest.mark.parametrize("name", ["tiny lockstep", "file per snapshot"])
def test_failed_columns_leave_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "a.zarr"
    with case.create(path) as writer:
        with pytest.raises(UsageError, match=r"10 of .* coordinates were written"), writer.columns([8], [0]) as sink:
            sink.write(0, case.weights[:1, :1, :10])
        with pytest.raises(UsageError, match="at coordinate 3, expected"), writer.columns([8], [0]) as sink:
            sink.write(3, case.weights[:1, :1, :10])
        with pytest.raises(KeyError), writer.columns([8, 9], [0, 10]) as sink:  # noqa: PT012
            sink.write(0, case.weights[:2, :2])
            raise KeyError
        with pytest.raises(UsageError, match="repeat"), writer.columns([8, 8], [0]):
            pass
        assert writer.snapshots == [0, 0, 0]
        assert sorted(p.name for p in (path / "weights").iterdir()) == [".lock", "zarr.json"]
        with writer.columns([9], [0]) as sink:
            sink.write(0, case.weights[1:2, :1])
    np.testing.assert_array_equal(Trajectory.open(path, partial=True).read([9], [0]), case.weights[1:2, :1])


def test_sync_policies(tmp_path: Path) -> None:
    case = CASES["tiny one by one"]
    for sync in ("commit", "always"):
        path = tmp_path / f"{sync}.zarr"
        with case.create(path, sync=sync) as writer:
            for t in range(7):
                writer.append(case.steps[t], case.weights[0, t], run=8)
                if sync == "always":
                    assert Trajectory.open(path, partial=True).snapshots == [t + 1, 0, 0]
    with pytest.raises(UsageError, match="sync 'often': expected none, commit, always"):
        case.create(tmp_path / "a.zarr", sync="often")
    with pytest.raises(UsageError, match="dtype 'int8'"):
        Case(15, dtype="int8").create(tmp_path / "a.zarr")


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    case = CASES["tiny lockstep"]
    path = case.write(tmp_path / "a.zarr")
    before = files(tmp_path)
    for staged in (False, True):
        with pytest.raises(UsageError, match=r"a\.zarr: already exists\."):
            case.create(path, staged=staged)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        with pytest.raises(UsageError, match="exists and is not a trajectory store; it is not replaced"):
            case.create(tmp_path / name, replace=True)
    with pytest.raises(UsageError, match="cannot be written"):
        case.create(tmp_path / "file" / "b.zarr")
    assert before.items() <= files(tmp_path).items()
    (tmp_path / "empty.zarr").mkdir()
    case.write(tmp_path / "empty.zarr")


def test_staged_store_appears_when_finished(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    path = tmp_path / "a.zarr"
    with case.create(path, staged=True) as writer:
        case.append(writer)
        assert not path.exists()
        writer.finish()
        assert os.listdir(tmp_path) == ["a.zarr"]
    assert list(Trajectory.open(path).verify()) == []


def test_failed_staged_store_leaves_nothing(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    with pytest.raises(KeyError), case.create(tmp_path / "a.zarr", staged=True) as writer:  # noqa: PT012
        case.append(writer, 0, 3)
        raise KeyError
    with case.create(tmp_path / "a.zarr", staged=True) as writer:
        case.append(writer, 0, 3)
    assert os.listdir(tmp_path) == []


def test_replaced_store_stays_until_the_new_one_is_finished(tmp_path: Path) -> None:
    case = CASES["tiny lockstep"]
    path = case.write(tmp_path / "a.zarr", header={"provenance": {"id": "old"}})
    with case.create(path, replace=True) as writer:
        case.append(writer, 0, 3)
    assert Trajectory.open(path).id == "old"
    with case.create(path, replace=True, header={"provenance": {"id": "new"}}) as writer:
        case.append(writer)
        assert Trajectory.open(path).id == "old"
        writer.finish()
    assert Trajectory.open(path).id == "new"
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_replacing_without_renameat2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farcli.store.disk._exchange", lambda a, b: False)
    case = CASES["tiny lockstep"]
    path = case.write(tmp_path / "a.zarr", header={"provenance": {"id": "old"}})
    case.write(path, replace=True, header={"provenance": {"id": "new"}})
    assert Trajectory.open(path).id == "new"
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    case = CASES["tiny lockstep"]
    path = tmp_path / "a.zarr"
    with case.create(path, staged=True) as writer:
        case.append(writer)
        case.write(path, header={"provenance": {"id": "first"}})
        with pytest.raises(UsageError, match="already exists"):
            writer.finish()
    assert Trajectory.open(path).id == "first"
    assert os.listdir(tmp_path) == ["a.zarr"]


def test_abandoned_staging_is_cleaned_up(tmp_path: Path) -> None:
    code = "import os; print(os.getpid())"
    gone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / f".a.zarr.{gone}.partial").mkdir()
    (tmp_path / f".a.zarr.{os.getppid()}.partial").mkdir()
    CASES["tiny lockstep"].write(tmp_path / "a.zarr")
    assert sorted(os.listdir(tmp_path)) == [f".a.zarr.{os.getppid()}.partial", "a.zarr"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    case = CASES["tiny lockstep"]
    path = tmp_path / "a.zarr"
    code = (
        "import sys; from farcli.store import TrajectoryWriter; from farcli.layout import layout_of\n"
        "w = TrajectoryWriter.create(sys.argv[1], layout_of([('w', (2,), 'float32', 'parameter')]), [0])\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        message = rf"a\.zarr: is being written by process {other.pid}\."
        for attempt in (
            lambda: TrajectoryWriter.resume(path),
            lambda: case.create(path),
            lambda: case.create(path, replace=True),
        ):
            with pytest.raises(UsageError, match=message):
                attempt()
        other.kill()
        other.wait()
    TrajectoryWriter.resume(path).close()  # the system released the dead writer's lock
    message = f"is being written by process {os.getpid()}"
    with TrajectoryWriter.resume(path), pytest.raises(UsageError, match=message):
        TrajectoryWriter.resume(path)


@pytest.mark.parametrize(
    ("size", "parts", "chunk"),
    [
        (300_000, 1, None),
        (300_000, 4, None),
        (300_000, 3, (1, 1, 4096)),
        (70_000, 5, (1, 1, 65536)),
        (300_001, 64, None),
    ],
)
def test_a_snapshot_in_several_files_written_by_one_process_or_several(tmp_path, size, parts, chunk):
    vectors = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    path = tmp_path / "s.zarr"
    layout = layout_of([("a", (size,), "float32", "parameter")])
    with TrajectoryWriter.create(path, layout, [0], parts=parts, chunk=chunk) as writer:
        assert len(writer.parts) <= parts
        assert [part.start for part in writer.parts[1:]] == [part.stop for part in writer.parts[:-1]]
        assert writer.parts[-1].stop == size
        writer.append(0, vectors[0], run=0)
    with TrajectoryWriter.resume(path) as writer:
        others = [tmp_path / f"part{number}" for number in range(1, len(writer.parts))]
        for number, other in enumerate(others, 1):
            write_part(path, number, vectors[1, writer.parts[number]], other, sync=False)
        writer.append(1, vectors[1, writer.parts[0]] if others else vectors[1], run=0, parts=others)
        assert not any(other.exists() for other in others)
        with writer.columns([0], [2]) as sink:
            for start in range(0, size, 50_000):
                sink.write(start, vectors[2, start : start + 50_000][None, None])
        writer.finish()
    trajectory = Trajectory.open(path)
    assert np.array_equal(trajectory.read([0], [0, 1, 2])[0], vectors)
    assert np.array_equal(trajectory.read([0], [1], 12_345, 56_789)[0, 0], vectors[1, 12_345:56_789])
    assert np.array_equal(zarr.open_array(path / "weights")[0], vectors)
    assert not list(trajectory.verify())


def test_a_part_of_another_shape_is_refused(tmp_path):
    layout = layout_of([("a", (300_000,), "float32", "parameter")])
    with TrajectoryWriter.create(tmp_path / "s.zarr", layout, [0], parts=3):
        with pytest.raises(StoreError, match="part 1 of shape"):
            write_part(tmp_path / "s.zarr", 1, np.zeros(5, np.float32), tmp_path / "p", sync=False)
        with pytest.raises(StoreError, match="part 9"):
            write_part(tmp_path / "s.zarr", 9, np.zeros(5, np.float32), tmp_path / "p", sync=False)


def test_files_written_past_the_page_cache_are_the_same(tmp_path: Path) -> None:
    size = (20 << 18) + 1001  # 20 MiB of float32 and a little
    values = weights(1, 3, size)[0]
    for folder, direct in (("cached", False), ("direct", True)):
        with TrajectoryWriter.create(tmp_path / folder, layout(size), [0], sync="commit") as writer:
            for step, vector in enumerate(values):
                writer.past_cache(on=direct and step != 1)
                writer.append(step, vector, run=0)
            writer.finish()
    for step in range(3):
        name = f"weights/c.0.{step}.0"
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes()
    assert not list(Trajectory.open(tmp_path / "direct").verify())


@pytest.mark.parametrize("size", [0, 1, 4096, (4 << 20) - 1, (4 << 20) + 4096 + 3])
@pytest.mark.parametrize("start", [0, 100], ids=["aligned", "where the file system refuses"])
def test_whatever_the_size_and_the_file_system(tmp_path: Path, size: int, start: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    direct = Direct()
    for _ in range(2):
        fd = direct.open(tmp_path / "file")
        os.lseek(fd, start, os.SEEK_SET)
        direct.write(fd, [data[:1000].data, data[1000:1001].data, data[1001:].data])
        os.close(fd)
        assert (tmp_path / "file").read_bytes() == bytes(start) * bool(size) + data.tobytes()
