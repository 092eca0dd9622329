"""Networks of the transformers library, and their pretrained weights from folders or archives; nothing is fetched."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from farcli.errors import UsageError
from farcli.workloads.folders import one_of

EXTRA = "text"
"""The extra of the package that brings the library."""


def require_transformers(whose: str) -> None:
    """Check that transformers and tokenizers can be imported.

    Raises:
        UsageError: they cannot; says what to install.
    """
    try:
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{whose}: its network comes with transformers, which cannot be imported ({error}).",
            f"pip install 'farcli[{EXTRA}]'",
        ) from error


def stored_config(place: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What the config.json of a pretrained network says.

    Args:
        place: folder as hubs hand it out, or an archive with one.
        kinds: the values of `model_type` that are welcome.

    Raises:
        UsageError: it is not there, cannot be read, or is of another kind.
    """
    try:
        config = json.loads(one_of(place, "config.json"))
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{place}: its config.json cannot be read ({error}).") from error
    if kind not in kinds:
        raise UsageError(f"{place}: is a network of type {kind!r}, expected {' or '.join(map(repr, kinds))}.")
    return config


def stored_weights(place: Path) -> dict[str, Tensor]:
    """The tensors of a pretrained network by name, from its model.safetensors.

    Raises:
        UsageError: it is not there or cannot be read. Pickles are not looked for: they can run code.
    """
    try:
        return load(one_of(place, "model.safetensors"))
    except SafetensorError as error:
        raise UsageError(f"{place}: its model.safetensors cannot be read ({error}).") from error


def digest_with_weights(data: str, place: Path) -> str:
    """Sixteen hexadecimal digits for data, given by theirs, together with the weights of a pretrained network.

    Raises:
        UsageError: the weights are not there.
    """
    return sha256(data.encode() + sha256(one_of(place, "model.safetensors")).digest()).hexdigest()[:16]


def fill(model: nn.Module, weights: Mapping[str, Tensor], whose: object) -> None:
    """Copy weights into a network, in place: all of its tensors, cast to their dtypes.

    Args:
        model: the network.
        weights: by the names of its `state_dict`; tied names may be left out, others are ignored.
        whose: what they come from, for the message.

    Raises:
        UsageError: one is missing or has another shape.
    """
    filled: set[int] = set()
    state = model.state_dict()
    with torch.no_grad():
        for name in state.keys() & weights.keys():
            if state[name].shape != weights[name].shape:
                found, wanted = tuple(weights[name].shape), tuple(state[name].shape)
                raise UsageError(f"{whose}: tensor {name!r} has shape {found}, expected {wanted}.")
            state[name].copy_(weights[name])
            filled.add(state[name].data_ptr())
    missing = [name for name, tensor in state.items() if tensor.data_ptr() not in filled]
    if missing:
        raise UsageError(f"{whose}: has no tensor {missing[0]!r} ({len(missing)} are missing).")


def at_least_float32(scores: Tensor) -> Tensor:
    """Scores in a format that a softmax over many of them can be taken in; float64 stays."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
