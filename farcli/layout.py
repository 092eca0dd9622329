"""Where each tensor of a network lies in the flat vector that a trajectory stores.

A `Layout` maps names to places in one flat vector of floating-point coordinates: parameters first,
then floating-point buffers (BatchNorm statistics). Integer buffers lie in a second, small vector of
their own, so that nothing is rounded. Pure bookkeeping: standard library only.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from json import dumps
from math import prod
from typing import Any, Literal

from farcli.errors import StoreError

Role = Literal["parameter", "buffer", "integer"]
_ROLES: tuple[Role, ...] = ("parameter", "buffer", "integer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One named tensor and its place.

    Attributes:
        name: the tensor's name in the model's `state_dict`.
        shape: its shape.
        dtype: its own dtype in the model ("float32", "bfloat16", "int64", …).
        offset: index of its first element; into the flat vector of floats for parameters and
            buffers, into the vector of integers for role "integer".
        role: "parameter" (trained), "buffer" (floating-point, not trained) or "integer".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    role: Role

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def stop(self) -> int:
        """Index one past the last element."""
        return self.offset + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The part of a block of coordinates that belongs to one slot: block[start:stop]."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """All slots of a network, in order, and the names that share a slot (tied weights).

    Raises:
        StoreError: slots overlap, leave gaps, are out of order or repeat a name.
    """

    slots: tuple[Slot, ...]
    tied: tuple[tuple[str, str], ...] = ()
    """Pairs (alias, name): `alias` is stored once, under `name`."""

    def __post_init__(self) -> None:
        names: set[str] = set()
        expected = {"float": 0, "integer": 0}
        seen_buffer = False
        for slot in self.slots:
            if slot.role not in _ROLES or any(n < 0 for n in slot.shape):
                raise StoreError(f"layout: tensor {slot.name!r} has role {slot.role!r} and shape {slot.shape}")
            kind = "integer" if slot.role == "integer" else "float"
            if slot.offset != expected[kind]:
                raise StoreError(
                    f"layout: tensor {slot.name!r} starts at {slot.offset}, expected {expected[kind]} "
                    "(tensors overlap or leave a gap)"
                )
            if slot.role == "parameter" and seen_buffer:
                raise StoreError(f"layout: parameter {slot.name!r} lies behind a buffer")
            seen_buffer |= slot.role == "buffer"
            if slot.name in names:
                raise StoreError(f"layout: two tensors are called {slot.name!r}")
            names.add(slot.name)
            expected[kind] = slot.stop
        for alias, name in self.tied:
            if name not in names or alias in names:
                raise StoreError(f"layout: {alias!r} is tied to {name!r}, which is not stored")

    @cached_property
    def size(self) -> int:
        """Number of floating-point coordinates (parameters and buffers): D of the stored vectors."""
        return max((slot.stop for slot in self.slots if slot.role != "integer"), default=0)

    @cached_property
    def parameters(self) -> int:
        """Number of trained coordinates; they are the first ones of the vector."""
        return max((slot.stop for slot in self.slots if slot.role == "parameter"), default=0)

    @cached_property
    def integers(self) -> int:
        """Length of the vector of integer buffers."""
        return max((slot.stop for slot in self.slots if slot.role == "integer"), default=0)

    @cached_property
    def floats(self) -> tuple[Slot, ...]:
        """The slots of the floating-point vector, in order of offset."""
        return tuple(slot for slot in self.slots if slot.role != "integer")

    @cached_property
    def _offsets(self) -> list[int]:
        return [slot.offset for slot in self.floats]

    def slice_of(self, name: str) -> slice:
        """Where the tensor `name` (or what it is tied to) lies in its vector."""
        name = dict(self.tied).get(name, name)
        for slot in self.slots:
            if slot.name == name:
                return slice(slot.offset, slot.stop)
        raise KeyError(name)

    def segments(self, start: int, stop: int) -> tuple[Segment, ...]:
        """The slots covered by coordinates [start, stop), relative to `start`.

        `Segment.slot` indexes `floats`.
        """
        found: list[Segment] = []
        index = max(bisect_right(self._offsets, start) - 1, 0)
        while index < len(self.floats) and self.floats[index].offset < stop:
            slot = self.floats[index]
            low, high = max(slot.offset, start), min(slot.stop, stop)
            if high > low:
                found.append(Segment(slot=index, start=low - start, stop=high - start))
            index += 1
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal layout."""
        return {
            "slots": [
                {"name": s.name, "shape": list(s.shape), "dtype": s.dtype, "offset": s.offset, "role": s.role}
                for s in self.slots
            ],
            "tied": [list(pair) for pair in self.tied],
        }

    @classmethod
    def from_json(cls, value: Any) -> "Layout":
        """Read what `to_json` wrote.

        Raises:
            StoreError: the value is not a layout.
        """
        try:
            slots = tuple(
                Slot(
                    name=str(s["name"]),
                    shape=tuple(int(n) for n in s["shape"]),
                    dtype=str(s["dtype"]),
                    offset=int(s["offset"]),
                    role=s["role"],
                )
                for s in value["slots"]
            )
            tied = tuple((str(alias), str(name)) for alias, name in value.get("tied", ()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"layout: not readable ({type(error).__name__}: {error})") from error
        return cls(slots, tied)

    def digest(self) -> str:
        """A short fingerprint: equal for networks whose vectors mean the same."""
        return sha256(dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def layout_of(
    tensors: Iterable[tuple[str, tuple[int, ...], str, Role]], tied: Mapping[str, str] | None = None
) -> Layout:
    """Lay tensors out one behind the other: parameters, then buffers, then integers.

    Args:
        tensors: (name, shape, dtype, role) of each tensor; order is kept within a role.
        tied: alias → name of tensors that are stored under another name.
    """
    items = list(tensors)
    slots: list[Slot] = []
    offset = 0
    for role in _ROLES:
        if role == "integer":
            offset = 0
        for name, shape, dtype, own_role in items:
            if own_role == role:
                slots.append(Slot(name=name, shape=tuple(shape), dtype=dtype, offset=offset, role=role))
                offset = slots[-1].stop
    return Layout(tuple(slots), tuple((tied or {}).items()))
