import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from farcli.errors import UsageError
from farcli.training import TrainingRun, run_seed, workload_from
from farcli.workloads.optimisation import TrainingOptions, build_optimizer, dtype_of, rate_multiple
from farcli.workloads.randomness import shuffled


def multiples(options: TrainingOptions, steps: int) -> np.ndarray:
    return np.array([rate_multiple(options, step) for step in range(steps)])


def test_a_constant_rate_is_not_touched():
    assert multiples(TrainingOptions(), 5).tolist() == [1.0] * 5


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd", "cyclical"])
def test_a_warm_up_rises_evenly_and_ends_at_the_full_rate(schedule: str):
    options = TrainingOptions(schedule=schedule, warmup=5, span=100)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(multiples(options, 5), [0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_that_of_torch(floor: float):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=40, eta_min=floor)
    expected = []
    for _ in range(41):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = multiples(TrainingOptions(schedule="cosine", span=43, warmup=3, floor=floor), 50)
    np.testing.assert_allclose(found[3:44], expected, atol=1e-12)
    np.testing.assert_allclose(found[43:], floor, atol=1e-12)


def test_wsd_stays_and_falls_as_torchs_line_does():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=20)
    expected = []
    for _ in range(21):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = multiples(TrainingOptions(schedule="wsd", span=80, floor=0.1), 90)
    assert (found[:60] == 1).all()
    np.testing.assert_allclose(found[60:81], expected, atol=1e-12)
    np.testing.assert_allclose(found[80:], 0.1)


def test_cyclical_goes_up_and_down_and_never_stands_still():
    found = multiples(TrainingOptions(schedule="cyclical", span=40, cycles=2), 80)
    rising = (np.arange(10) + 0.5) / 10
    np.testing.assert_allclose(found, np.tile([*rising, *rising[::-1]], 4), atol=1e-12)
    assert multiples(TrainingOptions(schedule="cyclical", span=40, cycles=2, floor=0.5), 40).min() > 0.5


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "cyclical"])
def test_training_takes_its_rate_from_the_step(schedule: str):
    """Plain gradient descent moves by rate × gradient: the scheduled step is the constant one times the multiple."""
    options = {"schedule": schedule, "warmup": "3", "dtype": "float64"}
    plain = workload_from("linreg", {"dtype": "float64"})
    scheduled = workload_from("linreg", options, steps=20)
    run = TrainingRun(scheduled, [run_seed(0, 0)])
    for step in range(20):
        before = run.vectors()
        run.advance(1)
        same = TrainingRun(plain, [run_seed(0, 0)])
        same.load(before)
        same.advance(1)
        expected = rate_multiple(scheduled.config, step) * (same.vectors() - before)
        np.testing.assert_allclose(run.vectors() - before, expected, rtol=1e-9, atol=1e-15)


def test_a_schedule_spans_the_recording_or_what_it_says():
    assert workload_from("linreg", {"schedule": "cosine"}, steps=30).config.span == 30
    assert workload_from("linreg", {"schedule": "cosine", "span": "50"}, steps=30).config.span == 50
    assert workload_from("linreg", {"schedule": "cosine"}).config.span == 199
    assert workload_from("linreg", {}, steps=30).config.span is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
def test_every_rule_takes_rate_and_decay(rule: str, fused: bool):
    options = TrainingOptions(optimizer=rule, lr=0.5, weight_decay=0.25)  # pyright: ignore[reportArgumentType]
    optimizer = build_optimizer(options, [nn.Parameter(torch.ones(3))], fused=fused)
    (group,) = optimizer.param_groups
    assert type(optimizer).__name__.lower() == {"momentum": "sgd"}.get(rule, rule)
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0)) == (0.5, 0.25, 0.9 * (rule == "momentum"))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
def test_fused_updates_are_those_of_the_rule(rule: str, dtype: str):
    """Long enough for the vectorised part of the kernels, whose rounding may differ in the last places."""
    options = TrainingOptions(optimizer=rule, lr=0.125, weight_decay=0.0, dtype=dtype)  # pyright: ignore[reportArgumentType]
    start = torch.randn(67, generator=torch.Generator().manual_seed(0)).to(dtype_of(options))
    found = []
    for fused in (False, True):
        parameter = nn.Parameter(start.clone())
        optimizer = build_optimizer(options, [parameter], fused=fused)
        for step in range(3):
            parameter.grad = torch.randn(67, generator=torch.Generator().manual_seed(step)).to(parameter.dtype)
            optimizer.step()
        found.append(parameter.detach())
    tolerance = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 0.02}[dtype]
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    assert float((found[1] - start).abs().float().median()) > 0.05


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_shuffled_batches_start_anywhere(start: int):
    whole = [batch.tolist() for batch, _ in zip(shuffled(7, 23, 5), range(20), strict=False)]
    assert next(shuffled(7, 23, 5, start)).tolist() == whole[start]
    for epoch in range(5):
        assert len({index for batch in whole[4 * epoch : 4 * epoch + 4] for index in batch}) == 20
    assert whole[:4] != whole[4:8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "nan"}, "lr=nan, expected a finite number"),
        ({"weight_decay": "-1"}, "weight_decay=-1.0"),
        ({"schedule": "linear"}, "expected constant|cosine|wsd|cyclical"),
        ({"warmup": "-1"}, "warmup=-1, expected at least 0"),
        ({"span": "0"}, "span=0, expected at least 1"),
        ({"cycles": "0"}, "cycles=0"),
        ({"decay": "0"}, "decay=0.0, expected a share"),
        ({"decay": "1.5"}, "decay=1.5"),
        ({"floor": "-0.1"}, "floor=-0.1"),
        ({"schedule": "wsd", "warmup": "30", "span": "30"}, "warmup=30, expected fewer than the 30 steps"),
        ({"schedule": "wsd", "warmup": "30"}, "warmup=30, expected fewer than the 20 steps"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("linreg", options, steps=20)
    assert message in str(caught.value)
