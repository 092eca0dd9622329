"""The arithmetic of leaps judged on a recorded run: directions, criteria, cascades, and how well a signal foretells.

Leap+Verify (arXiv 2602.19580) as printed and as it should be. Nothing here opens a store or knows a network.

Shape suffixes: D coordinates, T snapshots in order of time, N proposals, P positives, M negatives, W draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PROXIMITY = 0.005
"""Share of the present loss that the proximity criterion lets a leap cost."""
_DRAWS, _LEVEL = 500, 0.95


def along_moments(
    first_D: Tensor,
    second_D: Tensor,
    *,
    updates: int,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    corrected: bool = True,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """The direction in which Adam's next update goes, without the learning rate: to be added to the weights.

    −m̂/(√v̂ + ε) with m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ). K updates with the moments held fixed move weights by
    K·rate times this.

    Source: Leap+Verify's momentum predictor (arXiv 2602.19580), θ + K·m/(√v + ε).
    Differs: it descends, and it is to be multiplied by the learning rate, which the printed formula leaves out;
    `corrected=False` takes m and v as they are stored, as printed.

    Args:
        first_D: exp_avg.
        second_D: exp_avg_sq.
        updates: how many updates they have seen, t.
        betas: their decays.
        epsilon: Adam's.
        corrected: whether to undo the bias towards 0 of young moments.
        precision: that the moments have passed through on their way (torch.float16: what a file in half precision
            keeps of them); the arithmetic is float32.

    Returns:
        float32 [D].
    """
    first, second = (moment.to(precision).float() for moment in (first_D, second_D))
    if corrected:
        first = first / (1 - betas[0] ** updates)
        second = second / (1 - betas[1] ** updates)
    return -first / (second.sqrt() + epsilon)


def printed_quadratic(ahead: float, interval: float) -> tuple[float, float]:
    """Coefficients of Leap+Verify's quadratic as printed: of the first difference, and of the second.

    ŵ = w_t + (K/Δ)·(w_t − w_{t−Δ}) + K(K − Δ)/(2Δ²)·(w_t − 2w_{t−Δ} + w_{t−2Δ}). The parabola through the three
    points has s(s + 1)/2 with s = K/Δ instead: this one does not come to the points that it is made of.
    """
    return ahead / interval, ahead * (ahead - interval) / (2 * interval**2)


def strict(forecast: float, now: float, spread: float) -> bool:
    """L̂ < L."""
    return forecast < now


def adaptive(forecast: float, now: float, spread: float) -> bool:
    """L̂ < L + σ."""
    return forecast < now + spread


def proximity(forecast: float, now: float, spread: float) -> bool:
    """L̂ < L + 0.005·L: one-sided, as coded."""
    return forecast < now * (1 + PROXIMITY)


def proximity_printed(forecast: float, now: float, spread: float) -> bool:
    """|L̂ − L| < 0.005·L: as printed, which turns down a leap for being too good."""
    return abs(forecast - now) < PROXIMITY * now


@dataclass(frozen=True, slots=True)
class Criterion:
    """When a leap is accepted.

    Attributes:
        holds: (loss of the forecast, present loss, spread of the losses) → whether it is.
        foresees: whether the spread is that of the whole run, its future included.
    """

    holds: Callable[[float, float, float], bool]
    foresees: bool = False


CRITERIA = {
    "strict": Criterion(strict),
    "adaptive": Criterion(adaptive),
    "adaptive-published": Criterion(adaptive, foresees=True),
    "proximity": Criterion(proximity),
    "proximity-printed": Criterion(proximity_printed),
}
"""By name. A loss that is NaN is accepted by none."""


def causal_spread(losses_T: Sequence[float], window: int | None = None) -> list[float]:
    """σ for the adaptive criterion: standard deviation of the losses up to each snapshot, itself included.

    Differs: Leap+Verify's code takes the standard deviation of the whole run, future included.

    Args:
        losses_T: held-out losses in order of time.
        window: how many of the last ones count; all of them when None.
    """
    return [
        float(np.std(losses_T[0 if window is None else max(0, end - window) : end]))
        for end in range(1, len(losses_T) + 1)
    ]


def past_share(outcomes_T: Sequence[bool], window: int) -> list[float]:
    """Share of the last `window` outcomes *before* each one that were good; NaN for the first."""
    return [
        float(np.mean(outcomes_T[max(0, place - window) : place])) if place else float("nan")
        for place in range(len(outcomes_T))
    ]


def reached(losses: Sequence[float], now: float) -> int:
    """How many leaps of a cascade hold: each must have a lower loss than the one before it, the first than `now`."""
    before = now
    for count, loss in enumerate(losses):
        if not strict(loss, before, 0.0):
            return count
        before = loss
    return len(losses)


@dataclass(frozen=True, slots=True)
class Auc:
    """How well a signal tells good proposals from bad ones.

    Attributes:
        value: probability that a good one has the higher signal, ties counting half: .5 is chance, 1 perfect;
            NaN without both kinds.
        low: lower end of a 95 % bootstrap interval over proposals; too narrow where these depend on one another.
        high: upper end.
        positives: good ones.
        negatives: bad ones.
    """

    value: float
    low: float
    high: float
    positives: int
    negatives: int


def auc(signal_N: Sequence[float], good_N: Sequence[bool]) -> Auc:
    """Area under the receiver operating characteristic; proposals whose signal is NaN are left out."""
    signal, good = np.asarray(signal_N, float), np.asarray(good_N, bool)
    good, signal = good[np.isfinite(signal)], signal[np.isfinite(signal)]
    positives, negatives = int(good.sum()), int((~good).sum())
    if not (positives and negatives):
        return Auc(float("nan"), float("nan"), float("nan"), positives, negatives)
    wins_PM = np.sign(signal[good][:, None] - signal[~good][None, :]) / 2 + 0.5
    drawn_WN = np.random.default_rng(0).multinomial(len(good), np.full(len(good), 1 / len(good)), size=_DRAWS)
    taken_WP, left_WM = drawn_WN[:, good], drawn_WN[:, ~good]
    pairs_W = taken_WP.sum(1) * left_WM.sum(1)
    won_W = ((taken_WP @ wins_PM) * left_WM).sum(1)
    low, high = np.quantile(won_W[pairs_W > 0] / pairs_W[pairs_W > 0], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Auc(float(wins_PM.mean()), float(low), float(high), positives, negatives)
