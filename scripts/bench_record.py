"""What recording costs a training: `python scripts/bench_record.py` prints a row for each interval, as NDJSON.

The same training, in one process, in alternating blocks with and without recording, so that a loaded machine hits
both alike. `slowdown` compares the medians over blocks; a `stall` is the time the recorder holds up one step,
against `copy`, a plain in-memory copy of the weights measured between the blocks.
"""

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from farcli.recording.recorder import Recorder


def bert(width: int, depth: int, vocabulary: int) -> nn.Module:
    """A network of DistilBERT's shape: 22.6 M parameters at width 384, depth 6."""
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout=0.1, batch_first=True)
    body = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(vocabulary, width), body, nn.Linear(width, 2))


class Timed(Recorder):
    """The recorder with a clock on its hooks."""

    def __init__(self, *words: object, **options: object) -> None:
        super().__init__(*words, **options)  # pyright: ignore[reportArgumentType]
        self.stalls: list[float] = []
        self.seconds = 0.0

    def _before(self, optimizer: object) -> None:
        began = time.perf_counter()
        super()._before(optimizer)
        self.seconds = time.perf_counter() - began

    def _after(self, optimizer: object) -> None:
        began = time.perf_counter()
        super()._after(optimizer)
        self.stalls.append(self.seconds + time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, nargs="+", default=[5])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()

    device = torch.device(args.device)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model = bert(args.width, args.depth, args.vocabulary).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    tokens = torch.randint(0, args.vocabulary, (args.batch, args.length), device=device)
    labels = torch.randint(0, 2, (args.batch,), device=device)

    def block() -> list[float]:
        """Seconds of each step of a block."""
        seconds = []
        for _ in range(args.steps):
            began = time.perf_counter()
            loss = nn.functional.cross_entropy(model(tokens).mean(1), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return seconds

    def copy() -> float:
        began = time.perf_counter()
        copies = [parameter.detach().clone() for parameter in model.parameters()]
        if cuda:
            torch.cuda.synchronize()
        del copies
        return time.perf_counter() - began

    block()
    for every in args.every:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        plain, recorded, stalls, copies, size = [], [], [], [], 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(args.blocks):
            plain += block()
            copies.append(copy())
            recorder = Timed(model, optimizer, folder / f"{number}.zarr", every=every, start_step=0)
            with recorder:
                recorded += block()
            stalls += recorder.stalls
            size += sum(path.stat().st_size for path in (folder / f"{number}.zarr").rglob("*") if path.is_file())
            shutil.rmtree(folder / f"{number}.zarr")
        shutil.rmtree(folder)
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        print(
            json.dumps(
                {
                    "schema": 1,
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "batch": args.batch,
                    "every": every,
                    "steps": len(recorded),
                    "step_seconds": round(median(plain), 5),
                    "slowdown_percent": round(100 * (sum(recorded) / sum(plain) - 1), 2),
                    "slowdown_median_percent": round(100 * (median(recorded) / median(plain) - 1), 2),
                    "copy_seconds": round(median(copies), 5),
                    "longest_stall_seconds": round(max(stalls), 5),
                    "longest_stall_copies": round(max(stalls) / median(copies), 2),
                    "extra_bytes": extra,
                    "disk_bytes": size,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
