"""The engine that fits by gradient: what it hands to a loss, when it stops, what it keeps, how it fails."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farcli.errors import NonFiniteError, ResourceError, StoreError, UsageError
from farcli.fitting.descent import DivergedError, Fitted, Saved, descend
from farcli.fitting.networks import Alone, Together
from farcli.forecasters.base import Coupling, Descent, Prefix, Problem, Trained, TrainedForecaster
from farcli.forecasters.table import FORECASTERS
from farcli.registry import resolve
from tests.forecasters.trajectories import LAYOUT, Data, create, drifting

PARAMETERS = LAYOUT.parameters
NETWORKS = [name for name in FORECASTERS if issubclass(resolve("forecaster", name, FORECASTERS), TrainedForecaster)]
Seen = list[tuple[int, int]]


class Witness(TrainedForecaster):
    """One number, fitted to the last targets' mean; writes down every example it is shown."""

    name = "witness"
    reference = "a test's"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Descent):
        joint: bool = False

    def __init__(self, config: Config, trained: Trained[nn.Linear] | None = None) -> None:
        self._config, self._trained = config, trained
        self.batches: list[tuple[bool, Seen]] = []

    @property
    def config(self) -> Config:
        return self._config

    @property
    def trained(self) -> Trained[nn.Linear] | None:
        return self._trained

    @property
    def coupling(self) -> Coupling:
        return Coupling.JOINT if self._config.joint else Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        return True

    @property
    def min_context(self) -> int:
        return 1

    def network(self, problem: Problem) -> nn.Linear:
        return nn.Linear(1, 1)

    def with_networks(self, problem: Problem, networks: Sequence[nn.Module]) -> "Witness":
        linear = tuple(network for network in networks if isinstance(network, nn.Linear))
        assert len(linear) == len(networks)
        fitted = Witness(self._config, Trained(problem, linear))
        fitted.batches = self.batches
        return fitted

    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, random_B: Tensor | None) -> Tensor:
        assert self._trained is not None
        network = self._trained.network
        # `numbered` data: each weight says which run and coordinate it is.
        seen = [(int(value) // 1000, int(value) % 1000) for value in prefix.weights_BCD[:, 0].flatten().tolist()]
        assert [run for run, _ in seen[:: prefix.weights_BCD.shape[-1]]] == list(prefix.runs_B)
        assert torch.equal(truth_BHD[:, -1], prefix.weights_BCD[:, 0] + 0.5)
        self.batches.append((network.training, seen))
        return (network.bias - 1).square().sum()

    def forecast_alone(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        raise NotImplementedError


def numbered(runs: int = 6) -> Data:
    """Weight = 1000·run + coordinate, plus a half at the targets."""
    numbers_BD = torch.arange(runs)[:, None] * 1000.0 + torch.arange(LAYOUT.size)
    data = drifting(seed=0, runs=runs)
    weights_BTD = numbers_BD[:, None].repeat(1, data.weights_BTD.shape[1], 1)
    weights_BTD[:, len(data.steps_C) :] += 0.5
    return replace(data, weights_BTD=weights_BTD)


def witnessed(
    data: Data, memory: int = 10**9, runs: Any = ((4, 2), (0, 1, 3, 5)), **options: Any
) -> tuple[list[tuple[bool, Seen]], Fitted[Witness]]:
    witness = Witness(Witness.Config(**options))
    cuts = () if options.get("joint") else (20, 70)
    return witness.batches, descend(witness, replace(data.problem(), memory=memory), data.passes(cuts, runs))


PAIRS = {(run, column) for run in range(6) for column in range(PARAMETERS)}


@pytest.mark.parametrize("joint", [False, True])
def test_every_example_once_an_epoch_in_random_order(joint: bool) -> None:
    batches, fitted = witnessed(numbered(), joint=joint, batch=4 if joint else 100, epochs=2)
    size = 2 if joint else 8  # mini-batches of 6 runs, of 6·124 pairs
    assert fitted.courses[0].updates == len(batches) == 2 * size
    epochs = [[pair for _, seen in batches[i * size : (i + 1) * size] for pair in seen] for i in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(PAIRS)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("joint", [False, True])
def test_validation_runs_are_never_trained_on(joint: bool) -> None:
    batches, fitted = witnessed(numbered(), joint=joint, epochs=3, validation=0.34)
    trained = {run for training, seen in batches if training for run, _ in seen}
    judged = [seen for training, seen in batches if not training]
    held_out = {run for run, _ in judged[0]}
    assert len(held_out) == 2
    assert trained | held_out == set(range(6))
    assert not trained & held_out
    assert len(judged) == len(fitted.courses[0].validation) == 3
    assert all(sorted(seen) == sorted(judged[0]) for seen in judged)


def test_larger_data_are_sampled_by_coordinate() -> None:
    data = numbered()
    memory = 12 * 4 * 2 + 40 * 6 * (9 * 4 + 24)  # the network, and 40 coordinates
    batches, _ = witnessed(data, memory=memory, epochs=1, batch=50)
    seen = [pair for _, batch in batches for pair in batch]
    columns = {column for _, column in seen}
    assert len(seen) == len(set(seen)) == 6 * len(columns)
    assert 25 <= len(columns) <= 40
    assert max(columns) > 80  # from the whole vector, not its beginning
    assert max(columns) < PARAMETERS


def test_larger_vectors_are_streamed() -> None:
    batches, fitted = witnessed(numbered(), memory=1000, joint=True, epochs=2, batch=3, validation=0.2)
    training = [[run for run, _ in seen[::PARAMETERS]] for is_training, seen in batches if is_training]
    held_out = {run for is_training, seen in batches if not is_training for run, _ in seen}
    assert len(held_out) == 1
    for epoch in (training[: len(training) // 2], training[len(training) // 2 :]):
        assert sorted(run for batch in epoch for run in batch) == sorted(set(range(6)) - held_out)
    assert fitted.courses[0].updates == len(training)


def test_streaming_one_block_equals_holding_it(data: Data) -> None:
    forecaster = create("gfm", epochs=3, batch=2)
    assert isinstance(forecaster, TrainedForecaster)
    problem = data.problem()
    network = sum(p.numel() for p in forecaster.network(problem).parameters()) * 4 * 12
    held = descend(forecaster, problem, data.passes())
    streamed = descend(forecaster, replace(problem, memory=network + 1000), data.passes())
    assert held.courses[0].losses == streamed.courses[0].losses
    for key, value in held.forecaster.tensors().items():
        assert torch.equal(value, streamed.forecaster.tensors()[key])


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_seeds_give_equal_bits_and_leave_the_global_generator(name: str, data: Data) -> None:
    def fit(seed: int) -> dict[str, Tensor]:
        forecaster = create(name, epochs=3, batch=50, seed=seed)
        assert isinstance(forecaster, TrainedForecaster)
        observed, problem = data.observed(forecaster)
        return descend(forecaster, problem, observed.passes()).forecaster.tensors()

    before = torch.get_rng_state()
    one = fit(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    two, other = fit(1), fit(2)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def overfitting(**options: Any) -> Fitted[Any]:
    forecaster = create("lstm", channels="joint", lr=0.03, validation=0.4, batch=3, **options)
    assert isinstance(forecaster, TrainedForecaster)
    data = drifting(seed=2, runs=5)
    return descend(forecaster, data.problem(), data.passes())


def test_the_best_epoch_is_kept() -> None:
    fitted = overfitting(epochs=30)
    [course] = fitted.courses
    best = min(range(30), key=lambda epoch: course.validation[epoch])
    assert course.epoch == best + 1 < 30
    assert course.losses[-1] < course.losses[best]  # it went on to fit the training runs
    # The state is the one of a fit that ends there.
    short = overfitting(epochs=best + 1)
    assert short.courses[0].validation == course.validation[: best + 1]
    for key, value in short.forecaster.tensors().items():
        assert torch.equal(value, fitted.forecaster.tensors()[key])


def test_patience_ends_the_fit() -> None:
    [long], [course] = overfitting(epochs=30).courses, overfitting(epochs=30, patience=4).courses
    assert len(course.losses) == course.epoch + 4 < 30
    assert course.validation == long.validation[: len(course.validation)]


def test_updates_end_the_fit() -> None:
    batches, fitted = witnessed(numbered(), batch=100, epochs=5, updates=11)
    assert fitted.courses[0].updates == len(batches) == 11
    assert len(fitted.courses[0].losses) == 2


def test_progress_names_updates_and_losses() -> None:
    lines: list[tuple[float, float, str]] = []
    data = drifting(seed=2, runs=5)
    forecaster = create("lstm", epochs=2, validation=0.2)
    assert isinstance(forecaster, TrainedForecaster)
    fitted = descend(
        forecaster, data.problem(), data.passes(), report=lambda done, total, text: lines.append((done, total, text))
    )
    text = f"epoch 2, loss {fitted.courses[0].losses[1]:.4g}, validation {fitted.courses[0].validation[1]:.4g}"
    assert lines[-1] == (fitted.courses[0].updates, fitted.courses[0].updates, text)
    assert len(lines) == 2


def test_too_few_runs_to_split() -> None:
    with pytest.raises(UsageError, match=r"witness: validation = 0.5 of 1 training runs leaves 0 to learn from"):
        witnessed(numbered(1), runs=((0,),), validation=0.5)


def test_divergence_keeps_the_best_state(data: Data) -> None:
    forecaster = create("gfm", lr=1e15, batch=5)
    assert isinstance(forecaster, TrainedForecaster)
    with pytest.raises(
        DivergedError, match=r"gfm: the fit diverged: the loss is (inf|nan) at update \d+; the last finite loss was"
    ) as caught:
        descend(forecaster, data.problem(), data.passes())
    assert caught.value.exit_code == 4
    assert caught.value.hint == "Lower the learning rate: --set lr=0.0001."
    assert caught.value.best is not None
    # Nothing after the first update is better than the untrained network.
    untrained = descend(create("gfm", lr=1e-30, batch=5, epochs=1), data.problem(), data.passes())  # type: ignore[type-var]
    for key, value in caught.value.best.tensors().items():
        torch.testing.assert_close(value, untrained.forecaster.tensors()[key])


def test_divergence_from_the_start_keeps_nothing(data: Data) -> None:
    huge = replace(data, weights_BTD=data.weights_BTD.double() * 1e30)
    forecaster = create("gfm")
    assert isinstance(forecaster, TrainedForecaster)
    with pytest.raises(DivergedError, match=r"at update 1; no loss was finite before") as caught:
        descend(forecaster, huge.problem(), huge.passes())
    assert caught.value.best is None


@pytest.mark.parametrize("name", ["gfm", "lstm"])
def test_wrong_data_are_named(name: str, data: Data) -> None:
    weights_BTD = data.weights_BTD.clone()
    weights_BTD[0, :, LAYOUT.parameters] = float("nan")  # a buffer: not fitted, not named
    weights_BTD[3, 7, LAYOUT.slice_of("head.weight").start + 12] = float("inf")
    wrong = replace(data, weights_BTD=weights_BTD)
    forecaster = create(name)
    assert isinstance(forecaster, TrainedForecaster)
    with pytest.raises(NonFiniteError, match=r"run 3 .*'head.weight' holds inf at step 130, expected finite"):
        descend(forecaster, wrong.problem(), wrong.passes())


@pytest.mark.parametrize(
    ("name", "options"), [("gfm", {}), ("dlinear", {"channels": "joint"}), ("lstm", {"channels": "joint"})]
)
def test_joint_networks_name_the_largest_size(name: str, options: dict[str, Any], data: Data) -> None:
    forecaster = create(name, **options)
    assert isinstance(forecaster, TrainedForecaster)
    problem = replace(data.problem(memory=10**6), coordinates=10**6)
    with pytest.raises(ResourceError) as caught:
        descend(forecaster, problem, data.passes())
    largest = int(str(caught.value).rsplit("D = ", 1)[1].rstrip("."))

    def held(size: int) -> int:
        network = forecaster.network(replace(problem, coordinates=size))
        return 12 * 4 * sum(p.numel() for p in network.parameters())

    assert held(largest) <= problem.memory < held(largest + 1)


def test_constant_weights_are_forecast_to_stay() -> None:
    """Zero variance divides nothing by zero: no method moves what never moved by more than its own bias."""
    data = drifting(seed=0)
    still = replace(data, weights_BTD=data.weights_BTD[:, :1].expand(-1, 9, -1).contiguous())
    for name in NETWORKS:
        forecaster = create(name, epochs=2)
        assert isinstance(forecaster, TrainedForecaster)
        observed, problem = still.observed(forecaster)
        found = descend(forecaster, problem, observed.passes()).forecaster.forecast(observed.prefix(), data.steps_H)
        assert found.isfinite().all()


def test_a_stopped_fit_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = drifting(seed=3)
    options = {"epochs": 12, "batch": 2, "validation": 0.4, "channels": "joint"}
    forecaster = create("lstm", **options)
    assert isinstance(forecaster, TrainedForecaster)
    whole = descend(forecaster, data.problem(), data.passes())

    def stop(done: float, total: float, text: str) -> None:
        if text.startswith("epoch 5,"):
            raise KeyboardInterrupt

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        descend(
            forecaster,
            data.problem(),
            data.passes(),
            saved=Saved(path, "this fit", resume=False, every=0),
            report=stop,
        )
    seen: list[str] = []
    again = descend(
        forecaster,
        data.problem(),
        data.passes(),
        saved=Saved(path, "this fit", resume=True),
        report=lambda done, total, text: seen.append(text),
    )
    assert seen[0].startswith("epoch 5,")  # stopped before the fifth was saved
    assert again.courses == whole.courses
    for name, tensor in whole.forecaster.tensors().items():
        assert torch.equal(again.forecaster.tensors()[name], tensor)
    with pytest.raises(UsageError, match="holds another fit than the one asked for"):
        descend(forecaster, data.problem(), data.passes(), saved=Saved(path, "another", resume=True))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="is no state of a fit"):
        descend(forecaster, data.problem(), data.passes(), saved=Saved(path, "this fit", resume=True))


# ------------------------------------------------------------------- ensembles

VECTORISED = [name for name in NETWORKS if name != "lstm"]
"""`vmap` has no rule for an LSTM."""


def begun(name: str, seeds: Sequence[int], data: Data, **options: Any) -> list[TrainedForecaster]:
    """Untrained networks of some seeds, each a forecaster."""
    forecaster = create(name, **options)
    assert isinstance(forecaster, TrainedForecaster)
    _, problem = data.observed(forecaster)
    members = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            members.append(forecaster.with_networks(problem, [forecaster.network(problem)]))
        members[-1].measure([examples_of(name, data, 10 * seed)])
    return members


def examples_of(name: str, data: Data, column: int) -> tuple[Prefix, Tensor]:
    """Whole vectors for a joint method, one coordinate for others."""
    forecaster = create(name)
    assert isinstance(forecaster, TrainedForecaster)
    observed, _ = data.observed(forecaster)
    joint = forecaster.coupling is Coupling.JOINT
    columns = slice(0, PARAMETERS) if joint else slice(column, column + 1)
    prefix = observed.prefix()
    truth_BHD = observed.weights_BTD[:, len(observed.steps_C) :, columns]
    return replace(prefix, weights_BCD=prefix.weights_BCD[..., columns]), truth_BHD


@pytest.mark.parametrize("name", VECTORISED)
def test_networks_in_one_go_have_each_its_own_loss_and_gradient(name: str, data: Data) -> None:
    alone, members = begun(name, (3, 4, 5), data), begun(name, (3, 4, 5), data)
    together = Together(members)
    steps_H = data.steps_H
    batches = [examples_of(name, data, column) for column in (30, 60, 90)]
    draws = [torch.rand(data.runs, generator=torch.Generator().manual_seed(place)) for place in range(3)]
    losses_M = together.losses(batches, draws, steps_H)
    losses_M.sum().backward()
    stacked = dict(zip(dict(together.networks[0].named_parameters()), together.parameters, strict=True))
    assert len(set(losses_M.tolist())) == 3
    for place, member in enumerate(alone):
        single = Alone(member)
        [loss] = single.losses([batches[place]], [draws[place]], steps_H)
        loss.backward()
        torch.testing.assert_close(losses_M[place], loss)
        for key, parameter in single.networks[0].named_parameters():
            gradient = stacked[key].grad
            assert gradient is not None
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(gradient[place], own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


def test_networks_in_one_go_follow_every_update_and_part_at_the_end(data: Data) -> None:
    together = Together(begun("gfm", (0, 1), data))
    before = together.states()
    with torch.no_grad():
        for parameter in together.parameters:
            parameter[1] += 1.0
    for place, network in enumerate(together.networks):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, before[place][key] + place)
    together.load(before)
    assert all(bool((p[1] == before[1][key]).all()) for key, p in zip(before[1], together.parameters, strict=True))
    together.settle()
    starts = {value.untyped_storage().data_ptr() for n in together.networks for value in n.state_dict().values()}
    assert len(starts) == 2 * len(before[0])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_ensemble_is_the_mean_of_its_seeds(
    name: str, together: bool, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself each seed gives the same network: its split, its order, its end."""
    if together and name not in VECTORISED:
        pytest.skip("vmap has no rule for an LSTM")
    options: dict[str, Any] = {"epochs": 6, "batch": 300, "validation": 0.4, "patience": 2, "lr": 1e-3}
    one = create(name, ensemble=3, seed=5, **options)
    assert isinstance(one, TrainedForecaster)
    observed, problem = data.observed(one)
    monkeypatch.setattr(type(one), "vectorised", lambda self, problem: together)
    fitted = descend(one, problem, observed.passes())
    prefix, forecasts = observed.prefix(), []
    for seed, course in zip((5, 6, 7), fitted.courses, strict=True):
        single = create(name, seed=seed, **options)
        assert isinstance(single, TrainedForecaster)
        alone = descend(single, problem, observed.passes())
        forecasts.append(alone.forecaster.forecast(prefix, data.steps_H))
        if together:
            assert course.validation == pytest.approx(alone.courses[0].validation, rel=1e-3)
        else:
            assert course == alone.courses[0]
            lead = f"{seed - 5}."
            own = alone.forecaster.tensors()
            assert all(torch.equal(fitted.forecaster.tensors()[lead + key], value) for key, value in own.items())
    moved = (torch.stack(forecasts) - prefix.weights_BCD[:, -1:]).abs().max()
    found = fitted.forecaster.forecast(prefix, data.steps_H)
    torch.testing.assert_close(found, torch.stack(forecasts).mean(0), rtol=0, atol=5e-3 * float(moved))
    again = type(one).restore(one.config, problem, fitted.forecaster.tensors())
    assert torch.equal(again.forecast(prefix, data.steps_H), found)


@pytest.mark.parametrize(("name", "together"), [("lstm", False), ("gfm", True)])
def test_a_stopped_ensemble_goes_on_to_the_same_bits(name: str, together: bool, data: Data, tmp_path: Path) -> None:
    forecaster = create(name, epochs=6, batch=200, validation=0.4, ensemble=3)
    assert isinstance(forecaster, TrainedForecaster)
    assert forecaster.vectorised(data.problem()) == together
    whole = descend(forecaster, data.problem(), data.passes())
    at = "epoch 4," if together else "network 2 of 3, epoch 3,"

    def stop(done: float, total: float, text: str) -> None:
        if text.startswith(at):
            raise KeyboardInterrupt

    saved = Saved(tmp_path / "state", "this fit", resume=False, every=0)
    with pytest.raises(KeyboardInterrupt):
        descend(forecaster, data.problem(), data.passes(), saved=saved, report=stop)
    seen: list[tuple[float, float, str]] = []
    again = descend(
        forecaster,
        data.problem(),
        data.passes(),
        saved=Saved(tmp_path / "state", "this fit", resume=True),
        report=lambda *line: seen.append(line),
    )
    assert seen[0][2].startswith(at)
    assert seen[-1][0] == seen[-1][1] == sum(course.updates for course in whole.courses)
    assert again.courses == whole.courses
    for key, tensor in whole.forecaster.tensors().items():
        assert torch.equal(again.forecaster.tensors()[key], tensor)


def test_an_ensemble_of_which_one_diverges_says_which(data: Data) -> None:
    forecaster = create("gfm", lr=1e15, batch=5, ensemble=2, seed=8)
    assert isinstance(forecaster, TrainedForecaster)
    with pytest.raises(DivergedError, match=r"gfm: the fit of seed [89] diverged: ") as caught:
        descend(forecaster, data.problem(), data.passes())
    best = caught.value.best
    assert best is not None
    assert best.forecast(data.prefix(), data.steps_H).isfinite().all()


def test_an_ensemble_that_does_not_fit_in_one_go_is_fitted_one_by_one(data: Data) -> None:
    def order(memory: int) -> str:
        forecaster = create("gfm", epochs=1, ensemble=3)
        assert isinstance(forecaster, TrainedForecaster)
        seen: list[str] = []
        descend(forecaster, data.problem(memory), data.passes(), report=lambda done, total, text: seen.append(text))
        return seen[0]

    size = sum(p.numel() for p in begun("gfm", (0,), data)[0].network(data.problem()).parameters()) * 4
    assert order(2 * 3 * 12 * size).startswith("epoch 1")
    assert order(2 * 3 * 12 * size - 1).startswith("network 1 of 3, epoch 1")
    with pytest.raises(ResourceError, match=rf"gfm: D = {PARAMETERS} parameters take .* but the budget is"):
        order(14 * size - 1)
