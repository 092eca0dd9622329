import numpy as np
import pytest
import torch
from torch import nn

from farcli.errors import StoreError, UsageError
from farcli.training import (
    Network,
    TrainingRun,
    describe_workload,
    reestimate,
    run_seed,
    threads,
    workload_from,
    workload_of,
)
from farcli.weights import layout_of_module
from farcli.workloads.digits_cnn import DigitsCnn


def test_seeds_of_runs_never_meet():
    seeds = {run_seed(seed, run) for seed in range(20) for run in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert run_seed(7, 3) == run_seed(7, 3)
    assert len({bin(seed).count("1") for seed in seeds}) > 15


def test_seeds_stay_what_they_were():
    # stores name runs by these: changing them would change every recorded result
    assert [run_seed(0, 0), run_seed(0, 1), run_seed(1, 0)] == [4232842298785526, 2383740928328724, 4117112474581694]


def test_negative_seeds_are_refused():
    with pytest.raises(UsageError, match="seed -1"):
        run_seed(-1, 0)


def test_unknown_workloads_are_refused_with_a_guess():
    with pytest.raises(UsageError, match="Did you mean 'linreg'"):
        workload_from("linrge", {})
    with pytest.raises(UsageError, match="expected a subclass"):
        workload_from("farcli.training:TrainingRun", {})


def test_a_workload_may_come_from_outside_the_table():
    assert isinstance(workload_from("farcli.workloads.digits_cnn:DigitsCnn", {}), DigitsCnn)


def test_headers_without_or_with_a_broken_workload():
    assert workload_of({}) is None
    for broken in ("linreg", {"name": 3}, {"name": "linreg"}, {"name": "linreg", "options": {"lr": 0.1}}):
        with pytest.raises(StoreError, match="header"):
            workload_of({"workload": broken})


def test_options_survive_the_header():
    options = {"optimizer": "adam", "noise": "0.31622776601683794", "batch": "32", "dtype": "float64"}
    again = workload_of({"workload": describe_workload("linreg", workload_from("linreg", options))})
    assert again is not None
    assert again.config == workload_from("linreg", options).config
    assert again.config.noise == 0.31622776601683794


def test_steps_in_one_go_or_one_by_one_are_the_same():
    workload = workload_from("digits-cnn", {})
    runs = [TrainingRun(workload, [1]) for _ in range(2)]
    last = runs[0].advance(5)
    for _ in range(5):
        single = runs[1].advance(1)
    assert runs[0].step == runs[1].step == 5
    assert runs[0].vectors().tobytes() == runs[1].vectors().tobytes()
    assert np.array_equal(last, single)
    assert last.shape == (1,)


def test_the_returned_loss_is_the_last_batchs_before_its_step():
    workload = workload_from("linreg", {})
    run = TrainingRun(workload, [1, 2, 3])
    batch = next(workload.batches([1, 2, 3]))
    with torch.no_grad():
        expected = workload.loss(run.model, batch)
    assert np.array_equal(run.advance(1), expected.double().numpy())


def test_loading_goes_on_from_other_weights():
    workload = workload_from("linreg", {})
    run, other = TrainingRun(workload, [1, 2]), TrainingRun(workload, [1, 2])
    run.advance(4)
    kept = run.vectors()
    other.load(kept)
    assert other.vectors().tobytes() == kept.tobytes()
    assert other.step == 0
    run.advance(1)
    other.advance(1)  # plain gradient descent on the full batch has no other state
    assert other.vectors().tobytes() == run.vectors().tobytes()
    assert not np.array_equal(kept, run.vectors())


def test_loading_without_integers_keeps_them():
    run = TrainingRun(workload_from("digits-cnn", {}), [1])
    run.advance(3)
    run.load(np.zeros_like(run.vectors()))
    assert not run.vectors().any()
    assert run.integers().tolist() == [[3, 3]]


def test_a_store_of_another_network_is_refused():
    narrow = TrainingRun(workload_from("digits-cnn", {"width": "4"}), [1]).layout
    with pytest.raises(StoreError, match=rf"D = {narrow.size} in .* but .* D = 1970"):
        Network(workload_from("digits-cnn", {}), narrow)
    with pytest.raises(StoreError, match="calls them differently"):
        Network(workload_from("linreg", {}), layout_of_module(nn.Sequential(nn.Linear(1, 1))))


def test_reestimating_repairs_statistics_that_do_not_fit():
    workload = workload_from("digits-cnn", {})
    run = TrainingRun(workload, [1])
    run.advance(120)
    network = Network(workload, run.layout)
    vector, integers = run.vectors()[0], run.integers()[0]
    whole = network.evaluate(vector, integers, 1)["loss"]
    broken = vector.copy()
    broken[run.layout.slice_of("1.running_var")] *= 100
    assert network.evaluate(broken, integers, 1)["loss"] > 2 * whole
    repaired = network.evaluate(broken, integers, 1, reestimate_buffers=True)["loss"]
    assert repaired == network.evaluate(vector, integers, 1, reestimate_buffers=True)["loss"]
    assert repaired == pytest.approx(whole, rel=0.1)
    fitting = network.reestimated(broken, integers, 1)
    assert network.evaluate(fitting, integers, 1)["loss"] == repaired
    assert np.array_equal(fitting[: run.layout.parameters], vector[: run.layout.parameters])


def test_reestimating_keeps_dropout_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))
    workload = workload_from("digits-cnn", {})
    random = torch.get_rng_state()
    reestimate(workload, model, 1)
    assert torch.equal(torch.get_rng_state(), random)
    norm = model[2]
    images, _ = next(workload.calibration(1))
    with torch.no_grad():
        torch.testing.assert_close(norm.running_mean, model[0](images).mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 0
    assert model[1].training


def test_threads_are_set_for_a_while_only():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        _ = 1 // 0
    assert torch.get_num_threads() == before
