"""What many judged leaps come to: acceptance in Leap+Verify's form, and beside it what its tables leave out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from farcli.errors import CheckFailedError, UsageError
from farcli.regimes import REGIMES, Thresholds
from farcli.speculation.offline import auc

ALL = "all"
SIGNALS = ("similarity", "displacement_cosine", "past_outcomes")
TARGETS: dict[str, Callable[[Mapping[str, Any]], bool | None]] = {
    "accepted": lambda row: (
        row["accepted_strict"] if "accepted_strict" in row else row["loss_forecast"] < row["loss_now"]
    ),
    "gain": lambda row: row["equivalent_steps"] > 0,
    "worth_k": lambda row: row["worth_k"],
}
"""What signals are to foretell: strict acceptance, more than 0 equivalent steps, at least K of them."""

Rows = list[dict[str, Any]]


def summary_rows(
    rows: Sequence[Mapping[str, Any]], criteria: Sequence[str], thresholds: Mapping[int, Thresholds]
) -> Rows:
    """Rows over all runs.

    Args:
        rows: of kinds "leap" and "cascade", see `leap_offline`.
        criteria: that they were judged by.
        thresholds: of the regimes, by run.

    Returns:
        Rows, told apart by "kind":

        - "summary", for each predictor, K and regime ("all" for every snapshot): snapshots, runs (that have any),
          accepted_… (share of the snapshots of a run, mean over runs) and accepted_…_std (sample standard deviation
          over runs; None for one), equivalent_steps (median over snapshots) with its quartiles …_low and …_high,
          bounded (share of snapshots where that is only a bound), worth_k (share worth at least K steps, of those
          where it is known), inflation (median) and inflation_max, harmful (share worth less than nothing),
          verification_steps (of a leap), net_… by each criterion: mean over snapshots of the equivalent steps of
          what is accepted, less the verification of every leap.
        - "cascades", for each predictor, cascade and regime: snapshots, runs, complete (share) and complete_std,
          reached (mean), equivalent_steps (median), net_steps (mean).
        - "auc", for each predictor, K, signal and target: auc, auc_low, auc_high (95 %), positives, negatives.
        - "regimes", for each run: low, high (thresholds), and the number of judged snapshots in each.
    """
    leaps = [dict(row) for row in rows if row["kind"] == "leap"]
    found: Rows = []
    for (predictor, ahead), members in _grouped(leaps, "predictor", "ahead"):
        for regime, some in _by_regime(members):
            found.append(
                {
                    "kind": "summary",
                    "predictor": predictor,
                    "ahead": ahead,
                    "regime": regime,
                    **_summary(some, criteria),
                }
            )
    cascades = [row for row in rows if row["kind"] == "cascade"]
    for (predictor, depth, ahead), members in _grouped(cascades, "predictor", "depth", "ahead"):
        for regime, some in _by_regime(members):
            who = {"predictor": predictor, "depth": depth, "ahead": ahead, "regime": regime}
            found.append({"kind": "cascades", **who, **_cascades(some)})
    for (predictor, ahead), members in _grouped(leaps, "predictor", "ahead"):
        found += _aucs(predictor, ahead, members)
    return found + _regimes(leaps, thresholds)


def _grouped(rows: Iterable[Mapping[str, Any]], *keys: str) -> list[tuple[tuple[Any, ...], Rows]]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(dict(row))
    return list(groups.items())


def _by_regime(members: Rows) -> list[tuple[str, Rows]]:
    named = [(regime, [row for row in members if row["regime"] == regime]) for regime in REGIMES]
    return [*((regime, some) for regime, some in named if some), (ALL, members)]


def over_runs(rows: Rows, key: str) -> tuple[float, float | None]:
    """Mean and sample standard deviation over runs of each run's mean."""
    means = [float(np.mean([row[key] for row in some])) for _, some in _grouped(rows, "run")]
    return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else None


def _summary(some: Rows, criteria: Sequence[str]) -> dict[str, Any]:
    worth = np.array([row["equivalent_steps"] for row in some])
    inflation = np.array([row["inflation"] for row in some])
    known = [row["worth_k"] for row in some if row["worth_k"] is not None]
    cost = some[0]["verification_steps"]
    row: dict[str, Any] = {"snapshots": len(some), "runs": len({each["run"] for each in some})}
    for name in criteria:
        row[f"accepted_{name}"], row[f"accepted_{name}_std"] = over_runs(some, f"accepted_{name}")
    low, median, high = np.quantile(worth, [0.25, 0.5, 0.75])
    row |= {
        "equivalent_steps": float(median),
        "equivalent_steps_low": float(low),
        "equivalent_steps_high": float(high),
        "bounded": float(np.mean([each["bounded"] for each in some])),
        "worth_k": float(np.mean(known)) if known else None,
        "harmful": float((worth < 0).mean()),
        "inflation": float(np.median(inflation)),
        "inflation_max": float(inflation.max()),
        "verification_steps": cost,
    }
    for name in criteria:
        gained = [each["equivalent_steps"] if each[f"accepted_{name}"] else 0.0 for each in some]
        row[f"net_{name}"] = None if cost is None else float(np.mean(gained)) - cost
    return row


def _cascades(some: Rows) -> dict[str, Any]:
    complete, std = over_runs(some, "complete")
    costs = [row["verification_steps"] for row in some]
    worth = [row["equivalent_steps"] for row in some]
    return {
        "snapshots": len(some),
        "runs": len({row["run"] for row in some}),
        "complete": complete,
        "complete_std": std,
        "reached": float(np.mean([row["reached"] for row in some])),
        "equivalent_steps": float(np.median(worth)),
        "net_steps": None if None in costs else float(np.mean(np.subtract(worth, costs))),
    }


def _aucs(predictor: str, ahead: int, members: Rows) -> Rows:
    rows: Rows = []
    for signal in SIGNALS:
        for target, of in TARGETS.items():
            judged = [(row[signal], good) for row in members if (good := of(row)) is not None]
            measured = [np.nan if value is None else value for value, _ in judged]
            found = auc(measured, [good for _, good in judged])
            rows.append(
                {
                    "kind": "auc",
                    "predictor": predictor,
                    "ahead": ahead,
                    "signal": signal,
                    "target": target,
                    "auc": _number(found.value),
                    "auc_low": _number(found.low),
                    "auc_high": _number(found.high),
                    "positives": found.positives,
                    "negatives": found.negatives,
                }
            )
    return rows


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _regimes(leaps: Rows, thresholds: Mapping[int, Thresholds]) -> Rows:
    rows: Rows = []
    for (run,), members in _grouped(leaps, "run"):
        if run not in thresholds:
            continue
        judged = {row["step"]: row["regime"] for row in members}
        counts = {regime: list(judged.values()).count(regime) for regime in REGIMES}
        parted = {"low": thresholds[run].low, "high": thresholds[run].high}
        rows.append({"kind": "regimes", "run": run, "snapshots": len(judged), **parted, **counts})
    return rows


def parse_limits(texts: Sequence[str], flag: str) -> list[tuple[str | None, str, float]]:
    """Limits like "linear@25:accepted_strict=0.1" or "net_strict=0": (predictor or predictor@K, key, number).

    Args:
        texts: as typed.
        flag: for messages.

    Raises:
        UsageError: a text is not that.
    """
    limits = []
    for text in texts:
        scope, colon, rest = text.rpartition(":")
        key, _, number = rest.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not key or np.isnan(value):
            raise UsageError(f"{flag} {text!r}: expected [PREDICTOR[@K]:]KEY=NUMBER, like linear@25:net_strict=0.")
        limits.append((scope if colon else None, key, value))
    return limits


def check(
    rows: Sequence[Mapping[str, Any]],
    least: Sequence[tuple[str | None, str, float]],
    most: Sequence[tuple[str | None, str, float]],
    yardstick: str,
) -> None:
    """Hold the summary over all snapshots against limits.

    Raises:
        UsageError: no row or key is meant.
        CheckFailedError: a row is beyond a limit, or holds no number to compare.
    """
    judged = [row for row in rows if row["kind"] == "summary" and row["regime"] == ALL]
    for flag, limits in (("--require", least), ("--max", most)):
        for scope, key, bound in limits:
            meant = [row for row in judged if _is_meant(row, scope, yardstick)]
            if not meant:
                raise UsageError(f"{flag} {scope}: no such predictor, or no such K.")
            if key not in meant[0] or isinstance(meant[0][key], str):
                numbers = [name for name, value in meant[0].items() if not isinstance(value, str)]
                raise UsageError(f"{flag} {key}: expected one of {', '.join(numbers)}.")
            for row in meant:
                value = row[key]
                if value is None or not (value >= bound if flag == "--require" else value <= bound):
                    raise CheckFailedError(
                        f"{flag} {key}={bound:g}: {row['predictor']} at K = {row['ahead']} has {key} = {value}."
                    )


def _is_meant(row: Mapping[str, Any], scope: str | None, yardstick: str) -> bool:
    if scope is None:
        return row["predictor"] != yardstick
    return scope in (row["predictor"], f"{row['predictor']}@{row['ahead']}")
