"""How good `far` is on linear regressions, beside the train mean and LFD-2: many seeds, paired intervals, coverage.

    python scripts/far_d2.py                 # protocol D2 (SCIENCE, section 7), data seeds 0 to 39
    python scripts/far_d2.py --full-batch    # the noise-free test bed: full batch, float64
    python scripts/far_d2.py --optimiser adam --first 40 --seeds 20    # one column, more seeds; only printed

50 runs a seed, 30 to train, 20 to test; n = 4 → w_199. Errors are means over both coordinates, the test runs and the
seeds. "far − mean" is a paired difference with a 95 % bootstrap interval over seeds and, within them, test runs.
Seeds 100 to 119 of D2 were looked at while `far` was made; seeds 0 to 39 were not. Rows are appended to the NDJSON
file as they come, and what it holds is not computed again.

Shape suffixes: Z seeds, R test runs, D coordinates.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from farcli import Trajectory, fit, record
from farcli.artefact import load
from farcli.forecasters.base import FittedForecaster, Prefix

OPTIMISERS = ("sgd", "adam", "adamw", "rmsprop", "adagrad")
HEADINGS = ("SGD", "Adam", "AdamW", "RMSProp", "Adagrad")
D2 = {"noise": "0.31622776601683794", "batch": "32"}
FULL_BATCH = {"dtype": "float64"}
RUNS, TRAIN, SNAPSHOTS, LAST = 50, 30, 5, 199
METHODS = {"far": {}, "lfd2": {"ridge": "loo", "groups": "tensor", "guard": "true", "intervals": "true"}, "mean": {}}
PUBLISHED_GFM = (0.021, 0.020, 0.016, 0.019, 0.013)
FLOOR = (0.0077, 0.0102, 0.0100, 0.0089, 0.0083)
GOALS = {False: (0.009, 0.0127, 0.0123, 0.0115, 0.0105), True: (1e-4, 2e-3, 2e-3, 1e-4, 1e-4)}


def recorded(folder: Path, optimiser: str, seed: int, full_batch: bool) -> Path:
    store = folder / (f"full-{optimiser}-{seed}.zarr" if full_batch else f"{optimiser}-{seed}-{RUNS}.zarr")
    if not (store / "zarr.json").exists():
        every = 1 if full_batch else 4
        options = {"optimizer": optimiser, **(FULL_BATCH if full_batch else D2)}
        record("linreg", store, runs=RUNS, steps=LAST * every, every=every, seed=seed, options=options, resume=True)
    return store


def row_of(store: Path, method: str, every: int) -> dict:
    """Squared errors [R] of a method's test runs, its interval's width and coverage."""
    output = store.with_suffix(f".{method}.safetensors")
    began = time.perf_counter()
    fitted = fit(
        method,
        [str(store)],
        output,
        context=SNAPSHOTS,
        targets=str(LAST * every),
        train_runs=f"0:{TRAIN}",
        options=METHODS[method],
        device="cpu",
        replace=True,
    )
    artefact = load(output)
    output.unlink()
    forecaster = artefact.forecaster
    assert isinstance(forecaster, FittedForecaster)
    steps_C = forecaster.observed(artefact.context)
    trajectory = Trajectory.open(store)
    weights_RTD = torch.from_numpy(trajectory.read(list(range(TRAIN, RUNS)), [*steps_C, LAST * every], 0, 2))
    prefix = Prefix(
        weights_BCD=weights_RTD[:, :-1],
        steps_C=steps_C,
        layout=artefact.problem.layout,
        start=0,
        runs_B=tuple(range(RUNS - TRAIN)),
    )
    error_RD = (forecaster.forecast(prefix, (LAST * every,))[:, 0] - weights_RTD[:, -1]).double()
    half = forecaster.half_width(prefix, (LAST * every,))
    row = {"errors": error_RD.square().mean(1).tolist(), "seconds": time.perf_counter() - began}
    if half is not None:
        row |= {"covered": float((error_RD.abs() <= half[:, 0]).double().mean()), "width": float(2 * half.mean())}
    return row | {key: fitted[key] for key in ("chosen", "because", "share_of_lfd2") if key in fitted}


def difference(errors_ZR: np.ndarray, others_ZR: np.ndarray) -> tuple[float, float, float]:
    """Mean difference, and its 95 % interval: seeds drawn with replacement, and runs within each."""
    generator = np.random.default_rng(0)
    paired_ZR = errors_ZR - others_ZR
    seeds, runs = paired_ZR.shape
    draws = []
    for _ in range(10_000):
        chosen_Z = generator.integers(seeds, size=seeds)
        draws.append(paired_ZR[chosen_Z[:, None], generator.integers(runs, size=(seeds, runs))].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(paired_ZR.mean()), float(low), float(high)


def markdown(rows: list[dict], full_batch: bool, seeds: list[int], optimisers: list[str]) -> str:
    places = [OPTIMISERS.index(optimiser) for optimiser in optimisers]
    headings = [HEADINGS[place] for place in places]
    published, floor, goals = ([values[p] for p in places] for values in (PUBLISHED_GFM, FLOOR, GOALS[full_batch]))

    def of(method: str, optimiser: str, key: str) -> np.ndarray:
        chosen = {row["seed"]: row[key] for row in rows if (row["method"], row["optimiser"]) == (method, optimiser)}
        return np.array([chosen[seed] for seed in seeds])

    form = (lambda value: f"{value:.2g}") if full_batch else (lambda value: f"{value:.4f}")

    def line(name: str, cells: list[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    command = "python scripts/far_d2.py" + (" --full-batch" if full_batch else "")
    title = "full batch, float64" if full_batch else "protocol D2"
    lines = [f"# `far` on linear regressions, {title}: test MSE of w_199 from w_0 … w_4", ""]
    lines += [f"Data seeds {seeds[0]} to {seeds[-1]}, 20 test runs each. `{command}`", ""]
    lines += [line("", headings), "|---|" + "---|" * len(headings)]
    if not full_batch:
        lines.append(line("published GFM", [f"{value:g}" for value in published]))
    for method, name in (
        ("mean", "train mean"),
        ("lfd2", "LFD-2, a map per tensor, ridge by leave-one-out"),
        ("far", "**far**"),
    ):
        cells = [of(method, optimiser, "errors").mean(1) for optimiser in optimisers]
        lines.append(line(name, [f"{form(cell.mean())} ({form(cell.std(ddof=1))})" for cell in cells]))
    differences = [difference(of("far", o, "errors"), of("mean", o, "errors")) for o in optimisers]
    lines.append(line("far − mean [95 %]", [f"{form(d)} [{form(a)}, {form(b)}]" for d, a, b in differences]))
    lines.append(line("goal", [f"{value:g}" for value in goals]))
    if not full_batch:
        lines.append(line("*floor by our research notes, 8000 more runs*", [f"{value:g}" for value in floor]))
    for method in ("far", "lfd2"):
        cells = [(of(method, o, "covered").mean(), of(method, o, "width").mean()) for o in optimisers]
        lines.append(line(f"{method}: 90 % intervals cover (mean width)", [f"{c:.1%} ({form(w)})" for c, w in cells]))
    lines.append(line("far: seconds a fit", [f"{of('far', o, 'seconds').mean():.1f}" for o in optimisers]))
    reached = [float(of("far", o, "errors").mean()) <= goal for o, goal in zip(optimisers, goals, strict=True)]
    told = ", ".join(f"{name} {'reached' if ok else 'MISSED'}" for name, ok in zip(headings, reached, strict=True))
    chosen = {row["chosen"] for row in rows if row["method"] == "far"}
    return "\n".join([*lines, "", f"Goals: {told}. `far` chose: {', '.join(sorted(chosen))}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="how many data seeds; 40, or 20 with --full-batch, when not said")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--full-batch", action="store_true", help="full batch and float64 instead of protocol D2")
    parser.add_argument("--optimiser", choices=OPTIMISERS, help="only this one; the table is printed, not written")
    parser.add_argument("--runs", type=Path, default=Path("runs/gfm"), help="where recordings are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (20 if arguments.full_batch else 40)
    torch.set_num_threads(1)
    for folder in (arguments.runs, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    name = "far-full-batch" if arguments.full_batch else "far-d2"
    rows_file = arguments.out / f"{name}.ndjson"
    rows = [json.loads(text) for text in rows_file.read_text().splitlines()] if rows_file.exists() else []
    known = {(row["method"], row["optimiser"], row["seed"]) for row in rows}
    optimisers: list[str] = [arguments.optimiser] if arguments.optimiser else list(OPTIMISERS)
    seeds = list(range(arguments.first, arguments.first + arguments.seeds))
    with rows_file.open("a") as lines:
        for seed in seeds:
            for optimiser in optimisers:
                for method in METHODS:
                    if (method, optimiser, seed) in known:
                        continue
                    store = recorded(arguments.runs, optimiser, seed, arguments.full_batch)
                    row = {"method": method, "optimiser": optimiser, "seed": seed}
                    row |= row_of(store, method, 1 if arguments.full_batch else 4)
                    rows.append(row)
                    print(json.dumps(row), file=lines, flush=True)
            print(f"seed {seed}: done", flush=True)
    text = markdown(rows, arguments.full_batch, seeds, optimisers)
    if arguments.optimiser is None:
        (arguments.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
