"""`farcli leap`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from farcli.cli.leap_online import in_command, online, share
from farcli.cli.options import Force, FormatOption, Partial, Quiet, Settings
from farcli.cli.output import Column

_SHORT = {"similarity": "activations", "displacement_cosine": "displacements", "past_outcomes": "past outcomes"}
_REGIMES = ("stable", "transition", "chaotic")


def _complete(incomplete: str) -> list[str]:
    from farcli.workloads.table import WORKLOADS

    return [name for name in WORKLOADS if name.startswith(incomplete)]


def leap(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="STORE|WORKLOAD",
            help="A recording, to judge leaps on; or a workload, to leap while it trains.",
            autocompletion=_complete,
        ),
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- CMD…", help="Or an unmodified training script, as you would run it."),
    ] = None,
    predictors: Annotated[
        str | None,
        typer.Option(
            "--predictors",
            help="On a recording: momentum (-uncorrected, -bf16, -fp16, -as-coded, -printed), linear, quadratic "
            "(-printed). While training: see `farcli methods --leaps`. Both: methods that need no fitting.",
        ),
    ] = None,
    ahead: Annotated[
        str | None, typer.Option("--K", help="Steps of a leap: 5,10,25 on a recording, one number while training.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="While training: store of weights, average and ledger.")
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", help="While training: steps between leaps (between what predictors see).")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option("--gate", help="While training: delayed, strict, adaptive, proximity or none."),
    ] = None,
    validate: Annotated[
        str | None, typer.Option("--validate", help="Of a script: pkg.mod:fn, its model to a held-out loss.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--verify-budget", help="While training: share of its cost for verifying: 1%.")
    ] = None,
    strength: Annotated[
        str | None, typer.Option("--strength", help="Factor on leaps; several, 0.5,1, are arms of a bandit.")
    ] = None,
    leap_settings: Annotated[
        list[str] | None,
        typer.Option("--leap", help="While training: window, memory, freeze, moments, … key=value; repeatable."),
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="While training: of the predictor, key=value; repeatable.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Train the same runs without leaps beside them, and count by them.")
    ] = False,
    warm_start: Annotated[
        str | None, typer.Option("--warm-start-from", help="Recording of a sibling run to start from.")
    ] = None,
    snapshots: Annotated[
        int | None, typer.Option("--snapshots", help="While training: steps between stored snapshots.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of a workload's training.")] = None,
    force: Force = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped.")] = False,
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", help="Stop by the clock and exit 75: 3h50m; a command gets SIGTERM.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Of a script: an error of leaping ends it.")] = False,
    cascades: Annotated[
        str, typer.Option("--cascades", help="Leaps in a row, DEPTHxK; none for none.")
    ] = "4x25,2x50,10x10",
    criteria: Annotated[
        str,
        typer.Option(
            "--criteria",
            help="strict, adaptive, adaptive-published (sees the future), proximity, proximity-printed.",
        ),
    ] = "strict,adaptive,proximity",
    runs: Annotated[
        str | None, typer.Option("--runs", help="Runs to judge leaps on: 8:12; how many to train, of a workload.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Snapshots to leap from: 100:500, 50,100; how many a training takes.")
    ] = None,
    delta: Annotated[
        int | None, typer.Option("--delta", help="Steps between the snapshots looked at; as recorded if not said.")
    ] = None,
    context: Annotated[int, typer.Option("--context", help="Snapshots that ema, lawa, dmd, … look at.")] = 5,
    probes: Annotated[int, typer.Option("--probes", help="Held-out inputs whose activations are compared.")] = 100,
    high: Annotated[float | None, typer.Option("--high", help="Similarity above which training is stable.")] = None,
    low: Annotated[float | None, typer.Option("--low", help="Similarity below which it is chaotic.")] = None,
    percentiles: Annotated[
        str, typer.Option("--percentiles", help="Low and high as percentiles of each run's similarities.")
    ] = "30,70",
    window: Annotated[
        int | None,
        typer.Option(
            "--window", help="On a recording: losses that adaptive's σ is over. While training: steps to a verdict."
        ),
    ] = None,
    settings: Settings = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="pkg.mod:fn, state_dict to held-out loss, for stores of scripts.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option("--require", help="Exit 5 if below this: linear@25:net_strict=0, accepted_strict=.1; repeatable."),
    ] = None,
    limits: Annotated[
        list[str] | None, typer.Option("--max", help="Exit 5 if above this: linear:inflation_max=2; repeatable.")
    ] = None,
    rows: Annotated[str, typer.Option("--rows", help="all (every leap) or summary.")] = "all",
    partial: Partial = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Judge leaps on a recorded run, or leap while a training runs and keep what verification allows.

    Example: farcli leap runs/gpt2.zarr --predictors momentum,linear,quadratic --K 5,10,25,50

    Example: farcli leap gpt2 --steps 1000 --control -o leap.zarr

    Example: farcli leap --every 100 --validate checks:held_out -o leap.zarr -- python train.py
    """
    from farcli.cli.record import _NO_WORKLOAD
    from farcli.errors import UsageError
    from farcli.workloads.table import WORKLOADS

    fields = {"every": every, "gate": gate, "ahead": ahead, "budget": None if budget is None else share(budget)}
    if target is not None and command:  # with nothing before `--`, the target is empty
        words = command[1:] if command[0] == _NO_WORKLOAD else command
        if target != _NO_WORKLOAD or not words:
            raise UsageError(f"leap {target}: unexpected {' '.join(command)!r}.", "A command goes behind `--`.")
        unfit = {"--control": control, "--set": settings, "--runs": runs, "--warm-start-from": warm_start}
        if flag := next((flag for flag, value in unfit.items() if value), None):
            raise UsageError(f"leap: {flag} does not go with a command.")
        in_command(
            words,
            output,
            predictors=_words(predictors or "spectral"),
            strengths=_shares(strength or "1"),
            fields=fields | {"window": window},
            leap_settings=leap_settings or [],
            options=options or [],
            validate=validate,
            snapshots=snapshots,
            steps=_count(steps, "--steps"),
            seed=seed,
            time_limit=time_limit,
            strict=strict,
            force=force,
            resume=resume,
            form=format,
            quiet=quiet,
        )
        return
    if target is None or target == _NO_WORKLOAD:
        raise UsageError("leap: nothing to leap on: give a STORE, a WORKLOAD, or a command behind `--`.")
    if strict:
        raise UsageError("leap: --strict goes with a command behind `--`.")
    store = target
    if target in WORKLOADS or ":" in target:
        online(
            target,
            output,
            predictors=_words(predictors or "spectral"),
            strengths=_shares(strength or "1"),
            fields=fields | {"window": window},
            leap_settings=leap_settings or [],
            settings=settings or [],
            options=options or [],
            form=format,
            quiet=quiet,
            require=require or [],
            time_limit=time_limit,
            control=control,
            warm_start=warm_start,
            runs=_count(runs, "--runs") or 1,
            steps=_count(steps, "--steps"),
            every=snapshots,
            seed=0 if seed is None else seed,
            overwrite=force,
            resume=resume,
        )
        return
    training = fields | {"-o": output, "--control": control, "--validate": validate, "--strength": strength}
    training |= {"--leap": leap_settings, "--option": options, "--seed": seed, "--warm-start-from": warm_start}
    if unfit := next((key for key, value in training.items() if value and key != "ahead"), None):
        flag = unfit if unfit.startswith("-") else {"budget": "--verify-budget"}.get(unfit, f"--{unfit}")
        raise UsageError(f"leap {store}: {flag} goes with a training, not with a recording.")
    if not (Path(store).exists() or store.endswith(".zarr")):
        raise UsageError(
            f"leap {store}: is neither a store nor a workload; workloads are {', '.join(WORKLOADS)}.",
            "farcli record gpt2 --with-optimizer -o gpt2.zarr makes a store.",
        )
    if rows not in ("all", "summary"):
        raise UsageError(f"--rows {rows!r}: expected all or summary.")
    _offline(
        store,
        rows,
        format,
        quiet,
        require or [],
        limits or [],
        predictors=_words(predictors or "momentum,linear,quadratic"),
        ahead=_numbers(ahead or "5,10,25,50,75,100", "--K"),
        cascades=cascades,
        criteria=_words(criteria),
        runs=runs,
        steps=steps,
        delta=delta,
        context=context,
        probes=probes,
        high=high,
        low=low,
        percentiles=percentiles,
        window=window,
        settings=settings,
        loss=loss,
        partial=partial,
    )


def _offline(
    store: str,
    rows: str,
    form: Any,
    quiet: bool,
    require: list[str],
    limits: list[str],
    *,
    cascades: str,
    percentiles: str,
    settings: list[str] | None,
    **rest: Any,
) -> None:
    """Leaps on a recording."""
    from farcli.cli.output import chosen_format, emit, saying
    from farcli.cli.progress import progress
    from farcli.config import parse_assignments
    from farcli.errors import UsageError
    from farcli.verbs.leap_offline import YARDSTICK, leap_offline, parse_cascades
    from farcli.verbs.leap_offline_summary import check, parse_limits

    least, most = parse_limits(require, "--require"), parse_limits(limits, "--max")
    try:
        low, high = (float(part) for part in percentiles.split(","))
    except ValueError:
        raise UsageError(f"--percentiles {percentiles!r}: expected two numbers like 30,70.") from None
    with progress(f"leap {store}", quiet) as report:
        found = leap_offline(
            store,
            cascades=parse_cascades(cascades),
            percentiles=(low, high),
            options=parse_assignments(settings or []),
            warn=saying(quiet),
            report=report,
            **rest,
        )
    if chosen_format(form) == "table":
        shown, rules = _table(found)
        emit(shown, _columns(shown), form=form, title=_title(store, found), notes=_notes(found), rule_before=rules)
    else:
        emit([row for row in found if rows == "all" or row["kind"] not in ("leap", "cascade")], form=form)
    check(found, least, most, YARDSTICK)


def _count(text: str | None, flag: str) -> int | None:
    from farcli.errors import UsageError

    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{flag} {text!r}: expected, of a workload, a whole number of at least 1.")
    return int(text)


def _shares(text: str) -> list[float]:
    from math import isfinite

    from farcli.errors import UsageError

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [float("nan")]
    if not all(isfinite(share) for share in shares):
        raise UsageError(f"--strength {text!r}: expected numbers like 0.5,1.")
    return shares


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str, flag: str) -> list[int]:
    from farcli.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text!r}: expected whole numbers like 5,10,25.") from None


def _table(rows: list[dict]) -> tuple[list[dict], list[int]]:
    """A line for each predictor and K: acceptance by regime as the paper prints it, then what leaps are worth."""
    from farcli.verbs.leap_offline import YARDSTICK

    summary = {(row["predictor"], row["ahead"], row["regime"]): row for row in rows if row["kind"] == "summary"}
    accepted = [row for row in rows if row["kind"] == "auc" and row["target"] == "accepted"]
    aucs = {(row["predictor"], row["ahead"], row["signal"]): row["auc"] for row in accepted}
    shown: list[dict] = []
    rules: list[int] = []
    for predictor in dict.fromkeys(key[0] for key in summary):
        rules.append(len(shown))
        distances = list(dict.fromkeys(key[1] for key in summary if key[0] == predictor))
        for ahead in distances[:1] if predictor == YARDSTICK else distances:
            whole = summary[predictor, ahead, "all"]
            names = _criteria(whole)
            shown.append(
                {
                    "predictor": predictor if len(shown) == rules[-1] else " ",
                    "K": "any" if predictor == YARDSTICK else ahead,
                    **{regime: _share(summary.get((predictor, ahead, regime)), names[0]) for regime in _REGIMES},
                    **{name: _share(whole, name) for name in names},
                    "inflation": whole["inflation"],
                    "worth": _worth(whole),
                    "worth_k": whole["worth_k"],
                    "net": whole[f"net_{names[0]}"],
                    **{signal: aucs.get((predictor, ahead, signal)) for signal in _SHORT},
                }
            )
    return shown, rules


def _criteria(row: dict) -> list[str]:
    return [key.removeprefix("net_") for key in row if key.startswith("net_")]


def _columns(shown: list[dict]) -> list[Column]:
    forms = {"inflation": ".3g", "worth_k": ".0%", "net": "+.1f", **dict.fromkeys(_SHORT, ".2f")}
    heads = {"worth_k": "≥ K", "inflation": "loss ×", **{key: f"AUC {text}" for key, text in _SHORT.items()}}
    spare = {"adaptive": 2, "adaptive-published": 4, "proximity": 1, "proximity-printed": 3, "inflation": 6}
    spare |= {"similarity": 8, "displacement_cosine": 5, "past_outcomes": 7}
    return [
        Column(key=key, heading=str(heads.get(key, key)), form=forms.get(key, ""), spare=spare.get(key, 0))
        for key in dict.fromkeys(key for row in shown for key in row)
        if any(row.get(key) is not None for row in shown)
    ]


def _share(row: dict | None, criterion: str) -> str | None:
    if row is None:
        return None
    std = row[f"accepted_{criterion}_std"]
    return f"{100 * row[f'accepted_{criterion}']:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def _worth(row: dict) -> str:
    sign = ("≤ " if row["equivalent_steps"] < 0 else "≥ ") if row["bounded"] > 0.5 else ""
    low, high = row["equivalent_steps_low"], row["equivalent_steps_high"]
    return f"{sign}{row['equivalent_steps']:+.0f} [{low:+.0f}, {high:+.0f}]".replace("-", "−")


def _title(store: str, rows: list[dict]) -> str:
    leaps = [row for row in rows if row["kind"] == "leap"]
    steps = sorted({row["step"] for row in leaps})
    runs = len({row["run"] for row in leaps})
    return f"Leaps on {store}: {runs} runs, each from {len(steps)} snapshots, steps {steps[0]} to {steps[-1]}"


def _notes(rows: list[dict]) -> list[str]:
    names = _criteria(next(row for row in rows if row["kind"] == "summary"))
    notes = [
        f"stable, transition, chaotic: % accepted by {names[0]} in each regime, mean ± std over runs; "
        f"{', '.join(names)}: of all snapshots.",
        "loss ×: median factor · worth: training steps of the run itself that bring the same held-out loss, median",
        "over snapshots [quartiles] · ≥ K: share worth the K steps skipped · net: mean steps gained by leaping where",
        f"{names[0]} accepts, less verification · AUC: how well a signal foretells acceptance, .5 is chance (worth: "
        "--format ndjson).",
    ]
    cost = next((row["verification_steps"] for row in rows if row["kind"] == "leap"), None)
    if cost is not None:
        notes.append(f"Verifying one leap costs {cost:.2g} steps (two passes over the held-out data).")
    regimes = [row for row in rows if row["kind"] == "regimes"]
    if regimes:
        count = len(regimes)
        parts = [f"{sum(row[name] for row in regimes) / count:.1f} {name}" for name in _REGIMES]
        low, high = (sum(row[key] for row in regimes) / count for key in ("low", "high"))
        notes.append(
            f"Regimes, snapshots a run: {', '.join(parts)}; thresholds {low:.5f} and {high:.5f} (means over runs)."
        )
    regime = "stable" if regimes else "all"
    done = [row for row in rows if row["kind"] == "cascades" and row["regime"] == regime]
    for name in dict.fromkeys(row["predictor"] for row in done if row["predictor"] != "persistence"):
        parts = [_cascade(row) for row in done if row["predictor"] == name]
        notes.append(f"Cascades of {name} from {regime} snapshots, complete: {'; '.join(parts)}.")
    return notes


def _cascade(row: dict) -> str:
    net = "" if row["net_steps"] is None else f", net {row['net_steps']:+.1f}"
    return f"{row['depth']}×{row['ahead']} {100 * row['complete']:.0f} %, worth {row['equivalent_steps']:+.0f}{net}"
