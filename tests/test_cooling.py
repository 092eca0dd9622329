"""The control: training on, with a rate that falls to 0."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farcli import evaluate, record
from farcli.cooling import cooled, steps_to_reach
from farcli.errors import UsageError
from farcli.evaluation import measure_of_workload
from farcli.store import Trajectory

RECORDED: dict[str, Any] = {"runs": 3, "every": 5, "seed": 7}
CONTROL = [(10, 0.8), (20, 0.6), (40, 0.58)]


@pytest.mark.parametrize(
    ("loss", "steps"),
    [
        (1.0, 0),
        (1.1, 0),  # worse than keeping w_n
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


def test_it_is_a_training_whose_rate_falls_from_there(store: Path, tmp_path: Path) -> None:
    """With its optimiser's state, bit for bit what `record` makes with that schedule from the start; or a new one."""
    truth = Trajectory.open(store)
    measured: dict[int, list[float]] = {1: [], 2: []}
    of, told = measure_of(truth), list[str]()

    def watched(vector: np.ndarray, integers: np.ndarray, run: int) -> dict[str, float]:
        found = of(vector, integers, run)
        measured[run].append(found["loss"])
        return found

    found = cooled(truth, [1, 2], 20, [21, 35], watched, warn=told.append)
    assert told == []
    options = {"held_back": "300", "own_split": "true", "schedule": "wsd", "decay": repr(15 / 35)}
    record("digits-cnn", tmp_path / "falling.zarr", steps=35, options=options, **RECORDED)
    falling = Trajectory.open(tmp_path / "falling.zarr")
    for run in (1, 2):
        expected = measure_of(falling)(falling.read([run], [35])[0, 0], falling.integers(run, 35), run)
        assert measured[run][1] == expected["loss"]
    for place, end in enumerate((21, 35)):
        kept, new = ([measured[run][place + state] for run in (1, 2)] for state in (0, 2))
        assert kept != new
        assert [found[run][end]["loss"] for run in (1, 2)] == min(kept, new, key=np.mean)


def test_other_weights_than_those_recorded_are_said(tmp_path: Path, store: Path) -> None:
    record("digits-cnn", tmp_path / "other.zarr", steps=20, options={"held_back": "300"}, runs=1, every=5, seed=8)
    truth = Trajectory.open(tmp_path / "other.zarr")
    truth.header["seeds"][0] += 1
    told: list[str] = []
    cooled(truth, [0], 10, [12], lambda vector, integers, run: {"loss": 1.0}, warn=told.append)
    assert len(told) == 1
    assert "run 0 trained again has other weights at step 10" in told[0]


def test_rates_that_follow_a_schedule_are_refused(tmp_path: Path) -> None:
    record("linreg", tmp_path / "runs.zarr", runs=2, steps=20, every=5, options={"schedule": "cosine"})
    with pytest.raises(UsageError, match="is not constant after step 10, so that its true future is the control"):
        cooled(Trajectory.open(tmp_path / "runs.zarr"), [0], 10, [12], lambda vector, integers, run: {"loss": 1.0})


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
    for row, expected in zip(others, plain, strict=True):
        assert {key: repr(value) for key, value in row.items() if key != "control_steps"} == {
            key: repr(value) for key, value in expected.items() if key != "control_steps"
        }
    kept = next(row for row in rows if row["method"] == "persistence")
    assert kept["control_steps"] == 0
