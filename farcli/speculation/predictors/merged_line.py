"""Average first, then extrapolate along the first component of the averages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from farcli.speculation.base import Observed, Predictor, Proposal


@final
class MergedLine(Predictor):
    """Leap along the line that the last averages lie on.

    The averages at the last points are centred; their first principal component, from the Gram matrix, is the line;
    the last average's pace along it, times `share`, is the leap of weights and average together.

    Source: "average first, then extrapolate": merged checkpoints lie on a nearly one-dimensional line
    (arXiv 2605.26484).
    Differs: running averages instead of merged checkpoints; the average goes along.
    """

    reference = "along the first component of averaged points, after arXiv 2605.26484"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        points: int = field(default=5, metadata={"help": "averages the line goes through"})
        share: float = field(default=0.5, metadata={"help": "of the mean pace between averages"})

        def __post_init__(self) -> None:
            if self.points < 3:
                raise ValueError(f"points = {self.points}, expected 3 or more.")

    _config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._averages: list[Tensor] = []
        self._stayed: list[Tensor] = []

    @property
    def context(self) -> int:
        """One point: it keeps the averages itself."""
        return 1

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """The pace along the line, times share; nothing before there are enough averages."""
        self._averages = self._stayed = [*self._averages, seen.average_D.clone()][-self._config.points :]
        if len(self._averages) < self._config.points:
            return Proposal(move_D=torch.zeros_like(seen.now))
        mean_D = torch.stack(self._averages).mean(0)
        centred = [each - mean_D for each in self._averages]
        gram = torch.tensor([[float(a @ b) for b in centred] for a in centred], dtype=torch.float64)
        first = torch.linalg.eigh(gram).eigenvectors[:, -1]
        line_D = torch.zeros_like(mean_D)
        for share, each in zip(first.tolist(), centred, strict=True):
            line_D.add_(each, alpha=share)
        line_D /= line_D.norm().clamp_min(1e-30)
        pace = float((self._averages[-1] - self._averages[0]) @ line_D) / (len(self._averages) - 1)
        move_D = line_D.mul_(pace * self._config.share * strength)
        # The past moves along, so that the next pace is training's own.
        self._averages = [each + move_D for each in self._averages]
        return Proposal(move_D=move_D)

    def rejected(self) -> None:
        """The averages stayed where they were."""
        self._averages = self._stayed

    def state(self) -> Mapping[str, Tensor]:
        """The averages."""
        return {f"average.{index}": each for index, each in enumerate(self._averages)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        self._averages = [state[f"average.{index}"].clone() for index in range(len(state))]
