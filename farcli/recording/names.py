"""Which tensors a training moves, and what they are called: without touching the script that trains them.

Names are those of the network's own `state_dict`, without what wrappers put before them. The walk reads
modules' dictionaries of parameters and buffers and runs none of their hooks: a `state_dict()` of somebody
else's class may gather shards, move data or have side effects.
"""

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from farcli.errors import FarcliError, UsageError

_WRAPPED = {
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "OptimizedModule": ("_orig_mod",),
    "CheckpointWrapper": ("_checkpoint_wrapped_module",),
    "ActivationWrapper": ("_checkpoint_wrapped_module",),
    "OffloadWrapper": ("_checkpoint_wrapped_module",),
    "_FabricModule": ("_forward_module", "_original_module"),
    "DeepSpeedEngine": ("module",),
}
"""Classes that only wrap a network, and the attribute that holds it."""
_UNSUPPORTED = {"FullyShardedDataParallel": "is FSDP1, whose parameters are flattened; use fully_shard (FSDP2)"}


@dataclass(slots=True)
class Place:
    """Where a named tensor is found at any time.

    Attributes:
        name: as the network's `state_dict` calls it.
        kind: "parameter" or "buffer".
        holder: the module's own dictionary, whose entry may be replaced during training.
        key: its key there.
        fixed: the tensor itself, where the dictionary may show something else for a while (FSDP2 unshards).
    """

    name: str
    kind: Literal["parameter", "buffer"]
    holder: Mapping[str, Tensor | None]
    key: str
    fixed: Tensor | None = None

    def tensor(self) -> Tensor:
        """The tensor as it is now.

        Raises:
            FarcliError: it has been taken out of its module.
        """
        if self.fixed is not None:
            return self.fixed
        found = self.holder.get(self.key)
        if found is None:
            raise FarcliError(f"tensor {self.name!r} is in the network no more.")
        return found


def places_of(model: nn.Module, prefix: str = "") -> list[Place]:
    """Every parameter and persistent buffer of a network, in the order of its `state_dict`.

    Raises:
        UsageError: the network is wrapped in something whose parameters cannot be read.
    """
    found: dict[str, Place] = {}
    for place in _walk(model, prefix):
        found.setdefault(place.name, place)  # two wrappers may show the same network twice
    return list(found.values())


def _walk(module: nn.Module, prefix: str) -> Iterator[Place]:
    classes = [kind.__name__ for kind in type(module).__mro__]
    for name in classes:
        if name in _UNSUPPORTED:
            raise UsageError(f"the network {_UNSUPPORTED[name]}.")
    for key, value in module._parameters.items():
        if value is not None:
            yield Place(prefix + key, "parameter", module._parameters, key, value if is_sharded(value) else None)
    for key, value in module._buffers.items():
        if value is not None and key not in module._non_persistent_buffers_set:
            yield Place(prefix + key, "buffer", module._buffers, key, value if is_sharded(value) else None)
    wrapped = next((_WRAPPED[name] for name in classes if name in _WRAPPED), ())
    for key, child in module._modules.items():
        if child is not None:
            yield from _walk(child, prefix if key in wrapped else f"{prefix}{key}.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network within its wrappers."""
    for kind in type(model).__mro__:
        for key in _WRAPPED.get(kind.__name__, ()):
            inner = model._modules.get(key)
            if inner is not None:
                return unwrapped(inner)
    return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, spread over processes."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def tensors_of(optimizers: Iterable[Any]) -> list[Tensor]:
    """All tensors that optimisers train."""
    return [tensor for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]]


def live_optimizers() -> list[Any]:
    """Every optimiser there is; wrappers of one, which hold the same tensors, too."""
    from torch.optim import Optimizer

    return [each for each in _live(Optimizer) if getattr(each, "param_groups", None)]


def _live(base: type) -> list[Any]:
    # type(o), not isinstance: the latter asks proxies for __class__, which wakes lazy imports.
    return [each for each in gc.get_objects() if issubclass(type(each), base)]


def find_roots(optimizers: Sequence[Any]) -> list[nn.Module]:
    """The outermost networks that own the tensors of these optimisers, the largest share first.

    Every tensor is owned by at most one of them: of two networks that share tensors (a distiller that holds
    the student, beside the student's own wrapper) the one with more of them is taken.
    """
    wanted = {id(tensor) for tensor in tensors_of(optimizers)}
    modules = _live(nn.Module)
    owned: dict[int, frozenset[int]] = {}

    def owns(module: nn.Module) -> frozenset[int]:
        known = owned.get(id(module))
        if known is None:
            owned[id(module)] = frozenset()  # a cycle would recurse for ever
            parameters = getattr(module, "_parameters", None) or {}  # half-built modules have none
            children = getattr(module, "_modules", None) or {}
            known = frozenset(id(p) for p in parameters.values() if id(p) in wanted).union(
                *(owns(child) for child in children.values() if child is not None)
            )
            owned[id(module)] = known
        return known

    owners = [module for module in modules if owns(module)]
    inner = {id(child) for module in owners for child in module._modules.values() if child is not None}
    roots = sorted((module for module in owners if id(module) not in inner), key=lambda module: -len(owns(module)))
    chosen: list[nn.Module] = []
    taken: set[int] = set()
    for root in roots:
        if not owns(root) <= taken:
            chosen.append(root)
            taken |= owns(root)
    order = {id(tensor): at for at, tensor in enumerate(tensors_of(optimizers))}
    return sorted(chosen, key=lambda root: min(order[each] for each in owns(root)))


def name_tensors(optimizers: Sequence[Any], roots: Sequence[nn.Module], frame: FrameType | None) -> list[Place]:
    """Name everything that a training moves.

    One network's tensors are called as in its own `state_dict`. Of several, each name begins with the name of
    the variable that holds the network (`netG.0.weight`), or with `model0.`, `model1.`, … Tensors that belong
    to no network have the optimiser's own `param_names`, or are called `group0.0`.

    Args:
        optimizers: those that step.
        roots: the networks that own their tensors.
        frame: where to look for variables.
    """
    places: list[Place] = []
    prefixes = [""] if len(roots) == 1 else _variables(roots, frame)
    for root, prefix in zip(roots, prefixes, strict=True):
        places += places_of(root, prefix)
    known = {id(place.tensor()) for place in places}
    names = {place.name for place in places}
    for number, optimizer in enumerate(optimizers):
        for i, group in enumerate(optimizer.param_groups):
            for j, tensor in enumerate(group["params"]):
                if id(tensor) in known:
                    continue
                known.add(id(tensor))
                given = group.get("param_names")
                name = given[j] if given else f"group{i}.{j}"
                if name in names:
                    name = f"optimizer{number}.{name}"
                names.add(name)
                places.append(Place(name, "parameter", {name: tensor}, name, tensor if is_sharded(tensor) else None))
    return places


def _variables(roots: Sequence[nn.Module], frame: FrameType | None) -> list[str]:
    """A prefix for each network: the variable that holds it, seen from the training loop outwards."""
    found: dict[int, str] = {}
    wanted = {id(each): id(root) for root in roots for each in (root, unwrapped(root))}
    while frame is not None:
        if not frame.f_globals.get("__name__", "").startswith("torch."):
            for scope in (frame.f_locals, frame.f_globals):
                for name, value in list(scope.items()):
                    if id(value) in wanted and name.isidentifier() and not name.startswith("_"):
                        found.setdefault(wanted[id(value)], name)
        frame = frame.f_back
    prefixes = [found.get(id(root), f"model{number}") for number, root in enumerate(roots)]
    if len(set(prefixes)) != len(prefixes):
        prefixes = [f"model{number}" for number in range(len(roots))]
    return [f"{prefix}." for prefix in prefixes]


def calling_frame() -> FrameType | None:
    """The frame outside of this package and of torch's optimisers, from which variables are looked up."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("farcli."):
        frame = frame.f_back
    return frame


def step_base(optimizers: Iterable[Any]) -> int:
    """Steps that optimisers had taken when their state was loaded: Adam and its kin count them; else 0."""
    base = 0
    for optimizer in optimizers:
        for state in getattr(optimizer, "state", {}).values():
            step = state.get("step") if isinstance(state, Mapping) else None
            if isinstance(step, Tensor) and step.numel() == 1 and not is_sharded(step):
                step = step.detach().item()
            if isinstance(step, int | float) and step == step:  # noqa: PLR0124 - NaN
                base = max(base, int(step))
    return base


def skipped(optimizer: Any) -> bool:
    """Whether the step just taken was none, because fused AMP found infinite gradients.

    Only looked up where that costs nothing; on an accelerator it would wait for the device at every step.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and found.device.type == "cpu" and bool(found.item())
