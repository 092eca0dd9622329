"""The engine that fits by gradient: what it hands to a loss, when it stops, what it keeps, how it fails."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from farcli.errors import NonFiniteError, ResourceError, StoreError, UsageError
from farcli.fitting import DivergedError, Fitted, Saved, descend
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

    def with_network(self, problem: Problem, network: nn.Module) -> "Witness":
        assert isinstance(network, nn.Linear)
        fitted = Witness(self._config, Trained(problem, network))
        fitted.batches = self.batches
        return fitted

    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, generator: Generator) -> Tensor:
        assert self._trained is not None
        network = self._trained.network
        # `numbered` data: each weight says which run and coordinate it is.
        seen = [(int(value) // 1000, int(value) % 1000) for value in prefix.weights_BCD[:, 0].flatten().tolist()]
        assert [run for run, _ in seen[:: prefix.weights_BCD.shape[-1]]] == list(prefix.runs_B)
        assert torch.equal(truth_BHD[:, -1], prefix.weights_BCD[:, 0] + 0.5)
        self.batches.append((network.training, seen))
        return (network.bias - 1).square().sum()

    def forecast(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
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
    assert fitted.updates == len(batches) == 2 * size
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
    assert len(judged) == len(fitted.validation) == 3
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
    assert fitted.updates == len(training)


def test_streaming_one_block_equals_holding_it(data: Data) -> None:
    forecaster = create("gfm", epochs=3, batch=2)
    assert isinstance(forecaster, TrainedForecaster)
    problem = data.problem()
    network = sum(p.numel() for p in forecaster.network(problem).parameters()) * 4 * 12
    held = descend(forecaster, problem, data.passes())
    streamed = descend(forecaster, replace(problem, memory=network + 1000), data.passes())
    assert held.losses == streamed.losses
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
    best = min(range(30), key=lambda epoch: fitted.validation[epoch])
    assert fitted.epoch == best + 1 < 30
    assert fitted.losses[-1] < fitted.losses[best]  # it went on to fit the training runs
    # The state is the one of a fit that ends there.
    short = overfitting(epochs=best + 1)
    assert short.validation == fitted.validation[: best + 1]
    for key, value in short.forecaster.tensors().items():
        assert torch.equal(value, fitted.forecaster.tensors()[key])


def test_patience_ends_the_fit() -> None:
    long, fitted = overfitting(epochs=30), overfitting(epochs=30, patience=4)
    assert len(fitted.losses) == fitted.epoch + 4 < 30
    assert fitted.validation == long.validation[: len(fitted.validation)]


def test_updates_end_the_fit() -> None:
    batches, fitted = witnessed(numbered(), batch=100, epochs=5, updates=11)
    assert fitted.updates == len(batches) == 11
    assert len(fitted.losses) == 2


def test_progress_names_updates_and_losses() -> None:
    lines: list[tuple[float, float, str]] = []
    data = drifting(seed=2, runs=5)
    forecaster = create("lstm", epochs=2, validation=0.2)
    assert isinstance(forecaster, TrainedForecaster)
    fitted = descend(
        forecaster, data.problem(), data.passes(), report=lambda done, total, text: lines.append((done, total, text))
    )
    text = f"epoch 2, loss {fitted.losses[1]:.4g}, validation {fitted.validation[1]:.4g}"
    assert lines[-1] == (fitted.updates, fitted.updates, text)
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
    assert caught.value.hint == "Lower the learning rate: --set lr=1e+14."
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
    assert (again.losses, again.validation, again.epoch) == (whole.losses, whole.validation, whole.epoch)
    for name, tensor in whole.forecaster.tensors().items():
        assert torch.equal(again.forecaster.tensors()[name], tensor)
    with pytest.raises(UsageError, match="holds another fit than the one asked for"):
        descend(forecaster, data.problem(), data.passes(), saved=Saved(path, "another", resume=True))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match="is no state of a fit"):
        descend(forecaster, data.problem(), data.passes(), saved=Saved(path, "this fit", resume=True))
