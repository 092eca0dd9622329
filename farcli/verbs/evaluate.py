"""Weigh forecasts against what happened: in weights, in held-out loss and in training steps.

Every evaluation holds, beside what was asked for, the trivial yardsticks, the true future and the chance
line, all measured the same way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from farcli.artefact import build
from farcli.config import parse_selection
from farcli.cooling import require_constant_rate
from farcli.errors import CheckFailedError, FarcliError, ResourceError, UsageError
from farcli.evaluation import (
    Candidate,
    Report,
    Setting,
    compare,
    control_ends,
    finished,
    held_out,
    measure_of_function,
    measure_of_workload,
)
from farcli.fitting.solving import solve
from farcli.forecasters.base import Coupling, Problem
from farcli.forecasters.mean import Climatology, Drift, Mean
from farcli.forecasting import (
    Method,
    TrainingData,
    check_targets,
    is_file_like,
    overlap,
    reopen,
    require_same_network,
    resolve_method,
)
from farcli.policies import Buffers, EvalBuffers
from farcli.store import Trajectory, is_store
from farcli.stream import Source, Stream, resolve_device
from farcli.verbs.update_rule import warnings_of
from farcli.verbs.weighed import Weighed, weighed_rows

CLIMATOLOGIES: dict[str, type[Climatology]] = {"mean": Mean, "drift": Drift}
YARDSTICKS = ("persistence", "lawa", "mean", "drift", "linear", "quadratic", "lsq-line")
HORIZONS = 6
"""Horizons shown where nothing says which."""

_LENGTHS = "expected different numbers above 0, for example 0.5,1,1.5."

_LIMITED = {
    "--max": ("mse", "loss"),
    "--min": ("skill", "cosine", "accuracy", "equivalent_steps", "net_steps", "better", "not_worse"),
}

Warn = Callable[[str], None]


def evaluate(
    forecasts: Sequence[str],
    stores: str | Sequence[str],
    *,
    runs: str | None = None,
    targets: str | None = None,
    start: int | None = None,
    context: int | None = None,
    options: Mapping[str, str] | None = None,
    train_runs: str | None = None,
    per_tensor: bool = False,
    loss: str | None = None,
    verify: int = 0,
    lengths: Sequence[float] | None = None,
    control: bool = False,
    buffers: EvalBuffers = "stored",
    transfer: bool = False,
    device: str = "auto",
    memory: int = 2_000_000_000,
    partial: bool = False,
    warn: Warn = lambda text: None,
    report: Report = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Weigh forecasts against the recorded truth.

    Args:
        forecasts: stored forecasts, files that `fit` wrote, or names of methods.
        stores: the recorded truth: one store, or several of the same network, whose runs are taken together.
        runs: runs to evaluate (of each store), as typed; those of the stored forecast, else those nobody was fitted
            on, when None.
        targets: steps to evaluate, as typed; a spread of what was forecast when None.
        start: step of the last observed snapshot, for methods and files.
        context: snapshots of the prefix, for methods named.
        options: `--set` options, for a method named.
        train_runs: runs whose mean is the `mean` yardstick, where no fitted file says which.
        per_tensor: add rows for each tensor.
        loss: "package.module:function" measuring a state_dict on held-out data, for stores without a workload.
        verify: refuse, run by run, what does not lower the loss of so many batches that nothing is reported on; a
            refused forecast counts as w_n. 0 measures every forecast as it is.
        lengths: shares of the way from w_n to a forecast to verify, where the one with the lowest loss counts; the
            forecast itself when None.
        control: also train the runs on with a rate that falls to 0, from the last observed step, from every
            forecast and from the best yardstick (`farcli.cooling`).
        buffers: what becomes of BatchNorm statistics when the loss is measured.
        transfer: allow maps fitted on another network.
        device: where to compute.
        memory: bytes that the data may take.
        partial: accept an unfinished store.
        warn: called with a line the user should read.
        report: called with (done, total, text).

    Returns:
        Rows, per horizon and method. Keys: step, ahead (steps after the last observed one), method, role,
        tensor (None for the whole), mse, skill, cosine, width, covered (see `DisplacementSums.measures`), loss,
        accuracy (means over runs), equivalent_steps (median over runs of the training steps that the forecast is
        worth, against keeping w_n), bounded (runs in which that is only a bound), net_steps (after paying
        one held-out evaluation, or the verification; of the control its own steps), control_steps (steps within
        which the control reaches that mean loss; None without one, or where it does not), control_furthest (steps
        that the longest of it takes), finished_loss (mean after training on from the forecast for as many steps as the
        first horizon is ahead, the rate falling to 0), saved_steps (steps fewer than the control takes to that loss;
        None where it does not get there; both are of forecasts and of the best yardstick), better and not_worse (share
        of runs with a lower loss than w_n's, and with no higher one), kept (share of runs in which verification did not
        refuse) and length (mean over these of the share of the way that counts; both None without it), runs, stores,
        in_sample;
        of forecasts and yardsticks also ranked_by ("loss", or "mse" without one), rank (1 is best), behind (mean
        over runs of that measure minus the best one's) and gain (of w_n's minus its own); equivalent_steps,
        behind and gain come with the ends of their 95 % interval over runs (…_low, …_high; None for one run).

    Raises:
        FarcliError: see the exit codes.
    """
    paths = [stores] if isinstance(stores, str) else list(stores)
    truths = [Trajectory.open(path, partial=partial) for path in paths]
    _check_together(truths)
    repeated = next((text for text in forecasts if list(forecasts).count(text) > 1), None)
    if repeated is not None:
        raise UsageError(f"{repeated}: is named twice.")
    if loss is not None and buffers == "reestimate":
        raise UsageError("--buffers reestimate needs the training data of a workload; --loss has none.")
    if verify < 0:
        raise UsageError(f"--verify {verify}: expected a number of batches.")
    if loss is not None and verify:
        raise UsageError("--verify needs the data of a workload; --loss has none.")
    if loss is not None and control:
        raise UsageError("--control needs the training of a workload; --loss has none.")
    tried = _lengths(lengths, verify)
    by_name = any(not is_store(text) and not is_file_like(text) for text in forecasts)
    for option, given in (("--set", options), ("--context", context)):
        if given is not None and given != {} and not by_name:
            raise UsageError(f"{option} applies to methods named, and no forecast here is one.")
    told: set[str] = set()

    def say_once(text: str) -> None:
        if text not in told:
            told.add(text)
            warn(text)

    chosen: list[tuple[list[Candidate], Setting]] = []
    remarks: dict[int, list[str]] = {}
    for truth in truths:
        remarks[id(truth)] = []
        if chosen:
            _check_steps(truth, chosen[0][1])
        chosen.append(
            _prepare(
                truth,
                forecasts,
                runs=runs,
                targets=targets if not chosen else ",".join(map(str, chosen[0][1].steps_H)),
                start=start,
                context=context,
                options=options,
                transfer=transfer,
                buffers=buffers,
                memory=memory,
                device=device,
                warn=remarks[id(truth)].append,
                report=report,
            )
        )
    if len(chosen) > 1 and runs is None:
        unseen = [
            (named, setting)
            for named, setting in chosen
            if not {run for each in named for run in overlap(each.training, setting.truth)} & set(setting.source.runs)
        ]
        if 0 < len(unseen) < len(chosen):
            kept = [setting.truth for _, setting in unseen]
            left = ", ".join(str(truth.path) for truth in truths if truth not in kept)
            say_once(f"{left}: trained a forecaster and is left out (--runs all takes it too).")
            chosen = unseen
    for _, setting in chosen:
        for text in remarks[id(setting.truth)]:
            say_once(text)
    _check_grids([setting for _, setting in chosen])
    weighed = [_weigh(named, setting, loss, verify, tried, control, train_runs, say_once) for named, setting in chosen]
    common = _in_all(weighed, say_once)
    return weighed_rows(_with_control(common, say_once) if control else common, per_tensor=per_tensor)


def _with_control(weighed: Sequence[Weighed], warn: Warn) -> list[Weighed]:
    """With the control, held against what was named and, at each horizon, against the best yardstick."""
    candidates, steps_H = weighed[0].candidates, weighed[0].setting.steps_H

    def loss(place: int, step: int) -> float:
        found = [each.found.forecast[place] for each in weighed if each.found is not None]
        return sum(results[run][step]["loss"] for results in found for run in results)

    yardsticks = [place for place, candidate in enumerate(candidates) if candidate.role == "yardstick"]
    best = {step: min(yardsticks, key=lambda place: loss(place, step)) for step in steps_H}
    steps = {
        place: [step for step in steps_H if candidate.role == "forecast" or best[step] == place]
        for place, candidate in enumerate(candidates)
    }
    held: list[Weighed] = []
    for each in weighed:
        assert each.measure is not None
        assert each.found is not None
        found = finished(each.candidates, steps, each.setting, each.measure, each.found, warn)
        held.append(replace(each, found=found))
    return held


def _lengths(given: Sequence[float] | None, verify: int) -> tuple[float, ...]:
    if given is None:
        return (1.0,)
    text = ",".join(f"{length:g}" for length in given)
    if not verify:
        raise UsageError(f"--lengths {text}: there is nothing to choose by without --verify N.")
    if not given or len(set(given)) < len(given) or not all(0 < length < math.inf for length in given):
        raise UsageError(f"--lengths {text}: {_LENGTHS}")
    return tuple(given)


def split_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Forecasts and recordings apart, as typed: the last argument is a recording, and so are those before it.

    Raises:
        UsageError: nothing is left to be weighed.
    """
    first = len(inputs) - 1
    while first > 0 and _is_recording(inputs[first - 1]):
        first -= 1
    if first < 1:
        raise UsageError(
            f"{inputs[0]}: expected forecasts and, last, the recorded truth.",
            hint="farcli eval forecast.zarr runs/digits.zarr",
        )
    return list(inputs[:first]), list(inputs[first:])


def _is_recording(text: str) -> bool:
    try:
        return is_store(text) and Trajectory.open(text, partial=True).kind != "forecast"
    except FarcliError:
        return False  # what is wrong with it is said where it is opened


def _check_together(truths: Sequence[Trajectory]) -> None:
    """Refuse stores that cannot be evaluated as one."""
    first = truths[0]
    ids = [truth.id for truth in truths]
    for truth in truths[1:]:
        if truth.id and ids.count(truth.id) > 1:
            raise UsageError(f"{truth.path}: is named twice; its runs would count double.")
        require_same_network(truth, first, "evaluated")


def _check_steps(truth: Trajectory, first: Setting) -> None:
    """Refuse a store that lacks a step at which the first one is observed or weighed."""
    missing = next((step for step in (*first.prefix, *first.steps_H) if step not in truth.steps), None)
    if missing is not None:
        raise UsageError(
            f"{truth.path}: has no snapshot of step {missing}, as {first.truth.path} has; stores evaluated together "
            "must have the same steps.",
            hint="Choose steps that all of them have with --to, or evaluate them one by one.",
        )


def _check_grids(settings: Sequence[Setting]) -> None:
    """Refuse stores whose forecasts would start at, or be weighed at, different steps."""
    first = settings[0]
    for setting in settings[1:]:
        if (setting.prefix, setting.steps_H, setting.policy) != (first.prefix, first.steps_H, first.policy):
            raise UsageError(
                f"{setting.truth.path}: is forecast from step {setting.origin} to {_list(setting.steps_H)}, but "
                f"{first.truth.path} from step {first.origin} to {_list(first.steps_H)}; stores evaluated together "
                "must have the same steps."
            )


def _prepare(
    truth: Trajectory,
    forecasts: Sequence[str],
    *,
    runs: str | None,
    targets: str | None,
    start: int | None,
    context: int | None,
    options: Mapping[str, str] | None,
    transfer: bool,
    buffers: EvalBuffers,
    memory: int,
    device: str,
    warn: Warn,
    report: Report,
) -> tuple[list[Candidate], Setting]:
    """What was named, and what it is held against, for one store."""
    named = _distinct(
        [
            _stored(text, truth, start) if is_store(text) else _named(text, truth, start, context, options, transfer)
            for text in forecasts
        ],
        forecasts,
    )
    prefix, policy = _common_start(named, truth)
    setting = Setting(
        source=Source(trajectory=truth, runs=tuple(_choose_runs(named, truth, runs, warn))),
        prefix=prefix,
        steps_H=_choose_steps(named, truth, prefix[-1], targets, warn),
        policy=policy,
        buffers=buffers,
        memory=memory,
        device=resolve_device(device),
        report=report,
    )
    for candidate in named:
        if candidate.method is not None:
            check_targets(candidate.method, setting.steps_H)
            for text in warnings_of(candidate.method, setting.source, setting.steps_H[-1]):
                warn(text)
    return named, setting


def _weigh(
    named: Sequence[Candidate],
    setting: Setting,
    loss: str | None,
    verify: int,
    lengths: Sequence[float],
    control: bool,
    train_runs: str | None,
    warn: Warn,
) -> Weighed:
    candidates = [*named, *_yardsticks(named, setting, train_runs, warn)]
    truth = setting.truth
    if loss is not None:
        measure = measure_of_function(truth, loss)
    else:
        measure = measure_of_workload(truth, setting.buffers, verify, lengths)
    if measure is None and verify:
        raise UsageError(f"--verify {verify}: {truth.path} names no workload, so there are no data to verify on.")
    if control:
        require_constant_rate(truth, setting.origin, control_ends(setting)[-1])
    sums = compare(candidates, setting)
    if measure is None:
        warn("no held-out loss: the store names no workload. Pass --loss package.module:function.")
    found = held_out(candidates, setting, measure) if measure is not None else None
    return Weighed(candidates=candidates, setting=setting, sums=sums, measure=measure, found=found)


def _in_all(weighed: Sequence[Weighed], warn: Warn) -> list[Weighed]:
    """The stores with those candidates only that could be weighed on each of them."""
    common = [
        candidate.label
        for candidate in weighed[0].candidates
        if all(candidate.label in [other.label for other in each.candidates] for each in weighed)
    ]
    found = []
    for each in weighed:
        places = [[candidate.label for candidate in each.candidates].index(label) for label in common]
        if len(places) < len(each.candidates):
            gone = [candidate.label for candidate in each.candidates if candidate.label not in common]
            warn(f"{', '.join(gone)}: left out, as not every store allows it.")
        measured = each.found and replace(
            each.found,
            forecast=[each.found.forecast[place] for place in places],
            lengths=[each.found.lengths[place] for place in places],
        )
        found.append(
            replace(
                each,
                candidates=[each.candidates[place] for place in places],
                sums=[each.sums[place] for place in places],
                found=measured,
            )
        )
    return found


def _stored(text: str, truth: Trajectory, start: int | None) -> Candidate:
    stored = Trajectory.open(text)
    if stored.kind != "forecast":
        raise UsageError(
            f"{text}: is a recording, not a forecast; only the last argument is the recorded truth.",
            hint=f"farcli eval METHOD {text} weighs a method on it.",
        )
    if "quantity" in stored.header["forecast"]:
        raise UsageError(f"{text}: holds the {stored.header['forecast']['quantity']}, not a forecast.")
    if stored.layout != truth.layout:
        raise UsageError(
            f"{text} forecasts D = {stored.layout.parameters} parameters of other tensors than {truth.path}, "
            f"which has D = {truth.layout.parameters}."
        )
    entry = stored.header["forecast"]
    if start is not None and start != entry["from"]:
        raise UsageError(f"--from {start}: {text} is a stored forecast, and starts at step {entry['from']}.")
    training = tuple(TrainingData.from_json(item) for item in entry.get("training", ()))
    return Candidate(label=str(entry["method"]), role="forecast", method=None, stored=stored, training=training)


def _named(
    text: str,
    truth: Trajectory,
    start: int | None,
    context: int | None,
    options: Mapping[str, str] | None,
    transfer: bool,
) -> Candidate:
    if Path(text).is_dir():
        Trajectory.open(text)  # not a store of ours: says what is wrong with it
    if is_file_like(text):
        context, options = None, None  # these are for the methods named beside it
    method = resolve_method(text, truth, start=start, context=context, options=options, transfer=transfer)
    return Candidate(label=method.label, role="forecast", method=method, stored=None, training=method.training)


def _distinct(named: Sequence[Candidate], texts: Sequence[str]) -> list[Candidate]:
    """Candidates of the same method are told apart by their file: "lfd2 (dense)"."""
    labels = [candidate.label for candidate in named]
    return [
        replace(candidate, label=f"{candidate.label} ({Path(text).stem})")
        if labels.count(candidate.label) > 1
        else candidate
        for candidate, text in zip(named, texts, strict=True)
    ]


def _common_start(named: Sequence[Candidate], truth: Trajectory) -> tuple[tuple[int, ...], Buffers]:
    """The longest prefix among the forecasts, which must all start at its last step, and the policy for buffers."""
    contexts: list[tuple[int, ...]] = []
    policies: set[Buffers] = set()
    for candidate in named:
        if candidate.method is not None:
            contexts.append(candidate.method.context)
        else:
            assert candidate.stored is not None
            entry = candidate.stored.header["forecast"]
            contexts.append(tuple(int(step) for step in entry["context"]))
            policies.add(entry.get("buffers", "keep"))
    starts = sorted({steps[-1] for steps in contexts})
    if len(starts) > 1:
        raise UsageError(
            f"the forecasts start at different steps ({', '.join(map(str, starts))}); "
            "only forecasts from the same snapshot can be compared.",
            hint="Give --from, or evaluate them one by one.",
        )
    if len(policies) > 1:
        raise UsageError("the stored forecasts treat buffers differently (keep, forecast); evaluate them one by one.")
    recorded = set(truth.steps)
    longest = max(contexts, key=len)
    if not set(longest) <= recorded:
        missing = next(step for step in longest if step not in recorded)
        raise UsageError(f"{truth.path}: step {missing} of the forecasts' prefix is not recorded there.")
    return longest, policies.pop() if policies else "keep"


def _choose_runs(named: Sequence[Candidate], truth: Trajectory, text: str | None, warn: Warn) -> list[int]:
    available = list(truth.runs)
    for candidate in named:
        if candidate.stored is not None:
            absent = [run for run in candidate.stored.runs if run not in available]
            if absent:
                raise UsageError(f"{truth.path}: has no run {absent[0]}, which {candidate.stored.path} forecasts.")
            available = [run for run in available if run in candidate.stored.runs]
    seen = sorted({run for candidate in named for run in overlap(candidate.training, truth)})
    if text is not None:
        chosen = parse_selection(text, available, "runs")
    else:
        chosen = [run for run in available if run not in seen] or available
        if len(chosen) < len(available):
            warn(f"evaluating runs {_list(chosen)}; the others trained a forecaster (--runs all takes them too).")
    inside = [run for run in chosen if run in seen]
    if inside:
        warn(f"runs {_list(inside)} trained a forecaster that is judged on them here: rows say in_sample.")
    if not chosen:
        raise UsageError("the stored forecasts share no run.")
    return chosen


def _list(values: Sequence[int]) -> str:
    if len(values) > 1 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}:{values[-1] + 1}"
    return ",".join(map(str, values))


def _choose_steps(
    named: Sequence[Candidate],
    truth: Trajectory,
    origin: int,
    text: str | None,
    warn: Warn,
) -> tuple[int, ...]:
    available = [step for step in truth.steps if step > origin]
    beyond: list[int] = []
    for candidate in named:
        if candidate.stored is not None:
            beyond += [step for step in candidate.stored.steps if step not in truth.steps]
            available = [step for step in available if step in candidate.stored.steps]
        elif candidate.method is not None and candidate.method.targets is not None:
            available = [step for step in available if step in candidate.method.targets]
    if not available:
        raise UsageError(
            f"{truth.path}: none of the forecast steps is recorded there, so there is no truth to weigh them against."
        )
    if beyond:
        warn(f"{len(set(beyond))} forecast steps are not recorded in {truth.path} and are left out.")
    if text is not None:
        return tuple(sorted(set(parse_selection(text, available, "steps"))))
    if len(available) <= HORIZONS:
        return tuple(available)
    # A geometric spread: near horizons are where forecasts differ most.
    places = np.unique(np.geomspace(1, len(available), HORIZONS).round().astype(int) - 1)
    warn(f"showing {len(places)} of {len(available)} horizons (--to all shows every one).")
    return tuple(available[place] for place in places)


def _yardsticks(named: Sequence[Candidate], setting: Setting, train_runs: str | None, warn: Warn) -> list[Candidate]:
    """The trivial forecasts that stand beside every other, without those the user named."""
    plain = {candidate.method.source for candidate in named if candidate.method is not None}
    taken = plain | {candidate.label for candidate in named}
    wanted = [kind for name, kind in CLIMATOLOGIES.items() if name not in taken]
    means = _climatologies(wanted, named, setting, train_runs, warn) if wanted else {}
    found = []
    for name in YARDSTICKS:
        if name in CLIMATOLOGIES:
            found += [means[name]] if name in means else []
            continue
        if name in plain:
            continue
        forecaster = build(name, {})
        if forecaster.min_context > len(setting.prefix):
            warn(
                f"{name} is left out: it needs {forecaster.min_context} snapshots, "
                f"the prefix has {len(setting.prefix)}."
            )
            continue
        method = Method(
            label=name, source=name, forecaster=forecaster, context=setting.prefix, targets=None, training=()
        )
        found.append(Candidate(label=name, role="yardstick", method=method, stored=None))
    return found


def _climatologies(
    kinds: Sequence[type[Climatology]],
    named: Sequence[Candidate],
    setting: Setting,
    train_runs: str | None,
    warn: Warn,
) -> dict[str, Candidate]:
    """Means by name, over the runs a forecaster was fitted on, or --train-runs; those that cannot be are left out."""
    truth = setting.truth
    if train_runs is not None:
        runs = parse_selection(train_runs, truth.runs, "--train-runs")
        inside = sorted(set(runs) & set(setting.source.runs))
        if inside:
            raise UsageError(f"--train-runs {train_runs}: run {inside[0]} is also evaluated; keep them apart.")
        training = (TrainingData.of(Source(trajectory=truth, runs=tuple(runs))),)
    else:
        training = next((candidate.training for candidate in named if candidate.training), ())
    left_out = f"{' and '.join(kind.name for kind in kinds)} of training runs are left out"
    if not training:
        warn(f"{left_out}: no forecaster was fitted; name runs to average with --train-runs.")
        return {}
    sources = reopen(training, truth)
    if sources is None:
        warn(f"{left_out}: the training store {training[0].path} is not there any more.")
        return {}
    if any(set(setting.steps_H) - set(source.trajectory.steps) for source in sources):
        warn(f"{left_out}: the training stores do not hold all of these steps.")
        return {}
    if any(source.trajectory.layout != truth.layout for source in sources):
        warn(f"{left_out}: the training stores hold another network.")
        return {}
    problem = Problem(
        layout=truth.layout,
        coordinates=truth.layout.parameters,
        runs=sum(len(source.runs) for source in sources),
        steps_C=(setting.origin,),
        steps_H=setting.steps_H,
        memory=setting.memory // 4,
    )
    stream = Stream(
        sources,
        coupling=Coupling.COORDINATEWISE,
        steps_C=problem.steps_C,
        steps_H=problem.steps_H,
        coordinates=problem.coordinates,
        device=setting.device,
        memory=setting.memory,
        share=0.5,
    )
    found = {}
    for kind in kinds:
        try:
            forecaster = solve(
                kind(kind.Config()), problem, lambda: ((b.prefix, b.truth_BHD) for b in stream), report=None
            )
        except ResourceError as error:
            warn(f"the yardstick {kind.name} is left out: {error}")
            continue
        method = Method(
            label=kind.name,
            source=kind.name,
            forecaster=forecaster,
            context=(setting.origin,),
            targets=setting.steps_H,
            training=training,
        )
        found[kind.name] = Candidate(label=kind.name, role="yardstick", method=method, stored=None, training=training)
    return found


def parse_lengths(text: str) -> list[float]:
    """Numbers of "0.5,1,1.5".

    Raises:
        UsageError: it is not that.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--lengths {text!r}: {_LENGTHS}") from None


def parse_limits(texts: Sequence[str], flag: str) -> dict[str, float]:
    """Limits like "mse=0.05", by key.

    Args:
        texts: as typed.
        flag: "--max" for numbers that are good when small, "--min" for those that are good when large.

    Raises:
        UsageError: a text is not key=number, or rows have no such number.
    """
    limits: dict[str, float] = {}
    example = f"{_LIMITED[flag][0]}=0.05"
    for text in texts:
        key, _, number = text.partition("=")
        try:
            limits[key] = float(number)
        except ValueError:
            raise UsageError(f"{flag} {text!r}: expected key=number, for example {example}.") from None
        if np.isnan(limits[key]):
            raise UsageError(f"{flag} {text!r}: expected a number, for example {example}.")
        if key not in _LIMITED[flag]:
            raise UsageError(f"{flag} {text!r}: expected one of {', '.join(_LIMITED[flag])}.")
    return limits


def check(rows: Sequence[Mapping[str, Any]], most: Mapping[str, float], least: Mapping[str, float]) -> None:
    """Hold the forecasts' rows against limits.

    Raises:
        CheckFailedError: a row is beyond a limit, or holds no number to compare.
    """
    judged = [row for row in rows if row["role"] == "forecast" and row["tensor"] is None]
    for flag, limits in (("--max", most), ("--min", least)):
        for key, bound in limits.items():
            for row in judged:
                value = row.get(key)
                if value is None or not (value <= bound if flag == "--max" else value >= bound):
                    raise CheckFailedError(
                        f"{flag} {key}={bound:g}: {row['method']} at step {row['step']} has {key} = {value}."
                    )
