"""Each method on the trajectories it must forecast exactly. A method is admitted by a row in EXACT."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farcli.forecasters.base import FittedForecaster, Prefix, SolvedForecaster
from farcli.forecasters.table import FORECASTERS
from farcli.layout import layout_of
from farcli.registry import resolve
from tests.forecasters.trajectories import Data, create, fitted

LAYOUT = layout_of([("w", (11,), "float64", "parameter"), ("b", (2,), "float64", "parameter")])


def polynomial(degree: int) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """w(t) = Σ_k x_k t^k with coefficients of each run's and coordinate's own."""

    def weights(numbers_B3D: Tensor, steps: tuple[int, ...]) -> Tensor:
        times_TK = torch.tensor([[(step / 50) ** k for k in range(degree + 1)] for step in steps], dtype=torch.float64)
        return times_TK @ numbers_B3D[:, : degree + 1]

    return weights


def affine_recurrence(numbers_B3D: Tensor, steps: tuple[int, ...]) -> Tensor:
    """w_{i+1} = c_i w_i + d_i with c, d shared by all runs and coordinates: LFD-2's proposition."""
    factors = torch.rand(max(steps), generator=torch.Generator().manual_seed(0)).double() * 0.02 + 0.985
    offsets = torch.rand(max(steps), generator=torch.Generator().manual_seed(1)).double() * 0.01 - 0.005
    rows = [numbers_B3D[:, 0]]
    for factor, offset in zip(factors, offsets, strict=True):
        rows.append(factor * rows[-1] + offset)
    return torch.stack([rows[step] for step in steps], dim=1)


def common_future(numbers_B3D: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Runs that start apart and end alike."""
    rows = [
        numbers_B3D[:, 0] if step < 70 else numbers_B3D[:1, 1].expand_as(numbers_B3D[:, 0]) * step for step in steps
    ]
    return torch.stack(rows, dim=1)


def common_motion(numbers_B3D: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Runs that are apart and all go one way."""
    return torch.stack([numbers_B3D[:, 0] + math.sin(0.1 * step) * numbers_B3D[:1, 1] for step in steps], dim=1)


def geometric(numbers_B3D: Tensor, steps: tuple[int, ...]) -> Tensor:
    """w(t) = limit + amplitude·e^(−rate·t), each coordinate with its own three numbers."""
    limit_BD, amplitude_BD, rate_BD = numbers_B3D.unbind(1)
    rate_BD = 0.002 + 0.03 * rate_BD.sigmoid()
    return torch.stack([limit_BD + amplitude_BD * torch.exp(-rate_BD * step) for step in steps], dim=1)


def two_modes(numbers_B3D: Tensor, steps: tuple[int, ...]) -> Tensor:
    """A spiral in a plane of each run's own, towards a point of its own: w_{i+1} = A w_i + b with complex modes."""
    limit_BD, one_BD, two_BD = numbers_B3D.unbind(1)
    return torch.stack(
        [
            limit_BD + math.exp(-0.01 * step) * (math.cos(0.03 * step) * one_BD + math.sin(0.03 * step) * two_BD)
            for step in steps
        ],
        dim=1,
    )


EVEN = {"aitken", "dmd"}
"""Methods that need evenly spaced snapshots."""

EXACT: list[tuple[str, dict[str, Any], Callable[[Tensor, tuple[int, ...]], Tensor]]] = [
    ("persistence", {}, polynomial(0)),
    ("mean", {}, common_future),
    ("drift", {}, common_motion),
    ("linear", {}, polynomial(1)),
    ("linear", {"span": 0}, polynomial(1)),
    ("linear", {"span": 2}, polynomial(1)),
    ("quadratic", {}, polynomial(2)),
    ("quadratic", {"span": 2}, polynomial(2)),
    ("lsq-line", {}, polynomial(1)),
    ("lfd2", {}, polynomial(1)),
    ("lfd2", {}, affine_recurrence),
    ("lfd2", {"loss": "l1"}, affine_recurrence),
    ("lfd2", {"scale": "tensor"}, polynomial(1)),
    ("lfd2", {"loss": "l1", "scale": "tensor"}, polynomial(1)),
    ("lfd2", {"groups": "tensor"}, affine_recurrence),
    ("lfd2", {"map": "dense"}, affine_recurrence),
    ("aitken", {}, geometric),
    ("dmd", {"modes": "coordinate"}, geometric),
    ("dmd", {}, two_modes),
    ("ema", {}, polynomial(0)),
    ("lawa", {}, polynomial(0)),
]


@pytest.mark.parametrize(("name", "options", "motion"), EXACT, ids=lambda value: getattr(value, "__name__", str(value)))
@given(
    gaps=st.lists(st.integers(1, 25), min_size=4, max_size=4),
    ahead=st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**16),
)
def test_exact(name: str, options: dict[str, Any], motion: Any, gaps: list[int], ahead: list[int], seed: int) -> None:
    gaps = gaps[:1] * 4 if name in EVEN else gaps
    steps_C = tuple(sum(gaps[:i]) for i in range(5))
    last = max(steps_C[-1], 69) if motion is common_future else steps_C[-1]
    steps_H = tuple(sorted(last + step for step in ahead))
    numbers_B3D = torch.randn(40, 3, LAYOUT.size, generator=torch.Generator().manual_seed(seed)).double()
    data = Data(LAYOUT, steps_C, steps_H, motion(numbers_B3D, steps_C + steps_H))
    forecast_BHD = fitted(data, name, **options).forecast(data.prefix(), steps_H)
    truth_BHD = data.weights_BTD[:, 5:]
    torch.testing.assert_close(forecast_BHD, truth_BHD, rtol=1e-8, atol=1e-8 * float(truth_BHD.abs().max()))


def test_every_method_has_its_row() -> None:
    """But for those that are exact on nothing: fitted by gradient, on losses, or shrunk on purpose, given weights.

    That `far` recovers a quadratic loss is in `test_identification`.
    """
    classes = {name: resolve("forecaster", name, FORECASTERS) for name in FORECASTERS}
    solved = {
        name
        for name, cls in classes.items()
        if issubclass(cls, SolvedForecaster) or not issubclass(cls, FittedForecaster)
    }
    assert {name for name, _, _ in EXACT} == solved - {"nino-mlp", "far", "loss-lfd"}


def test_recurrence_coefficients() -> None:
    """From w_{i+1} = c w_i + d with constant c, d: w_{n+j} = c^j w_n + d (1 − c^j)/(1 − c)."""
    factor, offset, steps = 0.9, 0.05, tuple(range(9))
    numbers_BD = torch.randn(6, LAYOUT.size, generator=torch.Generator().manual_seed(3)).double()
    rows = [numbers_BD]
    for _ in steps[1:]:
        rows.append(factor * rows[-1] + offset)
    data = Data(LAYOUT, steps[:5], steps[5:], torch.stack(rows, dim=1))
    forecaster = fitted(data, "lfd2", ridge=0.0)
    assert [row["ahead"] for row in forecaster.coefficients()] == [1, 2, 3, 4]
    for row in forecaster.coefficients():
        # w_n is an affine function of w_0 here, so only a + b·cⁿ is determined, not a and b.
        a, b, c = (float(row[key]) for key in "abc")
        ahead = int(row["ahead"])
        assert a + b * factor**4 == pytest.approx(factor ** (4 + ahead), rel=1e-9)
        settled = offset / (1 - factor)
        assert (a + b) * settled + c == pytest.approx(settled, rel=1e-9)
        assert row["line_a"] == -ahead / 4
        assert row["line_b"] == 1 + ahead / 4


def test_quadratic_has_its_own_coefficient() -> None:
    """s(s + 1)/2 on the second difference, not s(s − 1)/2 as printed."""
    generator = torch.Generator().manual_seed(0)
    weights_BCD = torch.randn(2, 3, LAYOUT.size, generator=generator).double()
    prefix = Prefix(weights_BCD=weights_BCD, steps_C=(0, 50, 100), layout=LAYOUT, start=0, runs_B=(0, 1))
    s = 75 / 50
    first, second = weights_BCD[:, 2] - weights_BCD[:, 1], weights_BCD[:, 2] - 2 * weights_BCD[:, 1] + weights_BCD[:, 0]
    expected = weights_BCD[:, 2] + s * first + s * (s + 1) / 2 * second
    torch.testing.assert_close(create("quadratic").forecast(prefix, (175,))[:, 0], expected)


@pytest.mark.parametrize(
    ("name", "options", "observed"),
    [
        ("persistence", {}, (9,)),
        ("linear", {}, (7, 9)),
        ("linear", {"span": 3}, (4, 9)),
        ("linear", {"span": 0}, (1, 9)),
        ("quadratic", {}, (5, 7, 9)),
        ("quadratic", {"span": 2}, (2, 5, 9)),
        ("lsq-line", {}, (1, 2, 4, 5, 7, 9)),
        ("lfd2", {}, (1, 9)),
        ("mean", {}, (9,)),
        ("drift", {}, (9,)),
        ("ema", {}, (1, 2, 4, 5, 7, 9)),
        ("lawa", {"latest": 3}, (5, 7, 9)),
        ("aitken", {}, (5, 7, 9)),
        ("dmd", {}, (5, 7, 9)),
        ("introspection", {}, (1, 4, 7, 9)),
        ("wnn", {}, (2, 4, 5, 7, 9)),
        ("nino-mlp", {}, (2, 4, 5, 7, 9)),
        ("gfm", {}, (1, 2, 4, 5, 7, 9)),
    ],
)
def test_observed_snapshots(name: str, options: dict[str, Any], observed: tuple[int, ...]) -> None:
    assert create(name, **options).observed((1, 2, 4, 5, 7, 9)) == observed


def test_lsq_line_is_the_nearest() -> None:
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    weights_BCD = torch.randn(2, 5, LAYOUT.size, generator=generator).double()
    steps_C = (0, 3, 10, 11, 40)
    prefix = Prefix(weights_BCD=weights_BCD, steps_C=steps_C, layout=LAYOUT, start=0, runs_B=(0, 1))
    slope, level = np.polyfit(steps_C, weights_BCD[1].numpy(), 1)
    forecast = create("lsq-line").forecast(prefix, (90, 41))[1].numpy()
    np.testing.assert_allclose(forecast, [level + slope * 90, level + slope * 41], rtol=1e-9)


@pytest.mark.parametrize("name", ["mean", "drift"])
def test_means_keep_what_was_not_fitted(data: Data, name: str) -> None:
    forecast_BHD = fitted(data, name).forecast(data.prefix(), data.steps_H[::-1])
    fit = data.layout.parameters
    truth_BHD = data.weights_BTD[:, len(data.steps_C) :].double()
    expected_HD = truth_BHD[..., :fit].mean(0)
    if name == "drift":
        last_BD = data.prefix().weights_BCD[:, -1, :fit].double()
        expected_HD += last_BD[0] - last_BD.mean(0)
    torch.testing.assert_close(forecast_BHD[0, :, :fit].flip(0).double(), expected_HD)
    kept = data.prefix().weights_BCD[:, -1:, fit:].expand(-1, len(data.steps_H), -1)
    assert torch.equal(forecast_BHD[..., fit:], kept)


def test_far_line_in_float32() -> None:
    """Weights near 1 that move by 1e-4 a snapshot: 100 snapshots ahead, the displacement keeps 3 digits."""
    steps = torch.arange(5, dtype=torch.float32)
    weights_BCD = (1 + 1e-4 * steps)[None, :, None].expand(1, -1, 13).contiguous()
    prefix = Prefix(weights_BCD=weights_BCD, steps_C=tuple(range(5)), layout=LAYOUT, start=0, runs_B=(0,))
    for name in ("linear", "lsq-line"):
        moved = create(name).forecast(prefix, (104,)) - weights_BCD[:, -1:]
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=2e-3, atol=0)
    assert create("persistence").forecast(replace(prefix), (104,)).unique().numel() == 1
