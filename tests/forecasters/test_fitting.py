"""The engine: wrong data are named, and only wrong data."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from farcli.errors import NonFiniteError
from farcli.fitting import solve
from farcli.forecasters.base import SolvedForecaster
from tests.forecasters.trajectories import LAYOUT, Data, create

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("lfd2", {}),
    ("lfd2", {"loss": "l1"}),
    ("lfd2", {"map": "dense"}),
]


def fit(data: Data, name: str, options: dict[str, Any]) -> SolvedForecaster:
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
        fit(replace(data, weights_BTD=weights_BTD), name, options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_what_is_not_fitted_may_be_wrong(data: Data, name: str, options: dict[str, Any]) -> None:
    """Buffers, and snapshots the method does not look at."""
    weights_BTD = data.weights_BTD.clone()
    weights_BTD[..., LAYOUT.parameters :] = float("nan")
    weights_BTD[:, 1:4] = float("inf")
    found = fit(replace(data, weights_BTD=weights_BTD), name, options).tensors()
    for key, expected in fit(data, name, options).tensors().items():
        assert torch.equal(found[key], expected)


def test_overflow(data: Data) -> None:
    huge = replace(data, weights_BTD=data.weights_BTD.double() * 1e200)
    with pytest.raises(NonFiniteError, match="too large"):
        fit(huge, "lfd2", {})
