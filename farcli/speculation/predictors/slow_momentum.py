"""Momentum on displacements, which predictors share."""

from collections.abc import Mapping

from torch import Tensor


class SlowMomentum:
    """b ← μb + d, with Nesterov's look ahead.

    Source: SNOO (arXiv 2510.15830), after DiLoCo's outer optimiser (arXiv 2311.08105).

    Args:
        decay: μ, what is kept of earlier displacements.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._momentum_D: Tensor | None = None

    def ahead(self, done_D: Tensor) -> Tensor:
        """Take d [D] in, and return d + μb [D], a new tensor."""
        if self._momentum_D is None:
            self._momentum_D = done_D.clone()
        else:
            self._momentum_D.mul_(self._decay).add_(done_D)
        return self._momentum_D.mul(self._decay).add_(done_D)

    def state(self) -> Mapping[str, Tensor]:
        """The momentum b."""
        return {} if self._momentum_D is None else {"momentum": self._momentum_D}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take b back."""
        self._momentum_D = state["momentum"].clone() if "momentum" in state else None
