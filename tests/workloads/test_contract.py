"""What every workload in the table promises; a new one is tested by its line in the table alone."""

import random
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farcli import weights
from farcli.config import options_of
from farcli.training import Network, TrainingRun, describe_workload, reestimate, run_seed, threads, workload_from
from farcli.training import workload_of as rebuilt
from farcli.workloads.base import Workload, evaluating
from farcli.workloads.table import WORKLOADS
from tests.workloads.small import small_options

SEED, OTHER = run_seed(0, 0), run_seed(0, 1)


OWN_SPLIT = ("digits-cnn", "image-mlp", "distilbert")
"""Of the ways that there are to draw one's own examples, one each."""


@pytest.fixture(scope="module", params=[*WORKLOADS, *(f"{name}, own split" for name in OWN_SPLIT)])
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def name(case: str) -> str:
    return case.split(",", maxsplit=1)[0]


@pytest.fixture(scope="module")
def options(case: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    own = {"own_split": "true"} if case != name else {}
    return small_options(name, tmp_path_factory.mktemp(name)) | own


@pytest.fixture(scope="module")
def workload(name: str, options: dict[str, str]) -> Workload:
    return workload_from(name, options)


def trajectory(workload: Workload, seed: int, steps: int = 12) -> np.ndarray:
    run = TrainingRun(workload, [seed])
    snapshots = [run.vectors()]
    for _ in range(steps):
        run.advance(1)
        snapshots.append(run.vectors())
    return np.concatenate(snapshots)


def test_the_same_seed_gives_the_same_trajectory_and_another_seed_another(workload: Workload):
    first, again, other = (trajectory(workload, seed) for seed in (SEED, SEED, OTHER))
    assert first.tobytes() == again.tobytes()
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[-1] - first[0], other[-1] - other[0])
    assert (np.abs(np.diff(first, axis=0)).max(axis=1) > 0).all()


def test_a_saved_run_goes_on_bit_for_bit(workload: Workload, tmp_path: Path):
    run, again, other = TrainingRun(workload, [SEED]), TrainingRun(workload, [SEED]), TrainingRun(workload, [OTHER])
    run.advance(7)
    run.save(tmp_path / "training.pt")
    again.advance(2)
    assert again.restore(tmp_path / "training.pt", most=7)
    assert again.step == 7
    assert not again.restore(tmp_path / "training.pt", most=6)
    assert not other.restore(tmp_path / "training.pt", most=7)
    for _ in range(3):
        assert np.array_equal(again.advance(1), run.advance(1))
        assert again.vectors().tobytes() == run.vectors().tobytes()
        assert again.integers().tobytes() == run.integers().tobytes()


def test_batches_can_be_left_out(workload: Workload):
    batches = list(islice(workload.batches([SEED]), 70))
    for start in (1, 20, 69):
        first = next(workload.batches([SEED], start))
        assert all(torch.equal(*pair) for pair in zip(first, batches[start], strict=True))


def test_two_instances_agree(name: str, workload: Workload, options: dict[str, str]):
    assert trajectory(workload, SEED).tobytes() == trajectory(workload_from(name, options), SEED).tobytes()


def test_the_number_of_cores_does_not_matter_where_threads_are_fixed(workload: Workload):
    if workload.threads is None:
        pytest.skip("leaves torch's setting alone")
    with threads(1):
        one = trajectory(workload, SEED)
    with threads(2):
        two = trajectory(workload, SEED)
        assert torch.get_num_threads() == 2
    assert one.tobytes() == two.tobytes()


def test_global_random_state_is_neither_changed_nor_read(name: str, workload: Workload, options: dict[str, str]):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    fresh = workload_from(name, options)
    first = trajectory(fresh, SEED)
    fresh.evaluate(fresh.model([SEED]), SEED)
    reestimate(fresh, fresh.model([SEED]), SEED)
    after = torch.get_rng_state(), repr(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    assert trajectory(workload, SEED).tobytes() == first.tobytes()


def test_evaluating_changes_nothing(workload: Workload):
    run = TrainingRun(workload, [SEED])
    run.advance(3)
    list(run.model.modules())[-1].eval()
    modes = [module.training for module in run.model.modules()]
    vectors, integers = run.vectors(), run.integers()
    first = workload.evaluate(run.model, SEED)
    assert run.vectors().tobytes() == vectors.tobytes()
    assert run.integers().tobytes() == integers.tobytes()
    assert [module.training for module in run.model.modules()] == modes
    assert torch.is_grad_enabled()
    assert workload.evaluate(run.model, SEED) == first


def test_training_gets_well_below_chance(workload: Workload):
    run = TrainingRun(workload, [SEED])
    chance = workload.chance()
    at_start = workload.evaluate(run.model, SEED)
    run.advance(min(workload.default_steps, 200))
    measured = workload.evaluate(run.model, SEED)
    assert measured.keys() == chance.keys()
    assert measured["loss"] < 0.5 * min(chance["loss"], at_start["loss"])
    if "accuracy" in measured:
        assert chance["accuracy"] < 0.5 < measured["accuracy"] <= 1


def test_the_layout_covers_the_state_dict(workload: Workload):
    run = TrainingRun(workload, [SEED])
    run.advance(2)
    stored = {slot.name for slot in run.layout.slots} | {alias for alias, _ in run.layout.tied}
    assert stored == set(run.model.state_dict())
    assert {s.name for s in run.layout.slots if s.role == "parameter"} == {n for n, _ in run.model.named_parameters()}
    lead = 0 if workload.lockstep else slice(None)
    vectors, integers = run.vectors(), run.integers()
    if not workload.lockstep:
        vectors, integers = vectors[0], integers[0]
    other = workload.model([OTHER])
    other.load_state_dict(weights.unflatten(vectors, integers, run.layout), strict=True)
    for key, tensor in run.model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
        slot = next(slot for slot in run.layout.slots if slot.name == dict(run.layout.tied).get(key, key))
        assert tuple(tensor[lead].shape if tensor.ndim else tensor.shape) == slot.shape


def test_every_option_says_what_it_is(workload: Workload):
    listed = options_of(workload.Config)
    assert listed
    assert all(len(option.help) > 5 for option in listed)
    assert workload.summary
    assert isinstance(workload.config, workload.Config)


def test_the_stored_description_rebuilds_it(name: str, workload: Workload):
    header = {"workload": describe_workload(name, workload)}
    assert all(isinstance(text, str) for text in header["workload"]["options"].values())
    again = rebuilt(header)
    assert again is not None
    assert again.config == workload.config
    assert set(header["workload"]["options"]) == {field.name for field in fields(workload.config)}


def test_the_extra_it_needs_exists(workload: Workload):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert workload.needs is None or workload.needs in project["optional-dependencies"]


@contextmanager
def looking(model: nn.Module, lockstep: bool) -> Iterator[set[bytes]]:
    """Within it, the set fills with the examples that go into the network."""
    examples: set[bytes] = set()

    def look(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].flatten(0, 1) if lockstep else arguments[0]
        examples.update(example.numpy().tobytes() for example in inputs)

    handle = model.register_forward_pre_hook(look)
    yield examples
    handle.remove()


def test_held_out_data_is_never_trained_on(workload: Workload):
    model = workload.model([SEED])
    with looking(model, workload.lockstep) as trained:
        for batch in islice(workload.batches([SEED]), 60):
            workload.loss(model, batch)
        for batch in workload.calibration(SEED):
            workload.loss(model, batch)
    with looking(model, workload.lockstep) as held_out:
        workload.evaluate(model, SEED)
    assert len(trained) >= 100
    assert len(held_out) >= 100
    assert not trained & held_out


def test_what_leaps_are_verified_on_is_neither_reported_nor_trained_on_and_never_comes_twice(workload: Workload):
    model, size = workload.model([SEED]), workload.config.batch
    with looking(model, workload.lockstep) as used:
        workload.evaluate(model, SEED)
        for batch in chain(islice(workload.batches([SEED]), 90), workload.calibration(SEED)):
            workload.loss(model, batch)
    draws = []
    for draw in range(3):
        batches = workload.verification(SEED, draw, 2)
        assert len(batches) == 2
        for batch in batches:
            with looking(model, workload.lockstep) as examples, evaluating(model):
                loss = workload.loss(model, batch)
            assert loss.shape == ((1,) if workload.lockstep else ())
            assert torch.isfinite(loss).all()
            assert len(examples) == batch[0].shape[int(workload.lockstep)] == size
            draws.append(examples)
        again = workload.verification(SEED, draw, 2)
        assert all(torch.equal(a, b) for pair in zip(batches, again, strict=True) for a, b in zip(*pair, strict=True))
    assert not used & set.union(*draws)
    assert len(set.union(*draws)) == sum(map(len, draws))
    assert not torch.equal(workload.verification(OTHER, 0, 1)[0][0], workload.verification(SEED, 0, 1)[0][0])


def test_costs_and_schedule_are_sensible(workload: Workload):
    assert 0 < workload.evaluation_cost() < workload.default_steps
    assert 1 <= workload.default_every <= workload.default_steps


def test_reestimating_buffers_is_deterministic_and_leaves_the_rest(workload: Workload):
    run = TrainingRun(workload, [SEED])
    run.advance(5)
    before, integers = run.vectors(), run.integers()
    modes = [module.training for module in run.model.modules()]
    reestimate(workload, run.model, SEED)
    first = run.vectors()
    count = run.layout.parameters
    assert first[:, :count].tobytes() == before[:, :count].tobytes()
    assert run.integers().tobytes() == integers.tobytes()
    assert [module.training for module in run.model.modules()] == modes
    if run.layout.size > count:
        assert not np.array_equal(first[:, count:], before[:, count:])
    run.advance(1)
    run.load(before, integers)
    reestimate(workload, run.model, SEED)
    assert run.vectors().tobytes() == first.tobytes()


def test_a_network_evaluates_vectors_as_the_run_itself_would(workload: Workload):
    run = TrainingRun(workload, [OTHER])
    network = Network(workload, run.layout)
    snapshots = []
    for _ in range(3):
        run.advance(2)
        snapshots.append((run.vectors()[0], run.integers()[0], workload.evaluate(run.model, OTHER)))
    for vector, integers, measured in reversed(snapshots):
        untouched = vector.copy()
        assert network.evaluate(vector, integers, OTHER) == measured
        network.evaluate(vector, integers, OTHER, reestimate_buffers=True)
        assert vector.tobytes() == untouched.tobytes()


def test_weights_that_are_not_finite_give_a_loss_that_is_not(workload: Workload):
    run = TrainingRun(workload, [SEED])
    network = Network(workload, run.layout)
    broken = run.vectors()[0]
    broken[:] = np.nan
    assert np.isnan(network.evaluate(broken, run.integers()[0], SEED)["loss"])
