from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from farcli import weights
from farcli.errors import UsageError
from farcli.training import TrainingRun, run_seed, workload_from
from farcli.workloads.linreg import Linreg, LinregConfig

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad")
SEEDS = [run_seed(3, run) for run in range(7)]


def reference(optimizer: str, x: np.ndarray, y: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """The trajectory [steps + 1, 2] of (weight, bias), from the optimisers' own papers, in float64.

    Sutskever et al. 2013 (momentum, as torch scales it),
    Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW), Hinton's lecture 6 (RMSProp), Duchi et al. 2011.
    """
    theta = start.astype(np.float64)
    mean, square = np.zeros(2), np.zeros(2)
    path = [theta]
    for step in range(1, steps + 1):
        residual = theta[0] * x + theta[1] - y
        gradient = 2 * np.array([np.mean(residual * x), np.mean(residual)])
        match optimizer:
            case "sgd":
                theta = theta - 0.01 * gradient
            case "momentum":
                mean = 0.9 * mean + gradient
                theta = theta - 0.01 * mean
            case "adam" | "adamw":
                if optimizer == "adamw":
                    theta = theta * (1 - 0.01 * 0.01)
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.999 * square + 0.001 * gradient**2
                unbiased = mean / (1 - 0.9**step), square / (1 - 0.999**step)
                theta = theta - 0.01 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
            case "rmsprop":
                gradient = gradient + 0.01 * theta
                square = 0.99 * square + 0.01 * gradient**2
                theta = theta - 0.01 * gradient / (np.sqrt(square) + 1e-8)
            case "adagrad":
                square = square + gradient**2
                theta = theta - 0.1 * gradient / (np.sqrt(square) + 1e-10)
        path.append(theta)
    return np.array(path)


def trained(workload: Linreg, seeds: list[int], steps: int) -> np.ndarray:
    """Weights [R, steps + 1, 2]."""
    run = TrainingRun(workload, seeds)
    snapshots = [run.vectors()]
    for _ in range(steps):
        run.advance(1)
        snapshots.append(run.vectors())
    return np.stack(snapshots, axis=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimiser_is_the_one_of_its_paper(optimizer: str):
    workload = Linreg(LinregConfig(optimizer=optimizer, dtype="float64"))
    found = trained(workload, SEEDS[:2], 199)
    x_RN, y_RN = (part.numpy() for part in next(workload.batches(SEEDS[:2])))
    for run in range(2):
        expected = reference(optimizer, x_RN[run], y_RN[run], found[run, 0], 199)
        np.testing.assert_allclose(found[run], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch", [100, 32])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_runs_together_are_bit_equal_to_runs_alone(optimizer: str, batch: int, dtype: str):
    workload = Linreg(LinregConfig(optimizer=optimizer, batch=batch, dtype=dtype))
    together = trained(workload, SEEDS, 40)
    for index in (0, 3, 6):
        alone = trained(workload, [SEEDS[index]], 40)
        assert alone[0].tobytes() == together[index].tobytes()


def test_a_run_does_not_depend_on_its_neighbours():
    workload = Linreg(LinregConfig(batch=32))
    assert trained(workload, SEEDS, 9)[2].tobytes() == trained(workload, SEEDS[2:], 9)[0].tobytes()
    assert trained(workload, SEEDS, 9)[2].tobytes() == trained(workload, SEEDS[::-1], 9)[4].tobytes()


def test_one_run_loads_into_nn_linear():
    run = TrainingRun(Linreg(LinregConfig()), SEEDS)
    run.advance(5)
    model = nn.Linear(1, 1)
    model.load_state_dict(weights.unflatten(run.vectors()[4], None, run.layout), strict=True)
    x = torch.linspace(-1, 1, 5)
    together = run.model(x.expand(len(SEEDS), -1))
    torch.testing.assert_close(model(x[:, None])[:, 0], together[4])


def test_tasks_are_drawn_as_the_paper_says():
    workload = Linreg(LinregConfig(noise=0.0, dtype="float64", points=20))
    seeds = [run_seed(11, run) for run in range(2000)]
    x_RN, y_RN = (part.numpy() for part in next(workload.batches(seeds)))
    slopes, intercepts = np.array([np.polyfit(x, y, 1) for x, y in zip(x_RN, y_RN, strict=True)]).T
    for values, mean in ((slopes, 2.0), (intercepts, 1.0)):
        assert abs(values.mean() - mean) < 5 * 0.1 / np.sqrt(2000)
        assert abs(values.std() - 0.1) < 5 * 0.1 / np.sqrt(2 * 2000)
    assert abs(np.corrcoef(slopes, intercepts)[0, 1]) < 0.1
    assert -1 <= x_RN.min() < -0.99
    assert 0.99 < x_RN.max() <= 1


def test_noise_is_a_standard_deviation():
    quiet, loud = (Linreg(LinregConfig(noise=noise, dtype="float64", points=1000)) for noise in (0.0, 0.5))
    difference = next(loud.batches(SEEDS))[1] - next(quiet.batches(SEEDS))[1]
    assert float(difference.std()) == pytest.approx(0.5, rel=0.05)


def test_small_batches_reshuffle_every_epoch():
    workload = Linreg(LinregConfig(batch=32))
    x_RN, y_RN = next(Linreg(LinregConfig()).batches(SEEDS))
    epochs = [list(islice(batches, 4)) for batches in [workload.batches(SEEDS)] for _ in range(2)]
    orders = []
    for epoch in epochs:
        assert [batch[0].shape[1] for batch in epoch] == [32, 32, 32, 4]
        x, y = (torch.cat(parts, dim=1) for parts in zip(*epoch, strict=True))
        order = x.argsort(dim=1)
        assert torch.equal(x.gather(1, order), x_RN.sort(dim=1).values)
        assert torch.equal(y.gather(1, order), y_RN.gather(1, x_RN.argsort(dim=1)))
        orders.append(order)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0][0], orders[0][1])


def test_initial_weights_follow_their_option():
    seeds = [run_seed(5, run) for run in range(4000)]
    start = {
        init: TrainingRun(Linreg(LinregConfig(init=init)), seeds).vectors()
        for init in ("normal", "xavier_normal", "xavier_uniform", "fixed")
    }
    for init in ("normal", "xavier_normal", "xavier_uniform"):
        assert abs(start[init][:, 0].mean()) < 0.08
        assert abs(start[init][:, 0].std() - 1) < 0.06
    assert np.abs(start["xavier_uniform"][:, 0]).max() < np.sqrt(3)
    assert np.abs(start["normal"][:, 0]).max() > 3
    assert np.array_equal(np.unique(start["fixed"], axis=0), [[0.5, 0.0]])
    assert all((vectors[:, 1] == 0).all() for vectors in start.values())
    biased = TrainingRun(Linreg(LinregConfig(bias_init="normal")), seeds).vectors()
    assert np.array_equal(biased[:, 0], start["normal"][:, 0])
    assert abs(biased[:, 1].std() - 1) < 0.06
    assert abs(np.corrcoef(biased.T)[0, 1]) < 0.1


def test_defaults_follow_the_optimiser():
    configs = {name: Linreg(LinregConfig(optimizer=name)).config for name in OPTIMIZERS}
    assert {name: config.lr for name, config in configs.items()} == dict.fromkeys(OPTIMIZERS, 0.01) | {"adagrad": 0.1}
    decays = {name: config.weight_decay for name, config in configs.items()}
    assert decays == dict.fromkeys(OPTIMIZERS, 0.0) | {"adamw": 0.01, "rmsprop": 0.01}
    assert Linreg(LinregConfig(lr=0.5, weight_decay=0.0, optimizer="adamw")).config.weight_decay == 0.0


def test_chance_is_the_best_constant_over_tasks():
    workload = Linreg(LinregConfig(points=1000, noise=0.3))
    _, y_RN = next(workload.batches([run_seed(6, run) for run in range(300)]))
    assert float(y_RN.var(dim=1).mean()) == pytest.approx(workload.chance()["loss"], rel=0.02)


def test_the_true_line_reaches_the_noise_floor_on_held_out_points():
    workload = Linreg(LinregConfig(optimizer="adagrad", lr=1.0, noise=0.2, points=2000))
    run = TrainingRun(workload, SEEDS[:1])
    run.advance(300)
    assert workload.evaluate(run.model, SEEDS[0])["loss"] == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "0"}, "batch=0"),
        ({"points": "0"}, "points=0"),
        ({"noise": "-1"}, "noise=-1"),
        ({"lr": "nan"}, "lr=nan"),
        ({"weight_decay": "-0.1"}, "weight_decay=-0.1"),
        ({"init": "fixed", "bias_init": "normal"}, "bias_init=normal"),
        ({"optimizer": "lion"}, "sgd|momentum|adam"),
        ({"lrr": "1"}, "Did you mean 'lr'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("linreg", options)
    assert message in str(caught.value)
