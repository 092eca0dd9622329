"""LFD-2's mathematics against dense computations in numpy, scipy and autograd."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from farcli.errors import ResourceError, UsageError
from farcli.fitting.solving import solve
from farcli.forecasters.base import Prefix, Problem
from farcli.forecasters.lfd2 import Lfd2
from farcli.forecasters.lfd2_dense import GramSums, RowSums, solve_gram, solve_rows
from farcli.forecasters.lfd2_shared import SquaredSums, tiles
from farcli.forecasters.update_growth import update_growth
from farcli.layout import Slot, layout_of
from tests.forecasters.trajectories import LAYOUT, Data, drifting, fitted

PARAMETERS = LAYOUT.parameters
MOVING = [slot for slot in LAYOUT.floats if slot.role == "parameter"]


def lfd2(data: Data, **options: Any) -> Lfd2:
    forecaster = fitted(data, "lfd2", **options)
    assert isinstance(forecaster, Lfd2)
    return forecaster


def delta(forecaster: Lfd2) -> np.ndarray:
    return forecaster.tensors()["delta"].numpy()


def rows_of(data: Data, columns: slice) -> tuple[np.ndarray, np.ndarray]:
    """The dense problem in float64: basis [rows, 3] and displacements [rows, H], all runs below each other."""
    weights_BTD = data.weights_BTD[..., columns].double().numpy()
    count = len(data.steps_C)
    first, last, truth = weights_BTD[:, 0], weights_BTD[:, count - 1], weights_BTD[:, count:]
    basis = np.stack([first, last - first, np.ones_like(first)], axis=-1).reshape(-1, 3)
    return basis, (truth - last[:, None]).transpose(0, 2, 1).reshape(-1, truth.shape[1])


def scale_of(data: Data) -> np.ndarray:
    """Each parameter's s: root mean square of its tensor's w_n − w_0; of all where the tensor does not move."""
    moved = rows_of(data, slice(0, PARAMETERS))[0][:, 1].reshape(-1, PARAMETERS)
    scale = np.empty(PARAMETERS)
    for slot in MOVING:
        own = np.sqrt((moved[:, slot.offset : slot.stop] ** 2).mean())
        scale[slot.offset : slot.stop] = own or np.sqrt((moved**2).mean())
    return scale


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


cuts = st.lists(st.integers(1, LAYOUT.size - 1), max_size=6, unique=True)
groups = st.permutations(range(5)).flatmap(
    lambda order: st.integers(0, 5).map(lambda at: [part for part in (order[:at], order[at:]) if part])
)


@given(cuts=cuts, groups=groups, seed=st.integers(0, 1000), bias=st.booleans(), ridge=st.sampled_from([0.0, 1e-12]))
def test_squared_is_dense_least_squares(
    cuts: list[int], groups: list[list[int]], seed: int, bias: bool, ridge: float
) -> None:
    data = drifting(seed)
    config = Lfd2.Config(bias=bias, ridge=ridge)
    forecaster = solve(Lfd2(config), data.problem(), data.passes(cuts, groups))
    basis, targets = rows_of(data, slice(0, PARAMETERS))
    expected = np.linalg.lstsq(basis[:, : 3 if bias else 2], targets, rcond=None)[0]
    assert relative(delta(forecaster)[0, : len(expected)], expected) < 1e-10
    assert bias or not delta(forecaster)[0, 2].any()


@given(cuts=cuts, groups=groups, seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_scaled_and_grouped_are_dense_least_squares(cuts: list[int], groups: list[list[int]], seed: int) -> None:
    data = drifting(seed)
    passes, problem = data.passes(cuts, groups), data.problem()

    basis, targets = rows_of(data, slice(0, PARAMETERS))
    scale = np.tile(scale_of(data), data.runs)[:, None]
    scaled = np.concatenate([basis[:, :2] / scale, basis[:, 2:]], axis=1)
    expected = np.linalg.lstsq(scaled, targets / scale, rcond=None)[0]
    found = delta(solve(Lfd2(Lfd2.Config(scale="tensor")), problem, passes))
    for index, slot in enumerate(MOVING):
        own = expected * np.array([1, 1, scale_of(data)[slot.offset]])[:, None]
        assert relative(found[index], own) < 1e-9

    found = delta(solve(Lfd2(Lfd2.Config(groups="tensor")), problem, passes))
    for index, slot in enumerate(MOVING):
        basis, targets = rows_of(data, slice(slot.offset, slot.stop))
        # Constant starts and frozen tensors leave the solution open, but not what it forecasts.
        expected = basis @ np.linalg.lstsq(basis, targets, rcond=None)[0]
        assert np.abs(basis @ found[index] - expected).max() < 1e-9
    assert not found[[s.name for s in MOVING].index("frozen")].any()


def test_buffers_follow_the_map_of_all(data: Data) -> None:
    pooled = delta(lfd2(data))[0]
    for options in ({"groups": "tensor"}, {"groups": "tensor", "scale": "tensor"}):
        buffer = delta(lfd2(data, **options))[-1]
        assert relative(buffer[:2], pooled[:2]) < (1e-12 if len(options) == 1 else 0.5)
    forecast_BHD = lfd2(data).forecast(data.prefix(), data.steps_H).double().numpy()
    basis, _ = rows_of(data, slice(PARAMETERS, LAYOUT.size))
    last = data.prefix().weights_BCD[:, -1, PARAMETERS:].double().numpy()
    expected = (basis @ pooled).reshape(data.runs, -1, len(data.steps_H)).transpose(0, 2, 1) + last[:, None]
    np.testing.assert_allclose(forecast_BHD[..., PARAMETERS:], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_ridge_is_a_penalty_in_centred_lengths(data: Data, ridge: float) -> None:
    basis, targets = rows_of(data, slice(0, PARAMETERS))
    lengths = np.linalg.norm(basis[:, :2] - basis[:, :2].mean(0), axis=0)
    penalty = np.concatenate([np.sqrt(ridge) * np.diag(lengths), np.zeros((2, 1))], axis=1)
    expected = np.linalg.lstsq(np.concatenate([basis, penalty]), np.pad(targets, ((0, 2), (0, 0))), rcond=None)[0]
    assert relative(delta(lfd2(data, ridge=ridge))[0], expected) < 1e-10


def test_nearly_collinear_and_large_weights() -> None:
    """w_n within 1e-5 of w_0, at weights around 100: least squares in (w_0, w_n, 1) has lost all digits there."""
    generator = torch.Generator().manual_seed(0)
    layout = layout_of([("w", (500,), "float64", "parameter")])
    first_BD = 100 + torch.randn(4, 500, generator=generator).double()
    moved_BD = 1e-5 * torch.randn(4, 500, generator=generator).double()
    weights = torch.stack([first_BD, first_BD + moved_BD, first_BD + 3 * moved_BD + 1e-6], dim=1)
    data = Data(layout, (0, 10), (30,), weights)
    forecast_BHD = lfd2(data).forecast(data.prefix(), (30,))
    moved = (weights[:, 2] - weights[:, 1]).abs().max()
    assert (forecast_BHD[:, 0] - weights[:, 2]).abs().max() < 1e-7 * moved


def test_nothing_moves() -> None:
    data = drifting(seed=0)
    still = replace(data, weights_BTD=data.weights_BTD[:, :1].repeat(1, data.weights_BTD.shape[1], 1))
    for options in ({}, {"loss": "l1"}, {"scale": "tensor"}, {"groups": "tensor"}, {"beta": 1.0}, {"map": "dense"}):
        forecast_BHD = fitted(still, "lfd2", **options).forecast(still.prefix(), still.steps_H)
        assert torch.equal(forecast_BHD, still.weights_BTD[:, len(still.steps_C) :])


def least_absolute(basis: np.ndarray, target: np.ndarray) -> float:
    rows, unknowns = basis.shape
    result = linprog(
        np.r_[np.zeros(unknowns), np.ones(2 * rows)],
        A_eq=scipy.sparse.hstack([basis, scipy.sparse.eye(rows), -scipy.sparse.eye(rows)]),
        b_eq=target,
        bounds=[(None, None)] * unknowns + [(0, None)] * (2 * rows),
        method="highs",
    )
    assert result.success
    return float(result.fun)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [True, False])
def test_l1_reaches_the_linear_programme(seed: int, bias: bool) -> None:
    data = drifting(seed)
    basis, targets = rows_of(data, slice(0, PARAMETERS))
    found = lfd2(data, loss="l1", bias=bias)
    for h in range(len(data.steps_H)):
        best = least_absolute(basis[:, : 3 if bias else 2], targets[:, h])
        own = np.abs(targets[:, h] - basis @ delta(found)[0, :, h]).sum()
        squared = np.abs(targets[:, h] - basis @ delta(lfd2(data, bias=bias))[0, :, h]).sum()
        assert own <= best * (1 + 5e-5)
        assert own < squared


def test_l1_ignores_outliers() -> None:
    data = drifting(seed=0)
    weights_BTD = data.weights_BTD.clone()
    first, last = weights_BTD[:, 0], weights_BTD[:, 4]
    weights_BTD[:, 5:] = (last + 0.5 * (last - first))[:, None]
    weights_BTD[:, 5:, ::10] += 7
    wild = replace(data, weights_BTD=weights_BTD)
    np.testing.assert_allclose(delta(lfd2(wild, loss="l1"))[0], [[0] * 4, [0.5] * 4, [0] * 4], atol=1e-5)
    assert np.abs(delta(lfd2(wild))[0, 2]).max() > 0.5


@pytest.mark.parametrize("options", [{"groups": "tensor"}, {"scale": "tensor"}])
def test_l1_of_tensors(data: Data, options: dict[str, Any]) -> None:
    found = delta(lfd2(data, loss="l1", tolerance=1e-8, **options))
    scale = scale_of(data) if "scale" in options else np.ones(PARAMETERS)
    basis, targets = rows_of(data, slice(0, PARAMETERS))
    basis, targets = basis.reshape(data.runs, -1, 3), targets.reshape(data.runs, PARAMETERS, -1)
    if "scale" in options:
        scaled = np.concatenate([basis[..., :2] / scale[:, None], basis[..., 2:]], axis=-1).reshape(-1, 3)
        best = least_absolute(scaled, (targets[..., 1] / scale).reshape(-1))
    else:
        best = sum(
            least_absolute(
                basis[:, slot.offset : slot.stop].reshape(-1, 3), targets[:, slot.offset : slot.stop, 1].reshape(-1)
            )
            for slot in MOVING
        )
    own = sum(
        np.abs(targets[:, p, 1] - basis[:, p] @ found[index, :, 1]).sum() / scale[p]
        for index, slot in enumerate(MOVING)
        for p in range(slot.offset, slot.stop)
    )
    assert best * (1 - 1e-9) <= own <= best * (1 + 1e-5)


def test_passes_end(data: Data) -> None:
    passes: list[int] = []
    for limit in (1, 3, 50):
        last = [0]
        config = Lfd2.Config(loss="l1", max_passes=limit)

        def report(count: int, taken: int, last: list[int] = last) -> None:
            assert taken == data.runs * LAYOUT.size * 9
            last[0] = count

        solve(Lfd2(config), data.problem(), data.passes(), report=report)
        passes.append(last[0])
    assert passes[:2] == [1, 3]
    assert 3 < passes[2] < 50


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sums_of_targets_in_parts_are_those_of_whole_blocks(dtype: torch.dtype) -> None:
    layout = layout_of([("long", (70_000,), "float32", "parameter"), ("short", (9,), "float32", "parameter")])
    generator = torch.Generator().manual_seed(0)
    weights_BTD = torch.randn(2, 7, layout.size, generator=generator).mul_(0.1).add_(0.3).to(dtype)
    steps = tuple(range(7))
    problem = Problem(
        layout=layout, coordinates=layout.size, runs=2, steps_C=steps[:2], steps_H=steps[2:], memory=1 << 30
    )
    whole, parts = (SquaredSums(problem, absolute=True, ranges=True) for _ in range(2))
    bounds = [(0, 1000), (1000, 68_000), (68_000, layout.size)]
    prefixes = [
        Prefix(weights_BCD=weights_BTD[:, :2, a:b], steps_C=steps[:2], layout=layout, start=a, runs_B=(0, 1))
        for a, b in bounds
    ]
    for prefix, (a, b) in zip(prefixes, bounds, strict=True):
        whole.add(prefix, weights_BTD[:, 2:, a:b])
    for together in ((0, 1), (2,)):  # blocks side by side, as a thread reads them
        for first, last in ((0, 2), (2, 3), (3, 5)):
            for index in together:
                a, b = bounds[index]
                parts.add(prefixes[index], weights_BTD[:, 2 + first : 2 + last, a:b], first)
    exact = weights_BTD.double()
    moved_BHD = exact[:, 2:] - exact[:, 1:2]
    # float32 sums of 70,000 squares: processors with eight lanes lose twice as much as those with sixteen, 1.9e-6
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 3e-6}[dtype]
    for slot, tensor in enumerate(layout.floats):
        columns = slice(tensor.offset, tensor.stop)
        truth = moved_BHD[..., columns].square().sum(-1)
        torch.testing.assert_close(whole.squares_RSH[:, slot], truth, rtol=rounding, atol=0)
        assert torch.equal(parts.products_RSPQ[:, slot, :, :3], whole.products_RSPQ[:, slot, :, :3])
    for name in ("products_RSPQ", "squares_RSH", "absolutes_SH"):
        scale = float(getattr(whole, name).abs().max())
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=rounding, atol=scale * rounding)
    assert whole.ranges is not None
    assert parts.ranges is not None
    for name in ("low_SQ", "high_SQ"):
        assert torch.equal(getattr(parts.ranges, name), getattr(whole.ranges, name))
    torch.testing.assert_close(parts.ranges.moments_S3H, whole.ranges.moments_S3H, rtol=1e-12, atol=0)


def dense_growth(data: Data, coefficients_3H: Tensor) -> Tensor:
    """L_grad on whole forecast vectors, in units of the root mean square displacement."""
    weights_BTD = data.weights_BTD[..., :PARAMETERS].double()
    count = len(data.steps_C)
    first, last, truth = weights_BTD[:, 0], weights_BTD[:, count - 1], weights_BTD[:, count:]
    rms = (truth - last[:, None]).square().mean().sqrt()
    basis_BD3 = torch.stack([first, last - first, torch.ones_like(first)], dim=-1)
    forecast_BHD = last[:, None] + (basis_BD3 @ coefficients_3H).mT
    gaps = torch.tensor([data.steps_C[-1], *data.steps_H]).double().diff()
    updates_BHD = torch.cat([last[:, None], forecast_BHD], dim=1).diff(dim=1)
    speeds_BH = updates_BHD.square().mean(dim=-1).sqrt() / (gaps / gaps.mean())
    return (speeds_BH.diff(dim=1).clamp(min=0).sum(dim=1).mean()) / rms


def dense_loss(data: Data, coefficients_3H: Tensor, beta: float, l1: bool) -> Tensor:
    basis, targets = (torch.from_numpy(array) for array in rows_of(data, slice(0, PARAMETERS)))
    residuals = targets - basis @ coefficients_3H
    relative = residuals.abs().sum() / targets.abs().sum() if l1 else residuals.square().sum() / targets.square().sum()
    return relative + beta * dense_growth(data, coefficients_3H)


def growing(seed: int) -> Data:
    """Runs whose motion speeds up, so that the hinge is at work."""
    data = drifting(seed)
    last = data.weights_BTD[:, 4:5]
    moved = last - data.weights_BTD[:, :1]
    noise = 0.05 * torch.randn(data.runs, 4, LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    growth = torch.tensor([0.2, 0.6, 1.5, 3.0])[None, :, None]
    future = last + growth * moved * torch.linspace(0.5, 1.5, data.runs)[:, None, None] + noise
    return replace(data, weights_BTD=torch.cat([data.weights_BTD[:, :5], future], dim=1))


@pytest.mark.parametrize("seed", range(3))
def test_growth_and_its_gradient_are_those_of_whole_vectors(seed: int) -> None:
    data = growing(seed)
    sums = Lfd2(Lfd2.Config()).sums(data.problem())
    assert isinstance(sums, SquaredSums)
    for block in data.passes((10, 70), ((1, 2), (0, 3, 4)))():
        sums.add(*block)
    square = float(sums.squares_RSH.sum()) / (data.runs * 4)
    grams_RKPP = sums.products_RSPQ[..., :3].sum(1, keepdim=True) / square
    gaps_H = torch.tensor([60.0, 80, 100, 130, 160]).double().diff()
    coefficients = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).double()
    one, two = coefficients.clone().requires_grad_(), coefficients.clone().requires_grad_()
    found, expected = update_growth(one[None], grams_RKPP, gaps_H / gaps_H.mean()), dense_growth(data, two)
    assert float(expected.detach()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["squared", "l1"])
def test_decay_lowers_growth_and_minimises(loss: str) -> None:
    data = growing(0)
    plain = lfd2(data, loss=loss)
    growths = [float(dense_growth(data, torch.from_numpy(delta(plain)[0])))]
    for beta in (0.02, 0.2, 2.0) if loss == "squared" else (0.02, 0.3):
        forecaster = lfd2(data, loss=loss, beta=beta, max_passes=15)
        own = torch.from_numpy(delta(forecaster)[0])
        growths.append(float(dense_growth(data, own)))
        assert forecaster.update_growth == pytest.approx(growths[-1], rel=1e-6, abs=1e-9)
        reached = float(dense_loss(data, own, beta, loss == "l1"))
        assert reached <= float(dense_loss(data, torch.from_numpy(delta(plain)[0]), beta, loss == "l1"))
        # An independent search from the solution finds nothing lower near it.
        other = minimize(
            lambda x, beta=beta: float(dense_loss(data, torch.from_numpy(x.reshape(3, 4)), beta, loss == "l1")),
            own.numpy().ravel(),
            method="Nelder-Mead",
            options={"maxfev": 1000, "xatol": 1e-7, "fatol": 1e-10},
        )
        assert reached <= other.fun * (1 + 2e-3)
    assert growths == sorted(growths, reverse=True)
    assert growths[-1] < 0.5 * growths[0]


def test_decay_of_one_target_is_refused(data: Data) -> None:
    with pytest.raises(UsageError, match=r"beta = 0\.5 needs at least 2 target steps, found 1"):
        Lfd2(Lfd2.Config(beta=0.5)).sums(replace(data.problem(), steps_H=(80,)))


@given(seed=st.integers(0, 1000), size=st.integers(1, 6), runs=st.integers(2, 40), bias=st.booleans())
@settings(max_examples=25)
def test_dense_is_least_squares_in_both_forms(seed: int, size: int, runs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of([("w", (size,), "float64", "parameter"), ("running", (2,), "float64", "buffer")])
    data = Data(layout, (0, 10), (20, 30), torch.randn(runs, 4, size + 2, generator=generator).double())
    problem = data.problem()
    forecasts = []
    for sums, solution in ((GramSums(problem), solve_gram), (RowSums(problem), solve_rows)):
        for group in (range(1, runs), [0]):
            sums.add(*data.block(group, 0, layout.size))
        found = solution(sums, problem, ridge=0.0, bias=bias)
        forecasts.append(found.forecast(data.prefix(), [0, 1], 2).numpy())
    np.testing.assert_allclose(forecasts[0], forecasts[1], rtol=1e-6, atol=1e-6)
    weights = data.weights_BTD.numpy()
    basis = np.concatenate([weights[:, 0, :size], (weights[:, 1] - weights[:, 0])[:, :size]], axis=1)
    basis = np.concatenate([basis, np.ones((runs, 1))], axis=1) if bias else basis
    for h in range(2):
        target = (weights[:, 2 + h] - weights[:, 1])[:, :size]
        expected = basis @ np.linalg.lstsq(basis, target, rcond=None)[0] + weights[:, 1, :size]
        np.testing.assert_allclose(forecasts[1][:, h, :size], expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(forecasts[1][..., size:], np.repeat(weights[:, 1:2, size:], 2, axis=1))


def test_dense_maps_generalise_alike() -> None:
    """Fewer runs than columns: both forms choose the same of the many maps, seen on runs they were not fitted on."""
    data = drifting(seed=4, runs=6, dtype=torch.float64)
    problem, held_out = data.problem(), drifting(seed=9, dtype=torch.float64).prefix()
    forecasts = []
    for sums, solution in ((GramSums(problem), solve_gram), (RowSums(problem), solve_rows)):
        sums.add(*data.block(range(6), 0, LAYOUT.size))
        found = solution(sums, problem, ridge=1e-3, bias=True)
        forecasts.append(found.forecast(held_out, [0, 1, 2, 3], 4))
    torch.testing.assert_close(forecasts[0], forecasts[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("runs", "copies"), [(30, 2), (10**7, 6)])
def test_dense_names_the_largest_size(data: Data, runs: int, copies: int) -> None:
    problem = replace(data.problem(memory=10**6), coordinates=10**6, runs=runs)
    forecaster = Lfd2(Lfd2.Config(map="dense"))
    with pytest.raises(ResourceError) as caught:
        forecaster.sums(problem)
    largest = int(str(caught.value).rsplit("D = ", 1)[1].rstrip("."))
    assert 0 < largest < 10**6
    held = vars(forecaster.sums(replace(problem, coordinates=largest)))
    # Rows are solved in parts, into a solution of the same size; the Gram matrix as it is.
    held = copies * sum(t.nbytes for t in held.values() if isinstance(t, Tensor))
    assert 0.8 * problem.memory < held <= problem.memory
    with pytest.raises(ResourceError):
        forecaster.sums(replace(problem, coordinates=largest + 1))


def test_a_map_applies_from_other_starts(data: Data) -> None:
    for options in ({}, {"map": "dense"}, {"groups": "tensor"}):
        forecaster = lfd2(data, **options)
        prefix = data.prefix()
        later = replace(prefix, steps_C=tuple(step + 500 for step in prefix.steps_C))
        assert torch.equal(forecaster.forecast(later, (600, 660)), forecaster.forecast(prefix, (100, 160)))
        with pytest.raises(UsageError, match="fitted to forecast 580, 600, 630, 660 steps; step 610 is not among"):
            forecaster.forecast(later, (610,))
        with pytest.raises(UsageError, match=r"fitted on a context of 60 steps \(0 to 60\), but this one spans 40"):
            forecaster.forecast(replace(prefix, steps_C=(20, 30, 40, 50, 60)), (80,))


def test_same_size_other_network(data: Data) -> None:
    slots = [replace(slot, name="tail.weight") if slot.name == "head.weight" else slot for slot in LAYOUT.slots]
    other = replace(data.prefix(), layout=type(LAYOUT)(tuple(slots)))
    with pytest.raises(UsageError, match=r"'head.weight' of shape \[5, 9\] where this one has 'tail.weight'"):
        lfd2(data, groups="tensor").forecast(other, (80,))
    assert isinstance(slots[0], Slot)


@given(cuts=cuts, rows=st.integers(1, 400_000))
@settings(max_examples=20)
def test_tiles_cover_each_parameter_once(cuts: list[int], rows: int) -> None:
    data = drifting(seed=0)
    seen = dict.fromkeys(range(len(LAYOUT.floats)), 0)
    for prefix, truth_BHD in data.passes(cuts)():
        for tile in tiles(prefix, truth_BHD, PARAMETERS, rows):
            seen[tile.slot] += len(tile.runs_B) * tile.columns_BQN.shape[-1]
            assert tile.columns_BQN.dtype == torch.float64
    assert seen == {i: data.runs * slot.size * (slot.role == "parameter") for i, slot in enumerate(LAYOUT.floats)}
