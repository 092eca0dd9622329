"""What a verified forecast by `far` is worth on real networks, from the first 8 snapshots and from later ones.

    python scripts/far_networks.py                    # all of them; DistilBERT takes five hours and 26 GB
    python scripts/far_networks.py digits-cnn         # or some of them

Every network is recorded at its workload's tuned rate (the plain CNN: tuned on as many images), a snapshot an epoch
(the plain CNN: four; DistilBERT: four an epoch of 640 sentences), the digits and DistilBERT again at .012 and 1e-4,
nearer to what is best for a rate that falls, three and ten an epoch. `far` is fitted on some runs and judged on others,
from w_n with n = 8 snapshots, and so are the yardsticks.
A forecast counts only where it lowers the loss of four batches that nothing is reported on, run by run, and as far
along as does so most (`eval --lengths`; DistilBERT: all the way), else w_n does; worth is in epochs, after paying for
that. Beside networks with BatchNorm stands what new statistics do for w_n alone.
Rows go to scripts/results/far-networks.ndjson, a table and a picture beside.

Worth in epochs is read off a run's own curve, at a rate that never falls; an average of snapshots gains on that curve
what any fall of the rate would gain as well, and so would a higher rate where it was too low. So there is a control
(`eval --control`): the judged runs trained on from w_n with the rate falling to 0, from wherever is best. Either one
stops at the forecast, or both end so, one epoch on: a forecast is worth the better of these, or what it is on the run's
own curve if that is less.

The goal, wherever training still improves (the true weights at that horizon have 95 % of w_n's loss or less): held-out
loss at most .85 of w_n's, 95 % of the networks not worse, at least one epoch gained, by either measure. Late in
training nothing should win, and `far` should say so by keeping w_n.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from farcli import evaluate, fit, record
from farcli.store import Trajectory
from farcli.verbs.plot import saved_panels

Rows = list[dict[str, Any]]
CONTEXT = 8
BATCHES = 4
"""To verify on."""
IMPROVING, LOSS, NOT_WORSE, EPOCHS = 0.95, 0.85, 0.95, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network in training.

    Attributes:
        workload: its name.
        options: of the workload.
        every: steps between snapshots.
        epoch: steps of an epoch.
        last: snapshot the recording ends with.
        starts: snapshots to forecast from.
        ahead: horizons, in snapshots.
        train: runs to fit on.
        test: runs to judge on.
        at: steps of the snapshots, where they are not all that `every` names.
        seed: of the recording.
        test_seed: of one of its own for the runs judged, where they have one.
        method: options of `far`.
        lengths: shares of the way to a forecast that verification may choose from.
        memory: bytes that the data may take.
    """

    workload: str
    options: dict[str, str]
    every: int
    epoch: int
    last: int
    starts: tuple[int, ...]
    ahead: tuple[int, ...]
    train: int
    test: int
    at: tuple[int, ...] = ()
    seed: int = 100
    test_seed: int | None = None
    method: dict[str, str] = field(default_factory=dict)
    lengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    memory: int = 2_000_000_000


CASES = {
    "digits-cnn": Case(workload="digits-cnn", options={"held_back": "300", "own_split": "true"}, every=15, epoch=15,
                       last=47, starts=(7, 15, 31), ahead=(1, 2, 4, 8, 16), train=25, test=40),
    "digits-mlp": Case(workload="image-mlp", options={"train": "997", "own_split": "true"}, every=15, epoch=15,
                       last=47, starts=(7, 15, 31), ahead=(1, 2, 4, 8, 16), train=25, test=40),
    "digits-cnn-fast": Case(workload="digits-cnn", options={"held_back": "300", "own_split": "true", "lr": "0.012"},
                            every=5, epoch=15, last=52, starts=(7, 14, 28), ahead=(3, 6, 12, 24), train=25, test=40,
                            lengths=(1.0,)),
    "digits-mlp-fast": Case(workload="image-mlp", options={"train": "997", "own_split": "true", "lr": "0.012"},
                            every=5, epoch=15, last=52, starts=(7, 14, 28), ahead=(3, 6, 12, 24), train=25, test=40,
                            lengths=(1.0,)),
    "fashion-cnn": Case(workload="nas-cnn", options={"data": "fashion-mnist", "train": "2560", "held_out": "1000"},
                        every=20, epoch=20, last=23, starts=(7,), ahead=(1, 2, 4, 8), train=20, test=20),
    "fashion-cnn-adam": Case(workload="nas-cnn", options={"data": "fashion-mnist", "train": "2560", "held_out": "1000",
                                                          "optimizer": "adam"},
                             every=20, epoch=20, last=15, starts=(7,), ahead=(1, 2, 4, 8), train=20, test=20),
    "fashion-plain-cnn": Case(workload="image-cnn", options={"data": "fashion-mnist", "train": "2560",
                                                             "held_out": "1000", "optimizer": "sgd", "lr": "0.2"},
                              every=5, epoch=20, last=60, starts=(7, 14, 28, 44), ahead=(4, 8, 16), train=20, test=40),
    "distilbert": Case(workload="distilbert", options={"held_back": "8928", "sentences": "250"}, every=5, epoch=20,
                       last=15, starts=(7,), ahead=(2, 4, 8), train=8, test=10,
                       method={"method": "loss", "updates": "50", "trends": "false"}, lengths=(1.0,),
                       memory=14_000_000_000),
    "distilbert-fast": Case(workload="distilbert", options={"held_back": "8928", "sentences": "250",
                                                            "own_split": "true", "lr": "1e-4"},
                            every=2, epoch=20, last=27, starts=(7,), ahead=(5, 10, 20), train=10, test=5,
                            at=(*range(0, 16, 2), 24, 34, 44, 54), seed=900, test_seed=901,
                            method={"method": "loss", "updates": "50", "lr": "0.1", "trends": "false"}, lengths=(1.0,),
                            memory=16_000_000_000),
}  # fmt: skip


def weighed(name: str, case: Case, runs: Path) -> Iterator[Rows]:
    """Record what is not there yet; then the rows from each start."""
    store = recorded(case, runs / f"{name}.zarr", case.train + case.test * (case.test_seed is None), case.seed)
    test, judged_runs = store, f"{case.train}:{case.train + case.test}"
    if case.test_seed is not None:
        test, judged_runs = recorded(case, runs / f"{name}-test.zarr", case.test, case.test_seed), f"0:{case.test}"
    layout = Trajectory.open(store).layout
    for start in case.starts:
        origin = start * case.every
        targets = ",".join(str(origin + ahead * case.every) for ahead in case.ahead)
        file = runs / f"{name}-{start}.safetensors"
        fitted = fit("far", [str(store)], file, context=CONTEXT, start=origin, targets=targets, device="cpu",
                     train_runs=f"0:{case.train}", options=case.method, memory=case.memory, replace=True)  # fmt: skip
        found = evaluate([str(file)], str(test), runs=judged_runs, targets=targets, verify=BATCHES,
                         lengths=case.lengths, control=True, device="cpu", memory=case.memory)  # fmt: skip
        if layout.size > layout.parameters:  # BatchNorm's statistics
            again = evaluate(["persistence"], str(test), runs=judged_runs, targets=targets, start=origin,
                             buffers="reestimate", device="cpu", memory=case.memory)  # fmt: skip
            found += [row | {"role": "reestimated"} for row in again if row["method"] == "persistence"]
        print(f"{name}, from snapshot {start}: done", flush=True)
        yield [{"network": name, "epoch": case.epoch, "start": start, "seconds": fitted["seconds"], **row}
               for row in found]  # fmt: skip


def recorded(case: Case, store: Path, runs: int, seed: int) -> Path:
    """A recording that is there already, or is made."""
    if not (store / "zarr.json").exists():
        steps, every = case.every * case.last, None if case.at else case.every
        record(case.workload, store, runs=runs, steps=steps, every=every, at=case.at or None, seed=seed,
               options=case.options, resume=True)  # fmt: skip
    return store


def judged(rows: Rows) -> Rows:
    """One line for each network, start and horizon: `far`, the best yardstick and the true future over keeping w_n."""
    lines: Rows = []
    for row in rows:
        if row["role"] != "forecast":
            continue
        beside = [other for other in rows if all(other[key] == row[key] for key in ("network", "start", "step"))]
        [kept] = [other["loss"] for other in beside if (other["method"], other["role"]) == ("persistence", "yardstick")]
        again = [other["loss"] for other in beside if other["role"] == "reestimated"]
        [true] = [other["loss"] for other in beside if other["role"] == "truth"]
        best = min((other for other in beside if other["role"] == "yardstick"), key=lambda other: other["loss"])
        place = [other for other in rows if all(other[key] == row[key] for key in ("network", "start"))]
        control = [(other["ahead"], other["loss"]) for other in place if other["role"] == "control"]
        ratio, improving = row["loss"] / kept, true / kept <= IMPROVING
        worths = ("equivalent_steps", "equivalent_steps_low", "equivalent_steps_high", "net_steps")
        epochs = {key: row[key] / row["epoch"] for key in worths}
        cost = epochs["equivalent_steps"] - epochs["net_steps"]
        falling = epochs_of(row, "control_steps") if control else None
        saved = None if row["finished_loss"] is None else epochs_of(row, "saved_steps")
        furthest = (row["control_furthest"] or 0) / row["epoch"]
        finish = min(other["ahead"] for other in place)
        worth = None
        if control:  # where it does not get there, no more than was measured is claimed
            by_control = max(min(falling or 0.0, furthest), min(saved or 0.0, furthest - finish / row["epoch"]))
            worth = min(epochs["equivalent_steps"], by_control) - cost
        reached: bool | None = ratio <= LOSS and row["not_worse"] >= NOT_WORSE
        if reached:
            reached = None if worth is None else worth >= EPOCHS
        lines.append({
            "network": row["network"], "start": row["start"], "from_epoch": (row["step"] - row["ahead"]) / row["epoch"],
            "ahead": row["ahead"], "ahead_epochs": row["ahead"] / row["epoch"], "runs": row["runs"], "kept_loss": kept,
            "ratio": ratio, "not_worse": row["not_worse"], "better": row["better"], "verified": row["kept"],
            **{key.replace("steps", "epochs"): value for key, value in epochs.items()},
            "yardstick": best["method"], "yardstick_ratio": best["loss"] / kept, "true_ratio": true / kept,
            "reestimated_ratio": again[0] / kept if again else None,
            "control": [[ahead / row["epoch"], loss / kept] for ahead, loss in control],
            "control_epochs": falling, "saved_epochs": saved, "worth": worth,
            "furthest_epochs": furthest, "finish_epochs": finish / row["epoch"],
            "finished_ratio": None if saved is None else row["finished_loss"] / kept,
            "yardstick_saved_epochs": None if best["finished_loss"] is None else epochs_of(best, "saved_steps"),
            "improving": improving, "reached": reached if improving else None,
        })  # fmt: skip
    return lines


def epochs_of(row: dict[str, Any], key: str) -> float:
    """Steps of a row's as epochs; infinity where the control does not get there."""
    return inf if row[key] is None else row[key] / row["epoch"]


def markdown(lines: Rows) -> str:
    text = [
        "# What a verified forecast by `far` is worth on real networks, n = 8",
        "",
        "Losses are held out and over that of keeping w_n; worth in epochs, median over the networks [95 %], before "
        "and after paying for the verification. Control: the same runs trained on from w_n, the rate falling to 0 "
        "within 1 epoch, and within the best of those ahead (¼, ½ and 2 epochs are measured too), its start doubled "
        "for as long as that helps, the optimiser's state kept or new; how many such epochs reach the loss of `far`; "
        "and how many are saved where both train so, an epoch on from the forecast (DistilBERT: half); of the best "
        "yardstick too. Worth: the better of the two, or that on the own curve if it is less, net. "
        "`make far-networks`; goal: ≤ .85, ≥ 95 % not worse, worth ≥ 1 epoch.",
        "",
        "| network, runs | from epoch | ahead | loss | not worse | passed | own curve, epochs | net "
        "| best yardstick, verified too | w_n, statistics anew | true future | control, 1 epoch | best "
        "| reached within | saved | by the yardstick | worth | goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    marks = {None: "·", True: "reached", False: "not reached"}
    for line in lines:
        text.append(
            f"| {line['network']}, {line['runs']} | {line['from_epoch']:.3g} | {line['ahead_epochs']:g} "
            f"| {line['ratio']:.2f} | {line['not_worse']:.0%} | {line['verified']:.0%} "
            f"| {line['equivalent_epochs']:+.1f} [{line['equivalent_epochs_low']:+.1f}, "
            f"{line['equivalent_epochs_high']:+.1f}] | {line['net_epochs']:+.1f} "
            f"| {line['yardstick']} {line['yardstick_ratio']:.2f} "
            f"| {'·' if line['reestimated_ratio'] is None else format(line['reestimated_ratio'], '.2f')} "
            f"| {line['true_ratio']:.2f} "
            f"| {control_cells(line)} "
            f"| {marks[line['reached']]} |"
        )
    no_goal = "·: no goal, where the true weights have over 95 % of w_n's loss; elsewhere not measured."
    return "\n".join([*text, "", no_goal, ""])


def control_cells(line: dict[str, Any]) -> str:
    """Cells of the control: after an epoch, at its best, and what the forecast and the yardstick are worth by it."""
    control = dict(line["control"])
    if not control:
        return "· | · | · | · | · | ·"
    best, furthest = min(control, key=lambda epochs: control[epochs]), line["furthest_epochs"]
    most = f"> {furthest - line['finish_epochs']:+g}"
    reached = f"> {furthest:g}" if line["control_epochs"] == inf else f"{line['control_epochs']:.1f}"
    saved = [line["saved_epochs"], line["yardstick_saved_epochs"]]
    cells = ["·" if each is None else most if each == inf else f"{each:+.1f}" for each in saved]
    return " | ".join(
        [f"{control[1.0]:.2f}", f"{control[best]:.2f} ({best:g})", reached, *cells, f"{line['worth']:+.1f}"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(CASES)}; all when none is named")
    parser.add_argument("--runs", type=Path, default=Path("runs/far-networks"), help="where recordings are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    unknown = set(given.networks) - set(CASES)
    if unknown:
        parser.error(f"unknown network {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    for folder in (given.runs, given.out):
        folder.mkdir(parents=True, exist_ok=True)
    file = given.out / "far-networks.ndjson"
    before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in given.networks or list(CASES):
        for rows in weighed(name, CASES[name], given.runs):
            place = (name, rows[0]["start"])
            before = [row for row in before if (row["network"], row["start"]) != place] + rows
            before.sort(key=lambda row: (list(CASES).index(row["network"]), row["start"]))
            file.write_text("".join(json.dumps(row) + "\n" for row in before), encoding="utf-8")
    lines = judged(before)
    text = markdown(lines)
    (given.out / "far-networks.md").write_text(text, encoding="utf-8")
    print(text)
    draw(lines, given.out / "far-networks.png")


def draw(lines: Rows, path: Path) -> None:
    """A panel for each network and start."""
    places = list(dict.fromkeys((line["network"], line["start"]) for line in lines))
    size = (11, 2.3 * -(-len(places) // 4) + 0.5)
    with saved_panels(path, True, len(places), across=4, size=size, sharey=True) as panels:
        for panel, place in zip(panels, places, strict=True):
            own = [line for line in lines if (line["network"], line["start"]) == place]
            ahead = [line["ahead_epochs"] for line in own]
            for key, style, label in (
                ("ratio", "C0o-", "far, verified"),
                ("yardstick_ratio", "C1x--", "best yardstick, verified"),
                ("true_ratio", "k:", "true future"),
            ):
                panel.plot(ahead, [line[key] for line in own], style, label=label, ms=4)
            epochs, losses = zip(*own[0]["control"], strict=True) if own[0]["control"] else ((), ())
            panel.plot(epochs, losses, "C3.-", lw=0.8, label="trained on, rate falling to 0", ms=4)
            finished = own[-1]["finished_ratio"]
            panel.plot(
                ahead[:1], [float("nan") if finished is None else finished], "C3D", label="far, then the same", ms=6
            )
            panel.axhline(1, color="#8c8c8c", lw=0.8)
            panel.axhline(LOSS, color="C2", lw=0.8, label="goal")
            panel.set(xscale="log", title=f"{place[0]}, epoch {own[0]['from_epoch']:.3g}")
            panel.title.set_fontsize(9)
            panel.set_xticks(ahead, [f"{epochs:g}" for epochs in ahead])
            panel.minorticks_off()
            panel.tick_params(labelsize=7)
        panels[0].set_ylim(0, 1.05)
        figure = panels[0].figure
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
        figure.suptitle("held-out loss over that of w_n, against epochs ahead", fontsize=10)


if __name__ == "__main__":
    main()
