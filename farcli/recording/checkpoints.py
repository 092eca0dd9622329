"""Reading what trainings saved themselves: files and folders of checkpoints, one state dict at a time."""

import glob
import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farcli.errors import StoreError, UsageError
from farcli.layout import Layout, Role, layout_of

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_FILES = (".safetensors", *_PICKLES)
_HF_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_INSIDE = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "model_state")
_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_STATISTICS = ("running_mean", "running_var")
_NOT_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|rng_state|training_args)", re.IGNORECASE)


def find_checkpoints(patterns: Sequence[str]) -> list[tuple[int, Path]]:
    """The checkpoints that patterns match, with the steps their names tell, in order of step.

    Raises:
        StoreError: nothing matches, a name tells no step, or two tell the same.
    """
    paths = sorted({Path(found) for pattern in patterns for found in glob.glob(pattern)})
    paths = [path for path in paths if path.is_dir() or path.suffix in _FILES]
    if len(paths) == 1 and paths[0].is_dir() and _weights_in(paths[0]) is None:
        inner = sorted(paths[0].iterdir())
        paths = [path for path in inner if (path.is_dir() and _weights_in(path)) or path.suffix in _FILES]
    if not paths:
        raise StoreError(f"--from {' '.join(patterns)}: matches no checkpoint (a folder, or {', '.join(_FILES)}).")
    found: dict[int, Path] = {}
    for path in paths:
        step = step_of(path)
        if step in found:
            raise StoreError(f"{path}: tells step {step}, as {found[step]} does.")
        found[step] = path
    return sorted(found.items())


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells: `step=400`, `checkpoint-500`, else its last number.

    Raises:
        StoreError: it tells none.
    """
    name = path.stem if path.suffix in _FILES else path.name
    marked = re.findall(r"(?:step|iter|checkpoint|ckpt)[=_-]?(\d+)", name, re.IGNORECASE)
    numbers = marked or re.findall(r"\d+", name)
    if numbers:
        return int(numbers[-1])
    state = path / "trainer_state.json"
    if state.is_file():
        try:
            return int(json.loads(state.read_text())["global_step"])
        except (ValueError, KeyError, TypeError):
            pass
    raise StoreError(f"{path}: its name tells no step.", "Name checkpoints like checkpoint-500 or step=500.ckpt.")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint, wrappers' prefixes removed. No code of a pickle is run.

    Raises:
        StoreError: it holds none, is damaged, or is a pickle that wants to run code.
    """
    if not path.is_dir():
        return _tensors(_load(path), path)
    inside = _weights_in(path)
    if inside is None:
        raise StoreError(f"{path}: holds no weights that farcli can read ({', '.join(_HF_FILES[:4])}, *.pt, *.ckpt).")
    if inside.suffix != ".json":
        return _tensors(_load(inside), inside)
    try:
        shards = sorted(set(json.loads(inside.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{inside}: is not an index of weights ({error}).") from error
    whole: dict[str, Tensor] = {}
    for shard in shards:
        whole |= _tensors(_load(path / os.path.basename(shard)), path / shard)
    return whole


def layout_of_state(state: Mapping[str, Tensor]) -> Layout:
    """The layout of a state dict; BatchNorm's statistics are known by their names.

    Raises:
        UsageError: a tensor cannot be stored exactly.
    """
    items: list[tuple[str, tuple[int, ...], str, Role]] = []
    tied: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in state.items():
        memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else id(tensor)
        if memory in seen:
            tied[name] = seen[memory]
            continue
        seen[memory] = name
        if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized:
            raise UsageError(
                f"tensor {name!r}: is {tensor.layout} of {tensor.dtype}, which cannot be recorded exactly."
            )
        role: Role = "integer"
        if tensor.is_floating_point():
            role = "buffer" if name.rsplit(".", 1)[-1] in _STATISTICS else "parameter"
        items.append((name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), role))
    return layout_of(items, tied)


def fill(state: Mapping[str, Tensor], layout: Layout, floats: Tensor, integers: Tensor, path: Path) -> None:
    """Copy a state dict into vectors.

    Raises:
        StoreError: it does not have this layout; names the tensor.
    """
    aliases = dict(layout.tied)
    for name in state:
        if name not in aliases and all(slot.name != name for slot in layout.slots):
            raise StoreError(f"{path}: has a tensor {name!r}, which the first checkpoint lacks.")
    for slot in layout.slots:
        tensor = state.get(slot.name)
        if tensor is None:
            raise StoreError(f"{path}: lacks the tensor {slot.name!r} of the first checkpoint.")
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if found != (slot.shape, slot.dtype):
            raise StoreError(
                f"{path}: its tensor {slot.name!r} is {found[1]}{list(found[0])}, "
                f"that of the first checkpoint {slot.dtype}{list(slot.shape)}."
            )
        vector = integers if slot.role == "integer" else floats
        vector[slot.offset : slot.stop].copy_(tensor.reshape(-1))


def _weights_in(folder: Path) -> Path | None:
    """The file of a checkpoint folder that holds the weights."""
    for name in _HF_FILES:
        if (folder / name).is_file():
            return folder / name
    files = [p for p in sorted(folder.iterdir()) if p.suffix in _FILES and not _NOT_WEIGHTS.search(p.name)]
    return files[0] if len(files) == 1 else None


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StoreError(f"{path}: is missing.") from None
    except pickle.UnpicklingError as error:
        raise StoreError(
            f"{path}: wants to run code when it is loaded ({_reason(error)}); it was not loaded.",
            "Save the state_dict alone: torch.save(model.state_dict(), …).",
        ) from error
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # whatever a damaged file makes torch or safetensors say
        raise StoreError(f"{path}: is damaged or no checkpoint ({type(error).__name__}: {_reason(error)}).") from error


def _reason(error: Exception) -> str:
    text = str(error)
    found = re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) ([\w.]+)", text)
    return found[1] if found else text.strip().splitlines()[0][:120] if text.strip() else "no reason given"


def _tensors(value: Any, path: Path) -> dict[str, Tensor]:
    for key in _INSIDE:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if not isinstance(value, Mapping):
        raise StoreError(f"{path}: holds a {type(value).__name__}, expected a state dict.")
    state = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    if not state:
        raise StoreError(f"{path}: holds no state dict (its keys are {', '.join(map(str, list(value)[:5]))}).")
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
