"""Whatever the layout on disk, the order of appends and the selection: what went in comes out, as zarr reads it."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farcli.store import Trajectory, TrajectoryWriter
from tests.store.cases import layout, weights


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, int, int] | None]:
    runs, steps, size = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    plain = st.tuples(st.integers(1, 5), st.integers(1, 6), st.just(size))
    sharded = st.tuples(st.just(1), st.just(1), st.integers(1, size))
    return runs, steps, size, draw(st.none() | plain | sharded)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(shapes(), st.data())
def test_round_trip(shape: tuple[int, int, int, Any], data: st.DataObject) -> None:
    runs, steps, size, chunk = shape
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    truth = weights(runs, steps, size, dtype, seed=runs * steps * size)
    labels = data.draw(st.lists(st.integers(0, 99), min_size=runs, max_size=runs, unique=True))
    marks = sorted(data.draw(st.lists(st.integers(0, 10**12), min_size=steps, max_size=steps, unique=True)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zarr"
        done = [0] * runs
        writer = TrajectoryWriter.create(path, layout(size), labels, dtype=dtype, chunk=chunk, sync="none")
        while min(done) < steps:
            behind = [r for r in range(runs) if done[r] < steps]
            way = data.draw(st.sampled_from(["one", "columns", "resume"] + ["all"] * (len(set(done)) == 1)))
            if way == "resume":
                writer.close()
                writer = TrajectoryWriter.resume(path, sync="none")
                assert writer.snapshots == done
            elif way == "all":
                writer.append(marks[done[0]], truth[:, done[0]])
                done = [count + 1 for count in done]
            elif way == "one":
                run = data.draw(st.sampled_from(behind))
                writer.append(marks[done[run]], truth[run, done[run]], run=labels[run])
                done[run] += 1
            else:
                run = data.draw(st.sampled_from(behind))
                same = [r for r in behind if done[r] == done[run]]
                count = data.draw(st.integers(1, steps - done[run]))
                new = slice(done[run], done[run] + count)
                with writer.columns([labels[r] for r in same], marks[new]) as sink:
                    start = 0
                    while start < size:
                        stop = data.draw(st.integers(start + 1, size))
                        sink.write(start, truth[same, new, start:stop])
                        start = stop
                for r in same:
                    done[r] += count
        writer.finish()

        trajectory = Trajectory.open(path)
        np.testing.assert_array_equal(trajectory.read(labels, marks), truth)
        judge: Any = zarr.open_array(path / "weights", mode="r")
        np.testing.assert_array_equal(judge[:], truth)
        at_runs = data.draw(st.lists(st.integers(0, runs - 1), max_size=5))
        at_steps = data.draw(st.lists(st.integers(0, steps - 1), max_size=5))
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        got = trajectory.read([labels[r] for r in at_runs], [marks[t] for t in at_steps], start, stop)
        np.testing.assert_array_equal(got, truth[at_runs][:, at_steps, start:stop])
        assert list(trajectory.verify()) == []


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, int, int]) -> dict[str, Any]:
    inner = tuple(draw(st.integers(1, n + 2)) for n in shape)
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    packed = [plain[0], {"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
    codecs: list[Any] = draw(st.sampled_from([plain, packed]))
    outer = inner
    if draw(st.booleans()):
        outer = tuple(n * draw(st.integers(1, 3)) for n in inner)
        sharding = {"chunk_shape": inner, "codecs": codecs, "index_codecs": plain, "index_location": "end"}
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {"chunks": outer, "codecs": codecs}


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 30)), st.data())
def test_reads_what_zarr_writes(shape: tuple[int, int, int], data: st.DataObject) -> None:
    truth = weights(*shape)
    form = data.draw(layouts(shape))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zarr"
        with TrajectoryWriter.create(path, layout(shape[2]), range(shape[0]), sync="none") as writer:
            for t in range(shape[1]):
                writer.append(t, truth[:, t])
            writer.finish()
        array: Any = zarr.create(
            store=str(path / "weights"),
            overwrite=True,
            shape=shape,
            dtype="float32",
            fill_value=np.nan,
            zarr_format=3,
            dimension_names=("run", "step", "parameter"),
            **form,
        )
        array[:] = truth
        trajectory = Trajectory.open(path)
        at_runs = data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=4))
        at_steps = data.draw(st.lists(st.integers(0, shape[1] - 1), max_size=4))
        start = data.draw(st.integers(0, shape[2]))
        stop = data.draw(st.integers(start, shape[2]))
        np.testing.assert_array_equal(
            trajectory.read(at_runs, at_steps, start, stop), truth[at_runs][:, at_steps, start:stop]
        )
        np.testing.assert_array_equal(trajectory.read(range(shape[0]), range(shape[1])), truth)
        # As many of each as a chunk holds, wherever they lie.
        inner = trajectory.describe()["chunk"]
        at_runs = data.draw(st.permutations(range(shape[0])))[: inner[0]]
        at_steps = data.draw(st.permutations(range(shape[1])))[: inner[1]]
        np.testing.assert_array_equal(trajectory.read(at_runs, at_steps), truth[at_runs][:, at_steps])
