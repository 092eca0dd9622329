from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from farcli import weights
from farcli.errors import UsageError
from farcli.store import Trajectory
from farcli.training import TrainingRun, run_seed, workload_from
from farcli.verbs.evaluate import evaluate
from farcli.verbs.fit import fit
from farcli.verbs.forecast import forecast
from farcli.verbs.record import record
from farcli.workloads.mlp import Mlp, MlpConfig

SEEDS = [run_seed(4, run) for run in range(6)]
RULES = ("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad")


def trained(workload: Mlp, seeds: list[int], steps: int = 30) -> np.ndarray:
    """Weights [R, P]."""
    run = TrainingRun(workload, seeds)
    run.advance(steps)
    return run.vectors()


@pytest.mark.parametrize("hidden", ["2,2,1", "4,1"])
def test_both_architectures_have_15_parameters(hidden: str):
    layout = TrainingRun(Mlp(MlpConfig(hidden=hidden)), SEEDS).layout
    assert layout.parameters == layout.size == 15
    assert MlpConfig(hidden=hidden).parameters == 15


@pytest.mark.parametrize("batch", [100, 32])
@pytest.mark.parametrize("hidden", ["2,2,1", "4,1"])
@pytest.mark.parametrize("rule", RULES)
def test_runs_together_are_bit_equal_to_runs_alone(rule: str, hidden: str, batch: int):
    workload = Mlp(MlpConfig(optimizer=rule, hidden=hidden, batch=batch))  # pyright: ignore[reportArgumentType]
    together = trained(workload, SEEDS)
    for index in (0, 5):
        assert trained(workload, [SEEDS[index]])[0].tobytes() == together[index].tobytes()


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
def test_a_run_is_the_network_that_torch_would_train(activation: str):
    """One network of `nn.Linear` layers, trained by a loop of its own, ends at the same weights."""
    workload = Mlp(MlpConfig(hidden="3,2", activation=activation, dtype="float64"))  # pyright: ignore[reportArgumentType]
    run = TrainingRun(workload, SEEDS)
    kind = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}[activation]
    plain = nn.Sequential(nn.Linear(1, 3), kind(), nn.Linear(3, 2), kind(), nn.Linear(2, 1)).double()
    state = weights.unflatten(run.vectors()[2], None, run.layout)
    plain.load_state_dict({f"{2 * int(name[0])}{name[1:]}": tensor for name, tensor in state.items()})
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for (x_RN, y_RN), _ in zip(workload.batches(SEEDS), range(40), strict=False):
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x_RN[2, :, None])[:, 0], y_RN[2]).backward()
        optimizer.step()
    run.advance(40)
    expected = torch.cat([parameter.detach().reshape(-1) for parameter in plain.parameters()])
    np.testing.assert_allclose(run.vectors()[2], expected.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_padding_stays_zero_and_changes_nothing(rule: str):
    plain, padded = (
        trained(Mlp(MlpConfig(optimizer=rule, pad=pad)), SEEDS)  # pyright: ignore[reportArgumentType]
        for pad in (None, 18)
    )
    assert padded.shape == (6, 18)
    assert padded[:, :15].tobytes() == plain.tobytes()
    assert not padded[:, 15:].any()


@pytest.mark.parametrize("init", ["torch", "normal", "xavier_normal", "xavier_uniform"])
def test_first_weights_are_those_of_torch(init: str):
    """Each tensor's spread over many runs, against torch's own initialisers."""
    config = MlpConfig(init=init)  # pyright: ignore[reportArgumentType]
    found = TrainingRun(Mlp(config), [run_seed(1, run) for run in range(800)])
    torch.manual_seed(0)
    for slot in found.layout.slots:
        values = found.vectors()[:, slot.offset : slot.stop].reshape(-1)
        shape = config.shapes[slot.name]
        layers = [nn.Linear(config.shapes[f"{slot.name[0]}.weight"][1], shape[0]) for _ in range(800)]
        own = [getattr(layer, slot.name[2:]).detach() for layer in layers]
        if init != "torch" and len(shape) == 1:
            assert not values.any()
            continue
        if init != "torch":
            draw = {"normal": nn.init.normal_, "xavier_normal": nn.init.xavier_normal_}.get(
                init, nn.init.xavier_uniform_
            )
            own = [draw(tensor) for tensor in own]
        expected = torch.stack(own).reshape(-1).numpy()
        assert values.std() == pytest.approx(expected.std(), rel=0.12)
        assert abs(values.mean()) < 0.15 * expected.std()
        tails = [
            np.abs(part).max() / part.std() for part in (values, expected)
        ]  # √3 of a uniform one, 3 or more of others
        assert (tails[0] < 1.9) == (tails[1] < 1.9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("hidden", ["2,2,1", "4,1"])
def test_most_runs_learn_their_line(hidden: str, rule: str):
    workload = Mlp(MlpConfig(hidden=hidden, optimizer=rule))  # pyright: ignore[reportArgumentType]
    seeds = [run_seed(9, run) for run in range(20)]
    vectors = trained(workload, seeds, 199)
    network = TrainingRun(workload, seeds[:1])
    losses = []
    for vector, seed in zip(vectors, seeds, strict=True):
        network.load(vector[None])
        losses.append(workload.evaluate(network.model, seed)["loss"])
    assert np.median(losses) < 0.15 * workload.chance()["loss"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three-layer networks to fit on and two-layer ones to judge on, with their own tensors and in one vector."""
    folder = tmp_path_factory.mktemp("both")
    for name, hidden, runs, seed in (("three", "2,2,1", 12, 0), ("two", "4,1", 6, 1)):
        for suffix, pad in (("", {}), ("-padded", {"pad": "15"})):
            options = {"hidden": hidden, **pad}
            record("mlp", folder / f"{name}{suffix}.zarr", runs=runs, steps=40, seed=seed, options=options)
    return folder


def test_a_forecaster_of_whole_vectors_serves_both_padded(both: Path):
    fit(
        "gfm",
        [str(both / "three-padded.zarr")],
        both / "gfm.safetensors",
        context=5,
        targets="40",
        options={"epochs": "5"},
    )
    forecast(str(both / "gfm.safetensors"), str(both / "two-padded.zarr"), both / "gfm.zarr")
    made, truth = Trajectory.open(both / "gfm.zarr"), Trajectory.open(both / "two-padded.zarr")
    assert made.layout == truth.layout == Trajectory.open(both / "three-padded.zarr").layout
    rows = [row for row in evaluate([str(both / "gfm.zarr")], str(both / "two-padded.zarr")) if row["tensor"] is None]
    assert {"gfm", "persistence", "linear"} <= {row["method"] for row in rows}
    assert all(np.isfinite(row["mse"]) and not row["in_sample"] for row in rows if row["method"] == "gfm")


def test_a_shared_map_transfers_when_told_to(both: Path):
    fit("lfd2", [str(both / "three.zarr")], both / "lfd2.safetensors", context=5, targets="40")
    with pytest.raises(UsageError, match="other tensors") as caught:
        forecast(str(both / "lfd2.safetensors"), str(both / "two.zarr"), both / "lfd2.zarr")
    assert "--transfer" in str(caught.value.hint)
    forecast(str(both / "lfd2.safetensors"), str(both / "two.zarr"), both / "lfd2.zarr", transfer=True)
    truth, made = Trajectory.open(both / "two.zarr"), Trajectory.open(both / "lfd2.zarr")
    error = made.read(made.runs, [40])[:, 0] - truth.read(truth.runs, [40])[:, 0]
    kept = truth.read(truth.runs, [4])[:, 0] - truth.read(truth.runs, [40])[:, 0]
    assert np.square(error).mean() < np.square(kept).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": "2,,1"}, "hidden='2,,1'"),
        ({"hidden": "0"}, "hidden='0'"),
        ({"hidden": "wide"}, "hidden='wide'"),
        ({"pad": "14"}, "pad=14, but hidden=2,2,1 has 15 parameters"),
        ({"batch": "0"}, "batch=0"),
        ({"noise": "inf"}, "noise=inf"),
        ({"dtype": "bfloat16"}, "float32|float64"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("mlp", options)
    assert message in str(caught.value)
