"""Warm starts: what eight sibling runs cost when the first is trained and the others begin where it ended.

    make leap-warm

Siblings have the same network and other data: the same in another order, or another text altogether (`gpt2` on the
second half of the training text after the first half). Every sibling is also trained cold, with the same schedule and
the rate that `make leap-bench` found best for WSD, and its cold final held-out loss is what its warm run has to
reach. Warm runs have budgets of 5, 10, 20 and 40 % of the cold one and learning rates of their own, chosen on a
sibling that is not reported. A warm start is no acceleration: the total has the first run's cost in it, and the
weights have seen the first run's data as well.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.05, 0.1, 0.2, 0.4)
TUNING = 100
SEEDS = (0, 1, 2, 3, 4, 5, 6, 7, TUNING)
"""The first run, its seven siblings, and one that learning rates are chosen on."""
FACTORS = (0.1, 0.3, 1.0)
_GPT2 = {"layers": "2", "heads": "2", "width": "64", "context": "64", "batch": "16", "windows": "256"}
_CNN = {"optimizer": "adamw", "held_out": "2000", "batch": "64"}
TASKS: dict[str, dict[str, Any]] = {
    "gpt2, same text in another order": {
        "workload": "gpt2",
        "options": _GPT2,
        "steps": 600,
        "rate": 3e-3,
        "warmup": 0.2,
    },
    "gpt2, another text": {"workload": "gpt2", "options": _GPT2, "steps": 600, "rate": 3e-3, "warmup": 0.2},
    "cnn, same images in another order": {
        "workload": "nas-cnn",
        "options": _CNN,
        "steps": 500,
        "rate": 5e-3,
        "warmup": 0.1,
    },
}


def halves(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Data of the first run and of the others: the two halves of the training text, the same text held out."""
    from farcli.workloads.texts import running_text

    text = running_text("shakespeare")
    middle = len(text.train) // 2
    parts = {"first": text.train[:middle], "others": text.train[middle:], "held_out": text.held_out}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_bytes(part)
    held_out = {"held_out": str(folder / "held_out.txt")}
    return {"data": str(folder / "first.txt"), **held_out}, {"data": str(folder / "others.txt"), **held_out}


def train(
    task: str, data: dict[str, str], seed: int, first: list[float] | None, budget: float, factor: float
) -> dict[str, Any]:
    """One training, cold or from a vector: its final loss, and, cold, its final weights."""
    import numpy as np
    import torch

    from farcli.speculation.leaper import Leaper
    from farcli.training import TrainingRun, run_seed, workload_from

    torch.set_num_threads(1)
    what = TASKS[task]
    steps = max(1, round(what["steps"] * budget))
    options = {
        **what["options"],
        **data,
        "schedule": "wsd",
        "lr": str(what["rate"] * factor),
        "warmup": str(max(1, round(what["warmup"] * steps))),
    }
    workload = workload_from(what["workload"], options, steps=steps)
    own = run_seed(seed, 0)
    training = TrainingRun(workload, [own])
    if first is not None:
        training.load(np.array([first], training.vectors().dtype))
    memory = max(2, round(0.05 * steps))
    leaper = Leaper(training.model, training.optimizer, [], gate="none", memory=memory, stride=1)
    with leaper:
        training.advance(steps)
    with leaper.average():
        loss = workload.evaluate(training.model, own)["loss"]
        weights = training.vectors()[0].tolist() if first is None else None
    return {"loss": loss, "steps": steps, "weights": weights}


def _train(words: tuple[Any, ...]) -> dict[str, Any]:
    return train(*words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    words = parser.parse_args()
    kept = RESULTS / "leap-warm.ndjson"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    with ProcessPoolExecutor(words.jobs) as pool, TemporaryDirectory() as folder:
        for task, what in TASKS.items():
            if any(row["task"] == task for row in rows):
                continue
            own, other = halves(Path(folder)) if task == "gpt2, another text" else ({}, {})
            cold = list(pool.map(_train, [(task, own if seed == 0 else other, seed, None, 1.0, 1.0) for seed in SEEDS]))
            first = cold[0]["weights"]
            tried = [(budget, factor) for budget in BUDGETS for factor in FACTORS]
            swept = pool.map(_train, [(task, other, TUNING, first, *each) for each in tried])
            losses = dict(zip(tried, (row["loss"] for row in swept), strict=True))
            for budget in BUDGETS:
                factor = min(FACTORS, key=lambda factor: losses[budget, factor])
                warm = list(pool.map(_train, [(task, other, seed, first, budget, factor) for seed in SEEDS[1:-1]]))
                pairs = [(row["loss"], beside["loss"]) for row, beside in zip(warm, cold[1:-1], strict=True)]
                total = 1 + len(warm) * budget
                rows.append(
                    {
                        "task": task,
                        "budget": budget,
                        "rate": what["rate"] * factor,
                        "cold_loss": fmean(loss for _, loss in pairs),
                        "warm_loss": fmean(loss for loss, _ in pairs),
                        "not_worse": sum(loss <= beside for loss, beside in pairs),
                        "siblings": len(pairs),
                        "total": total,
                        "ratio": (1 + len(warm)) / total,
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        "| siblings | budget of each | lr | cold loss | warm loss | not worse | total of eight, in runs | less by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['task']} | {row['budget']:.0%} | {row['rate']:g} | {row['cold_loss']:.4f} | {row['warm_loss']:.4f} | "
        f"{row['not_worse']} of {row['siblings']} | {row['total']:.2f} | {row['ratio']:.2f}× |"
        for row in rows
    ]
    (RESULTS / "leap-warm.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
