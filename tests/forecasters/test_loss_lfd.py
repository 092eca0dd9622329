"""loss-lfd on losses whose least point is known."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from farcli.errors import UsageError
from farcli.fitting.solving import solve
from farcli.forecasters.base import Known, Prefix, Problem, TrainingLoss
from farcli.forecasters.far import Far
from farcli.forecasters.loss_lfd import LossLfd
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


def fit(rows_RCD: Tensor, loss: TrainingLoss, **options: float) -> LossLfd:
    problem = Problem(layout=LAYOUT, coordinates=5, runs=len(rows_RCD), steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    config = LossLfd.Config(**options)  # pyright: ignore[reportArgumentType]
    forecaster = LossLfd(config).prepared(problem, Known(loss=lambda: loss))
    return solve(forecaster, problem, lambda: [(prefix_of(rows_RCD), rows_RCD[:, -2:])])


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


def test_w_n_is_kept_where_runs_left_out_gain_nothing() -> None:
    rows_RCD = normal(8, 4, 5, seed=1).cumsum(1)
    fitted = fit(rows_RCD, Distance(rows_RCD[:, -1], noise=1.0), updates=40)
    assert fitted.notes()["because"] == "no gain on runs left out: w_n is kept"
    assert torch.equal(fitted.forecast(prefix_of(rows_RCD), (40,))[:, 0], rows_RCD[:, -1])


def test_a_loss_that_is_not_finite_keeps_w_n() -> None:
    rows_RCD = normal(4, 4, 5, seed=2)
    fitted = fit(rows_RCD, Distance(torch.full((4, 5), torch.nan)), updates=5)
    assert torch.equal(fitted.forecast(prefix_of(rows_RCD), (40,))[:, 0], rows_RCD[:, -1])


def test_what_it_needs() -> None:
    problem = Problem(layout=LAYOUT, coordinates=5, runs=2, steps_C=STEPS_C, steps_H=STEPS_H, memory=10**8)
    with pytest.raises(UsageError, match="loss-lfd: the stores name no workload"):
        LossLfd(LossLfd.Config()).prepared(problem, Known())
    with pytest.raises(UsageError, match="at least 3 training runs, found 2"):
        LossLfd(LossLfd.Config()).prepared(problem, Known(loss=lambda: Distance(torch.zeros(2, 5))))
    rows_RCD = normal(4, 4, 5)
    other = replace(prefix_of(rows_RCD), layout=layout_of([("one", (5,), "float32", "parameter")]))
    with pytest.raises(UsageError, match="loss-lfd was fitted on a network with 'one' of shape"):
        fit(rows_RCD, Distance(rows_RCD[:, -1]), updates=5).forecast(other, STEPS_H)


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


def test_far_keeps_w_n_where_better_weights_have_a_higher_loss() -> None:
    """All runs go on exactly as LFD-2 says, while loss is least where they are."""
    rows_RCD = normal(12, 4, 5, seed=5).cumsum(1)
    moved_RD = rows_RCD[:, -1] - rows_RCD[:, 0]
    truth_RHD = torch.stack([rows_RCD[:, -1] + part * moved_RD for part in (0.5, 0.8)], dim=1)
    fitted = far_on(rows_RCD, truth_RHD, Distance(rows_RCD[:, -1]))
    assert fitted.notes()["keeps_w_n_at"] == [40.0, 50.0]
    assert torch.equal(fitted.forecast(prefix_of(rows_RCD), (50,))[:, 0], rows_RCD[:, -1])


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
