"""Losses that leaps are verified by, and their mean over the processes of a distributed training.

Shape suffixes: N batches of a draw of verification data.
"""

import random
from collections.abc import Callable, Sequence
from math import isnan
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from torch import nn

from farcli.errors import FarcliError, NonFiniteError, UsageError
from farcli.speculation.trained import Saved
from farcli.workloads.base import evaluating


class Validation(Protocol):
    """Verification data: fresh, paired, and disjoint from training data and from what is reported.

    Attributes:
        fingerprint: features [probes, features] that the network made of the last call's data (`regimes.Probe`); None
            where nobody listens in.
    """

    fingerprint: np.ndarray | None = None

    @property
    def cost(self) -> float:
        """Of one call of `losses`, in training steps."""
        ...

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        """Losses of the model as it is on the batches of a draw: the same for the same draw, in evaluation mode."""
        ...


class Function(Validation):
    """A function of the user's: one loss, always of the same data, timed against the training's steps.

    It must leave the network as it found it: one that changes weights or buffers is an error, and they are put back.
    """

    def __init__(self, function: Callable[[nn.Module], float], step_seconds: Callable[[], float]) -> None:
        self._function = function
        self._step_seconds = step_seconds
        self._took = 0.0

    @property
    def cost(self) -> float:
        """Seconds of the last call over seconds of a step; nothing is known before the first, which is on credit."""
        seconds = self._step_seconds()
        return self._took / seconds if seconds > 0 else 0.0

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        """The function's loss, with the model in evaluation mode."""
        began = perf_counter()
        drawn = random.getstate(), np.random.get_state()
        own = Saved.of(model, ())
        try:
            with evaluating(model):
                loss = float(self._function(model))
        except FarcliError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"leap: the validation function raised {type(error).__name__}: {error}") from error
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
            changed = own.changed(model)
            if changed is not None:
                own.restore(model, ())
            self._took = perf_counter() - began
        if changed is not None:
            raise UsageError(
                f"leap: the validation function changed {changed!r} of the network.",
                "It has to leave weights and buffers as they are; let it work on a copy.",
            )
        if isnan(loss):
            raise NonFiniteError("leap: the validation function returned NaN, expected a loss.")
        return [loss]


def mean_over_processes(losses_N: Sequence[float], device: torch.device) -> list[float]:
    """The same losses in every process of a distributed training, so that all judge alike."""
    if processes() == 1:
        return list(losses_N)
    total = torch.tensor(losses_N, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return (total / processes()).tolist()


def processes() -> int:
    """Of this training."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
