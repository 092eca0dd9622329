"""Where workloads take their randomness from: streams of their own, never torch's or numpy's global state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

Purpose = Literal["data", "held-out", "init", "order"]
_PURPOSES: tuple[Purpose, ...] = ("data", "held-out", "init", "order")


def stream(seed: int, purpose: Purpose) -> np.random.Generator:
    """The random numbers of one run for one purpose; streams do not overlap."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose),)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, torch's own initialisers on the CPU draw from `seed`; afterwards the global state is as before."""
    # torch.manual_seed would also reseed the GPUs, whose state fork_rng(devices=[]) does not bring back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(stream(seed, "init").integers(2**63)))
        yield
