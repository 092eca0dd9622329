"""The engine: wrong data are named, and only wrong data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import farcli.stream
from farcli.errors import NonFiniteError
from farcli.fitting.solving import solve
from farcli.forecasters.base import SolvedForecaster
from farcli.layout import layout_of
from farcli.store import TrajectoryWriter
from farcli.stream import Stream
from farcli.training import threads
from farcli.verbs.fit import fit
from tests.forecasters.trajectories import LAYOUT, Data, create

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("drift", {}),
    ("lfd2", {}),
    ("lfd2", {"loss": "l1"}),
    ("lfd2", {"map": "dense"}),
]


def fitted(data: Data, name: str, options: dict[str, Any]) -> SolvedForecaster:
    forecaster = create(name, **options)
    assert isinstance(forecaster, SolvedForecaster)
    cuts = () if options.get("map") else (20, 70)
    return solve(forecaster, data.problem(), data.passes(cuts, ((4, 2), (0, 1, 3))))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_wrong_data_are_named(data: Data, name: str, options: dict[str, Any], value: float) -> None:
    weights_BTD = data.weights_BTD.clone()
    weights_BTD[0, :, LAYOUT.parameters] = float("nan")  # a buffer: not fitted, not named
    weights_BTD[3, 7, LAYOUT.slice_of("head.weight").start + 12] = value
    with pytest.raises(NonFiniteError, match=rf"run 3 .*'head.weight' holds {value} at step 130, expected finite"):
        fitted(replace(data, weights_BTD=weights_BTD), name, options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_what_is_not_fitted_may_be_wrong(data: Data, name: str, options: dict[str, Any]) -> None:
    """Buffers, and snapshots the method does not look at."""
    weights_BTD = data.weights_BTD.clone()
    weights_BTD[..., LAYOUT.parameters :] = float("nan")
    weights_BTD[:, 1:4] = float("inf")
    found = fitted(replace(data, weights_BTD=weights_BTD), name, options).tensors()
    for key, expected in fitted(data, name, options).tensors().items():
        assert torch.equal(found[key], expected)


def test_overflow(data: Data) -> None:
    huge = replace(data, weights_BTD=data.weights_BTD.double() * 1e200)
    with pytest.raises(NonFiniteError, match="too large"):
        fitted(huge, "lfd2", {})


def test_a_fit_has_the_same_bits_whatever_the_threads_and_is_that_of_whole_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [0, 10, 20, 30, 40, 50]
    layout = layout_of([("a", (300_000,), "float32", "parameter"), ("b", (20_000,), "float32", "buffer")])
    generator = np.random.default_rng(0)
    with TrajectoryWriter.create(tmp_path / "run.zarr", layout, [0, 1], sync="none") as writer:
        for run in (0, 1):
            weights = generator.standard_normal(layout.size)
            for step in steps:
                writer.append(step, weights.astype(np.float32), run=run)
                weights += 0.1 * generator.standard_normal() * weights + 0.01 * generator.standard_normal(layout.size)
        writer.finish()
    monkeypatch.setattr(farcli.stream, "_PART_BYTES", 2 << 20)

    def tensors(count: int) -> dict[str, torch.Tensor]:
        with threads(count):
            fit("lfd2", [str(tmp_path / "run.zarr")], tmp_path / "f.safetensors", context=2, device="cpu", replace=True)
        return load_file(tmp_path / "f.safetensors")

    alone, together = tensors(1), tensors(3)
    monkeypatch.setattr(Stream, "spreads", False)
    whole = tensors(1)
    for name, tensor in whole.items():
        assert torch.equal(alone[name], together[name])
        torch.testing.assert_close(alone[name], tensor, rtol=1e-5, atol=1e-7)
        assert not torch.equal(alone[name], torch.zeros_like(tensor))
