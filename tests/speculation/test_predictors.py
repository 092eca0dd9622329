"""Predictors of leaps against independent arithmetic, and what all of them have in common."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from farcli.artefact import load
from farcli.errors import StoreError, UsageError
from farcli.layout import Layout, Slot, layout_of
from farcli.speculation.arms import build_predictor
from farcli.speculation.base import Moments, Observed
from farcli.speculation.predictors.spectral import orthogonal
from farcli.speculation.table import PREDICTORS
from farcli.store import TrajectoryWriter
from farcli.verbs.fit import fit

LAYOUT = layout_of(
    [
        ("table.weight", (7, 3), "float32", "parameter"),
        ("map.weight", (4, 6), "float32", "parameter"),
        ("conv.weight", (5, 2, 3, 3), "float32", "parameter"),
        ("bias", (6,), "float32", "parameter"),
    ],
    {},
)
WITHOUT_FIT = ("linear", "quadratic", "lsq-line", "ema", "lawa", "dmd", "aitken")


def observed(points: int = 6, seed: int = 0, layout: Layout = LAYOUT, every: int = 10) -> Observed:
    """A history of random displacements."""
    random = np.random.default_rng(seed)
    steps = random.normal(size=(points, layout.size)).cumsum(0).astype(np.float32)
    weights = [torch.from_numpy(row) for row in steps]
    return Observed(
        steps_C=tuple(range(every, every * (points + 1), every)),
        weights_CD=weights,
        average_D=torch.from_numpy(steps[-3:].mean(0)),
        layout=layout,
        tables=frozenset({"table.weight"}),
        rate=0.1,
        moments=lambda: Moments(
            first_D=torch.full((layout.size,), 0.2),
            second_D=torch.full((layout.size,), 0.04),
            updates=10_000,
            betas=(0.9, 0.999),
            epsilon=1e-8,
        ),
        gradient=lambda at_D: (float((at_D**2).sum() / 2), at_D.clone()),
    )


@pytest.mark.parametrize("name", [*PREDICTORS, *WITHOUT_FIT])
class TestEveryPredictor:
    def test_proposes_finite_moves_and_leaves_the_history_alone(self, name: str) -> None:
        predictor = build_predictor(name, {})
        seen = observed()
        before = [each.clone() for each in seen.weights_CD]
        for earlier in range(1, 6):  # some have to remember a few before they move
            predictor.propose(observed(seed=earlier), ahead=10, strength=1.0)
        proposal = predictor.propose(seen, ahead=10, strength=1.0)
        assert proposal.move_D.shape == (LAYOUT.size,)
        assert torch.isfinite(proposal.move_D).all()
        assert proposal.move_D.norm() > 0
        assert all(torch.equal(a, b) for a, b in zip(before, seen.weights_CD, strict=True))
        assert len(seen.weights_CD) >= predictor.context

    def test_strength_scales_the_move(self, name: str) -> None:
        moves = []
        for strength in (1.0, 0.5, 0.0):
            predictor = build_predictor(name, {})
            for seed in range(1, 6):  # some have to remember a few before they move
                predictor.propose(observed(seed=seed), ahead=10, strength=0.0)
            moves.append(predictor.propose(observed(), ahead=10, strength=strength).move_D)
        whole, half, none = moves
        assert whole.norm() > 0
        torch.testing.assert_close(half, whole / 2)
        assert not none.any()

    def test_goes_on_from_its_state(self, name: str) -> None:
        one, other = build_predictor(name, {}), build_predictor(name, {})
        for seed in range(5):
            one.propose(observed(seed=seed), ahead=10, strength=1.0)
        other.restore({key: value.clone() for key, value in one.state().items()})
        last = observed(seed=9)
        assert torch.equal(
            one.propose(last, ahead=10, strength=1.0).move_D, other.propose(last, ahead=10, strength=1.0).move_D
        )


def test_outer_is_nesterov_momentum_on_displacements() -> None:
    predictor = build_predictor("outer", {"momentum": "0.5", "rate": "0.75"})
    momentum = np.zeros(LAYOUT.size)
    for seed in range(4):
        seen = observed(points=2, seed=seed)
        done = (seen.weights_CD[1] - seen.weights_CD[0]).double().numpy()
        momentum = 0.5 * momentum + done
        anchor = seen.weights_CD[0].double().numpy()
        wanted = anchor + 0.75 * (done + 0.5 * momentum)
        move = predictor.propose(seen, ahead=10, strength=1.0).move_D.double().numpy()
        np.testing.assert_allclose(seen.weights_CD[1].double().numpy() + move, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (64, 64), (10, 200)])
def test_orthogonal_evens_singular_values_and_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, before, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonal(matrix) @ vh.T
    diagonal = rotated.diagonal()
    assert diagonal[before > 0.02 * matrix.norm()].min() > 0.6
    assert diagonal.max() < 1.3
    torch.testing.assert_close(rotated, torch.diag(diagonal), atol=1e-4, rtol=0)


def test_spectral_goes_as_far_as_training_but_evenly() -> None:
    seen = observed(points=2)
    move_D = build_predictor("spectral", {"gain": "1"}).propose(seen, ahead=10, strength=1.0).move_D
    done_D = seen.displacement()
    for slot in LAYOUT.floats:
        rows = slice(slot.offset, slot.stop)
        if slot.name in ("table.weight", "bias"):
            assert not move_D[rows].any()
            continue
        after = (done_D + move_D)[rows].view(slot.shape[0], -1)
        torch.testing.assert_close(after.norm(), done_D[rows].norm())
        before = torch.linalg.svdvals(done_D[rows].view(slot.shape[0], -1))
        singular = torch.linalg.svdvals(after)
        assert singular.max() / singular.min() < before.max() / before.min()


def test_spectral_refuses_a_network_without_matrices() -> None:
    predictor = build_predictor("spectral", {})
    predictor.require(observed(), every=10, ahead=10)
    vectors = layout_of([("table.weight", (7, 3), "float32", "parameter"), ("b", (6,), "float32", "parameter")], {})
    with pytest.raises(UsageError, match=r"the network has none: table.weight \[7, 3\], b \[6\]\."):
        predictor.require(observed(layout=vectors), every=10, ahead=10)


def test_spectral_knows_what_it_costs() -> None:
    predictor, seen = build_predictor("spectral", {}), observed(points=2)
    with FlopCounterMode(display=False) as counter:
        predictor.propose(seen, ahead=10, strength=1.0)
    assert predictor.operations(LAYOUT, seen.tables) == counter.get_total_flops()


def test_moments_take_adams_next_steps_at_once() -> None:
    """A gradient that never changes: Adam then goes lr·sign(g) a step, and K steps are K times that."""
    weights = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    gradient = torch.tensor([1.0, -2.0, 0.5])
    for _ in range(50):
        weights.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state[weights]
    seen = replace(
        observed(layout=layout_of([("w", (3,), "float32", "parameter")], {})),
        moments=lambda: Moments(
            first_D=state["exp_avg"],
            second_D=state["exp_avg_sq"],
            updates=int(state["step"]),
            betas=(0.9, 0.999),
            epsilon=1e-8,
        ),
    )
    move_D = build_predictor("moments", {}).propose(seen, ahead=7, strength=1.0).move_D
    before = weights.detach().clone()
    for _ in range(7):
        weights.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(move_D, weights.detach() - before, rtol=1e-4, atol=1e-5)


def test_anderson_finds_the_fixed_point_of_a_linear_iteration() -> None:
    random = np.random.default_rng(3)
    layout = layout_of([("w", (3,), "float64", "parameter")], {})
    basis = np.linalg.qr(random.normal(size=(3, 3)))[0]
    step, shift = basis @ np.diag([0.9, 0.6, -0.3]) @ basis.T, random.normal(size=3)
    points = [random.normal(size=3)]
    for _ in range(4):
        points.append(step @ points[-1] + shift)
    fixed = np.linalg.solve(np.eye(3) - step, shift)
    seen = replace(
        observed(points=5, layout=layout),
        weights_CD=[torch.from_numpy(point) for point in points],
        average_D=torch.from_numpy(points[-1]),
    )
    move_D = build_predictor("anderson", {"points": "5", "ridge": "1e-12"}).propose(seen, 10, 1.0).move_D
    np.testing.assert_allclose(points[-1] + move_D.numpy(), fixed, atol=1e-4)


def test_merged_line_keeps_the_averages_pace() -> None:
    direction = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(1))
    predictor = build_predictor("merged-line", {"points": "4", "share": "0.5"})
    moved = torch.zeros(LAYOUT.size)
    for index in range(6):
        seen = replace(observed(points=2), average_D=direction * index + moved)
        move_D = predictor.propose(seen, ahead=10, strength=1.0).move_D
        if index < 3:
            assert not move_D.any()
        else:
            torch.testing.assert_close(move_D, direction * 0.5, rtol=1e-3, atol=1e-4)
        moved += move_D  # the engine moves the average along


def test_merged_line_gathers_averages_although_its_first_proposals_are_rejected() -> None:
    predictor = build_predictor("merged-line", {"points": "4"})
    for index in range(4):
        seen = replace(observed(points=2), average_D=torch.full((LAYOUT.size,), float(index)))
        move_D = predictor.propose(seen, ahead=10, strength=1.0).move_D
        predictor.rejected()
    assert move_D.norm() > 0


def test_loss_span_goes_down_within_the_span() -> None:
    seen = observed()
    move_D = build_predictor("loss-span", {}).propose(seen, ahead=10, strength=1.0).move_D
    before, _ = seen.gradient(seen.now)
    after, _ = seen.gradient(seen.now + move_D)
    assert after < before
    span = [b - a for a, b in zip(seen.weights_CD[-4:-1], seen.weights_CD[-3:], strict=True)]
    span.append(seen.average_D - seen.now)
    solution = torch.linalg.lstsq(torch.stack(span, 1), move_D[:, None])
    torch.testing.assert_close(torch.stack(span, 1) @ solution.solution, move_D[:, None], atol=1e-3, rtol=1e-3)


def test_linear_leaps_k_steps_along_the_last_displacement() -> None:
    seen = observed(every=10)
    move_D = build_predictor("linear", {}).propose(seen, ahead=25, strength=1.0).move_D
    torch.testing.assert_close(move_D, seen.displacement() * 2.5)


def test_unknown_and_unfitted_predictors_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'spectral'"):
        build_predictor("spectrall", {})
    with pytest.raises(UsageError, match="has to be fitted"):
        build_predictor("lfd2", {})
    with pytest.raises(UsageError, match="momentum = 1"):
        build_predictor("outer", {"momentum": "1"})


def test_lfd2_online_continues_geometric_decay_exactly() -> None:
    """w_i = v + a^i u, another a in each tensor: three points tell it, and K steps ahead follow."""
    random = np.random.default_rng(5)
    factors = np.concatenate(
        [np.full(slot.size, factor) for slot, factor in zip(LAYOUT.floats, (0.5, 0.8, 0.9, 0.2), strict=True)]
    )
    limit, first = random.normal(size=LAYOUT.size), random.normal(size=LAYOUT.size)
    points = [limit + factors**index * first for index in range(6)]
    seen = replace(observed(points=4), weights_CD=[torch.from_numpy(point).float() for point in points[:4]])
    move_D = build_predictor("lfd2-online", {}).propose(seen, ahead=20, strength=1.0).move_D
    np.testing.assert_allclose(points[3] + move_D.double().numpy(), points[5], atol=1e-5)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LFD-2 fitted on six networks of `LAYOUT` with a buffer, snapshots ten steps apart, 10 and 30 steps ahead."""
    home = tmp_path_factory.mktemp("fitted")
    random = np.random.default_rng(11)
    layout = Layout((*LAYOUT.slots, Slot(name="mean", shape=(4,), dtype="float32", offset=LAYOUT.size, role="buffer")))
    steps = list(range(0, 80, 10))
    limit, first = random.normal(size=(2, 6, layout.size))
    with TrajectoryWriter.create(home / "runs.zarr", layout, range(6), planned_steps=steps) as writer:
        for run in range(6):
            for place, step in enumerate(steps):
                noise = 0.01 * random.normal(size=layout.size)
                writer.append(step, (limit[run] + 0.8**place * first[run] + noise).astype(np.float32), run=run)
        writer.finish()
    fit("lfd2", [str(home / "runs.zarr")], home / "lfd2.safetensors", context=4, targets="40,60")
    return home / "lfd2.safetensors"


def test_a_fitted_forecaster_leaps_where_its_map_says(fitted: Path) -> None:
    predictor = build_predictor(str(fitted), {})
    assert predictor.context == 4
    seen = observed(points=6)
    coefficients = load(fitted).forecaster.coefficients()  # pyright: ignore[reportAttributeAccessIssue]
    for place, ahead in enumerate((10, 30)):
        a, b, c = (coefficients[place][key] for key in "abc")
        first, last = (seen.weights_CD[place].double().numpy() for place in (-4, -1))
        wanted = a * first + b * last + c - last
        move_D = predictor.propose(seen, ahead=ahead, strength=0.5).move_D.double().numpy()
        np.testing.assert_allclose(move_D, 0.5 * wanted, atol=1e-5)
        assert np.abs(move_D).max() > 0.01
    late = replace(seen, steps_C=(17, 20, 30, 40, 50, 60))  # goes on at any step, from even points on
    assert predictor.propose(late, ahead=10, strength=1.0).move_D.norm() > 0
    for steps in ((10, 20, 30, 37, 40, 50), (10, 20, 30, 40, 50, 53)):
        assert not predictor.propose(replace(seen, steps_C=steps), ahead=10, strength=1.0).move_D.any()


def test_a_fitted_forecaster_refuses_what_it_was_not_fitted_for(fitted: Path) -> None:
    predictor = build_predictor(str(fitted), {})
    predictor.require(observed(), every=10, ahead=30)
    with pytest.raises(UsageError, match=r"10, 30 steps ahead, and 20 is not among them") as caught:
        predictor.require(observed(), every=10, ahead=20)
    assert caught.value.hint is not None
    assert "--K 10" in caught.value.hint
    with pytest.raises(UsageError, match=r"snapshots 10 steps apart, but points are 5 apart") as caught:
        predictor.require(observed(), every=5, ahead=10)
    assert caught.value.hint is not None
    assert "--every 10" in caught.value.hint
    with pytest.raises(UsageError, match=r"was fitted on D = 145 parameters, but this network has D = 6"):
        predictor.require(observed(layout=layout_of([("w", (6,), "float32", "parameter")], {})), every=10, ahead=10)
    with pytest.raises(UsageError, match="fitted already"):
        build_predictor(str(fitted), {"points": "3"})
    with pytest.raises(StoreError, match="no such file"):
        build_predictor("nowhere.safetensors", {})


def test_forecasters_see_five_points_or_what_they_look_at_or_as_many_as_asked_for() -> None:
    contexts = {name: build_predictor(name, {}).context for name in ("linear", "quadratic", "lawa", "dmd", "lsq-line")}
    assert contexts == {"linear": 2, "quadratic": 3, "lawa": 5, "dmd": 5, "lsq-line": 5}
    predictor = build_predictor("lawa", {"points": "3", "latest": "9"})
    seen = observed(points=6)
    mean_D = torch.stack(list(seen.weights_CD[-3:])).mean(0)
    torch.testing.assert_close(seen.now + predictor.propose(seen, ahead=10, strength=1.0).move_D, mean_D)
