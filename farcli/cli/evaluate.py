"""`farcli eval`."""

from typing import Annotated

import typer

from farcli.cli.options import (
    Context,
    Device,
    FormatOption,
    From,
    Memory,
    Partial,
    Quiet,
    Runs,
    Settings,
    To,
    Transfer,
    steps_text,
)
from farcli.cli.output import Column
from farcli.policies import EvalBuffers

COLUMNS = (
    Column(key="when", heading="step"),
    Column(key="place", heading="#"),
    Column(key="method", heading="method"),
    Column(key="tensor", heading="tensor"),
    Column(key="mse", heading="mse", form=".2g", spare=2),
    Column(key="skill", heading="skill", form="+.2f"),
    Column(key="cosine", heading="cos.", form="+.2f", spare=3),
    Column(key="width", heading="width", form=".2g", spare=6),
    Column(key="covered", heading="within", form=".0%", spare=5),
    Column(key="loss", heading="loss", form=".3g"),
    Column(key="accuracy", heading="acc.", form=".3f", spare=4),
    Column(key="worth", heading="worth"),
    Column(key="falling", heading="falling", spare=4),
    Column(key="saved", heading="saved"),
    Column(key="better", heading="better", form=".0%", spare=1),
    Column(key="kept", heading="kept", form=".0%"),
    Column(key="length", heading="length", form=".2f"),
)

_POLICIES = {
    "keep": "kept as last observed",
    "forecast": "forecast like weights",
    "reestimate": "taken anew from training data",
}

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="FORECAST|FILE|METHOD... STORE...",
        help="Stored forecasts, fitted files or methods by name, and last the recorded truth, one store or several.",
    ),
]


def evaluate(
    inputs: Inputs,
    runs: Runs = None,
    to: To = None,
    start: From = None,
    context: Context = None,
    settings: Settings = None,
    train_runs: Annotated[
        str | None, typer.Option("--train-runs", help="Runs whose mean is a yardstick, where no fitted file says so.")
    ] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="Add a row for each tensor.")] = False,
    loss: Annotated[
        str | None, typer.Option("--loss", help="pkg.mod:fn, state_dict to held-out loss, for stores of scripts.")
    ] = None,
    verify: Annotated[
        int, typer.Option("--verify", help="Refuse, run by run, what does not lower the loss of so many other batches.")
    ] = 0,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="With --verify: the best share of the way counts, 0.5,1,1.5.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the runs on, the rate falling to 0: what to beat.")
    ] = False,
    buffers: Annotated[
        EvalBuffers,
        typer.Option("--buffers", help="BatchNorm statistics: stored, or taken anew from training data."),
    ] = "stored",
    limits: Annotated[
        list[str] | None, typer.Option("--max", help="Exit 5 if a forecast is above this, mse=0.05; repeatable.")
    ] = None,
    lower: Annotated[
        list[str] | None, typer.Option("--min", help="Exit 5 if a forecast is below this, net_steps=0; repeatable.")
    ] = None,
    transfer: Transfer = False,
    device: Device = "auto",
    memory: Memory = "2G",
    partial: Partial = False,
    format: FormatOption = "auto",
    quiet: Quiet = False,
) -> None:
    """Weigh forecasts against the recorded truth, beside trivial yardsticks, the true future and chance.

    Example: farcli eval forecast.zarr runs/digits.zarr
    """
    from farcli.cli.output import chosen_format, emit
    from farcli.verbs.evaluate import check, parse_lengths, parse_limits

    most, least = parse_limits(limits or [], "--max"), parse_limits(lower or [], "--min")
    rows = evaluated(
        inputs,
        quiet,
        runs=runs,
        targets=steps_text(to),
        start=start,
        context=context,
        settings=settings,
        train_runs=train_runs,
        per_tensor=per_tensor,
        loss=loss,
        verify=verify,
        lengths=None if lengths is None else parse_lengths(lengths),
        control=control,
        buffers=buffers,
        transfer=transfer,
        device=device,
        memory=memory,
        partial=partial,
    )
    if chosen_format(format) == "table":
        rules = [i for i in range(len(rows)) if i == 0 or rows[i]["step"] != rows[i - 1]["step"]]
        finish = min(row["ahead"] for row in rows)
        shown = [_shown(row, first=index in rules, finish=finish) for index, row in enumerate(rows)]
        columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in shown)]
        emit(shown, columns, form=format, title=_title(inputs, rows), notes=_notes(rows), rule_before=rules)
    else:
        emit(rows, form=format)
    check(rows, most, least)


def evaluated(inputs: list[str], quiet: bool, *, settings: list[str] | None, memory: str, **rest: object) -> list:
    """Rows of the evaluation that the arguments of `eval` and `plot` ask for."""
    from farcli.cli.output import saying
    from farcli.cli.progress import progress
    from farcli.config import parse_assignments, parse_size
    from farcli.verbs.evaluate import evaluate as run
    from farcli.verbs.evaluate import split_inputs

    forecasts, stores = split_inputs(inputs)
    with progress("eval", quiet) as report:
        return run(
            forecasts,
            stores,
            options=parse_assignments(settings or []),
            memory=parse_size(memory),
            warn=saying(quiet),
            report=report,
            **rest,  # pyright: ignore[reportArgumentType]
        )


def _shown(row: dict, *, first: bool, finish: int) -> dict:
    """A row as the table shows it: the horizon is said once."""
    style = {"forecast": "bold", "truth": "green", "control": "green", "chance": "dim"}.get(row["role"])
    when = f"{row['step']} {row['ahead']:+d}" if first else " "
    skill = row["skill"]
    # A forecast a hundred times worse than none needs no decimals, which would only widen the table.
    skill = "<−99" if skill is not None and skill < -99 else skill
    method = f"{row['method']} *" if row["in_sample"] else row["method"]
    shown = {
        "when": when,
        "place": place(row),
        "method": method,
        "skill": skill,
        "worth": worth(row),
        "falling": falling(row),
        "saved": saved(row, finish),
    }
    return {**row, **shown, "_style": style}


def place(row: dict) -> str | None:
    """A rank as a table shows it: "3 =" where the difference from the first may be luck."""
    if row.get("rank") is None:
        return None
    apart = row["behind_low"] is not None and row["behind_low"] > 0
    return f"{row['rank']}" if apart or row["rank"] == 1 else f"{row['rank']} ="


def worth(row: dict) -> str | None:
    """Equivalent steps as a table shows them: "+23", "≤ −80" where they are only a bound for most runs."""
    steps = row.get("equivalent_steps")
    if steps is None:
        return None
    sign = ("≤ " if steps < 0 else "≥ ") if (row.get("bounded") or 0) * 2 > row["runs"] else ""
    low, high = row.get("equivalent_steps_low"), row.get("equivalent_steps_high")
    between = f" [{low:+.0f}, {high:+.0f}]" if low is not None and high is not None and high - low >= 1 else ""
    return f"{sign}{steps:+.0f}{between}".replace("-", "−")


def falling(row: dict) -> str | None:
    """Steps of the control as a table shows them: "23", "> 600" where it does not get there within its furthest."""
    if row["control_furthest"] is None or row["role"] not in ("forecast", "yardstick", "truth"):
        return None
    return f"> {row['control_furthest']}" if row["control_steps"] is None else f"{row['control_steps']:.0f}"


def saved(row: dict, finish: int) -> str | None:
    """Steps saved as a table shows them: "+23", "> +580" where the control does not get there within its furthest."""
    if row["finished_loss"] is None:
        return None
    if row["saved_steps"] is None:
        return f"> {row['control_furthest'] - finish:+d}"
    return f"{row['saved_steps']:+.0f}".replace("-", "−")


def _title(inputs: list[str], rows: list[dict]) -> str:
    origin = rows[0]["step"] - rows[0]["ahead"]
    stores = rows[0]["stores"]
    named = len({row["method"] for row in rows if row["role"] == "forecast"})
    what = inputs[0] if named == 1 else f"{named} forecasts"
    truth = inputs[-1] if stores == 1 else f"{stores} stores"
    return f"{what} against {truth}: {rows[0]['runs']} runs, forecast from step {origin}"


def _notes(rows: list[dict]) -> list[str]:
    notes = [
        "skill: 1 − mse / mse of persistence · worth: training steps of the recorded run that bring the same",
        "held-out loss, against keeping the last observed weights (median over runs [95 %]) · better: such runs.",
    ]
    by = next((row["ranked_by"] for row in rows if row.get("rank") is not None), None)
    if by is not None and rows[0]["runs"] > 1:
        what = "held-out loss" if by == "loss" else "mse"
        notes.append(f"#: place by mean {what} · =: not told apart from the first (95 % paired bootstrap over runs).")
    if any(row.get("covered") is not None for row in rows):
        notes.append(
            "width: of the forecasts' 90 % intervals, mean over weights · within: weights inside; 90 % is right."
        )
    if any(row["in_sample"] for row in rows):
        notes.append("* IN SAMPLE: fitted on runs that it is judged on here; these rows prove nothing.")
    if rows[0]["buffers"] is not None:
        notes.append(f"BatchNorm statistics: {_POLICIES[rows[0]['buffers']]}.")
    cost = next((r["equivalent_steps"] - r["net_steps"] for r in rows if r.get("net_steps") is not None), None)
    verified = any(row.get("kept") is not None for row in rows)
    if verified:
        notes += [
            "kept: runs whose forecast lowered the loss of batches that nothing is reported on; elsewhere w_n",
            "counts in all that is held out. mse and skill are the forecast's own.",
        ]
    if any(row["role"] == "control" for row in rows):
        finish = min(row["ahead"] for row in rows)
        notes += [
            "falling rate: the same runs trained on, their rate raised, where that helps, and falling to 0 on a line,",
            "their optimiser's state kept or new, whichever is better · falling: such steps that bring the same mean",
            f"loss · saved: where both end so: {finish} such steps on from the forecast bring a loss that takes",
            f"{finish} and so many more from the last observed weights.",
        ]
    if any(row.get("length") not in (None, 1) for row in rows):
        notes.append("length: mean share of the way to it that did so most.")
    if cost is not None:
        what = "Verifying one forecast" if verified else "Checking one forecast on the held-out data"
        notes.append(f"{what} costs {cost:.1f} steps (net_steps takes them off).")
    summary = _summary(rows)
    return [*notes, *([summary] if summary else [])]


def _summary(rows: list[dict]) -> str | None:
    """Which forecast wins, said plainly, in held-out loss summed over the horizons shown."""
    judged = [row for row in rows if row["role"] in ("forecast", "yardstick") and not row["in_sample"]]
    whole = [row for row in judged if row["tensor"] is None]
    if not whole or any(row.get("loss") is None for row in whole):
        return None
    steps = sorted({row["step"] for row in whole})
    winners = []
    for step in steps:
        best = min((row for row in whole if row["step"] == step), key=lambda row: row["loss"])
        keep = next(row for row in whole if row["step"] == step and row["method"] == "persistence")
        winners.append(best["method"] if best["loss"] < keep["loss"] else "persistence")
    parts = [
        f"{name} at {', '.join(str(s) for s, w in zip(steps, winners, strict=True) if w == name)}"
        for name in dict.fromkeys(winners)
    ]
    return f"Lowest held-out loss of any forecast: {'; '.join(parts)}."
