"""What leaping must never do to a training: change it unverified, or lose its place in a checkpoint."""

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farcli.errors import NonFiniteError, UsageError
from farcli.speculation.arms import Arm, arms_of
from farcli.speculation.gates import heard
from farcli.speculation.leaper import Leaper
from farcli.speculation.trained import Saved
from farcli.speculation.validation import Validation


class Held(Validation):
    """Cross-entropy on four held-out batches of a draw."""

    cost = 0.1

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        model.eval()
        generator = torch.Generator().manual_seed(1000 + draw)
        with torch.no_grad():
            found = [float(nn.functional.cross_entropy(model(x), y)) for x, y in (_batch(generator) for _ in range(4))]
        model.train()
        return found


def _batch(generator: torch.Generator, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 6, generator=generator)
    return x.to(dtype), (x[:, :3] + 0.5 * torch.randn(16, 3, generator=generator)).argmax(1)


def network(*parts: nn.Module, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *parts, nn.Linear(8, 3)).to(dtype)


class Tied(nn.Module):
    """One matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))[:, :3]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}


def train(model, optimizer, leaper, steps: range, said=True) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = _batch(torch.Generator().manual_seed(step), dtype)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if leaper is not None and said:
            leaper.loss(loss)


def bits(value: Any) -> Iterator[bytes]:
    """Every bit of a state."""
    if isinstance(value, Tensor):
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key in value:
            yield from bits(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from bits(each)
    else:
        yield repr(value).encode()


def state(model, optimizer) -> list[bytes]:
    saved = Saved.of(model, [optimizer])
    return list(bits([saved.values, saved.states]))


def nowhere(scale: float) -> list[Arm]:
    """A leap no gate may keep."""
    return [Arm("linear", arms_of(["linear"], [scale], {})[0].predictor, scale)]


# ------------------------------------------------------------------------------------------- checkpoint and resume

CASES = {
    "outer": (["outer"], {}),
    "shift": (["shift"], {}),
    "merged-line": (["merged-line"], {}),
    "spectral": (["spectral"], {}),
    "bandit": (["outer", "linear"], {}),
    "heard": (["outer"], {"validate": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_resumed_within_a_window_ends_in_the_same_bits(case):
    names, more = CASES[case]

    def fresh() -> tuple[nn.Module, Any, Leaper]:
        model = network(nn.BatchNorm1d(8), nn.ReLU())
        optimizer = OPTIMIZERS["adam"](model.parameters())
        given = {"validate": Held(), "every": 5, "window": 20, "budget": 1.0, "step_flops": 1e6, "compute": 1e9} | more
        return model, optimizer, Leaper(model, optimizer, arms_of(names, [1.0], {}), **given)

    model, optimizer, leaper = fresh()
    file = io.BytesIO()
    with leaper:
        train(model, optimizer, leaper, range(37))
        assert leaper._window is not None, "the checkpoint is to be within a window"
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "leaper": leaper.state_dict()}
        torch.save(states, file)
        train(model, optimizer, leaper, range(37, 60))
    assert any(entry.step < 37 for entry in leaper.entries)
    assert any(entry.step > 37 for entry in leaper.entries)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other, resumed = fresh()
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["leaper"])
    with resumed:
        train(again, other, resumed, range(37, 60))
    assert state(again, other) == state(model, optimizer)
    assert [entry.row() for entry in resumed.entries] == [entry.row() for entry in leaper.entries]
    assert list(bits(resumed.state_dict())) == list(bits(leaper.state_dict()))


# ----------------------------------------------------------------------------------------- rejected: nothing happened

MODELS = {
    "dropout": lambda: network(nn.ReLU(), nn.Dropout(0.3)),
    "batchnorm": lambda: network(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)),
    "tied": lambda: (torch.manual_seed(0), Tied())[1],
    "bfloat16": lambda: network(nn.ReLU(), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_every_leap_is_rejected_training_is_as_without(which, name):
    alone = MODELS[which]()
    optimizer = OPTIMIZERS[name](alone.parameters())
    train(alone, optimizer, None, range(40))
    drawn = torch.rand(3)

    model = MODELS[which]()
    other = OPTIMIZERS[name](model.parameters())
    dtype = next(model.parameters()).dtype

    def held(network: nn.Module) -> float:
        torch.rand(7), random.random(), np.random.rand()  # draws that training must not notice
        generator = torch.Generator().manual_seed(9)
        x, y = _batch(generator, dtype)
        return float(nn.functional.cross_entropy(network(x).float(), y))

    python, numpy = random.getstate(), np.random.get_state()[1].tolist()
    with Leaper(model, other, nowhere(1e4), validate=held, gate="strict", every=5, budget=1e9, compute=1e9) as leaper:
        train(model, other, leaper, range(40))
    assert len(leaper.entries) >= 5
    assert {entry.verdict for entry in leaper.entries} == {"rejected"}
    assert state(model, other) == state(alone, optimizer)
    assert torch.equal(drawn, torch.rand(3))
    assert (python, numpy) == (random.getstate(), np.random.get_state()[1].tolist())


# --------------------------------------------------------------------------------------------------- going back


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_window_that_is_lost_goes_back_bit_for_bit(which, name):
    model = MODELS[which]()
    optimizer = OPTIMIZERS[name](model.parameters())
    options = {"every": 5, "window": 10, "start": 10, "patience": 1, "compute": 1e9, "margin": 1.0}
    with Leaper(model, optimizer, nowhere(50.0), **options) as leaper:
        for step in range(20):
            train(model, optimizer, leaper, range(step, step + 1))
            if leaper.entries and leaper.entries[0].verdict != "pending":
                break
    assert leaper.entries[0].step == 10
    assert leaper.entries[0].verdict == "rolled back"
    twin = MODELS[which]()
    beside = OPTIMIZERS[name](twin.parameters())
    train(twin, beside, None, range(10))
    assert state(model, optimizer) == state(twin, beside)


FAILURES = {
    "raise": "RuntimeError: out of coffee",
    "nan": "NaN",
    "weights": r"changed '0\.weight'",
    "statistics": r"changed '1\.running_mean'",
}


@pytest.mark.parametrize(("gate", "look"), [("strict", False), ("delayed", False), ("delayed", True)])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_validation_leaves_the_weights_before_the_leap(gate, look, failure):
    calls: list[list[bytes]] = []
    model = network(nn.BatchNorm1d(8), nn.ReLU())
    optimizer = OPTIMIZERS["adam"](model.parameters())

    def held(network: nn.Module) -> float:
        calls.append([])
        if len(calls) == 2:
            if failure == "raise":
                raise RuntimeError("out of coffee")
            if failure == "weights":
                network[0].weight.data.mul_(2)  # pyright: ignore[reportIndexIssue]
            if failure == "statistics":
                network.train()(torch.ones(4, 6))
            return float("nan") if failure == "nan" else 1.0
        return 1.0

    options = {"every": 5, "window": 10, "start": 10, "until": 10, "budget": 1e9, "compute": 1e9}
    twin = network(nn.BatchNorm1d(8), nn.ReLU())
    beside = OPTIMIZERS["adam"](twin.parameters())
    train(twin, beside, None, range(10))
    expected = state(twin, beside)
    leaper = Leaper(model, optimizer, nowhere(1.0), validate=held, gate=gate, look=look, **options)
    with (
        pytest.raises(NonFiniteError if failure == "nan" else UsageError, match=FAILURES[failure]),
        leaper,
    ):
        train(model, optimizer, leaper, range(30))
    assert state(model, optimizer) == expected
    assert model.training
    verdict = "rolled back" if gate == "delayed" and not look else "rejected"
    assert [entry.verdict for entry in leaper.entries] == [verdict]


def test_a_model_that_changes_shape_cannot_go_back_and_is_left_alone():
    model = network(nn.ReLU())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    leaper = Leaper(model, optimizer, nowhere(1.0), every=5, window=10, start=10, compute=1e9)
    leaper.__enter__()
    train(model, optimizer, leaper, range(12))
    assert leaper.entries
    model[0].weight.data = torch.ones(4, 6)
    before = [value.clone() for value in model.parameters()]
    with pytest.raises(UsageError, match="changed its shape"):
        leaper.retreat("enough")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(UsageError, match=r"'0\.weight' has changed its shape from \[8, 6\] to \[4, 6\]"):
        leaper._point()


# --------------------------------------------------------------------------------------------------- heard losses


def test_heard_losses_judge_a_window():
    better = heard([1.0, 1.2, 0.8, 1.0], [0.5, 0.7, 0.6], 1.0)
    assert (better.kept, better.before) == (True, 1.0)
    assert better.after == pytest.approx(0.6)
    worse = [1.2, 1.3, 1.1, 1.4]  # mean 1.25: 0.25 more than before, error √(0.0267/4 + 0.0167/4) = 0.104
    assert not heard([1.0, 1.2, 0.8, 1.0], worse, 2.3).kept
    assert heard([1.0, 1.2, 0.8, 1.0], worse, 2.5).kept
    assert not heard([1.0, 1.2], [float("inf"), 1.0], 1.0).kept
    assert not heard([1.0], [0.1, 0.1], 1.0).kept, "one loss says nothing of its error"


def test_without_validation_training_losses_decide_and_immediate_gates_are_refused():
    model = network(nn.ReLU())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match="held-out data"):
        Leaper(model, optimizer, "outer", gate="strict")
    with Leaper(model, optimizer, nowhere(100.0), every=5, window=10, compute=1e9, margin=1.0) as leaper:
        train(model, optimizer, leaper, range(60))
    assert {entry.verdict for entry in leaper.entries} == {"rolled back"}
    assert len({entry.verdict_step for entry in leaper.entries}) == 2, "patience is two windows"
    assert all(entry.loss_before is not None for entry in leaper.entries)


def test_a_loop_that_says_no_loss_is_told_so():
    model = network(nn.ReLU())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    leaper = Leaper(model, optimizer, every=5, window=20)
    with pytest.raises(UsageError, match="no training loss was heard"), leaper:
        train(model, optimizer, leaper, range(60), said=False)


def test_a_loss_that_is_not_finite_goes_back_at_once():
    model = network(nn.ReLU())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with Leaper(model, optimizer, nowhere(1.0), every=5, window=30, start=20, until=20, compute=1e9) as leaper:
        train(model, optimizer, leaper, range(20))
        before = [value.clone() for value in leaper._window.saved.values] if leaper._window else []
        train(model, optimizer, leaper, range(20, 23))
        leaper.loss(float("nan"))
        assert before
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert leaper.entries[0].verdict == "rolled back"
