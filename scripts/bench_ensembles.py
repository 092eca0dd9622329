"""Whether an ensemble is fitted faster in one go (`torch.func.vmap`) than one network after the other.

    python scripts/bench_ensembles.py             # 5 networks, 100 updates

For every method that is fitted by gradient and that `vmap` has rules for, over mini-batches of 16 to 1024 examples:
processor seconds, on one thread, of five networks one by one over those of five in one go, the median of alternating
pairs. `vectorised_batch` of a method is where that ceases to be above 1. The table goes to
scripts/results/ensembles.md.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from farcli.fitting.descent import descend
from farcli.forecasters.base import Coupling, Prefix, Problem, TrainedForecaster
from farcli.forecasters.table import FORECASTERS
from farcli.layout import layout_of
from farcli.registry import resolve

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gfm", {}),
    ("gfm", {"channels": "shared"}),
    ("introspection", {}),
    ("wnn", {}),
    ("dlinear", {}),
    ("dlinear", {"channels": "joint"}),
    ("transformer", {}),
    ("transformer", {"channels": "joint"}),
)
BATCHES = (16, 64, 256, 1024)
SIZE = 15
"""D of joint networks: that of GFM's own experiment; shared ones see pairs of as many runs."""


def seconds(forecaster: TrainedForecaster, problem: Problem, weights: torch.Tensor, together: bool) -> float:
    """Processor seconds of one fit."""
    observed = forecaster.observed(problem.steps_C)
    rows = [problem.steps_C.index(step) for step in observed]
    prefix = Prefix(weights_BCD=weights[:, rows], steps_C=observed, layout=problem.layout, start=0,
                    runs_B=tuple(range(len(weights))))  # fmt: skip
    truth = weights[:, len(problem.steps_C) :]
    problem = replace(problem, steps_C=observed)
    type(forecaster).vectorised_batch = forecaster.config.batch if together else 0  # what is to be decided
    began = time.process_time()
    descend(forecaster, problem, lambda: [(prefix, truth)])
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    layout = layout_of([("weights", (SIZE,), "float32", "parameter")])
    rows = []
    for name, options in CASES:
        cls = resolve("forecaster", name, FORECASTERS)
        for batch in BATCHES:
            runs = max(4, batch if cls(cls.Config(**options)).coupling is Coupling.JOINT else -(-batch // SIZE))
            weights = torch.randn(runs, 6, SIZE, generator=torch.Generator().manual_seed(0)).cumsum(1)
            problem = Problem(layout=layout, coordinates=SIZE, runs=runs, steps_C=(0, 1, 2, 3, 4), steps_H=(9,),
                              memory=10**9)  # fmt: skip
            ratios, alone = [], []
            for _ in range(given.pairs):
                config = cls.Config(batch=batch, updates=given.updates, epochs=given.updates,
                                    ensemble=given.networks, **options)  # fmt: skip
                spent = [seconds(cls(config), problem, weights, together) for together in (False, True)]
                ratios.append(spent[0] / spent[1])
                alone.append(1000 * spent[0] / given.updates)
            row = {
                "method": name,
                "options": options,
                "batch": batch,
                "networks": given.networks,
                "milliseconds": median(alone),
                "faster": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    (given.out / "ensembles.md").write_text(markdown(rows, given.networks), encoding="utf-8")


def markdown(rows: list[dict[str, Any]], networks: int) -> str:
    lines = [
        f"# {networks} networks fitted in one go: how many times faster than one by one",
        "",
        "Processor time on one thread, median of alternating pairs [least, most]; `make bench-ensembles`.",
        "",
        "| method | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    for name, options in CASES:
        own = [row for row in rows if (row["method"], row["options"]) == (name, options)]
        cells = [f"{row['faster']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in own]
        lines.append(
            f"| {' '.join([name, *(f'{key}={value}' for key, value in options.items())])} | " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
