"""Draw held-out loss against horizon: every method beside the true future, the last observed weights and chance."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import UsageError
from farcli.files import refuse_existing, staged_file

FORMATS = (".png", ".svg", ".pdf")

_STYLE = {
    "persistence": ("#8c8c8c", "-", "keep $w_n$ (persistence)"),
    "lawa": ("#59a14f", "-.", "mean of the latest (LAWA)"),
    "mean": ("#b07aa1", "--", "mean of training runs"),
    "drift": ("#d37295", "-.", "drift of training runs"),
    "linear": ("#e15759", ":", "linear"),
    "quadratic": ("#9c755f", ":", "quadratic"),
    "lsq-line": ("#f28e2b", "--", "least-squares line"),
}
_COLOURS = ("#1f5fa8", "#2a9d8f", "#7b3fa0", "#b5651d", "#3a7d0a")
_QUANTITIES = {"loss": "held-out loss", "mse": "mean squared error of the weights", "accuracy": "held-out accuracy"}


def plot(rows: Sequence[Mapping[str, Any]], output: Path, *, quantity: str = "loss", replace: bool = False) -> None:
    """Draw rows of `evaluate`.

    Args:
        rows: rows as `evaluate` returns them, or read back from its NDJSON.
        output: a .png, .svg or .pdf file.
        quantity: "loss", "mse" or "accuracy".
        replace: replace an existing file.

    Raises:
        UsageError: matplotlib is missing, the format is unknown, or the rows do not hold the quantity.
    """
    if quantity not in _QUANTITIES:
        raise UsageError(f"--quantity {quantity!r}: expected one of {', '.join(_QUANTITIES)}.")
    whole = [row for row in rows if row.get("tensor") is None]
    if not any(row.get(quantity) is not None for row in whole):
        raise UsageError(f"nothing to draw: the rows hold no {_QUANTITIES[quantity]}.")
    with saved_figure(output, replace) as axes:
        _draw(axes, whole, quantity)


@contextmanager
def saved_figure(output: Path, replace: bool) -> Iterator[Any]:
    """Axes to draw on, see `saved_panels`."""
    with saved_panels(output, replace, 1, across=1, size=(8.0, 4.6)) as (axes,):
        yield axes


@contextmanager
def saved_panels(
    output: Path, replace: bool, count: int, *, across: int, size: tuple[float, float], sharey: bool = False
) -> Iterator[list[Any]]:
    """Axes to draw on, so many in a row; the figure is saved at the end, if nothing went wrong.

    Raises:
        UsageError: matplotlib is missing, the file exists, or its format is unknown.
    """
    refuse_existing(output, replace)
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"{output}: expected a file ending in {', '.join(FORMATS)}.")
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("plotting needs matplotlib.", hint="pip install 'farcli[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_LOOK):
        down = -(-count // across)
        figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False, sharey=sharey)
        panels = list(axes.flat)
        for spare in panels[count:]:
            spare.remove()
        try:
            yield panels[:count]
            with staged_file(output, replace) as temporary:
                figure.savefig(temporary, dpi=160)
        finally:
            pyplot.close(figure)


_MARKED = 40
"""Horizons up to which each is marked with a dot."""

_LOOK: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
}


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]], quantity: str) -> None:
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        value = row.get(quantity)
        key = (str(row["role"]), str(row["method"]))
        series.setdefault(key, []).append((float(row["step"]), float("nan") if value is None else float(value)))
    bounds = _bounds(series, quantity)
    origin = min(float(row["step"]) - float(row["ahead"]) for row in rows)
    kept = next((points[0][1] for (_, method), points in series.items() if method == "persistence"), float("nan"))
    if quantity == "mse":
        kept = float("nan")
    colours = iter(_COLOURS * 4)
    crowded = len({row["step"] for row in rows}) > _MARKED

    def dot(shape: str) -> str:
        return "" if crowded else shape

    for key in sorted(series, key=lambda k: ("yardstick", "chance", "truth", "forecast").index(k[0])):
        role, method = key
        steps, values = np.array(sorted(series[key])).T
        if role != "chance" and method != "mean" and np.isfinite(kept):  # these start from the last observed weights
            steps, values = np.insert(steps, 0, origin), np.insert(values, 0, kept)
        if role == "truth":
            axes.plot(steps, values, color="black", lw=1.4, marker=dot("o"), ms=3, label="true future", zorder=7)
        elif role == "chance":
            if np.isfinite(values[0]) and values[0] <= bounds[1] * 1.05:
                axes.axhline(values[0], color="#c0c0c0", lw=1.2, ls=(0, (6, 3)))
                axes.annotate("chance", (steps[-1], values[0]), va="bottom", ha="right", color="#9a9a9a", fontsize=9)
        elif role == "forecast":
            colour = next(colours)
            axes.plot(steps, values, color=colour, lw=2.6, marker=dot("s"), ms=4.5, label=method, zorder=6)
        else:
            colour, style, label = _STYLE.get(method, ("#59a14f", "-.", method))
            axes.plot(steps, values, color=colour, lw=1.5, ls=style, label=label, zorder=3)
    if np.isfinite(kept):
        axes.plot([origin], [kept], "o", color="black", ms=6, zorder=7)
        axes.annotate("$w_n$", (origin, kept), (0, 7), textcoords="offset points", ha="center")
    positive = bounds[0] > 0
    if quantity != "accuracy" and positive:
        axes.set_yscale("log")
        axes.set_ylim(bounds[0] / 1.15, bounds[1] * 1.15)
        readable_log(axes)
    else:
        axes.set_ylim(bounds)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{_QUANTITIES[quantity]}{', log scale' if quantity != 'accuracy' and positive else ''}")
    runs = max(int(row.get("runs") or 0) for row in rows)
    pooled = f", mean of {runs} runs" if runs > 1 else ""
    axes.set_title(f"Weights forecast from step {origin:.0f}{pooled}", loc="left", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bounds(series: Mapping[tuple[str, str], list[tuple[float, float]]], quantity: str) -> tuple[float, float]:
    """Limits of the vertical axis: all of the truth and of persistence; exploding forecasts leave the picture."""
    if quantity == "accuracy":
        return 0.0, 1.02
    everything = np.array([value for points in series.values() for _, value in points])
    everything = everything[np.isfinite(everything)]
    anchors = [
        value
        for (role, method), points in series.items()
        for _, value in points
        if (role in ("truth", "forecast") or method == "persistence") and np.isfinite(value)
    ]
    chance = [value for (role, _), points in series.items() for _, value in points if role == "chance"]
    positive = everything[everything > 0]
    low = float(positive.min()) if positive.size else 0.0
    high = max([*anchors, *[value for value in chance if np.isfinite(value)]], default=float(everything.max()))
    return low, min(max(high, low * 1.5), float(everything.max()) * 1.0 if everything.size else high)


def readable_log(axes: Any) -> None:
    """Write the numbers of a logarithmic axis out, at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
