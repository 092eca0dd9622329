import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farcli import __version__
from farcli.errors import (
    FarcliError,
    NonFiniteError,
    ResourceError,
    StoppedError,
    StoreError,
    UnfinishedError,
    UsageError,
)
from farcli.store import Trajectory, TrajectoryWriter
from farcli.training import Network, TrainingRun, run_seed, workload_from, workload_of
from farcli.verbs.record import record

DIGITS: dict[str, Any] = {"workload": "digits-cnn", "runs": 3, "steps": 25, "every": 10}
LINREG: dict[str, Any] = {"workload": "linreg", "runs": 4, "steps": 25, "every": 10, "options": {"batch": "32"}}


def whole(path: Path, partial: bool = False) -> tuple[bytes, list[list[int]]]:
    """Every bit of a store: weights, and integers."""
    stored = Trajectory.open(path, partial=partial)
    integers = [stored.integers(run, step).tolist() for run in stored.runs for step in stored.steps]
    return stored.read(stored.runs, stored.steps).tobytes(), integers


def after(calls: int) -> Callable[[], bool]:
    """A `stop` that says yes from the given call on."""
    numbers = count()
    return lambda: next(numbers) >= calls


@pytest.fixture(scope="module", params=[DIGITS, LINREG], ids=["digits-cnn", "linreg"])
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def straight(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recording, never interrupted."""
    path = tmp_path_factory.mktemp("straight") / "run.zarr"
    record(**arguments, output=path)
    return path


@pytest.fixture(scope="module")
def straight_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "run.zarr"
    record(**DIGITS, output=path)
    return path


def test_a_store_holds_the_weights_of_training(arguments: dict[str, Any], straight: Path):
    stored = Trajectory.open(straight)
    assert stored.steps == [0, 10, 20, 25]
    assert stored.runs == list(range(arguments["runs"]))
    workload = workload_from(arguments["workload"], arguments.get("options", {}))
    for run in stored.runs:
        training = TrainingRun(workload, [run_seed(0, run)])
        assert stored.layout == training.layout
        for step in stored.steps:
            if step:
                training.advance(step - training.step)
            assert stored.read([run], [step]).tobytes() == training.vectors().tobytes()
            assert stored.integers(run, step).tolist() == training.integers()[0].tolist()


def test_the_header_tells_how_to_do_it_again(arguments: dict[str, Any], straight: Path):
    header = Trajectory.open(straight).header
    again = workload_of(header)
    assert again is not None
    assert again.config == workload_from(arguments["workload"], arguments.get("options", {})).config
    assert header["seed"] == 0
    assert header["seeds"] == [run_seed(0, run) for run in range(arguments["runs"])]
    assert header["recording"] == {"steps": 25, "snapshots": {"every": 10}}
    assert header["provenance"]["versions"]["farcli"] == __version__
    assert header["provenance"]["threads"] == 1


def test_the_row_describes_what_was_made(tmp_path: Path):
    row = record(**DIGITS, output=tmp_path / "run.zarr", seed=3)
    files = [file for file in (tmp_path / "run.zarr").rglob("*") if file.is_file()]
    assert row.pop("seconds") > 0
    assert row == {
        "path": str(tmp_path / "run.zarr"),
        "workload": "digits-cnn",
        "runs": 3,
        "steps": 25,
        "snapshots": 4,
        "parameters": 1922,
        "buffers": 48,
        "integers": 2,
        "dtype": "float32",
        "bytes": sum(file.stat().st_size for file in files),
        "seed": 3,
    }


def test_a_dry_run_says_the_same_and_writes_nothing(tmp_path: Path):
    planned = record(**LINREG, output=tmp_path / "new" / "run.zarr", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    made = record(**LINREG, output=tmp_path / "new" / "run.zarr")
    assert planned["seconds"] is None
    assert planned["bytes"] == 4 * 4 * 2 * 4
    assert {k: v for k, v in planned.items() if k not in ("seconds", "bytes")} == {
        k: v for k, v in made.items() if k not in ("seconds", "bytes")
    }


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"steps": 6, "every": 2}, [0, 2, 4, 6]),
        ({"steps": 7, "every": 3}, [0, 3, 6, 7]),
        ({"steps": 3, "every": 10}, [0, 3]),
        ({"at": [0, 1, 5]}, [0, 1, 5]),
        ({"at": [2, 5], "steps": 8}, [2, 5, 8]),
        ({"log_spaced": 5, "steps": 100}, [0, 1, 3, 10, 32, 100]),
        ({"log_spaced": 1, "steps": 9}, [0, 1, 9]),
        ({"log_spaced": 30, "steps": 4}, [0, 1, 2, 3, 4]),
    ],
)
def test_snapshots_are_taken_when_asked(arguments: dict[str, Any], steps: list[int], tmp_path: Path):
    row = record("linreg", tmp_path / "run.zarr", **arguments)
    assert Trajectory.open(tmp_path / "run.zarr").steps == steps
    assert (row["snapshots"], row["steps"]) == (len(steps), steps[-1])


def test_defaults_are_the_workloads_and_fifty_lockstep_runs_take_no_time(tmp_path: Path):
    row = record("linreg", tmp_path / "run.zarr", runs=50)
    assert (row["runs"], row["steps"], row["snapshots"]) == (50, 199, 200)
    assert row["seconds"] < 5


def test_double_precision_is_stored_as_such(tmp_path: Path):
    record("linreg", tmp_path / "run.zarr", steps=2, options={"dtype": "float64"})
    stored = Trajectory.open(tmp_path / "run.zarr")
    assert stored.dtype == np.float64
    training = TrainingRun(workload_from("linreg", {"dtype": "float64"}), [run_seed(0, 0)])
    training.advance(2)
    assert stored.read([0], [2])[0].tobytes() == training.vectors().tobytes()


@pytest.mark.parametrize("calls", [0, 1, 12, 24])
def test_a_stopped_recording_goes_on_bit_for_bit(arguments: dict[str, Any], straight: Path, calls: int, tmp_path: Path):
    path = tmp_path / "run.zarr"
    with pytest.raises(StoppedError, match=f"stopped at step {calls} of") as caught:
        record(**arguments, output=path, stop=after(calls))
    assert caught.value.exit_code == 75
    assert "--resume" in str(caught.value.hint)
    with pytest.raises(UnfinishedError):
        Trajectory.open(path)
    row = record(**arguments, output=path, resume=True)
    assert whole(path) == whole(straight)
    assert row["snapshots"] == 4


@pytest.mark.parametrize(("calls", "left"), [(0, 3), (24, 3), (25, 2), (26, 2), (49, 2), (50, 1)])
def test_no_step_is_trained_again(calls: int, left: int, tmp_path: Path):
    path = tmp_path / "run.zarr"
    with pytest.raises(StoppedError, match=f"of run {3 - left}"):
        record(**DIGITS, output=path, stop=after(calls))
    asked = count()
    record(**DIGITS, output=path, resume=True, stop=lambda: next(asked) < 0)
    assert next(asked) == 75 - calls
    record(**DIGITS, output=tmp_path / "straight.zarr")
    assert whole(path) == whole(tmp_path / "straight.zarr")


def test_stopping_again_and_again_still_arrives(straight: Path, arguments: dict[str, Any], tmp_path: Path):
    path = tmp_path / "run.zarr"
    for calls, step in ((5, 5), (8, 13), (0, 13), (9, 22)):
        with pytest.raises(StoppedError, match=f"stopped at step {step} of"):
            record(**arguments, output=path, resume=True, stop=after(calls))
        assert (path / "training.pt").exists()
    record(**arguments, output=path, resume=True)
    assert whole(path) == whole(straight)
    assert not (path / "training.pt").exists()
    assert Trajectory.open(path).nbytes == Trajectory.open(straight).nbytes


def test_a_schedule_and_its_optimiser_go_on_where_they_were(tmp_path: Path):
    options = {"optimizer": "adam", "schedule": "wsd", "warmup": "4", "batch": "32"}
    recording = LINREG | {"options": options}
    path, straight = tmp_path / "run.zarr", tmp_path / "straight.zarr"
    with pytest.raises(StoppedError):
        record(**recording, output=path, stop=after(21))
    record(**recording, output=path, resume=True)
    record(**recording, output=straight)
    assert whole(path) == whole(straight)
    assert Trajectory.open(path).header["workload"]["options"]["span"] == "25"


@pytest.mark.parametrize("workload", ["linreg", "digits-cnn"])
@pytest.mark.parametrize("stops", [(0,), (5, 8), (26, 20)])
def test_adams_moments_are_stored_and_go_on_bit_for_bit(workload: str, stops: tuple[int, ...], tmp_path: Path):
    arguments = DIGITS | {"workload": workload, "options": {"optimizer": "adam"}, "with_optimizer": True, "runs": 2}
    path, straight = tmp_path / "run.zarr", tmp_path / "straight.zarr"
    record(**arguments, output=straight)
    for calls in stops:
        if workload == "linreg" and calls > 25:
            continue  # both runs train at once and are done by then
        with pytest.raises(StoppedError):
            record(**arguments, output=path, resume=True, stop=after(calls))
    (path / "training.pt").unlink(missing_ok=True)  # as after a kill: from the seed, compared on the way
    record(**arguments, output=path, resume=True)
    inner = Trajectory.open(straight / "optimizer.zarr")
    assert (inner.kind, inner.steps, inner.runs) == ("optimizer", [10, 20, 25], [0, 1])
    assert whole(path) == whole(straight)
    assert whole(path / "optimizer.zarr") == whole(straight / "optimizer.zarr")
    training = TrainingRun(workload_from(workload, {"optimizer": "adam"}, steps=25), [run_seed(0, 1)])
    training.advance(20)
    state = training.optimizer.state_dict()["state"]
    names = [name for name, _ in training.model.named_parameters()]
    for number, name in enumerate(names):
        for key in ("exp_avg", "exp_avg_sq"):
            stored = inner.read([1], [20])[0, 0][inner.layout.slice_of(f"{name}.{key}")]
            assert stored.tobytes() == state[number][key].numpy().astype(np.float32).tobytes()


def test_moments_are_asked_for_again_when_resuming_and_need_an_optimiser_that_has_some(tmp_path: Path):
    arguments = DIGITS | {"options": {"optimizer": "adam"}, "output": tmp_path / "run.zarr"}
    with pytest.raises(StoppedError):
        record(**arguments, stop=after(5))
    with pytest.raises(UsageError, match="with_optimizer"):
        record(**arguments, with_optimizer=True, resume=True)
    with pytest.raises(UsageError, match="keeps no moments"):
        record("linreg", tmp_path / "sgd.zarr", with_optimizer=True, options={"optimizer": "sgd"})
    assert not (tmp_path / "sgd.zarr").exists()


def test_a_state_that_does_not_fit_its_snapshots_is_not_gone_on_from(straight_digits: Path, tmp_path: Path):
    ahead, behind = (tmp_path / f"{name}.zarr" for name in ("ahead", "behind"))
    for path, calls in ((ahead, 15), (behind, 5)):
        with pytest.raises(StoppedError):
            record(**DIGITS, output=path, stop=after(calls))
    (behind / "training.pt").write_bytes((ahead / "training.pt").read_bytes())
    asked = count()
    record(**DIGITS, output=behind, resume=True, stop=lambda: next(asked) < 0)
    assert next(asked) == 75  # from the seed: the snapshot of step 10 was never stored
    assert whole(behind) == whole(straight_digits)


def test_from_an_older_state_the_snapshots_after_it_are_compared(straight_digits: Path, tmp_path: Path):
    """As after a stop, a resume and a kill."""
    path = tmp_path / "run.zarr"
    with pytest.raises(StoppedError):
        record(**DIGITS, output=path, stop=after(5))
    older = (path / "training.pt").read_bytes()
    with pytest.raises(StoppedError, match="stopped at step 15"):
        record(**DIGITS, output=path, resume=True, stop=after(10))
    (path / "training.pt").write_bytes(older)
    asked = count()
    record(**DIGITS, output=path, resume=True, stop=lambda: next(asked) < 0)
    assert next(asked) == 70
    assert whole(path) == whole(straight_digits)


def test_a_state_of_other_weights_than_the_snapshot_of_its_step_is_noticed(tmp_path: Path):
    path, other = tmp_path / "run.zarr", tmp_path / "other.zarr"
    for place, options in ((path, {}), (other, {"lr": "0.01"})):
        with pytest.raises(StoppedError):
            record(**DIGITS, output=place, options=options, stop=after(10))
    (path / "training.pt").write_bytes((other / "training.pt").read_bytes())
    with pytest.raises(StoreError, match="run 0, trained again, differs from what is stored at step 10"):
        record(**DIGITS, output=path, resume=True)


@pytest.mark.parametrize("damage", ["empty", "foreign", "short", "flipped"])
def test_a_damaged_state_is_named(damage: str, tmp_path: Path):
    path = tmp_path / "run.zarr"
    with pytest.raises(StoppedError):
        record(**DIGITS, output=path, stop=after(12))
    state = path / "training.pt"
    sound = state.read_bytes()
    weights = torch.load(state, weights_only=True)["model"]["9.weight"].numpy().tobytes()
    place = sound.index(weights) + 1000
    flipped = sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :]
    broken = {"empty": b"", "foreign": b"PK\x03\x04 no archive", "short": sound[:-500], "flipped": flipped}
    state.write_bytes(broken[damage])
    with pytest.raises(StoreError, match=r"training\.pt: the saved training cannot be read") as caught:
        record(**DIGITS, output=path, resume=True)
    assert "Remove this file" in str(caught.value.hint)
    state.unlink()
    record(**DIGITS, output=path, resume=True)


def test_a_disk_without_room_for_the_state_keeps_the_snapshots(tmp_path: Path):
    path = tmp_path / "run.zarr"
    recording: dict[str, Any] = {"workload": "digits-cnn", "steps": 25, "every": 25}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, hard))  # both snapshots need 16,000, the state 30,000
    try:
        with pytest.raises(ResourceError, match="no space left") as caught:
            record(**recording, output=path, stop=after(12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--resume" in str(caught.value.hint)
    assert not [file for file in path.rglob("*") if "training" in file.name]
    assert Trajectory.open(path, partial=True).snapshots == [1]
    record(**recording, output=path, resume=True)
    record(**recording, output=tmp_path / "straight.zarr")
    assert whole(path) == whole(tmp_path / "straight.zarr")


def test_a_recording_of_a_version_with_fewer_options_is_gone_on_with(tmp_path: Path):
    path, older = tmp_path / "run.zarr", tmp_path / "older.zarr"
    with pytest.raises(StoppedError):
        record(**LINREG, output=path, stop=after(12))
    stored = Trajectory.open(path, partial=True)
    header = {name: stored.header[name] for name in ("workload", "seed", "seeds", "recording", "provenance")}
    options = {k: v for k, v in header["workload"]["options"].items() if k not in ("schedule", "warmup", "span")}
    header["workload"] = {"name": "linreg", "options": options}
    with TrajectoryWriter.create(
        older, stored.layout, stored.runs, header=header, planned_steps=[0, 10, 20, 25], lockstep=True
    ) as writer:
        for step in (0, 10):
            writer.append(step, stored.read(stored.runs, [step])[:, 0])
    record(**LINREG, output=older, resume=True)
    record(**LINREG, output=path, resume=True)
    assert whole(older) == whole(path)


def test_resuming_what_is_finished_only_prints_its_row(tmp_path: Path):
    path = tmp_path / "run.zarr"
    first = record(**DIGITS, output=path)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    again = record(**DIGITS, output=path, resume=True, stop=lambda: pytest.fail("it trains"))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed is 0, not 1"),
        ({"runs": 5}, "4 runs instead of 5"),
        ({"steps": 30}, "steps is 25, not 30"),
        ({"every": 5}, "every is 10, not 5"),
        ({"every": None, "at": [0, 25]}, "at is None, not [0, 25]"),
        ({"options": {"batch": "50"}}, "batch is 32, not 50"),
        ({"options": {"batch": "32", "lr": "0.1"}}, "lr is 0.01, not 0.1"),
        ({"workload": "digits-cnn", "options": {}}, "name is linreg, not digits-cnn"),
    ],
)
def test_resuming_another_recording_is_refused(change: dict[str, Any], message: str, finished: bool, tmp_path: Path):
    path = tmp_path / "run.zarr"
    if finished:
        record(**LINREG, output=path)
    else:
        with pytest.raises(StoppedError):
            record(**LINREG, output=path, stop=after(12))
    before = whole(path, partial=True)
    with pytest.raises(UsageError) as caught:
        record(**(LINREG | change), output=path, resume=True)
    assert message in str(caught.value)
    assert whole(path, partial=True) == before


def test_resuming_on_a_machine_that_computes_otherwise_is_noticed(tmp_path: Path):
    path = tmp_path / "run.zarr"
    with pytest.raises(StoppedError):
        record(**DIGITS, output=path, stop=after(15))
    stored = Trajectory.open(path, partial=True)
    vectors = stored.read([0], [0, 10])[0]
    vectors[1, 7] = np.nextafter(vectors[1, 7], np.float32(2))
    header = {name: stored.header[name] for name in ("workload", "seed", "seeds", "recording", "provenance")}
    other = tmp_path / "other.zarr"
    with TrajectoryWriter.create(
        other, stored.layout, stored.runs, header=header, planned_steps=[0, 10, 20, 25]
    ) as writer:
        for step, vector in zip((0, 10), vectors, strict=True):
            writer.append(step, vector, stored.integers(0, step), run=0)
    with pytest.raises(StoreError, match=r"run 0, trained again, differs .* step 10"):
        record(**DIGITS, output=other, resume=True)


def test_a_time_limit_stops_like_a_signal(tmp_path: Path):
    with pytest.raises(StoppedError, match="1 of 12 snapshots"):
        record(**DIGITS, output=tmp_path / "run.zarr", time_limit=0)
    record(**DIGITS, output=tmp_path / "run.zarr", time_limit=1000, resume=True)


def test_progress_is_told_in_steps(tmp_path: Path):
    told: list[tuple[float, float]] = []
    record(**DIGITS, output=tmp_path / "run.zarr", report=lambda done, total, text: told.append((done, total)))
    assert told == [(step, 75) for step in range(1, 76)]


def test_a_diverging_run_is_named_and_what_came_before_is_kept(tmp_path: Path):
    path = tmp_path / "run.zarr"
    with pytest.raises(NonFiniteError, match=r"run 0 diverged: .* not finite at step \d+ \(training loss") as caught:
        record("linreg", path, runs=2, steps=100, every=1, options={"lr": "1e6"})
    assert caught.value.exit_code == 4
    stored = Trajectory.open(path, partial=True)
    assert len(stored.steps) > 2
    assert np.isfinite(stored.read([0, 1], stored.steps)).all()
    with pytest.raises(NonFiniteError):
        record("linreg", path, runs=2, steps=100, every=1, options={"lr": "1e6"}, resume=True)


def test_an_existing_output_is_kept_unless_replaced(tmp_path: Path):
    path = tmp_path / "run.zarr"
    record(**LINREG, output=path)
    before = whole(path)
    with pytest.raises(UsageError, match="exists"):
        record(**LINREG, output=path, seed=1)
    with pytest.raises(FarcliError, match="is kept") as caught:
        record(**LINREG, output=path, seed=1, replace=True, stop=after(12))
    assert not isinstance(caught.value, StoppedError)
    assert whole(path) == before
    record(**LINREG, output=path, seed=1, replace=True)
    assert whole(path) != before
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": 0}, "runs 0"),
        ({"steps": 0}, "steps 0"),
        ({"every": 0}, "every 0"),
        ({"log_spaced": 0}, "log-spaced 0"),
        ({"seed": -1}, "seed -1"),
        ({"every": 2, "at": [0, 5]}, "--every and --at"),
        ({"log_spaced": 2, "at": [0, 5]}, "--at and --log-spaced"),
        ({"at": [5, 5]}, "ascending"),
        ({"at": [5, 3], "steps": 9}, "ascending"),
        ({"at": [-1, 3]}, "ascending"),
        ({"at": [0, 10], "steps": 9}, "between 0 and 9"),
        ({"at": [0]}, "at least 1"),
        ({"runs": 3, "steps": 4, "every": 2, "max_bytes": 71}, "needs 72 bytes, more than --max-bytes 71"),
        ({"replace": True, "resume": True}, "contradict"),
        ({"options": {"rate": "1"}}, "rate"),
        ({"workload": "mnist"}, "Unknown workload 'mnist'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(UsageError) as caught:
        record(**({"workload": "linreg"} | arguments), output=tmp_path / "run.zarr")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recording that takes long enough to be killed, and its store without that."""
    arguments: dict[str, Any] = {"workload": "digits-cnn", "runs": 2, "steps": 500, "every": 10}
    path = tmp_path_factory.mktemp("long") / "run.zarr"
    record(**arguments, output=path)
    return arguments, path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_killed_process_is_resumed_bit_for_bit(
    number: signal.Signals, code: int, long: tuple[dict[str, Any], Path], tmp_path: Path
):
    arguments, straight = long
    path = tmp_path / "run.zarr"
    command = ["record", "digits-cnn", "-o", str(path), "--runs", "2", "--steps", "500", "--every", "10"]
    process = subprocess.Popen(
        [sys.executable, "-m", "farcli", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "dumb"},
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if sum(Trajectory.open(path, partial=True).snapshots) >= 5:
                    break
            except StoreError:
                pass
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, told
    assert 5 <= sum(Trajectory.open(path, partial=True).snapshots) < 102
    record(**arguments, output=path, resume=True)
    assert whole(path) == whole(straight)


def test_recorded_weights_are_worth_what_training_was(tmp_path: Path):
    path = tmp_path / "run.zarr"
    record("digits-cnn", path, steps=150, every=50)
    stored = Trajectory.open(path)
    workload = workload_of(stored.header)
    assert workload is not None
    network = Network(workload, stored.layout)
    losses = [
        network.evaluate(stored.read([0], [step])[0, 0], stored.integers(0, step), stored.header["seeds"][0])["loss"]
        for step in stored.steps
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]
