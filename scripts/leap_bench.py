"""Do leaps pay? Every method at its own best learning rate, against controls at theirs, by net cost to the same loss.

    make leap-bench            four workloads, about three hours on two cores; finished cells are kept
    make leap-bench FULL=--full   larger ones, on a GPU where there is one
    python scripts/leap_bench.py --workloads gpt2,cnn --jobs 2

For each workload the controls (constant rate with EMA, cosine, WSD with EMA) and every method sweep the learning rate
on tuning seeds, by factors of two until the best is not at an edge; settings of a method (how often to leap, μ, η)
are those that did best on the *other* workloads, settings of a control those that did best on its own. Then the chosen
ones train on five other seeds with two budgets (half and all of T, the schedule laid out for each), which gives
held-out loss against net cost: training steps, verification, and what proposing costs in floating-point operations,
in units of the control's training step. The speed-up is the cost of the best control over the cost at which a method's
line reaches that control's final loss; its interval resamples seeds, with those of method and control paired.

Verification data are never trained on and never reported (`Workload.verification`); tuning seeds are never reported.
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.5, 1.0)
TUNING = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
_NINO = Path(os.environ.get("FARCLI_NINO", "nino_mlp.pt"))


@dataclass(frozen=True, slots=True)
class Task:
    """A workload as it is trained here; `without` names methods that would cost more than they could bring, or time."""

    workload: str
    options: Mapping[str, str]
    steps: int
    rate: float
    warmup: float = 0.1
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        schedule: options of the learning rate.
        leaping: options of the leaper; None where there is nothing but the average.
        predictor: what leaps.
        settings: its choices: of each, options of the predictor and of the leaper ("every", …).
        gate: that verifies.
        look: whether a window's first leap is looked at.
        reports: which weights the final loss is taken at.
        control: whether leaps are measured against it.
        memory: of the running average, as a share of the steps.
        muon: torch.optim.Muon for matrices that are no embeddings, AdamW for the rest: leaps that even out
            displacements have to be held against an optimiser that does so with gradients.
        lawa: the weights reported are the mean of the last five, a fiftieth of the training apart (Kaddour 2022).
        like: method and setting whose learning rate it takes, instead of a sweep of its own.
    """

    schedule: Mapping[str, str]
    predictor: str | None = None
    settings: Mapping[str, Mapping[str, Any]] | None = None
    gate: str = "none"
    look: bool = True
    reports: str = "average"
    control: bool = False
    memory: float = 0.05
    like: tuple[str, str] | None = None
    muon: bool = False
    lawa: bool = False


# A step of 192 tokens costs an eighth of orthogonalising 22.7M parameters once, and less of NiNo's network on them.
_DEAR = ("Muon (another optimiser)", "NiNo-MLP", "spectral, not looked at first")

TASKS = {
    "gpt2": Task(
        "gpt2",
        {"layers": "2", "heads": "2", "width": "64", "context": "64", "batch": "16", "windows": "256"},
        steps=600,
        rate=3e-3,
        warmup=0.2,  # with 0.06, the control's loss at its best rate was 2.28 instead of 2.15
    ),
    "cnn": Task("nas-cnn", {"optimizer": "adamw", "held_out": "2000", "batch": "64"}, steps=500, rate=1e-2),
    "large-batch": Task(
        "vit",
        {
            "optimizer": "adamw",
            "data": "fashion-mnist",
            "depth": "2",
            "hidden": "64",
            "patch": "8",
            "batch": "512",
            "held_out": "2000",
        },
        steps=150,
        rate=2e-3,
    ),
    "distilbert": Task(
        "distilbert", {"length": "24", "batch": "8", "sentences": "400"}, steps=60, rate=5e-5, without=_DEAR
    ),
    "gpt2-full": Task(
        "gpt2",
        {"layers": "6", "heads": "6", "width": "384", "context": "256", "batch": "32", "windows": "256"},
        steps=2000,
        rate=1e-3,
    ),
    "cnn-full": Task("nas-cnn", {"optimizer": "adamw", "held_out": "5000", "batch": "128"}, steps=4000, rate=1e-2),
    "large-batch-full": Task(
        "vit",
        {"optimizer": "adamw", "depth": "6", "hidden": "128", "patch": "4", "batch": "2048", "held_out": "5000"},
        steps=600,
        rate=2e-3,
    ),
    "distilbert-full": Task(
        "distilbert", {"length": "64", "batch": "32", "sentences": "1000"}, steps=300, rate=5e-5, without=("NiNo-MLP",)
    ),
}

_SPECTRAL = {
    "every=5": {"every": 5, "gain": "1"},
    "every=5 gain=1.3": {"every": 5, "gain": "1.3"},
    "every=10 gain=1.3": {"every": 10, "gain": "1.3"},
}

METHODS = {
    "constant + EMA": Method(
        {"schedule": "constant"},
        control=True,
        settings={"memory=.05": {"memory": 0.05}, "memory=.15": {"memory": 0.15}},
    ),
    "cosine": Method({"schedule": "cosine"}, control=True, reports="weights"),
    "WSD + EMA": Method(
        {"schedule": "wsd"}, control=True, settings={"decay=.25": {"decay": "0.25"}, "decay=.5": {"decay": "0.5"}}
    ),
    "spectral, verified": Method(
        {"schedule": "wsd"},
        "spectral",
        _SPECTRAL,
        gate="delayed",
    ),
    "spectral, not looked at first": Method({"schedule": "wsd"}, "spectral", _SPECTRAL, gate="delayed", look=False),
    "outer momentum (SNOO)": Method(
        {"schedule": "wsd"}, "outer", {"μ=.5 η=.7": {"every": 0.03, "momentum": "0.5", "rate": "0.7"}}
    ),
    "linear, strict (Leap+Verify)": Method({"schedule": "wsd"}, "linear", {"K=Δ=.02T": {"every": 0.02}}, gate="strict"),
    "Muon (another optimiser)": Method({"schedule": "wsd"}, muon=True),
    "NiNo-MLP": Method({"schedule": "wsd"}, "nino-mlp", {"5 states": {"every": 0.03, "period": 5, "ahead": 4.0}}),
    "constant + LAWA": Method({"schedule": "constant"}, lawa=True),
    "Lookahead": Method({"schedule": "wsd"}, "lookahead", {"k=5": {"every": 5, "alpha": "0.5"}}),
    "every leap rejected": Method(
        {"schedule": "wsd"},
        "lookahead",
        {"away": {"every": 0.02, "alpha": "30"}},
        gate="strict",
        like=("WSD + EMA", "decay=.25"),
    ),
    "every leap rejected, delayed": Method(
        {"schedule": "wsd"},
        "lookahead",
        {"away": {"every": 0.02, "alpha": "30"}},
        gate="delayed",
        like=("WSD + EMA", "decay=.25"),
    ),
}


# ---------------------------------------------------------------- one training


def train(task: str, method: str, setting: str, rate: float, budget: float, seed: int) -> dict[str, Any]:
    """Train once: held-out losses at the end, and what it cost."""
    import numpy as np
    import torch

    from farcli.errors import NonFiniteError
    from farcli.speculation.arms import Arm, build_predictor
    from farcli.speculation.leaper import Leaper
    from farcli.speculation.options import Leaping
    from farcli.training import TrainingRun, run_seed, workload_from
    from farcli.verbs.leap import WorkloadValidation, step_operations

    torch.set_num_threads(1)
    what, how = TASKS[task], METHODS[method]
    chosen = dict((how.settings or {}).get(setting, {}))
    steps = round(what.steps * budget)
    warmup = round(what.warmup * steps)
    options = {**what.options, **how.schedule, "lr": str(rate), "warmup": str(warmup)}
    if "decay" in chosen:
        options["decay"] = chosen.pop("decay")
    memory = max(2, round(chosen.pop("memory", how.memory) * steps))
    every = chosen.pop("every", 0.05)
    every = every if isinstance(every, int) else max(2, round(every * steps))
    period = chosen.pop("period", 1)
    ahead = chosen.pop("ahead", None)
    window = max(every, round(steps / 8))
    leaping = Leaping(
        every=every,
        period=period,
        ahead=None if ahead is None else round(ahead * every),
        gate=how.gate,  # type: ignore[arg-type]
        look=how.look,
        window=window,
        memory=memory,
        compute=0.02 if how.gate == "delayed" else 1.0,  # peers as published, their cost counted
        watch=0.0 if how.gate == "none" else 1.5,
        stride=max(1, memory // 10),
        start=2 * every,
        until=steps - window,
    )
    if how.predictor == "nino-mlp":
        chosen["weights"] = str(_NINO)
    workload = placed(workload_from(what.workload, options, steps=steps))
    own = run_seed(seed, 0)
    training = TrainingRun(workload, [own])
    if how.muon:
        training.optimizer = muon(training.model, rate)
        training._rates = [rate, rate]
    arms = [] if how.predictor is None else [Arm(how.predictor, build_predictor(how.predictor, chosen), 1.0)]
    leaper = Leaper(
        training.model,
        training.optimizer,
        arms,
        options=leaping,
        step_flops=step_operations(workload, own),
        validate=None if how.gate == "none" else WorkloadValidation(workload, own, 1),
    )
    row: dict[str, Any] = {
        "task": task,
        "method": method,
        "setting": setting,
        "rate": rate,
        "budget": budget,
        "seed": seed,
        "steps": steps,
        "loss": None,
        "average_loss": None,
    }
    began = time.process_time()
    try:
        with leaper:
            latest: deque[Any] = deque(maxlen=5)
            while training.step < steps:
                training.advance(min(max(1, steps // 50), steps - training.step) if how.lawa else steps)
                latest.append(training.vectors() if how.lawa else None)
            leaper.finish()
        row["cpu_seconds"] = time.process_time() - began
        row["loss"] = finite(workload.evaluate(training.model, own)["loss"])
        if how.lawa:
            training.load(np.mean(list(latest), axis=0))
            row["average_loss"] = finite(workload.evaluate(training.model, own)["loss"])
            return row | {
                "verification": 0.0,
                "proposing": 0.0,
                "cost": steps,
                "proposals": 0,
                "accepted": 0,
                "lost": 0,
            }
        with leaper.average():
            row["average_loss"] = finite(workload.evaluate(training.model, own)["loss"])
    except NonFiniteError as error:
        row["diverged"] = str(error)
    account = leaper.account
    return row | {
        "verification": account.verification,
        "proposing": account.proposing,
        "cost": account.cost,
        "proposals": account.proposals,
        "accepted": account.accepted + account.unverified,
        "lost": account.lost,
    }


class OnCuda:
    """A workload whose network and batches are on a GPU; reported losses are taken on a copy that is not."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def model(self, seeds: Sequence[int]) -> Any:
        return self._inner.model(seeds).to("cuda")

    def batches(self, *words: Any) -> Iterator[Any]:
        return (tuple(part.to("cuda") for part in batch) for batch in self._inner.batches(*words))

    def verification(self, *words: Any) -> list[Any]:
        return [tuple(part.to("cuda") for part in batch) for batch in self._inner.verification(*words)]

    def evaluate(self, model: Any, seed: int) -> dict[str, float]:
        return self._inner.evaluate(deepcopy(model).cpu(), seed)


def placed(workload: Any) -> Any:
    """The workload on a GPU, where there is one."""
    import torch

    return OnCuda(workload) if torch.cuda.is_available() else workload


def muon(model: Any, rate: float) -> Any:
    """Muon for matrices, AdamW for embeddings and what is no matrix, as one optimiser at one learning rate."""
    import torch

    tables = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    matrices = [each for each in model.parameters() if each.ndim == 2 and id(each) not in tables]
    others = [each for each in model.parameters() if each.ndim != 2 or id(each) in tables]

    class Both(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([*matrices, *others], {"lr": rate})
            self.parts = [
                torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, lr=rate, weight_decay=0.01),
            ]
            self.param_groups = [group for part in self.parts for group in part.param_groups]

        def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            for part in self.parts:
                part.step()

    return Both()


def finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def reported(row: Mapping[str, Any]) -> float:
    value = row["loss" if METHODS[row["method"]].reports == "weights" else "average_loss"]
    return float("inf") if value is None else float(value)


# ----------------------------------------------------------------------- cells

Key = tuple[str, str, str, float, float, int]


class Cells:
    """What has been trained; one line of NDJSON each, appended as it comes."""

    def __init__(self, path: Path, jobs: int) -> None:
        self.path = path
        self.rows: dict[Key, dict[str, Any]] = {}
        self._pool = ProcessPoolExecutor(jobs)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[_key(row)] = row

    def close(self) -> None:
        """Let the processes go."""
        self._pool.shutdown()

    def get(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """The rows of these cells, trained where they are not there yet."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.rows]
        for done, row in enumerate(self._pool.map(_train, missing), 1):
            self.rows[_key(row)] = row
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            text = f"{row['task']}, {row['method']}, {row['setting']}, lr {row['rate']:g}, {row['budget']:g} T"
            print(f"{done}/{len(missing)} {text}, seed {row['seed']}: {reported(row):.4f}", file=sys.stderr, flush=True)
        return [self.rows[key] for key in keys]


def _train(key: Key) -> dict[str, Any]:
    return train(*key)


def _key(row: Mapping[str, Any]) -> Key:
    return (row["task"], row["method"], row["setting"], row["rate"], row["budget"], row["seed"])


def settings_of(method: str) -> list[str]:
    return list(METHODS[method].settings or {"": {}})


Sweep = tuple[str, str, str]
"""Task, method, setting."""


def sweeps(cells: Cells, tasks: Sequence[str], tuning: Sequence[int]) -> dict[Sweep, tuple[float, float]]:
    """The best rate and its mean loss over tuning seeds: by factors of two, until the best is not at an edge."""
    rates = {
        (task, method, setting): [TASKS[task].rate * factor for factor in (0.5, 1.0, 2.0)]
        for task in tasks
        for method, how in METHODS.items()
        for setting in settings_of(method)
        if how.like is None and method not in TASKS[task].without
    }
    best: dict[Sweep, tuple[float, float]] = {}
    while len(best) < len(rates):
        left = {what: tried for what, tried in rates.items() if what not in best}
        keys = [(*what, rate, 1.0, seed) for what, tried in left.items() for rate in tried for seed in tuning]
        losses = {_key(row): reported(row) for row in cells.get(keys)}
        for what, tried in left.items():
            means = [sum(losses[*what, rate, 1.0, seed] for seed in tuning) / len(tuning) for rate in tried]
            at = means.index(min(means))
            if 0 < at < len(tried) - 1 or len(tried) >= 6:
                best[what] = tried[at], means[at]
            else:
                rates[what] = [tried[0] / 2, *tried] if at == 0 else [*tried, tried[-1] * 2]
    for task in tasks:
        for method, how in METHODS.items():
            if how.like is not None:
                best[task, method, settings_of(method)[0]] = best[task, *how.like][0], float("nan")
    return best


# ---------------------------------------------------------------------- results


def chosen_settings(best: Mapping[Sweep, tuple[float, float]], tasks: Sequence[str]) -> dict[tuple[str, str], str]:
    """For each task and method, the setting to report: a control's best on the task, a method's best on the others."""
    reference = {
        task: min(loss for (t, method, _), (_, loss) in best.items() if t == task and METHODS[method].control)
        for task in tasks
    }
    chosen = {}
    for task in tasks:
        for method, how in METHODS.items():
            judges = [task] if how.control or len(tasks) == 1 else [other for other in tasks if other != task]
            judges = [other for other in judges if method not in TASKS[other].without]
            scores = {
                setting: sum(best[other, method, setting][1] / reference[other] for other in judges)
                for setting in settings_of(method)
                if (task, method, setting) in best
            }
            if scores:
                chosen[task, method] = min(scores, key=lambda setting: scores[setting])
    return chosen


def cost_to(costs: Sequence[float], losses: Sequence[float], target: float) -> tuple[float, bool]:
    """Cost at which a method's line of loss over log cost comes down to a target; whether that is beyond what ran."""
    import numpy as np

    x, y = np.log(costs), np.asarray(losses, float)
    for low in range(len(x) - 1):
        if y[low] >= target >= y[low + 1] and y[low] > y[low + 1]:
            # beside a diverged point there is no line: the dearer one's cost
            share = (y[low] - target) / (y[low] - y[low + 1]) if np.isfinite(y[low]) else 1.0
            return float(np.exp(x[low] + share * (x[low + 1] - x[low]))), False
    if target > y[0]:  # there already with the least that ran, and nobody knows how much less would have done
        return float(costs[0]), True
    if not np.isfinite(y[-2:]).all() or y[-1] >= y[-2]:
        return float("inf"), True
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    # no further than a factor of two: a line is no forecast
    return float(np.exp(min(x[-1] + (target - y[-1]) / slope, x[-1] + np.log(2)))), True


def reporting(
    task: str,
    chosen: Mapping[tuple[str, str], str],
    best: Mapping[Sweep, tuple[float, float]],
    seeds: Sequence[int],
) -> dict[str, list[Key]]:
    """The cells of each method that are reported, by seed and budget."""
    return {
        method: [
            (task, method, setting, best[task, method, setting][0], budget, seed)
            for seed in seeds
            for budget in BUDGETS
        ]
        for method in METHODS
        if (setting := chosen.get((task, method))) is not None
    }


def muon_share(task: str, method: str) -> float:
    """What orthogonalising at every step adds to the cost of a step, by operations; 0 for all but Muon."""
    if not METHODS[method].muon:
        return 0.0
    import torch

    from farcli.speculation.predictors.spectral import Spectral
    from farcli.training import TrainingRun, run_seed, workload_from
    from farcli.verbs.leap import step_operations

    what = TASKS[task]
    workload = workload_from(what.workload, what.options, steps=what.steps)
    training = TrainingRun(workload, [run_seed(0, 0)])
    names = {name for name, each in training.model.named_parameters() if each.ndim != 2}
    names |= {f"{name}.weight" for name, each in training.model.named_modules() if isinstance(each, torch.nn.Embedding)}
    operations = Spectral(Spectral.Config()).operations(training.layout, frozenset(names))
    return operations / step_operations(workload, run_seed(0, 0))


def compared(
    cells: Cells,
    task: str,
    chosen: Mapping[tuple[str, str], str],
    best: Mapping[Sweep, tuple[float, float]],
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each method: final losses, cost, and the speed-up against the task's best control."""
    import numpy as np

    tables: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    """Losses, costs and seconds by seed and budget."""
    for method, keys in reporting(task, chosen, best, seeds).items():
        rows = cells.get(keys)
        shape = (len(seeds), len(BUDGETS))
        tables[method] = (
            np.array([reported(row) for row in rows]).reshape(shape),
            np.array([row["cost"] for row in rows]).reshape(shape) * (1 + muon_share(task, method)),
            np.array([row.get("cpu_seconds") or np.nan for row in rows]).reshape(shape),
        )
    controls = [method for method in tables if METHODS[method].control]
    best_control = min(controls, key=lambda method: tables[method][0][:, -1].mean())
    random = np.random.default_rng(0)
    draws = random.integers(len(seeds), size=(2000, len(seeds)))
    result = []
    for method, (losses, costs, seconds) in tables.items():

        def speedup(rows: np.ndarray, method: str = method, of: int = 1) -> tuple[float, bool]:
            own, mine = tables[best_control], tables[method]
            cost, bound = cost_to(mine[of][rows].mean(0), mine[0][rows].mean(0), own[0][rows, -1].mean())
            return own[of][rows, -1].mean() / cost, bound

        point, bound = speedup(np.arange(len(seeds)))
        drawn = [speedup(rows)[0] for rows in draws]
        spread = np.quantile(drawn, (0.025, 0.975))
        difference = losses[:, -1] - tables[best_control][0][:, -1]
        worse = np.quantile([difference[rows].mean() for rows in draws], (0.025, 0.975))
        result.append(
            {
                "task": task,
                "method": method,
                "setting": chosen[task, method],
                "rate": best[task, method, chosen[task, method]][0],
                "best_control": method == best_control,
                "loss": losses[:, -1].mean(),
                "loss_sd": losses[:, -1].std(ddof=1),
                "difference": difference.mean(),
                "difference_low": worse[0],
                "difference_high": worse[1],
                "cost": costs[:, -1].mean() / TASKS[task].steps,
                "cpu_seconds": seconds[:, -1].mean(),
                "speedup": point,
                "speedup_low": spread[0],
                "speedup_high": spread[1],
                "bound": bound,
                "speedup_seconds": speedup(np.arange(len(seeds)), of=2)[0],
                "drawn": drawn,
            }
        )
    return [{key: value.item() if hasattr(value, "item") else value for key, value in row.items()} for row in result]


def together(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean of each method's speed-ups over the workloads, with the interval of its bootstrap draws."""
    import numpy as np

    result = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        with np.errstate(divide="ignore"):
            mean = float(np.exp(np.mean(np.log([row["speedup"] for row in own]))))
            drawn = np.exp(np.mean(np.log([row["drawn"] for row in own]), axis=0))
        low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
        whole = {"task": "all", "method": method, "workloads": len(own), "speedup": mean}
        result.append(whole | {"speedup_low": low, "speedup_high": high})
    return result


_READING = """Speed-up: cost of the best control over the cost at which a method reaches that control's final loss; ≥
where half of T was enough, ≈ where the line had to be extended. In brackets 95 % bootstrap intervals over the seeds,
paired with the control; five seeds make them too narrow, and the choice of rate and setting, on one tuning seed, is
not in them. Costs count steps, verification, steps lost to roll-backs and the operations of proposals, in training
steps; the last column counts processor seconds instead, which on a shared machine differ by a tenth from run to run.
`spectral` was developed on the first two workloads and has three settings that the others choose among; peers
have one, as published, but leap neither in the schedule's decay nor in the last eighth. Muon is torch.optim's:
convolutions are left to AdamW.
"""


def markdown(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Iterator[str]:
    yield "# Do leaps pay?\n"
    yield _READING
    yield "## All together\n"
    yield "| method | workloads | geometric mean of speed-ups |\n|---|---|---|"
    for row in together(rows):
        interval = f"[{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"
        yield f"| {row['method']} | {row['workloads']} | {row['speedup']:.2f} {interval} |"
    yield ""
    for task in dict.fromkeys(row["task"] for row in rows):
        what = TASKS[task]
        options = " ".join(f"{key}={value}" for key, value in what.options.items())
        yield f"## {task}\n"
        yield f"`{what.workload}` {options}, T = {what.steps} steps, AdamW, {len(seeds)} seeds.\n"
        yield "| method | setting | lr | final loss | against best control | cost at T | speed-up | CPU s | in CPU s |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in rows:
            if row["task"] != task:
                continue
            name = f"**{row['method']}**" if row["best_control"] else row["method"]
            difference = (
                "·"
                if row["best_control"]
                else (f"{row['difference']:+.4f} [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]")
            )
            sign = "" if not row["bound"] else "≥" if row["speedup"] > 1 else "≈"
            speedup = (
                "1"
                if row["best_control"]
                else (f"{sign}{row['speedup']:.2f} [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]")
            )
            yield (
                f"| {name} | {row['setting']} | {row['rate']:g} | {row['loss']:.4f} ± {row['loss_sd']:.4f} "
                f"| {difference} | {row['cost']:.3f} T | {speedup} | {row['cpu_seconds']:.1f} "
                f"| {row['speedup_seconds']:.2f} |"
            )
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", help=f"some of {', '.join(TASKS)}; those without -full by default")
    parser.add_argument("--full", action="store_true", help="those with -full instead")
    parser.add_argument("--methods", default=None, help="only these, by the beginning of their names; controls always")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--tuning", type=int, default=1, help="tuning seeds")
    parser.add_argument("--sweep-only", action="store_true")
    words = parser.parse_args()
    tasks = [task for task in TASKS if task.endswith("-full") == words.full]
    tasks = tasks if words.workloads is None else words.workloads.split(",")
    name = "leap-bench-full" if words.full else "leap-bench"
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"unknown workload {unknown[0]!r}, expected some of {', '.join(TASKS)}")
    if not _NINO.exists():
        print(f"NiNo-MLP left out: {_NINO} is not there (FARCLI_NINO names the file).", file=sys.stderr)
        del METHODS["NiNo-MLP"]
    if words.methods is not None:
        wanted = tuple(words.methods.split(","))
        for method in [name for name, how in METHODS.items() if not how.control and not name.startswith(wanted)]:
            del METHODS[method]
    cells = Cells(RESULTS / name / "cells.ndjson", words.jobs)
    best = sweeps(cells, tasks, TUNING[: words.tuning])
    if words.sweep_only:
        return
    chosen = chosen_settings(best, tasks)
    seeds = SEEDS[: words.seeds]
    cells.get([key for task in tasks for keys in reporting(task, chosen, best, seeds).values() for key in keys])
    rows = []
    for task in tasks:
        rows += compared(cells, task, chosen, best, seeds)
        lines = [{key: row[key] for key in row if key != "drawn"} for row in rows] + together(rows)
        (RESULTS / f"{name}.ndjson").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (RESULTS / f"{name}.md").write_text("\n".join(markdown(rows, seeds)))
    cells.close()
    print((RESULTS / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
