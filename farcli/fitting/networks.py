"""Networks while they are fitted: one by itself, or an ensemble in one go.

Shape suffixes: M networks, B examples of a mini-batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from farcli.config import format_size
from farcli.errors import ResourceError
from farcli.fitting.passes import Batch
from farcli.forecasters.base import Coupling, Problem, SolvedForecaster, TrainedForecaster, require_fitted

State = dict[str, Tensor]

_STATES = 12
"""Copies of a network that a fit takes: itself, its gradient, Adam's two moments, the best state, the latest, the one
before, and five for what backpropagation adds up and the allocator keeps, as measured (`make bench-fit`)."""


class InTraining(ABC):
    """Networks that are updated at the same time, each with examples of its own.

    Attributes:
        forecasters: M forecasters, each with one of the networks, at what it has learned so far.
        parameters: what an optimiser updates.
    """

    forecasters: list[TrainedForecaster]
    parameters: list[Tensor]

    @abstractmethod
    def losses(self, batches: Sequence[Batch], random: Sequence[Tensor | None], steps_H: Sequence[int]) -> Tensor:
        """Loss of each network on its own mini-batch: [M]; gradients of the sum flow to the parameters.

        Args:
            batches: M mini-batches of equal shapes.
            random: random numbers of each, [B], for a loss that takes some.
            steps_H: the problem's target steps.
        """

    def train(self) -> None:
        """Networks behave as in training."""
        for network in self.networks:
            network.train()

    def settle(self) -> None:
        """Networks are to forecast with from here on."""
        for network in self.networks:
            network.requires_grad_(False).eval()

    @property
    def networks(self) -> list[nn.Module]:
        """M networks."""
        return [require_fitted(own.name, own.trained).network for own in self.forecasters]

    @property
    def finite(self) -> list[bool]:
        """Whether every parameter of each network is finite."""
        return [all(bool(p.isfinite().all()) for p in network.parameters()) for network in self.networks]

    def states(self) -> list[State]:
        """Copies of each network's parameters and buffers."""
        return [
            {key: value.detach().clone() for key, value in network.state_dict().items()} for network in self.networks
        ]

    def load(self, states: Sequence[State]) -> None:
        """Go on from these."""
        for network, state in zip(self.networks, states, strict=True):
            network.load_state_dict(state)


@final
class Alone(InTraining):
    """One network."""

    def __init__(self, forecaster: TrainedForecaster) -> None:
        self.forecasters = [forecaster]
        self.parameters = [parameter for network in self.networks for parameter in network.parameters()]

    def losses(self, batches: Sequence[Batch], random: Sequence[Tensor | None], steps_H: Sequence[int]) -> Tensor:
        """The network's loss: [1]."""
        [forecaster], [(prefix, truth_BHD)], [random_B] = self.forecasters, batches, random
        return forecaster.loss(prefix, steps_H, truth_BHD, random_B)[None]


@final
class Together(InTraining):
    """An ensemble as one network with a leading axis, by `torch.func.vmap`.

    The networks' own parameters and buffers become views of the stacked ones, so that they follow every update.
    """

    def __init__(self, forecasters: Sequence[TrainedForecaster]) -> None:
        self.forecasters = list(forecasters)
        parameters = _stacked([dict(network.named_parameters()) for network in self.networks])
        self.parameters = [parameter.requires_grad_() for parameter in parameters.values()]
        self._tensors = parameters | _stacked([dict(network.named_buffers()) for network in self.networks])
        self._asked = _Asked(self.forecasters[0])

    def losses(self, batches: Sequence[Batch], random: Sequence[Tensor | None], steps_H: Sequence[int]) -> Tensor:
        """Each network's loss: [M]."""
        prefixes, draws = [prefix for prefix, _ in batches], self.forecasters[0].draws

        def loss(tensors: State, weights_BCK: Tensor, truth_BHK: Tensor, random_B: Tensor) -> Tensor:
            prefix = replace(prefixes[0], weights_BCD=weights_BCK, runs_B=())
            given = (prefix, steps_H, truth_BHK, random_B if draws else None)
            return torch.func.functional_call(self._asked, tensors, given)

        weights_MBCK = torch.stack([prefix.weights_BCD for prefix in prefixes])
        truth_MBHK = torch.stack([truth_BHK for _, truth_BHK in batches])
        random_MB = torch.stack([torch.empty(0) if random_B is None else random_B for random_B in random])
        # Attention has a rule for `vmap` in its plain form alone; "same", as nothing inside draws random numbers.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(loss, randomness="same")(self._tensors, weights_MBCK, truth_MBHK, random_MB)

    def settle(self) -> None:
        """Give each network tensors of its own, to forecast with."""
        for network in self.networks:
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.data = tensor.data.clone()
        super().settle()


@final
class _Asked(nn.Module):
    """A forecaster's loss as what a module says, so that its network's tensors can be others for a call."""

    def __init__(self, forecaster: TrainedForecaster) -> None:
        super().__init__()
        problem = require_fitted(forecaster.name, forecaster.trained).problem
        with torch.device("meta"):
            self.network = forecaster.network(problem)
        self._loss = forecaster.with_networks(problem, [self.network]).loss

    def forward(self, *given: Any) -> Tensor:
        return self._loss(*given)


def _stacked(networks: Sequence[State]) -> State:
    """Tensors of all networks, named as `_Asked` does; the networks' own become views of them."""
    stacked: State = {}
    for name in networks[0]:
        whole = torch.stack([tensors[name].detach() for tensors in networks])
        for tensors, own in zip(networks, whole, strict=True):
            tensors[name].data = own
        stacked[f"network.{name}"] = whole
    return stacked


def fitted_together(forecaster: TrainedForecaster, problem: Problem) -> bool:
    """Whether an ensemble is updated in one go: where that is faster, and takes no more than half of the budget."""
    config = forecaster.config
    if config.ensemble == 1 or not forecaster.vectorised(problem):
        return False
    return _STATES * config.ensemble * _size(forecaster, problem) <= problem.memory // 2


def network_bytes(forecaster: TrainedForecaster, problem: Problem) -> int:
    """Bytes that fitting takes beside the data.

    Raises:
        ResourceError: more than the budget.
    """
    others = forecaster.config.ensemble - 1
    if fitted_together(forecaster, problem):
        others *= _STATES

    def need(size: int) -> int:
        return (_STATES + others) * _size(forecaster, replace(problem, coordinates=size))

    found = need(problem.coordinates)
    if found <= problem.memory:
        return found
    joint = forecaster.coupling is Coupling.JOINT
    low, high = 0, problem.coordinates if joint else 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if need(middle) <= problem.memory else (low, middle)
    size = f"D = {problem.coordinates} parameters take" if joint else "the network takes"
    raise ResourceError(
        f"{forecaster.name}: {size} {format_size(found)} (the network, its gradient, Adam's moments, the best "
        f"state), but the budget is {format_size(problem.memory)}, which allows {f'D = {low}' if joint else 'none'}.",
        "Raise --memory" + (", or choose a coordinate-wise method, which takes any D." if joint else "."),
    )


def _size(forecaster: TrainedForecaster, problem: Problem) -> int:
    """Bytes of one network."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # no memory is touched
        network = forecaster.network(problem)
    return sum(p.numel() * p.element_size() for p in network.parameters())


def require_room(forecaster: SolvedForecaster | TrainedForecaster, problem: Problem) -> None:
    """Refuse what the method itself cannot hold, whatever the data take.

    Raises:
        ResourceError: more than `problem.memory`; names the largest D possible.
        UsageError: the problem does not fit the options.
    """
    if isinstance(forecaster, TrainedForecaster):
        network_bytes(forecaster, problem)
    else:
        forecaster.sums(problem)
