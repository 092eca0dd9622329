import gc
import os

import numpy as np
import pytest
import torch
import zarr

import farcli.stream
from farcli.errors import DamagedError, NonFiniteError, ResourceError, UsageError
from farcli.forecasters.base import Coupling
from farcli.layout import layout_of
from farcli.store import Trajectory, TrajectoryWriter
from farcli.store.mapping import can_populate
from farcli.stream import Source, Stream, open_sources, require_finite, resolve_device

STEPS = [0, 10, 20, 30]


def written(path, runs, size, *, seed=0, chunk=None):
    """A store of random weights, and what it holds."""
    layout = layout_of(
        [("a", (size // 3,), "float32", "parameter"), ("b", (size - size // 3,), "float32", "parameter")]
    )
    values = np.random.default_rng(seed).standard_normal((len(runs), len(STEPS), size)).astype(np.float32)
    with TrajectoryWriter.create(path, layout, runs, planned_steps=STEPS, lockstep=True, chunk=chunk) as writer:
        for index, step in enumerate(STEPS):
            writer.append(step, values[:, index])
        writer.finish()
    return Trajectory.open(path), values


@pytest.fixture(params=[None, (1, 1, 8)], ids=["plain", "sharded"])
def store(request, tmp_path):
    return written(tmp_path / "run.zarr", [3, 5, 7], 50, chunk=request.param)


def gathered(stream, sources):
    """Every block put back in its place: {(source, run): [steps, D]}; nothing may come twice."""
    rows = len(stream.steps_C) + len(stream.steps_H)
    found = {(i, run): np.full((rows, stream.coordinates), np.nan) for i, s in enumerate(sources) for run in s.runs}
    positions = {}
    for block in stream:
        both = torch.cat([block.prefix.weights_BCD, block.truth_BHD], dim=1).numpy()
        for b, run in enumerate(block.runs):
            place = found[block.source, run][:, block.prefix.start : block.stop]
            assert np.isnan(place).all()
            place[:] = both[b]
            positions[block.source, run] = block.prefix.runs_B[b]
    assert sorted(positions.values()) == list(range(stream.runs))
    return found


def test_too_little_memory_for_whole_vectors_names_the_largest(tmp_path):
    def stream(size):
        trajectory, _ = written(tmp_path / f"{size}.zarr", [3, 5], size)
        sources = [Source(trajectory=trajectory, runs=(3, 5))]
        return Stream(sources, coupling=Coupling.JOINT, steps_C=(0, 20), steps_H=(30,), memory=1_100)

    with pytest.raises(ResourceError, match=r"too small for one block .* allows D = 45"):
        stream(50)
    assert stream(45).plans[0].bytes <= 1_100
    with pytest.raises(ResourceError, match="allows D = 45"):
        stream(46)


@pytest.mark.parametrize("coupling", list(Coupling))
@pytest.mark.parametrize("memory", [1_100, 3_000, 10_000_000])
def test_blocks_are_what_was_stored_whatever_the_memory(store, tmp_path, coupling, memory):
    trajectory, values = store
    other, more = written(tmp_path / "other.zarr", [0, 1], 50, seed=1)
    sources = [Source(trajectory=trajectory, runs=(7, 3)), Source(trajectory=other, runs=(1,))]
    arguments = {"coupling": coupling, "steps_C": (0, 20), "steps_H": (30,), "memory": memory}
    if memory == 1_100 and (coupling is Coupling.JOINT or trajectory.column_chunk == 50):
        with pytest.raises(ResourceError, match="too small"):
            Stream(sources, **arguments)
        return
    if memory == 1_100:
        sources = sources[:1]
    stream = Stream(sources, **arguments)
    assert all(plan.bytes <= memory for plan in stream.plans)
    found = gathered(stream, sources)
    rows = [0, 2, 3]
    np.testing.assert_array_equal(found[0, 7], values[2, rows])
    np.testing.assert_array_equal(found[0, 3], values[0, rows])
    if len(sources) > 1:
        np.testing.assert_array_equal(found[1, 1], more[1, rows])


def test_only_the_first_coordinates_when_asked(store):
    trajectory, values = store
    sources = [Source(trajectory=trajectory, runs=(5,))]
    stream = Stream(sources, coupling=Coupling.COORDINATEWISE, steps_C=(10,), coordinates=17)
    assert stream.bytes == 17 * 4
    np.testing.assert_array_equal(gathered(stream, sources)[0, 5], values[1, [1], :17])


def test_segments_name_the_tensors_of_a_block(store):
    trajectory, _ = store
    sources = [Source(trajectory=trajectory, runs=(3,))]
    for block in Stream(sources, coupling=Coupling.COORDINATEWISE, steps_C=(0,), memory=700):
        for segment in block.prefix.segments:
            slot = trajectory.layout.floats[segment.slot]
            assert slot.offset <= block.prefix.start + segment.start
            assert block.prefix.start + segment.stop <= slot.stop


def test_dtype_is_a_choice(store):
    trajectory, values = store
    source = Source(trajectory=trajectory, runs=(3,))
    [block] = Stream([source], coupling=Coupling.JOINT, steps_C=(0,), dtype=torch.float64)
    assert block.prefix.weights_BCD.dtype == torch.float64
    np.testing.assert_array_equal(block.prefix.weights_BCD[0, 0].numpy(), values[0, 0].astype(np.float64))


def test_steps_runs_and_sizes_that_do_not_fit(store, tmp_path):
    trajectory, _ = store
    wide, _ = written(tmp_path / "wide.zarr", [0], 51)
    source = Source(trajectory=trajectory, runs=(3,))
    with pytest.raises(UsageError, match="step 15 is not recorded"):
        Stream([source], coupling=Coupling.JOINT, steps_C=(15,))
    with pytest.raises(UsageError, match="no run 4"):
        Stream([Source(trajectory=trajectory, runs=(4,))], coupling=Coupling.JOINT, steps_C=(0,))
    with pytest.raises(UsageError, match="same network"):
        Stream([Source(trajectory=wide, runs=(0,)), source], coupling=Coupling.JOINT, steps_C=(0,))


def test_what_is_not_finite_is_named(tmp_path):
    layout = layout_of([("a", (2,), "float32", "parameter"), ("b", (2,), "float32", "parameter")])
    values = np.zeros((2, 4), np.float32)
    values[1, 2] = np.inf
    with TrajectoryWriter.create(tmp_path / "bad.zarr", layout, [0, 1], lockstep=True) as writer:
        writer.append(0, values)
        writer.finish()
    [source] = open_sources([str(tmp_path / "bad.zarr")], None)
    [block] = Stream([source], coupling=Coupling.JOINT, steps_C=(0,))
    with pytest.raises(NonFiniteError, match=r"bad\.zarr: run 1, step 0: tensor 'b' holds inf"):
        require_finite(block.prefix.weights_BCD, block, source.trajectory.path, (0,))


def test_large_finite_weights_are_finite(store):
    trajectory, _ = store
    source = Source(trajectory=trajectory, runs=(3,))
    [block] = Stream([source], coupling=Coupling.JOINT, steps_C=(0,))
    require_finite(torch.full((1, 1, 50), 3e38), block, "x", (0,))  # their sum overflows


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match="abacus"):
        resolve_device("abacus")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_blocks_go_to_a_cuda_device_from_pinned_memory(store):
    trajectory, values = store
    stream = Stream(
        [Source(trajectory=trajectory, runs=(3,))],
        coupling=Coupling.COORDINATEWISE,
        steps_C=STEPS,
        memory=1_100,
        device=torch.device("cuda"),
    )
    assert torch.from_numpy(stream._buffer(5, trajectory.dtype)).is_pinned()
    blocks = [block.prefix.weights_BCD for block in stream]
    assert all(weights.device.type == "cuda" for weights in blocks)
    np.testing.assert_array_equal(torch.cat([weights[0] for weights in blocks], dim=-1).cpu().numpy(), values[0])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A store whose blocks are worth mapping: three chunks of each snapshot, the last of them cut."""
    return written(tmp_path_factory.mktemp("large") / "run.zarr", [3, 5, 7], 150_000, chunk=(1, 1, 65536))


def mapped_stream(trajectory, **options):
    stream = Stream(
        [Source(trajectory=trajectory, runs=(7, 3, 5))],
        coupling=Coupling.COORDINATEWISE,
        steps_C=STEPS[:3],
        steps_H=STEPS[3:],
        **options,
    )
    if not can_populate():
        pytest.skip("this system does not map files safely")
    return stream


@pytest.mark.parametrize("coordinates", [None, 65_536, 140_001])
def test_mapped_blocks_are_the_copied_ones(large, coordinates):
    trajectory, values = large
    stream = mapped_stream(trajectory, coordinates=coordinates)
    assert stream.plans[0].mapped
    found = gathered(stream, stream.sources)
    for index, run in enumerate((3, 5, 7)):
        np.testing.assert_array_equal(found[0, run], values[index, :, :coordinates])
    copied = mapped_stream(trajectory, coordinates=coordinates, mapped=False)
    assert not copied.plans[0].mapped
    for key, rows in gathered(copied, copied.sources).items():
        np.testing.assert_array_equal(rows, found[key])


def test_what_is_not_mapped(large, tmp_path):
    trajectory, _ = large
    assert not mapped_stream(trajectory, memory=50_000_000).plans[0].mapped
    assert (
        not Stream([Source(trajectory=trajectory, runs=(3,))], coupling=Coupling.JOINT, steps_C=STEPS).plans[0].mapped
    )
    with TrajectoryWriter.create(tmp_path / "going.zarr", trajectory.layout, [0], chunk=(1, 1, 65536)) as writer:
        writer.append(0, np.zeros((1, 150_000), np.float32))
        writer.close()
    assert not Trajectory.open(tmp_path / "going.zarr", partial=True).mappable


def test_a_mapped_tensor_lasts_and_is_its_owners(large):
    trajectory, values = large
    blocks = iter(mapped_stream(trajectory))
    first = next(blocks).prefix.weights_BCD
    first[0, 0, 0] = 7.0
    assert float(first[0, 0, 0]) == 7.0
    assert len(list(blocks)) == 2
    del blocks
    gc.collect()
    # Not the memory of somebody else, nor none: what is in the file.
    np.testing.assert_array_equal(first.numpy(), values[[2, 0, 1], :3, : first.shape[-1]])
    np.testing.assert_array_equal(trajectory.read([7], [0])[0, 0], values[2, 0])


def test_damage_under_a_mapping_is_an_error_and_no_signal(tmp_path):
    trajectory, _ = written(tmp_path / "bad.zarr", [3, 5, 7], 150_000, chunk=(1, 1, 65536))
    file = tmp_path / "bad.zarr/weights/c.1.2.0"
    whole = file.read_bytes()
    at = 65536 * 4 + 4 + 1000  # in the second chunk
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(DamagedError, match=r"run 5, step 20 is damaged: file weights/c\.1\.2\.0 fails its checksum"):
        list(mapped_stream(trajectory))
    file.write_bytes(whole)
    chunks = Trajectory.open(tmp_path / "bad.zarr").map([5], STEPS)
    assert chunks is not None
    os.truncate(file, 5000)
    with pytest.raises(DamagedError, match=r"run 5, step 20 is damaged: .* cannot be read \(cut short"):
        chunks.read(1, 2)
    with pytest.raises(DamagedError, match=r"run 5, step 20 is damaged"):
        list(mapped_stream(Trajectory.open(tmp_path / "bad.zarr")))
    file.unlink()
    with pytest.raises(DamagedError, match=r"c\.1\.2\.0 is missing"):
        list(mapped_stream(Trajectory.open(tmp_path / "bad.zarr")))


def spread_stream(trajectories, **options):
    sources = [Source(trajectory=trajectory, runs=(7, 3)) for trajectory in trajectories]
    return Stream(sources, coupling=Coupling.COORDINATEWISE, steps_C=STEPS[:1], steps_H=STEPS[1:], **options)


@pytest.mark.parametrize("coordinates", [None, 140_001])
def test_spread_parts_are_what_was_stored_in_order_however_many_threads(large, tmp_path, monkeypatch, coordinates):
    trajectory, values = large
    other, more = written(tmp_path / "other.zarr", [3, 7], 150_000, seed=1, chunk=(1, 1, 4096))
    monkeypatch.setattr(farcli.stream, "_SMALL_BLOCK", 1 << 20)  # 2 of the 3 targets at a time
    monkeypatch.setattr(farcli.stream, "_PART_BYTES", 2 << 20)
    stream = spread_stream([trajectory, other], coordinates=coordinates)
    assert stream.spreads

    def kept(blocks):
        return [
            (
                *(b.source, b.runs, b.prefix.runs_B, b.prefix.start, b.stop, b.first),
                *(b.prefix.weights_BCD.numpy().copy(), b.truth_BHD.numpy().copy()),
            )
            for b in blocks
        ]

    alone, together = ([part for part, _ in stream.spread(kept, threads=count)] for count in (1, 3))
    assert len(alone) > 4
    assert sum(size for _, size in stream.spread(kept, threads=2)) == 4 * stream.coordinates
    found = np.full((2, 2, 4, stream.coordinates), np.nan, np.float32)
    for part, same in zip(alone, together, strict=True):
        assert [block[:6] for block in part] == [block[:6] for block in same]
        for source, (run,), (position,), start, stop, first, context, truth in part:
            assert position == 2 * source + (run == 3)
            place = found[source, int(run == 3), :, start:stop]
            if first == 0:
                place[:1] = context[0]
            np.testing.assert_array_equal(place[:1], context[0])
            assert np.isnan(place[1 + first : 1 + first + truth.shape[1]]).all()
            place[1 + first : 1 + first + truth.shape[1]] = truth[0]
    np.testing.assert_array_equal(found[0], values[[2, 0], :, :coordinates])
    np.testing.assert_array_equal(found[1], more[[1, 0], :, :coordinates])


def test_what_is_not_spread(large, store):
    trajectory, _ = large
    source = Source(trajectory=trajectory, runs=(3,))
    assert not Stream([source], coupling=Coupling.JOINT, steps_C=STEPS).spreads
    assert not Stream([source], coupling=Coupling.COORDINATEWISE, steps_C=STEPS, memory=4_000_000).spreads
    tiny = Source(trajectory=store[0], runs=(3,))
    assert Stream([tiny], coupling=Coupling.COORDINATEWISE, steps_C=STEPS).spreads is (store[0].column_chunk == 8)


def test_damage_is_found_in_spread_parts(tmp_path):
    trajectory, _ = written(tmp_path / "bad.zarr", [3, 5, 7], 150_000, chunk=(1, 1, 4096))
    file = tmp_path / "bad.zarr/weights/c.2.1.0"
    whole = file.read_bytes()
    record = 4096 * 4 + 4
    for at in (3 * record + 1000, 4 * record - 1):  # in the data, and in the checksum, of the fourth chunk
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(
            DamagedError, match=rf"run 7, step 10 is damaged: file weights/c\.2\.1\.0 .*byte {3 * record}"
        ):
            list(spread_stream([trajectory]).spread(list, threads=2))
    file.unlink()
    with pytest.raises(DamagedError, match=r"c\.2\.1\.0 is missing"):
        list(spread_stream([Trajectory.open(tmp_path / "bad.zarr")]).spread(list, threads=2))


def test_chunks_in_another_order_are_read_all_the_same(tmp_path):
    trajectory, values = written(tmp_path / "run.zarr", [3, 5, 7], 150_000, chunk=(1, 1, 4096))
    array = zarr.open_array(tmp_path / "run.zarr/weights", mode="r+")
    array[2, 1] = values[0, 0]  # zarr-python puts the chunks of a shard in an order of its own
    trajectory = Trajectory.open(tmp_path / "run.zarr")
    room = np.empty((2, 3 * trajectory.chunk_room), np.uint8)
    for chunk, start in zip(trajectory.read_chunks(7, [10, 0], 30, 33, room), (30, 31, 32), strict=True):
        np.testing.assert_array_equal(chunk[0, 0], values[0, 0, start * 4096 :][:4096])
        np.testing.assert_array_equal(chunk[0, 1], values[2, 0, start * 4096 :][:4096])
