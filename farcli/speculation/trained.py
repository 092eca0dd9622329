"""The weights an optimiser trains as one vector, their running average, and training's whole state, kept and put back.

Shape suffixes: D trained coordinates, E floating-point coordinates of the buffers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from farcli.errors import UsageError
from farcli.layout import Layout, layout_of
from farcli.speculation.base import Moments, no_moments

# Public in all but name: torch's own optimisers and averages are built on them.
foreach_copy: Callable[..., None] = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
foreach_add: Callable[..., None] = torch._foreach_add_  # pyright: ignore[reportPrivateImportUsage]
foreach_lerp: Callable[..., None] = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]


class Trained:
    """The tensors that optimisers train, read and written as one vector.

    Args:
        model: the network.
        optimizers: those that train it.

    Attributes:
        tensors: in the order of the model; tied weights once.
        layout: of the vector; float32, or float64 where a tensor is.
        tables: names of embeddings.

    Raises:
        UsageError: nothing is trained, a tensor is not dense, or is spread over processes.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        wanted = {id(tensor) for each in optimizers for group in each.param_groups for tensor in group["params"]}
        named = {id(tensor): (name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad}
        chosen = [pair for key, pair in named.items() if key in wanted]
        if not chosen:
            raise UsageError("leap: the optimizer trains no parameter of the model.")
        for name, tensor in chosen:
            if hasattr(tensor, "full_tensor"):
                raise UsageError(
                    f"leap: {name!r} is spread over processes (FSDP), which leaping cannot do yet.",
                    "Train with DDP, or record instead.",
                )
            if not tensor.dtype.is_floating_point or tensor.layout != torch.strided:
                raise UsageError(f"leap: {name!r} is {tensor.layout} of {tensor.dtype}, expected dense floats.")
        self.tensors: list[Tensor] = [tensor for _, tensor in chosen]
        self.layout: Layout = layout_of(
            [(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), "parameter") for name, t in chosen], {}
        )
        rows = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)}
        self.tables = frozenset(name for name, tensor in chosen if id(tensor) in rows)
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in self.tensors) else torch.float32
        self.device = self.tensors[0].device
        self._shapes = [tuple(tensor.shape) for tensor in self.tensors]

    def empty(self) -> Tensor:
        """A vector [D] to write into."""
        return torch.empty(self.layout.size, dtype=self.dtype, device=self.device)

    def views(self, vector_D: Tensor) -> list[Tensor]:
        """Each tensor's part of a vector, in its shape."""
        parts = vector_D.split([tensor.numel() for tensor in self.tensors])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    @torch.no_grad()
    def read(self, out_D: Tensor | None = None) -> Tensor:
        """A copy of the weights, [D]."""
        self._require_shapes()
        vector_D = self.empty() if out_D is None else out_D
        foreach_copy(self.views(vector_D), self.tensors)
        return vector_D

    @torch.no_grad()
    def write(self, vector_D: Tensor) -> None:
        """Set the weights; narrower tensors are rounded to nearest."""
        foreach_copy(self.tensors, self.views(vector_D))

    @torch.no_grad()
    def add(self, move_D: Tensor) -> None:
        """Move the weights."""
        foreach_add(self.tensors, self.views(move_D))

    @torch.no_grad()
    def slope(self, direction_D: Tensor) -> float:
        """Inner product of the gradients there are with a direction; NaN where a tensor has none."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tensor, part in zip(self.tensors, self.views(direction_D), strict=True):
            if tensor.grad is None:
                return float("nan")
            total += (tensor.grad * part).sum(dtype=torch.float64)
        return float(total)

    def gradients(self) -> Tensor:
        """The gradients there are, [D]; zero where a tensor has none."""
        vector_D = torch.zeros_like(self.empty())
        for view, tensor in zip(self.views(vector_D), self.tensors, strict=True):
            if tensor.grad is not None:
                view.copy_(tensor.grad)
        return vector_D

    @property
    def rate(self) -> float:
        """The learning rate of the first group."""
        return float(self.optimizers[0].param_groups[0]["lr"])

    def moments(self) -> Moments:
        """Adam's moments; 0 for tensors that have had no gradient yet.

        Raises:
            UsageError: the optimiser has none.
        """
        first_D, second_D = self.empty(), self.empty()
        groups = {
            id(t): (each, group) for each in self.optimizers for group in each.param_groups for t in group["params"]
        }
        updates, betas, epsilon = 0, (0.9, 0.999), 1e-8
        for tensor, first, second in zip(self.tensors, self.views(first_D), self.views(second_D), strict=True):
            optimizer, group = groups[id(tensor)]
            state = optimizer.state.get(tensor)
            if not state:
                first.zero_()
                second.zero_()
                continue
            if "exp_avg" not in state or "exp_avg_sq" not in state:
                raise no_moments(optimizer)
            first.copy_(state["exp_avg"])
            second.copy_(state["exp_avg_sq"])
            updates, betas, epsilon = int(state["step"]), tuple(group["betas"]), float(group["eps"])
        if not updates:
            raise no_moments(self.optimizers[0])
        return Moments(first_D=first_D, second_D=second_D, updates=updates, betas=betas, epsilon=epsilon)

    def _require_shapes(self) -> None:
        for tensor, shape, slot in zip(self.tensors, self._shapes, self.layout.floats, strict=True):
            if tuple(tensor.shape) != shape:
                raise UsageError(
                    f"leap: {slot.name!r} has changed its shape from {list(shape)} to {list(tensor.shape)} in training."
                )


class Average:
    """A running average of weights and floating-point buffers, updated every few steps.

    avg ← avg + (w − avg) / min(memory/stride, 1 + n/9) after n updates: an exponential average whose memory grows
    with training, so that the first weights are soon forgotten.

    Source: Polyak and Juditsky (1992); the growth is that of TensorFlow's ExponentialMovingAverage, whose decay is
    min(decay, (1 + n)/(10 + n)).

    Args:
        trained: the weights.
        model: whose buffers are averaged.
        memory: in steps.
        stride: steps between updates.
    """

    def __init__(self, trained: Trained, model: nn.Module, memory: int, stride: int) -> None:
        self._memory = max(1.0, memory / stride)
        self.updates = 0
        self._trained = trained
        self._buffers = [each for each in model.buffers() if each.dtype.is_floating_point]
        self._integers = [each for each in model.buffers() if not each.dtype.is_floating_point]
        self.weights_D = trained.read()
        self._views = trained.views(self.weights_D)
        self._plain = all(tensor.dtype == trained.dtype for tensor in trained.tensors)
        self._averaged = [each.detach().clone() for each in self._buffers]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        self.updates += 1
        share = 1 / min(self._memory, 1 + self.updates / 9)
        tensors = self._trained.tensors
        foreach_lerp(self._views, tensors if self._plain else [t.to(self._trained.dtype) for t in tensors], share)
        if self._buffers:
            foreach_lerp(self._averaged, self._buffers, share)

    def add(self, move_D: Tensor) -> None:
        """Move the average."""
        self.weights_D.add_(move_D)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within it, the network has the average's weights and buffers; afterwards its own again, bit for bit."""
        with torch.no_grad():
            own_D = self._trained.read()
            exact = [t.detach().clone() for t in self._trained.tensors] if not self._plain else None
            buffers = [each.detach().clone() for each in (*self._buffers, *self._integers)]
            self._trained.write(self.weights_D)
            for buffer, averaged in zip(self._buffers, self._averaged, strict=True):
                buffer.copy_(averaged)
        try:
            yield
        finally:
            with torch.no_grad():
                if exact is None:
                    self._trained.write(own_D)
                else:
                    foreach_copy(self._trained.tensors, exact)
                for buffer, before in zip((*self._buffers, *self._integers), buffers, strict=True):
                    buffer.copy_(before)

    def state(self) -> dict[str, Any]:
        """All there is, to be kept."""
        return {
            "updates": self.updates,
            "weights": self.weights_D.clone(),
            "buffers": [each.clone() for each in self._averaged],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be what `state` returned."""
        self.updates = state["updates"]
        self.weights_D.copy_(state["weights"])
        for averaged, kept in zip(self._averaged, state["buffers"], strict=True):
            averaged.copy_(kept)


class Saved:
    """Training's state at one moment: every tensor of the model and all that the optimisers know of theirs.

    The learning rates are not part of it: a schedule goes on whatever is rolled back.

    Attributes:
        values: of the model's parameters and buffers, in its order.
        states: of each optimiser, what it knows of each of its tensors, in its order; None where nothing.
    """

    def __init__(self, values: list[Tensor], states: list[list[dict[str, Any] | None]]) -> None:
        self.values = values
        self.states = states

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer]) -> "Saved":
        """A copy of the state now."""
        return cls(
            [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())],
            [
                [_copied(each.state[tensor]) if tensor in each.state else None for tensor in _tensors_of(each)]
                for each in optimizers
            ],
        )

    def changed(self, model: nn.Module) -> str | None:
        """The first parameter or buffer that is no longer what it was; None where all are."""
        present = (*model.named_parameters(), *model.named_buffers())
        if len(present) != len(self.values):
            return "the number of tensors"
        for (name, tensor), value in zip(present, self.values, strict=True):
            if not torch.equal(tensor, value) and not torch.equal(tensor.nan_to_num(), value.nan_to_num()):
                return name
        return None

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Put everything back, bit for bit; tensors stay the same objects.

        Raises:
            UsageError: the model has other shapes by now; nothing was put back.
        """
        present = [tensor.shape for tensor in (*model.parameters(), *model.buffers())]
        if present != [value.shape for value in self.values]:
            raise UsageError("leap: the model has changed its shape in training, and cannot go back.")
        for tensor, value in zip((*model.parameters(), *model.buffers()), self.values, strict=True):
            tensor.copy_(value)
        for optimizer, states in zip(optimizers, self.states, strict=True):
            for tensor, state in zip(_tensors_of(optimizer), states, strict=True):
                if state is None:
                    optimizer.state.pop(tensor, None)
                else:
                    _put_back(optimizer.state[tensor], state)


def _tensors_of(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value) for key, value in state.items()
    }


def _put_back(state: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in state if key not in before]:
        del state[key]
    for key, value in before.items():
        present = state.get(key)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and present.shape == value.shape:
            present.copy_(value)
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else deepcopy(value)
