"""Every way a forecaster is fitted: solved from sums, in as many passes over the data as it takes."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from farcli.errors import NonFiniteError
from farcli.forecasters.base import Prefix, Problem, SolvedForecaster

SolvedT = TypeVar("SolvedT", bound=SolvedForecaster)

Passes = Callable[[], Iterable[tuple[Prefix, Tensor]]]
"""Starts one pass over the training data: each block's prefix and the true weights at the problem's `steps_H`."""


def solve(
    forecaster: SolvedT,
    problem: Problem,
    passes: Passes,
    *,
    report: Callable[[int, int], None] | None = None,
) -> SolvedT:
    """Fit a forecaster from sums, pass after pass, until it is settled.

    Args:
        forecaster: an unfitted forecaster.
        problem: what it is fitted for.
        passes: called once per pass; a block's tensors need to be valid until the next one is asked for.
        report: called after each block with the pass (1, 2, …) and the weights taken in during it so far.

    Returns:
        The fitted forecaster.

    Raises:
        NonFiniteError: the data hold NaN or Inf; names the run and tensor.
        ResourceError: the sums need more than `problem.memory`.
        UsageError: the problem does not fit the options.
    """
    count = 0
    while count == 0 or forecaster.unsettled:
        count += 1
        sums = forecaster.sums(problem)
        taken = 0
        for prefix, truth_BHD in passes():
            sums.add(prefix, truth_BHD)
            taken += prefix.weights_BCD.numel() + truth_BHD.numel()
            if report is not None:
                report(count, taken)
        if not sums.finite:
            raise _not_finite(problem, passes)
        forecaster = forecaster.solved(problem, sums)
    return forecaster


def _not_finite(problem: Problem, passes: Passes) -> NonFiniteError:
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
