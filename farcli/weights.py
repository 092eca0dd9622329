"""Between an `nn.Module` and the flat vectors that a trajectory stores.

Floating-point tensors go into one vector of float32 or float64, integer and bool tensors into one of
int64; both ways are exact, or refused. What is recorded is what `state_dict` holds: non-persistent
buffers are rebuilt by the model's constructor, as they are when a checkpoint is loaded.

Lockstep models train R runs at once; every tensor then has a leading axis over runs, vectors are
[R, D], and the layout describes a single run.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from farcli.errors import UsageError
from farcli.layout import Layout, Role, Slot, layout_of

_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32}


def layout_of_module(model: nn.Module, lead: int = 0) -> Layout:
    """The layout of a network's `state_dict`: parameters, float buffers, integer buffers.

    Tensors that share their memory (tied weights) are stored once, under the first name.

    Args:
        model: the network.
        lead: number of leading axes that are left out of the shapes (1 for lockstep models).

    Raises:
        UsageError: the network holds something that a trajectory cannot store exactly; names it.
    """
    items: list[tuple[str, tuple[int, ...], str, Role]] = []
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in _state(model).items():
        memory = _memory(tensor)
        if memory in seen:
            tied[name] = seen[memory]
            continue
        seen[memory] = name
        role = _role(name, tensor)
        items.append((name, tuple(tensor.shape[lead:]), str(tensor.dtype).removeprefix("torch."), role))
    return layout_of(items, tied)


def flatten(
    model: nn.Module,
    layout: Layout,
    floats: Tensor | np.ndarray | None = None,
    integers: Tensor | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Copy a network's weights and buffers into flat vectors, bit for bit.

    Args:
        model: the network.
        layout: its layout.
        floats: float32 or float64 buffer of shape [D], in lockstep [R, D], to write into; a new
            one by default, of the smallest of the two that holds every tensor exactly.
        integers: the same for the integer buffers, int64.

    Returns:
        Both vectors; tensors that share memory with the buffers given.

    Raises:
        UsageError: the network does not have this layout, or `floats` cannot hold it exactly.
    """
    state = _state(model)
    lead = _check(state, layout)
    if floats is None:
        floats = torch.empty(*lead, layout.size, dtype=torch.float64 if _wide(layout) else torch.float32)
    if integers is None:
        integers = torch.empty(*lead, layout.integers, dtype=torch.int64)
    vectors = (torch.as_tensor(floats), torch.as_tensor(integers))
    for vector, width in zip(vectors, (layout.size, layout.integers), strict=True):
        if tuple(vector.shape) != (*lead, width):
            raise UsageError(f"flatten: buffer has shape {tuple(vector.shape)}, expected {(*lead, width)}.")
    _check_exact(layout, vectors[0].dtype)
    if vectors[1].dtype != torch.int64:
        raise UsageError(f"flatten: buffer for integers has dtype {vectors[1].dtype}, expected int64.")
    with torch.no_grad():
        for slot, place in _places(layout, *vectors):
            place.copy_(state[slot.name].reshape(place.shape))
    return vectors


def unflatten(vector: Tensor | np.ndarray, integers: Tensor | np.ndarray | None, layout: Layout) -> dict[str, Tensor]:
    """The `state_dict` that flat vectors stand for, for `load_state_dict(strict=True)`.

    Args:
        vector: weights and float buffers, shape [D] or, in lockstep, [R, D].
        integers: integer buffers, shape [I] or [R, I]; None where the layout has none.
        layout: layout of the vectors.

    Returns:
        Fresh tensors in their own dtypes and shapes; tied names share one tensor. A value that
        the tensor's own dtype cannot hold (a forecast for bfloat16 weights) is rounded to nearest.

    Raises:
        UsageError: the vectors do not have the length that the layout says.
    """
    floats, whole = _vectors(vector, integers, layout)
    state = {
        slot.name: place.to(getattr(torch, slot.dtype), copy=True).reshape((*place.shape[:-1], *slot.shape))
        for slot, place in _places(layout, floats, whole)
    }
    state.update({alias: state[name] for alias, name in layout.tied})
    return state


def load(
    model: nn.Module, layout: Layout, vector: Tensor | np.ndarray, integers: Tensor | np.ndarray | None = None
) -> None:
    """Write flat vectors into a network in place; its tensors stay the same objects.

    Args:
        model: the network; its optimiser stays valid.
        layout: its layout.
        vector: weights and float buffers, shape [D] or, in lockstep, [R, D].
        integers: integer buffers; None where the layout has none.

    Raises:
        UsageError: the network does not have this layout, or the vectors not its length.
    """
    state = _state(model)
    lead = _check(state, layout)
    floats, whole = _vectors(vector, integers, layout)
    if tuple(floats.shape[:-1]) != lead:
        raise UsageError(f"load: vector has shape {tuple(floats.shape)}, expected {(*lead, layout.size)}.")
    with torch.no_grad():
        for slot, place in _places(layout, floats, whole):
            state[slot.name].copy_(place.reshape((*lead, *slot.shape)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"tensor {name!r}: is extra state ({type(value).__name__}), which cannot be recorded.")
        if nn.parameter.is_lazy(value):
            raise UsageError(f"tensor {name!r}: is lazy and not initialised yet.", "Run one batch through the model.")
    return state


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are the same elements in the same order."""
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _role(name: str, tensor: Tensor) -> Role:
    if tensor.layout == torch.strided and not tensor.is_quantized:
        if tensor.dtype.is_floating_point:
            return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        if tensor.dtype in _INTEGERS:
            return "integer"
    raise UsageError(
        f"tensor {name!r}: is {tensor.layout} of {tensor.dtype}, which cannot be recorded exactly; "
        "expected a dense tensor of floats, integers of at most 63 bits, or bools."
    )


def _check(state: dict[str, Tensor], layout: Layout) -> tuple[int, ...]:
    """The leading axes of a network with this layout: () or (runs,)."""
    names = {slot.name for slot in layout.slots} | {alias for alias, _ in layout.tied}
    for kind, missing in (("lacks", names - state.keys()), ("also has", state.keys() - names)):
        if missing:
            raise UsageError(f"the network {kind} {min(missing)!r}: it does not have this layout.")
    lead: tuple[int, ...] | None = None
    for slot in layout.slots:
        tensor = state[slot.name]
        axes = tensor.ndim - len(slot.shape)
        if axes < 0 or tuple(tensor.shape[axes:]) != slot.shape or lead not in (None, tuple(tensor.shape[:axes])):
            raise UsageError(
                f"tensor {slot.name!r}: shape {tuple(tensor.shape)}, expected {(*(lead or ()), *slot.shape)}."
            )
        if str(tensor.dtype) != f"torch.{slot.dtype}":
            raise UsageError(f"tensor {slot.name!r}: dtype {tensor.dtype}, expected {slot.dtype}.")
        lead = tuple(tensor.shape[:axes])
    return lead or ()


def _wide(layout: Layout) -> bool:
    return any(slot.dtype == "float64" for slot in layout.floats)


def _check_exact(layout: Layout, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(f"flatten: buffer for weights has dtype {dtype}, expected float32 or float64.")
    for slot in layout.floats:
        if slot.dtype == "float64" and dtype == torch.float32:
            raise UsageError(
                f"tensor {slot.name!r}: float64 cannot be held exactly in float32.", "Record it as float64."
            )


def _vectors(
    vector: Tensor | np.ndarray, integers: Tensor | np.ndarray | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    floats = torch.as_tensor(vector)
    if integers is None:
        integers = torch.empty(*floats.shape[:-1], 0, dtype=torch.int64)
    whole = torch.as_tensor(integers)
    for what, found, width in (("weights", floats, layout.size), ("integers", whole, layout.integers)):
        if found.ndim == 0 or found.shape[-1] != width or found.shape[:-1] != floats.shape[:-1]:
            expected = (*floats.shape[:-1], width)
            raise UsageError(f"vector of {what}: shape {tuple(found.shape)}, expected {expected}.")
    return floats, whole


def _places(layout: Layout, floats: Tensor, integers: Tensor) -> Iterator[tuple[Slot, Tensor]]:
    """Each slot with its part of the vectors, a view of shape [*lead, slot.size]."""
    for slot in layout.slots:
        vector = integers if slot.role == "integer" else floats
        yield slot, vector[..., slot.offset : slot.stop]
