"""The momentum catastrophe of Leap+Verify (arXiv 2602.19580), settled: what the precision of Adam's moments explains.

    python scripts/leap_moments.py           # on the recordings of leap_verify.py, made where they are missing
    python scripts/leap_moments.py --full    # on those of --full

One training, recorded once in float32 with Adam's moments. Leaps along them are judged with the moments as recorded,
and after a cast to bfloat16 or float16 and back, each bias-corrected or not, K updates with the moments held fixed.
Everything else is equal, so that every difference between rows is the cast's or the correction's.

Rows go to scripts/results as NDJSON, a Markdown table and a picture.
"""

import json
from pathlib import Path

import numpy as np
import torch
from leap_verify import AHEAD, Rows, clean, factor, judged, parsed, recordings

from farcli.recording.recorder import MOMENTS
from farcli.store import Trajectory

VARIANTS = {
    "momentum": "float32, corrected",
    "momentum-bf16": "bfloat16, corrected",
    "momentum-fp16": "float16, corrected",
    "momentum-uncorrected": "float32, uncorrected",
    "momentum-uncorrected-bf16": "bfloat16, uncorrected",
    "momentum-as-coded": "float16, uncorrected (as coded)",
    "momentum-printed": "float32, no learning rate (as printed)",
}
RUNS = "0:1"


def lost(store: Path) -> Rows:
    """What the casts make of the second moment, at every snapshot of the run judged."""
    inner = Trajectory.open(store / MOMENTS)
    places = {
        key: [slot for slot in inner.layout.floats if slot.name.endswith(f".{key}")]
        for key in ("exp_avg", "exp_avg_sq")
    }
    rows = []
    for step in inner.steps:
        vector = torch.from_numpy(inner.read([inner.runs[0]], [step])[0, 0])
        first, second = (
            torch.cat([vector[s.offset : s.stop] for s in places[key]]) for key in ("exp_avg", "exp_avg_sq")
        )
        moving = (first != 0) & (second > 0)
        for precision in (torch.bfloat16, torch.float16):
            kept = second.to(precision).float()
            left = first.to(precision).float()
            rows.append(
                {
                    "kind": "cast",
                    "step": step,
                    "precision": str(precision).removeprefix("torch."),
                    "zero": float(((kept == 0) & moving).double().sum() / moving.double().sum()),
                    "exploding": float(((kept == 0) & (left != 0) & moving).double().sum() / moving.double().sum()),
                    "median_exp_avg_sq": float(second[moving].median()),
                }
            )
    return rows


def draw(rows: Rows, cases: list[str], path: Path) -> None:
    """Median loss inflation against K, a panel for each training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "momentum": ("#1f5fa8", "-"), "momentum-bf16": ("#2a9d8f", "-"), "momentum-fp16": ("#e15759", "-"),
        "momentum-uncorrected": ("#1f5fa8", "--"), "momentum-uncorrected-bf16": ("#2a9d8f", "--"),
        "momentum-as-coded": ("#e15759", "--"), "momentum-printed": ("#8c8c8c", ":"),
    }  # fmt: skip
    figure, axes = pyplot.subplots(1, len(cases), figsize=(3.1 * len(cases), 3.9), sharey=True, layout="constrained")
    for axis, case in zip(axes, cases, strict=True):
        for name, (colour, line) in styles.items():
            own = [r for r in rows if r["kind"] == "summary" and (r["case"], r["predictor"]) == (case, name)]
            ahead, inflation = ([row[key] for row in own] for key in ("ahead", "inflation"))
            axis.plot(ahead, inflation, color=colour, linestyle=line, marker="o", ms=3, label=VARIANTS[name])
        axis.axhline(1, color="black", lw=0.8)
        axis.set(
            title=case.replace(", ", "\n"), xscale="log", yscale="log", xlabel="K, updates with moments held fixed"
        )
        axis.set_xticks(AHEAD, [str(each) for each in AHEAD], fontsize=7)
        axis.minorticks_off()
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, times the present one (median)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def table(rows: Rows, cases: list[str], full: bool) -> str:
    lines = [
        "# The momentum catastrophe, settled",
        "",
        f"`make leap-moments{' FULL=--full' if full else ''}`: held-out loss after the leap, times the present one: "
        "median over snapshots (largest).",
        "",
    ]
    for case in cases:
        summary = {(r["predictor"], r["ahead"]): r for r in rows if r["kind"] == "summary" and r["case"] == case}
        lines += [f"## {case}", "", "| moments | " + " | ".join(f"K = {ahead}" for ahead in AHEAD) + " |"]
        lines.append("|---|" + "---|" * len(AHEAD))
        for name, label in VARIANTS.items():
            cells = [factor(summary[name, ahead]) for ahead in AHEAD]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
        for precision in ("float16", "bfloat16"):
            casts = [r for r in rows if r["kind"] == "cast" and (r["case"], r["precision"]) == (case, precision)]
            zero, exploding = (np.array([r[key] for r in casts]) for key in ("zero", "exploding"))
            lines.append(
                f"- {precision}: {100 * zero.mean():.1f} % of exp_avg_sq become 0 ({100 * zero.min():.1f} to "
                f"{100 * zero.max():.1f} % over snapshots); {100 * exploding.mean():.1f} % while exp_avg stays, so "
                "that the update is m/ε."
            )
        casts = [r for r in rows if r["kind"] == "cast" and r["case"] == case]
        lines += [f"- median exp_avg_sq {np.median([r['median_exp_avg_sq'] for r in casts]):.1e}.", ""]
    return "\n".join(lines)


def main() -> None:
    arguments, size = parsed(__doc__)
    stores, _ = recordings(size, arguments)
    rows: Rows = []
    for case, store in stores.items():
        asked = {"ahead": AHEAD, "cascades": (), "criteria": ("strict",), "runs": RUNS}
        found = judged(store, ("summary",), predictors=list(VARIANTS), **asked)
        kept: Rows = [row for row in found if row["regime"] == "all"]
        rows += [{"case": case.name, **row} for row in [*kept, *lost(store)]]
        print(f"{case.name}: judged", flush=True)
    cases = [case.name for case in stores]
    name = "leap-moments-full" if arguments.full else "leap-moments"
    with open(arguments.out / f"{name}.ndjson", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(clean(row)) + "\n" for row in rows)
    text = table(rows, cases, arguments.full)
    (arguments.out / f"{name}.md").write_text(text, encoding="utf-8")
    draw(rows, cases, arguments.out / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()
