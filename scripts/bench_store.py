"""Benchmarks of the store, each as a ratio to its yardstick taken in the same interleaved run.

    python scripts/bench_store.py                 # under two minutes, 1 GB
    python scripts/bench_store.py --full          # at least 8 GB, and a network of 66,955,010 parameters

Every measure runs in a process of its own. Rows go to `scripts/results/store.ndjson`, the table to `store.md`.
"Cold" here means nothing: files are in the page cache, as they are when recording has just ended; what is measured
is the code, not the disk. `forecast` and its yardstick call fsync.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PIECE = 512 << 10
DISTILBERT = 66_955_010
ROOT = Path(__file__).parents[1]
PROGRAM = str(Path(sys.executable).with_name("farcli"))


# --------------------------------------------------------------------------------------------------- yardsticks


def interleaved(
    measures: dict[str, Callable[[], Any]], rounds: int, between: Callable[[], Any] = lambda: None
) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of each, in turn; the first round, which warms caches, is left out.

    `between` clears up after each; it is not timed.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, run in measures.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            between()
    return times


def ratio(times: dict[str, list[tuple[float, float]]], a: str, b: str, at: int = 0) -> float:
    """Median over the rounds of a's time over b's."""
    return statistics.median(x[at] / y[at] for x, y in zip(times[a], times[b], strict=True))


def best(times: dict[str, list[tuple[float, float]]], a: str, b: str) -> float:
    """a's least time over b's: what others on the machine do least to."""
    return min(wall for wall, _ in times[a]) / min(wall for wall, _ in times[b])


def seconds(times: dict[str, list[tuple[float, float]]], name: str) -> float:
    return statistics.median(wall for wall, _ in times[name])


def raw_write(path: Path, data: memoryview, *, sync: bool = False) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for at in range(0, data.nbytes, PIECE):
        os.write(fd, data[at : at + PIECE])
    if sync:
        os.fsync(fd)
    os.close(fd)


def raw_read(files: Sequence[Path], size: int, width: int, piece: int = 1 << 20) -> None:
    """Read `size` bytes of each file into two buffers in turn, `width` of a file at a time; nothing is checked."""
    buffers = [np.empty((len(files), width), np.uint8) for _ in range(2)]
    fds = [os.open(file, os.O_RDONLY) for file in files]
    for number, start in enumerate(range(0, size, width)):
        for fd, line in zip(fds, buffers[number % 2], strict=True):
            for at in range(0, min(width, size - start), piece):
                os.preadv(fd, [line[at : at + piece].data], start + at)
    for fd in fds:
        os.close(fd)


def layout_of_size(size: int, tensors: int = 100) -> Any:
    from farcli.layout import layout_of

    sizes = [size // tensors] * (tensors - 1)
    sizes.append(size - sum(sizes))
    return layout_of([(f"t{i}", (n,), "float32", "parameter") for i, n in enumerate(sizes)])


def make_store(path: Path, size: int, steps: int) -> None:
    """Weights that move along lines: for speeds only, never for compression."""
    from farcli.store import TrajectoryWriter

    rng = np.random.default_rng(0)
    base = rng.standard_normal(size, dtype=np.float32) * 0.02
    moved = rng.standard_normal(size, dtype=np.float32) * 1e-4
    with TrajectoryWriter.create(
        path, layout_of_size(size), [0], planned_steps=range(0, 10 * steps, 10), sync="none"
    ) as writer:
        for t in range(steps):
            writer.append(10 * t, base + moved * np.float32(t), run=0)
        writer.finish()


# ----------------------------------------------------------------------------------------------------- measures


def append(folder: Path, size: int, **_: Any) -> list[dict[str, Any]]:
    import safetensors.numpy
    import tensorstore
    import zarr

    from farcli.store import TrajectoryWriter

    vector = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    count = 4
    chunks = {"chunks": (1, 1, 65536), "shards": (1, 1, -(-size // 65536) * 65536)}

    def fresh(name: str) -> Path:
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    number = 0
    writer = TrajectoryWriter.create(fresh("ours.zarr"), layout_of_size(size), [0], sync="none")

    def following() -> int:
        nonlocal number
        number += 1
        return number

    def raw() -> None:
        for _ in range(count):
            raw_write(folder / f"raw{following()}", vector.data.cast("B"))

    def ours() -> None:
        for _ in range(count):
            writer.append(following(), vector, run=0)

    def safe() -> None:
        for _ in range(count):
            safetensors.numpy.save_file({"w": vector}, folder / f"{following()}.safetensors")

    def with_zarr() -> None:
        array = zarr.create_array(fresh("zarr.zarr"), shape=(1, count, size), dtype="f4", compressors=None, **chunks)
        for i in range(count):
            array[0, i] = vector

    def with_tensorstore() -> None:
        array = zarr.create_array(fresh("ts.zarr"), shape=(1, count, size), dtype="f4", compressors=None, **chunks)
        assert array is not None
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "ts.zarr")}}
        store = tensorstore.open(spec).result()
        for i in range(count):
            store[0, i].write(vector).result()

    def clear() -> None:  # before the disk gets to see them, or its speed would be what is measured
        for file in [*folder.glob("raw*"), *folder.glob("*.safetensors"), *folder.glob("ours.zarr/weights/c.*")]:
            file.unlink()

    times = interleaved({"raw": raw, "ours": ours, "safetensors": safe}, 9, clear)
    writer.close()
    others = interleaved({"raw": raw, "zarr": with_zarr, "tensorstore": with_tensorstore}, 1, clear)
    return [
        row("append", "append with crc and commit, no fsync", ratio(times, "ours", "raw"), "≤ 1.3", "× raw writes",
            cpu=ratio(times, "ours", "raw", 1), best=best(times, "ours", "raw"),
            gbps=count * size * 4 / seconds(times, "ours") / 1e9,
            # Replacing the commit record makes ext4 start writing it: a fixed cost, a large one for small snapshots.
            ms_a_snapshot=1e3 * seconds(times, "ours") / count, raw_ms_a_snapshot=1e3 * seconds(times, "raw") / count,
            safetensors=ratio(times, "safetensors", "raw"), zarr=ratio(others, "zarr", "raw"),
            tensorstore=ratio(others, "tensorstore", "raw")),
    ]  # fmt: skip


def stall(folder: Path, size: int, **_: Any) -> list[dict[str, Any]]:
    import torch

    from farcli.recording.background import Background
    from farcli.store import TrajectoryWriter

    torch.set_num_threads(1)
    layout = layout_of_size(size)
    weights = torch.randn(size)
    tensors = [weights[slot.offset : slot.stop].clone() for slot in layout.floats]
    target = torch.empty(size)
    writer = TrajectoryWriter.create(folder / "stall.zarr", layout, [0], sync="none")
    # What is being measured is the copy, not the first touch of the memory it goes to.
    background = Background(writer, lambda: (torch.zeros(size), torch.zeros(0, dtype=torch.int64)), print)
    step = 0

    def copied() -> None:
        nonlocal step
        buffer = background.take()
        for slot, tensor in zip(layout.floats, tensors, strict=True):
            buffer.floats[slot.offset : slot.stop].copy_(tensor)
        background.submit(step, buffer)
        step += 1

    def training() -> None:
        background.flush()  # as a training step does that is longer than the writing

    times = interleaved({"memcpy": lambda: target.copy_(weights), "copy": copied, "training": training}, 9)
    background.close(finish=True)
    return [
        row("stall", "stall of the training thread", ratio(times, "copy", "memcpy"), "≤ 1.25", "× one memcpy",
            cpu=None, gbps=size * 4 / seconds(times, "copy") / 1e9)
    ]  # fmt: skip


def stream(folder: Path, size: int, steps: int, **_: Any) -> list[dict[str, Any]]:
    import tensorstore
    import torch
    import zarr
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from farcli.forecasters.base import Coupling
    from farcli.store import Trajectory
    from farcli.stream import Source, Stream

    torch.set_num_threads(1)
    trajectory = Trajectory.open(folder / "big.zarr")
    steps = min(steps, 15)
    chosen = trajectory.steps[:steps]
    files = [folder / "big.zarr/weights" / f"c.0.{t}.0" for t in range(steps)]
    total = steps * size * 4

    def blocks(mapped: bool = True) -> Stream:
        return Stream([Source(trajectory=trajectory, runs=(0,))], coupling=Coupling.COORDINATEWISE,
                      steps_C=chosen, memory=512 << 20, mapped=mapped)  # fmt: skip

    width = blocks().plans[0].width

    def ours() -> None:
        for _ in blocks():
            pass

    def copied() -> None:
        for _ in blocks(mapped=False):
            pass

    def preadv() -> None:
        raw_read(files, size * 4, width * 4)

    def memmap() -> None:
        out = np.empty((steps, width * 4), np.uint8)
        maps = [np.memmap(file, np.uint8, "r") for file in files]
        for start in range(0, size * 4, width * 4):
            stop = min(start + width * 4, size * 4)
            for line, data in zip(out, maps, strict=True):
                line[: stop - start] = data[start:stop]

    for t in range(steps):
        if not (folder / f"s{t}.safetensors").exists():
            save_file({"w": trajectory.read([0], [chosen[t]])[0, 0]}, folder / f"s{t}.safetensors")

    def safe() -> None:
        out = np.empty((steps, width), np.float32)
        opened = [safe_open(folder / f"s{t}.safetensors", framework="np") for t in range(steps)]
        parts = [file.__enter__().get_slice("w") for file in opened]
        for start in range(0, size, width):
            stop = min(start + width, size)
            for line, part in zip(out, parts, strict=True):
                line[: stop - start] = part[start:stop]
        for file in opened:
            file.__exit__(None, None, None)

    slow = size // 4

    def with_zarr() -> None:
        array = zarr.open_array(folder / "big.zarr/weights", mode="r")
        for start in range(0, slow, width):
            np.asarray(array[0, :steps, start : min(start + width, slow)])

    def with_tensorstore() -> None:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "big.zarr/weights")}}
        array = tensorstore.open(spec).result()
        for start in range(0, slow, width):
            array[0, :steps, start : min(start + width, slow)].read().result()

    times = interleaved({"preadv": preadv, "ours": ours, "copied": copied, "memmap": memmap, "safetensors": safe}, 7)
    others = interleaved({"ours": ours, "zarr": with_zarr, "tensorstore": with_tensorstore}, 1)
    share = slow / size
    for file in folder.glob("s*.safetensors"):
        file.unlink()

    rows_asked = [trajectory.steps[0], trajectory.steps[steps // 2], trajectory.steps[-1]]
    before = _read_chars()
    three = Stream([Source(trajectory=trajectory, runs=(0,))], coupling=Coupling.COORDINATEWISE,
                   steps_C=rows_asked[:2], steps_H=rows_asked[2:], memory=512 << 20)  # fmt: skip
    for _ in three:
        pass
    read = _read_chars() - before
    return [
        row("stream", "verified column stream", 1 / ratio(times, "ours", "preadv"), "≥ 1.0", "× raw preadv",
            cpu=1 / ratio(times, "ours", "preadv", 1), gbps=total / seconds(times, "ours") / 1e9,
            preadv_gbps=total / seconds(times, "preadv") / 1e9, copied=1 / ratio(times, "copied", "preadv"),
            memmap=ratio(times, "memmap", "ours"), safetensors=ratio(times, "safetensors", "ours")),
        row("stream_zarr", "verified column stream", ratio(others, "zarr", "ours") / share, "≥ 5", "× zarr-python",
            cpu=ratio(others, "zarr", "ours", 1) / share, tensorstore=ratio(others, "tensorstore", "ours") / share),
        row("sparse", "sparse three-row read, bytes", read / (3 * size * 4), "≤ 1.05", "× rows asked for", cpu=None),
    ]  # fmt: skip


def _read_chars() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line)


_LAUNCH = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
out = process.stdout.read().decode()
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, out]))
"""


def launched(words: list[str]) -> tuple[float, int, float, str]:
    """Run a program: wall seconds, peak RSS in bytes, processor seconds, output.

    From a small process of its own: a child's peak is at least what its parent held when it forked.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _LAUNCH, *words], stdout=subprocess.PIPE, text=True, check=True)
    status, rss, cpu, out = json.loads(done.stdout)
    assert status == 0, status
    return time.perf_counter() - began, rss, cpu, out


def command(words: list[object]) -> tuple[float, int, dict[str, Any]]:
    """Run farcli; wall seconds, peak RSS in bytes, and its row with the processor seconds it took."""
    wall, rss, cpu, out = launched([PROGRAM, *map(str, words), "--format", "ndjson"])
    return wall, rss, json.loads(out) | {"cpu": cpu}


def idle_torch() -> int:
    """Peak RSS of a process that imports torch and does nothing."""
    return launched([sys.executable, "-c", "import torch"])[1]


def fit(folder: Path, size: int, steps: int, **_: Any) -> list[dict[str, Any]]:
    import torch

    from farcli.forecasters.base import Coupling
    from farcli.store import Trajectory
    from farcli.stream import Source, Stream

    torch.set_num_threads(1)
    trajectory = Trajectory.open(folder / "big.zarr")
    context = 2
    chosen = trajectory.steps

    def only_read() -> None:
        for _ in Stream([Source(trajectory=trajectory, runs=(0,))], coupling=Coupling.COORDINATEWISE,
                        steps_C=chosen[:context], steps_H=chosen[context:], memory=256_000_000):  # fmt: skip
            pass

    found: list[tuple[float, int, dict[str, Any]]] = []

    def fitted() -> None:
        found.append(command(["fit", "lfd2", folder / "big.zarr", "-o", folder / "f.safetensors", "--context", context,
                              "--memory", "512M", "--device", "cpu", "--force"]))  # fmt: skip

    files = [folder / "big.zarr/weights" / f"c.0.{t}.0" for t in range(len(chosen))]

    def preadv() -> None:
        raw_read(files, size * 4, 4 << 16)

    def bare() -> None:
        stream = Stream([Source(trajectory=trajectory, runs=(0,))], coupling=Coupling.COORDINATEWISE,
                        steps_C=chosen[:context], steps_H=chosen[context:], memory=256_000_000)  # fmt: skip
        for _ in stream.spread(lambda blocks: deque(blocks, maxlen=0), threads=2):
            pass

    times = interleaved({"read": only_read, "fit": fitted, "bare": bare, "preadv": preadv}, 3)
    solved = [item[2]["seconds"] for item in found[1:]]
    read = [wall for wall, _ in times["read"]]
    share = statistics.median(a / b for a, b in zip(read, solved, strict=True))
    against_raw = statistics.median(a / b for (a, _), b in zip(times["preadv"], solved, strict=True))
    whole = statistics.median(a / b for a, (b, _) in zip(read, times["fit"], strict=True))
    started, idle, *_ = launched([sys.executable, "-c", "import torch"])
    # Beside a program that imports torch and then does nothing but read.
    programs = statistics.median((a + started) / b for a, (b, _) in zip(read, times["fit"], strict=True))
    bare = statistics.median(a / b for (a, _), b in zip(times["bare"], solved, strict=True))
    rss = max(item[1] for item in found) - idle
    start = launched([PROGRAM, "fit", "--help"])[2]
    processor = statistics.median(
        b / max(item[2]["cpu"] - start, 1e-9) for item, (_, b) in zip(found[1:], times["read"], strict=True)
    )
    total = steps * size * 4
    return [
        row("fit", f"fit lfd2, {total / 1e9:.1f} GB, --memory 512M", share, "≥ 0.60", "× read-only speed",
            cpu=processor,
            with_start=whole, both_with_start=programs, of_preadv=against_raw,
            of_reading_in_parts=bare,
            gbps=total / statistics.median(solved) / 1e9,
            read_gbps=total / statistics.median(read) / 1e9),
        row("fit_rss", "fit lfd2, peak RSS over idle torch", rss / 2**20, "≤ 768", "MiB", cpu=None),
    ]  # fmt: skip


def forecast(folder: Path, wide: int, **_: Any) -> list[dict[str, Any]]:
    store = folder / "wide.zarr"
    make_store(store, wide, 12)
    command(["fit", "lfd2", store, "-o", folder / "w.safetensors", "--context", 2, "--memory", "512M",
             "--device", "cpu", "--force"])  # fmt: skip
    found: list[tuple[float, int, dict[str, Any]]] = []
    buffer = np.zeros(wide, np.float32)
    body = buffer.data.cast("B")

    def yardstick(sync: bool) -> None:
        for t in range(2):
            fd = os.open(store / "weights" / f"c.0.{t}.0", os.O_RDONLY)
            for at in range(0, body.nbytes, 1 << 20):
                os.preadv(fd, [body[at : at + (1 << 20)]], at)
            os.close(fd)
        for h in range(10):
            raw_write(folder / f"raw{h}", body, sync=sync)
        for h in range(10):
            (folder / f"raw{h}").unlink()

    def forecasted() -> None:
        found.append(command(["forecast", folder / "w.safetensors", store, "-o", folder / "out.zarr",
                              "--memory", "512M", "--device", "cpu", "--force"]))  # fmt: skip

    times = interleaved({"raw": lambda: yardstick(True), "unsynced": lambda: yardstick(False), "ours": forecasted}, 2)
    made = [item[2]["seconds"] for item in found[1:]]
    share = statistics.median(a / b for (a, _), b in zip(times["raw"], made, strict=True))
    unsynced = statistics.median(a / b for (a, _), b in zip(times["unsynced"], made, strict=True))
    rss = max(item[1] for item in found) - idle_torch()
    name = f"forecast of {wide:,} parameters, 10 horizons"
    return [
        row("forecast", name, share, "≥ 0.50", "× read + write speed (fsync)", cpu=None, unsynced=unsynced,
            gbps=12 * wide * 4 / statistics.median(made) / 1e9),
        row("forecast_rss", "forecast, peak RSS over idle torch", rss / 2**20, "≤ 768", "MiB", cpu=None),
    ]  # fmt: skip


def pack(folder: Path, text: str, training: int, **_: Any) -> list[dict[str, Any]]:
    """Lossless packing of weights really trained: a byte-level language model, then its fine-tuning at 2e-5."""
    import zarr  # what it takes to import it shall not count
    from numcodecs.blosc import compress, decompress

    from farcli.store import Trajectory
    from farcli.store import pack as write
    from farcli.store.codecs import BLOCK_BYTES

    assert zarr.__version__
    train_lm(folder, text, training)
    rows = []
    decode = []
    for name, bar in (("lm", "≥ 1.25"), ("ft", "≥ 1.3")):
        source = Trajectory.open(folder / f"{name}.zarr")
        packed: dict[str, Any] = {}
        for codec in ("zstd", "pcodec", "bitround:16", "bitround:12"):
            cpu, wall = time.process_time(), time.perf_counter()
            made = write(source, folder / "p.zarr", codec=codec, replace=True)
            packed[codec] = made
            packed[f"{codec} cpu"] = made.raw_bytes / (time.process_time() - cpu) / 1e9
            packed[f"{codec} wall"] = made.raw_bytes / (time.perf_counter() - wall) / 1e9
        what = "LM training, AdamW 1e-3" if name == "lm" else "fine-tuning at 2e-5"
        row_ = row(f"pack_{name}", f"pack zstd, {what}", packed["zstd"].raw_bytes / packed["zstd"].bytes, bar,
                   "× smaller", cpu=None, encode_gbps_cpu=packed["zstd cpu"],
                   encode_gbps_wall=packed["zstd wall"])  # fmt: skip
        for codec in ("pcodec", "bitround:16", "bitround:12"):
            row_[codec] = packed[codec].raw_bytes / packed[codec].bytes
            if packed[codec].loss:
                row_[f"{codec} rms error in updates"] = packed[codec].loss["rms_error_in_updates"]
        rows.append(row_)
        # Decoding alone, on one core, chunk by chunk as it lies in the store.
        block = source.read([0], source.steps[:64])[0]
        width = (1 << 20) // (4 * len(block)) // 1024 * 1024
        chunks = [np.ascontiguousarray(block[:, at : at + width]) for at in range(0, 40 * width, width)]
        frames = [compress(chunk.view("u4"), b"zstd", 1, 1, BLOCK_BYTES) for chunk in chunks]
        out = np.empty_like(chunks[0])
        best = min(_cpu(lambda frames=frames, out=out: [decompress(frame, out) for frame in frames]) for _ in range(7))
        decode.append(len(chunks) * out.nbytes / best / 1e9)
        write(source, folder / "p.zarr", codec="zstd", replace=True)
        stored = Trajectory.open(folder / "p.zarr")
        room = np.empty((1, len(stored.steps), stored.column_chunk * 8), np.float32)
        whole = stored.size // room.shape[2] * room.shape[2]

        def unpack(stored: Any = stored, room: np.ndarray = room, whole: int = whole) -> None:
            for at in range(0, whole, room.shape[2]):
                stored.read([0], stored.steps, at, at + room.shape[2], out=room)

        best = min(_cpu(unpack) for _ in range(5))
        rows[-1]["read_gbps_cpu"] = len(stored.steps) * whole * 4 / best / 1e9
    rows.append(row("decode", "decode of a packed chunk, one core", min(decode), "≥ 3", "GB/s", cpu=None,
                    fine_tuning=decode[1], training=decode[0]))  # fmt: skip
    return rows


def _cpu(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def train_lm(folder: Path, text: str, steps: int) -> None:
    """Train a transformer of 1.4 M parameters on bytes, every 10th step recorded, then go on at 2e-5."""
    import torch
    from torch import nn

    from farcli.layout import layout_of
    from farcli.store import TrajectoryWriter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, length, batch = 192, 64, 8
    if text:
        data = Path(text).read_bytes()
    else:
        data = b"".join(path.read_bytes() for path in sorted(ROOT.glob("farcli/**/*.py")))
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    layer = nn.TransformerEncoderLayer(width, 6, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    model = nn.ModuleDict({
        "token": nn.Embedding(256, width),
        "place": nn.Embedding(length, width),
        "blocks": nn.TransformerEncoder(layer, 3, enable_nested_tensor=False),
        "norm": nn.LayerNorm(width),
        "head": nn.Linear(width, 256),
    })  # fmt: skip
    mask = torch.triu(torch.full((length, length), float("-inf")), 1)
    parameters = list(model.named_parameters())
    layout = layout_of([(name, tuple(value.shape), "float32", "parameter") for name, value in parameters])
    for name, rate in (("lm", 1e-3), ("ft", 2e-5)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        draw = torch.Generator().manual_seed(1)
        with TrajectoryWriter.create(folder / f"{name}.zarr", layout, [0], sync="none") as writer:
            for step in range(steps + 1):
                if step % 10 == 0:
                    flat = torch.cat([value.detach().flatten() for _, value in parameters])
                    writer.append(step, flat.numpy(), run=0)
                starts = torch.randint(0, len(tokens) - length - 1, (batch,), generator=draw)
                part = torch.stack([tokens[at : at + length + 1] for at in starts])
                hidden = model["token"](part[:, :-1]) + model["place"](torch.arange(length))
                logits = model["head"](model["norm"](model["blocks"](hidden, mask=mask, is_causal=True)))
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            writer.finish()


def row(key: str, what: str, value: float, bar: str, unit: str, *, cpu: float | None, **more: Any) -> dict[str, Any]:
    sign, limit = bar.split()
    reached = value <= float(limit) if sign == "≤" else value >= float(limit)
    found = {"measure": key, "what": what, "value": value, "unit": unit, "bar": bar, "reached": reached}
    return found | {"cpu": cpu} | more


MEASURES: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "append": append,
    "stall": stall,
    "stream": stream,
    "fit": fit,
    "forecast": forecast,
    "pack": pack,
}


def machine() -> dict[str, Any]:
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    packages = ("torch", "numpy", "zarr", "numcodecs", "crc32c", "tensorstore", "safetensors")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--full", action="store_true", help="8 GB, and the network of 66,955,010 parameters")
    parser.add_argument("--only", default=",".join(MEASURES), help="measures, by name")
    parser.add_argument("--folder", type=Path, help="where to write stores; a temporary folder if not said")
    parser.add_argument("--text", default="", help="text to train on; our own source if not said")
    parser.add_argument("--name", default="store", help="name of the files in scripts/results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    size, steps = (1 << 24, 120) if given.full else (1 << 22, 30)
    options = {
        "size": size,
        "steps": steps,
        "wide": DISTILBERT if given.full else 6_695_501,
        "text": given.text,
        "training": 600 if given.full else 200,
    }
    if given.measure:
        print(json.dumps(MEASURES[given.measure](given.folder, **options)))
        return
    results = ROOT / "scripts/results"
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        wanted = given.only.split(",")
        if {"stream", "fit"} & set(wanted):
            make_store(folder / "big.zarr", size, steps)
        rows = []
        for name in wanted:
            began = time.perf_counter()
            words = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--text", given.text]
            done = subprocess.run(words + ["--full"] * given.full, stdout=subprocess.PIPE, text=True, check=True)
            rows += json.loads(done.stdout.splitlines()[-1])
            still_needed = {"stream", "fit"} & set(wanted[wanted.index(name) + 1 :])
            for item in folder.iterdir():
                if item.name != "big.zarr" or not still_needed:
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    where = machine() | {"size": size, "steps": steps, "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}
    with open(results / f"{given.name}.ndjson", "w", encoding="utf-8") as file:
        for item in rows:
            file.write(json.dumps({**item, "machine": where}) + "\n")
    table = markdown(rows, where)
    (results / f"{given.name}.md").write_text(table, encoding="utf-8")
    print(table)


def markdown(rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        f"{where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB, load {where['load']:.1f}; "
        + ", ".join(f"{k} {where[k]}" for k in ("python", "torch", "numpy", "zarr", "numcodecs", "crc32c"))
        + f"; {where['date']}. {where['steps']} snapshots of {where['size']:,} parameters, in the page cache.",
        "",
        "| what | measured | bar | | beside it |",
        "|---|---|---|---|---|",
    ]
    for item in rows:
        known = ("measure", "what", "value", "unit", "bar", "reached")
        beside = "; ".join(
            f"{key} {value:.3g}" for key, value in item.items() if key not in known and isinstance(value, float)
        )
        mark = "reached" if item["reached"] else "**not reached**"
        lines.append(f"| {item['what']} | {item['value']:.3g} {item['unit']} | {item['bar']} | {mark} | {beside} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
