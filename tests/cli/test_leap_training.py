"""`farcli leap WORKLOAD`: the real command, its store, its ledger, its stops."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from farcli.errors import StoppedError, UsageError
from farcli.speculation.arrays import read_part, read_rows
from farcli.speculation.options import Leaping
from farcli.store import Trajectory
from farcli.training import TrainingRun, run_seed, workload_from
from farcli.verbs.leap import leap, step_operations
from farcli.workloads.digits_cnn import DigitsCnn

Farcli = Callable[..., Any]
OPTIONS = {"held_back": "200"}
HOW = Leaping(every=4, window=12, memory=8, stride=2, start=8, budget=0.2, compute=0.5)
WORDS = ("leap", "digits-cnn", "--set", "held_back=200", "--steps", 40, "--snapshots", 10, "--every", 4, "--window", 12)
WORDS = (*WORDS, "--leap", "memory=8", "--leap", "stride=2", "--leap", "start=8", "--verify-budget", "20%")


def trained(path: Path, **more: Any) -> list[dict[str, Any]]:
    words: dict[str, Any] = {
        "predictors": ["spectral"],
        "leaping": HOW,
        "steps": 40,
        "every": 10,
        "options": OPTIONS,
        "runs": 2,
    }
    return leap("digits-cnn", path, **(words | more))


def everything(path: Path) -> bytes:
    stored = Trajectory.open(path)
    return stored.read(stored.runs, stored.steps).tobytes()


def test_a_store_a_ledger_an_average_and_a_control(farcli: Farcli, tmp_path: Path) -> None:
    path = tmp_path / "leap.zarr"
    done = farcli(*WORDS, "--runs", 2, "--control", "-o", path)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    proposals = [row for row in rows if row["kind"] == "leap"]
    runs = [row for row in rows if row["kind"] == "run"]
    assert [row["run"] for row in runs] == [0, 1]
    for row in runs:
        own = [entry for entry in proposals if entry["run"] == row["run"]]
        assert len(own) == row["proposals"] > 0
        assert sum(entry["verdict"] == "accepted" for entry in own) == row["accepted"]
        assert row["cost"] == pytest.approx(40 + row["verification"] + row["proposing"])
        assert row["verification"] <= 0.2 * 40
        assert row["net_steps"] == pytest.approx(row["equivalent_steps"] - row["cost"])
        assert row["speedup"] == pytest.approx(row["equivalent_steps"] / row["cost"])
        assert max(entry["step"] for entry in own) <= 40 - 12  # none that nothing comes after

    assert farcli("verify", path).code == 0
    assert farcli("verify", path / "average.zarr").code == 0
    ledger = zarr.open_group(path / "ledger", mode="r")
    assert ledger["proposal/step"][:].tolist() == [entry["step"] for entry in proposals]  # type: ignore[index]
    assert np.isfinite(ledger["snapshot/average_loss"][:]).all()  # type: ignore[index]
    assert ledger["snapshot/step"][:].tolist() == [0, 10, 20, 30, 40] * 2  # type: ignore[index]
    again = farcli(*WORDS, "--runs", 2, "--control", "-o", path)
    assert again.code == 2
    assert "already exists" in again.err
    resumed = farcli(*WORDS, "--runs", 2, "--control", "-o", path, "--resume")
    assert [json.loads(line) for line in resumed.out.splitlines()] == runs


def test_losses_are_those_of_the_stored_weights(tmp_path: Path) -> None:
    path = tmp_path / "leap.zarr"
    rows = trained(path)
    from farcli.training import Network

    for name, key in (("", "loss"), ("average.zarr", "average_loss")):
        stored = Trajectory.open(path / name)
        task = workload_from("digits-cnn", OPTIONS, steps=40)
        network = Network(task, stored.layout)
        for run, row in enumerate(rows):
            vector = stored.read([run], [40])[0, 0]
            found = network.evaluate(vector, stored.integers(run, 40), run_seed(0, run))
            assert found["loss"] == pytest.approx(row[key], rel=1e-6)


def test_no_predictor_is_the_training_itself(tmp_path: Path) -> None:
    path = tmp_path / "none.zarr"
    trained(path, predictors=["none"], runs=1)
    training = TrainingRun(workload_from("digits-cnn", OPTIONS, steps=40), [run_seed(0, 0)])
    training.advance(40)
    assert Trajectory.open(path).read([0], [40])[0].tobytes() == training.vectors().tobytes()


@pytest.mark.parametrize("predictors", [["spectral"], ["outer", "shift"]])
@pytest.mark.parametrize("stops", [(17,), (9, 55), (30, 31)])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, predictors: list[str], stops: tuple[int, ...]) -> None:
    whole, parts = tmp_path / "whole.zarr", tmp_path / "parts.zarr"
    rows = trained(whole, predictors=predictors)
    for step in stops:
        left = step if step == stops[0] else step - stops[0]
        counted = iter(range(10_000))
        with pytest.raises(StoppedError, match="saved"):
            trained(parts, predictors=predictors, resume=True, stop=lambda left=left, c=counted: next(c) >= left)
    again = trained(parts, predictors=predictors, resume=True)
    assert everything(parts) == everything(whole)
    assert everything(parts / "average.zarr") == everything(whole / "average.zarr")
    assert [{**row, "path": None} for row in again] == [{**row, "path": None} for row in rows]
    assert read_rows(parts) == read_rows(whole)
    assert not list(parts.glob("*.pt"))


class Interrupted(DigitsCnn):  # pyright: ignore[reportGeneralTypeIssues] - final elsewhere
    """Sends its own process a signal between the two measurements of a verification of the second run, once told to."""

    def verification(self, seed: int, draw: int, batches: int) -> Any:
        """The digits', and the signal before the second of draw 1."""
        if seed == run_seed(0, 1) and draw == 1 and (number := os.environ.pop("INTERRUPT", "")):
            if number.startswith("+"):
                os.kill(os.getpid(), int(number))
            else:
                os.environ["INTERRUPT"] = f"+{number}"
        return super().verification(seed, draw, batches)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupted") / "whole.zarr"
    leap(
        f"{__name__}:Interrupted",
        path,
        predictors=["spectral"],
        leaping=HOW,
        steps=40,
        every=10,
        options=OPTIONS,
        runs=2,
    )
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_in_the_middle_of_a_verification(
    farcli: Farcli, tmp_path: Path, whole: Path, number: int, code: int
) -> None:
    root, parts = str(Path(__file__).parents[2]), tmp_path / "parts.zarr"
    words = [f"{__name__}:Interrupted" if word == "digits-cnn" else word for word in WORDS]
    asked = (*words, "--runs", 2, "-q", "-o", parts)
    stopped = farcli(*asked, env={"PYTHONPATH": root, "INTERRUPT": str(int(number))})
    assert stopped.code == code, stopped.err
    assert (parts / "training.pt").exists() == (code == 75)
    done = farcli(*asked, "--resume", env={"PYTHONPATH": root})
    assert done.code == 0, done.err
    assert everything(parts) == everything(whole)
    assert everything(parts / "average.zarr") == everything(whole / "average.zarr")
    assert read_rows(parts) == read_rows(whole)
    ledgers = [json.dumps(read_part(path, "proposal"), sort_keys=True) for path in (parts, whole)]
    assert ledgers[0] == ledgers[1]
    assert "accepted" in ledgers[0]


def test_what_a_warm_start_begins_with(tmp_path: Path, farcli: Farcli) -> None:
    sibling, path = tmp_path / "sibling.zarr", tmp_path / "warm.zarr"
    words = ("--set", "held_back=200", "--steps", 20, "-q")
    assert farcli("record", "digits-cnn", "-o", sibling, "--every", 10, "--seed", 7, *words).code == 0
    rows = trained(path, runs=1, warm_start=str(sibling))
    assert rows[0]["sibling_steps"] == 20
    assert Trajectory.open(path).read([0], [0]).tobytes() == Trajectory.open(sibling).read([0], [20]).tobytes()
    other = farcli("record", "linreg", "-o", tmp_path / "other.zarr", "--steps", 5, "-q")
    assert other.code == 0
    refused = farcli(*WORDS, "--warm-start-from", tmp_path / "other.zarr")
    assert refused.code == 3
    assert "is of another network" in refused.err


def test_operations_of_a_step_are_those_of_its_products() -> None:
    """15 → 1 linear regression has none that count; the digits CNN has about six for each weight and position."""
    task = workload_from("digits-cnn", OPTIONS)
    operations = step_operations(task, run_seed(0, 0))
    # conv 1→8 on 8×8, conv 8→16 on 4×4 or 8×8, dense: a batch of 64, forwards and backwards
    assert 1e6 < operations < 1e9
    doubled = step_operations(workload_from("digits-cnn", OPTIONS | {"batch": "128"}), run_seed(0, 0))
    assert doubled == 2 * operations


def test_bad_input(farcli: Farcli, tmp_path: Path) -> None:
    store = tmp_path / "store.zarr"
    for words, code, text in (
        (("leap", "digits-cnn", "--steps", 200), 2, "held_back"),  # nothing to verify on
        (("leap", "digits-cn"), 2, "neither a store nor a workload"),
        ((*WORDS, "--predictors", "spectrall"), 2, "Did you mean 'spectral'"),
        ((*WORDS, "--predictors", "lfd2"), 2, "has to be fitted"),
        ((*WORDS, "--gate", "never"), 2, "gate"),
        ((*WORDS, "--leap", "windo=3"), 2, "windo"),
        ((*WORDS, "--option", "momentum=2"), 2, "momentum"),
        ((*WORDS, "--option", "mu=2"), 2, "mu"),
        ((*WORDS, "--verify-budget", "200%"), 2, "--verify-budget"),
        ((*WORDS, "--strength", "a"), 2, "--strength"),
        ((*WORDS, "--runs", "x"), 2, "--runs"),
        ((*WORDS, "--require", "speedup=abc"), 2, "--require"),
        ((*WORDS, "--require", "accepted=10000", "-q"), 5, "accepted"),
        ((*WORDS, "--warm-start-from", tmp_path / "none.zarr"), 3, "none.zarr"),
        ((*WORDS, "--predictors", "moments", "--set", "optimizer=sgd", "-o", store), 2, "SGD keeps no exp_avg"),
        ((*WORDS, "--predictors", "anderson", "--option", "points=9", "-o", store), 2, "at step 32, but none after st"),
        ((*WORDS, "--window", 100, "-o", store), 2, "none after step 0, since a window of 100 has to follow"),
        (("leap", "linreg", "--steps", 200, "-o", store), 2, "the network has none: weight [1, 1, 1], bias [1, 1]."),
        ((*WORDS, "--require", "speedup=1", "-o", store), 2, "without a control"),
        ((*WORDS, "--strength", "nan"), 2, "--strength"),
        ((*WORDS, "--set", "lr=1e30"), 4, "not finite"),
    ):
        done = farcli(*words)
        assert (done.code, "Traceback" in done.err) == (code, False), (words, done.err)
        assert text in done.err, (words, done.err)
        assert done.err.count("farcli: error:") == 1
    assert not store.exists()  # nothing was begun
    silent = farcli(*WORDS, "--verify-budget", "0%")
    assert silent.code == 0
    assert "no leap was proposed in 40 steps: its costs" in silent.err
    with pytest.raises(UsageError, match="batches 0"):
        trained(tmp_path / "x.zarr", batches=0)
