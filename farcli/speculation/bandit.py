"""Which predictor, how strongly: Thompson sampling over arms, with what the displacements say as prior."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_DISCOUNT = 0.9
"""What is kept of what is known, at each reward."""


class Bandit:
    """Arms with Gaussian rewards that drift; the arm that draws best is taken.

    A reward is the average's progress per step in a window, relative to that of earlier windows: 0 is as always.
    The first arm is always "no leap", so that what the others earn is measured beside it.

    Source: Thompson (1933); discounting for drift as in Raj and Kalyani (arXiv 1707.09727).

    Args:
        strengths: of the arms, 0 for no leap.
        seed: of its draws.
        spread: prior standard deviation of a reward.
    """

    def __init__(self, strengths: Sequence[float], *, seed: int = 0, spread: float = 0.5) -> None:
        self._strengths = np.array(strengths, float)
        self._random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(6,)))
        self._spread = spread
        self._count = np.zeros(len(strengths))
        self._sum = np.zeros(len(strengths))

    def choose(self, cosine: float | None) -> int:
        """An arm.

        Args:
            cosine: between training's last displacements: where it goes straight, leaps are promising before
                anything is known of them; the prior mean of an arm is a quarter of cosine × strength.
        """
        prior = 0.25 * (0.0 if cosine is None else cosine) * self._strengths
        mean = (prior + self._sum) / (1 + self._count)
        return int(np.argmax(self._random.normal(mean, self._spread / np.sqrt(1 + self._count))))

    def reward(self, arm: int, value: float) -> None:
        """What an arm earned; clipped to ±2, so that one disaster is not remembered for ever."""
        self._count *= _DISCOUNT
        self._sum *= _DISCOUNT
        self._count[arm] += 1
        self._sum[arm] += float(np.clip(value, -2, 2))

    def state(self) -> dict[str, Any]:
        """All there is, to be kept."""
        return {"count": self._count.tolist(), "sum": self._sum.tolist(), "random": self._random.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        """Be what `state` returned."""
        self._count, self._sum = np.array(state["count"]), np.array(state["sum"])
        self._random.bit_generator.state = state["random"]
