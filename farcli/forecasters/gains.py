"""How much forecasts gain on runs left out, how sure that is, and which of several to take.

Shape suffixes: R runs, B batches that each is judged on, Q candidates, X any others.
"""

import math

import torch
from torch import Tensor

_SAFE = 0.95
"""A mean gain of one standard error is believed where this share of the runs is no worse off."""
_SURE = 2.0
"""A mean gain of so many standard errors is believed though more of them are."""


def mean_and_error(gain_RBX: Tensor, pool: float = math.inf) -> tuple[Tensor, Tensor]:
    """The mean gain and its standard error, [X] each.

    Runs differ, and so do batches. Where all runs' batches are drawn from the same few, as from 300 images held back,
    more runs do not make up for how few these are: what gains vary from batch to batch within a run, over the number of
    batches in the pool, is taken for common to all runs. It is never more than that, so the error is rather too large.

    Args:
        gain_RBX: of each run on each of its batches.
        pool: how many disjoint batches there are in all; inf where every run has its own.
    """
    each_RX = gain_RBX.mean(1)
    square_X = each_RX.var(0) / len(each_RX)
    if math.isfinite(pool) and gain_RBX.shape[1] > 1:
        square_X = square_X + gain_RBX.var(1).mean(0) / pool
    return each_RX.mean(0), square_X.sqrt()


def believed(gain_RBX: Tensor, pool: float = math.inf) -> Tensor:
    """Whether there is a gain: by a standard error where 95 % of the runs are no worse, else by two; [X]."""
    mean_X, error_X = mean_and_error(gain_RBX, pool)
    return (mean_X > error_X) & (_harmless(gain_RBX) | (mean_X > _SURE * error_X))


def choose(gain_RBQ: Tensor, pool: float = math.inf) -> int:
    """The largest mean gain of those believed, or, within one standard error of it, of those that harm few runs."""
    mean_Q, sound_Q = torch.nan_to_num(gain_RBQ.mean((0, 1)), nan=-torch.inf), believed(gain_RBQ, pool)
    open_Q = sound_Q if bool(sound_Q.any()) else torch.ones_like(sound_Q)
    best = int(torch.where(open_Q, mean_Q, -torch.inf).argmax())
    short_Q, error_Q = mean_and_error(gain_RBQ[..., best, None] - gain_RBQ, pool)
    near_Q = open_Q & _harmless(gain_RBQ) & (short_Q <= error_Q)
    return int(torch.where(near_Q, mean_Q, -torch.inf).argmax()) if bool(near_Q.any()) else best


def _harmless(gain_RBX: Tensor) -> Tensor:
    return (gain_RBX.mean(1) >= 0).double().mean(0) >= _SAFE
