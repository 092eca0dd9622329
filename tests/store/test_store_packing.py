"""Packing: what comes out is what went in (or as near as was said), for us and for zarr, xarray and tensorstore."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farcli.errors import DamagedError, NonFiniteError, ResourceError, StoreError, UsageError
from farcli.store import Trajectory, TrajectoryWriter, pack
from farcli.store.codecs import CODECS, round_mantissa
from tests.store.cases import CASES, Case, files, layout

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the Zarr version 3 specification")
GOLDEN = Path(__file__).parents[1] / "golden" / "packed1"
LOSSLESS = ["none", "zstd", "pcodec"]
GOLDEN_CODECS = ["none", "zstd", "pcodec", "bitround:8"]


def has(codec: str) -> None:
    if codec == "pcodec":
        pytest.importorskip("pcodec")


def moving(runs: int, steps: int, size: int) -> np.ndarray:
    """Weights that move a little from step to step, as those of a network do."""
    draw = np.random.default_rng(runs * 100 + steps * 10 + size)
    start = draw.standard_normal((runs, 1, size))
    return (start + 1e-3 * draw.standard_normal((runs, steps, size)).cumsum(axis=1)).astype("float32")


def write(path: Path, values: np.ndarray, **options: Any) -> Trajectory:
    with TrajectoryWriter.create(path, layout(values.shape[2]), range(values.shape[0]), sync="none", **options) as w:
        for t in range(values.shape[1]):
            w.append(10 * t, values[:, t])
        w.finish()
    return Trajectory.open(path)


@pytest.mark.parametrize("codec", LOSSLESS)
@pytest.mark.parametrize("name", CASES)
def test_lossless_in_every_layout(codec: str, name: str, tmp_path: Path) -> None:
    has(codec)
    case = CASES[name]
    source = Trajectory.open(case.write(tmp_path / "a.zarr"))
    made = pack(source, tmp_path / "b.zarr", codec=codec)
    packed = Trajectory.open(tmp_path / "b.zarr")
    assert packed.describe()["reader"] == "farcli"
    assert made.loss is None
    assert packed.read(case.labels, case.steps).tobytes() == case.weights.tobytes()
    if case.integers:
        for r, run in enumerate(case.labels):
            for t, step in enumerate(case.steps):
                np.testing.assert_array_equal(packed.integers(run, step), case.counts[r, t])
    assert list(packed.verify()) == []
    assert packed.id == source.id
    assert packed.layout == source.layout
    judge: Any = zarr.open_group(tmp_path / "b.zarr", mode="r")["weights"]
    np.testing.assert_array_equal(judge[:], case.weights)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 30)),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 30)),
    st.sampled_from(["none", "zstd"]),
    st.data(),
)
def test_any_chunk_and_selection(
    tmp_path_factory: pytest.TempPathFactory, shape: Any, chunk: Any, codec: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    values = moving(*shape)
    source = write(folder / "a.zarr", values)
    runs = data.draw(st.lists(st.sampled_from(source.runs), min_size=1, unique=True))
    steps = sorted(data.draw(st.lists(st.sampled_from(source.steps), min_size=1, unique=True)))
    pack(source, folder / "b.zarr", codec=codec, runs=runs, steps=steps, chunk=chunk)
    expected = values[runs][:, [step // 10 for step in steps]]
    packed = Trajectory.open(folder / "b.zarr")
    np.testing.assert_array_equal(packed.read(runs, steps), expected)
    some_runs = data.draw(st.lists(st.sampled_from(runs), max_size=3))
    some_steps = data.draw(st.lists(st.sampled_from(steps), max_size=3))
    start = data.draw(st.integers(0, shape[2]))
    stop = data.draw(st.integers(start, shape[2]))
    np.testing.assert_array_equal(
        packed.read(some_runs, some_steps, start, stop),
        source.read(some_runs, some_steps, start, stop),
    )
    judge: Any = zarr.open_array(folder / "b.zarr/weights", mode="r")
    np.testing.assert_array_equal(judge[:], expected)
    assert list(packed.verify()) == []


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_as_many_snapshots_as_a_chunk_holds_but_of_several(codec: str, tmp_path: Path) -> None:
    """A chunk is read straight into the result only where all of it is asked for: the rest is other chunks' place."""
    values = moving(4, 6, 300)
    pack(write(tmp_path / "a.zarr", values), tmp_path / "b.zarr", codec=codec, chunk=(2, 2, 300))
    packed = Trajectory.open(tmp_path / "b.zarr")
    for runs in itertools.permutations(range(4), 2):
        for steps in itertools.permutations(range(6), 2):
            found = packed.read(runs, [10 * step for step in steps])
            np.testing.assert_array_equal(found, values[np.ix_(runs, steps)])


def test_other_readers(tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    tensorstore = pytest.importorskip("tensorstore")
    values = moving(2, 6, 40_000)
    pack(write(tmp_path / "a.zarr", values), tmp_path / "b.zarr")
    opened = xarray.open_zarr(tmp_path / "b.zarr")
    np.testing.assert_array_equal(opened.weights.sel(run=1, step=20).values, values[1, 2])
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "b.zarr/weights")}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)


def test_smaller_and_in_shards(tmp_path: Path) -> None:
    values = moving(1, 30, 60_000)
    made = pack(write(tmp_path / "a.zarr", values), tmp_path / "b.zarr")
    assert made.raw_bytes / made.bytes > 1.15
    described = Trajectory.open(tmp_path / "b.zarr").describe()
    assert described["sharded"]
    assert described["chunk"] == [1, 30, 8192]
    # A shard of more than one file: each holds whole chunks.
    assert len(list((tmp_path / "b.zarr/weights").glob("c.*"))) == 1


def test_nan_and_infinities_are_kept_bit_for_bit(tmp_path: Path) -> None:
    values = moving(1, 4, 500)
    values[0, 1, :3] = np.array([0x7FC00001, 0xFF800000, 0x80000000], "u4").view("f4")
    source = write(tmp_path / "a.zarr", values)
    for codec in ("zstd", "bitround:10"):
        pack(source, tmp_path / f"{codec}.zarr", codec=codec)
        read = Trajectory.open(tmp_path / f"{codec}.zarr").read([0], [10], 0, 3)
        assert read.tobytes() == values[0, 1, :3].tobytes()


@pytest.mark.parametrize("bits", [1, 7, 16, 22])
def test_bitround_states_its_bound(bits: int, tmp_path: Path) -> None:
    values = moving(2, 5, 3000)
    source = write(tmp_path / "a.zarr", values)
    made = pack(source, tmp_path / "b.zarr", codec=f"bitround:{bits}")
    read = Trajectory.open(tmp_path / "b.zarr").read([0, 1], source.steps)
    relative = np.abs(read.astype("f8") - values) / np.abs(values)
    assert relative.max() <= 2.0 ** -(bits + 1)
    assert made.loss is not None
    error = read.astype("f8") - values
    update = np.diff(values.astype("f8"), axis=1)
    assert made.loss["relative_bound"] == 2.0 ** -(bits + 1)
    assert made.loss["max_error"] == np.abs(error).max()
    expected = np.sqrt(np.square(error).mean() / np.square(update).mean())
    assert made.loss["rms_error_in_updates"] == pytest.approx(expected)
    note = Trajectory.open(tmp_path / "b.zarr").header["pack"]
    assert note["codec"] == f"bitround:{bits}"
    assert note["lossless"] is False
    assert note["rms_error_in_updates"] == made.loss["rms_error_in_updates"]


def test_rounding_never_makes_infinities() -> None:
    values = np.array([np.finfo("f4").max, -np.finfo("f4").max, np.inf, np.nan, 1.0, 1 + 2**-9], "f4")
    round_mantissa(values, 8)
    assert np.isfinite(values[:2]).all()
    assert np.isinf(values[2])
    assert np.isnan(values[3])
    assert values[4:].tolist() == [1.0, 1.0]  # a tie goes to the even number


def test_casting(tmp_path: Path) -> None:
    values = moving(1, 3, 200)
    source = write(tmp_path / "a.zarr", values)
    assert pack(source, tmp_path / "d.zarr", dtype="float64").loss is None
    np.testing.assert_array_equal(Trajectory.open(tmp_path / "d.zarr").read([0], source.steps), values)
    made = pack(source, tmp_path / "h.zarr", dtype="float16")
    assert made.loss is not None
    np.testing.assert_array_equal(
        Trajectory.open(tmp_path / "h.zarr").read([0], source.steps), values.astype("float16")
    )
    values[0, 1, 7] = 1e6
    with pytest.raises(NonFiniteError, match="too large for float16"):
        pack(write(tmp_path / "big.zarr", values), tmp_path / "x.zarr", dtype="float16")
    assert not (tmp_path / "x.zarr").exists()


def test_in_place_and_its_locks(tmp_path: Path) -> None:
    values = moving(1, 5, 2000)
    source = write(tmp_path / "a.zarr", values)
    with pytest.raises(UsageError, match="already exists"):
        pack(source, tmp_path / "a.zarr")
    writer = TrajectoryWriter.resume(tmp_path / "a.zarr")
    with pytest.raises(UsageError, match="is being written"):
        pack(source, tmp_path / "a.zarr", replace=True)
    writer.close()
    pack(source, tmp_path / "a.zarr", replace=True)
    packed = Trajectory.open(tmp_path / "a.zarr")
    np.testing.assert_array_equal(packed.read([0], packed.steps), values)
    assert packed.header["pack"]["codec"] == "zstd"
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    with pytest.raises(StoreError, match="cannot grow"):
        TrajectoryWriter.resume(tmp_path / "a.zarr")


def test_a_damaged_source_makes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.zarr", moving(1, 5, 2000))
    chunk = next((tmp_path / "a.zarr/weights").glob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[50] ^= 1
    chunk.write_bytes(data)
    before = files(tmp_path / "a.zarr")
    for path in (tmp_path / "b.zarr", tmp_path / "a.zarr"):
        with pytest.raises(DamagedError):
            pack(source, path, replace=True)
    assert files(tmp_path / "a.zarr") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    source = write(tmp_path / "a.zarr", moving(1, 5, 200_000))
    for options, error, message in (
        ({"codec": "ztsd"}, UsageError, "Did you mean 'zstd'"),
        ({"codec": "zstd:3"}, UsageError, "takes no argument"),
        ({"codec": "bitround"}, UsageError, "expected bitround:N"),
        ({"codec": "bitround:23"}, UsageError, "N from 1 to 22"),
        ({"dtype": "int8"}, UsageError, "dtype 'int8'"),
        ({"chunk": (1, 0, 4)}, UsageError, "at least 1"),
        ({"steps": [10, 0]}, UsageError, "do not increase"),
        ({"steps": []}, UsageError, "no runs or steps"),
        ({"memory": 1000}, ResourceError, "too small to pack"),
    ):
        with pytest.raises(error, match=message):
            pack(source, tmp_path / "b.zarr", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


DAMAGES = {
    "flipped": (lambda whole: whole[:60] + bytes([whole[60] ^ 4]) + whole[61:], "fails its checksum"),
    "truncated": (lambda whole: whole[: len(whole) // 2], "index that fails its checksum"),
    "empty": (lambda whole: b"", "is empty"),
    "short": (lambda whole: whole[:10], "has 10 bytes"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    pack(write(tmp_path / "a.zarr", moving(2, 6, 100_000)), tmp_path / "b.zarr")
    file = tmp_path / "b.zarr/weights/c.1.0.0"
    if damage == "missing":
        file.unlink()
        what = "is missing"
    else:
        change, what = DAMAGES[damage]
        file.write_bytes(change(file.read_bytes()))
    trajectory = Trajectory.open(tmp_path / "b.zarr")
    trajectory.read([0], trajectory.steps)
    with pytest.raises(DamagedError, match=rf"run 1, step 30 is damaged: file weights/c\.1\.0\.0 .*{what}"):
        trajectory.read([1], [30])
    assert [(p.run, p.kind) for p in trajectory.verify()] == [(1, "damage")]


def test_a_frame_that_lies_about_its_size(tmp_path: Path) -> None:
    """A valid checksum over a frame whose header says it is larger than the chunk."""
    import crc32c

    pack(write(tmp_path / "a.zarr", moving(1, 6, 1000)), tmp_path / "b.zarr")
    file = tmp_path / "b.zarr/weights/c.0.0.0"
    body = bytearray(file.read_bytes()[:-4])
    body[4:8] = (2**31).to_bytes(4, "little")
    file.write_bytes(bytes(body) + crc32c.crc32c(bytes(body)).to_bytes(4, "little"))
    with pytest.raises(DamagedError, match="cannot be decoded"):
        Trajectory.open(tmp_path / "b.zarr").read([0], [0])


@pytest.mark.parametrize("codec", GOLDEN_CODECS)
def test_reads_golden(codec: str) -> None:
    has(codec)
    expected = json.loads((GOLDEN / "values.json").read_text())[codec]
    trajectory = Trajectory.open(GOLDEN / f"{codec.replace(':', '-')}.zarr")
    read = trajectory.read(trajectory.runs, trajectory.steps)
    assert read.view("u4").tolist() == expected
    assert list(trajectory.verify()) == []
    judge: Any = zarr.open_array(trajectory.path / "weights", mode="r")
    assert np.asarray(judge[:]).view("u4").tolist() == expected


def test_every_codec_is_golden() -> None:
    assert {codec.split(":")[0] for codec in GOLDEN_CODECS} == set(CODECS)


def write_golden() -> None:
    """Written once by `python -m tests.store.test_store_packing`; again only for a new codec."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    values = moving(2, 4, 60)
    case = Case(60, labels=(0, 1), steps=(0, 10, 20, 30))
    header = {"provenance": {"id": "0123456789abcdef", "seed": 0}}
    with case.create(GOLDEN / "source.zarr", header=header) as writer:
        with writer.columns(case.labels, case.steps) as sink:
            sink.write(0, values)
        writer.finish()
    expected = {}
    for codec in GOLDEN_CODECS:
        path = GOLDEN / f"{codec.replace(':', '-')}.zarr"
        if not path.exists():
            pack(Trajectory.open(GOLDEN / "source.zarr"), path, codec=codec, chunk=(1, 4, 32))
        expected[codec] = Trajectory.open(path).read([0, 1], case.steps).view("u4").tolist()
    shutil.rmtree(GOLDEN / "source.zarr")
    (GOLDEN / "values.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    write_golden()
