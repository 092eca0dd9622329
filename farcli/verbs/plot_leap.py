"""Draw a leaping training: loss against step beside its control's, every leap marked, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import StoreError, UsageError
from farcli.recording.background import read_journal
from farcli.speculation.arrays import LEDGER, read_part
from farcli.verbs.plot import saved_figure

_MARKS = {
    "accepted": ("^", "#2a9d8f", "kept"),
    "unverified": ("o", "#8c8c8c", "unverified"),
    "rejected": ("x", "#c44536", "rejected"),
    "rolled back": ("v", "#c44536", "rolled back"),
}
"""How a verdict is drawn: shape, colour, name."""
_QUANTITIES = {"held_out": "held-out loss", "training": "training loss, mean of the last steps"}
_WIDE = 5
"""Ratio of the losses above which their axis is logarithmic."""

Series = list[dict[str, Any]]
"""Rows of run, step, loss, average_loss."""


@dataclass(slots=True)
class Drawn:
    """What a store has to draw.

    Attributes:
        name: of the store.
        kind: "held_out" or "training".
        losses: of the weights, and of their running average where there is one.
        control: of the same runs without leaps.
        leaps: rows of the ledger.
    """

    name: str
    kind: str
    losses: Series
    control: Series = field(default_factory=list)
    leaps: list[dict[str, Any]] = field(default_factory=list)


def is_leaping(path: Path) -> bool:
    """Whether a store has a ledger of leaps."""
    return (path / LEDGER / "zarr.json").exists()


def plot_leap(store: Path, controls: Sequence[Path], output: Path, *, replace: bool = False) -> dict[str, Any]:
    """Draw a store of `farcli leap`.

    Args:
        store: it.
        controls: stores of the same training without leaps; one that `--control` trained is in the store itself.
        output: a .png, .svg or .pdf file.
        replace: replace an existing file.

    Returns:
        A row: path, quantity, runs, leaps.

    Raises:
        UsageError: matplotlib is missing, the format is unknown, or a control has losses of another kind.
        StoreError: a store holds no losses.
    """
    leaping = read_drawn(store)
    others = [read_drawn(path) for path in controls]
    for other in others:
        if other.kind != leaping.kind:
            raise UsageError(
                f"{other.name}: has {_QUANTITIES[other.kind]}, but {leaping.name} has {_QUANTITIES[leaping.kind]}."
            )
    with saved_figure(output, replace) as axes:
        _draw(axes, leaping, others)
    runs = len({row["run"] for row in leaping.losses})
    return {"path": str(output), "quantity": leaping.kind, "runs": runs, "leaps": len(leaping.leaps)}


def read_drawn(path: Path) -> Drawn:
    """Losses and leaps of a store: held-out ones of its ledger, else the training's own of its journal.

    Raises:
        StoreError: it has neither.
    """
    losses, control, leaps = [], [], []
    if is_leaping(path):
        losses, control, leaps = (read_part(path, name) for name in ("snapshot", "control", "proposal"))
    if losses:
        return Drawn(path.name, "held_out", losses, control, leaps)
    journal = read_journal(path)
    heard = [
        {"run": 0, "step": step, "loss": note["loss"], "average_loss": None}
        for step, note in sorted(journal.items())
        if note.get("loss") is not None
    ]
    if not heard:
        raise StoreError(
            f"{path}: holds no losses to draw.",
            "farcli leap writes them; with --strength 0 a script trains as without leaps, for a control.",
        )
    return Drawn(path.name, "training", heard, [], leaps)


def _draw(axes: Any, leaping: Drawn, others: Sequence[Drawn]) -> None:
    grey = ("#9a9a9a", "#b5651d", "#7b3fa0")
    beside = [("control", leaping.control)] if leaping.control else []
    beside += [(other.name, other.losses) for other in others]
    for (name, series), colour in zip(beside, grey * len(beside), strict=False):
        _line(axes, series, "loss", name, colour, thin=True)
        _line(axes, series, "average_loss", f"{name}, running average", colour)
    _line(axes, leaping.losses, "loss", "with leaps", "#1f5fa8", thin=True)
    _line(axes, leaping.losses, "average_loss", "with leaps, running average", "#1f5fa8")
    for verdict, (shape, colour, label) in _MARKS.items():
        steps = [leap["step"] for leap in leaping.leaps if leap["verdict"] == verdict]
        if steps:
            axes.plot(
                steps,
                [0.03] * len(steps),
                shape,
                color=colour,
                ms=6,
                alpha=0.8,
                transform=axes.get_xaxis_transform(),
                label=f"leap {label} ({len(steps)})",
                zorder=8,
            )
    _scale(axes, [leaping.losses, *(series for _, series in beside)])
    axes.set_xlabel("training step")
    axes.set_ylabel(_QUANTITIES[leaping.kind])
    runs = len({row["run"] for row in leaping.losses})
    title = f"{leaping.name}: {len(leaping.leaps)} leaps"
    axes.set_title(title + (f", mean of {runs} runs" if runs > 1 else ""), loc="left", fontsize=11)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _line(axes: Any, series: Series, key: str, label: str, colour: str, *, thin: bool = False) -> None:
    """The mean over runs, at the steps that all have."""
    runs = {row["run"] for row in series}
    steps, values = [], []
    for step in sorted({row["step"] for row in series}):
        at = [row[key] for row in series if row["step"] == step and row[key] is not None and np.isfinite(row[key])]
        if len(at) == len(runs):
            steps.append(step)
            values.append(float(np.mean(at)))
    if values:
        width, style = (1.2, (0, (4, 2))) if thin else (2.4, "-")
        axes.plot(steps, values, color=colour, lw=width, ls=style, label=label, zorder=5)


def _scale(axes: Any, all_series: Sequence[Series]) -> None:
    from farcli.verbs.plot import readable_log

    values = [
        row[key]
        for series in all_series
        for row in series
        for key in ("loss", "average_loss")
        if row[key] is not None and np.isfinite(row[key])
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low > _WIDE:
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * 1.1)  # room below for the marks
        readable_log(axes)
    else:
        axes.set_ylim(low - 0.12 * (high - low), high + 0.05 * (high - low))
