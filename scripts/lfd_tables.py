"""Reproduce the experiments of LFD-2 farcasting (arXiv 2505.02714) with farcli, and answer what it leaves open.

    python scripts/lfd_tables.py syn1        # linear regression by SGD: near and far, beside yardsticks
    python scripts/lfd_tables.py ablation    # with and without the gradient-decay loss, on longer training
    python scripts/lfd_tables.py cnn         # a small convolutional network on real images
    python scripts/lfd_tables.py break       # where a linear map of two snapshots breaks
    python scripts/lfd_tables.py horizon     # how far ahead a forecast is worth its verification
    python scripts/lfd_tables.py distilbert  # a real fine-tuning of 22,713,218 parameters, streamed

The paper's result tables could not be found: nothing here is compared with its figures. Every table holds the
yardsticks of `farcli eval` and, where a loss is at hand, the true future and chance. Recordings are kept under --runs,
rows go to scripts/results as NDJSON, a Markdown table and a picture. `--full` takes more runs and seeds.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farcli import evaluate, fit, record
from farcli.layout import layout_of
from farcli.store import Trajectory, TrajectoryWriter
from farcli.verbs.plot import saved_panels

CONTEXT = 5
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training and what is forecast of it.

    Attributes:
        name: of the case, in tables and file names.
        workload: to record, or "" for trajectories made by `made`.
        options: of the workload.
        steps: of each run.
        every: steps between snapshots.
        runs: how many; the first two thirds are fitted on, the others judged.
        start: step of the last observed snapshot.
        targets: steps that are forecast.
        made: makes trajectories [runs, snapshots, D] of a seed, instead of a workload.
        seeds: data seeds, where they are fewer than asked for: recordings of large networks take long.
        memory: bytes that the data may take.
        far: options of `far`, where it is weighed.
    """

    name: str
    workload: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    steps: int
    every: int
    runs: int
    start: int
    targets: Sequence[int]
    made: Callable[[int], np.ndarray] | None = None
    seeds: int | None = None
    memory: int = 2_000_000_000
    far: Mapping[str, str] = field(default_factory=dict)

    @property
    def train(self) -> int:
        return self.runs * 2 // 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A method with its options, and what the table calls it."""

    label: str
    method: str
    options: Mapping[str, str] = field(default_factory=dict)


LFD2 = Asked(label="lfd2", method="lfd2")


def recorded(case: Case, folder: Path, seed: int) -> Path:
    store = folder / f"{case.name}-{case.steps}-{case.every}-{case.runs}-{seed}.zarr"
    if (store / "zarr.json").exists():
        return store
    if case.made is None:
        record(
            case.workload,
            store,
            runs=case.runs,
            steps=case.steps,
            every=case.every,
            seed=seed,
            options=case.options,
            resume=True,
        )
        return store
    weights_RTD = case.made(seed)
    steps = range(0, case.steps + 1, case.every)
    layout = layout_of([("weight", (weights_RTD.shape[2],), "float32", "parameter")])
    with TrajectoryWriter.create(
        store, layout, list(range(case.runs)), planned_steps=steps, lockstep=True, replace=True
    ) as writer:
        for index, step in enumerate(steps):
            writer.append(step, weights_RTD[:, index].astype(np.float32))
        writer.finish()
    return store


def weighed(case: Case, methods: Sequence[Asked], arguments: argparse.Namespace) -> Rows:
    """Rows of `farcli eval` on the runs nobody was fitted on, over all data seeds."""
    rows: Rows = []
    for seed in range(min(arguments.seeds, case.seeds or arguments.seeds)):
        store = recorded(case, arguments.runs, seed)
        files = []
        for asked in methods:
            file = arguments.runs / f"{asked.label.replace(' ', '-').replace('/', '-')}.safetensors"
            fit(
                asked.method,
                [str(store)],
                file,
                context=CONTEXT,
                start=case.start,
                targets=",".join(map(str, case.targets)),
                train_runs=f"0:{case.train}",
                options=dict(asked.options),
                memory=case.memory,
                device="cpu",
                replace=True,
            )
            files.append(str(file))
        found = evaluate(files, str(store), targets=",".join(map(str, case.targets)), memory=case.memory, device="cpu")
        for step in case.targets:
            members = [row for row in found if row["step"] == step]
            named = [row for row in members if row["role"] == "forecast"]  # in the order they were named
            for row, asked in zip(named, methods, strict=True):
                row["method"] = asked.label
            rows += [{"case": case.name, "seed": seed, **row} for row in members]
    return rows


def pooled(rows: Rows) -> Rows:
    """Means over data seeds of every (case, step, method)."""
    keys = ("mse", "skill", "cosine", "loss", "equivalent_steps", "net_steps", "better")
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault((row["case"], row["step"], row["method"]), []).append(row)
    found = []
    for members in groups.values():
        means = {key: [m[key] for m in members if m.get(key) is not None] for key in keys}
        found.append(
            {**members[0], "seeds": len(members)} | {key: float(np.mean(v)) if v else None for key, v in means.items()}
        )
    return found


def table(rows: Rows, title: str, command: str, columns: Sequence[str], notes: Sequence[str]) -> str:
    """A Markdown table for each case: methods down, horizons across, one figure or several a cell."""
    forms = {"mse": ".2e", "skill": "+.3f", "loss": ".3g", "equivalent_steps": "+.0f", "net_steps": "+.0f"}
    lines = [f"# {title}", "", f"`{command}`; means over the runs judged and data seeds.", ""]
    for case in dict.fromkeys(row["case"] for row in rows):
        members = [row for row in rows if row["case"] == case]
        steps = list(dict.fromkeys(row["step"] for row in members))
        head = [f"{step} (+{next(m['ahead'] for m in members if m['step'] == step)})" for step in steps]
        shown = [key for key in columns if any(row.get(key) is not None for row in members)]
        lines += [f"## {case}", "", " / ".join(shown), "", "| | " + " | ".join(head) + " |"]
        lines.append("|---|" + "---|" * len(steps))
        for method in dict.fromkeys(row["method"] for row in members):
            cells = []
            for step in steps:
                row = next((m for m in members if (m["method"], m["step"]) == (method, step)), {})
                values = [row.get(key) for key in shown]
                cells.append(
                    " / ".join(
                        "·" if v is None or not np.isfinite(v) else f"{v:{forms[k]}}"
                        for k, v in zip(shown, values, strict=True)
                    )
                )
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *notes, ""])


def finish(name: str, rows: Rows, text: str, arguments: argparse.Namespace, *, quantity: str) -> None:
    """Write the rows, the table and a picture."""
    with open(arguments.out / f"{name}.ndjson", "w", encoding="utf-8") as file:
        for row in rows:
            clean = {k: (None if isinstance(v, float) and not np.isfinite(v) else v) for k, v in row.items()}
            file.write(json.dumps(clean) + "\n")
    (arguments.out / f"{name}.md").write_text(text, encoding="utf-8")
    draw(pooled(rows), arguments.out / f"{name}.png", quantity)
    print(text)


TITLES = {
    "skill": "skill of weights: 1 is exact, 0 is w_n; cut off below −1",
    "equivalent_steps": "worth in training steps, before paying for verification",
    "loss": "held-out loss",
    "mse": "mean squared error of weights",
}


def draw(rows: Rows, path: Path, quantity: str) -> None:
    """A panel for each case: what was fitted, w_n, the best yardstick at each step, the true future, chance."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    fitted = list(dict.fromkeys(row["method"] for row in rows if row["role"] == "forecast"))
    best = min if quantity in ("loss", "mse") else max
    across = min(3, len(names))
    size = (max(4.0 * across, 6.4), max(3.0 * -(-len(names) // across) + 0.6, 4.2))
    with saved_panels(path, True, len(names), across=across, size=size) as panels:
        figure = panels[0].figure
        for panel, name in zip(panels, names, strict=True):
            members = [row for row in rows if row["case"] == name and row.get(quantity) is not None]
            aheads = sorted({row["ahead"] for row in members})
            for place, method in enumerate(fitted):
                line = {row["ahead"]: row[quantity] for row in members if row["method"] == method}
                panel.plot(line.keys(), line.values(), "o-", color=f"C{place}", label=method,
                           ms=4 + 2 * (len(fitted) - place), mfc="none")  # fmt: skip
            beside = {
                "best yardstick at each step": [row for row in members if row["role"] == "yardstick"],
                "w_n": [row for row in members if row["method"] == "persistence"],
                "true future": [row for row in members if row["role"] == "truth"],
                "chance": [row for row in members if row["role"] == "chance"],
            }
            for (label, found), style in zip(beside.items(), ("k--", "k:", "k-", "r:"), strict=True):
                line = {ahead: best([row[quantity] for row in found if row["ahead"] == ahead], default=None)
                        for ahead in aheads}  # fmt: skip
                if any(value is not None for value in line.values()):
                    values = [np.nan if value is None else value for value in line.values()]
                    panel.plot(aheads, values, style, lw=1, label=label)
            panel.set(title=name, xscale="log", xlabel="steps ahead")
            panel.title.set_fontsize(9)
            panel.set_xticks(aheads, [f"{ahead:g}" for ahead in aheads])
            panel.minorticks_off()
            if quantity in ("loss", "mse"):
                panel.set_yscale("log")
            elif quantity == "skill":
                panel.set_ylim(-1, 1.08)
            else:
                panel.set_yscale("symlog", linthresh=10)
        handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(),
                                                                                strict=True)}  # fmt: skip
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
        figure.suptitle(TITLES[quantity], fontsize=10)


# ------------------------------------------------------------------------------------------------- experiments


def syn1(arguments: argparse.Namespace) -> None:
    targets = (20, 50, 100, 199)
    shape = {"workload": "linreg", "runs": 60 if arguments.full else 30, "start": 4, "targets": targets}
    cases = [
        Case(name="full batch", steps=199, every=1, **shape),
        Case(name="batches of 25", options={"batch": "25", "noise": "0.3"}, steps=199, every=1, **shape),
    ]
    methods = [
        Asked(label="lfd2", method="lfd2"),
        Asked(label="lfd2 l1", method="lfd2", options={"loss": "l1"}),
        Asked(label="lfd2 dense", method="lfd2", options={"map": "dense"}),
    ]
    rows = [row for case in cases for row in weighed(case, methods, arguments)]
    notes = ["Each run has a task of its own, so that no one map is exact; where all runs obey one recurrence, it is",
             "(`make lfd-break`, first case). `linear` is LFD-2 with A = [−j/n, 1 + j/n], b = 0."]  # fmt: skip
    text = table(pooled(rows), "Syn-1: linear regression by SGD", "make lfd-syn1", ("mse", "loss"), notes)
    finish("lfd-syn1", rows, text, arguments, quantity="loss")


def ablation(arguments: argparse.Namespace) -> None:
    targets = (100, 200, 400, 600)
    case = Case(
        name="longer training in small batches",
        workload="linreg",
        options={"batch": "10", "noise": "0.3"},
        steps=600,
        every=10,
        runs=60 if arguments.full else 30,
        start=40,
        targets=targets,
    )
    methods = [
        Asked(label=f"{loss} β={beta}", method="lfd2", options={"loss": loss, "beta": beta})
        for loss in ("squared", "l1")
        for beta in ("0", "0.1", "1", "10")
        if loss == "squared" or beta in ("0", "1")
    ]
    rows = weighed(case, methods, arguments)
    text = table(pooled(rows), "The gradient-decay loss", "make lfd-ablation", ("mse", "loss"), [])
    finish("lfd-ablation", rows, text, arguments, quantity="mse")


def cnn(arguments: argparse.Namespace) -> None:
    case = Case(
        name="digits-cnn",
        workload="digits-cnn",
        steps=600,
        every=20,
        runs=24 if arguments.full else 12,
        start=80,
        targets=(100, 160, 240, 360, 600),
    )
    methods = [
        Asked(label="lfd2", method="lfd2"),
        Asked(label="lfd2 per tensor", method="lfd2", options={"groups": "tensor"}),
        Asked(label="lfd2 l1 β=1", method="lfd2", options={"loss": "l1", "beta": "1"}),
    ]
    rows = weighed(case, methods, arguments)
    columns = ("skill", "loss", "equivalent_steps")
    text = table(pooled(rows), "A small CNN on handwritten digits", "make lfd-cnn", columns, [])
    finish("lfd-cnn", rows, text, arguments, quantity="loss")


def recurrence(seed: int) -> np.ndarray:
    """w_{i+1} = c_i w_i + d_i, one recurrence for all coordinates and runs: the proposition's case."""
    generator = np.random.default_rng([seed, 1])
    common = np.random.default_rng(7)
    weights = generator.normal(size=(30, 50))
    found = [weights]
    for _ in range(100):
        found.append(found[-1] * common.uniform(0.93, 1.0) + common.normal(scale=0.01))
    return np.stack(found, axis=1)


def periodic(seed: int) -> np.ndarray:
    """Sines of one period (40 steps), each coordinate with its own phase, amplitude and centre."""
    generator = np.random.default_rng([seed, 2])
    phase, amplitude, centre = generator.uniform(0, 2 * np.pi, (30, 1, 50)), generator.normal(size=(30, 1, 50)), 0.5
    return centre + amplitude * np.sin(2 * np.pi * np.arange(101)[None, :, None] / 40 + phase)


def chaotic(seed: int) -> np.ndarray:
    """Logistic maps at r = 3.9."""
    weights = np.random.default_rng([seed, 3]).uniform(0.05, 0.95, (30, 50))
    found = [weights]
    for _ in range(100):
        found.append(3.9 * found[-1] * (1 - found[-1]))
    return np.stack(found, axis=1)


def breaking(arguments: argparse.Namespace) -> None:
    shape = {"steps": 400, "every": 10, "runs": 12, "start": 80, "targets": (90, 120, 200, 400)}
    trained = [
        Case(name="digits-cnn, sgd", workload="digits-cnn", options={"optimizer": "sgd"}, **shape),
        Case(name="digits-cnn, momentum", workload="digits-cnn", options={"optimizer": "momentum"}, **shape),
        Case(name="digits-cnn, adam", workload="digits-cnn", options={"optimizer": "adam"}, **shape),
        Case(
            name="digits-cnn, adam, cyclical rate",
            workload="digits-cnn",
            options={"optimizer": "adam", "schedule": "cyclical"},
            **shape,
        ),
    ]
    shape = {"steps": 100, "every": 1, "runs": 30, "start": 8, "targets": (9, 12, 28, 48, 100)}
    made = [
        Case(name="recurrence w ← c_i w + d_i, the same everywhere", made=recurrence, **shape),
        Case(name="periodic, 40 steps", made=periodic, **shape),
        Case(name="chaotic, logistic maps", made=chaotic, **shape),
    ]
    rows = [row for case in [*made, *trained] for row in weighed(case, [LFD2], arguments)]
    columns = ("skill", "equivalent_steps")
    notes = ["·: after a whole period w_n itself is exact, and skill is not defined."]
    text = table(pooled(rows), "Where a linear map of two snapshots breaks", "make lfd-break", columns, notes)
    finish("lfd-break", rows, text, arguments, quantity="skill")


def horizon(arguments: argparse.Namespace) -> None:
    runs = 24 if arguments.full else 12
    digits = {"data": "digits", "train": "997", "own_split": "true", "batch": "64"}
    shape = {"steps": 450, "every": 15, "runs": runs, "start": 60, "targets": (75, 90, 120, 180, 300, 450)}
    cases = [
        Case(name="linreg, adam", workload="linreg", options={"optimizer": "adam"}, steps=300, every=5, runs=30,
             start=20, targets=(25, 30, 40, 60, 100, 180, 300)),
        Case(name="mlp, adam", workload="mlp", options={"optimizer": "adam"}, steps=300, every=5, runs=30,
             start=20, targets=(25, 30, 40, 60, 100, 180, 300)),
        Case(name="digits-cnn, adam", workload="digits-cnn", steps=600, every=20, runs=runs,
             start=80, targets=(100, 120, 160, 240, 360, 600)),
        Case(name="nas-cnn on digits, sgd", workload="nas-cnn", options={"data": "digits"}, steps=400, every=10,
             runs=runs, start=40, targets=(50, 60, 80, 120, 200, 400)),
        Case(name="image-mlp on digits, adam", workload="image-mlp", options=digits, **shape),
        Case(name="image-cnn on digits, sgd", workload="image-cnn", options={**digits, "optimizer": "sgd", "lr": "0.2"},
             **shape),
        Case(name="vit on digits, adam", workload="vit",
             options={**digits, "optimizer": "adam", "lr": "0.003", "patch": "4", "hidden": "32", "depth": "1"},
             **shape),
    ]  # fmt: skip
    large = [
        Case(name="gpt2, adamw", workload="gpt2", options={"layers": "2", "width": "64", "context": "64"},
             steps=600, every=20, runs=12, start=80, targets=(100, 120, 160, 240, 360, 600)),
        Case(name="distilbert, adamw", workload="distilbert", options={"held_back": "8928", "sentences": "250"},
             steps=80, every=5, runs=12, start=20, targets=(25, 30, 40, 60, 80), seeds=1, memory=14_000_000_000,
             far={"method": "loss", "updates": "50"}),
    ]  # fmt: skip
    known = {case.workload: case for case in [*cases, *large]}
    if unknown := set(arguments.cases) - set(known):
        raise SystemExit(f"--cases: unknown workload {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    chosen = [known[name] for name in dict.fromkeys(arguments.cases)] or cases + large * arguments.full
    places = [case.name for case in known.values()]
    file = arguments.out / "horizon.ndjson"
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    stay = set(places) - {case.name for case in chosen}
    rows = [row for row in before if row["case"] in stay]
    for case in chosen:
        rows += weighed(case, [LFD2, Asked(label="far", method="far", options=case.far)], arguments)
    rows.sort(key=lambda row: places.index(row["case"]))
    notes = ["Worth: training steps that bring the same held-out loss, against keeping w_n (median over runs); net",
             "takes off one held-out evaluation. A horizon is useful where net is above 0. Where `far` judges",
             "by training loss it makes one leap, the same for every step, or keeps w_n."]  # fmt: skip
    columns = ("equivalent_steps", "net_steps", "loss")
    text = table(pooled(rows), "How far ahead is useful", "make horizon", columns, notes)
    finish("horizon", rows, text, arguments, quantity="equivalent_steps")


def distilbert(arguments: argparse.Namespace) -> None:
    """Fine-tunings of one pretrained network: the map is fitted on some and judged on another."""
    runs, steps, every = (4, 150, 3) if arguments.full else (2, 160, 10)
    options = {} if arguments.full else {"batch": "8", "length": "64", "sentences": "120"}
    case = Case(name="distilbert", workload="distilbert", options=options, steps=steps, every=every, runs=runs,
                start=4 * every, targets=[(4 + k) * every for k in ((1, 2, 4, 8, 16, 46) if arguments.full
                                                                   else (1, 2, 4, 8, 12))])  # fmt: skip
    store = recorded(case, arguments.runs, 0)
    targets, file = ",".join(map(str, case.targets)), arguments.runs / "distilbert.safetensors"
    fit("lfd2", [str(store)], file, context=CONTEXT, targets=targets, train_runs=f"0:{runs - 1}", memory=512_000_000,
        device="cpu", replace=True)  # fmt: skip
    found = evaluate([str(file)], str(store), targets=targets, memory=512_000_000, device="cpu")
    rows: Rows = [{"case": f"{Trajectory.open(store).layout.parameters:,} parameters", "seed": 0, **r} for r in found]
    notes = [f"{runs - 1} fine-tuning{'s' * (runs > 2)} to fit on, one to judge, batches of other data order from the "
             "same pretrained weights; --memory 512M. `mean` starts warm from a sibling: no forecast."]  # fmt: skip
    columns = ("skill", "loss", "equivalent_steps")
    text = table(pooled(rows), "A real fine-tuning, streamed", "make lfd-distilbert", columns, notes)
    finish("lfd-distilbert", rows, text, arguments, quantity="loss")


EXPERIMENTS = {
    "syn1": syn1,
    "ablation": ablation,
    "cnn": cnn,
    "break": breaking,
    "horizon": horizon,
    "distilbert": distilbert,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, help="data seeds 0, 1, …; 2, or 5 with --full, when not said")
    parser.add_argument("--full", action="store_true", help="more runs and seeds")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="WORKLOAD", help="only these of horizon; others stay as on file"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/lfd"), help="where recordings are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.seeds = arguments.seeds or (5 if arguments.full else 2)
    arguments.runs = arguments.runs / ("full" if arguments.full else "small")
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    EXPERIMENTS[arguments.experiment](arguments)


if __name__ == "__main__":
    main()
