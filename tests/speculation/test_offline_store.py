"""`leap_offline` on a recorded network against values computed by hand from the stored arrays; and the real command."""

import json
import shutil

import numpy as np
import pytest
import torch

from farcli import Recorder
from farcli.errors import CheckFailedError, NonFiniteError, StoreError, UsageError
from farcli.layout import layout_of
from farcli.regimes import Thresholds
from farcli.store import Trajectory, TrajectoryWriter
from farcli.training import Network, workload_of
from farcli.verbs.leap_offline import leap_offline
from farcli.verbs.leap_offline_summary import check, parse_limits
from farcli.verbs.record import record

AHEAD = (3, 5, 20)
NAMES = ("momentum", "momentum-as-coded", "linear", "quadratic", "ema")
CRITERIA = ("strict", "adaptive", "adaptive-published", "proximity")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("leap") / "digits.zarr"
    options = {"optimizer": "adam", "schedule": "cosine", "warmup": "5"}
    record("digits-cnn", path, runs=2, steps=60, every=5, options=options, with_optimizer=True)
    return path


@pytest.fixture(scope="module")
def rows(store):
    return leap_offline(
        str(store), predictors=NAMES, ahead=AHEAD, criteria=CRITERIA, cascades=[(2, 5), (3, 20)], context=4
    )


@pytest.fixture(scope="module")
def loss_of(store):
    truth = Trajectory.open(store)
    workload = workload_of(truth.header)
    assert workload is not None
    network = Network(workload, truth.layout)

    def loss(vector, run, step):
        return network.evaluate(vector, truth.integers(run, step), truth.header["seeds"][run])["loss"]

    return truth, workload, loss


def kind(rows, name, **wanted):
    return [row for row in rows if row["kind"] == name and all(row[key] == value for key, value in wanted.items())]


def test_there_is_a_row_for_every_snapshot_with_enough_history_predictor_and_k(rows):
    steps = [15, 20, 25, 30, 35, 40, 45, 50, 55, 60]
    for name in ("persistence", *NAMES):
        for ahead in AHEAD:
            for run in (0, 1):
                found = kind(rows, "leap", predictor=name, ahead=ahead, run=run)
                assert [row["step"] for row in found] == steps


def test_losses_are_those_of_the_network_at_weights_made_by_hand(rows, loss_of, store):
    truth, workload, loss = loss_of
    inner = Trajectory.open(store / "optimizer.zarr")
    size, step, run = truth.layout.parameters, 30, 1
    vectors = {at: truth.read([run], [at])[0, 0] for at in (15, 20, 25, 30)}
    moments = inner.read([run], [step])[0, 0]
    first, second = moments[: moments.size // 2], moments[moments.size // 2 :]  # in the order of the parameters
    rate = workload.config.lr * workload.rate(step)
    for ahead in AHEAD:
        s = ahead / 5
        w, v, u = (vectors[at][:size] for at in (30, 25, 20))
        with np.errstate(over="ignore"):
            half = second.astype(np.float16).astype(np.float32)
        adam = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        coded = first.astype(np.float16).astype(np.float32) / (np.sqrt(half) + 1e-8)
        average = vectors[15][:size]
        for at in (20, 25, 30):
            average = (average + vectors[at][:size]) / 2
        made = {
            "persistence": w,
            "momentum": w - ahead * rate * adam,
            "momentum-as-coded": w - ahead * rate * coded,
            "linear": w + s * (w - v),
            "quadratic": w + s * (w - v) + s * (s + 1) / 2 * (w - 2 * v + u),
            "ema": average,
        }
        for name, weights in made.items():
            whole = vectors[30].copy()
            whole[:size] = weights
            [row] = kind(rows, "leap", predictor=name, ahead=ahead, run=run, step=step)
            assert row["loss_now"] == loss(vectors[30], run, step)
            assert row["loss_forecast"] == pytest.approx(loss(whole, run, step), rel=2e-3)
            assert row["inflation"] == row["loss_forecast"] / row["loss_now"]


def test_equivalent_steps_are_read_off_the_run_itself(rows, loss_of):
    truth, workload, loss = loss_of
    curve = [loss(truth.read([0], [step])[0, 0], 0, step) for step in truth.steps]
    assert curve == sorted(curve, reverse=True)  # so that nothing needs smoothing
    for row in kind(rows, "leap", run=0):
        if row["loss_forecast"] > curve[0]:
            assert (row["equivalent_steps"], row["bounded"]) == (-row["step"], True)
            assert row["worth_k"] is False
        elif row["loss_forecast"] < curve[-1]:
            assert row["bounded"]
            assert row["equivalent_steps"] == pytest.approx(60 - row["step"])
            assert row["worth_k"] in (True, None) or row["step"] == 60
        else:
            expected = np.interp(-row["loss_forecast"], -np.array(curve), truth.steps) - row["step"]
            assert row["equivalent_steps"] == pytest.approx(expected, abs=1e-6)
            assert row["worth_k"] == (expected >= row["ahead"])
        assert row["net_steps"] == row["equivalent_steps"] - 2 * workload.evaluation_cost()
    assert any(row["equivalent_steps"] > 0 for row in kind(rows, "leap", run=0))
    assert all(row["equivalent_steps"] == 0 for row in kind(rows, "leap", predictor="persistence"))


def test_verdicts_of_every_criterion(rows, loss_of):
    truth, _, loss = loss_of
    curve = {step: loss(truth.read([1], [step])[0, 0], 1, step) for step in truth.steps}
    for row in kind(rows, "leap", run=1):
        forecast, now = row["loss_forecast"], curve[row["step"]]
        so_far = np.std([value for step, value in curve.items() if step <= row["step"]])
        assert row["accepted_strict"] == (forecast < now)
        assert row["accepted_adaptive"] == (forecast < now + so_far)
        assert row["accepted_adaptive-published"] == (forecast < now + np.std(list(curve.values())))
        assert row["accepted_proximity"] == (forecast < 1.005 * now)


def test_regimes_come_from_the_last_layers_inputs(rows, loss_of):
    truth, workload, _ = loss_of
    network = Network(workload, truth.layout)
    images = workload._held_out[0][:100]
    pooled, found = {}, {}
    for step in truth.steps:
        network._load(truth.read([0], [step])[0, 0], truth.integers(0, step), calibrated=None)
        network.model.eval()
        with torch.no_grad():
            pooled[step] = network.model[:-1](images).numpy().astype(np.float64)
        if step:
            a, b = pooled[step - 5], pooled[step]
            found[step] = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    [thresholds] = kind(rows, "regimes", run=0)
    low, high = np.percentile(list(found.values()), [30, 70])
    assert (thresholds["low"], thresholds["high"]) == pytest.approx((low, high))
    for row in kind(rows, "leap", run=0):
        step = row["step"]
        assert row["similarity"] == pytest.approx(found[step], abs=1e-6)
        twice = found[step] > high and found[step - 5] > high
        assert row["regime"] == ("chaotic" if found[step] < low else "stable" if twice else "transition")
    counted = [row["regime"] for row in kind(rows, "leap", run=0, predictor="linear", ahead=3)]
    assert all(thresholds[name] == counted.count(name) for name in ("stable", "transition", "chaotic"))


def test_the_summary_is_what_the_rows_come_to(rows):
    for name in ("linear", "ema"):
        for regime in ("all", "transition"):
            [row] = kind(rows, "summary", predictor=name, ahead=5, regime=regime)
            leaps = [each for each in kind(rows, "leap", predictor=name, ahead=5) if regime in ("all", each["regime"])]
            shares = [
                np.mean([each["accepted_strict"] for each in leaps if each["run"] == run])
                for run in sorted({each["run"] for each in leaps})
            ]
            assert row["snapshots"] == len(leaps)
            assert row["accepted_strict"] == pytest.approx(np.mean(shares))
            assert row["accepted_strict_std"] == pytest.approx(np.std(shares, ddof=1))
            assert row["equivalent_steps"] == np.median([each["equivalent_steps"] for each in leaps])
            gained = [each["equivalent_steps"] * each["accepted_strict"] for each in leaps]
            assert row["net_strict"] == pytest.approx(np.mean(gained) - leaps[0]["verification_steps"])


def test_past_outcomes_are_earlier_verdicts_only(rows):
    found = kind(rows, "leap", predictor="linear", ahead=3, run=0)
    for place, row in enumerate(found):
        before = [each["accepted_strict"] for each in found[max(0, place - 5) : place]]
        assert row["past_outcomes"] == (np.mean(before) if before else None)


def test_cascades_are_leaps_along_the_predictors_own_path(rows):
    for row in kind(rows, "cascade", depth=2, predictor="linear"):
        [first] = kind(rows, "leap", predictor="linear", ahead=5, run=row["run"], step=row["step"])
        assert (row["reached"] >= 1) == first["accepted_strict"]
        assert row["complete"] == (row["reached"] == 2)
        if row["reached"] == 1:
            assert row["equivalent_steps"] == first["equivalent_steps"]
        assert row["verification_steps"] == pytest.approx(
            first["verification_steps"] / 2 * (1 + min(row["reached"] + 1, 2))
        )
    assert {row["reached"] for row in kind(rows, "cascade", predictor="persistence")} == {0}
    assert max(row["reached"] for row in kind(rows, "cascade", depth=2, predictor="linear")) == 2


def test_thresholds_may_be_given(store):
    found = leap_offline(
        str(store), predictors=["linear"], ahead=[5], cascades=[], high=0.5, low=0.1, runs="0", steps="30"
    )
    [row] = kind(found, "leap", predictor="linear")
    assert row["regime"] == "stable"
    [row] = kind(found, "regimes")
    assert Thresholds(row["low"], row["high"]) == Thresholds(0.1, 0.5)


def test_limits_are_held_against_the_summary(rows):
    check(rows, parse_limits(["linear@5:net_strict=-1e9", "accepted_strict=0"], "--require"), [], "persistence")
    with pytest.raises(CheckFailedError, match=r"accepted_strict=1.1: momentum at K = 3 has accepted_strict ="):
        check(rows, parse_limits(["accepted_strict=1.1"], "--require"), [], "persistence")
    with pytest.raises(CheckFailedError, match="linear at K = 20"):
        check(rows, [], parse_limits(["linear@20:inflation=0"], "--max"), "persistence")
    for text, match in (("nobody:inflation=1", "no such predictor"), ("oddity=1", "expected one of")):
        with pytest.raises(UsageError, match=match):
            check(rows, parse_limits([text], "--require"), [], "persistence")
    with pytest.raises(UsageError, match="KEY=NUMBER"):
        parse_limits(["inflation"], "--max")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"ahead": [0]}, "--K 0"),
        ({"ahead": []}, "--K"),
        ({"cascades": [(0, 5)]}, "--cascades 0x5"),
        ({"delta": 7}, "no snapshot has 4 others 7 steps apart"),
        ({"delta": 0}, "--delta 0"),
        ({"context": 99, "predictors": ["ema"]}, "no snapshot has 98 others"),
        ({"criteria": []}, "--criteria: none given"),
        ({"criteria": ["strickt"]}, "Did you mean 'strict'"),
        ({"predictors": ["lineal"]}, "Did you mean 'linear'"),
        ({"predictors": ["linear", "linear"]}, "named twice"),
        ({"predictors": ["lfd2"]}, "must be fitted"),
        ({"options": {"decay": "0.5"}, "predictors": ["linear"]}, "--set decay: none of"),
        ({"options": {"ema.decay": "2"}, "predictors": ["ema"]}, "decay"),
        ({"low": 0.9, "high": 0.1}, "above high"),
        ({"percentiles": (70, 30)}, "percentiles"),
        ({"steps": "1"}, "steps"),
        ({"probes": 0}, "--probes 0"),
        ({"window": 1}, "--window 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(store, arguments, match):
    with pytest.raises(UsageError, match=match):
        leap_offline(str(store), **({"predictors": ["linear", "ema"], "ahead": [5], "cascades": []} | arguments))


def test_a_store_without_moments_or_without_a_workload_is_named(store, small, tmp_path):
    with pytest.raises(UsageError, match="holds no moments of an optimiser, which momentum goes along") as caught:
        leap_offline(str(small / "digits.zarr"))
    assert "--with-optimizer" in str(caught.value.hint)
    truth = Trajectory.open(store)
    bare = tmp_path / "bare.zarr"
    with TrajectoryWriter.create(bare, truth.layout, [0], planned_steps=truth.steps[:5]) as writer:
        for step in truth.steps[:5]:
            writer.append(step, truth.read([0], [step])[0, 0], truth.integers(0, step), run=0)
        writer.finish()
    with pytest.raises(UsageError, match="names no workload") as caught:
        leap_offline(str(bare), predictors=["linear"])
    assert "--loss" in str(caught.value.hint)
    told = []
    found = leap_offline(
        str(bare),
        predictors=["linear"],
        ahead=[5],
        loss="tests.speculation.test_offline_store:first_norm",
        warn=told.append,
    )
    assert told == ["no regimes: --loss shows no activations."]
    [row] = kind(found, "leap", predictor="linear", step=10)
    w, v = (truth.read([0], [step])[0, 0].astype(float) for step in (10, 5))
    assert row["loss_forecast"] == pytest.approx(
        np.linalg.norm((2 * w - v)[truth.layout.slice_of("0.weight")]), rel=1e-5
    )
    assert row["regime"] is None
    assert row["verification_steps"] is None


def test_the_moments_and_rates_of_any_loop_are_found(tmp_path):
    """A recording by `farcli.Recorder`: no workload, learning rates in its journal."""
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    states = {}
    with Recorder(model, optimizer, tmp_path / "loop.zarr", every=2, with_optimizer=True) as recorder:
        for _ in range(8):
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
            states[recorder.step] = (
                model.weight.detach().clone(),
                {k: v.clone() for k, v in optimizer.state[model.weight].items()},
            )
    words = {"predictors": ["momentum"], "ahead": [3], "cascades": [], "steps": "6", "loss": f"{__name__}:weight_norm"}
    [row] = kind(leap_offline(str(tmp_path / "loop.zarr"), **words), "leap", predictor="momentum")
    weight, state = states[6]
    direction = state["exp_avg"] / (1 - 0.9**6) / ((state["exp_avg_sq"] / (1 - 0.999**6)).sqrt() + 1e-8)
    assert row["loss_forecast"] == pytest.approx(float((weight - 3 * 0.01 * 0.9**6 * direction).norm()), rel=1e-5)
    [row] = kind(leap_offline(str(tmp_path / "loop.zarr"), **words, options={"lr": "0"}), "leap", predictor="momentum")
    assert row["loss_forecast"] == row["loss_now"]
    (tmp_path / "loop.zarr/snapshots.ndjson").unlink()
    with pytest.raises(UsageError, match="step 6: its journal has no learning rates, and momentum needs one"):
        leap_offline(str(tmp_path / "loop.zarr"), **words)


def weight_norm(state):
    return float(state["weight"].norm())


def first_norm(state):
    return float(state["0.weight"].norm())


def test_moments_that_are_not_numbers_are_named(store, tmp_path):
    path = tmp_path / "bad.zarr"
    shutil.copytree(store, path)
    inner = Trajectory.open(path / "optimizer.zarr")
    vectors = inner.read([0, 1], inner.steps)
    vectors[1, 6, 3] = np.nan
    shutil.rmtree(path / "optimizer.zarr")
    with TrajectoryWriter.create(
        path / "optimizer.zarr", inner.layout, [0, 1], kind="optimizer", planned_steps=inner.steps
    ) as writer:
        for run in (0, 1):
            for place, step in enumerate(inner.steps):
                writer.append(step, vectors[run, place], run=run)
        writer.finish()
    with pytest.raises(NonFiniteError, match="run 1, step 35: its moments are not finite"):
        leap_offline(str(path), predictors=["momentum"], ahead=[5], cascades=[])


@pytest.mark.parametrize(
    "rename", [lambda slot: (f"other.{slot.name}", slot.shape), lambda slot: (slot.name, (slot.size, 1))]
)
def test_moments_of_another_network_are_refused(store, tmp_path, rename):
    path = tmp_path / "mixed.zarr"
    shutil.copytree(store, path)
    inner = Trajectory.open(path / "optimizer.zarr")
    layout = layout_of([(*rename(slot), slot.dtype, slot.role) for slot in inner.layout.floats])
    moments = inner.read([0], inner.steps[:1])[0, 0]
    shutil.rmtree(path / "optimizer.zarr")
    with TrajectoryWriter.create(path / "optimizer.zarr", layout, [0], planned_steps=inner.steps[:1]) as writer:
        writer.append(inner.steps[0], moments, run=0)
        writer.finish()
    with pytest.raises(StoreError, match="holds the moments of another network"):
        leap_offline(str(path), predictors=["momentum"], ahead=[5], cascades=[])


def test_the_command(farcli, store):
    words = ("leap", store, "--predictors", "momentum,linear", "--K", "5,20", "--runs", "0", "--steps", "30,40")
    plain = farcli(*words, "--format", "ndjson")
    assert plain.code == 0, plain.err
    rows = [json.loads(line) for line in plain.out.splitlines()]
    assert {row["kind"] for row in rows} == {"leap", "cascade", "summary", "cascades", "auc", "regimes"}
    assert len(kind(rows, "leap")) == 3 * 2 * 2
    table = farcli(*words, "--format", "table", "--require", "linear@5:net_strict=1000")
    assert table.code == 5
    assert "linear@5" not in table.out
    assert "quadratic" not in table.out
    assert "farcli: error: --require net_strict=1000: linear at K = 5 has net_strict" in table.err
    for words, code, text in (
        (("leap", "nowhere"), 2, "neither a store nor"),
        (("leap", "nowhere.zarr"), 3, "not found"),
        (("leap", store, "--K", "five"), 2, "--K 'five'"),
        (("leap", store, "--cascades", "4by5"), 2, "--cascades '4by5'"),
    ):
        outcome = farcli(*words)
        assert (outcome.code, outcome.out) == (code, "")
        assert text in outcome.err
        assert "Traceback" not in outcome.err
