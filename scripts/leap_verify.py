"""Leap+Verify (arXiv 2602.19580) again, from scratch and fine-tuned, at its learning rate and at the tuned one.

    python scripts/leap_verify.py            # a small GPT-2 on bytes, 1000 steps, 3 seeds: minutes on one core
    python scripts/leap_verify.py --full     # 124M parameters, GPT-2's own tokens, 2000 steps, 5 seeds: on a GPU

The paper's protocol: AdamW, weight decay .01, cosine to a tenth after a twentieth of warm-up, batches of 4, a snapshot
every 50 steps, 32 held-out sequences, K from 5 to 100. Differs: the network (by default 120,576 parameters, bytes, 64
of them a sequence), the text, and the starting point of fine-tuning: no pretrained GPT-2 is at hand, so one is trained
here on another text (Shakespeare) before it goes on with WikiText-2. Tuned means: the best of --rates, by the final
held-out loss of one run of a seed of its own.

Recordings are kept under --runs and found again; rows go to scripts/results as NDJSON, a Markdown table and a picture.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from farcli import export, record
from farcli.evaluation import Measure
from farcli.store import Trajectory
from farcli.training import Network, workload_from, workload_of
from farcli.verbs.leap_offline import leap_offline
from farcli.workloads.base import Batch, Workload
from farcli.workloads.gpt2 import Gpt2, Gpt2Config

Rows = list[dict[str, Any]]

PAPER_RATE = 5e-5
EVERY = 50
AHEAD = (5, 10, 25, 50, 75, 100)
PREDICTORS = ("momentum", "linear", "quadratic", "quadratic-printed")
CRITERIA = ("strict", "adaptive", "adaptive-published", "proximity")
SWEEP_SEED = 1000
PUBLISHED = {
    ("stable", 5): 24.3, ("stable", 10): 18.8, ("stable", 25): 5.8,
    ("transition", 5): 9.3, ("transition", 10): 3.3, ("transition", 25): 0.7,
}  # fmt: skip
"""GPT-2 124M, linear, strict: per cent of the snapshots in this regime accepted."""
REGIMES = ("stable", "transition", "chaotic", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large everything is.

    Attributes:
        options: of the network and its data.
        steps: of each run.
        base_steps: of the training that fine-tuning starts from.
        runs: seeds.
        rates: tried for the tuned one.
    """

    options: Mapping[str, str]
    steps: int
    base_steps: int
    runs: int
    rates: tuple[float, ...]


SMALL = Size(
    options={"layers": "2", "heads": "2", "width": "64", "context": "64"},
    steps=1000,
    base_steps=1500,
    runs=3,
    rates=(5e-4, 1e-3, 2e-3, 4e-3),
)
FULL = Size(
    options={"layers": "12", "heads": "12", "width": "768", "context": "256", "positions": "1024", "tokens": "bpe"},
    steps=2000,
    base_steps=2000,
    runs=5,
    rates=(5e-5, 1e-4, 3e-4, 6e-4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training: where it starts, and how fast it learns."""

    start: str
    rate: float
    tuned: bool

    @property
    def name(self) -> str:
        return f"{self.start}, {'tuned' if self.tuned else 'paper'} rate {self.rate:g}"


@final
class Gpt2OnCuda(Workload):
    """The workload `gpt2`, its network and its data on a GPU."""

    Config = Gpt2Config
    lockstep, fused = False, True
    summary, default_steps, default_every, needs = Gpt2.summary, Gpt2.default_steps, Gpt2.default_every, Gpt2.needs
    device = "cuda"

    def __init__(self, config: Gpt2Config) -> None:
        self._inner = Gpt2(config)
        for name, value in vars(self._inner).items():
            if isinstance(value, torch.Tensor):
                setattr(self._inner, name, value.to(self.device))
            elif isinstance(value, tuple) and all(isinstance(part, torch.Tensor) for part in value):
                setattr(self._inner, name, tuple(part.to(self.device) for part in value))

    @property
    def config(self) -> Gpt2Config:
        return self._inner.config

    def model(self, seeds: Sequence[int]) -> nn.Module:
        return self._inner.model(seeds).to(self.device)

    def batches(self, seeds: Sequence[int], start: int = 0) -> Iterator[Batch]:
        return self._inner.batches(seeds, start)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._inner.loss(model, batch)

    def evaluate(self, model: nn.Module, seed: int) -> dict[str, float]:
        return self._inner.evaluate(model, seed)

    def chance(self) -> dict[str, float]:
        return self._inner.chance()

    def evaluation_cost(self) -> float:
        return self._inner.evaluation_cost()


def recorded(store: Path, options: Mapping[str, str], **rest: Any) -> Path:
    """A recording, made unless it is there."""
    if (store / "zarr.json").exists():
        return store
    where = "leap_verify:Gpt2OnCuda" if torch.cuda.is_available() else "gpt2"
    record(where, store, options=dict(options), resume=True, **rest)
    return store


def options_of(size: Size, arguments: argparse.Namespace, base: Path | None, rate: float) -> dict[str, str]:
    common = {
        "data": arguments.data,
        "batch": "4",
        "windows": "32",
        "lr": str(rate),
        "schedule": "cosine",
        "floor": "0.1",
        "warmup": str(size.steps // 20),
    }
    if base is None:
        return common | dict(size.options)
    kept = {key: value for key, value in size.options.items() if key == "context"}
    return common | kept | {"pretrained": str(base), "tokens": size.options.get("tokens", "bytes")}


def base_network(size: Size, arguments: argparse.Namespace) -> Path:
    """A folder with a network trained on the other text, as hubs hand it out."""
    folder = arguments.runs / "base"
    options = {**size.options, "data": arguments.base, "batch": "16", "schedule": "cosine", "floor": "0.1"}
    store = recorded(arguments.runs / "base.zarr", options, steps=size.base_steps, every=size.base_steps)
    folder.mkdir(exist_ok=True)
    if (folder / "config.json").exists():
        return folder
    export(str(store), folder / "model.safetensors", step=size.base_steps, run=0, replace=True)
    workload = workload_of(Trajectory.open(store).header)
    assert workload is not None
    (folder / "config.json").write_text(json.dumps(workload.model([0]).config.to_dict()))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return folder


def measured_at_once(store: Path) -> Measure:
    """The held-out loss of a recording, all windows in one batch instead of four at a time: several times faster."""
    truth = Trajectory.open(store)
    header, own = truth.header, workload_of(truth.header)
    assert own is not None
    options = {**header["workload"]["options"], "batch": "32"}
    network = Network(workload_from(header["workload"]["name"], options), truth.layout)
    seeds = dict(zip(truth.runs, header["seeds"], strict=True))

    def of(vector: np.ndarray, integers: np.ndarray, run: int) -> dict[str, float]:
        return network.evaluate(vector, integers, seeds[run])

    return Measure(of=of, chance=own.chance(), cost=own.evaluation_cost(), network=network)


def final_loss(store: Path, measure: Measure | None = None) -> float:
    truth, measure = Trajectory.open(store), measure or measured_at_once(store)
    step = truth.steps[-1]
    found = [measure.of(truth.read([run], [step])[0, 0], truth.integers(run, step), run) for run in truth.runs]
    return float(np.mean([each["loss"] for each in found]))


def judged(store: Path, kinds: Sequence[str], **asked: Any) -> Rows:
    """Rows of `leap_offline` of these kinds, kept beside the recording: remove them to judge it again."""
    kept = store.with_suffix(f".{'-'.join(asked['predictors'])}.ndjson")
    if kept.exists():
        return [json.loads(line) for line in kept.read_text().splitlines()]
    measure = measured_at_once(store)
    final = final_loss(store, measure)
    found = leap_offline(str(store), measure=measure, **asked)
    rows = [clean({**row, "final_loss": final}) for row in found if row["kind"] in kinds]
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def tuned_rate(
    start: str, size: Size, arguments: argparse.Namespace, base: Path | None
) -> tuple[float, dict[float, float]]:
    """The best rate, and the final held-out loss of each."""
    kept = arguments.runs / f"sweep-{start.replace(' ', '-')}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    losses = {}
    for rate in size.rates:
        if str(rate) not in known:
            store = arguments.runs / f"sweep-{start.replace(' ', '-')}-{rate:g}.zarr"
            options = options_of(size, arguments, base, rate)
            recorded(store, options, steps=size.steps, every=size.steps, seed=SWEEP_SEED)
            known[str(rate)] = final_loss(store)
            kept.write_text(json.dumps(known))
        losses[rate] = known[str(rate)]
        print(f"sweep {start} {rate:g}: {losses[rate]:.4f}", flush=True)
    return min(losses, key=lambda rate: losses[rate]), losses


def recordings(size: Size, arguments: argparse.Namespace) -> tuple[dict[Case, Path], dict[str, dict[float, float]]]:
    """All four trainings, with Adam's moments, and the sweeps behind the tuned rates."""
    stores, sweeps = {}, {}
    for start, base in (("from scratch", None), ("fine-tuning", base_network(size, arguments))):
        rate, sweeps[start] = tuned_rate(start, size, arguments, base)
        for case in (
            Case(start=start, rate=PAPER_RATE, tuned=False),
            Case(start=start, rate=rate, tuned=True),
        ):
            store = arguments.runs / f"{case.name.replace(', ', '-').replace(' ', '-')}.zarr"
            stores[case] = recorded(
                store,
                options_of(size, arguments, base, case.rate),
                steps=size.steps,
                every=EVERY,
                runs=size.runs,
                with_optimizer=True,
            )
            print(f"{case.name}: recorded", flush=True)
    return stores, sweeps


# ------------------------------------------------------------------------------------------------------- tables


def cell(row: Mapping[str, Any] | None, key: str) -> str:
    if row is None:
        return "·"
    std = row.get(f"{key}_std")
    return f"{100 * row[key]:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def factor(row: Mapping[str, Any]) -> str:
    """How much the loss grew: median (largest); a loss that is no number is ∞."""
    median, most = ("∞" if row[key] is None else f"{row[key]:.3g}" for key in ("inflation", "inflation_max"))
    return f"{median} ({most})"


def acceptance(rows: Rows, case: str) -> list[str]:
    """Leap+Verify's table: regimes down, K across."""
    summary = {
        (r["predictor"], r["ahead"], r["regime"]): r for r in rows if r["kind"] == "summary" and r["case"] == case
    }
    lines = [
        "| strict acceptance, % | " + " | ".join(f"K = {ahead}" for ahead in AHEAD) + " |",
        "|---|" + "---|" * len(AHEAD),
    ]
    for predictor in PREDICTORS:
        for regime in REGIMES:
            cells = []
            for ahead in AHEAD:
                text = cell(summary.get((predictor, ahead, regime)), "accepted_strict")
                if predictor == "linear" and (regime, ahead) in PUBLISHED:
                    text += f" ({PUBLISHED[regime, ahead]})"
                cells.append(text)
            if any(text != "·" for text in cells):
                lines.append(f"| {predictor}, {regime} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def beside(rows: Rows, case: str) -> list[str]:
    """What the paper's table leaves out, over all snapshots."""
    summary = [r for r in rows if r["kind"] == "summary" and r["case"] == case and r["regime"] == "all"]
    aucs = {
        (r["predictor"], r["ahead"], r["signal"], r["target"]): r
        for r in rows
        if r["kind"] == "auc" and r["case"] == case
    }
    lines = [
        "| predictor | K | adaptive | adaptive (published) | proximity | loss × (max) | worth, steps | worth ≥ K | "
        "net steps | AUC activations | AUC displacements | AUC past |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        if row["predictor"] == "persistence":
            continue
        parts = [cell(row, f"accepted_{name}") for name in CRITERIA[1:]]
        parts.append(factor(row))
        parts.append(
            f"{row['equivalent_steps']:+.0f} [{row['equivalent_steps_low']:+.0f}, {row['equivalent_steps_high']:+.0f}]"
        )
        parts.append("·" if row["worth_k"] is None else f"{100 * row['worth_k']:.0f} %")
        parts.append(f"{row['net_strict']:+.2f}")
        for signal in ("similarity", "displacement_cosine", "past_outcomes"):
            found = [aucs.get((row["predictor"], row["ahead"], signal, target)) for target in ("accepted", "gain")]
            parts.append(" / ".join(foretold(each) for each in found))
        lines.append(f"| {row['predictor']} | {row['ahead']} | " + " | ".join(parts) + " |")
    lines.append("")
    cascades = [r for r in rows if r["kind"] == "cascades" and r["case"] == case and r["predictor"] in PREDICTORS]
    for regime in ("stable", "all"):
        some = [row for row in cascades if row["regime"] == regime]
        if some:
            parts = [
                f"{row['predictor']} {row['depth']}×{row['ahead']} {100 * row['complete']:.0f} % "
                f"(net {row['net_steps']:+.1f})"
                for row in some
            ]
            lines += [f"Cascades complete from {regime} snapshots: {'; '.join(parts)}.", ""]
    return lines


def foretold(row: Mapping[str, Any] | None) -> str:
    if row is None or row["auc"] is None:
        return "·"
    return f"{row['auc']:.2f} [{row['auc_low']:.2f}, {row['auc_high']:.2f}]"


def regimes(rows: Rows, case: str) -> str:
    some = [row for row in rows if row["kind"] == "regimes" and row["case"] == case]
    counts = ", ".join(
        f"{name} {np.mean([row[name] for row in some]):.1f} ± {np.std([row[name] for row in some], ddof=1):.1f}"
        for name in REGIMES[:3]
    )
    low, high = (np.mean([row[key] for row in some]) for key in ("low", "high"))
    parted = f"thresholds (30th, 70th percentile) {low:.6f}, {high:.6f}"
    return f"Of {some[0]['snapshots']} snapshots a run: {counts}; {parted}."


def draw(rows: Rows, cases: Sequence[str], path: Path) -> None:
    """Acceptance of the linear leap, and how often it was worth its steps, against K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(cases), figsize=(3.1 * len(cases), 3.4), sharey=True, layout="constrained")
    for axis, case in zip(axes, cases, strict=True):
        some = [r for r in rows if r["kind"] == "summary" and r["case"] == case and r["regime"] == "all"]
        for predictor, colour in (("linear", "#1f5fa8"), ("momentum", "#e15759")):
            own = [row for row in some if row["predictor"] == predictor]
            ahead = [row["ahead"] for row in own]
            axis.plot(ahead, [100 * row["accepted_strict"] for row in own], color=colour, marker="o", ms=3,
                      label=f"{predictor}: accepted")  # fmt: skip
            worth = [np.nan if row["worth_k"] is None else 100 * row["worth_k"] for row in own]
            axis.plot(ahead, worth, color=colour, linestyle="--", marker="x", ms=4, label=f"{predictor}: worth K steps")
        axis.set_title(case.replace(", ", "\n"), fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks(AHEAD, [str(each) for each in AHEAD], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel("K, steps of the leap")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of snapshots")
    axes[0].set_ylim(-3, 103)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def clean(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}


def parsed(description: str | None) -> tuple[argparse.Namespace, Size]:
    """The options that this script and `leap_moments.py` share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="124M parameters, 2000 steps, 5 seeds")
    parser.add_argument("--data", default="wikitext2", help="text to train on; see `farcli workloads`")
    parser.add_argument("--base", default="shakespeare", help="text that fine-tuning comes from")
    parser.add_argument("--runs", type=Path, default=Path("runs/leap"), help="where recordings are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs / ("full" if arguments.full else "small")
    torch.set_num_threads(torch.get_num_threads() if arguments.full else 1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments, FULL if arguments.full else SMALL


def main() -> None:
    arguments, size = parsed(__doc__)
    stores, sweeps = recordings(size, arguments)
    rows: Rows = []
    for case, store in stores.items():
        # single leaps are too many to keep: `farcli leap STORE` prints them again
        kinds = ("summary", "cascades", "auc", "regimes")
        found = judged(store, kinds, predictors=PREDICTORS, ahead=AHEAD, criteria=CRITERIA)
        rows += [{"case": case.name, **row} for row in found]
        print(f"{case.name}: judged", flush=True)
    name = "leap-verify-full" if arguments.full else "leap-verify"
    with open(arguments.out / f"{name}.ndjson", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(clean(row)) + "\n" for row in rows)
    cases = [case.name for case in stores]
    lines = ["# Leap+Verify: acceptance, and what it is worth", ""]
    lines += [f"`make leap-verify{' FULL=--full' if arguments.full else ''}`: {size.runs} seeds, {size.steps} steps, a "
              f"snapshot every {EVERY}, {dict(size.options)}, on {arguments.data}; fine-tuning comes from "
              f"{arguments.base}.", "",
              "Mean ± std over seeds. In brackets: published, GPT-2 124M fine-tuned on WikiText-103, linear. Worth:",
              "training steps of the run itself that bring the same held-out loss (median [quartiles]); net: mean",
              "steps gained by leaping where strict accepts, less two held-out evaluations a leap; AUC: how well a",
              "signal foretells strict acceptance / more than 0 equivalent steps [95 % bootstrap over snapshots].",
              ""]  # fmt: skip
    for start, losses in sweeps.items():
        lines += [f"Rates tried {start} (seed {SWEEP_SEED}), final held-out loss: "
                  + ", ".join(f"{rate:g} {loss:.3f}" for rate, loss in losses.items()) + ".", ""]  # fmt: skip
    for case in cases:
        final = next(row["final_loss"] for row in rows if row["case"] == case)
        lines += [f"## {case}", "", f"Final held-out loss {final:.3f} nats. {regimes(rows, case)}", ""]
        lines += acceptance(rows, case) + beside(rows, case)
    text = "\n".join(lines)
    (arguments.out / f"{name}.md").write_text(text, encoding="utf-8")
    draw(rows, cases, arguments.out / f"{name}.png")
    print(text)


if __name__ == "__main__":
    main()
