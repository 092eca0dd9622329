"""Passes over training data."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from farcli.errors import NonFiniteError
from farcli.forecasters.base import Prefix, Problem

Batch = tuple[Prefix, Tensor]
"""Prefixes and the true weights at the problem's `steps_H`: a block, or a mini-batch."""
Passes = Callable[[], Iterable[Batch]]
"""Starts one pass over the training data."""


def not_finite(problem: Problem, passes: Passes) -> NonFiniteError:
    """Looks for the first NaN or Inf: another pass, but only for data that are wrong."""
    for prefix, truth_BHD in passes():
        width = problem.coordinates - prefix.start
        for weights_BTD, steps in ((prefix.weights_BCD, prefix.steps_C), (truth_BHD, problem.steps_H)):
            wrong = (~torch.isfinite(weights_BTD[..., :width])).nonzero()
            if len(wrong):
                run, time, column = (int(index) for index in wrong[0])
                slot = next(s.slot for s in prefix.segments if s.start <= column < s.stop)
                return NonFiniteError(
                    f"training run {prefix.runs_B[run]} (counted from 0): tensor "
                    f"{problem.layout.floats[slot].name!r} holds {float(weights_BTD[run, time, column])} "
                    f"at step {steps[time]}, expected finite weights.",
                    "Leave the run out with --train-runs, or end the steps before it diverged.",
                )
    return NonFiniteError("training data: weights are too large; their squares overflow float64.")
