"""What recording costs a training, against the same training without it, in the same interleaved run.

    python scripts/bench_record.py                  # distilbert, 22.7 M parameters, batch 8, every 5 steps
    python scripts/bench_record.py --full           # more rounds, and other intervals
    python scripts/bench_record.py --device cuda    # GPT-2 124M in bfloat16 autocast, every 50, 20, 10, 5, 2, 1
    python scripts/bench_record.py --workload gpt2 --set data=FILE --every 10

Blocks of training come in rounds of four, on the same batches and in every order in turn, so that a loaded machine and
long sentences hit all alike: one plain, one recorded, and two in which the weights are only copied, into memory used
before (on CUDA: pinned), after the very steps that are recorded in the other: by torch, on all its threads, and by
`memcpy`, on one (not on CUDA). A recorded block begins with a snapshot and ends when everything is written.

- `slowdown_percent`: median over the rounds of recorded time / plain time − 1, with the distribution-free interval of
  that median (order statistics, at least 95 % where there are 6 or more); `copy_slowdown_percent` the same for copies.
- `longest_stall_copies`: the most that the recorder's hooks held up one step (on CUDA: the longest recorded step less
  the median plain one), over the median time of torch's copy; `median_stall_copies` the same for the median snapshot.
  `longest_copy_copies` is the longest of as many copies: what the machine alone makes of the same copy;
  `longest_stall_longest_copies` holds like against like.
- `longest_stall_memcpies`: the same stall over the median time of a `memcpy` of the weights, and so on.
- `extra_bytes`: peak memory of the process with recording less without, on the same batches, taken for the first
  interval; on CUDA `extra_device_bytes` beside it.
- `snapshot_disk_bytes`: of the store, by snapshot.

Rows go to `scripts/results/record.ndjson`, a table to `record.md` (on CUDA `record-cuda`).
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from typing import Any

import torch

from farcli.config import parse_assignments
from farcli.errors import FarcliError
from farcli.recording.recorder import Recorder
from farcli.store import Trajectory
from farcli.stream import resolve_device
from farcli.training import run_seed, threads, workload_from
from farcli.workloads.base import Batch

ROOT = Path(__file__).parents[1]
GPT2_124M = ("layers=12", "heads=12", "width=768", "context=1024", "tokens=bpe", "batch=8")


class Timed(Recorder):
    """The recorder with a clock on its hooks, and a switch.

    Attributes:
        on: whether steps are counted and recorded.
        stalls: seconds that each recorded step was held up.
    """

    on = True

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.stalls: list[float] = []
        self._seconds = 0.0

    def _before(self, optimizer: object) -> None:
        if self.on:
            began = time.perf_counter()
            super()._before(optimizer)
            self._seconds = time.perf_counter() - began

    def _after(self, optimizer: object) -> None:
        if self.on:
            began = time.perf_counter()
            super()._after(optimizer)
            self.stalls.append(self._seconds + time.perf_counter() - began)

    def flush(self) -> None:
        """Wait until every snapshot taken is written."""
        assert self._recording is not None
        assert self._recording._sink is not None
        self._recording._sink.flush()


class Training:
    """A workload in training, on a device of choice, step by step."""

    def __init__(self, name: str, options: dict[str, str], device: torch.device) -> None:
        self.workload = workload_from(name, options)
        seed = run_seed(0, 0)
        self.device = device
        self.model = self.workload.model([seed]).to(device)
        self.optimizer = self.workload.optimizer(self.model)
        self._batches = self.workload.batches([seed])

    def draw(self, count: int) -> list[Batch]:
        """The next batches, on the device."""
        return [tuple(part.to(self.device) for part in next(self._batches)) for _ in range(count)]

    def block(self, batches: Sequence[Batch], then: Callable[[int], None] | None = None) -> list[float]:
        """Train on some batches, and do something after each; seconds of each step with that."""
        cuda = self.device.type == "cuda"
        marks: list[Any] = [self._mark()]
        for number, batch in enumerate(batches):
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                loss = self.workload.loss(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if then is not None:
                then(number)
            marks.append(self._mark())
        if cuda:  # the training's own stream: waiting for the device would wait for the recorder's too
            torch.cuda.current_stream().synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]
        return [b - a for a, b in itertools.pairwise(marks)]

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Copies:
    """A plain copy of the weights into memory that is used again; pinned where they are on CUDA.

    Attributes:
        seconds: that each copy took.
    """

    def __init__(self, model: torch.nn.Module, *, memcpy: bool = False) -> None:
        self.cuda = next(model.parameters()).device.type == "cuda"
        self.memcpy = memcpy
        self.tensors = [parameter.detach() for parameter in model.parameters()]
        self.copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=self.cuda) for t in self.tensors]
        self.seconds: list[float] = []
        self.take()
        self.seconds.clear()

    def take(self) -> None:
        """Make one, when all before it is done."""
        if self.cuda:
            torch.cuda.current_stream().synchronize()
        began = time.perf_counter()
        for tensor, copy in zip(self.tensors, self.copies, strict=True):
            if self.memcpy:
                ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
            else:
                copy.copy_(tensor)
        self.seconds.append(time.perf_counter() - began)


def due(copies: Copies, every: int) -> Callable[[int], None]:
    """What to do after a step of a block: a copy after those that would be recorded."""
    return lambda number: copies.take() if number % every == 0 else None


def peak() -> int:
    """Most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the narrowest interval of order statistics that holds the true one with 95 %, or all of them."""
    ordered, count = sorted(values), len(values)
    low = 0
    while 2 * sum(comb(count, k) for k in range(low + 2)) / 2**count <= 0.05 and low + 1 < count // 2:
        low += 1
    return statistics.median(ordered), ordered[low], ordered[count - 1 - low]


def measure(training: Training, every: int, rounds: int, steps: int, folder: Path) -> dict[str, Any]:
    """One row."""
    cuda = training.device.type == "cuda"
    copying = ("copied",) if cuda else ("copied", "memcpy")
    kinds = ("plain", "recorded", *copying)
    store = folder / f"every-{every}.zarr"
    batches = training.draw(every + 1)
    training.block(batches)
    before, device_before = peak(), torch.cuda.max_memory_allocated() if cuda else 0
    # the first step of a block is due, so that the last of its snapshots can be written within it
    recorder = Timed(training.model, training.optimizer, store, every=every, start_step=every - 1)
    steps_of: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    orders = itertools.cycle(itertools.permutations(kinds))
    with recorder:
        training.block(batches)
        recorder.flush()
        extra = peak() - before
        extra_device = torch.cuda.max_memory_allocated() - device_before if cuda else None
        first = list(recorder.stalls)  # one is into memory never touched before: counted, every training has it
        recorder.stalls.clear()
        training.block(training.draw(every - 1))
        recorder.flush()
        yardsticks = {kind: Copies(training.model, memcpy=kind == "memcpy") for kind in copying}
        for _ in range(rounds):
            batches = training.draw(steps)
            seconds = {}
            for kind in next(orders):
                recorder.on = kind == "recorded"
                found = training.block(batches, due(yardsticks[kind], every) if kind in copying else None)
                began = time.perf_counter()
                if recorder.on:
                    recorder.flush()
                seconds[kind] = sum(found) + (time.perf_counter() - began)
                steps_of[kind] += found
            for kind in kinds:
                ratios[kind].append(seconds[kind] / seconds["plain"])
        recorder.on = True
    stalls = first + recorder.stalls
    copies = yardsticks["copied"].seconds
    copy, step_seconds = statistics.median(copies), statistics.median(steps_of["plain"])
    memcpies = [] if cuda else yardsticks["memcpy"].seconds
    memcpy = statistics.median(memcpies) if memcpies else None
    if cuda:
        stalls = [max(step - step_seconds, 0.0) for step in steps_of["recorded"]]
    taken = len(Trajectory.open(store).steps)
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    slowdown, low, high = (100 * (value - 1) for value in interval(ratios["recorded"]))
    return {
        "every": every,
        "rounds": rounds,
        "steps": steps,
        "step_seconds": step_seconds,
        "slowdown_percent": slowdown,
        "slowdown_low": low,
        "slowdown_high": high,
        "copy_slowdown_percent": 100 * (statistics.median(ratios["copied"]) - 1),
        "copy_seconds": copy,
        "longest_copy_copies": max(copies) / copy,
        "longest_stall_seconds": max(stalls),
        "longest_stall_copies": max(stalls) / copy,
        "median_stall_copies": statistics.median(sorted(stalls)[-(len(stalls) // every) :]) / copy,  # of those due
        "longest_stall_longest_copies": max(stalls) / max(copies),
        "first_stall_copies": max(first) / copy,
        "memcpy_seconds": memcpy,
        "longest_memcpy_memcpies": memcpy and max(memcpies) / memcpy,
        "longest_stall_memcpies": memcpy and max(stalls) / memcpy,
        "extra_bytes": extra,
        "extra_device_bytes": extra_device,
        "snapshot_disk_bytes": size / taken,
    }


def bar(row: dict[str, Any]) -> dict[str, bool | None]:
    """Whether the bars hold, where there are any: on the CPU for 22.7 M parameters, batch 8, every 5 steps."""
    on_cpu = row["device"] == "cpu" and row["workload"] == "distilbert" and row["batch"] == 8 and row["every"] == 5
    if on_cpu and row["parameters"] > 22e6:
        return {"slowdown": row["slowdown_percent"] <= 5, "stall": row["longest_stall_memcpies"] <= 1.5}
    if row["device"] != "cpu" and row["parameters"] > 124e6 and row["every"] == 50:
        return {"slowdown": row["slowdown_percent"] <= 2, "stall": None}
    return {"slowdown": None, "stall": None}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table, and the smallest interval under 5 %."""
    first = rows[0]
    lines = [
        f"{first['workload']} ({', '.join(first['options'])}), {first['parameters']:,} parameters in {first['dtype']}, "
        f"on {first['device']}, {first['threads']} threads, load {first['load']:.1f}; torch {first['torch']}; "
        f"{first['date']}. Slowdown: median of {first['rounds']} rounds of {first['steps']} steps and its interval.",
        "",
        "| every | step s | slowdown % | by plain copies % | longest stall / longest copy "
        "| in median copies: longest stall | median stall | longest copy | copy s "
        "| in median memcpies: longest stall | longest memcpy | memcpy s | extra MB | MB a snapshot |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    marks = {None: "", True: " (reached)", False: " (**not reached**)"}
    for row in rows:
        reached = row["reached"]
        extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}"
        memcpies = "· | · | ·"
        if row["memcpy_seconds"] is not None:
            memcpies = (
                f"{row['longest_stall_memcpies']:.2f}{marks[reached['stall']]} "
                f"| {row['longest_memcpy_memcpies']:.2f} | {row['memcpy_seconds']:.4f}"
            )
        lines.append(
            f"| {row['every']} | {row['step_seconds']:.3f} "
            f"| {row['slowdown_percent']:.1f} [{row['slowdown_low']:.1f}, {row['slowdown_high']:.1f}]"
            f"{marks[reached['slowdown']]} | {row['copy_slowdown_percent']:.1f} "
            f"| {row['longest_stall_longest_copies']:.2f} "
            f"| {row['longest_stall_copies']:.2f} | {row['median_stall_copies']:.2f} "
            f"| {row['longest_copy_copies']:.2f} | {row['copy_seconds']:.4f} | {memcpies} | {extra} "
            f"| {row['snapshot_disk_bytes'] / 1e6:.1f} |"
        )
    under = [row["every"] for row in rows if row["slowdown_percent"] < 5]
    lines += ["", f"Smallest interval measured with a slowdown under 5 %: {min(under) if under else 'none'}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", help="distilbert; gpt2 with 124M parameters on CUDA")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the workload")
    parser.add_argument("--every", type=int, nargs="+", help="steps between snapshots, one row each")
    parser.add_argument("--rounds", type=int, help="of four blocks each (on CUDA three)")
    parser.add_argument("--steps", type=int, help="of a block, about; a multiple of the interval")
    parser.add_argument("--full", action="store_true", help="more rounds and more intervals")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where the stores go, for as long as it takes")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts/results", help="folder for the rows")
    parser.add_argument("--name", help="of the files there; record, or record-cuda")
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    name = given.workload or ("gpt2" if cuda else "distilbert")
    common = () if given.workload else GPT2_124M if cuda else ("batch=8",)
    options = parse_assignments([*common, *given.set])
    intervals = given.every or ([50, 20, 10, 5, 2, 1] if cuda else [5, 20, 10, 2, 1] if given.full else [5])
    rows = []
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    try:
        training = Training(name, options, resolve_device(given.device))
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for every in intervals:
                steps = every * max(1, round((given.steps or (50 if cuda else 10)) / every))
                rounds = given.rounds or (30 if given.full else 12 if cuda else 24)
                with threads(training.workload.threads):
                    row = measure(training, every, rounds, steps, Path(folder))
                if rows:  # a process has one peak
                    row["extra_bytes"] = row["extra_device_bytes"] = None
                rows.append(about(training, name, options) | row)
                rows[-1]["reached"] = bar(rows[-1])
                print(json.dumps(rows[-1]), flush=True)
    except FarcliError as error:
        sys.exit(f"bench_record: error: {error}" + (f"\n  {error.hint}" if error.hint else ""))
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / (given.name or ("record-cuda" if cuda else "record"))
    file.with_suffix(".ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows), file=sys.stderr)


def about(training: Training, name: str, options: dict[str, str]) -> dict[str, Any]:
    """What was trained on what."""
    cuda = training.device.type == "cuda"
    return {
        "schema": 4,
        "workload": name,
        "options": [f"{key}={value}" for key, value in options.items()],
        "batch": getattr(training.workload.config, "batch", None),
        "dtype": training.workload.config.dtype,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
