"""NiNo's per-scalar MLP, with its published weights.

Shape suffixes: B runs, C = 5 snapshots, H horizons, D coordinates of the block; W coordinates worked on at once, S
width of the network.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from farcli.errors import StoreError, UsageError
from farcli.forecasters.base import Coupling, Forecaster, Prefix, require_future
from farcli.layout import Slot

_STATES, _HORIZONS, _KINDS = 5, 40, 15
_EPSILON = 1e-6
_CHUNK = 1 << 14
_FULL, _OTHER, _CONVOLUTION, _NORM = 1, 2, 3, 4


@final
class ScalarNetwork(nn.Module):
    """Linear(5 → S) + embedding of the tensor's kind → 4 linear layers with SiLU between → 40."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer_embed = nn.Embedding(_KINDS, width)
        self.edge_proj = nn.ModuleDict({"fc": nn.Sequential(nn.Linear(_STATES, width))})
        layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.edge_mlp = nn.ModuleDict({"fc": nn.Sequential(*layers, nn.Linear(width, _HORIZONS))})

    def forward(self, states_WC: Tensor, kind: int) -> Tensor:
        """Scaled displacements from the last state, [W, 40]."""
        embedded_WS = self.edge_proj["fc"](states_WC) + self.layer_embed.weight[kind]
        return self.edge_mlp["fc"](embedded_WS)


def kind_of(slot: Slot) -> int:
    """The kind of a tensor, by NiNo's rule: by rank, and by name where it has one axis."""
    match len(slot.shape):
        case 4:
            return _CONVOLUTION
        case 2:
            return _FULL
        case 1 if slot.name.endswith(".weight"):
            return _NORM
        case _:
            return _OTHER


@final
class NinoMlp(Forecaster):
    """ŵ = w_n + std·f_k((w_0 … w_n − mean)/std, kind of tensor) for each scalar, k intervals ahead.

    Mean and standard deviation are each tensor's, over its five states. The network is NiNo's own, as published,
    from a file: `--set weights=nino_mlp.pt`. It was trained on states 200 optimiser steps apart.

    Source: Knyazev et al., "Accelerating training with neuron interaction and nowcasting networks", ICLR 2025,
    the MLP variant; the authors' code and weights (github.com/SamsungSAILMontreal/nino, MIT licence).
    Differs: forecasts between two of its 40 horizons are interpolated, and intervals count in means of the five
    states' gaps; NiNo itself is asked for whole intervals only. Tensors that its graphs know by their place in a
    Transformer are told apart by rank and name alone, as its generic graph does.
    """

    reference = "NiNo's MLP (ICLR 2025) with its published weights: needs --set weights=FILE"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        weights: str = field(default="", metadata={"help": "file with the published weights, nino_mlp.pt"})

    def __init__(self, config: Config) -> None:
        self._config = config
        self._network = load_network(Path(config.weights)) if config.weights else None

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def coupling(self) -> Coupling:
        """Joint: scaling needs whole tensors."""
        return Coupling.JOINT

    @property
    def min_context(self) -> int:
        """Five snapshots."""
        return _STATES

    def observed(self, steps_C: Sequence[int]) -> tuple[int, ...]:
        """The last five."""
        require_future("nino-mlp", self.min_context, steps_C, ())
        return tuple(steps_C[-_STATES:])

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """The network's output: [B, H, D]."""
        prefix.require("nino-mlp", self.min_context, steps_H)
        if self._network is None:
            raise UsageError(
                "nino-mlp: no weights were given, expected --set weights=FILE.",
                "nino_mlp.pt is published at github.com/SamsungSAILMontreal/nino, in checkpoints.",
            )
        network = self._network.to(prefix.weights_BCD.device)
        weights_BCD, steps = prefix.weights_BCD[:, -_STATES:], prefix.steps_C[-_STATES:]
        mix_HK = _mix(steps, steps_H).to(weights_BCD.device)
        forecast_BHD = weights_BCD[:, -1:].repeat(1, len(steps_H), 1)
        with torch.no_grad():
            for segment in prefix.segments:
                kind = kind_of(prefix.layout.floats[segment.slot])
                for run, states_CD in enumerate(weights_BCD[..., segment.start : segment.stop]):
                    std, mean = torch.std_mean(states_CD)
                    for first in range(0, states_CD.shape[1], _CHUNK):
                        scaled_WC = ((states_CD[:, first : first + _CHUNK] - mean) / (std + _EPSILON)).T.float()
                        moved_HW = (std + _EPSILON) * (mix_HK @ network(scaled_WC, kind).T)
                        start = segment.start + first
                        forecast_BHD[run, :, start : start + moved_HW.shape[1]] += moved_HW
        return forecast_BHD


def _mix(steps_C: Sequence[int], steps_H: Sequence[int]) -> Tensor:
    """Each target step as a combination of the 40 horizons, [H, 40]; horizon 0 is w_n itself.

    Raises:
        UsageError: a step is further ahead than 40 intervals.
    """
    interval = (steps_C[-1] - steps_C[0]) / (_STATES - 1)
    mix_HK = torch.zeros(len(steps_H), _HORIZONS + 1)
    for row_K, step in zip(mix_HK, steps_H, strict=True):
        ahead = (step - steps_C[-1]) / interval
        if ahead > _HORIZONS:
            raise UsageError(
                f"nino-mlp: step {step} is {ahead:g} intervals of {interval:g} steps ahead, expected at most "
                f"{_HORIZONS}.",
                "Choose nearer steps with --to, or snapshots further apart.",
            )
        low = min(int(ahead), _HORIZONS - 1)
        row_K[low], row_K[low + 1] = low + 1 - ahead, ahead - low
    return mix_HK[:, 1:]


def load_network(path: Path) -> ScalarNetwork:
    """Read the published weights, of either width.

    Raises:
        StoreError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise StoreError(f"nino-mlp: {path}: no such file, expected NiNo's published weights.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise StoreError(
            f"nino-mlp: {path}: is not a readable file of weights, expected NiNo's as published.",
            "Fetch nino_mlp.pt or nino_mlp_h32.pt of github.com/SamsungSAILMontreal/nino again.",
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    embedding = state.get("layer_embed.weight") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(embedding, Tensor) or embedding.ndim != 2:
        raise StoreError(f"nino-mlp: {path}: holds no state_dict with layer_embed.weight, expected NiNo's MLP.")
    with torch.device("meta"):
        network = ScalarNetwork(embedding.shape[1])
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if wrong := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
        raise StoreError(
            f"nino-mlp: {path}: tensor {wrong[0]!r} has shape {found.get(wrong[0])}, expected {wanted.get(wrong[0])}; "
            "is it NiNo's MLP (nino_mlp.pt), not its graph network?"
        )
    network.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return network.requires_grad_(False).eval()
