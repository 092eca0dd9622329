"""Where training stands: fingerprints of activations at fixed probe inputs, and what they say of it (Leap+Verify).

Shape suffixes: P probes, F features, T snapshots in order of time, D coordinates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn

from farcli.errors import UsageError

Regime = Literal["stable", "transition", "chaotic"]
REGIMES: tuple[Regime, ...] = ("stable", "transition", "chaotic")
PUBLISHED = (0.9962696, 0.99948916)
"""Leap+Verify's thresholds in its code, low and high: 30th and 70th percentile of its own similarities."""
_PIECE = 1 << 20


@final
class Probe:
    """Listens in on a network's last `nn.Linear` while somebody else evaluates the network.

    What goes into that layer is what Leap+Verify fingerprints: of a language model the output of the final norm. All
    axes between the first (inputs) and the last (features) are averaged over. The inputs are those the evaluation
    feeds, in its order, so that equal evaluations give comparable fingerprints, at no cost of their own.

    Source: Leap+Verify (arXiv 2602.19580), as coded: final LayerNorm output, mean over tokens.

    Args:
        model: the network; its last `nn.Linear`, in the order modules were added, is the one.
        probes: of how many inputs, at most.

    Raises:
        UsageError: the network has no such layer.
    """

    def __init__(self, model: nn.Module, probes: int) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise UsageError("the network has no nn.Linear, whose input would be its fingerprint.")
        self._layer = layers[-1]
        self._probes = probes
        self._seen: list[Tensor] = []
        self._hook: Any = None

    def __enter__(self) -> "Probe":
        self._seen = []
        self._hook = self._layer.register_forward_pre_hook(self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _listen(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        left = self._probes - sum(len(each) for each in self._seen)
        if left > 0:
            pooled = inputs[0].detach()[:left].float()
            self._seen.append(pooled.flatten(1, -2).mean(1) if pooled.ndim > 2 else pooled)

    def fingerprint(self) -> np.ndarray:
        """Features of each probe seen since the block was entered, float32 [P, F]."""
        return torch.cat(self._seen).cpu().numpy()


def similarity(before_PF: np.ndarray, now_PF: np.ndarray) -> float:
    """Cosine of each probe's features at two snapshots, then the mean over probes; NaN for features that are 0."""
    before, now = before_PF.astype(np.float64), now_PF.astype(np.float64)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(now, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(((before * now).sum(1) / norms).mean())


def displacement_cosine(first_D: np.ndarray, second_D: np.ndarray, third_D: np.ndarray) -> float:
    """Cosine between two displacements that follow one another: 1 on a straight line, 0 for a random walk.

    Computed piece by piece in float64. NaN where nothing moved.
    """
    product = before = after = 0.0
    for start in range(0, len(first_D), _PIECE):
        a, b, c = (vector[start : start + _PIECE].astype(np.float64) for vector in (first_D, second_D, third_D))
        product += float(np.dot(b - a, c - b))
        before += float(np.dot(b - a, b - a))
        after += float(np.dot(c - b, c - b))
    return product / (before * after) ** 0.5 if before > 0 and after > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What parts the regimes: stable above `high`, chaotic below `low`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UsageError(f"thresholds: low = {self.low:g} lies above high = {self.high:g}.")

    @classmethod
    def of_percentiles(cls, similarities_T: Sequence[float], low: float = 30, high: float = 70) -> "Thresholds":
        """Percentiles of a run's similarities: hindsight, as Leap+Verify's were found.

        Raises:
            UsageError: they are no percentages in ascending order, or no similarity is a number.
        """
        if not 0 <= low <= high <= 100:
            raise UsageError(f"percentiles {low:g},{high:g}: expected two numbers from 0 to 100, the lower first.")
        finite = [value for value in similarities_T if np.isfinite(value)]
        if not finite:
            raise UsageError("thresholds: no similarity is a number, so there are no percentiles.")
        return cls(*(float(value) for value in np.percentile(finite, [low, high])))


def regimes(similarities_T: Sequence[float], thresholds: Thresholds, confirm: int = 2) -> list[Regime | None]:
    """The regime at each snapshot; stable only from the `confirm`-th high similarity in a row on.

    Source: Leap+Verify (arXiv 2602.19580), as coded.

    Returns:
        One for each similarity; None where that is not a number.
    """
    found: list[Regime | None] = []
    row = 0
    for value in similarities_T:
        row = row + 1 if value > thresholds.high else 0
        if not np.isfinite(value):
            found.append(None)
        elif value < thresholds.low:
            found.append("chaotic")
        else:
            found.append("stable" if row >= confirm else "transition")
    return found
