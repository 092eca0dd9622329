"""The engine: budgets, verdicts, roll-backs, watching, and the ledger, on trainings small enough to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farcli.errors import NonFiniteError, UsageError
from farcli.speculation.arms import Arm, build_predictor
from farcli.speculation.bandit import Bandit
from farcli.speculation.base import Observed, Predictor, Proposal
from farcli.speculation.gates import delayed, immediate
from farcli.speculation.leaper import Leaper
from farcli.speculation.validation import Validation

SOLUTION = torch.tensor([[1.0, -2.0, 3.0]])


class Along(Predictor):
    """Leaps by a fixed multiple of the last displacement."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        factor: float = 1.0
        operations: float = 0.0

    reference = "test"

    def __init__(self, config: Config) -> None:
        self._config = config

    @property
    def config(self) -> Any:
        """The options."""
        return self._config

    @property
    def context(self) -> int:
        """Two points."""
        return 2

    def operations(self, layout: Any, tables: frozenset[str]) -> float:
        """As if it cost something, or nothing."""
        return self._config.operations

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """factor·(w_t − w_{t−P})."""
        return Proposal(move_D=seen.displacement() * (self._config.factor * strength))


class Distance(Validation):
    """Squared distance from the solution, on "batches" that each weigh coordinates a little differently."""

    def __init__(self) -> None:
        self.draws: list[int] = []

    @property
    def cost(self) -> float:
        """Half a step."""
        return 0.5

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        """Four losses."""
        self.draws.append(draw)
        random = np.random.default_rng(draw)
        weight = next(model.parameters()).detach()
        return [
            float(((weight - SOLUTION) ** 2 * torch.from_numpy(random.uniform(0.9, 1.1, 3))).sum()) for _ in range(4)
        ]


def training(lr: float = 0.02) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, leaper: Leaper | None = None) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        loss = ((next(model.parameters()) - SOLUTION) ** 2).sum() / 2
        loss.backward()
        optimizer.step()
        if leaper is not None:
            leaper.loss(float(loss.detach()))


def along(factor: float, operations: float = 0.0) -> list[Arm]:
    return [Arm("along", Along(Along.Config(factor=factor, operations=operations)), 1.0)]


def test_good_leaps_are_kept_and_bring_training_forward() -> None:
    model, optimizer = training()
    plain, plain_optimizer = training()
    validation = Distance()
    with Leaper(model, optimizer, along(1.0), every=5, window=20, budget=0.2, validate=validation) as leaper:
        steps(model, optimizer, 60)
    steps(plain, plain_optimizer, 60)
    assert {entry.verdict for entry in leaper.entries} == {"accepted"}
    assert len(leaper.entries) >= 8
    assert (next(model.parameters()) - SOLUTION).norm() < 0.5 * (next(plain.parameters()) - SOLUTION).norm()
    assert leaper.account.cost == 60 + leaper.verification + leaper.account.proposing
    # paired: both losses of a verdict are of one draw; fresh: the next verdict has another
    assert validation.draws[::2] == validation.draws[1::2] == list(range(len(validation.draws) // 2))


def test_windows_that_lose_are_gone_back_on_bit_for_bit_and_leaping_ends() -> None:
    model, optimizer = training()
    begun: list[tuple[Tensor, Tensor]] = []
    ended: list[tuple[Tensor, Tensor]] = []

    def told(entry: Any) -> None:
        if entry.verdict == "rolled back" and entry.lost_steps:
            state = next(iter(optimizer.state.values()))
            ended.append((next(model.parameters()).detach().clone(), state["momentum_buffer"].clone()))

    options = {"every": 5, "window": 10, "budget": 1.0, "watch": 0, "look": False}
    leaper = Leaper(model, optimizer, along(-40.0), validate=Distance(), told=told, **options)
    original = leaper._open

    def opened(arm: int) -> Any:
        state = next(iter(optimizer.state.values()))
        begun.append((next(model.parameters()).detach().clone(), state["momentum_buffer"].clone()))
        return original(arm)

    leaper._open = opened  # type: ignore[method-assign]
    with leaper:
        steps(model, optimizer, 100)
    assert len(ended) == 2  # patience
    for (weights, momentum), (later, later_momentum) in zip(begun, ended, strict=True):
        assert torch.equal(weights, later)
        assert torch.equal(momentum, later_momentum)
    assert {entry.verdict for entry in leaper.entries} == {"rolled back"}
    assert leaper.account.lost == sum(entry.lost_steps for entry in leaper.entries) > 0
    strengths = [entry.strength for entry in leaper.entries]
    assert strengths[0] == 1.0
    assert strengths[-1] == 0.5
    assert max(entry.step for entry in leaper.entries) < 50


def test_a_harmful_leap_is_refused_at_its_first_look_and_costs_no_step() -> None:
    model, optimizer = training()
    plain, plain_optimizer = training()
    with Leaper(model, optimizer, along(-2.0), every=5, window=10, budget=0.05, validate=Distance()) as leaper:
        steps(model, optimizer, 100)
    steps(plain, plain_optimizer, 100)
    assert torch.equal(next(model.parameters()), next(plain.parameters()))
    assert {entry.verdict for entry in leaper.entries} == {"rejected"}
    assert len(leaper.entries) > 2  # it may try again, within its budget
    assert leaper.account.lost == 0
    assert leaper.account.cost <= 1.05 * 100 + leaper.account.proposing


class Told(Validation):
    """Losses as told, one measurement each; notes the step."""

    cost = 0.1

    def __init__(self, losses: list[float]) -> None:
        self.left = losses

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        """The next."""
        self.fingerprint = np.array([[1.0, 0.0], [3.0, 4.0]])[:, :: 1 - 2 * (len(self.left) % 2)]
        return [self.left.pop(0)]


def test_first_looks_end_with_a_kept_window_and_begin_again_with_a_lost_one() -> None:
    """Measurements: look before, after; verdict after, before; a verdict that loses; a look again, refused."""
    model, optimizer = training()
    validation = Told([1.0, 0.9, 0.8, 1.0, 2.0, 1.0, 1.0, 1.1])
    options = {"every": 10, "window": 20, "budget": 1.0, "watch": 0, "until": 60}
    with Leaper(model, optimizer, along(0.1), validate=validation, **options) as leaper:
        steps(model, optimizer, 60)
    assert not validation.left
    assert [(entry.step, entry.verdict, entry.reason.startswith("first look")) for entry in leaper.entries] == [
        (10, "accepted", False),
        (20, "accepted", False),
        (30, "rolled back", False),
        (40, "rolled back", False),
        (60, "rejected", True),  # after a roll-back the past begins anew
    ]
    # features mirrored from one measurement to the next: cosines of 0 and 24/25
    assert [entry.activation_cosine for entry in leaper.entries] == pytest.approx([0.48] * 5)


@pytest.mark.parametrize("gate", ["strict", "adaptive", "proximity", "delayed"])
@pytest.mark.parametrize("budget", [0.0, 0.02, 0.1])
def test_verifying_and_proposing_stay_within_their_budgets_at_every_step(gate: Any, budget: float) -> None:
    model, optimizer = training()
    options = {"every": 3, "window": 9, "budget": budget, "compute": 0.03, "validate": Distance(), "step_flops": 200.0}
    with Leaper(model, optimizer, along(0.5, operations=50.0), gate=gate, **options) as leaper:
        for _ in range(150):
            steps(model, optimizer, 1)
            assert leaper.verification <= budget * leaper.step
            assert leaper.account.proposing <= 0.03 * leaper.step
    if budget == 0.1:
        assert leaper.entries
    if gate != "delayed" and budget == 0.0:
        assert not leaper.entries  # a leap that cannot be judged is not made


def test_slopes_that_rise_along_the_leaps_end_them() -> None:
    """A leap back by more than was gained: the gradients after it point the other way."""
    model, optimizer = training(lr=0.01)
    noise = torch.Generator().manual_seed(0)
    with Leaper(model, optimizer, along(-1.5), every=8, gate="none", watch=1.0) as leaper:
        for _ in range(400):
            optimizer.zero_grad()
            drawn = SOLUTION + 0.05 * torch.randn(1, 3, generator=noise)
            (((next(model.parameters()) - drawn) ** 2).sum() / 2).backward()
            optimizer.step()
    strengths = [entry.strength for entry in leaper.entries]
    assert strengths[0] == 1.0
    assert strengths[-1] < 0.3
    assert leaper.entries[-1].step < 350


def test_no_leaps_before_start_after_until_nor_while_the_rate_is_down() -> None:
    model, optimizer = training()
    with Leaper(model, optimizer, along(0.1), every=2, gate="none", start=10, until=30) as leaper:
        steps(model, optimizer, 40)
    assert {entry.step for entry in leaper.entries} == set(range(10, 31, 2))
    model, optimizer = training()
    with Leaper(model, optimizer, along(0.1), every=2, gate="none", freeze=0.5) as leaper:
        steps(model, optimizer, 10)
        optimizer.param_groups[0]["lr"] /= 4
        steps(model, optimizer, 10)
    assert max(entry.step for entry in leaper.entries) == 10


@pytest.mark.parametrize(("policy", "share"), [("keep", 1.0), ("shrink", 0.5), ("reset", 0.0)])
def test_policies_for_momentum(policy: Any, share: float) -> None:
    model, optimizer = training()
    with Leaper(model, optimizer, along(0.1), every=6, gate="none", moments=policy) as leaper:
        steps(model, optimizer, 5)
        plain, plain_optimizer = training()
        steps(plain, plain_optimizer, 6)
        steps(model, optimizer, 1)
    assert len(leaper.entries) == 1
    momentum = next(iter(optimizer.state.values()))["momentum_buffer"]
    torch.testing.assert_close(momentum, next(iter(plain_optimizer.state.values()))["momentum_buffer"] * share)


def test_the_average_is_what_it_says_and_gives_the_network_back() -> None:
    model, optimizer = training()
    seen: list[Tensor] = []
    with Leaper(model, optimizer, [], gate="none", memory=4, stride=1) as leaper:
        average = next(model.parameters()).detach().double().clone()
        for number in range(1, 30):
            steps(model, optimizer, 1)
            weight = next(model.parameters()).detach()
            average += (weight.double() - average) / min(4, 1 + number / 9)
            before = weight.clone()
            with leaper.average():
                seen.append(next(model.parameters()).detach().clone())
            assert torch.equal(before, next(model.parameters()).detach())
    torch.testing.assert_close(seen[-1], average.float(), rtol=1e-5, atol=1e-6)


def test_gates() -> None:
    assert immediate("strict", [1.0, 1.0], [0.9, 1.0], [], 0.1).kept
    assert not immediate("strict", [1.0], [1.0], [], 0.1).kept
    assert immediate("adaptive", [1.0], [1.05], [1.3, 1.2, 1.1], 0.1).kept
    assert not immediate("adaptive", [1.0], [1.05], [1.0, 1.001], 0.1).kept
    assert immediate("proximity", [2.0], [2.009], [], 0.005).kept
    assert not immediate("proximity", [2.0], [2.011], [], 0.005).kept
    assert immediate("proximity", [2.0], [1.5], [], 0.005).kept  # as coded; as printed, it would be no match
    assert not immediate("strict", [1.0], [float("nan")], [], 0.1).kept
    assert delayed([1.0, 1.2, 0.8], [0.9, 1.1, 0.7], 1.0).kept
    assert not delayed([1.0, 1.2, 0.8], [1.1, 1.3, 0.9], 1.0).kept
    assert delayed([1.0, 1.2, 0.8, 1.0], [1.3, 0.9, 0.9, 1.1], 1.0).kept  # worse by less than its standard error
    assert not delayed([1.0], [float("inf")], 1.0).kept


def test_the_bandit_finds_the_better_arm_and_starts_from_the_prior() -> None:
    bandit = Bandit([0.0, 0.5, 1.0], seed=1)
    random = np.random.default_rng(0)
    means = [0.0, -0.5, 0.8]
    chosen = []
    for _ in range(200):
        arm = bandit.choose(0.0)
        chosen.append(arm)
        bandit.reward(arm, random.normal(means[arm], 0.3))
    assert chosen[100:].count(2) > 80
    straight = [Bandit([0.0, 1.0], seed=seed, spread=0.05).choose(1.0) for seed in range(50)]
    crooked = [Bandit([0.0, 1.0], seed=seed, spread=0.05).choose(-1.0) for seed in range(50)]
    assert sum(straight) > 45
    assert sum(crooked) < 5


def test_arms_are_measured_beside_no_leap() -> None:
    model, optimizer = training(lr=0.002)
    arms = [Arm("none", build_predictor("lookahead", {}), 0.0), *along(1.0)]
    with Leaper(model, optimizer, arms, every=5, window=10, budget=1.0, validate=Distance()) as leaper:
        steps(model, optimizer, 300)
    names = {entry.predictor for entry in leaper.entries}
    assert names == {"none", "along"}
    late = [entry.predictor for entry in leaper.entries if entry.step > 150]
    assert late.count("along") > late.count("none")


class Overfitting(Validation):
    """Losses of two verdicts: the average gets worse by less than its error, then better."""

    cost = 0.5

    def __init__(self) -> None:
        self.left = [[0.9, 1.3], [1.2, 0.8], [0.7, 0.9], [1.1, 0.9]]  # after and before, twice

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        """The next two."""
        return self.left.pop(0)


def test_progress_after_regress_is_a_reward() -> None:
    model, optimizer = training()
    arms = [*along(0.0), *along(0.1)]
    with Leaper(model, optimizer, arms, every=5, window=10, until=20, budget=1.0, validate=Overfitting()) as leaper:
        steps(model, optimizer, 30)
    bandit = leaper.state_dict()["bandit"]
    assert sorted(bandit["sum"]) == [0.0, 2.0]


def test_the_arm_that_does_not_leap_does_nothing() -> None:
    arms = [Arm(name, build_predictor("lookahead", {}), 0.0) for name in ("none", "other")]
    model, optimizer = training()
    with Leaper(model, optimizer, arms, every=5, gate="none", moments="reset") as leaper:
        steps(model, optimizer, 18)
    assert len(leaper.entries) == 3
    plain, plain_optimizer = training()
    steps(plain, plain_optimizer, 18)
    assert torch.equal(next(model.parameters()), next(plain.parameters()))


def test_gradients_of_a_proposal_stay_within_the_budget_also_after_a_resume() -> None:
    """Three gradients of 2 % of the steps: the first proposal is on credit, the second waits for step 300."""
    model, optimizer = training()

    def fresh() -> Tensor:
        return ((next(model.parameters()) - SOLUTION) ** 2).sum()

    def leaper() -> Leaper:
        return Leaper(model, optimizer, "loss-span", every=10, gate="none", step_flops=200.0, fresh=fresh)

    with leaper() as first:
        steps(model, optimizer, 140)
    assert [entry.cost for entry in first.entries] == [3.0]
    second = leaper()
    second.load_state_dict(first.state_dict())
    with second:
        steps(model, optimizer, 140)
    assert len(second.entries) == 1


def test_diverging_training_is_not_blamed_on_leaps() -> None:
    model, optimizer = training(lr=1e30)
    with (
        pytest.raises(NonFiniteError, match="no leap is to blame"),
        Leaper(model, optimizer, along(0.0), every=2, gate="none"),
    ):
        steps(model, optimizer, 20)


def wrong(**more: Any) -> Sequence[Any]:
    model, optimizer = training()
    return Leaper(model, optimizer, **more)  # type: ignore[return-value]


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(UsageError, match="every = 0"):
        wrong(gate="none", every=0)
    with pytest.raises(UsageError, match="verifies on held-out data"):
        wrong(gate="strict")
    with pytest.raises(UsageError, match="trains no parameter of the model"):
        Leaper(nn.Linear(2, 2), training()[1], gate="none")
    model, optimizer = training()
    with pytest.raises(UsageError, match="keeps no exp_avg"), Leaper(model, optimizer, "moments", gate="none"):
        steps(model, optimizer, 1)
    with pytest.raises(UsageError, match="takes gradients on fresh batches"):
        Leaper(model, optimizer, "loss-span", gate="none")
