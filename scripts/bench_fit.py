"""Benchmark of `farcli fit` in little memory: what every method holds of a trajectory that is much larger.

    python scripts/bench_fit.py                   # 1.4 GB, a few minutes
    python scripts/bench_fit.py --full            # 4.4 GB
    python scripts/bench_fit.py --store RUNS      # a store of your own, with 16 snapshots or more

The trajectory is 6 runs of a language model's tensors (embedding, attention, feed-forward, norms) at 16 snapshots,
which move along a decaying drift with noise. Every fit is a process of its own, under `--memory 512M`, with as many
updates as show what it holds, not as many as make it good.

- `over_torch`: peak RSS of the process over that of an interpreter that imports torch and does nothing. Bar: the
  budget, nothing more.
- `of_read`: bytes it looks at a second, over those of a verified read of the whole trajectory by the same stream, in a
  process of its own right before and after. 1 is as fast as reading alone, in one pass; several cannot reach it.
- Methods that need room for each parameter have to refuse this one with exit code 6 and name the largest D they can:
  they are then fitted on stores of just that D, within the same bar, and of the next one, which they have to refuse.

Rows go to `scripts/results/fit.ndjson`, tables to `fit.md`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import machine

from farcli import inspect, record
from farcli.forecasters.base import Coupling
from farcli.layout import layout_of
from farcli.store import Trajectory, TrajectoryWriter
from farcli.stream import Source, Stream

ROOT = Path(__file__).parents[1]
PROGRAM = str(Path(sys.executable).with_name("farcli"))
MEMORY = 512_000_000
RUNS, CONTEXT, STEPS = 6, 5, range(0, 160, 10)
REFUSED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A method, its options, and what is forecast: every later snapshot where `targets` is empty."""

    method: str
    options: tuple[str, ...] = ()
    targets: str = ""
    context: int = CONTEXT

    @property
    def label(self) -> str:
        context = (f"context={self.context}",) if self.context != CONTEXT else ()
        return " ".join((self.method, *self.options, *context))

    def words(self, store: Path, output: Path) -> list[str]:
        words = [PROGRAM, "fit", self.method, str(store), "-o", str(output), "--force", "--memory", str(MEMORY)]
        words += ["--context", str(self.context), "--device", "cpu", "--format", "ndjson"]
        words += ["--to", self.targets] if self.targets else []
        return words + [word for option in self.options for word in ("--set", option)]


FEW = ("updates=10",)
JUDGED = ("updates=30", "validation=0.2")
STREAMED = (
    Asked(method="mean", targets="150"),
    Asked(method="drift", targets="150"),
    Asked(method="lfd2"),
    Asked(method="lfd2", options=("groups=tensor", "scale=tensor")),
    Asked(method="lfd2", options=("ridge=loo", "guard=true", "intervals=true")),
    Asked(method="lfd2", options=("loss=l1", "beta=1", "max_passes=3")),
    Asked(method="far"),
    Asked(method="gfm", options=(*JUDGED, "channels=shared", "batch=1024")),
    Asked(method="introspection", options=JUDGED),
    Asked(method="wnn", options=JUDGED),
    Asked(method="dlinear", options=JUDGED),
    Asked(method="lstm", options=JUDGED),
    Asked(method="transformer", options=JUDGED),
)
LIMITED = (
    Asked(method="mean"),
    Asked(method="lfd2", options=("map=dense",)),
    Asked(method="lfd2", options=("map=dense", "ridge=loo")),
    Asked(method="gfm", options=FEW),
    Asked(method="dlinear", options=(*FEW, "channels=joint")),
    Asked(method="lstm", options=(*FEW, "channels=joint")),
    Asked(method="transformer", options=(*FEW, "channels=joint")),
)
BY_LOSS = (Asked(method="loss-lfd", options=FEW), Asked(method="loss-lfd", options=FEW, context=8))
STEP = 4
"""Parameters by which recordings with a loss differ in size."""


# ------------------------------------------------------------------------------------------------- trajectories


def language_model(layers: int, width: int = 256, words: int = 8192) -> list[tuple[str, tuple[int, ...], str, str]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding.weight", (words, width))]
    for layer in range(layers):
        for name, out, into in (("qkv", 3, 1), ("project", 1, 1), ("up", 4, 1), ("down", 1, 4)):
            shapes.append((f"{layer}.{name}.weight", (out * width, into * width)))
            shapes.append((f"{layer}.{name}.bias", (out * width,)))
        shapes += [(f"{layer}.norm{i}.{kind}", (width,)) for i in (1, 2) for kind in ("weight", "bias")]
    return [(name, shape, "float32", "parameter") for name, shape in shapes]


def make_store(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], str, str]]) -> None:
    layout = layout_of(list(tensors))
    spread_D = np.empty(layout.size, np.float32)
    for slot in layout.floats:
        spread_D[slot.offset : slot.stop] = 0.02 if len(slot.shape) == 1 else slot.shape[-1] ** -0.5
    rng = np.random.default_rng(0)
    with TrajectoryWriter.create(
        path, layout, list(range(RUNS)), planned_steps=STEPS, lockstep=False, sync="none", replace=True
    ) as writer:
        for run in range(RUNS):
            first_D, drift_D = (spread_D * rng.standard_normal(layout.size, dtype=np.float32) for _ in range(2))
            for index, step in enumerate(STEPS):
                noise_D = rng.standard_normal(layout.size, dtype=np.float32)
                moved_D = np.float32(1 - 0.9**index) * drift_D + np.float32(0.01 * index**0.5) * spread_D * noise_D
                writer.append(step, first_D + moved_D, run=run)
        writer.finish()


# ----------------------------------------------------------------------------------------------------- measures

_LAUNCH = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([done.returncode, peak, done.stdout, done.stderr]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a process came to: exit code, peak RSS in bytes, seconds, what it wrote."""

    code: int
    rss: int
    seconds: float
    out: str
    said: str


def launched(words: Sequence[str]) -> Done:
    """Run a program from a small process of its own: a child's peak is at least what its parent held at the fork."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _LAUNCH, *words], stdout=subprocess.PIPE, text=True, check=True)
    code, rss, out, said = json.loads(done.stdout)
    return Done(code=code, rss=rss, seconds=time.perf_counter() - began, out=out, said=said)


def idle_torch() -> int:
    return launched([sys.executable, "-c", "import torch"]).rss


def read(store: Path) -> float:
    """Seconds of a verified read of all runs and snapshots."""
    trajectory = Trajectory.open(store)
    began = time.perf_counter()
    for _ in Stream([Source(trajectory=trajectory, runs=tuple(trajectory.runs))], coupling=Coupling.COORDINATEWISE,
                    steps_C=trajectory.steps[:CONTEXT], steps_H=trajectory.steps[CONTEXT:],
                    memory=MEMORY, share=0.5):  # fmt: skip
        pass
    return time.perf_counter() - began


def reading(store: Path) -> Done:
    return launched([sys.executable, __file__, "--read", str(store)])


def streamed(asked: Asked, store: Path, output: Path, idle: int, before: float) -> tuple[dict[str, Any], float]:
    """A row, and how long the read after it took."""
    done = launched(asked.words(store, output))
    after = float(reading(store).out)
    found: dict[str, Any] = json.loads(done.out) if done.code == 0 else {"said": done.said.strip()}
    seconds = found.get("seconds")
    looked_at = len(inspect(str(output))["observed"]) + len(found["targets"]) if done.code == 0 else 0
    share = looked_at / len(Trajectory.open(store).steps)
    return {
        "method": asked.label,
        "targets": len(found.get("targets", ())),
        "snapshots": looked_at,
        "exit": done.code,
        "peak": done.rss,
        "over_torch": done.rss - idle,
        "seconds": seconds,
        "process_seconds": done.seconds,
        "read_seconds": (before + after) / 2,
        "of_read": share * (before + after) / 2 / seconds if seconds else None,
        "updates": found.get("updates"),
        "said": found.get("said"),
        "reached": done.code == 0 and done.rss - idle <= MEMORY,
    }, after


def refused(done: Done) -> tuple[str, int | None]:
    """What a refusal says, in one line, and the largest D that it names."""
    said = next((line for line in done.said.splitlines() if line.startswith("farcli")), done.said.strip())
    named = re.findall(r"allows D = (\d+)", said)
    return said, int(named[-1]) if named else None


def one_tensor(folder: Path, size: int) -> Path:
    """A store of exactly so many parameters."""
    make_store(folder / f"{size}.zarr", [("weight", (size,), "float32", "parameter")])
    return folder / f"{size}.zarr"


def with_loss(folder: Path, size: int) -> Path:
    """A recording of at most so many parameters whose training loss can be computed: GPT-2 with many positions."""
    options = {"data": str(ROOT / "README.md"), "tokens": "bytes", "layers": "1", "heads": "1", "width": str(STEP),
               "context": "16", "batch": "4"}  # fmt: skip

    def recorded(positions: int) -> Path:
        store = folder / f"gpt2-{positions}.zarr"
        record("gpt2", store, runs=RUNS, steps=STEPS[-1], every=STEPS.step, replace=True,
               options={**options, "positions": str(positions)})  # fmt: skip
        return store

    least = Trajectory.open(recorded(16)).layout.parameters
    return recorded(16 + (size - least) // STEP)


def limited(asked: Asked, store: Path, folder: Path, idle: int) -> dict[str, Any]:
    """A row: the refusal, and whether the D that it names is the largest."""
    sized, step = (with_loss, STEP) if asked in BY_LOSS else (one_tensor, 1)
    output = folder / "limited.safetensors"
    done = launched(asked.words(store, output))
    said, largest = refused(done)
    row: dict[str, Any] = {
        "method": asked.label,
        "parameters": Trajectory.open(store).layout.parameters,
        "exit": done.code,
        "said": said,
        "largest": largest,
        "over_torch": done.rss - idle,
    }
    if largest is None:
        return row | {"reached": False}
    fitted = launched(asked.words(sized(folder, largest), output))
    above = launched(asked.words(sized(folder, largest + step), output))
    row |= {
        "exit_at_largest": fitted.code,
        "over_torch_at_largest": fitted.rss - idle,
        "seconds_at_largest": json.loads(fitted.out)["seconds"] if fitted.code == 0 else None,
        "said_at_largest": fitted.said.strip() if fitted.code else None,
        "exit_above": above.code,
        "said_above": refused(above)[0] if above.code else None,
    }
    held = fitted.code == 0 and fitted.rss - idle <= MEMORY
    return row | {"reached": done.code == REFUSED == above.code and held}


# -------------------------------------------------------------------------------------------------------- tables


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    def megabytes(count: float) -> str:
        return f"{count / 1e6:.0f}"

    where = rows[0]["machine"]
    streams = [row for row in rows if row["table"] == "streamed"]
    limits = [row for row in rows if row["table"] == "limited"]
    lines = [
        f"{where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB, load {where['load']:.1f}, "
        f"OMP_NUM_THREADS={where['threads']}; python {where['python']}, torch {where['torch']}; {where['date']}.",
        f"{where['bytes'] / 1e9:.2f} GB: {where['runs']} runs × {where['snapshots']} snapshots × {where['size']:,} "
        f"parameters, in the page cache; `--memory {MEMORY // 10**6}M`. Yardsticks: an interpreter that imports torch "
        f"({megabytes(where['idle'])} MB); a verified read of everything, which takes "
        f"{where['read_over_torch'] / 1e6:.0f} MB over that.",
        f"Bar: peak RSS ≤ {megabytes(where['idle'])} MB + {MEMORY // 10**6} MB.",
        "",
        "| coordinate-wise | targets | MB over torch | | seconds | × speed of the read | updates |",
        "|---|---|---|---|---|---|---|",
    ]
    mark = {True: "reached", False: "**not reached**"}
    for row in streams:
        seconds = f"{row['seconds']:.1f} | {row['of_read']:.2f}" if row["seconds"] else f"exit {row['exit']} | "
        lines.append(
            f"| {row['method']} | {row['targets']} | {megabytes(row['over_torch'])} | {mark[row['reached']]} "
            f"| {seconds} | {row['updates'] or ''} |"
        )
    lines += [
        "",
        "| holds every parameter | refuses D | exit | names as the largest | at that D: exit, MB over torch, seconds "
        "| next D: exit | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in limits:
        cells = "| | |"
        if row["largest"] is not None:
            seconds = f", {row['seconds_at_largest']:.1f}" if row["seconds_at_largest"] else ""
            at = f"{row['exit_at_largest']}, {megabytes(row['over_torch_at_largest'])}{seconds}"
            cells = f"{row['largest']:,} | {at} | {row['exit_above']} |"
        lines.append(f"| {row['method']} | {row['parameters']:,} | {row['exit']} | {cells} {mark[row['reached']]} |")
    lines += ["", "What they say:", ""] + [f"- `{row['said']}`" for row in limits if row["said"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="4.4 GB")
    parser.add_argument("--store", type=Path, help="take this store, and make none")
    parser.add_argument("--only", help="methods, with or without options, comma-separated; other rows stay")
    parser.add_argument("--folder", type=Path, help="where stores go, for as long as it takes")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts/results", help="folder for the rows")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(read(given.read))
        return
    wanted = set(given.only.split(",")) if given.only else None
    rows: list[dict[str, Any]] = []

    def keep(table: str, row: dict[str, Any]) -> None:
        rows.append({"table": table, **row, "machine": where})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        store = given.store or folder / "big.zarr"
        if given.store is None:
            make_store(store, language_model(12 if given.full else 2))
        trajectory = Trajectory.open(store)
        idle = idle_torch()
        reading(store)  # into the page cache
        first = reading(store)
        where = machine() | {
            "size": trajectory.layout.size,
            "runs": len(trajectory.runs),
            "snapshots": len(trajectory.steps),
            "bytes": trajectory.layout.size * len(trajectory.runs) * len(trajectory.steps) * trajectory.dtype.itemsize,
            "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
            "load": os.getloadavg()[0],
            "date": time.strftime("%Y-%m-%d"),
            "idle": idle,
            "read_over_torch": first.rss - idle,
        }
        took = float(first.out)
        for asked in STREAMED:
            if wanted is None or {asked.method, asked.label} & wanted:
                row, took = streamed(asked, store, folder / "fitted.safetensors", idle, took)
                keep("streamed", row)
        for asked in (*LIMITED, *BY_LOSS):
            if wanted is None or {asked.method, asked.label} & wanted:
                with tempfile.TemporaryDirectory(dir=folder) as small:
                    large = with_loss(Path(small), 3_000_000) if asked in BY_LOSS else store
                    keep("limited", limited(asked, large, Path(small), idle))
    given.results.mkdir(parents=True, exist_ok=True)
    file = given.results / "fit.ndjson"
    before = file.read_text(encoding="utf-8").splitlines() if wanted and file.exists() else []
    found = {(row["table"], row["method"]): row for row in (*map(json.loads, before), *rows)}
    file.write_text("".join(json.dumps(row) + "\n" for row in found.values()), encoding="utf-8")
    table = markdown(list(found.values()))
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
