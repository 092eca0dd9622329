"""Leave-one-run-out from sums against real refits; guards and intervals against what they promise."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import farcli
from farcli.artefact import load
from farcli.errors import UsageError
from farcli.forecasters.base import Prefix
from farcli.forecasters.intervals import Counts, quantile
from farcli.forecasters.leave_one_out import PENALTIES
from farcli.forecasters.lfd2 import Lfd2
from tests.forecasters.trajectories import LAYOUT, Data, drifting, fitted

PARAMETERS = LAYOUT.parameters


def lfd2(data: Data, **options: Any) -> Lfd2:
    forecaster = fitted(data, "lfd2", **options)
    assert isinstance(forecaster, Lfd2)
    return forecaster


def some(data: Data, runs: list[int]) -> Data:
    return replace(data, weights_BTD=data.weights_BTD[runs])


def errors_by_refitting(data: Data, **options: Any) -> np.ndarray:
    """Squared errors [R, D, H] of forecasts of each run, fitted without it."""
    errors = []
    for run in range(data.runs):
        others = lfd2(some(data, [other for other in range(data.runs) if other != run]), **options)
        prefix, truth_BHD = some(data, [run]).block([0], 0, LAYOUT.size)
        error_HD = (others.forecast(prefix, data.steps_H) - truth_BHD)[0, :, :PARAMETERS].double().square()
        errors.append(error_HD.T.numpy())
    return np.stack(errors)


@pytest.mark.parametrize("groups", ["none", "tensor"])
def test_the_penalty_is_that_of_real_refits(groups: str) -> None:
    data = drifting(seed=3, runs=6, dtype=torch.float64)
    found = lfd2(data, ridge="loo", groups=groups)
    assert found.left_out is not None
    each = np.stack([errors_by_refitting(data, ridge=penalty, groups=groups) for penalty in PENALTIES])  # [L, R, D, H]
    parts = (
        [slice(slot.offset, slot.stop) for slot in LAYOUT.floats if slot.role == "parameter"]
        if groups == "tensor"
        else [slice(0, PARAMETERS)]
    )
    for group, part in enumerate(parts):
        errors_LRH = each[:, :, part].sum(2)
        best_H = errors_LRH.sum(1).argmin(0)
        if errors_LRH.max() < 1e-20:  # a tensor that never moves: every penalty is as good
            continue
        np.testing.assert_allclose(found.left_out.penalty_KH[group], np.array(PENALTIES)[best_H])
        for h, best in enumerate(best_H):
            np.testing.assert_allclose(found.left_out.errors_RKH[:, group, h], errors_LRH[best, :, h], rtol=1e-6)


def test_the_dense_penalty_forecasts_left_out_runs_best() -> None:
    data = drifting(seed=4, runs=9, dtype=torch.float64)
    totals = [errors_by_refitting(data, map="dense", ridge=penalty).sum() for penalty in PENALTIES]
    chosen = lfd2(data, map="dense", ridge="loo").forecast(data.prefix(), data.steps_H)
    errors = [
        float((chosen - lfd2(data, map="dense", ridge=penalty).forecast(data.prefix(), data.steps_H)).abs().max())
        for penalty in PENALTIES
    ]
    # Refitting rescales the columns, which the formula does not: the choice may differ by a step.
    assert totals[int(np.argmin(errors))] <= 1.01 * min(totals)
    assert min(errors) < 1e-9


@pytest.mark.parametrize("options", [{"ridge": "loo"}, {"intervals": True}, {"ridge": "loo", "map": "dense"}])
def test_too_few_runs(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="lfd2: leaving one run out needs at least 3 training runs, found 2"):
        lfd2(drifting(seed=0, runs=2), **options)


def test_a_guard_changes_nothing_within_and_bounds_what_is_beyond() -> None:
    data = drifting(seed=5, dtype=torch.float64)
    free, guarded = lfd2(data, groups="tensor"), lfd2(data, groups="tensor", guard=True)
    within = data.prefix()
    torch.testing.assert_close(
        guarded.forecast(within, data.steps_H)[..., :PARAMETERS], free.forecast(within, data.steps_H)[..., :PARAMETERS]
    )
    beyond = replace(within, weights_BCD=within.weights_BCD * 1e3)
    forecast_BHD = guarded.forecast(beyond, data.steps_H)
    finals_BHD = data.weights_BTD[:, len(data.steps_C) :]
    for slot in LAYOUT.floats:
        if slot.role == "parameter":
            part = slice(slot.offset, slot.stop)
            for h in range(len(data.steps_H)):
                own = finals_BHD[:, h, part]
                margin = 0.75 * float(own.std(correction=0)) + 1e-9
                assert forecast_BHD[:, h, part].min() >= own.min() - margin
                assert forecast_BHD[:, h, part].max() <= own.max() + margin
    assert free.forecast(beyond, data.steps_H).abs().max() > 100 * forecast_BHD.abs().max()


@pytest.mark.parametrize("groups", ["none", "tensor"])
def test_intervals_are_quantiles_of_the_errors_of_refits(groups: str) -> None:
    data = drifting(seed=6, runs=8, dtype=torch.float64)
    found = lfd2(data, intervals=True, groups=groups)
    half_BHD = found.half_width(data.prefix(), data.steps_H)
    assert half_BHD is not None
    each_RDH = np.sqrt(errors_by_refitting(data, groups=groups))
    for slot in LAYOUT.floats:
        part = slice(slot.offset, slot.stop)
        if slot.role != "parameter" or (slot.name == "frozen" and groups == "tensor"):
            assert not half_BHD[..., part].any()
            continue
        own_NH = np.sort(each_RDH[:, part].reshape(-1, len(data.steps_H)), axis=0)
        expected_H = own_NH[min(len(own_NH), math.ceil(0.9 * (len(own_NH) + 1))) - 1]
        wide_H = half_BHD[0, :, slot.offset].numpy()
        assert (wide_H >= expected_H * (1 - 1e-9)).all()
        assert (wide_H <= expected_H * 2 ** (1 / 16) * (1 + 1e-9)).all()


def test_counts_are_quantiles() -> None:
    values_HN = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).exp()
    one, two = Counts(1, 2), Counts(1, 2)
    one.add(0, values_HN[None, :, :300])
    two.add(0, -values_HN[None, :, 300:])
    one.merge(two)
    exact = np.sort(values_HN.numpy(), axis=1)[:, 900]  # the 901st: 0.9 of 1001
    assert ((one.quantile()[0].numpy() / exact) >= 1 - 1e-6).all()
    assert ((one.quantile()[0].numpy() / exact) <= 2 ** (1 / 16) + 1e-6).all()


@pytest.mark.parametrize("runs", [5, 9, 10, 30])
def test_conformal_coverage_is_what_it_promises(runs: int) -> None:
    """A further residual is below the quantile of R others with probability ⌈.9 (R + 1)⌉ / (R + 1)."""
    values = torch.randn(20_000, runs + 1, generator=torch.Generator().manual_seed(runs)).T
    covered = (values[-1].abs() <= quantile(values[:-1])).double().mean()
    promised = min(math.ceil(0.9 * (runs + 1)), runs) / (runs + 1)
    assert float(covered) == pytest.approx(promised, abs=0.01)


def test_eval_counts_what_lies_within(tmp_path: Path) -> None:
    """`eval`'s width and coverage against the stored arrays."""
    store, file = tmp_path / "runs.zarr", tmp_path / "lfd2.safetensors"
    farcli.record("linreg", store, runs=12, steps=20, seed=5)
    farcli.fit("lfd2", [str(store)], file, train_runs="0:8", options={"intervals": "true", "groups": "tensor"})
    [row] = [row for row in farcli.evaluate([str(file)], str(store), targets="20") if row["method"] == "lfd2"]
    artefact, truth = load(file), farcli.Trajectory.open(store)
    weights_RTD = torch.from_numpy(truth.read([8, 9, 10, 11], [0, 4, 20], 0, 2))
    prefix = Prefix(weights_BCD=weights_RTD[:, :2], steps_C=(0, 4), layout=truth.layout, start=0, runs_B=(0, 1, 2, 3))
    assert isinstance(artefact.forecaster, Lfd2)
    half_BHD = artefact.forecaster.half_width(prefix, (20,))
    assert half_BHD is not None
    error_BHD = artefact.forecaster.forecast(prefix, (20,)) - weights_RTD[:, 2:]
    assert row["covered"] == pytest.approx(float((error_BHD.abs() <= half_BHD).double().mean()))
    assert row["width"] == pytest.approx(float(2 * half_BHD.mean()), rel=1e-6)
    assert {r["covered"] for r in farcli.evaluate(["linear"], str(store), targets="20")} == {None}
