"""What we write others read bit-exactly, and the other way round."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from farcli.errors import UsageError
from farcli.store import Trajectory, TrajectoryWriter, is_store
from tests.store.cases import CASES, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def store(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write(tmp_path_factory.mktemp("store") / "a.zarr")


def test_reads_back(case: Case, store: Path) -> None:
    trajectory = Trajectory.open(store)
    assert is_store(store)
    assert trajectory.finished
    assert (trajectory.kind, trajectory.layout) == ("run", case.layout)
    assert (trajectory.runs, trajectory.steps) == (list(case.labels), list(case.steps))
    assert (trajectory.size, trajectory.dtype, trajectory.id) == (
        case.size,
        case.dtype,
        trajectory.header["provenance"]["id"],
    )
    np.testing.assert_array_equal(trajectory.read(case.labels, case.steps), case.weights)
    picked = trajectory.read([11, 8, 8], [1000, 0, 20], 3, 11)
    np.testing.assert_array_equal(picked, case.weights[np.ix_([2, 0, 0], [6, 0, 2])][..., 3:11])
    if case.integers:
        np.testing.assert_array_equal(trajectory.integers(9, 35), case.counts[1, 3])
    else:
        assert not trajectory.has_integers
        assert trajectory.integers(9, 35).shape == (0,)
    assert list(trajectory.verify()) == []
    assert trajectory.describe()["reader"] == "farcli"
    assert trajectory.nbytes == trajectory.describe()["bytes"] > case.weights.nbytes


def test_zarr_reads_it(case: Case, store: Path) -> None:
    group: Any = zarr.open_group(store, mode="r")
    assert group.attrs["farcli"]["schema"] == 1
    array = group["weights"]
    assert array.metadata.dimension_names == ("run", "step", "parameter")
    assert np.isnan(array.fill_value)
    np.testing.assert_array_equal(array[:], case.weights)
    np.testing.assert_array_equal(array[1, 3, 2:9], case.weights[1, 3, 2:9])
    if case.integers:
        np.testing.assert_array_equal(group["integers"][:], case.counts)


def test_xarray_reads_it(case: Case, store: Path) -> None:
    with xarray.open_zarr(store) as dataset:
        assert dataset.weights.dims == ("run", "step", "parameter")
        assert dataset.weights.dtype == case.dtype
        np.testing.assert_array_equal(dataset.weights.sel(run=[11, 8], step=[50, 0]), case.weights[[2, 0]][:, [5, 0]])
        assert dataset.weights.attrs == {}
        if case.integers:
            np.testing.assert_array_equal(dataset.integers, case.counts)


def test_tensorstore_reads_it(case: Case, store: Path) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store}/weights/"}}
    array = tensorstore.open(spec, read=True).result()
    assert [*array.domain.labels] == ["run", "step", "parameter"]
    np.testing.assert_array_equal(array.read().result(), case.weights)


def test_unfinished_is_no_group_for_others(case: Case, tmp_path: Path) -> None:
    with case.create(tmp_path / "a.zarr") as writer:
        case.append(writer, 0, 3)
    with pytest.raises(FileNotFoundError):
        zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert is_store(tmp_path / "a.zarr")


PLAIN = [BytesCodec(), Crc32cCodec()]
ZSTD = [BytesCodec(), ZstdCodec()]
OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "same shards": {"chunks": (1, 1, 1024), "codecs": [ShardingCodec(chunk_shape=(1, 1, 64), codecs=PLAIN)]},
    "shards over time": {"chunks": (3, 4, 512), "codecs": [ShardingCodec(chunk_shape=(1, 2, 64), codecs=PLAIN)]},
    "one-row parts in shards over runs": {
        "chunks": (3, 7, 512),
        "codecs": [ShardingCodec(chunk_shape=(1, 1, 64), codecs=PLAIN)],
    },
    "plain with crc": {"chunks": (2, 3, 100), "codecs": PLAIN},
    "folders": {"chunks": (1, 7, 128), "codecs": PLAIN, "chunk_key_encoding": ("default", "/")},
    "no checksum": {"chunks": (1, 7, 128), "codecs": [BytesCodec()]},
    "big-endian": {"chunks": (1, 7, 128), "codecs": [BytesCodec(endian="big"), Crc32cCodec()]},
    "transposed": {"chunks": (1, 7, 128), "codecs": [TransposeCodec(order=(2, 1, 0)), BytesCodec(), ZstdCodec()]},
    "blosc": {"chunks": (1, 7, 128), "codecs": [BytesCodec(), BloscCodec(typesize=4), Crc32cCodec()]},
    "gzip": {"chunks": (3, 7, 1000), "codecs": [BytesCodec(), GzipCodec()]},
    "shards of zstd": {"chunks": (1, 1, 1024), "codecs": [ShardingCodec(chunk_shape=(1, 1, 64), codecs=ZSTD)]},
    "index in front": {
        "chunks": (1, 1, 1024),
        "codecs": [ShardingCodec(chunk_shape=(1, 1, 64), codecs=PLAIN, index_location="start")],
    },
    "v2 names": {"chunks": (1, 7, 128), "codecs": PLAIN, "chunk_key_encoding": ("v2", ".")},
}
NATIVE = {"same shards", "shards over time", "one-row parts in shards over runs", "plain with crc", "folders", "blosc"}


def rewrite(store: Path, target: Path, **layout: Any) -> Path:
    """Copy a store with zarr-python, its weights in another layout."""
    source: Any = zarr.open_group(store, mode="r")
    group = zarr.open_group(target, mode="w", zarr_format=3, attributes=dict(source.attrs))
    data = source["weights"][:]
    array: Any = zarr.create(
        store=str(target / "weights"),
        shape=data.shape,
        dtype=data.dtype,
        fill_value=np.nan,
        zarr_format=3,
        dimension_names=("run", "step", "parameter"),
        **layout,
    )
    array[:] = data
    assert group.attrs["farcli"]
    return target


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_reads_other_layouts(name: str, tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    store = case.write(tmp_path / "a.zarr")
    trajectory = Trajectory.open(rewrite(store, tmp_path / "b.zarr", **OTHER_LAYOUTS[name]))
    assert trajectory.describe()["reader"] == ("farcli" if name in NATIVE else "zarr")
    np.testing.assert_array_equal(trajectory.read(case.labels, case.steps), case.weights)
    for start, stop in ((0, 1), (63, 129), (64, 128), (500, 1000), (999, 1000), (7, 7)):
        picked = trajectory.read([11, 8], [1000, 0, 20, 35], start, stop)
        np.testing.assert_array_equal(picked, case.weights[np.ix_([2, 0], [6, 0, 2, 3])][..., start:stop])
    assert list(trajectory.verify()) == []


def test_data_files_are_those_of_zarr(tmp_path: Path) -> None:
    """The judge: zarr-python writes the same bytes in the same layout."""
    for name in ("file per snapshot", "chunks of 2 runs, 3 steps"):
        case = CASES[name]
        store = case.write(tmp_path / name / "a.zarr")
        meta = json.loads((store / "weights" / "zarr.json").read_text())
        other = tmp_path / name / "b.zarr"
        array: Any = zarr.create_array(other, shape=case.weights.shape, chunks=(1, 1, 1), dtype=case.dtype)
        (other / "zarr.json").write_text(json.dumps(meta))
        array = zarr.open_array(other, mode="r+", config={"write_empty_chunks": True})
        array[:] = case.weights
        ours = {p.name: p.read_bytes() for p in (store / "weights").glob("c.*")}
        assert ours == {p.name: p.read_bytes() for p in other.glob("c.*")}


def bytes_read() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_sparse_rows_read_only_those_rows(tmp_path: Path) -> None:
    case = CASES["big"]
    trajectory = Trajectory.open(case.write(tmp_path / "a.zarr"))
    out = np.empty((1, 3, case.size), "float32")
    before = bytes_read()
    trajectory.read([9], [0, 20, 1000], out=out)
    assert bytes_read() - before <= 1.05 * out.nbytes
    width = trajectory.column_chunk
    before = bytes_read()
    trajectory.read([9], [0, 20, 1000], width, 2 * width)
    assert bytes_read() - before <= 1.05 * 3 * width * 4


def test_out_is_filled_in_place(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    trajectory = Trajectory.open(case.write(tmp_path / "a.zarr"))
    whole = np.zeros((3, 7, 200), "float32")
    out = whole[:, :, 50:150]
    assert trajectory.read(case.labels, case.steps, 100, 200, out=out) is out
    np.testing.assert_array_equal(out, case.weights[..., 100:200])
    assert not whole[..., :50].any()
    assert not whole[..., 150:].any()
    for wrong in (np.zeros((3, 7, 100)), np.zeros((3, 7, 99), "float32"), np.zeros((3, 7, 200), "float32")[..., ::2]):
        with pytest.raises(ValueError, match="out is"):
            trajectory.read(case.labels, case.steps, 100, 200, out=wrong)


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    case = CASES["file per snapshot"]
    trajectory = Trajectory.open(case.write(tmp_path / "a.zarr"))

    def read(i: int) -> bool:
        start = i * 7 % 900
        got = trajectory.read([9, 8], [0, 50], start, start + 90)
        return np.array_equal(got, case.weights[[1, 0]][:, [0, 5], start : start + 90])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))


def _sum(trajectory: Trajectory) -> float:
    return float(trajectory.read([9], [35]).sum(dtype=float))


def test_spawned_processes_read(tmp_path: Path) -> None:
    case = CASES["tiny lockstep"]
    trajectory = Trajectory.open(case.write(tmp_path / "a.zarr"))
    assert pickle.loads(pickle.dumps(trajectory)).id == trajectory.id
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_sum, (trajectory,)) == _sum(trajectory)


def test_labels_out_of_range(tmp_path: Path) -> None:
    trajectory = Trajectory.open(CASES["tiny lockstep"].write(tmp_path / "a.zarr"))
    with pytest.raises(UsageError, match=r"a\.zarr: there is no run 7; its runs are 8…11"):
        trajectory.read([7], [0])
    with pytest.raises(UsageError, match=r"a\.zarr: step 11 is not recorded; its steps are 0…1000"):
        trajectory.read([8], [11])
    with pytest.raises(UsageError, match="coordinates 0:16 are out of range, there are 15"):
        trajectory.read([8], [0], 0, 16)


def test_importing_the_store_loads_neither_zarr_nor_torch() -> None:
    code = "import farcli.store, sys; print([m for m in ('zarr', 'torch', 'xarray') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_reading_natively_needs_no_zarr(tmp_path: Path) -> None:
    store = CASES["big"].write(tmp_path / "a.zarr")
    code = (
        "import sys; from farcli.store import Trajectory; t = Trajectory.open(sys.argv[1]); "
        "t.read(t.runs, t.steps); t.integers(8, 0); print('zarr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_writer_follows_the_layout_it_chose(tmp_path: Path) -> None:
    def chosen(runs: int, size: int, **options: Any) -> tuple[list[int], list[int], bool]:
        case = Case(size, labels=tuple(range(runs)), steps=(0,), options=options)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        with TrajectoryWriter.create(path, case.layout, case.labels, sync="none", **options):
            about = Trajectory.open(path, partial=True).describe()
        return about["file"], about["chunk"], about["sharded"]

    assert chosen(4, 16 * 65536) == ([1, 1, 16 * 65536], [1, 1, 65536], True)
    assert chosen(4, 262_145) == ([1, 1, 5 * 53248], [1, 1, 53248], True)
    assert chosen(50, 2, lockstep=True, planned_steps=range(199)) == ([50, 199, 2], [50, 199, 2], False)
    assert chosen(50, 2, planned_steps=range(199)) == ([1, 199, 2], [1, 199, 2], False)
    assert chosen(50, 2) == ([1, 256, 2], [1, 256, 2], False)
    assert chosen(100_000, 15, lockstep=True) == ([50_000, 1, 15], [50_000, 1, 15], False)
    assert chosen(3, 200, chunk=(1, 1, 50)) == ([1, 1, 200], [1, 1, 50], True)
    assert chosen(3, 200, chunk=(3, 2, 999)) == ([3, 2, 200], [3, 2, 200], False)
    with pytest.raises(UsageError, match="chunk"):
        chosen(3, 200, chunk=(3, 2, 50))
