"""Damaged, foreign and lying stores: one clear error, never wrong numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from farcli.errors import DamagedError, StoreError
from farcli.store import Trajectory, TrajectoryWriter, is_store
from tests.store.cases import CASES, Case

Edit = Callable[[Path], object]
DAMAGE: dict[str, tuple[Edit, str]] = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-9]), r"has \d+ bytes|fails its checksum"),
    "too long": (lambda file: file.write_bytes(file.read_bytes() + b"x"), r"has \d+ bytes|fails its checksum"),
    "flipped": (lambda file: _flip(file, 37), "fails its checksum"),
    "flipped at the end": (lambda file: _flip(file, -1), "fails its checksum"),
    "zeroed": (lambda file: file.write_bytes(bytes(file.stat().st_size)), "fails its checksum"),
}


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("name", "file", "run", "step"),
    [
        ("file per snapshot", "weights/c.1.3.0", 9, 35),
        ("big", "weights/c.2.6.0", 11, 1000),
        ("chunks of 2 runs, 3 steps", "weights/c.1.1.0", 11, 35),
        ("tiny one by one", "weights/c.2.0.0", 11, 0),
    ],
)
def test_damaged_file_is_named(name: str, file: str, run: int, step: int, damage: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.write(tmp_path / "a.zarr")
    edit, what = DAMAGE[damage]
    edit(path / file)
    trajectory = Trajectory.open(path)
    with pytest.raises(DamagedError, match=rf"a\.zarr: run {run}, step {step} is damaged: file {file} .*({what})"):
        trajectory.read([run], [step])
    with pytest.raises(DamagedError):
        trajectory.read(case.labels, case.steps)
    np.testing.assert_array_equal(trajectory.read([8], [0])[0, 0], case.weights[0, 0])
    problems = list(trajectory.verify())
    assert [(p.run, p.step) for p in problems] == [(run, step)]
    assert file in problems[0].what


def test_damage_elsewhere_does_not_matter(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    path = case.write(tmp_path / "a.zarr")
    _flip(path / "weights" / "c.0.0.0", 64 * 4 + 4 + 10)  # in the second part
    trajectory = Trajectory.open(path)
    np.testing.assert_array_equal(trajectory.read([8], [0], 0, 64)[0, 0], case.weights[0, 0, :64])
    np.testing.assert_array_equal(trajectory.read([8], [0], 128, 1000)[0, 0], case.weights[0, 0, 128:])
    for start, stop in ((64, 128), (70, 71), (63, 65), (0, 1000)):
        with pytest.raises(DamagedError, match=r"fails its checksum \(at byte 260\)"):
            trajectory.read([8], [0], start, stop)


def test_index_that_points_elsewhere(tmp_path: Path) -> None:
    """A valid checksum over an index that lies."""
    import crc32c

    case = CASES["file per snapshot"]
    path = case.write(tmp_path / "a.zarr")
    file = path / "weights" / "c.0.1.0"
    whole = file.read_bytes()
    for offset, length, what in ((2**63, 260, "declares"), (0, 10**15, "declares"), (2**64 - 1, 2**64 - 1, "lacks")):
        index = np.frombuffer(whole[-260:-4], "<u8").reshape(16, 2).copy()
        index[3] = offset, length
        raw = index.tobytes()
        file.write_bytes(whole[:-260] + raw + crc32c.crc32c(raw).to_bytes(4, "little"))
        with pytest.raises(DamagedError, match=f"run 8, step 10 is damaged: file weights/c.0.1.0 {what}"):
            Trajectory.open(path).read([8], [10])


def test_damage_in_layouts_of_others(tmp_path: Path) -> None:
    case = CASES["tiny one by one"]
    path = case.write(tmp_path / "a.zarr")
    group: Any = zarr.open_group(path, mode="r")
    data = group["weights"][:]
    array: Any = zarr.create(
        store=str(path / "weights"), overwrite=True, shape=data.shape, chunks=(1, 7, 15), dtype="float32",
        fill_value=np.nan, zarr_format=3, dimension_names=("run", "step", "parameter"),
        codecs=[zarr.codecs.BytesCodec(), zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()],
    )  # fmt: skip
    array[:] = data
    file = path / "weights" / "c" / "1" / "0" / "0"
    whole = file.read_bytes()
    for edit, what in (
        (lambda: _flip(file, 20), "cannot be decoded"),
        (lambda: file.write_bytes(whole[:50]), "cannot be decoded"),
        (lambda: file.write_bytes(b""), "file weights/c/1/0/0 is empty"),
        (file.unlink, "file weights/c/1/0/0 is missing"),
    ):
        edit()
        trajectory = Trajectory.open(path)
        with pytest.raises(DamagedError, match=f"run 9, step 10 is damaged: .*{what}"):
            trajectory.read([9], [10])
        assert [(p.run, p.step) for p in trajectory.verify() if p.run] == [(9, 0)]
        file.write_bytes(whole)
    assert [p.what for p in Trajectory.open(path).verify()] == [
        f"{path}: weights/zarr.json and the copy in zarr.json differ."
    ]


def test_integers_are_checked(tmp_path: Path) -> None:
    case = CASES["tiny one by one"]
    path = case.write(tmp_path / "a.zarr")
    _flip(path / "integers" / "c.1.0.0", 8)
    trajectory = Trajectory.open(path)
    with pytest.raises(DamagedError, match=r"run 9, step 20 is damaged: file integers/c\.1\.0\.0 fails its checksum"):
        trajectory.integers(9, 20)
    assert [(p.run, p.step) for p in trajectory.verify()] == [(9, 0)]


def test_integers_that_were_not_stored(tmp_path: Path) -> None:
    case = Case(15, lockstep=True, integers=2)
    with case.create(tmp_path / "a.zarr") as writer:
        writer.append(0, case.weights[:, 0])
        writer.finish()
    with pytest.raises(StoreError, match="holds no integer buffers"):
        Trajectory.open(tmp_path / "a.zarr").integers(8, 0)


def test_verify_names_what_is_not_finite(tmp_path: Path) -> None:
    for name in ("file per snapshot", "tiny lockstep"):
        case = CASES[name]
        bad = case.weights.copy()
        bad[1, 4, 11], bad[2, 0, 2] = np.nan, -np.inf
        bad[0, 5, :2] = np.finfo("float32").max  # finite, though their sum is not
        path = tmp_path / f"{name}.zarr"
        with case.create(path) as writer:
            with writer.columns(case.labels, case.steps) as sink:
                sink.write(0, bad)
            writer.finish()
        problems = {(p.run, p.step): p.what for p in Trajectory.open(path).verify()}
        assert set(problems) == {(9, 40), (11, 0)}
        tensor = case.layout.floats[case.layout.segments(11, 12)[0].slot].name
        assert problems[9, 40].endswith(f"run 9, step 40 holds NaN or Inf (tensor {tensor!r}, coordinate 11).")


def test_verify_compares_coordinates_and_copies(tmp_path: Path) -> None:
    path = CASES["tiny lockstep"].write(tmp_path / "a.zarr")
    coordinate: Any = zarr.open_array(path / "step", mode="r+")
    coordinate[0] = 5
    (path / "run" / "c.0").unlink()
    document = json.loads((path / "zarr.json").read_text())
    document["consolidated_metadata"]["metadata"]["weights"]["shape"][1] = 6
    (path / "zarr.json").write_text(json.dumps(document))
    found = sorted(p.what.removeprefix(f"{path}: ") for p in Trajectory.open(path).verify())
    assert found == [
        "its coordinate 'run' differs from the header.",
        "its coordinate 'step' differs from the header.",
        "weights/zarr.json and the copy in zarr.json differ.",
    ]


def test_verify_misses_arrays(tmp_path: Path) -> None:
    path = CASES["tiny lockstep"].write(tmp_path / "a.zarr")
    shutil.rmtree(path / "integers")
    assert [p.what for p in Trajectory.open(path).verify()] == [f"{path}: integers/zarr.json is missing."]


def test_no_store_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, message in (("none", "not found"), ("file", "is a file"), ("folder", "is not a trajectory store")):
        with pytest.raises(StoreError, match=f"{name}: {message}") as caught:
            Trajectory.open(tmp_path / name)
        assert caught.value.exit_code == 3
        assert not is_store(tmp_path / name)
        with pytest.raises(StoreError, match="nothing to resume"):
            TrajectoryWriter.resume(tmp_path / name)


def test_foreign_groups(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "v3.zarr", mode="w", zarr_format=3).create_array("weights", shape=(1, 1, 1), dtype="f4")
    zarr.open_group(tmp_path / "v2.zarr", mode="w", zarr_format=2)
    zarr.create_array(tmp_path / "array.zarr", shape=(1, 1, 1), dtype="f4")
    for name, message in (
        ("v3", "is a Zarr store but not one of farcli's"),
        ("array", "is a Zarr store but not one of farcli's"),
        ("v2", r"is not a trajectory store \(Zarr v2\)"),
    ):
        with pytest.raises(StoreError, match=message):
            Trajectory.open(tmp_path / f"{name}.zarr")


def _put(document: dict[str, Any], value: Any, *keys: str) -> None:
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


HUGE = 10**15
HEADER = ("attributes", "farcli")
LIES: dict[str, tuple[list[tuple[str, Any, tuple[str, ...]]], str]] = {
    "newer schema": ([("zarr.json", 2, (*HEADER, "schema"))], "has schema 2, but this farcli reads schema 1"),
    "unknown kind": (
        [("zarr.json", "dream", (*HEADER, "kind"))],
        "kind 'dream', expected schema 1 and a kind of run, ",
    ),
    "no kind": ([("zarr.json", None, (*HEADER, "kind"))], "kind None"),
    "odd schema": ([("zarr.json", "one", (*HEADER, "schema"))], "has schema 'one'"),
    "no header": ([("zarr.json", {}, ("attributes",))], "not one of farcli's"),
    "header is a list": ([("zarr.json", [], HEADER)], "not one of farcli's"),
    "attributes are a list": ([("zarr.json", [], ("attributes",))], "is not the metadata"),
    "no layout": ([("zarr.json", None, (*HEADER, "layout"))], "layout: not readable"),
    "overlap": (
        [
            (
                "zarr.json",
                {
                    "slots": [
                        {"name": n, "shape": [9], "dtype": "float32", "offset": o, "role": "parameter"}
                        for n, o in (("a", 0), ("b", 6))
                    ]
                },
                (*HEADER, "layout"),
            )
        ],
        "layout: tensor 'b' starts at 6, expected 9",
    ),
    "steps go back": ([("zarr.json", [0, 10, 20, 20, 40, 50, 60], (*HEADER, "steps"))], r"steps do not increase \(20"),
    "steps are text": ([("zarr.json", "many", (*HEADER, "steps"))], "its steps are 'many'"),
    "a step too few": ([("zarr.json", [0, 10], (*HEADER, "steps"))], r"its weights have shape \(3, 7, 15\)"),
    "runs repeat": ([("zarr.json", [8, 8, 9], (*HEADER, "runs"))], "repeat a label"),
    "a run too many": ([("zarr.json", [8, 9, 10, 11], (*HEADER, "runs"))], "names 4 runs"),
    "absurd shape": ([("weights/zarr.json", [3, 7, HUGE], ("shape",))], "tensors of 15 coordinates in all"),
    "impossible shape": ([("weights/zarr.json", [HUGE, HUGE, HUGE], ("shape",))], "declares the impossible size"),
    "absurd and agreed": (
        [
            ("weights/zarr.json", [3, 7, HUGE], ("shape",)),
            ("weights/zarr.json", [1, 1, HUGE], ("chunk_grid", "configuration", "chunk_shape")),
            (
                "zarr.json",
                {"slots": [{"name": "w", "shape": [HUGE], "dtype": "float32", "offset": 0, "role": "parameter"}]},
                (*HEADER, "layout"),
            ),
        ],
        r"run 8, step 0 is damaged: file weights/c\.0\.0\.0 has \d+ bytes, expected 4000000000000004",
    ),
    "negative shape": ([("weights/zarr.json", [3, 7, -15], ("shape",))], "is not readable"),
    "zero chunks": (
        [("weights/zarr.json", [0, 7, 15], ("chunk_grid", "configuration", "chunk_shape"))],
        "not readable",
    ),
    "two axes": ([("weights/zarr.json", [7, 15], ("chunk_grid", "configuration", "chunk_shape"))], "expected 3 axes"),
    "dimensions swapped": ([("weights/zarr.json", ["step", "run", "parameter"], ("dimension_names",))], "dimensions"),
    "integers": ([("weights/zarr.json", "int32", ("data_type",))], "data type is 'int32', expected float32"),
    "unknown codec": ([("weights/zarr.json", [{"name": "bytes"}, {"name": "rot13"}], ("codecs",))], "by zarr either"),
    "no codecs": ([("weights/zarr.json", None, ("codecs",))], "is not readable"),
    "integers of another shape": ([("integers/zarr.json", [3, 7, 9], ("shape",))], "integers have shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lie(lie: str, tmp_path: Path) -> None:
    path = CASES["tiny one by one"].write(tmp_path / "a.zarr")
    edits, message = LIES[lie]
    for name, value, keys in edits:
        document = json.loads((path / name).read_text())
        _put(document, value, *keys)
        (path / name).write_text(json.dumps(document))
    with pytest.raises(StoreError, match=message) as caught:
        Trajectory.open(path).integers(8, 0)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


def test_unfinished_metadata_that_lie(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    path = tmp_path / "a.zarr"
    with case.create(path) as writer:
        case.append(writer, 0, 2)
    whole = (path / "weights" / "zarr.json").read_text()
    for value, key, message in (
        ([2, 2], "snapshots", "has snapshots"),
        ([3, 2, 2], "snapshots", "has snapshots"),
        ([2, 2, -1], "snapshots", "has snapshots"),
        ("all", "snapshots", "its snapshots are 'all'"),
        ([10, 0], "steps", "its steps do not increase"),
        (None, "farcli", "not one of farcli's"),
    ):
        document = json.loads(whole)
        document["attributes"][key] = value
        (path / "weights" / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(StoreError, match=message):
            Trajectory.open(path, partial=True)
        with pytest.raises(StoreError, match=message):
            TrajectoryWriter.resume(path)
    (path / "weights" / "zarr.json").write_text(whole[:-20])
    with pytest.raises(DamagedError, match=r"weights/zarr\.json is not JSON"):
        Trajectory.open(path)


def test_documents_gone(tmp_path: Path) -> None:
    path = CASES["tiny lockstep"].write(tmp_path / "a.zarr")
    (path / "weights" / "zarr.json").unlink()
    with pytest.raises(DamagedError, match=r"a\.zarr: weights/zarr\.json is missing"):
        Trajectory.open(path)
    (path / "zarr.json").write_bytes(b"\xff\x00")
    with pytest.raises(DamagedError):
        Trajectory.open(path)
