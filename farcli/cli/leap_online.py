"""`farcli leap` while a workload or a script trains."""

from pathlib import Path
from typing import Any

from farcli.cli.output import Column

_COLUMNS = [
    Column(key="run", heading="run"),
    Column(key="loss", heading="loss"),
    Column(key="average_loss", heading="of average"),
    Column(key="control_average_loss", heading="control's"),
    Column(key="kept", heading="kept"),
    Column(key="lost", heading="steps lost", spare=2),
    Column(key="cost", heading="cost", form=".1f"),
    Column(key="worth", heading="worth"),
    Column(key="net_steps", heading="net steps"),
    Column(key="speedup", heading="speed-up"),
]


def online(
    workload: str,
    output: Path | None,
    *,
    predictors: list[str],
    strengths: list[float],
    fields: dict[str, Any],
    leap_settings: list[str],
    settings: list[str],
    options: list[str],
    form: Any,
    quiet: bool,
    require: list[str],
    time_limit: str | None,
    **rest: Any,
) -> None:
    """Train a workload with leaps, print what they came to.

    Args:
        workload: its name.
        output: store to write.
        predictors: names.
        strengths: of the arms.
        fields: of `Leaping` that have a flag of their own; None where it was not given.
        leap_settings: other fields, as typed.
        settings: options of the workload, as typed.
        options: of the predictors, as typed.
        form: of the output.
        quiet: no progress.
        require: checks, as typed.
        time_limit: as typed.
        rest: handed on to the verb.
    """
    from farcli.cli.output import chosen_format, emit, say
    from farcli.cli.progress import progress
    from farcli.cli.signals import stop_flag
    from farcli.config import parse_assignments, parse_duration
    from farcli.errors import CheckFailedError, UsageError

    least = _least(require)
    if not rest["control"] and (known := [key for key in least if key != "accepted"]):
        raise UsageError(
            f"--require {known[0]}: without a control nobody knows it.", "Pass --control, which trains one beside."
        )
    with stop_flag() as stop, progress(f"leap {workload}", quiet) as report:
        from farcli.config import configure
        from farcli.speculation.options import Leaping
        from farcli.verbs.leap import leap

        given = {key: str(value) for key, value in fields.items() if value is not None}
        leaping = configure(Leaping, given | parse_assignments(leap_settings), "leap")
        table = chosen_format(form) == "table"

        def told(row: dict[str, Any]) -> None:
            if not table and not quiet:
                emit([{"kind": "leap", **row}], form=form)

        rows = leap(
            workload,
            output,
            predictors=predictors,
            strengths=strengths,
            leaping=leaping,
            settings=parse_assignments(options),
            options=parse_assignments(settings),
            time_limit=parse_duration(time_limit) if time_limit else None,
            stop=stop,
            report=report,
            told=told,
            **rest,
        )
    if predictors != ["none"] and not any(row["proposals"] for row in rows):
        say(
            f"no leap was proposed in {rows[0]['steps']} steps: its costs have to be saved up first; see "
            "--verify-budget, --leap compute= and --leap freeze=."
        )
    if quiet:
        print(output, flush=True)
    elif table:
        chance = rows[0]["chance"]
        shown = [
            {**row, "kept": f"{row['accepted'] + row['unverified']} of {row['proposals']}", **_gains(row)}
            for row in rows
        ]
        emit(
            shown,
            [column for column in _COLUMNS if column.key in shown[0]],
            form=form,
            title=f"{workload}, {rows[0]['steps']} steps with {rows[0]['predictor']}, gate {rows[0]['gate']}",
            notes=[
                *_sibling(rows[0]),
                "loss: held-out, of the weights and of their running average; chance is " + f"{chance:.4g}.",
                "cost: in training steps, those lost and verification included · worth: steps of the control, which is "
                "the same run without leaps, that bring its average to the same loss."
                if "control_loss" in rows[0]
                else "What the leaps are worth only a control can tell: --control trains one beside.",
            ],
        )
    else:
        emit([{"kind": "run", **row} for row in rows], form=form)
    for key, value in least.items():
        known = [float(row[key]) for row in rows if row.get(key) is not None]
        if not known or min(known) < value:
            found = f"{min(known):g}" if known else "not known"
            raise CheckFailedError(f"--require {key}={value:g}: it is {found} in the worst run.")


def in_command(
    words: list[str],
    output: Path | None,
    *,
    predictors: list[str],
    strengths: list[float],
    fields: dict[str, Any],
    leap_settings: list[str],
    options: list[str],
    validate: str | None,
    snapshots: int | None,
    steps: int | None,
    seed: int | None,
    time_limit: str | None,
    strict: bool,
    force: bool,
    resume: bool,
    form: Any,
    quiet: bool,
) -> None:
    """Become a command that leaps while it trains, and is recorded.

    Args:
        words: the command.
        output: store to write.
        predictors: names.
        strengths: of the arms.
        fields: of `Leaping` that have a flag of their own; None where it was not given.
        leap_settings: other fields, as typed.
        options: of the predictors, as typed.
        validate: "package.module:function", or None.
        snapshots: steps between snapshots.
        steps: that the command will take, where known.
        seed: for the header and the output's name.
        time_limit: as typed.
        strict: an error of leaping or recording ends the training.
        force: replace an existing store.
        resume: go on with an unfinished one.
        form: of the output.
        quiet: only the path.
    """
    import time

    from farcli.cli.output import emit_made
    from farcli.config import configure, parse_assignments, parse_duration
    from farcli.errors import UsageError
    from farcli.integrations.script import leap_section
    from farcli.recording.plan import Plan
    from farcli.speculation.options import Leaping
    from farcli.verbs.record_command import expand_output, record_command

    if output is None:
        raise UsageError("leap: -o is missing.", "farcli leap -o LEAP.zarr -- python train.py")
    given = {key: str(value) for key, value in fields.items() if value is not None}
    leaping = configure(Leaping, given | parse_assignments(leap_settings), "leap")
    plan = Plan(
        output=expand_output(str(output), seed=seed),
        every=snapshots,
        steps=steps,
        resume=resume,
        replace=force,
        strict=strict,
        seed=seed,
        until=None if time_limit is None else time.time() + parse_duration(time_limit),
        leap=leap_section(predictors, strengths, leaping, parse_assignments(options), validate, steps),
    )
    emit_made(record_command(words, plan), form=form, quiet=quiet)


def _sibling(row: dict[str, Any]) -> list[str]:
    if "sibling_steps" not in row:
        return []
    return [
        f"A warm start: the sibling's {row['sibling_steps']} steps are no part of cost, and this is no acceleration."
    ]


def _gains(row: dict[str, Any]) -> dict[str, str]:
    """What the leaps were worth: at least that where the control never got there, at most where it began better."""
    if row.get("equivalent_steps") is None:
        return {}
    sign = "" if not row["bound"] else "≥ " if row["equivalent_steps"] > 0 else "≤ "
    forms = {"worth": ("equivalent_steps", ".0f"), "net_steps": ("net_steps", "+.0f"), "speedup": ("speedup", ".2f")}
    return {name: sign + format(row[key], form) for name, (key, form) in forms.items()}


def _least(texts: list[str]) -> dict[str, float]:
    from farcli.errors import UsageError

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            if key not in ("speedup", "net_steps", "equivalent_steps", "accepted") or not equals:
                raise ValueError
            found[key] = float(value)
        except ValueError:
            raise UsageError(
                f"--require {text!r}: expected speedup=, net_steps=, equivalent_steps= or accepted= and a number."
            ) from None
    return found


def share(text: str) -> float:
    """A share as typed: 1%, 0.01."""
    from farcli.errors import UsageError

    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"--verify-budget {text!r}: expected a share of the training's cost like 1% or 0.01.")
    return value
