"""`evaluate` against values computed by hand from the stored arrays."""

import json
import math

import numpy as np
import pytest
import torch

import farcli
from farcli.errors import CheckFailedError, UsageError
from farcli.store import Trajectory
from farcli.training import Network, workload_of
from farcli.verbs.evaluate import YARDSTICKS, check, parse_limits, split_inputs
from farcli.verbs.weighed import CHANCE, TRUE


@pytest.fixture(scope="module")
def truth(small):
    return Trajectory.open(small / "digits.zarr")


@pytest.fixture(scope="module")
def rows(small):
    return farcli.evaluate([str(small / "forecast.zarr")], str(small / "digits.zarr"), targets="all")


def pick(rows, method, step, tensor=None):
    [row] = [r for r in rows if r["method"] == method and r["step"] == step and r["tensor"] == tensor]
    return row


def test_every_horizon_has_all_yardsticks_the_truth_and_chance(rows, truth):
    steps = [step for step in truth.steps if step > 15]
    for step in steps:
        methods = [row["method"] for row in rows if row["step"] == step]
        assert methods == ["lfd2", *YARDSTICKS, TRUE, CHANCE]
    assert {row["step"] for row in rows} == set(steps)
    assert len({frozenset(row) for row in rows}) == 1  # the same keys in every row


def test_weight_measures_equal_numpy(rows, small, truth):
    stored = Trajectory.open(small / "forecast.zarr")
    size = truth.layout.parameters
    for step in (20, 60):
        y = truth.read([2, 3], [step], 0, size)[:, 0].astype(np.float64)
        w = truth.read([2, 3], [15], 0, size)[:, 0].astype(np.float64)
        f = stored.read([2, 3], [step], 0, size)[:, 0].astype(np.float64)
        row = pick(rows, "lfd2", step)
        assert row["mse"] == pytest.approx(((f - y) ** 2).mean(), rel=1e-5)
        assert row["skill"] == pytest.approx(1 - ((f - y) ** 2).mean() / ((w - y) ** 2).mean(), rel=1e-5)
        mean = truth.read([0, 1], [step], 0, size)[:, 0].astype(np.float64).mean(0)
        assert pick(rows, "mean", step)["mse"] == pytest.approx(((mean - y) ** 2).mean(), rel=1e-5)
        drift = w + mean - truth.read([0, 1], [15], 0, size)[:, 0].astype(np.float64).mean(0)
        assert pick(rows, "drift", step)["mse"] == pytest.approx(((drift - y) ** 2).mean(), rel=1e-5)
        before = truth.read([2, 3], [10], 0, size)[:, 0].astype(np.float64)
        line = w + (w - before) * (step - 15) / 5
        assert pick(rows, "linear", step)["mse"] == pytest.approx(((line - y) ** 2).mean(), rel=1e-4)
        assert pick(rows, "persistence", step)["skill"] == pytest.approx(0, abs=1e-12)


def test_losses_are_those_of_the_network_at_the_weights(rows, small, truth):
    workload = workload_of(truth.header)
    assert workload is not None
    network = Network(workload, truth.layout)
    stored = Trajectory.open(small / "forecast.zarr")
    for step in (20, 60):
        for name, source in ((TRUE, truth), ("lfd2", stored)):
            found = [
                network.evaluate(
                    source.read([run], [step])[0, 0], source.integers(run, step), truth.header["seeds"][run]
                )
                for run in (2, 3)
            ]
            row = pick(rows, name, step)
            assert row["loss"] == pytest.approx(np.mean([f["loss"] for f in found]), rel=1e-6)
            assert row["accuracy"] == pytest.approx(np.mean([f["accuracy"] for f in found]), rel=1e-6)
    assert pick(rows, CHANCE, 20)["loss"] == workload.chance()["loss"]


def test_equivalent_steps(rows):
    for row in rows:
        if row["method"] == "persistence":
            assert row["equivalent_steps"] == 0
            assert row["better"] == 0
        if row["method"] == TRUE:
            # The recorded future is worth about the steps it took; the curve is smoothed, so not exactly.
            assert row["equivalent_steps"] == pytest.approx(row["ahead"], abs=12)
        if row["equivalent_steps"] is not None:
            assert row["net_steps"] < row["equivalent_steps"]


@pytest.fixture(scope="module")
def held_back(tmp_path_factory):
    """A store that has data to verify on."""
    path = tmp_path_factory.mktemp("verified") / "digits.zarr"
    farcli.record("digits-cnn", path, runs=3, steps=30, every=5, seed=3, options={"held_back": "300"})
    return path


def test_a_forecast_is_kept_where_other_data_allow_it_and_counts_as_w_n_elsewhere(held_back):
    truth = Trajectory.open(held_back)
    workload = workload_of(truth.header)
    assert workload is not None
    network = Network(workload, truth.layout)
    plain, verified = (
        farcli.evaluate(["linear"], str(held_back), start=10, context=3, targets="15,30", verify=count)
        for count in (0, 4)
    )
    seeds = truth.header["seeds"]
    for step in (15, 30):
        kept, losses = [], []
        for run in truth.runs:
            last, before = (truth.read([run], [s])[0, 0].astype(np.float64) for s in (10, 5))
            line = last.copy()
            part = slice(0, truth.layout.parameters)
            line[part] += (last - before)[part] * (step - 10) / 5
            vectors = [vector.astype(np.float32) for vector in (last, line)]
            batches = workload.verification(seeds[run], 0, 4)
            at = [network.verify(vector, truth.integers(run, 10), seeds[run], batches) for vector in vectors]
            kept.append(at[1] < at[0])
            chosen = vectors[1] if kept[-1] else vectors[0]
            losses.append(network.evaluate(chosen, truth.integers(run, 10), seeds[run])["loss"])
        row, raw = pick(verified, "linear", step), pick(plain, "linear", step)
        assert row["kept"] == pytest.approx(np.mean(kept))
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["not_worse"] >= row["better"]
        assert (row["mse"], row["skill"]) == (raw["mse"], raw["skill"])
        assert raw["kept"] is None
        assert row["equivalent_steps"] - row["net_steps"] == pytest.approx(2 * 4 / 3)
        still = pick(verified, "persistence", step)
        assert (still["kept"], still["not_worse"], still["equivalent_steps"]) == (0, 1, 0)
        for name in (TRUE, CHANCE):  # nobody forecast these
            assert pick(verified, name, step)["kept"] is None
    assert any(pick(verified, "linear", step)["kept"] > 0 for step in (15, 30))
    assert any(pick(verified, "linear", step)["kept"] < 1 for step in (15, 30))


def test_of_several_lengths_the_one_that_verification_likes_best_counts(held_back):
    """The line at half, all and twice its length, run by run, against losses computed here."""
    lengths = (0.5, 1.0, 2.0)
    truth = Trajectory.open(held_back)
    workload = workload_of(truth.header)
    assert workload is not None
    network = Network(workload, truth.layout)
    rows = farcli.evaluate(["linear"], str(held_back), start=10, context=3, targets="15,30", verify=4, lengths=lengths)
    seeds, chosen = truth.header["seeds"], []
    for step in (15, 30):
        found, losses = [], []
        for run in truth.runs:
            last, before = (truth.read([run], [s])[0, 0].astype(np.float64) for s in (10, 5))
            integers, batches = truth.integers(run, 10), workload.verification(seeds[run], 0, 4)
            way = np.zeros_like(last)
            part = slice(0, truth.layout.parameters)
            way[part] = (last - before)[part] * (step - 10) / 5
            tried = {length: (last + length * way).astype(np.float32) for length in (0.0, *lengths)}
            verified = {length: network.verify(at, integers, seeds[run], batches) for length, at in tried.items()}
            found.append(min(verified, key=lambda length: verified[length]))
            losses.append(network.evaluate(tried[found[-1]], integers, seeds[run])["loss"])
        row, passed = pick(rows, "linear", step), [length for length in found if length]
        assert row["kept"] == pytest.approx(len(passed) / len(found))
        assert row["length"] == (pytest.approx(np.mean(passed)) if passed else None)
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["equivalent_steps"] - row["net_steps"] == pytest.approx(4 * 4 / 3)  # w_n and three lengths
        assert pick(rows, "persistence", step)["length"] is None
        chosen += found
    assert len(set(chosen)) > 1


def test_a_forecast_that_is_the_same_at_every_step_counts_as_it_does_alone(held_back):
    rows = farcli.evaluate(["lawa"], str(held_back), start=10, context=3, targets="15,30", verify=4, lengths=[0.5, 1])
    one, two = (pick(rows, "lawa", step) for step in (15, 30))
    for key in ("loss", "kept", "length", "better"):
        assert one[key] == two[key]
    alone = farcli.evaluate(["lawa"], str(held_back), start=10, context=3, targets="30", verify=4, lengths=[0.5, 1])
    assert pick(alone, "lawa", 30) == two


@pytest.mark.parametrize("lengths", [[], [1, 1], [0], [-1], [float("nan")], [float("inf")]])
def test_lengths_are_different_numbers_above_0(held_back, lengths):
    with pytest.raises(UsageError, match="different numbers above 0"):
        farcli.evaluate(["linear"], str(held_back), context=3, verify=2, lengths=lengths)


def test_lengths_are_chosen_by_verification(held_back):
    with pytest.raises(UsageError, match="without --verify"):
        farcli.evaluate(["linear"], str(held_back), context=3, lengths=[0.5])


def test_verifying_needs_data_of_its_own(held_back, small):
    with pytest.raises(UsageError, match="no images are left"):
        farcli.evaluate(["linear"], str(small / "digits.zarr"), context=3, verify=4)
    with pytest.raises(UsageError, match="--verify -1"):
        farcli.evaluate(["linear"], str(held_back), context=3, verify=-1)
    with pytest.raises(UsageError, match="--loss has none"):
        farcli.evaluate(["linear"], str(held_back), context=3, verify=2, loss="mine:loss")


def test_stored_forecasts_equal_forecasts_made_here(rows, small):
    again = farcli.evaluate([str(small / "lfd2.safetensors")], str(small / "digits.zarr"), targets="all", runs="2:4")
    for one, two in zip(rows, again, strict=True):
        for key, value in one.items():
            assert two[key] == value or (isinstance(value, float) and math.isnan(value)), key


def test_little_memory_changes_nothing(rows, small):
    again = farcli.evaluate([str(small / "forecast.zarr")], str(small / "digits.zarr"), targets="all", memory=3_000_000)
    for one, two in zip(rows, again, strict=True):
        assert two["loss"] == one["loss"]
        assert two["mse"] == pytest.approx(one["mse"], rel=1e-12, nan_ok=True) if one["mse"] is not None else True


def test_per_tensor_rows_add_up_to_the_whole(small, truth):
    rows = farcli.evaluate([str(small / "forecast.zarr")], str(small / "digits.zarr"), targets="60", per_tensor=True)
    parts = [row for row in rows if row["method"] == "lfd2" and row["tensor"] is not None]
    sizes = {slot.name: slot.size for slot in truth.layout.slots if slot.role == "parameter"}
    assert {row["tensor"] for row in parts} == set(sizes)
    total = sum(row["mse"] * sizes[row["tensor"]] for row in parts)
    assert total / truth.layout.parameters == pytest.approx(pick(rows, "lfd2", 60)["mse"], rel=1e-6)


def test_runs_that_trained_the_forecaster_are_left_out_or_flagged(small):
    said = []
    path, store = str(small / "lfd2.safetensors"), str(small / "digits.zarr")
    rows = farcli.evaluate([path], store, targets="20", warn=said.append)
    assert rows[0]["runs"] == 2
    assert not any(row["in_sample"] for row in rows)
    assert any("2:4" in text for text in said)
    rows = farcli.evaluate([path], store, targets="20", runs="all", warn=said.append)
    assert rows[0]["runs"] == 4
    assert pick(rows, "lfd2", 20)["in_sample"]
    assert pick(rows, "mean", 20)["in_sample"]
    assert not pick(rows, "linear", 20)["in_sample"]
    assert any("in_sample" in text for text in said)


def test_the_same_runs_recorded_again_are_still_in_sample(small, tmp_path):
    farcli.record("digits-cnn", tmp_path / "again.zarr", runs=4, steps=60, every=5, seed=3)
    said = []
    rows = farcli.evaluate(
        [str(small / "lfd2.safetensors")], str(tmp_path / "again.zarr"), targets="60", warn=said.append
    )
    assert rows[0]["runs"] == 2
    assert any("2:4" in text for text in said)
    farcli.record("digits-cnn", tmp_path / "other.zarr", runs=2, steps=60, every=5, seed=4)
    rows = farcli.evaluate([str(small / "lfd2.safetensors")], str(tmp_path / "other.zarr"), targets="60")
    assert rows[0]["runs"] == 2
    assert not any(row["in_sample"] for row in rows)


def test_a_run_named_twice_counts_once(small):
    once, twice = (
        farcli.evaluate(["linear"], str(small / "digits.zarr"), targets="60", runs=runs) for runs in ("2,3", "2,2,3")
    )
    assert pick(once, "linear", 60) == pick(twice, "linear", 60)


def test_reestimation_is_paid_for(small):
    store = str(small / "digits.zarr")
    for buffers, passes in (("stored", 500), ("reestimate", 500 + 1297)):
        row = pick(farcli.evaluate(["linear"], store, targets="60", buffers=buffers), "linear", 60)
        assert row["equivalent_steps"] - row["net_steps"] == pytest.approx(passes / 64 / 3)


def test_the_mean_is_never_of_evaluated_runs(small):
    store = str(small / "digits.zarr")
    with pytest.raises(UsageError, match="also evaluated"):
        farcli.evaluate(["linear"], store, targets="60", runs="0:2", train_runs="1:3")
    rows = farcli.evaluate(["linear"], store, targets="60", runs="0:2", train_runs="2:4")
    assert {pick(rows, name, 60)["role"] for name in ("mean", "drift")} == {"yardstick"}


def test_buffers_are_a_policy_that_is_stated(small):
    store = str(small / "digits.zarr")
    kept = farcli.evaluate([str(small / "forecast.zarr")], store, targets="60")
    taken = farcli.evaluate([str(small / "forecast.zarr")], store, targets="60", buffers="reestimate")
    assert {row["buffers"] for row in kept} == {"keep"}
    assert {row["buffers"] for row in taken} == {"reestimate"}
    assert pick(kept, "lfd2", 60)["mse"] == pick(taken, "lfd2", 60)["mse"]
    assert pick(kept, "lfd2", 60)["loss"] != pick(taken, "lfd2", 60)["loss"]


def test_networks_without_buffers_have_no_policy(small):
    rows = farcli.evaluate(["linear"], str(small / "linreg.zarr"), targets="20")
    assert {row["buffers"] for row in rows} == {None}


def test_forecasts_of_one_method_are_told_apart(small, tmp_path):
    for name, options in (("plain", {}), ("grouped", {"groups": "tensor"})):
        farcli.fit(
            "lfd2", [str(small / "digits.zarr")], tmp_path / f"{name}.safetensors", train_runs="0:2", options=options
        )
    files = [str(tmp_path / f"{name}.safetensors") for name in ("plain", "grouped")]
    rows = farcli.evaluate(files, str(small / "digits.zarr"), targets="60")
    assert [row["method"] for row in rows[:2]] == ["lfd2 (plain)", "lfd2 (grouped)"]
    assert rows[0]["mse"] != rows[1]["mse"]


def test_forecast_buffers(small, tmp_path):
    for policy in ("keep", "forecast"):
        farcli.forecast("linear", str(small / "digits.zarr"), tmp_path / policy, runs="2", targets="25", buffers=policy)
    truth = Trajectory.open(small / "digits.zarr")
    keep, ahead = (Trajectory.open(tmp_path / policy) for policy in ("keep", "forecast"))
    size = truth.layout.parameters
    start = keep.header["forecast"]["from"]
    np.testing.assert_array_equal(keep.read([2], keep.steps[:1])[0, 0, size:], truth.read([2], [start])[0, 0, size:])
    np.testing.assert_array_equal(
        keep.read([2], keep.steps[:1])[0, 0, :size], ahead.read([2], ahead.steps[:1])[0, 0, :size]
    )
    assert (ahead.read([2], ahead.steps[:1])[0, 0, size:] != truth.read([2], [start])[0, 0, size:]).any()
    np.testing.assert_array_equal(keep.integers(2, keep.steps[0]), truth.integers(2, start))


def constant_loss(state):
    assert state["0.weight"].shape == (8, 1, 3, 3)
    assert state["1.num_batches_tracked"].dtype == torch.int64
    return float(state["9.bias"].abs().sum())


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two recordings of two runs, and one of the same four seeds' worth, made from them."""
    folder = tmp_path_factory.mktemp("several")
    for seed in (1, 2, 3):
        farcli.record("linreg", folder / f"{seed}.zarr", runs=3, steps=12, every=2, seed=seed)
    farcli.fit("lfd2", [str(folder / "1.zarr")], folder / "lfd2.safetensors", context=3)
    return folder


def test_several_stores_are_weighed_as_one(several):
    names = [str(several / f"{seed}.zarr") for seed in (2, 3)]
    given = {"targets": "6,12", "start": 4}
    together = farcli.evaluate(["dmd", str(several / "lfd2.safetensors")], names, context=3, **given)
    apart = [farcli.evaluate(["dmd", str(several / "lfd2.safetensors")], name, context=3, **given) for name in names]
    assert together[0]["runs"] == 6
    assert together[0]["stores"] == 2
    for step in (6, 12):
        for method in ("dmd", "lfd2", "persistence", "mean", "drift"):
            row, parts = pick(together, method, step), [pick(rows, method, step) for rows in apart]
            for key in ("mse", "loss", "better", "gain"):
                assert row[key] == pytest.approx(np.mean([part[key] for part in parts]), rel=1e-9)
        placed = [row for row in together if row["step"] == step and row["rank"] is not None]
        assert [row["rank"] for row in sorted(placed, key=lambda row: row["loss"])] == list(range(1, len(placed) + 1))
        first = next(row for row in placed if row["rank"] == 1)
        for row in placed:
            assert row["behind"] == pytest.approx(row["loss"] - first["loss"], abs=1e-12)
            assert row["behind_low"] <= row["behind"] <= row["behind_high"]
            assert row["gain_low"] <= row["gain"] <= row["gain_high"]


def test_a_store_that_trained_a_forecaster_is_left_out_of_several(several):
    said = []
    names = [str(several / f"{seed}.zarr") for seed in (1, 2)]
    rows = farcli.evaluate([str(several / "lfd2.safetensors")], names, warn=said.append)
    assert (rows[0]["runs"], rows[0]["stores"]) == (3, 1)
    assert not any(row["in_sample"] for row in rows)
    assert any("1.zarr: trained a forecaster and is left out" in text for text in said)
    assert not any("in_sample" in text for text in said)
    rows = farcli.evaluate([str(several / "lfd2.safetensors")], names, runs="all", warn=said.append)
    assert rows[0]["runs"] == 6
    assert rows[0]["in_sample"]


def test_stores_that_do_not_go_together_are_refused(several, small, tmp_path):
    one = str(several / "1.zarr")
    with pytest.raises(UsageError, match="is named twice"):
        farcli.evaluate(["linear"], [one, one], start=4)
    with pytest.raises(UsageError, match="holds another network"):
        farcli.evaluate(["linear"], [one, str(small / "digits.zarr")], start=4)
    farcli.record("linreg", tmp_path / "other.zarr", runs=2, steps=12, every=3, seed=9)
    with pytest.raises(UsageError, match=r"other.zarr: has no snapshot of step \d+, as .*1.zarr has"):
        farcli.evaluate(["linear"], [one, str(tmp_path / "other.zarr")], start=6, context=2)


def test_recordings_at_the_end_are_the_truth(several, small):
    one, two = str(several / "1.zarr"), str(several / "2.zarr")
    forecast = str(small / "forecast.zarr")
    assert split_inputs([forecast, "linear", one, two]) == ([forecast, "linear"], [one, two])
    assert split_inputs(["linear", "missing.zarr"]) == (["linear"], ["missing.zarr"])
    assert split_inputs([forecast, forecast]) == ([forecast], [forecast])
    with pytest.raises(UsageError, match="expected forecasts and"):
        split_inputs([one, two])


def test_a_loss_of_the_users_own(small):
    rows = farcli.evaluate(
        ["linear"], str(small / "digits.zarr"), targets="60", loss="tests.test_evaluate:constant_loss"
    )
    truth = Trajectory.open(small / "digits.zarr")
    place = truth.layout.slice_of("9.bias")
    expected = np.abs(truth.read(truth.runs, [60])[:, 0, place]).sum(1).mean()
    assert pick(rows, TRUE, 60)["loss"] == pytest.approx(expected, rel=1e-6)
    assert CHANCE not in {row["method"] for row in rows}  # nobody knows it here
    with pytest.raises(UsageError, match="no 'nothing'"):
        farcli.evaluate(["linear"], str(small / "digits.zarr"), loss="tests.test_evaluate:nothing")


def test_limits(rows):
    check(rows, parse_limits(["mse=1e9", "loss=1e9"], "--max"), parse_limits(["skill=-1e9"], "--min"))
    with pytest.raises(CheckFailedError, match="lfd2 at step"):
        check(rows, parse_limits(["mse=0"], "--max"), {})
    with pytest.raises(CheckFailedError, match="lfd2 at step"):
        check(rows, {}, parse_limits(["better=1.1"], "--min"))
    for flag, text, message in (
        ("--max", "mss=1", "expected one of"),
        ("--max", "skill=1", "expected one of"),
        ("--min", "mse=1", "expected one of"),
        ("--max", "mse", "key=number"),
        ("--max", "mse=low", "key=number"),
        ("--max", "mse=nan", "a number"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_limits([text], flag)


def test_lockstep_runs_are_judged_on_their_own_task(small):
    rows = farcli.evaluate(["persistence"], str(small / "linreg.zarr"), targets="20", context=5)
    truth = Trajectory.open(small / "linreg.zarr")
    workload = workload_of(truth.header)
    assert workload is not None
    network = Network(workload, truth.layout)
    found = [
        network.evaluate(truth.read([run], [20])[0, 0], None, seed)["loss"]
        for run, seed in zip(truth.runs, truth.header["seeds"], strict=True)
    ]
    assert pick(rows, TRUE, 20)["loss"] == pytest.approx(np.mean(found), rel=1e-6)
    assert pick(rows, TRUE, 20)["loss"] < pick(rows, "persistence", 20)["loss"]


def test_rows_survive_json(rows):
    from farcli.cli.output import plain

    for row in rows:
        again = json.loads(json.dumps(plain(row), allow_nan=False))
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                assert again[key] is None
                assert key in again["non_finite"]
            else:
                assert again[key] == value
