"""The control: training on, with a rate that falls to 0."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from farcli import evaluate, record
from farcli.cooling import FallingRate, Results, steps_to_reach
from farcli.errors import UsageError
from farcli.evaluation import measure_of_workload
from farcli.store import Trajectory
from farcli.training import workload_of
from farcli.weights import load

RECORDED: dict[str, Any] = {"runs": 3, "every": 5, "seed": 7}
CONTROL = [(10, 0.8), (20, 0.6), (40, 0.58)]


@pytest.mark.parametrize(
    ("loss", "steps"),
    [
        (1.0, 0),
        (1.1, 0),  # worse than keeping w_n
        (float("nan"), 0),  # a forecast that went out of hand is no gain
        (0.9, 5),
        (0.8, 10),
        (0.7, 15),  # between two that were trained
        (0.58, 40),
        (0.55, None),  # beyond them nothing is claimed
    ],
)
def test_steps_that_reach_a_loss(loss: float, steps: float | None) -> None:
    assert steps_to_reach(loss, 1.0, CONTROL) == (None if steps is None else pytest.approx(steps))


def test_a_control_that_first_rises_counts_from_there() -> None:
    assert steps_to_reach(0.9, 1.0, [(10, 1.1), (20, 0.7)]) == pytest.approx(15)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cooling") / "runs.zarr"
    record("digits-cnn", path, steps=40, options={"held_back": "300", "own_split": "true"}, **RECORDED)
    return path


def measure_of(truth: Trajectory) -> Callable[[np.ndarray, np.ndarray, int], dict[str, float]]:
    measure = measure_of_workload(truth, "stored")
    assert measure is not None
    return measure.of


def trained(truth: Trajectory, runs: list[int], origin: int, ends: list[int], **more: Any) -> Results:
    with TemporaryDirectory() as folder:
        measure = more.pop("measure", None) or measure_of(truth)
        return FallingRate(Path(folder), truth, runs, origin, ends[-1], measure, **more).trained(ends)


def test_it_is_a_training_whose_rate_falls_from_there(store: Path, tmp_path: Path) -> None:
    """With its optimiser's state, bit for bit what `record` makes with that schedule from the start; or a new one."""
    truth = Trajectory.open(store)
    measured: dict[int, list[float]] = {1: [], 2: []}
    of, told = measure_of(truth), list[str]()

    def watched(vector: np.ndarray, integers: np.ndarray, run: int) -> dict[str, float]:
        found = of(vector, integers, run)
        measured[run].append(found["loss"])
        return found

    found = trained(truth, [1, 2], 20, [21, 35], measure=watched, warn=told.append)
    assert told == []
    options = {"held_back": "300", "own_split": "true", "schedule": "wsd", "decay": repr(15 / 35)}
    record("digits-cnn", tmp_path / "falling.zarr", steps=35, options=options, **RECORDED)
    falling = Trajectory.open(tmp_path / "falling.zarr")
    for run in (1, 2):
        expected = measure_of(falling)(falling.read([run], [35])[0, 0], falling.integers(run, 35), run)
        assert measured[run][1] == expected["loss"]
    tunings = list(zip(measured[1], measured[2], strict=True))
    assert len(tunings) >= 8  # state kept and new, the rate as it was and doubled, to each of two ends
    for place, end in enumerate((21, 35)):
        assert tuple(found[run][end]["loss"] for run in (1, 2)) == min(tunings[place::2], key=np.mean)


RATE = 0.2
SGD = {"optimizer": "sgd", "lr": str(RATE), "train": "500"}


def by_hand(truth: Trajectory, weights: np.ndarray, run: int, origin: int, steps: int, raised: float) -> float:
    """Plain gradient descent written out, its rate on a line to 0."""
    workload = workload_of(truth.header)
    assert workload is not None
    seed = truth.header["seeds"][run]
    model, batches = workload.model([seed]), workload.batches([seed], origin)
    load(model, truth.layout, weights)
    for step in range(steps):
        loss = workload.loss(model, next(batches)).sum()
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for weight, slope in zip(model.parameters(), slopes, strict=True):
                weight.sub_(raised * RATE * (1 - step / steps) * slope)
    return workload.evaluate(model.eval(), seed)["loss"]


def test_the_rate_is_doubled_for_as_long_as_that_helps(tmp_path: Path) -> None:
    record("image-mlp", tmp_path / "runs.zarr", runs=2, steps=20, every=5, options=SGD)
    truth = Trajectory.open(tmp_path / "runs.zarr")
    found = trained(truth, [0, 1], 10, [20])
    losses = {
        raised: [by_hand(truth, truth.read([run], [10])[0, 0], run, 10, 10, raised) for run in (0, 1)]
        for raised in (1, 2, 4, 8, 16, 32, 64)
    }
    best = min(losses, key=lambda raised: np.mean(losses[raised]))
    assert 1 < best < 64
    assert [found[run][20]["loss"] for run in (0, 1)] == pytest.approx(losses[best], rel=1e-4)


def test_what_a_forecast_saves_where_both_end_alike(tmp_path: Path) -> None:
    record("image-mlp", tmp_path / "runs.zarr", runs=2, steps=30, every=5, options=SGD)
    truth = Trajectory.open(tmp_path / "runs.zarr")
    rows = evaluate(["linear"], [str(truth.path)], start=10, context=3, targets="15,30", control=True)
    [near, far] = [row for row in rows if row["method"] == "linear"]
    for row in (near, far):
        before, last = (truth.read([0, 1], [step])[:, 0] for step in (5, 10))
        forecasts = last + (last - before) * row["ahead"] / 5
        tried = [
            np.mean([by_hand(truth, forecast, run, 10, 5, raised) for run, forecast in enumerate(forecasts)])
            for raised in (1, 2, 4, 8, 16, 32, 64)
        ]
        assert row["finished_loss"] == pytest.approx(min(tried), rel=1e-4)
        assert row["control_furthest"] == 20
    kept = next(row for row in rows if row["method"] == "persistence")["loss"]
    control = trained(truth, [0, 1], 10, [12, 13, 15, 20, 30])
    curve = [(end - 10, float(np.mean([control[run][end]["loss"] for run in (0, 1)]))) for end in control[0]]
    for row in (near, far):
        reached = steps_to_reach(row["finished_loss"], kept, curve)
        assert row["saved_steps"] == (None if reached is None else pytest.approx(reached - 5))
    assert near["saved_steps"] is not None


def test_other_weights_than_those_recorded_are_said(tmp_path: Path, store: Path) -> None:
    record("digits-cnn", tmp_path / "other.zarr", steps=20, options={"held_back": "300"}, runs=1, every=5, seed=8)
    truth = Trajectory.open(tmp_path / "other.zarr")
    truth.header["seeds"][0] += 1
    told: list[str] = []
    trained(truth, [0], 10, [12], measure=lambda vector, integers, run: {"loss": 1.0}, warn=told.append)
    assert len(told) == 1
    assert "run 0 trained again has other weights at step 10" in told[0]


def test_rates_that_follow_a_schedule_are_refused(tmp_path: Path) -> None:
    record("linreg", tmp_path / "runs.zarr", runs=2, steps=20, every=5, options={"schedule": "cosine"})
    with pytest.raises(UsageError, match="is not constant after step 10, so that its true future is the control"):
        trained(Trajectory.open(tmp_path / "runs.zarr"), [0], 10, [12])


@pytest.mark.parametrize("stores", [1, 2])
def test_evaluate_shows_it_at_every_horizon(store: Path, tmp_path: Path, stores: int) -> None:
    paths = [store]
    if stores == 2:
        paths.append(tmp_path / "more.zarr")
        record("digits-cnn", paths[1], steps=40, options={"held_back": "300"}, runs=2, every=5, seed=9)
    rows = evaluate(["linear"], [str(path) for path in paths], start=20, context=3, targets="30,40", control=True)
    plain = evaluate(["linear"], [str(path) for path in paths], start=20, context=3, targets="30,40")
    found = [row for row in rows if row["role"] == "control"]
    assert [(row["step"], row["method"], row["runs"]) for row in found] == [
        (30, "falling rate", 3 if stores == 1 else 5), (40, "falling rate", 3 if stores == 1 else 5)
    ]  # fmt: skip
    for row in found:
        assert row["net_steps"] == row["equivalent_steps"] - row["ahead"]
        assert row["rank"] is None
        assert row["control_steps"] is None or row["control_steps"] <= row["ahead"]
    others = [row for row in rows if row["role"] != "control"]
    assert all(row.get("control_steps") is None for row in plain)
    assert len(others) == len(plain)
    added = {"control_steps", "control_furthest", "finished_loss", "saved_steps"}
    for row, expected in zip(others, plain, strict=True):
        assert {key: repr(value) for key, value in row.items() if key not in added} == {
            key: repr(value) for key, value in expected.items() if key not in added
        }
        if row["role"] == "forecast":
            assert row["finished_loss"] is not None
    for step in (30, 40):
        yardsticks = [row for row in others if row["role"] == "yardstick" and row["step"] == step]
        [finished] = [row["method"] for row in yardsticks if row["finished_loss"] is not None]
        assert finished == min(yardsticks, key=lambda row: row["loss"])["method"]
    kept = next(row for row in rows if row["method"] == "persistence")
    assert kept["control_steps"] == 0
