"""Read a store whole and say what is wrong with it."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from farcli.errors import StoreError
from farcli.store import Trajectory


def verify(
    stores: Sequence[str],
    *,
    partial: bool = False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Read every byte of some stores: existence, sizes and checksums of files, order of steps, NaN and Inf.

    A store that is damaged does not keep the next one from being read.

    Args:
        stores: recordings or forecasts.
        partial: accept stores whose recording has not finished, as far as they are committed.
        report: called with (done, total, text).

    Returns:
        One row per store: store, state ("sound", "damaged", "non-finite" or "unreadable"), kind, runs,
        snapshots, bytes, damaged, non_finite, seconds; followed by one row per problem, whose `problem` says
        what is wrong and whose `run` and `step` say where.
    """
    rows: list[dict[str, Any]] = []
    for store in stores:
        rows += _verify(store, partial, report)
    return rows


def _verify(store: str, partial: bool, report: Callable[[float, float, str], None]) -> list[dict[str, Any]]:
    began = time.perf_counter()
    try:
        trajectory = Trajectory.open(store, partial=partial)
        problems = list(trajectory.verify(lambda done, total: report(done, total, store)))
    except StoreError as error:
        return [_row(store, "unreadable", problem=str(error))]
    damaged = sum(problem.kind == "damage" for problem in problems)
    infinite = len(problems) - damaged
    row = _row(
        store,
        "damaged" if damaged else "non-finite" if infinite else "sound",
        kind=trajectory.kind,
        runs=len(trajectory.runs),
        snapshots=sum(trajectory.snapshots),
        bytes=trajectory.nbytes,
        damaged=damaged,
        non_finite=infinite,
        seconds=time.perf_counter() - began,
    )
    kinds = {"damage": "damaged", "non-finite": "non-finite"}
    return [row, *(_row(store, kinds[p.kind], run=p.run, step=p.step, problem=p.what) for p in problems)]


def _row(store: str, state: str, **values: Any) -> dict[str, Any]:
    keys = ("run", "step", "problem", "kind", "runs", "snapshots", "bytes", "damaged", "non_finite", "seconds")
    return {"store": store, "state": state} | {key: values.get(key) for key in keys}
