"""Update rules against torch.optim; identification against quadratics whose truth is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from farcli.errors import UsageError
from farcli.fitting.solving import solve
from farcli.forecasters import identification
from farcli.forecasters.base import Known, Prefix, Problem
from farcli.forecasters.far import Far
from farcli.forecasters.identification import (
    UNEXPLAINED,
    Experiment,
    forecast,
    forecast_left_out,
    identify,
    infer,
    simulate,
    unpack,
)
from farcli.forecasters.update_rules import UpdateRule
from farcli.layout import layout_of

OPTIMISERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.02, "weight_decay": 0.01}),
    "slow": (torch.optim.SGD, {"lr": 0.01}),
    "momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "adam": (torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}
SEEN, LAST = (1, 2, 3, 4), 60
LAYOUT = layout_of([("w", (1,), "float64", "parameter"), ("b", (1,), "float64", "parameter")])


def quadratics(runs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """w* [R, 2], H [R, 2, 2] and w_0 [R, 2] of runs that resemble each other."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor_RDD = torch.tensor([[0.9, 0.0], [0.2, 1.3]], dtype=torch.float64) + 0.05 * normal(runs, 2, 2).tril()
    optimum_RD = torch.tensor([2.0, -1.0], dtype=torch.float64) + 0.1 * normal(runs, 2)
    return optimum_RD, factor_RDD @ factor_RDD.mT, 0.5 * normal(runs, 2)


def trained(name: str, optimum_RD: Tensor, hessian_RDD: Tensor, start_RD: Tensor, noise: float = 0.0) -> Tensor:
    """Weights after every update by torch.optim itself, [R, 1 + LAST, 2]."""
    kind, options = OPTIMISERS[name]
    weights_RD = torch.nn.Parameter(start_RD.clone())
    optimizer, rows = kind([weights_RD], **options), [start_RD.clone()]
    generator = torch.Generator().manual_seed(7)
    for _ in range(LAST):
        gradient_RD = (hessian_RDD @ (weights_RD.detach() - optimum_RD)[..., None])[..., 0]
        kick_RD = torch.randn(start_RD.shape, generator=generator, dtype=torch.float64)
        weights_RD.grad = gradient_RD + noise * kick_RD
        optimizer.step()
        rows.append(weights_RD.detach().clone())
    return torch.stack(rows, dim=1)


def experiment_of(name: str, precision: float = 1e-9) -> Experiment:
    kind, options = OPTIMISERS[name]
    rule = UpdateRule.of(kind([torch.nn.Parameter(torch.zeros(1))], **options))
    assert rule is not None
    return Experiment(rule=rule, seen=SEEN, targets=(LAST,), precision=precision)


def theta_of(optimum_RD: Tensor, hessian_RDD: Tensor) -> Tensor:
    factor_RDD = torch.linalg.cholesky(hessian_RDD)
    row, column = torch.tril_indices(2, 2)
    return torch.cat([optimum_RD, factor_RDD[:, row, column]], dim=1)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_simulation_is_what_torch_does(name: str) -> None:
    truth = quadratics(4, 0)
    expected_RTD = trained(name, *truth)
    # Near their optimum rules that follow a gradient's sign amplify rounding without bound.
    found_RTD = simulate(experiment_of(name).rule, theta_of(*truth[:2]), truth[2], range(1, 31))
    torch.testing.assert_close(found_RTD, expected_RTD[:, 1:31], rtol=1e-10, atol=1e-10)


def test_packing() -> None:
    optimum_RD, hessian_RDD, _ = quadratics(3, 1)
    again_RD, factor_RDD = unpack(theta_of(optimum_RD, hessian_RDD), 2)
    torch.testing.assert_close(again_RD, optimum_RD)
    torch.testing.assert_close(factor_RDD @ factor_RDD.mT, hessian_RDD)


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_exact_quadratics_are_recovered(name: str) -> None:
    """From four updates of each new run: to 5e-3, where runs differ by .1, and their ends likewise."""
    truth = quadratics(20, 2)
    weights_RTD = trained(name, *truth)
    train, test = weights_RTD[:14], weights_RTD[14:]
    experiment = experiment_of(name)
    population = identify(experiment, train[:, :5], train[:, [-1]]).population
    theta_RP, _ = infer(experiment, population, test[:, :5])
    optimum_RD, factor_RDD = unpack(theta_RP, 2)
    torch.testing.assert_close(optimum_RD, truth[0][14:], rtol=0, atol=5e-3)
    torch.testing.assert_close(factor_RDD @ factor_RDD.mT, truth[1][14:], rtol=0, atol=2e-2)
    found_RHD, _ = forecast(experiment, population, test[:, :5])
    torch.testing.assert_close(found_RHD[:, 0], test[:, -1], rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_forecasts_by_scale_free_rules(name: str) -> None:
    """Their first updates hardly show H; still the error is a small part of that of the training runs' mean."""
    truth = quadratics(24, 3)
    weights_RTD = trained(name, *truth)
    train, test = weights_RTD[:16], weights_RTD[16:]
    experiment = experiment_of(name)
    population = identify(experiment, train[:, :5], train[:, [-1]]).population
    found_RHD, _ = forecast(experiment, population, test[:, :5])
    error = (found_RHD[:, 0] - test[:, -1]).square().mean()
    assert error < 0.1 * (train[:, -1].mean(0) - test[:, -1]).square().mean()


def test_noise_is_seen_and_said() -> None:
    """Under gradient noise the forecast is still better than the mean, and says how far off it may be."""
    truth = quadratics(60, 4)
    weights_RTD = trained("sgd", *truth, noise=0.3)
    train, test = weights_RTD[:20], weights_RTD[20:]
    experiment = experiment_of("sgd")
    population = identify(experiment, train[:, :5], train[:, [-1]]).population
    found_RHD, std_RHD = forecast(experiment, population, test[:, :5])
    error_RD = found_RHD[:, 0] - test[:, -1]
    assert error_RD.square().mean() < 0.95 * (train[:, -1].mean(0) - test[:, -1]).square().mean()
    assert 0.5 < float((error_RD / std_RHD[:, 0]).square().mean().sqrt()) < 2


def test_without_each_is_the_population_of_the_others() -> None:
    truth = quadratics(8, 5)
    weights_RTD = trained("sgd", *truth)
    found = identify(experiment_of("sgd"), weights_RTD[:, :5], weights_RTD[:, [-1]])
    left = found.without_each()
    others = torch.arange(8) != 3
    torch.testing.assert_close(left.mean_RP[3], found.theta_RP[others].mean(0))
    spread_DD = torch.cov(found.theta_RP[others].T) + found.posterior_RPP[others].mean(0)
    torch.testing.assert_close(left.covariance_RPP[3, :2, :2], spread_DD[:2, :2], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_rules_survive_text(name: str) -> None:
    rule = experiment_of(name).rule
    assert UpdateRule.parse(rule.text) == rule


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.NAdam, {"lr": 0.1}),
    ],
)
def test_rules_that_are_not_known_are_not_taken_for_others(kind: Any, options: dict[str, Any]) -> None:
    assert UpdateRule.of(kind([torch.nn.Parameter(torch.zeros(1))], **options)) is None


def test_groups_that_differ_are_no_one_rule() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameters[0]], "lr": 0.1}, {"params": [parameters[1]], "lr": 0.2}]
    assert UpdateRule.of(torch.optim.SGD(groups)) is None


# ------------------------------------------------------------------------- far


def problem_of(runs: int) -> Problem:
    return Problem(layout=LAYOUT, coordinates=2, runs=runs, steps_C=(0, *SEEN), steps_H=(30, LAST), memory=10**8)


def block_of(weights_RTD: Tensor) -> tuple[Prefix, Tensor]:
    prefix = Prefix(
        weights_BCD=weights_RTD[:, :5],
        steps_C=(0, *SEEN),
        layout=LAYOUT,
        start=0,
        runs_B=tuple(range(len(weights_RTD))),
    )
    return prefix, weights_RTD[:, [30, LAST]]


def known(name: str) -> Known:
    return Known(optimizer=lambda: experiment_of(name).rule)


def far_on(weights_RTD: Tensor, name: str | None, **options: Any) -> Far:
    problem = problem_of(len(weights_RTD))
    forecaster = Far(Far.Config(**options)).prepared(problem, known(name) if name else Known())
    problem = replace(problem, steps_C=forecaster.observed(problem.steps_C))
    rows = [(0, *SEEN).index(step) for step in problem.steps_C]
    prefix, truth_BHD = block_of(weights_RTD)
    prefix = replace(prefix, weights_BCD=prefix.weights_BCD[:, rows], steps_C=problem.steps_C)
    return solve(forecaster, problem, lambda: [(prefix, truth_BHD)])


def test_far_identifies_where_it_can_and_says_so() -> None:
    weights_RTD = trained("sgd", *quadratics(16, 6))
    fitted = far_on(weights_RTD[:12], "sgd")
    assert fitted.notes()["chosen"] == "identify"
    assert "by sgd" in str(fitted.notes()["because"])
    prefix, truth_BHD = block_of(weights_RTD[12:])
    torch.testing.assert_close(fitted.forecast(prefix, (30, LAST)), truth_BHD, rtol=0, atol=1e-3)
    again = Far.restore(fitted.config, problem_of(12), fitted.tensors())
    assert torch.equal(again.forecast(prefix, (30, LAST)), fitted.forecast(prefix, (30, LAST)))
    half_BHD = fitted.half_width(prefix, (LAST,))
    assert half_BHD is not None
    assert half_BHD.shape == (4, 1, 2)
    assert torch.equal(again.half_width(prefix, (LAST,)), half_BHD)
    with pytest.raises(UsageError, match="far was fitted on snapshots at steps 0, 1, 2, 3, 4, but this context has"):
        fitted.forecast(replace(prefix, steps_C=(5, 6, 7, 8, 9)), (30,))


@pytest.mark.parametrize(
    ("changes", "rule", "message"),
    [
        ({"coordinates": 5}, "sgd", "D = 5 parameters are more than 4"),
        ({"steps_C": (4, 5, 6)}, "sgd", "the context begins at step 4"),
        ({"steps_H": (30_000,)}, "sgd", "step 30000 is more than 20000 updates away"),
        ({}, None, "name no update rule"),
    ],
)
def test_far_says_why_it_does_not_identify(changes: dict[str, Any], rule: str | None, message: str) -> None:
    problem = replace(problem_of(5), **changes)
    given = known(rule) if rule else Known()
    assert Far(Far.Config()).prepared(problem, given).config.method == "lfd2"
    with pytest.raises(UsageError, match=f"far: method = identify cannot be: .*{message}"):
        Far(Far.Config(method="identify")).prepared(problem, given)


def test_far_takes_a_rule_that_is_named() -> None:
    weights_RTD = trained("momentum", *quadratics(6, 7))
    rule = experiment_of("momentum").rule.text
    assert far_on(weights_RTD, None, optimizer=rule).notes()["chosen"] == "identify"
    with pytest.raises(ValueError, match="optimizer 'sdg', expected one of sgd, adam"):
        Far.Config(optimizer="sdg lr=0.1")


def test_far_falls_back_where_nothing_explains_the_runs() -> None:
    """SGD at a rate under which every quadratic that moves diverges beyond all numbers."""
    weights_RTD = trained("sgd", *quadratics(6, 8))
    fitted = far_on(weights_RTD, None, optimizer="sgd lr=1e300")
    assert fitted.notes()["chosen"] == "lfd2"
    assert "identification failed" in str(fitted.notes()["because"])
    prefix, _ = block_of(weights_RTD)
    assert fitted.forecast(prefix, (30, LAST)).isfinite().all()
    assert fitted.half_width(prefix, (30,)) is not None


def test_far_keeps_w_n_where_its_own_runs_advise_it() -> None:
    """At step 30 each run is where it was at n, but for a coin's toss that nothing in its past tells."""
    weights_RTD = torch.randn(10, LAST + 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights_RTD[:, 30] = weights_RTD[:, 4]
    weights_RTD[:, 30] += torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)[:, None] * 0.5
    fitted = far_on(weights_RTD, None)
    assert 30.0 in fitted.notes()["keeps_w_n_at"]  # pyright: ignore[reportOperatorIssue]
    assert "squared error" in str(fitted.notes()["kept_because"])
    prefix, _ = block_of(weights_RTD)
    assert torch.equal(fitted.forecast(prefix, (30,))[:, 0], weights_RTD[:, 4])


def test_far_on_runs_that_do_not_move() -> None:
    weights_RTD = torch.ones(6, LAST + 1, 2, dtype=torch.float64)
    for rule in ("sgd", "adam", None):
        fitted = far_on(weights_RTD, rule)
        prefix, truth_BHD = block_of(weights_RTD)
        np.testing.assert_allclose(fitted.forecast(prefix, (30, LAST)), truth_BHD, atol=1e-6)


def test_far_with_too_few_runs() -> None:
    weights_RTD = trained("sgd", *quadratics(2, 9))
    for rule in ("sgd", None):
        with pytest.raises(UsageError, match=r"far: .*needs at least 3 training runs, found 2"):
            far_on(weights_RTD, rule)


# ------------------------------------------------------------- from w_0 alone


def alone_on(weights_RTD: Tensor, name: str | None, **options: Any) -> Far:
    problem = replace(problem_of(len(weights_RTD)), steps_C=(0,))
    forecaster = Far(Far.Config(**options)).prepared(problem, known(name) if name else Known())
    assert forecaster.observed((0,)) == (0,)
    return solve(forecaster, problem, lambda: [alone_of(weights_RTD)])


def alone_of(weights_RTD: Tensor) -> tuple[Prefix, Tensor]:
    prefix, truth_BHD = block_of(weights_RTD)
    return replace(prefix, weights_BCD=prefix.weights_BCD[:, :1], steps_C=(0,)), truth_BHD


@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_how_far_training_gets_is_known_from_w_0_alone(name: str) -> None:
    """These rules have not arrived by then: where they are depends on where they began, which the mean ignores."""
    weights_RTD = trained(name, *quadratics(24, 14))
    fitted = alone_on(weights_RTD[:16], name)
    assert fitted.notes()["chosen"] == "identify"
    assert fitted.notes()["keeps_w_n_at"] == []
    prefix, truth_BHD = alone_of(weights_RTD[16:])
    forecast_BHD, half_BHD = fitted.forecast(prefix, (30, LAST)), fitted.half_width(prefix, (30, LAST))
    error_BHD, mean_HD = forecast_BHD - truth_BHD, weights_RTD[:16, [30, LAST]].mean(0)
    assert (error_BHD.square().mean((0, 2)) < 0.5 * (mean_HD - truth_BHD).square().mean((0, 2))).all()
    assert half_BHD is not None
    assert 0.6 < float((error_BHD.abs() <= half_BHD).double().mean()) <= 1
    again = Far.restore(fitted.config, replace(problem_of(16), steps_C=(0,)), fitted.tensors())
    assert torch.equal(again.forecast(prefix, (30, LAST)), forecast_BHD)
    assert again.coefficients() == fitted.coefficients() == []


def test_from_w_0_alone_the_mean_stands_in_where_nothing_explains_the_runs() -> None:
    weights_RTD = trained("sgd", *quadratics(6, 15))
    fitted = alone_on(weights_RTD, None, optimizer="sgd lr=1e300")
    assert fitted.notes()["chosen"] == "mean"
    prefix, _ = alone_of(weights_RTD)
    expected_HD = weights_RTD[:, [30, LAST]].mean(0)
    torch.testing.assert_close(fitted.forecast(prefix, (30, LAST)), expected_HD.expand(6, -1, -1))
    half_BHD = fitted.half_width(prefix, (30, LAST))
    assert half_BHD is not None
    away_RHD = (weights_RTD[:, [30, LAST]] - expected_HD).abs() * 6 / 5  # from the mean of the others
    torch.testing.assert_close(half_BHD, away_RHD.amax(0).expand(6, -1, -1))
    again = Far.restore(fitted.config, replace(problem_of(6), steps_C=(0,)), fitted.tensors())
    assert torch.equal(again.forecast(prefix, (30,)), fitted.forecast(prefix, (30,)))
    again_BHD = again.half_width(prefix, (LAST,))
    assert again_BHD is not None
    assert torch.equal(again_BHD, half_BHD[:, 1:])


def test_from_w_0_alone_w_n_is_kept_where_it_is_nearer_than_the_mean() -> None:
    """Runs that do not move, from places far apart."""
    start_RD = torch.randn(8, 2, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    weights_RTD = start_RD[:, None].repeat(1, LAST + 1, 1)
    fitted = alone_on(weights_RTD, None, optimizer="sgd lr=1e300")
    prefix, truth_BHD = alone_of(weights_RTD)
    assert fitted.notes()["keeps_w_n_at"] == [30.0, LAST]
    assert torch.equal(fitted.forecast(prefix, (30, LAST)), truth_BHD)


@pytest.mark.parametrize("targets", [(10, 25, 40, LAST), (10,), (LAST,)])
def test_sgd_that_has_not_arrived_is_known_from_w_0_as_well_as_by_an_affine_map(targets: tuple[int, ...]) -> None:
    """The map is exact where runs share one H, and these nearly do."""
    weights_RTD = trained("slow", *quadratics(60, 18))
    start_RD, truth_RHD = weights_RTD[:, :1], weights_RTD[:, list(targets)]
    experiment = replace(experiment_of("slow"), seen=(), targets=targets)
    population = identify(experiment, start_RD[:20], truth_RHD[:20]).population
    found_RHD, _ = forecast(experiment, population, start_RD[20:])
    with_one_RP = torch.cat([torch.ones(60, 1, dtype=torch.float64), start_RD[:, 0]], dim=1)
    map_PN = torch.linalg.lstsq(with_one_RP[:20], truth_RHD[:20].flatten(1)).solution
    theirs_RHD = (with_one_RP[20:] @ map_PN).view_as(found_RHD)
    error_H = (found_RHD - truth_RHD[20:]).square().mean((0, 2))
    assert (error_H < 1.1 * (theirs_RHD - truth_RHD[20:]).square().mean((0, 2))).all()


def test_what_few_runs_say_of_one_of_them_is_said_without_it() -> None:
    weights_RTD = trained("adam", *quadratics(5, 19))
    experiment = replace(experiment_of("adam"), seen=(), targets=(5, 10))
    start_RD, truth_RHD = weights_RTD[:, :1], weights_RTD[:, [5, 10]]
    changed_RHD = truth_RHD.clone()
    changed_RHD[3] += 5
    expected, found = [
        forecast_left_out(experiment, identify(experiment, start_RD, each), start_RD, each)
        for each in (truth_RHD, changed_RHD)
    ]
    assert torch.equal(found[0][3], expected[0][3])
    assert torch.equal(found[1][3], expected[1][3])
    assert not torch.isclose(found[0][:3], expected[0][:3]).any()


def test_where_two_runs_explain_nothing_the_third_is_told_from_all() -> None:
    weights_RTD = trained("slow", *quadratics(3, 22))
    experiment = replace(experiment_of("slow"), seen=(), targets=(5,))
    start_RD, truth_RHD = weights_RTD[:, :1], weights_RTD[:, [5]]
    found = identify(experiment, start_RD, truth_RHD)
    ours_RHD, _ = forecast_left_out(experiment, found, start_RD, truth_RHD)
    alike_RHD, _ = forecast(experiment, found.without_each(), start_RD)
    failed = []
    for run in range(3):
        others = torch.arange(3) != run
        try:
            identify(experiment, start_RD[others], truth_RHD[others])
        except UNEXPLAINED:
            failed.append(run)
    assert failed
    torch.testing.assert_close(ours_RHD[failed], alike_RHD[failed], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seen", [(), SEEN])
def test_forecasts_of_parts_are_those_of_the_whole(seen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """To what the noise of other simulations makes; with w_0 alone every run gets the same draws."""
    weights_RTD = trained("sgd", *quadratics(16, 20), noise=0.1)
    experiment = replace(experiment_of("sgd"), seen=seen, targets=(30, LAST))
    prefix_RCD = weights_RTD[:, [0, *seen]]
    found = identify(experiment, prefix_RCD, weights_RTD[:, [30, LAST]])
    for population in (found.population, found.without_each()):
        whole = forecast(experiment, population, prefix_RCD)
        with monkeypatch.context() as small:
            small.setattr(identification, "_ROOM", 1)
            parts = forecast(experiment, population, prefix_RCD)
        for ours, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=0.1 if seen else 1e-12)


def test_far_says_where_runs_were_trained_by_another_rule() -> None:
    weights_RTD = trained("adam", *quadratics(12, 21))
    fitted = alone_on(weights_RTD, "adam")
    assert fitted.warning(Known()) == fitted.warning(known("adam")) == ""
    assert "runs by adam, but these are by sgd, and" in fitted.warning(known("sgd"))
    assert "runs by adam lr=0.02, but these are by sgd lr=0.01, and" in fitted.warning(known("slow"))
    own = known("adam").optimizer()
    assert own is not None
    faster = fitted.warning(Known(optimizer=lambda: replace(own, lr=0.1)))
    assert "runs by adam lr=0.02, but these are by adam lr=0.1, and" in faster
    decayed = fitted.warning(Known(rate_change=lambda: 7))
    assert "at one rate, but a schedule changes that of these runs at step 7" in decayed
    again = Far.restore(fitted.config, replace(problem_of(12), steps_C=(0,)), fitted.tensors())
    assert again.warning(known("adam")) == ""
    assert again.warning(known("sgd")) == fitted.warning(known("sgd"))


def test_from_one_snapshot_far_needs_a_rule() -> None:
    with pytest.raises(UsageError, match=r"far: from a single snapshot .*: the stores name no update rule"):
        alone_on(trained("sgd", *quadratics(6, 17)), None)
    for method in ("lfd2", "loss"):
        with pytest.raises(UsageError, match="far needs a context of at least"):
            Far(Far.Config(method=method)).observed((0,))


# -------------------------------------------------------------- without noise


@pytest.mark.parametrize("name", OPTIMISERS)
def test_far_solves_runs_without_noise(name: str) -> None:
    """Four exact updates determine gradient and Hessian, adaptive rules' by what ε leaves in the last digits."""
    weights_RTD = trained(name, *quadratics(16, 10))
    fitted = far_on(weights_RTD[:12], name)
    assert fitted.notes()["noise"] == "none"
    prefix, truth_BHD = block_of(weights_RTD[12:])
    forecast_BHD = fitted.forecast(prefix, (30, LAST))
    torch.testing.assert_close(forecast_BHD, truth_BHD, rtol=0, atol=1e-5)
    half_BHD = fitted.half_width(prefix, (30, LAST))
    assert half_BHD is not None
    assert (half_BHD < 1e-2).all()  # runs differ by .1; RMSProp near an optimum amplifies rounding
    # of four runs, at rounding's own size: of the errors' order, no more is to be asked
    assert float(((forecast_BHD - truth_BHD).abs() <= 3 * half_BHD).double().mean()) > 0.7
    again = Far.restore(fitted.config, problem_of(12), fitted.tensors())
    assert torch.equal(again.forecast(prefix, (30, LAST)), forecast_BHD)


def test_a_run_that_no_quadratic_explains_is_forecast_by_lfd2() -> None:
    weights_RTD = trained("adam", *quadratics(16, 11))
    fitted = far_on(weights_RTD[:12], "adam")
    prefix, truth_BHD = block_of(weights_RTD[12:])
    bent_BCD = prefix.weights_BCD.clone()
    bent_BCD[0, 2] += 1e-3
    bent = replace(prefix, weights_BCD=bent_BCD)
    forecast_BHD, half_BHD = fitted.forecast(bent, (LAST,)), fitted.half_width(bent, (LAST,))
    assert half_BHD is not None
    lfd2_BHD = far_on(weights_RTD[:12], None).forecast(replace(bent, weights_BCD=bent_BCD[:, [0, -1]]), (LAST,))
    torch.testing.assert_close(forecast_BHD[0], lfd2_BHD[0])
    torch.testing.assert_close(forecast_BHD[1:], truth_BHD[1:, 1:], rtol=0, atol=1e-5)
    assert (half_BHD[0] > 1000 * half_BHD[1:]).all()


def test_noise_is_not_taken_for_none() -> None:
    """Noise beyond rounding, and float32, whose rounding hides what adaptive rules leave of a gradient's size."""
    noisy_RTD = trained("sgd", *quadratics(12, 12), noise=1e-6)
    assert far_on(noisy_RTD, "sgd").notes()["noise"] == "estimated"
    with_two_RTD = trained("sgd", *quadratics(12, 13))
    problem = replace(problem_of(12), steps_C=(0, 1, 2))  # 4 numbers, 5 unknowns
    forecaster = Far(Far.Config()).prepared(problem, known("sgd"))
    prefix, truth_BHD = block_of(with_two_RTD)
    prefix = replace(prefix, weights_BCD=prefix.weights_BCD[:, :3], steps_C=(0, 1, 2))
    assert solve(forecaster, problem, lambda: [(prefix, truth_BHD)]).notes()["noise"] == "estimated"
