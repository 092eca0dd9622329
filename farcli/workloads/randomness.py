"""Where workloads take their randomness from: streams of their own, never torch's or numpy's global state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["data", "held-out", "init", "order", "noise", "verify", "split"]
_PURPOSES: tuple[Purpose, ...] = ("data", "held-out", "init", "order", "noise", "verify", "split")
"""Their places are part of every recording: append only."""


def stream(seed: int, purpose: Purpose, *part: int) -> np.random.Generator:
    """The random numbers of one run for one purpose, or for a numbered part of it; streams do not overlap."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PURPOSES.index(purpose), *part)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it, torch's own initialisers on the CPU draw from `seed`; afterwards the global state is as before."""
    # torch.manual_seed would also reseed the GPUs, whose state fork_rng(devices=[]) does not bring back
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(stream(seed, "init").integers(2**63)))
        yield


def noise(seed: int) -> Tensor:
    """The first state of torch's generator on the CPU for what a run draws in training, such as dropout."""
    return torch.Generator().manual_seed(int(stream(seed, "noise").integers(2**63))).get_state()


@contextmanager
def drawing(state: Tensor) -> Iterator[None]:
    """Within it, torch draws on the CPU from `state`, which moves on; afterwards the global state is as before."""
    before = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        state.copy_(torch.get_rng_state())
        torch.set_rng_state(before)


def shuffled(seed: int, count: int, size: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches of indices, each of shape [size], from reshuffling 0 … count − 1 every epoch.

    What is left of an epoch after the last whole batch is dropped.

    Args:
        seed: of the run.
        count: of examples, at least `size`.
        size: of a batch.
        start: batches to leave out; costs one permutation for each epoch among them.
    """
    order, batches = stream(seed, "order"), count // size
    for _ in range(start // batches):
        order.permutation(count)
    first = start % batches
    while True:
        permutation = torch.from_numpy(order.permutation(count))
        for index in range(first, batches):
            yield permutation[index * size : (index + 1) * size]
        first = 0


def fresh(seed: int, draw: int, batches: int, count: int, size: int) -> list[Tensor]:
    """Disjoint batches of indices to verify on, other ones for each draw until all indices have been used.

    Draws of the same number of batches walk through a permutation; when what is left of it is too little for another
    draw, the next permutation begins, and indices come again.

    Args:
        seed: of the run.
        draw: number of the draw, from 0.
        batches: at least 1.
        count: of examples, at least 1.
        size: of a batch.

    Returns:
        Each of shape [size]; fewer than asked for, or one smaller batch, where there are not enough examples.
    """
    size = min(size, count)
    batches = min(batches, count // size)
    epoch, place = divmod(draw, count // (size * batches))
    permutation = torch.from_numpy(stream(seed, "verify", epoch).permutation(count))
    return list(permutation[place * size * batches : (place + 1) * size * batches].split(size))


def divided(seed: int, count: int, first: int, own: bool) -> tuple[Tensor, Tensor]:
    """The numbers 0 … count − 1 in two parts, the first of them `first` long: drawn by the run, or in their order."""
    numbers = torch.from_numpy(stream(seed, "split").permutation(count)) if own else torch.arange(count)
    return numbers[:first], numbers[first:]
