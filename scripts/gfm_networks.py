"""Table 2 and Figures 2 and 3 of Gradient Flow Matching (arXiv 2505.20221) with farcli, beside honest yardsticks.

    python scripts/gfm_networks.py table2    # CIFAR-10: MSE and f_source, the cross-entropy at the forecast weights
    python scripts/gfm_networks.py figure2   # linear regression: forecast against true w_199, in the plane of both
    python scripts/gfm_networks.py figure3   # section 5.2: losses of MLPs, forecast by what was learned on deeper ones

The paper's pictures hold no figures to compare with: Figures 2 and 3 are drawn of what its text describes, with the
lines it lacks (chance, the mean of the training runs' last weights, w_n and the true w_m). Recordings are kept under
--runs, rows go to scripts/results as NDJSON, with a Markdown table and a picture. `--full` is the paper's size: for
table2 100 runs of 200 epochs on all images and Transformers of 924,554 parameters, which is a matter of days.

Shape suffixes: R runs, D coordinates.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import gfm_tables
import numpy as np
import torch

from farcli import Trajectory, evaluate, fit, forecast, record
from farcli.evaluation import measure_of_workload
from farcli.verbs.plot import saved_figure, saved_panels

Rows = list[dict[str, Any]]
CONTEXT = 5

PUBLISHED = {
    "cnn": {
        "Introspection": (0.421, 2.369),
        "DLinear": (0.900, 309.0),
        "LFD-2": (0.421, 2.381),
        "WNN": (0.365, 3.605),
        "LSTM": (0.466, 2.604),
        "Transformer": (0.543, 3.526),
        "GFM": (0.485, 3.369),
    },
    "transformer": {
        "Introspection": (0.054, 2.225),
        "LFD-2": (0.054, 2.226),
        "LSTM": (0.054, 2.266),
        "Transformer": (0.053, 2.228),
        "GFM": (0.043, 1.117),
    },
}
"""Table 2: MSE, f_source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A method, and what the table calls it and holds it against.

    Attributes:
        label: of the row.
        method: to fit.
        published: the row of the paper.
        options: of the method.
    """

    label: str
    method: str
    published: str = ""
    options: dict[str, str] = field(default_factory=dict)


def fitted(asked: Asked, store: Path, folder: Path, last: int, train: int, memory: int) -> Path:
    file = folder / f"{asked.label.replace(' ', '-')}.safetensors"
    fit(
        asked.method,
        [str(store)],
        file,
        context=CONTEXT,
        targets=str(last),
        train_runs=f"0:{train}",
        options=asked.options,
        device="cpu",
        memory=memory,
        replace=True,
    )
    return file


def write(name: str, rows: Rows, text: str, out: Path) -> None:
    with open(out / f"{name}.ndjson", "w", encoding="utf-8") as file:
        for row in rows:
            clean = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
            file.write(json.dumps(clean) + "\n")
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


# --------------------------------------------------------------------------------------------- Table 2


def table2(arguments: argparse.Namespace) -> None:
    full = arguments.full
    runs, epochs, images = (100, 199, 50_000) if full else (arguments.nets, 10, 1280)
    batch = 128 if full else 64
    train, steps, every = runs * 6 // 10, epochs * -(-images // batch), -(-images // batch)
    updates = {"updates": "0", "epochs": "1000"} if full else {"updates": str(arguments.updates), "epochs": "100000"}
    # The paper's Transformers, of one token, need 3 GB for GFM on whole vectors; the small ones are of one layer.
    shape = {"depth": "4", "hidden": "128", "patch": "32"} if full else {"depth": "1"}
    memory = 64_000_000_000 if full else 4_000_000_000
    common = {"train": str(images), "batch": str(batch), "held_out": "10000" if full else "500", "optimizer": "sgd"}
    shared = {"lr": "1e-3", **updates}
    methods = [
        Asked(label="GFM as printed", method="gfm", published="GFM", options=updates),
        Asked(label="GFM corrected", method="gfm", options={**gfm_tables.CORRECTED, **updates}),
        Asked(label="GFM shared (ours)", method="gfm", options={**gfm_tables.CORRECTED, "channels": "shared",
                                                                 "batch": "1024", **shared}),
        Asked(label="Introspection", method="introspection", published="Introspection", options=shared),
        Asked(label="DLinear", method="dlinear", published="DLinear", options=shared),
        Asked(label="LFD-2 solved", method="lfd2", published="LFD-2"),
        Asked(label="WNN", method="wnn", published="WNN", options=shared),
        Asked(label="LSTM", method="lstm", published="LSTM", options=shared),
        Asked(label="Transformer", method="transformer", published="Transformer", options=shared),
        Asked(label="far", method="far"),
    ]  # fmt: skip
    rows: Rows = []
    for kind, workload, options in (("cnn", "nas-cnn", {}), ("transformer", "vit", shape)):
        store = arguments.runs / f"table2-{kind}-{runs}-{steps}.zarr"
        if not (store / "zarr.json").exists():
            record(workload, store, runs=runs, steps=steps, every=every, options={**common, **options}, resume=True)
        files = [str(fitted(asked, store, arguments.runs, steps, train, memory)) for asked in methods]
        found = evaluate(files, str(store), runs=f"{train}:{runs}", targets=str(steps), device="cpu", memory=memory)
        named = [row for row in found if row["role"] == "forecast"]  # in the order they were named
        for row, asked in zip(named, methods, strict=True):
            row |= {"method": asked.label, "published": asked.published}
        rows += [{"network": kind, "published": "", **row} for row in found]
        print(f"{kind}: done", flush=True)
    write("gfm-table2", rows, table2_text(rows, arguments, runs=runs, train=train, steps=steps), arguments.out)
    draw_table2(rows, arguments.out / "gfm-table2.png")


def draw_table2(rows: Rows, path: Path) -> None:
    """f_source of every method, a panel for each network; hollow marks for what was published."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with saved_panels(path, True, 2, across=2, size=(11, 5.4)) as panels:
        for panel, kind in zip(panels, PUBLISHED, strict=True):
            members = [row for row in rows if row["network"] == kind and row["loss"] is not None]
            members = [row for row in members if row["role"] != "chance"]
            panel.plot([row["loss"] for row in members], range(len(members)), "o", label="ours")
            published = [PUBLISHED[kind].get(row["published"], (0, np.nan))[1] for row in members]
            panel.plot(published, range(len(members)), "D", mfc="none", label="published")
            panel.axvline(np.log(10), color="#8c8c8c", ls=":", label="chance")
            panel.set(xscale="log", xlabel="f_source", title=kind, yticks=range(len(members)))
            panel.set_yticklabels([row["method"] for row in members], fontsize=8)
            panel.invert_yaxis()
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panels[0].legend(fontsize=8, loc="lower right")


def table2_text(rows: Rows, arguments: argparse.Namespace, *, runs: int, train: int, steps: int) -> str:
    command = "python scripts/gfm_networks.py table2" + " --full" * arguments.full
    lines = [
        "# Table 2 of Gradient Flow Matching: CIFAR-10, MSE / f_source (cross-entropy at the forecast weights)",
        "",
        f"{runs} runs by SGD, {train} to fit on; w_m at step {steps} from w_0 … w_{CONTEXT - 1}, an epoch apart. "
        f"`{command}`",
    ]
    for kind, title in (("cnn", "CNN, 5,418 parameters"), ("transformer", "Transformer")):
        lines += ["", f"## {title}", "", "| | published | ours | better than w_n |", "|---|---|---|---|"]
        for row in (row for row in rows if row["network"] == kind):
            figures = PUBLISHED[kind].get(row["published"])
            published = f"{figures[0]:g} / {figures[1]:g}" if figures else ""
            mse = "·" if row["mse"] is None else f"{row['mse']:.3g}"
            loss = "·" if row["loss"] is None else f"{row['loss']:.4g}"
            better = "" if row["better"] is None else f"{row['better']:.0%}"
            lines.append(f"| {row['method']} | {published} | {mse} / {loss} | {better} |")
    return "\n".join([*lines, "", "Chance is ln 10 = 2.303; every published f_source of the CNN is worse.", ""])


# ------------------------------------------------------------------------------------------- Figure 2


def figure2(arguments: argparse.Namespace) -> None:
    optimisers = gfm_tables.OPTIMISERS if arguments.full else ("sgd", "adam")
    methods = {
        "GFM as printed": gfm_tables.fitted("gfm", path="w_0", epochs=arguments.epochs),
        "GFM corrected": gfm_tables.fitted("gfm", epochs=arguments.epochs, **gfm_tables.CORRECTED),
        "LFD-2 solved": gfm_tables.lfd2_ridge,
        "train mean": lambda cell: np.broadcast_to(cell.train_RD.mean(0), cell.test_RD.shape),
        "w_n": lambda cell: cell.test_RCD[:, -1],
    }
    folder, rows = arguments.runs.parent / "gfm", []
    folder.mkdir(parents=True, exist_ok=True)
    for optimiser in optimisers:
        cell = gfm_tables.cell_of(gfm_tables.recorded(folder, optimiser, 0))
        for name, method in methods.items():
            for run, (found_D, true_D) in enumerate(zip(method(cell), cell.test_RD, strict=True)):
                rows.append({"optimiser": optimiser, "method": name, "run": run, "true": true_D.tolist(),
                             "forecast": found_D.tolist(), "mse": float(((found_D - true_D) ** 2).mean())})  # fmt: skip
    lines = [
        "# Figure 2: forecast and true w_199 of linear regressions (protocol D2, data seed 0, 20 test runs)",
        "",
        "`python scripts/gfm_networks.py figure2`; mean squared error, and correlation with the truth of each weight",
        "",
        "| | | MSE | slope w | intercept b |",
        "|---|---|---|---|---|",
    ]
    for optimiser in optimisers:
        for name in methods:
            members = [row for row in rows if (row["optimiser"], row["method"]) == (optimiser, name)]
            pairs_R2D = np.array([(row["forecast"], row["true"]) for row in members])
            told = [correlation(pairs_R2D[:, 0, i], pairs_R2D[:, 1, i]) for i in (0, 1)]
            error = mean(row["mse"] for row in members)
            lines.append(f"| {gfm_tables.HEADINGS[optimiser]} | {name} | {error:.4f} | {told[0]} | {told[1]} |")
    write("gfm-figure2", rows, "\n".join([*lines, ""]), arguments.out)
    draw_figure2(rows, arguments.out / "gfm-figure2.png")


def draw_figure2(rows: Rows, path: Path) -> None:
    """Weight and bias of every test run, a panel for each optimiser."""
    optimisers = list(dict.fromkeys(row["optimiser"] for row in rows))
    marks = {"GFM as printed": "o", "GFM corrected": "^", "LFD-2 solved": "s", "train mean": "X"}
    across = len(optimisers)
    with saved_panels(path, True, across, across=across, size=(5.5 * across, 4.6)) as panels:
        for panel, optimiser in zip(panels, optimisers, strict=True):
            shown = [row for row in rows if row["optimiser"] == optimiser]
            true_RD = np.array([row["true"] for row in shown if row["method"] == "train mean"])
            panel.plot(*true_RD.T, "k*", label="true $w_{199}$", ms=9)
            for name, mark in marks.items():
                found_RD = np.array([row["forecast"] for row in shown if row["method"] == name])
                panel.plot(*found_RD.T, mark, label=name, alpha=0.7)
            panel.set(xlabel="weight", ylabel="bias", title=gfm_tables.HEADINGS[optimiser])
        handles = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8)


def correlation(one_R: np.ndarray, other_R: np.ndarray) -> str:
    return "·" if one_R.std() < 1e-9 else f"{np.corrcoef(one_R, other_R)[0, 1]:+.2f}"


# ------------------------------------------------------------------------------------------- Figure 3


def figure3(arguments: argparse.Namespace) -> None:
    """30 networks 2,2,1 to fit on, 20 networks 4,1 to judge on, weights padded to 15, learning rate .001."""
    rules = ("sgd", "adam", "rmsprop")
    last, train, test = 199, 30, 20
    methods = [
        Asked(label="GFM as printed", method="gfm", options={"epochs": str(arguments.epochs)}),
        Asked(label="GFM corrected", method="gfm", options={"epochs": str(arguments.epochs), **gfm_tables.CORRECTED}),
        Asked(label="LFD-2 shared", method="lfd2"),
        Asked(label="far", method="far"),
        Asked(label="train mean", method="mean"),
    ]
    rows: Rows = []
    for rule in rules:
        for seed in range(arguments.seeds):
            deep, wide = (
                mlps(arguments.runs, rule, hidden, runs, 2 * seed + offset, last)
                for hidden, runs, offset in (("2,2,1", train, 0), ("4,1", test, 1))
            )
            truth = Trajectory.open(wide)
            measure = measure_of_workload(truth, "stored")
            assert measure is not None
            assert measure.chance is not None

            def losses(weights_RD: np.ndarray, truth: Trajectory = truth, measure: Any = measure) -> list[float]:
                return [
                    measure.of(vector, truth.integers(run, 0), run)["loss"]
                    for run, vector in zip(truth.runs, weights_RD, strict=True)
                ]

            true_RD, kept_RD = (truth.read(list(truth.runs), [step])[:, 0] for step in (last, CONTEXT - 1))
            ours: list[tuple[str, np.ndarray]] = [("true w_199", true_RD), ("w_4", kept_RD)]
            for asked in methods:
                file = fitted(asked, deep, arguments.runs, last, train, 2_000_000_000)
                output = file.with_suffix(".zarr")
                forecast(str(file), str(wide), output, targets=str(last), transfer=True, device="cpu", replace=True)
                found = Trajectory.open(output)
                ours.append((asked.label, found.read(list(found.runs), [last])[:, 0]))
            for name, weights_RD in ours:
                error_R = ((weights_RD - true_RD) ** 2).mean(1)
                for run, (error, loss) in enumerate(zip(error_R.tolist(), losses(weights_RD), strict=True)):
                    rows.append({"rule": rule, "seed": seed, "method": name, "run": run, "mse": error, "loss": loss})
            rows.append({"rule": rule, "seed": seed, "method": "chance", "loss": measure.chance["loss"]})
            print(f"{rule}, seed {seed}: done", flush=True)
    write("gfm-figure3", rows, figure3_text(rows, arguments), arguments.out)
    draw_figure3(rows, arguments.out / "gfm-figure3.png")


def draw_figure3(rows: Rows, path: Path) -> None:
    """Losses of all test networks, a box for each optimiser and method."""
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "chance"))
    with saved_figure(path, True) as axes:
        for place, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
            columns = [[r["loss"] for r in rows if (r["rule"], r["method"]) == (rule, name)] for name in names]
            positions = [place * (len(names) + 1) + i for i in range(len(names))]
            drawn = axes.boxplot(columns, positions=positions, widths=0.7, patch_artist=True, showfliers=False,
                                 medianprops={"color": "k"})  # fmt: skip
            for i, box in enumerate(drawn["boxes"]):
                box.set_facecolor(f"C{i}")
                box.set_label(names[i] if place == 0 else None)
            middle = positions[len(names) // 2]
            axes.text(middle, -0.05, rule, transform=axes.get_xaxis_transform(), ha="center")
        axes.axhline(mean(r["loss"] for r in rows if r["method"] == "chance"), color="#8c8c8c", ls=":", label="chance")
        axes.set(ylabel="held-out loss", xticks=[])
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)


def mlps(folder: Path, rule: str, hidden: str, runs: int, seed: int, last: int) -> Path:
    store = folder / f"mlp-{rule}-{hidden.replace(',', '')}-{runs}-{seed}.zarr"
    if not (store / "zarr.json").exists():
        options = {"optimizer": rule, "lr": "0.001", "hidden": hidden, "pad": "15"}
        record("mlp", store, runs=runs, steps=last, every=1, seed=seed, options=options, resume=True)
    return store


def figure3_text(rows: Rows, arguments: argparse.Namespace) -> str:
    lines = [
        "# Figure 3: held-out loss of MLPs 4,1 at w_199 as forecast from w_0 … w_4, learned on MLPs 2,2,1",
        "",
        f"Rate .001, 30 networks to learn from, 20 to judge, {arguments.seeds} data seeds, `python "
        "scripts/gfm_networks.py figure3`.",
        "Gap closed: (L(w_4) − L(ŵ)) / (L(w_4) − L(w_199)) per network, median.",
        "",
        "| | | mean loss | gap closed | better than w_4 | better than w_199 | MSE |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        of = {name: by_network(rows, rule, name) for name in dict.fromkeys(row["method"] for row in rows)}
        kept, true = of["w_4"], of["true w_199"]
        for name, found in of.items():
            if name == "chance":
                lines.append(f"| {rule} | chance | {mean(row['loss'] for row in found.values()):.3f} | | | | |")
                continue
            loss = {place: row["loss"] for place, row in found.items()}
            gaps = [
                (kept[p]["loss"] - loss[p]) / (kept[p]["loss"] - true[p]["loss"])
                for p in loss
                if kept[p]["loss"] > true[p]["loss"]
            ]
            better = [sum(loss[p] < other[p]["loss"] for p in loss) for other in (kept, true)]
            error = mean(row["mse"] for row in found.values())
            lines.append(
                f"| {rule} | {name} | {mean(loss.values()):.3f} | {median(gaps):.0%} | {better[0]} of {len(loss)} | "
                f"{better[1]} of {len(loss)} | {error:.3g} |"
            )
    return "\n".join([*lines, ""])


def by_network(rows: Iterable[dict[str, Any]], rule: str, method: str) -> dict[tuple[int, int], dict[str, Any]]:
    chosen = [row for row in rows if (row["rule"], row["method"]) == (rule, method)]
    return {(row["seed"], row.get("run", 0)): row for row in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets = {"table2": table2, "figure2": figure2, "figure3": figure3}
    parser.add_argument("target", choices=list(targets))
    parser.add_argument("--seeds", type=int, help="data seeds of figure3; 3, or 5 with --full, when not said")
    parser.add_argument("--epochs", type=int, default=1000, help="epochs of GFM's fits in the figures")
    parser.add_argument("--updates", type=int, default=500, help="updates of the small fits of table2")
    parser.add_argument("--nets", type=int, default=20, help="networks of the small table2")
    parser.add_argument("--full", action="store_true", help="the paper's size")
    parser.add_argument("--runs", type=Path, default=Path("runs/gfm-networks"), help="where recordings are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parsed = parser.parse_args()
    parsed.seeds = parsed.seeds or (5 if parsed.full else 3)
    torch.set_num_threads(1)
    for folder in (parsed.runs, parsed.out):
        folder.mkdir(parents=True, exist_ok=True)
    targets[parsed.target](parsed)


if __name__ == "__main__":
    main()
