"""loss-lfd on losses whose least point is known."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from farcli.errors import ResourceError, UsageError
from farcli.fitting.solving import solve
from farcli.forecasters.base import Coupling, Known, Prefix, Problem, TrainingLoss
from farcli.forecasters.far import Far
from farcli.forecasters.loss_lfd import LossLfd, PrefixRows, believed, choose
from farcli.forecasters.whitening import whitened
from farcli.layout import layout_of

LAYOUT = layout_of([("one", (3,), "float32", "parameter"), ("two", (2,), "float32", "parameter")])
STEPS_C, STEPS_H = (0, 10, 20, 30), (40, 50)


@dataclass(frozen=True)
class Distance(TrainingLoss):
    """Squared distance to a point of each run."""

    points_RD: Tensor
    noise: float = 0.0
    batches: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]

    def at(self, weights_D: Tensor, run: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        kick_D = self.noise * torch.randn(len(weights_D), generator=generator)
        return (weights_D - self.points_RD[run] - kick_D).square().sum()


def fit(rows_RCD: Tensor, loss: TrainingLoss, truth_RHD: Tensor | None = None, **options: float) -> LossLfd:
    problem = Problem(layout=LAYOUT, coordinates=5, runs=len(rows_RCD), steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    config = LossLfd.Config(**options)  # pyright: ignore[reportArgumentType]
    forecaster = LossLfd(config).prepared(problem, Known(loss=lambda: loss))
    truth_RHD = rows_RCD[:, [-1, -1]] if truth_RHD is None else truth_RHD  # no motion, no drift
    return solve(forecaster, problem, lambda: [(prefix_of(rows_RCD), truth_RHD)])


def prefix_of(rows_RCD: Tensor) -> Prefix:
    runs_B = tuple(range(len(rows_RCD)))
    return Prefix(weights_BCD=rows_RCD, steps_C=STEPS_C, layout=LAYOUT, start=0, runs_B=runs_B)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_coefficients_are_those_of_least_loss() -> None:
    rows_RCD = normal(8, 4, 5).cumsum(1)
    first, before, previous, last = rows_RCD.unbind(1)
    points_RD = last + 0.3 * (last - first) - 0.2 * (last - previous) + 0.1 * (last - before)
    points_RD[:, 3:] = (last + 0.5 * (last - before))[:, 3:]
    fitted = fit(rows_RCD, Distance(points_RD), updates=300)
    found = torch.tensor([[row["a"], row["b"], row["c"]] for row in fitted.coefficients()])
    torch.testing.assert_close(found, torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.0, 0.5]]), atol=1e-2, rtol=0)
    forecast_BHD = fitted.forecast(prefix_of(rows_RCD), STEPS_H)
    torch.testing.assert_close(forecast_BHD, points_RD[:, None].expand(-1, 2, -1), atol=5e-2, rtol=0)
    assert fitted.notes()["gain_left_out"] > 0  # pyright: ignore[reportOperatorIssue]


def test_leaps_are_as_long_as_lowers_the_loss() -> None:
    """Forty times the last step, as on slowly trained networks: far beyond what so few updates reach from 0."""
    rows_RCD = normal(8, 4, 5, seed=6).cumsum(1)
    points_RD = rows_RCD[:, -1] + 40 * (rows_RCD[:, -1] - rows_RCD[:, -2])
    fitted = fit(rows_RCD, Distance(points_RD), updates=60)
    found = torch.tensor([[row["a"], row["b"], row["c"]] for row in fitted.coefficients()])
    torch.testing.assert_close(found, torch.tensor([[0.0, 40.0, 0.0]] * 2), atol=1.0, rtol=0)


def test_few_updates_get_further_at_a_higher_rate_in_far_too() -> None:
    rows_RCD = normal(8, 4, 5, seed=6).cumsum(1)
    first, _, previous, last = rows_RCD.unbind(1)
    points_RD = last + 0.9 * (last - first) - 1.4 * (last - previous)
    loss = Distance(points_RD)
    slow, fast = (fit(rows_RCD, loss, updates=30, lr=lr) for lr in (0.05, 0.2))
    missed = [(f.forecast(prefix_of(rows_RCD), (40,))[:, 0] - points_RD).square().mean() for f in (slow, fast)]
    assert missed[1] < missed[0] / 4
    problem = Problem(layout=LAYOUT, coordinates=5, runs=8, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    far = Far(Far.Config(method="loss", updates=30, lr=0.2)).prepared(problem, Known(loss=lambda: loss))
    far = solve(far, problem, lambda: [(prefix_of(rows_RCD), rows_RCD[:, [-1, -1]])])
    torch.testing.assert_close(*(f.forecast(prefix_of(rows_RCD), STEPS_H) for f in (far, fast)))


def test_w_n_is_kept_where_runs_left_out_gain_nothing() -> None:
    rows_RCD = normal(8, 4, 5, seed=1).cumsum(1)
    fitted = fit(rows_RCD, Distance(rows_RCD[:, -1], noise=1.0), updates=40)
    assert fitted.notes()["because"] == "no gain on runs left out: w_n is kept"
    assert torch.equal(fitted.forecast(prefix_of(rows_RCD), (40,))[:, 0], rows_RCD[:, -1])


def test_a_loss_that_is_not_finite_keeps_w_n() -> None:
    rows_RCD = normal(4, 4, 5, seed=2)
    fitted = fit(rows_RCD, Distance(torch.full((4, 5), torch.nan)), updates=5)
    assert torch.equal(fitted.forecast(prefix_of(rows_RCD), (40,))[:, 0], rows_RCD[:, -1])


def shared(runs: int, *, part: float, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Prefixes, and futures in which all runs go one way, but for a part of their own."""
    rows_RCD = normal(runs, 4, 5, seed=seed)
    own_RD = normal(runs, 5, seed=seed + 1)
    truth_RD = rows_RCD[:, -1] + normal(5, seed=seed + 2) + part * own_RD
    return rows_RCD, torch.stack([rows_RCD[:, -1], truth_RD], dim=1)


def test_the_drift_of_other_runs_is_a_direction_where_runs_go_one_way() -> None:
    rows_RCD, truth_RHD = shared(8, part=0.05)
    last_RD = rows_RCD[:, -1]
    drift_D = (truth_RHD[:, -1] - last_RD).mean(0)
    fitted = fit(rows_RCD, Distance(last_RD + 1.5 * drift_D), truth_RHD, updates=300)
    found = torch.tensor([[row[key] for key in "abcd"] for row in fitted.coefficients()])
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 0.0, 1.5]] * 2), atol=0.05, rtol=0)
    assert 0.9 < fitted.notes()["drift_explains"] < 1  # pyright: ignore[reportOperatorIssue]
    forecast_BHD = fitted.forecast(prefix_of(rows_RCD), STEPS_H)
    torch.testing.assert_close(forecast_BHD[:, 0], last_RD + 1.5 * drift_D, atol=0.1, rtol=0)
    problem = Problem(layout=LAYOUT, coordinates=5, runs=8, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    again = LossLfd.restore(fitted.config, problem, fitted.tensors())
    assert torch.equal(again.forecast(prefix_of(rows_RCD), STEPS_H), forecast_BHD)
    assert again.notes() == fitted.notes()
    part = prefix_of(rows_RCD[:, :, 2:4])  # as blocks come
    part = replace(part, start=2)
    assert torch.equal(again.forecast(part, STEPS_H), forecast_BHD[..., 2:4])


@pytest.mark.parametrize("seed", range(5))
def test_what_drift_explains_is_what_leaving_each_run_out_says(seed: int) -> None:
    rows_RCD, truth_RHD = shared(6, part=(0.1, 0.5, 1.0, 2.0, 5.0)[seed], seed=10 * seed)
    problem = Problem(layout=LAYOUT, coordinates=5, runs=6, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    rows = PrefixRows(problem)
    rows.add(prefix_of(rows_RCD), truth_RHD)
    moved_RD = truth_RHD[:, -1] - rows_RCD[:, -1]
    left = [moved_RD[[other for other in range(6) if other != run]].mean(0) for run in range(6)]
    for run in range(6):
        torch.testing.assert_close(rows.drift(range(6)).without(run), left[run])
    inside = (0, 2, 3)
    torch.testing.assert_close(rows.drift(inside, 1, 4).without(5), moved_RD[[0, 2, 3], 1:4].mean(0))
    torch.testing.assert_close(rows.drift(inside, 1, 4).without(2), moved_RD[[0, 3], 1:4].mean(0))
    error, motion = (moved_RD - torch.stack(left)).square().sum(), moved_RD.square().sum()
    assert rows.drift_explains == pytest.approx(float(1 - error / motion), abs=1e-5)


def test_without_a_common_way_there_is_no_drift() -> None:
    rows_RCD, truth_RHD = shared(8, part=20.0)
    fitted = fit(rows_RCD, Distance(rows_RCD[:, -1]), truth_RHD, updates=5)
    assert "drift" not in fitted.tensors()
    assert {*fitted.coefficients()[0]} == {"tensor", *"abc"}


EIGHT_C = (0, 5, 20, 30, 40, 50, 60, 70)


def trending(runs: int, seed: int = 11) -> tuple[Problem, Prefix, dict[str, Tensor]]:
    """A problem with a context of eight, its runs, and what is known of each beside its ends, computed one by one."""
    rows_RCD = normal(runs, 8, 5, seed=seed) * torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
    assert LossLfd(LossLfd.Config()).observed(EIGHT_C) == EIGHT_C
    problem = Problem(layout=LAYOUT, coordinates=5, runs=runs, steps_C=EIGHT_C, steps_H=(80,), memory=10**8)
    slopes = [np.polyfit(EIGHT_C, rows_CD.numpy(), 1)[0] * 70 for rows_CD in rows_RCD]
    slope_RD = torch.from_numpy(np.stack(slopes)).float()
    spread_RD = sum((rows_RCD[:, i + 1] - rows_RCD[:, i]) ** 2 for i in range(7)) / 7
    assert isinstance(spread_RD, Tensor)
    mean_D = torch.cat([part.mean().expand(part.shape[1]) for part in spread_RD.split([3, 2], dim=1)])
    last_RD = rows_RCD[:, -1]
    found = {
        "e": rows_RCD[:, 4:].mean(1) - last_RD,
        "f": rows_RCD.mean(1) - last_RD,
        "g": slope_RD,
        "h": slope_RD / (spread_RD / mean_D + 0.1),
        "i": torch.stack([
            torch.cat([
                whitened(slope_D[part], moved_MD[:, part], (size,)) for part, size in ((slice(3), 3), (slice(3, 5), 2))
            ])
            for slope_D, moved_MD in zip(slope_RD, rows_RCD.diff(dim=1), strict=True)
        ]),
    }  # fmt: skip
    return problem, replace(prefix_of(rows_RCD), steps_C=EIGHT_C), found


@pytest.mark.parametrize("letter", "efghi")
def test_averages_and_slopes_are_directions_of_long_contexts(letter: str) -> None:
    problem, prefix, known = trending(8)
    last_RD = prefix.weights_BCD[:, -1]
    loss = Distance(last_RD + torch.tensor([0.8, 0.8, 0.8, 0.5, 0.5]) * known[letter])
    forecaster = LossLfd(LossLfd.Config(updates=150)).prepared(problem, Known(loss=lambda: loss))
    fitted = solve(forecaster, problem, lambda: [(prefix, last_RD[:, None])])
    found = torch.tensor([[row[key] for key in "abcefghi"] for row in fitted.coefficients()])
    assert letter == "e" or (found[:, :3] == 0).all()  # a to c are fitted without f to i
    forecast_BHD = fitted.forecast(prefix, (80,))
    by_hand_RD = last_RD + sum(
        found[[0, 0, 0, 1, 1], column] * known[key] for column, key in enumerate("abcefghi") if key in known
    )
    torch.testing.assert_close(forecast_BHD[:, 0], by_hand_RD, atol=1e-4, rtol=1e-4)
    missed_D, due_D = forecast_BHD[:, 0] - loss.points_RD, last_RD - loss.points_RD
    assert missed_D.square().sum() < 0.02 * due_D.square().sum()
    again = LossLfd.restore(fitted.config, problem, fitted.tensors())
    assert torch.equal(again.forecast(prefix, (80,)), forecast_BHD)
    assert again.coupling is fitted.coupling is forecaster.coupling is Coupling.JOINT


def test_a_tensor_that_never_moves_has_no_quiet_coordinates() -> None:
    problem, prefix, _ = trending(8)
    prefix.weights_BCD[:, :, 3:] = prefix.weights_BCD[:, :1, 3:]
    last_RD = prefix.weights_BCD[:, -1]
    loss = Distance(prefix.weights_BCD.mean(1))
    forecaster = LossLfd(LossLfd.Config(updates=50)).prepared(problem, Known(loss=lambda: loss))
    fitted = solve(forecaster, problem, lambda: [(prefix, last_RD[:, None])])
    assert fitted.notes()["gain_left_out"] > 0  # pyright: ignore[reportOperatorIssue]
    assert fitted.tensors()["spread"][1] == 0
    torch.testing.assert_close(fitted.forecast(prefix, (80,))[:, 0, 3:], last_RD[:, 3:])


def test_averages_and_drifts_alone_are_what_they_say() -> None:
    problem, prefix, known = trending(8)
    last_RD, way_D = prefix.weights_BCD[:, -1], normal(5, seed=12)
    truth_RHD = (last_RD + way_D + 0.05 * normal(8, 5, seed=13))[:, None]
    rows = PrefixRows(problem)
    rows.add(prefix, truth_RHD)
    late_RD, whole_RD = last_RD + known["e"], last_RD + known["f"]
    for points_RD, expected_RD in ((late_RD, late_RD), (whole_RD, whole_RD), (last_RD + way_D, truth_RHD[:, 0])):
        loss = Distance(points_RD)
        forecaster = LossLfd(LossLfd.Config(updates=1)).prepared(problem, Known(loss=lambda loss=loss: loss))
        candidates = forecaster.solved(problem, rows).alone(rows)
        alone = max(candidates, key=lambda candidate: candidate.gain_left_out)
        forecast_BD = alone.forecast(prefix, (80,))[:, 0]
        drifts = expected_RD is not late_RD and expected_RD is not whole_RD
        tolerance = 0.2 if drifts else 1e-5  # a drift is the mean motion, not a run's own
        torch.testing.assert_close(forecast_BD, expected_RD, atol=tolerance, rtol=0)
        assert ((forecast_BD - last_RD).std(0) < 1e-6).all() == drifts


def test_without_trends_a_long_context_is_a_short_one() -> None:
    options = LossLfd.Config(trends=False)
    assert LossLfd(options).observed(EIGHT_C) == (0, 50, 60, 70)
    problem, prefix, _ = trending(8)
    with pytest.raises(ResourceError, match=r"loss-lfd: 8 runs of D = 5 parameters need 2.88 kB.* allows D = 3"):
        PrefixRows.require_room(replace(problem, memory=2000))
    few = replace(problem, steps_C=LossLfd(options).observed(EIGHT_C))
    PrefixRows.require_room(replace(few, memory=2000))
    seen = replace(prefix, weights_BCD=prefix.weights_BCD[:, [0, 5, 6, 7]], steps_C=few.steps_C)
    last_RD = seen.weights_BCD[:, -1]
    loss = Distance(last_RD + 0.5 * (last_RD - seen.weights_BCD[:, -2]))
    forecaster = LossLfd(options).prepared(few, Known(loss=lambda: loss))
    fitted = solve(forecaster, few, lambda: [(seen, last_RD[:, None])])
    assert {*fitted.coefficients()[0]} == {"tensor", *"abc"}
    assert fitted.notes()["gain_left_out"] > 0  # pyright: ignore[reportOperatorIssue]
    far = Far(Far.Config(trends=False)).prepared(problem, Known(loss=lambda: loss))
    assert far.observed(EIGHT_C) == few.steps_C
    assert Far(Far.Config()).prepared(problem, Known(loss=lambda: loss)).observed(EIGHT_C) == EIGHT_C


@pytest.mark.parametrize(
    ("more", "chosen"),
    [
        ([0.5] * 20, 0),  # less, beyond doubt
        ([1.2, 0.75] * 10, 1),  # less by .055 on average, within the error of that, and harms nobody
        ([1.2, 0.85] * 9 + [1.2, -0.1], 1),  # or one of twenty
        ([1.2, 0.85] * 9 + [-0.1, -0.1], 0),
    ],
)
def test_a_leap_that_harms_few_is_chosen_where_it_gains_about_as_much(more: list[float], chosen: int) -> None:
    best_R = torch.tensor([1.2, 1.0] * 8 + [2.0, 2.0, -0.5, -0.5], dtype=torch.float64)
    gain_RQ = torch.stack([best_R, torch.tensor(more, dtype=torch.float64)], dim=1)
    assert choose(gain_RQ) == chosen
    assert choose(torch.stack([best_R, torch.full_like(best_R, torch.nan)], dim=1)) == 0
    assert choose(-gain_RQ.abs()) in (0, 1)  # something, to be refused


@pytest.mark.parametrize(
    ("gains", "held"),
    [
        ([0.0] * 20, False),
        ([1.0] * 20, True),
        ([0.1] * 19 + [-1.0], False),  # above one standard error, but not by it
        ([1.0] * 19 + [-1.0], True),  # one of twenty is worse
        ([1.0, 1.0, 1.0, -0.9] * 5, True),  # five are, but by more than two standard errors on average
        ([1.0, 0.9, -0.9, -0.7] * 5, False),
        ([1.0] * 19 + [float("nan")], False),
    ],
)
def test_a_gain_is_believed_by_its_error_and_by_the_runs_it_harms(gains: list[float], held: bool) -> None:
    gain_R = torch.tensor(gains, dtype=torch.float64)
    assert bool(believed(gain_R)) is held
    assert believed(torch.stack([gain_R, gain_R], dim=1)).tolist() == [held, held]


def test_what_it_needs() -> None:
    problem = Problem(layout=LAYOUT, coordinates=5, runs=2, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    with pytest.raises(UsageError, match="loss-lfd: no loss to fit on: the stores name no workload"):
        LossLfd(LossLfd.Config()).prepared(problem, Known())
    with pytest.raises(UsageError, match="at least 3 training runs, found 2"):
        LossLfd(LossLfd.Config()).prepared(problem, Known(loss=lambda: Distance(torch.zeros(2, 5))))
    rows_RCD = normal(4, 4, 5)
    other = replace(prefix_of(rows_RCD), layout=layout_of([("one", (5,), "float32", "parameter")]))
    with pytest.raises(UsageError, match="loss-lfd was fitted on a network with 'one' of shape"):
        fit(rows_RCD, Distance(rows_RCD[:, -1]), updates=5).forecast(other, STEPS_H)


def test_why_a_workload_cannot_be_built_is_said() -> None:
    problem = Problem(layout=LAYOUT, coordinates=5, runs=4, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)

    def missing() -> TrainingLoss:
        raise UsageError("data=digits: digits.csv is in none of the folders data.", "Put it there.")

    known = Known(loss=missing)
    for method, start in (
        (LossLfd(LossLfd.Config()), "loss-lfd: no loss to fit on"),
        (Far(Far.Config(method="loss")), "far: method = loss cannot be"),
    ):
        with pytest.raises(UsageError, match=f"{start}: data=digits: digits.csv is in none of the folders"):
            method.prepared(problem, known)
    assert Far(Far.Config()).prepared(problem, known).config.method == "lfd2"


# ------------------------------------------------------------- far, judged by loss


def far_on(rows_RCD: Tensor, truth_RHD: Tensor, loss: TrainingLoss) -> Far:
    runs = len(rows_RCD)
    problem = Problem(layout=LAYOUT, coordinates=5, runs=runs, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    forecaster = Far(Far.Config()).prepared(problem, Known(loss=lambda: loss))
    kept = [STEPS_C.index(step) for step in forecaster.observed(STEPS_C)]
    problem = replace(problem, steps_C=forecaster.observed(STEPS_C))
    prefix = replace(prefix_of(rows_RCD[:, kept]), steps_C=problem.steps_C)
    return solve(forecaster, problem, lambda: [(prefix, truth_RHD)])


def test_far_leaps_where_that_lowers_the_loss_of_runs_left_out() -> None:
    rows_RCD = normal(12, 4, 5, seed=3).cumsum(1)
    points_RD = rows_RCD[:, -1] + 0.4 * (rows_RCD[:, -1] - rows_RCD[:, -2])
    truth_RHD = points_RD[:, None] + 0.05 * normal(12, 2, 5, seed=4)
    fitted = far_on(rows_RCD, truth_RHD, Distance(points_RD))
    assert (fitted.notes()["chosen"], fitted.notes()["leaps_at"]) == ("loss", [40.0, 50.0])
    forecast_BHD = fitted.forecast(prefix_of(rows_RCD), STEPS_H)
    torch.testing.assert_close(forecast_BHD, points_RD[:, None].expand(-1, 2, -1), atol=0.1, rtol=0)
    half_BHD = fitted.half_width(prefix_of(rows_RCD), STEPS_H)
    assert half_BHD is not None
    assert 0.85 <= float(((forecast_BHD - truth_RHD).abs() <= half_BHD).double().mean()) <= 1
    problem = Problem(layout=LAYOUT, coordinates=5, runs=12, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    again = Far.restore(fitted.config, problem, fitted.tensors())
    assert torch.equal(again.forecast(prefix_of(rows_RCD), STEPS_H), forecast_BHD)
    half_again_BHD = again.half_width(prefix_of(rows_RCD), STEPS_H)
    assert half_again_BHD is not None
    assert torch.equal(half_again_BHD, half_BHD)


def test_far_leaps_along_the_drift_and_says_how_sure_it_is() -> None:
    rows_RCD, truth_RHD = shared(12, part=0.05)
    target_RD = truth_RHD[:, -1]
    fitted = far_on(rows_RCD, torch.stack([target_RD, target_RD], dim=1), Distance(target_RD))
    assert fitted.notes()["leaps_at"] == [40.0, 50.0]
    prefix = prefix_of(rows_RCD)
    forecast_BHD, half_BHD = fitted.forecast(prefix, STEPS_H), fitted.half_width(prefix, STEPS_H)
    assert half_BHD is not None
    torch.testing.assert_close(forecast_BHD[:, -1], target_RD, atol=0.3, rtol=0)
    covered = ((forecast_BHD - target_RD[:, None]).abs() <= half_BHD).double().mean()
    assert 0.85 <= float(covered) <= 1
    problem = Problem(layout=LAYOUT, coordinates=5, runs=12, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    again = Far.restore(fitted.config, problem, fitted.tensors())
    assert torch.equal(again.forecast(prefix, STEPS_H), forecast_BHD)


def test_far_takes_the_plain_drift_where_few_updates_fit_nothing_better() -> None:
    rows_RCD, truth_RHD = shared(12, part=0.05)
    target_RD = truth_RHD[:, -1]
    fitted = far_on(rows_RCD, torch.stack([target_RD, target_RD], dim=1), Distance(target_RD, noise=0.5))
    drift_D = (target_RD - rows_RCD[:, -1]).mean(0)
    expected_RD = rows_RCD[:, -1] + drift_D
    torch.testing.assert_close(fitted.forecast(prefix_of(rows_RCD), STEPS_H)[:, 0], expected_RD, atol=1e-5, rtol=0)
    half_BHD = fitted.half_width(prefix_of(rows_RCD), STEPS_H)
    assert half_BHD is not None
    assert float(half_BHD.max()) < 1


def test_far_keeps_w_n_where_better_weights_have_a_higher_loss() -> None:
    """All runs go on exactly as LFD-2 says, while loss is least where they are."""
    rows_RCD = normal(12, 4, 5, seed=5).cumsum(1)
    moved_RD = rows_RCD[:, -1] - rows_RCD[:, 0]
    truth_RHD = torch.stack([rows_RCD[:, -1] + part * moved_RD for part in (0.5, 0.8)], dim=1)
    fitted = far_on(rows_RCD, truth_RHD, Distance(rows_RCD[:, -1]))
    assert fitted.notes()["keeps_w_n_at"] == [40.0, 50.0]
    assert fitted.notes()["kept_because"] == "nothing lowers the loss of runs left out surely enough"
    assert torch.equal(fitted.forecast(prefix_of(rows_RCD), (50,))[:, 0], rows_RCD[:, -1])
    prefix = prefix_of(rows_RCD)
    half_BHD = fitted.half_width(prefix, STEPS_H)  # of w_n, though LFD-2 is exact
    assert half_BHD is not None
    covered_H = ((truth_RHD - rows_RCD[:, -1:]).abs() <= half_BHD).double().mean((0, 2))
    assert bool(((covered_H >= 0.88) & (covered_H <= 0.97)).all())
    problem = Problem(layout=LAYOUT, coordinates=5, runs=12, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    again_BHD = Far.restore(fitted.config, problem, fitted.tensors()).half_width(prefix, STEPS_H)
    assert again_BHD is not None
    assert torch.equal(again_BHD, half_BHD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": 1000}, "which allows D = "),
        ({"steps_C": (0, 10)}, "a context of 2 snapshots is too short"),
        ({"coordinates": 2_000_000}, "D = 2000000 parameters are more than 1000000"),
    ],
)
def test_far_says_why_it_does_not_judge_by_loss(changes: dict[str, Any], message: str) -> None:
    problem = Problem(layout=LAYOUT, coordinates=5, runs=12, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    known = Known(loss=lambda: Distance(torch.zeros(12, 5)))
    assert Far(Far.Config()).prepared(replace(problem, **changes), known).config.method == "lfd2"
    asked = Far(Far.Config(method="loss"))
    if "coordinates" in changes:  # a default, not a limit: where it is asked for, memory decides
        assert asked.prepared(replace(problem, **changes, memory=10**10), known).config.method == "loss"
        changes = {**changes, "memory": 10**8}
        message = "which allows D = "
    with pytest.raises(UsageError, match=f"far: method = loss cannot be: .*{message}"):
        asked.prepared(replace(problem, **changes), known)
