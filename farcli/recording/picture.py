"""One snapshot of a network in training: what is stored each time, what once, and the copy itself."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from crc32c import crc32c
from safetensors import SafetensorError
from torch import Tensor

from farcli.errors import FarcliError, StoreError, UsageError
from farcli.layout import Layout, Role, layout_of
from farcli.recording.names import Place, is_sharded, tensors_of
from farcli.recording.plan import Plan

ONCE = "frozen.safetensors"
"""File inside a store that holds what does not change: frozen parameters, large integer buffers (masks)."""
_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32}
_LARGE_BUFFER = 1024
"""Integer buffers with more elements are masks and tables, not counters."""
_PIECE = 1 << 20


class Picture:
    """What to copy of a network at each snapshot.

    Attributes:
        layout: of the vectors.
        dtype: of the vector of floats: float32, or float64 where that is needed to be exact.
        sharded: whether reading a tensor needs all processes (DTensor).
        once: tensors that are stored once.
        once_tied: alias → name among `once`.
        skipped: sentences about tensors that cannot be stored.
        region: the coordinates that this process copies; all of them unless several processes write.
    """

    def __init__(
        self, places: Sequence[Place], optimizers: Sequence[Any], plan: Plan, *, everything: bool = False
    ) -> None:
        trained = {id(tensor) for tensor in tensors_of(optimizers)}
        items: list[tuple[str, tuple[int, ...], str, Role]] = []
        tied: dict[str, str] = {}
        seen: dict[object, str] = {}
        self._places: dict[str, Place] = {}
        self.once: dict[str, Place] = {}
        self.once_tied: dict[str, str] = {}
        self.skipped: list[str] = []
        for place in places:
            tensor = place.tensor()
            if not plan.selects(place.name) or (plan.trainable_only and id(tensor) not in trained):
                continue
            memory = _memory(tensor)
            if memory in seen:
                first = seen[memory]
                (self.once_tied if first in self.once else tied)[place.name] = first
                continue
            role = _role(place, tensor)
            if role is None:
                self.skipped.append(f"tensor {place.name!r} is {tensor.layout} of {tensor.dtype} and is not recorded")
                continue
            seen[memory] = place.name
            constant = not tensor.requires_grad if role == "parameter" else role == "integer" and _is_table(tensor)
            if constant and id(tensor) not in trained and not everything and not is_sharded(tensor):
                self.once[place.name] = place
                continue
            self._places[place.name] = place
            items.append((place.name, tuple(tensor.shape), _dtype_name(tensor), role))
        if not items:
            wanted = f" that matches --params {' '.join(plan.params)}" if plan.params else ""
            raise UsageError(f"the training has no tensor{wanted} to record.")
        self.layout: Layout = layout_of(items, tied)
        wide = plan.dtype == "keep" and any(slot.dtype == "float64" for slot in self.layout.floats)
        self.dtype = torch.float64 if wide else torch.float32
        self._rounds = plan.dtype == "bfloat16"
        self.region = slice(0, self.layout.size)
        self.sharded = any(is_sharded(place.tensor()) for place in self._places.values())
        self._facts = {name: _facts(place.tensor()) for name, place in self.once.items()}
        self._sums = {name: _checksum(place.tensor()) for name, place in self.once.items()}
        self._device = next(
            (place.tensor().device for place in self._places.values() if place.tensor().device.type == "cuda"), None
        )
        self._stage: Stage | None = None
        self._dtypes = [getattr(torch, slot.dtype) for slot in self.layout.slots]
        self._views: dict[int, list[Tensor]] = {}
        """What a plain copy goes into, by the address of the vector of floats; they keep that vector alive."""

    @property
    def nbytes(self) -> int:
        """Bytes of one stored snapshot."""
        return self.layout.size * self.dtype.itemsize + self.layout.integers * 8

    def buffers(self) -> tuple[Tensor, Tensor]:
        """A new pair of vectors to copy into; pinned where the network is on a CUDA device.

        Where that concerns nobody else, the network is copied into them: touching their memory, making their views and
        the first copy of its kind would hold up the step of the first snapshot, to half as long again and more.
        """
        pin = self._device is not None
        floats = torch.empty(self._width, dtype=self.dtype, pin_memory=pin)
        integers = torch.empty(self.layout.integers, dtype=torch.int64, pin_memory=pin)
        if self._device is None and not self.sharded:
            self.copy(floats, integers)
        else:
            floats.zero_()
        return floats, integers

    def copy(self, floats: Tensor, integers: Tensor) -> Any:
        """Copy the network as it is now.

        Returns:
            None when the vectors are complete, or an event to wait for (CUDA): until then they must not be read.

        Raises:
            FarcliError: see `tensors`.
        """
        with torch.no_grad():
            if self._device is None:
                if self.sharded or self._rounds:  # one after the other: what is made on the way is not kept
                    for tensor, into in self._targets(floats, integers):
                        into.copy_(tensor)
                else:
                    targets = self._shaped(floats, integers)
                    torch._foreach_copy_(targets, self.tensors())  # pyright: ignore[reportPrivateImportUsage]
                return None
            if self._stage is None:
                self._stage = Stage(self._width, self.layout.integers, self.dtype, self._device)
            staged = self._stage.vectors()
            for tensor, into in self._targets(*staged):
                # What is on the host is waited for: the script may change it before it is read.
                into.copy_(tensor, non_blocking=tensor.is_cuda)
            return self._stage.send(floats, integers)

    def gather(self) -> None:
        """Take part in reading sharded tensors without keeping them: every process must.

        Raises:
            FarcliError: see `tensors`.
        """
        with torch.no_grad():
            for tensor in self.tensors():
                _whole(tensor)

    def release(self) -> None:
        """Let go of the network; nothing can be copied afterwards."""
        self._places.clear()
        self._views.clear()
        self.once.clear()
        self._stage = None

    @property
    def _width(self) -> int:
        return self.region.stop - self.region.start

    def tensors(self) -> list[Tensor]:
        """The tensors of the layout as they are now.

        All are looked at before one is read: what is wrong with them is so in every process, and one that stopped
        half-way would be waited for.

        Raises:
            FarcliError: one has another shape or number format than when the recording began, or is gone.
        """
        tensors = [self._places[slot.name].tensor() for slot in self.layout.slots]
        for slot, dtype, tensor in zip(self.layout.slots, self._dtypes, tensors, strict=True):
            if tensor.shape != slot.shape or tensor.dtype is not dtype:
                raise FarcliError(
                    f"tensor {slot.name!r} is {_dtype_name(tensor)}{list(tensor.shape)} now, "
                    f"{slot.dtype}{list(slot.shape)} when the recording began."
                )
        return tensors

    def _shaped(self, floats: Tensor, integers: Tensor) -> list[Tensor]:
        """Views of whole vectors, one for each tensor, made once: making them takes longer than a check of all."""
        views = self._views.get(floats.data_ptr())
        if views is None:
            views = [
                (integers if slot.role == "integer" else floats)[slot.offset : slot.stop].view(slot.shape)
                for slot in self.layout.slots
            ]
            self._views[floats.data_ptr()] = views
        return views

    def _targets(self, floats: Tensor, integers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Flat tensors, or what lies in the region of them, and where they go."""
        for slot, tensor in zip(self.layout.slots, self.tensors(), strict=True):
            values = _whole(tensor).reshape(-1)  # of sharded tensors, every process must ask for every one
            if slot.role == "integer":
                yield values, integers[slot.offset : slot.stop]
                continue
            if self._rounds:
                values = values.to(torch.bfloat16)
            low, high = max(slot.offset, self.region.start), min(slot.stop, self.region.stop)
            if low < high:
                start = self.region.start
                yield values[low - slot.offset : high - slot.offset], floats[low - start : high - start]

    def thawed(self, *, thorough: bool = False) -> str | None:
        """The name of a tensor stored once that has changed since; None when all are as they were.

        Args:
            thorough: compare contents on accelerators too, where that means copying them.
        """
        for name, place in self.once.items():
            tensor = place.tensor()
            changed = _facts(tensor) != self._facts[name]
            if changed or thorough or tensor.device.type == "cpu":
                if _checksum(tensor) != self._sums[name] or tensor.requires_grad != self._facts[name][-1]:
                    return name
                self._facts[name] = _facts(tensor)
        return None

    def once_header(self) -> dict[str, Any]:
        """What a store's header says of the tensors stored once."""
        tensors = [
            {"name": name, "shape": list(place.tensor().shape), "dtype": _dtype_name(place.tensor())}
            for name, place in self.once.items()
        ]
        return {"file": ONCE, "tensors": tensors, "tied": [list(pair) for pair in self.once_tied.items()]}

    def write_once(self, store: Path) -> None:
        """Write the tensors stored once into a store's folder."""
        from safetensors.torch import save

        from farcli.files import write_file

        tensors = {name: place.tensor().detach().cpu().contiguous().clone() for name, place in self.once.items()}
        write_file(store / ONCE, save(tensors), replace=True)


class Stage:
    """A CUDA snapshot on its way: gathered on the device at once, sent to the host beside the training.

    Gathering first costs a copy of the weights on the device and next to no time, and makes the snapshot
    whole whatever the script does to its weights next; copying straight from them would race with it.
    """

    def __init__(self, floats: int, integers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._floats = torch.empty(floats, dtype=dtype, device=device)
        self._integers = torch.empty(integers, dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device)
        for vector in (self._floats, self._integers):
            vector.record_stream(self._stream)  # let go of at the end, they stay until the last copy has been sent
        self._sent: torch.cuda.Event | None = None
        self._device = device

    def vectors(self) -> tuple[Tensor, Tensor]:
        """The device's vectors to gather into, free of the snapshot before."""
        if self._sent is not None:
            torch.cuda.current_stream(self._device).wait_event(self._sent)
        return self._floats, self._integers

    def send(self, floats: Tensor, integers: Tensor) -> torch.cuda.Event:
        """Start copying to pinned memory; the event says when it is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            floats.copy_(self._floats, non_blocking=True)
            integers.copy_(self._integers, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record(self._stream)
        return self._sent


def moments_of(places: Sequence[Place], optimizers: Sequence[Any]) -> list[Place]:
    """The floating-point state that optimisers keep for each coordinate (Adam's moments), by tensor and key."""
    names = {id(place.tensor()): place.name for place in places}
    found: list[Place] = []
    for optimizer in optimizers:
        for tensor, state in optimizer.state.items():
            name = names.get(id(tensor))
            if name is None or not isinstance(state, dict):
                continue
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == tensor.shape and value.is_floating_point():
                    found.append(Place(f"{name}.{key}", "parameter", state, key))
    return sorted(found, key=lambda place: place.name.rsplit(".", 1)[1])


def read_once(store: Path, header: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a store holds once, under all their names; none where its header tells of none.

    Raises:
        StoreError: their file is missing or damaged.
    """
    from safetensors.torch import load_file

    said = header.get("frozen")
    if not isinstance(said, Mapping):
        return {}
    try:
        state = load_file(store / str(said["file"]))
        state.update({str(alias): state[name] for alias, name in said.get("tied", ())})
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise StoreError(f"{store}: {ONCE} is missing or damaged ({error}).") from error
    return state


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def _is_table(tensor: Tensor) -> bool:
    return tensor.numel() > _LARGE_BUFFER


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _role(place: Place, tensor: Tensor) -> Role | None:
    if tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta":
        if tensor.dtype.is_floating_point:
            return place.kind
        if tensor.dtype in _INTEGERS:
            return "integer"
    return None


def _memory(tensor: Tensor) -> object:
    """Equal for tensors that are the same elements in the same order."""
    if is_sharded(tensor) or tensor.numel() == 0 or tensor.layout != torch.strided or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _facts(tensor: Tensor) -> tuple[int, int, bool]:
    return tensor.data_ptr(), tensor._version, tensor.requires_grad


def _checksum(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return 0
    data: np.ndarray = flat.view(torch.uint8).numpy()
    total = 0
    for start in range(0, data.size, _PIECE):
        total = crc32c(data[start : start + _PIECE].data, total)
    return total
