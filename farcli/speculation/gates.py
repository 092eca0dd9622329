"""Whether a leap may stay: the criteria of Leap+Verify, with nothing seen that was not there yet, and a later verdict.

Shape suffixes: N batches of a draw, on which both losses were taken (paired); M training steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean, stdev
from typing import Literal

Gate = Literal["none", "strict", "adaptive", "proximity", "delayed"]
GATES: tuple[Gate, ...] = ("none", "strict", "adaptive", "proximity", "delayed")


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict and why.

    Attributes:
        kept: whether the leap stays.
        before: mean loss without it.
        after: mean loss with it.
        reason: in words.
        similarity: of activations before and after; None where nobody took them.
    """

    kept: bool
    before: float
    after: float
    reason: str
    similarity: float | None = None


def immediate(
    gate: Gate, before_N: Sequence[float], after_N: Sequence[float], earlier: Sequence[float], tolerance: float
) -> Judged:
    """Judge a leap right away.

    Args:
        gate: strict: L̂ < L; adaptive: L̂ < L + σ, with σ the spread of the losses before this one; proximity:
            L̂ < L + ε·L.
        before_N: losses L of the present weights.
        after_N: losses L̂ of the leap, on the same batches.
        earlier: mean losses L at earlier proposals; σ is taken over the last 10 of them.
        tolerance: ε.

    Source: Leap+Verify (arXiv 2602.19580), proximity as coded; printed, |L̂ − L| < ε·L refuses what is better by more.
    Differs: its code takes σ over the whole run, which sees the future.
    """
    before, after = fmean(before_N), fmean(after_N)
    if not isfinite(after):
        return Judged(False, before, after, "the loss is not finite")
    match gate:
        case "strict":
            bound = before
        case "adaptive":
            recent = list(earlier)[-10:]
            bound = before + (stdev(recent) if len(recent) > 1 else 0.0)
        case "proximity":
            bound = before + tolerance * abs(before)
        case _:
            raise AssertionError(gate)
    kept = after < bound
    return Judged(kept, before, after, f"{after:.5g} {'<' if kept else '≥'} {bound:.5g}")


def delayed(before_N: Sequence[float], after_N: Sequence[float], margin: float) -> Judged:
    """Judge what a window of training with leaps in it came to.

    Kept unless the running average is worse than where the window began by more than `margin` standard errors of the
    paired difference: then the state there is the better one, and going back loses nothing but time already spent.

    Args:
        before_N: losses of the average at the window's beginning.
        after_N: of the average now, on the same batches.
        margin: in standard errors.
    """
    before, after = fmean(before_N), fmean(after_N)
    if not isfinite(after):
        return Judged(False, before, after, "the loss is not finite")
    differences = [late - early for late, early in zip(after_N, before_N, strict=True)]
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else 0.0
    kept = fmean(differences) <= margin * error
    return Judged(kept, before, after, f"average {before:.5g} → {after:.5g} over the window (±{error:.2g})")


def heard(before_N: Sequence[float], after_M: Sequence[float], margin: float) -> Judged:
    """Judge a window by the training's own losses, each on a batch before it was trained on.

    Kept unless the later half of the window is worse than what came before it by more than `margin` standard errors
    of the difference. This is weaker than held-out data: batches are not paired, so the error is that of two
    independent means; losses of neighbouring steps are not quite independent; and a window may pass by what training
    itself gained in it.

    Args:
        before_N: training losses of the steps before the window.
        after_M: of the steps of its later half.
        margin: in standard errors.

    Source: prequential evaluation, Dawid (1984): test on each batch, then train on it.
    """
    if min(len(before_N), len(after_M)) < 2:
        nan = float("nan")
        return Judged(False, nan, nan, f"{len(before_N)} training losses before it and {len(after_M)} after: too few")
    before, after = fmean(before_N), fmean(after_M)
    if not isfinite(after):
        return Judged(False, before, after, "the loss is not finite")
    error = sqrt(sum(stdev(losses) ** 2 / len(losses) for losses in (before_N, after_M)))
    kept = after - before <= margin * error
    return Judged(
        kept, before, after, f"training loss {before:.5g} → {after:.5g} over the window (±{error:.2g}, unpaired)"
    )
