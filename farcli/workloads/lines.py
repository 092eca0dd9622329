"""The task of Gradient Flow Matching's synthetic experiments: a line with noise, another for every run.

y = a·x + b + noise with a ~ N(2, 0.1²), b ~ N(1, 0.1²), x ~ U(−1, 1). R runs, N points of each.

Source: arXiv 2505.20221, section 5.1 and appendix A.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from farcli.workloads.base import Batch
from farcli.workloads.randomness import Purpose, stream

HELD_OUT = 1000
"""Fresh points that a run is judged on."""
_SLOPE, _INTERCEPT, _TASK_STD = 2.0, 1.0, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """The tasks of all seeds.

    Attributes:
        noise: standard deviation of the noise in y.
        dtype: of the points.
    """

    noise: float
    dtype: torch.dtype

    def points(self, seed: int, purpose: Purpose, number: int, *part: int) -> tuple[Tensor, Tensor]:
        """(x, y) of one run, each of shape [N]: "data" to train on, "held-out" to be judged on.

        Args:
            seed: of the run.
            purpose: what for; all have the same task.
            number: N.
            part: which points, of those for a purpose that has several.
        """
        task = stream(seed, "data")
        a, b = task.normal((_SLOPE, _INTERCEPT), _TASK_STD)
        generator = task if purpose == "data" else stream(seed, purpose, *part)
        x = generator.uniform(-1, 1, number)
        y = a * x + b + self.noise * generator.normal(size=number)
        return torch.tensor(x, dtype=self.dtype), torch.tensor(y, dtype=self.dtype)

    def batches(self, seeds: Sequence[int], points: int, size: int, start: int = 0) -> Iterator[Batch]:
        """Endless pairs (x, y) of shape [R, size], reshuffled every epoch; an epoch's last one may be smaller.

        Args:
            seeds: of the runs.
            points: training points of each run.
            size: points a step; all of them, in the order drawn, where there are no more.
            start: batches to leave out.
        """
        x_RN, y_RN = (torch.stack(part) for part in zip(*(self.points(s, "data", points) for s in seeds), strict=True))
        while size >= points:
            yield x_RN, y_RN
        orders = [stream(seed, "order") for seed in seeds]
        epoch, first = divmod(start, -(-points // size))
        for number in count():
            order_RN = torch.from_numpy(np.stack([generator.permutation(points) for generator in orders]))
            if number >= epoch:
                for chosen in order_RN.split(size, dim=1)[first if number == epoch else 0 :]:
                    yield x_RN.gather(1, chosen), y_RN.gather(1, chosen)

    def verification(self, seed: int, draw: int, batches: int, size: int) -> Sequence[Batch]:
        """Pairs (x, y) of shape [1, size], never drawn before: see `Workload.verification`."""
        x, y = self.points(seed, "verify", batches * size, draw)
        return list(zip(x[None].split(size, dim=1), y[None].split(size, dim=1), strict=True))

    def chance(self) -> float:
        """Mean over tasks of the best constant's squared error: E[a²]·var(x) + noise variance."""
        return (_SLOPE**2 + _TASK_STD**2) / 3 + self.noise**2
