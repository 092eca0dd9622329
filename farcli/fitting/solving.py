"""Forecasters fitted exactly: solved from sums, in as few passes over the data as it takes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from farcli.fitting.passes import Passes, not_finite
from farcli.forecasters.base import Problem, SolvedForecaster, Sums, SumsInParts
from farcli.stream import Block

SolvedT = TypeVar("SolvedT", bound=SolvedForecaster)

Spread = Callable[[Callable[[Iterator[Block]], Sums]], Iterator[Sums]]
"""Has one pass worked through in parts, by several threads: `Stream.spread`."""
_SUMS_AT_ONCE = 10
"""Sums that a pass in parts holds at most: the whole, and those of eight threads and one part ahead."""


def solve(
    forecaster: SolvedT,
    problem: Problem,
    passes: Passes,
    *,
    spread: Spread | None = None,
    report: Callable[[int, int], None] | None = None,
) -> SolvedT:
    """Fit a forecaster from sums, pass after pass, until it is settled.

    Args:
        forecaster: an unfitted forecaster.
        problem: what it is fitted for.
        passes: called once per pass; a block's tensors need to be valid until the next one is asked for.
        spread: taken instead for sums that take targets in parts, where they are small; None where there is none.
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
        if spread is not None and isinstance(sums, SumsInParts) and sums.nbytes <= problem.memory // _SUMS_AT_ONCE:
            for part in spread(partial(_summed, forecaster, problem)):
                sums.merge(part)
        else:
            taken = 0
            for prefix, truth_BHD in passes():
                sums.add(prefix, truth_BHD)
                taken += prefix.weights_BCD.numel() + truth_BHD.numel()
                if report is not None:
                    report(count, taken)
        if not sums.finite:
            raise not_finite(problem, passes)
        forecaster = forecaster.solved(problem, sums)
    return forecaster


def _summed(forecaster: SolvedForecaster, problem: Problem, blocks: Iterator[Block]) -> Sums:
    sums = forecaster.sums(problem)
    assert isinstance(sums, SumsInParts)
    for block in blocks:
        sums.add(block.prefix, block.truth_BHD, block.first)
    return sums
