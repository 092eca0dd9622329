"""What every forecaster promises. A new name in the table is tested by being there."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from farcli.config import options_of
from farcli.errors import ResourceError, StoreError, UsageError
from farcli.fitting.descent import descend
from farcli.forecasters.base import FittedForecaster, Forecaster, SolvedForecaster, TrainedForecaster
from farcli.forecasters.table import FORECASTERS
from tests.forecasters.trajectories import KNOWN, LAYOUT, REQUIRED, Data, create, drifting, fitted, is_joint

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"span": 0}, {"span": 3}],
    "quadratic": [{"span": 2}],
    "lfd2": [
        {"map": "dense"},
        {"loss": "l1"},
        {"beta": 0.3},
        {"scale": "tensor"},
        {"groups": "tensor"},
        {"groups": "tensor", "scale": "tensor", "loss": "l1", "beta": 0.1, "max_passes": 4},
        {"bias": False},
        {"ridge": "loo", "guard": True, "intervals": True},
        {"ridge": "loo", "guard": True, "intervals": True, "groups": "tensor", "scale": "tensor"},
        {"ridge": "loo", "map": "dense"},
    ],
    "dmd": [{"modes": "coordinate"}, {"rank": 1}],
    "ema": [{"decay": 0.9}],
    "lawa": [{"latest": 2}],
    "gfm": [
        {"units": "corrected", "path": "w_n", "integrator": "rk4", "steps": 3},
        {"integrator": "euler", "steps": 2, "zeta": 0.0},
        {"channels": "shared"},
    ],
    "introspection": [{"scale": "none"}],
    "dlinear": [{"channels": "joint"}],
    "lstm": [{"channels": "joint", "scale": "none"}],
    "transformer": [{"channels": "joint", "scale": "none"}],
}
CASES = [(name, options | REQUIRED.get(name, {})) for name in FORECASTERS for options in [{}, *VARIANTS.get(name, [])]]


def cases(kind: type, *, coordinatewise: bool = False) -> pytest.MarkDecorator:
    chosen = [(name, options) for name, options in CASES if isinstance(create(name, **options), kind)]
    if coordinatewise:
        chosen = [(name, options) for name, options in chosen if not is_joint(create(name, **options))]
    own = [(name, options.keys() - REQUIRED.get(name, {}).keys()) for name, options in chosen]
    ids = [
        "-".join([name, *(f"{key}={value}" for key, value in options.items() if key in keys)])
        for (name, keys), (_, options) in zip(own, chosen, strict=True)
    ]
    return pytest.mark.parametrize(("name", "options"), chosen, ids=ids)


methods = cases(Forecaster)
fitted_methods = cases(FittedForecaster)
solved_methods = cases(SolvedForecaster)
trained_methods = cases(TrainedForecaster)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    data = drifting(seed=1, dtype=dtype)
    forecast_BHD = fitted(data, name, **options).forecast(data.prefix(), data.steps_H)
    assert forecast_BHD.shape == (data.runs, len(data.steps_H), LAYOUT.size)
    assert forecast_BHD.dtype == dtype
    assert forecast_BHD.isfinite().all()


@methods
def test_prefix_is_left_as_it_was(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster, prefix = fitted(data, name, **options), data.prefix()
    before = prefix.weights_BCD.clone()
    forecast_BHD = forecaster.forecast(prefix, data.steps_H)
    forecast_BHD += 1
    assert torch.equal(prefix.weights_BCD, before)


@methods
def test_horizons_are_independent(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster, prefix = fitted(data, name, **options), data.prefix()
    together = forecaster.forecast(prefix, data.steps_H)
    some = forecaster.forecast(prefix, data.steps_H[1:3])
    torch.testing.assert_close(some, together[:, 1:3], rtol=1e-6, atol=1e-6)


@methods
def test_runs_are_independent(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = fitted(data, name, **options)
    order = [3, 0, 4]
    some = forecaster.forecast(data.block(order, 0, LAYOUT.size)[0], data.steps_H)
    torch.testing.assert_close(some, forecaster.forecast(data.prefix(), data.steps_H)[order], rtol=1e-6, atol=1e-6)


@cases(Forecaster, coordinatewise=True)
def test_blocks_equal_whole(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = fitted(data, name, **options)
    whole = forecaster.forecast(data.prefix(), data.steps_H)
    bounds = [0, 1, 57, 64, 100, LAYOUT.size]  # in and across tensors
    parts = [
        forecaster.forecast(data.block(range(data.runs), a, b)[0], data.steps_H) for a, b in itertools.pairwise(bounds)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=-1), whole, rtol=1e-6, atol=1e-6)


@methods
def test_observed_snapshots_suffice(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster, prefix = fitted(data, name, **options), data.prefix()
    steps = forecaster.observed(data.steps_C)
    assert set(steps) <= set(data.steps_C)
    rows = [data.steps_C.index(step) for step in steps]
    thin = replace(prefix, weights_BCD=prefix.weights_BCD[:, rows], steps_C=steps)
    assert torch.equal(forecaster.forecast(thin, data.steps_H), forecaster.forecast(prefix, data.steps_H))


@methods
def test_context_too_short(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = fitted(data, name, **options)
    short = forecaster.min_context - 1
    if short == 0:
        assert forecaster.observed(data.steps_C[:1]) == data.steps_C[:1]
        return
    with pytest.raises(UsageError, match=rf"{name} needs a context of at least \d snapshots, but got {short}"):
        forecaster.observed(data.steps_C[:short])
    bare = replace(data.prefix(), weights_BCD=data.prefix().weights_BCD[:, :1], steps_C=data.steps_C[:1])
    with pytest.raises(UsageError, match="context of at least"):
        forecaster.forecast(bare, data.steps_H)


@methods
def test_steps_in_the_past(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = fitted(data, name, **options)
    with pytest.raises(UsageError, match=f"{name}: step 60 is not in the future"):
        forecaster.forecast(data.prefix(), (60, 80))


@fitted_methods
def test_unfitted_use(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = create(name, **options)
    assert isinstance(forecaster, FittedForecaster)
    for use in (lambda: forecaster.forecast(data.prefix(), data.steps_H), forecaster.tensors):
        with pytest.raises(UsageError, match=f"{name} has not been fitted"):
            use()


@fitted_methods
def test_round_trip(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = fitted(data, name, **options)
    assert isinstance(forecaster, FittedForecaster)
    tensors = forecaster.tensors()
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())
    problem = replace(data.problem(memory=0), steps_C=forecaster.observed(data.steps_C))
    again = type(forecaster).restore(forecaster.config, problem, {k: t.clone() for k, t in tensors.items()})
    prefix = data.prefix()
    assert torch.equal(again.forecast(prefix, data.steps_H), forecaster.forecast(prefix, data.steps_H))
    assert again.transferable == forecaster.transferable
    assert again.coefficients() == forecaster.coefficients()
    first = next(iter(tensors))
    with pytest.raises(StoreError, match=f"{name}: tensor '{first}' is missing"):
        type(forecaster).restore(forecaster.config, problem, {k: t for k, t in tensors.items() if k != first})
    with pytest.raises(StoreError, match=f"{name}: tensor '{first}' has shape"):
        type(forecaster).restore(forecaster.config, problem, {**tensors, first: tensors[first].flatten()[:0]})


@solved_methods
def test_order_and_parts_of_the_data_do_not_matter(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = create(name, **options)
    assert isinstance(forecaster, SolvedForecaster)
    problem = data.problem()
    forecaster = forecaster.prepared(problem, KNOWN)
    joint = is_joint(forecaster)
    blocks = list(data.passes((), ((4,), (1, 3), (0, 2)))() if joint else data.passes((50, 62), ((4, 0), (2, 1, 3)))())
    one, two, whole = forecaster.sums(problem), forecaster.sums(problem), forecaster.sums(problem)
    for index, block in enumerate(blocks):
        (one if index % 2 else two).add(*block)
    two.merge(one)
    for block in data.passes()():
        whole.add(*block)
    forecast, expected = (forecaster.solved(problem, s).forecast(data.prefix(), data.steps_H) for s in (two, whole))
    # The regularised fit is iterative: rounding in the sums moves where it stops.
    tolerance = 1e-4 if options.get("beta") else 1e-6
    torch.testing.assert_close(forecast, expected, rtol=tolerance, atol=tolerance)


@fitted_methods
def test_unknown_target_or_network(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = fitted(data, name, **options)
    with pytest.raises(UsageError, match=f"{name} was fitted to forecast .*; step 90 is not among them"):
        forecaster.forecast(data.prefix(), (80, 90))
    other = replace(
        data.prefix(), layout=type(LAYOUT)(LAYOUT.slots[:2]), weights_BCD=data.prefix().weights_BCD[..., :60]
    )
    if forecaster.transferable:
        assert forecaster.forecast(other, data.steps_H).shape[-1] == 60
    else:
        with pytest.raises(UsageError, match=f"{name} was fitted on D = 124 parameters, but this network has D = 60"):
            forecaster.forecast(other, data.steps_H)


@solved_methods
def test_memory_budget(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = create(name, **options)
    assert isinstance(forecaster, SolvedForecaster)
    with pytest.raises(ResourceError, match=rf"{name}: .* but the budget is 500 B, which allows"):
        forecaster.sums(data.problem(memory=500))


@trained_methods
def test_memory_budget_of_a_network(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = create(name, **options)
    assert isinstance(forecaster, TrainedForecaster)
    observed, problem = data.observed(forecaster)
    with pytest.raises(ResourceError, match=rf"{name}: .* but the budget is 500 B, which allows"):
        descend(forecaster, replace(problem, memory=500), observed.passes())


@methods
def test_description(name: str, options: dict[str, Any]) -> None:
    forecaster = create(name, **options)
    assert forecaster.reference
    assert all(option.help and option.default is not None for option in options_of(type(forecaster).Config))
    assert forecaster.config == type(forecaster).Config(**options)
    assert forecaster.min_context >= 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"span": -1}, "span = -1"),
        ("quadratic", {"span": 0}, "span = 0"),
        ("ema", {"decay": 1.0}, "decay = 1.0"),
        ("lawa", {"latest": 1}, "latest = 1"),
        ("dmd", {"rank": -1}, "rank = -1"),
        ("dmd", {"rank": 2, "modes": "coordinate"}, "rank = 2 is for modes = vector"),
        ("gfm", {"zeta": -1.0}, "zeta = -1.0"),
        ("gfm", {"beta": 0.0, "gamma": 0.0, "zeta": 0.0}, "all 0: nothing is left to learn from"),
        ("gfm", {"steps": 0}, "steps = 0"),
        ("gfm", {"lr": 0.0}, "lr = 0.0"),
        ("wnn", {"penalty": -1.0}, "penalty = -1.0"),
        ("introspection", {"hidden": 0}, "hidden = 0"),
        ("dlinear", {"window": 4}, "window = 4"),
        ("lstm", {"epochs": 0}, "epochs = 0"),
        ("lstm", {"validation": 1.0}, "validation = 1.0"),
        ("lstm", {"patience": 3}, "patience = 3 needs validation runs"),
        ("transformer", {"width": 30}, "width = 30 is no multiple of heads = 4"),
        ("lfd2", {"beta": -0.1}, "beta = -0.1"),
        ("lfd2", {"ridge": float("nan")}, "ridge = nan"),
        ("loss-lfd", {"updates": 0}, "updates = 0"),
        ("far", {"updates": 0}, "updates = 0"),
        ("loss-lfd", {"lr": 0.0}, "lr = 0.0"),
        ("far", {"optimizer": "adam"}, "expected a learning rate above 0"),
        ("lfd2", {"max_passes": 0}, "max_passes = 0"),
        ("lfd2", {"ridge": "loo", "loss": "l1"}, "ridge = loo is for loss = squared"),
        ("lfd2", {"intervals": True, "beta": 1.0}, "intervals = True is for loss = squared and beta = 0"),
        ("lfd2", {"guard": True, "map": "dense"}, "guard = True is for map = shared"),
        ("lfd2", {"map": "dense", "loss": "l1"}, "loss = l1 is for map = shared"),
        ("lfd2", {"map": "dense", "beta": 1.0}, "beta = 1.0 is for map = shared"),
    ],
)
def test_senseless_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **options)


def test_table_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, farcli.forecasters.table; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
