"""GFM's losses against sums done by hand, its integrators against a flow with a known solution."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from farcli.forecasters.base import Prefix, Problem
from farcli.forecasters.gfm import Gfm, Velocity, conditional_flow, slope
from farcli.layout import layout_of

LAYOUT = layout_of([("w", (1,), "float32", "parameter")])
# w_0, w_1, w_2 = w_n at steps 0, 1, 2; w_m at step 10, so t = 0, .1, .2 and 1.
KNOTS_1N1 = torch.tensor([0.0, 1.0, 3.0, 11.0])[None, :, None]
TIMES_N = torch.tensor([0.0, 0.1, 0.2, 1.0])
PRINTED, CORRECTED = {"corrected": False}, {"corrected": True}


@pytest.mark.parametrize(
    ("time", "units", "from_first", "point", "target"),
    [
        (0.05, PRINTED, False, 0.5, 1.5),  # half of w_1 − w_0 = 1, half of w_2 − w_1 = 2
        (0.05, CORRECTED, False, 0.5, 10.0),  # 1 in 0.1
        (0.15, PRINTED, False, 2.0, 1.5),  # to w(0.25) = 3 + 0.05·(11 − 3)/0.8
        (0.15, CORRECTED, False, 2.0, 20.0),
        (0.6, PRINTED, False, 7.0, 8.0),  # w_m − w_n
        (0.6, CORRECTED, False, 7.0, 10.0),  # 8 in 0.8
        (0.6, PRINTED, True, 6.6, 8.0),  # on the line from w_0
        (0.6, CORRECTED, True, 6.6, 11.0),
        (0.15, PRINTED, True, 2.0, 1.5),  # the prefix is the same for both paths
    ],
)
def test_where_and_what(time: float, units: dict[str, bool], from_first: bool, point: float, target: float) -> None:
    found = conditional_flow(KNOTS_1N1, TIMES_N, torch.tensor([time]), from_first=from_first, **units)
    assert float(found[0]) == pytest.approx(point, rel=1e-5)
    assert float(found[1]) == pytest.approx(target, rel=1e-5)
    assert bool(found[2]) == (time < 0.2)


def constant(value: float, **options: Any) -> tuple[Gfm, Problem]:
    """v = value everywhere."""
    problem = Problem(layout=LAYOUT, coordinates=1, runs=2, steps_C=(0, 1, 2), steps_H=(10,), memory=10**9)
    network = Velocity(1, 4, 2)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(list(network.parameters())[-1], value)
    return Gfm(Gfm.Config(**options)).with_networks(problem, [network]), problem


def prefix_of(weights_BC: list[list[float]], steps_C: tuple[int, ...]) -> Prefix:
    weights_BCD = torch.tensor(weights_BC)[..., None]
    return Prefix(
        weights_BCD=weights_BCD, steps_C=steps_C, layout=LAYOUT, start=0, runs_B=tuple(range(len(weights_BC)))
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("corrected", [False, True])
def test_loss_by_hand(seed: int, corrected: bool) -> None:
    beta, gamma, zeta, v = 0.7, 0.3, 2.0, 4.0
    forecaster, _ = constant(
        v, beta=beta, gamma=gamma, zeta=zeta, units="corrected" if corrected else "as-printed", path="w_n"
    )
    prefix, ends = prefix_of([[0.0, 1.0, 3.0], [1.0, 1.0, 2.0]], (0, 1, 2)), [11.0, 6.0]
    random_B = torch.rand(2, generator=torch.Generator().manual_seed(seed))
    loss, times = forecaster.loss(prefix, (10,), torch.tensor(ends)[:, None, None], random_B), random_B.tolist()
    expected = 0.0
    for t, (w0, w1, w2), wm in zip(times, [(0.0, 1.0, 3.0), (1.0, 1.0, 2.0)], ends, strict=True):
        if t < 0.1:
            share = t / 0.1
            target = (w1 - w0) / 0.1 if corrected else (1 - share) * (w1 - w0) + share * (w2 - w1)
        elif t < 0.2:
            share = (t - 0.1) / 0.1
            after = (wm - w2) / 8
            target = (w2 - w1) / 0.1 if corrected else (1 - share) * (w2 - w1) + share * after
        else:
            target = (wm - w2) / 0.8 if corrected else wm - w2
        flow = (beta if t < 0.2 else gamma) * (v - target) ** 2
        expected += (flow + zeta * (w2 + 0.8 * v - wm) ** 2) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_times_before_the_prefix_ends_occur() -> None:
    """The six seeds above draw from both parts, or the test would miss one."""
    times = [torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]
    early = [t < 0.2 for pair in times for t in pair]
    assert any(early)
    assert not all(early)


def test_one_snapshot() -> None:
    """n = 0: γ·(v − (w_m − w_0))² + ζ·(w_0 + v − w_m)², which are one and the same error."""
    forecaster, problem = constant(4.0, gamma=0.5, zeta=2.0)
    problem = replace(problem, steps_C=(0,))
    assert forecaster.trained is not None
    forecaster = forecaster.with_networks(problem, forecaster.trained.networks)
    prefix, truth = prefix_of([[3.0]], (0,)), torch.tensor([[[9.0]]])
    assert float(forecaster.loss(prefix, (10,), truth, torch.rand(1)).detach()) == pytest.approx(2.5 * (4 - 6) ** 2)
    assert float(forecaster.forecast(prefix, (10,))) == pytest.approx(7.0)


def test_several_targets_are_reached_each_by_its_own_step() -> None:
    forecaster, problem = constant(5.0)
    assert forecaster.trained is not None
    problem = replace(problem, steps_H=(4, 10))
    forecaster = forecaster.with_networks(problem, forecaster.trained.networks)
    found = forecaster.forecast(prefix_of([[0.0, 1.0, 3.0]], (0, 1, 2)), (4, 10))
    assert found.flatten().tolist() == pytest.approx([3 + 5 * 0.2, 3 + 5 * 0.8])
    later = forecaster.forecast(prefix_of([[0.0, 1.0, 3.0]], (100, 101, 102)), (104, 110))
    assert torch.equal(later, found)


@pytest.mark.parametrize(("integrator", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order_of_convergence(integrator: str, order: int) -> None:
    """dw/dt = w·cos t has the solution w(0)·e^(sin t)."""
    start_BD = torch.tensor([[1.0, -2.0]], dtype=torch.float64)

    def velocity(moved_BD: Tensor, time: float) -> Tensor:
        return (start_BD + moved_BD) * math.cos(time)

    errors = []
    for steps in (10, 20, 40):
        moved_BD, step = torch.zeros_like(start_BD), 1 / steps
        for k in range(steps):
            moved_BD = moved_BD + step * slope(velocity, moved_BD, k * step, step, integrator)
        errors.append(float((start_BD + moved_BD - start_BD * math.exp(math.sin(1))).abs().max()))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_a_run_at_rest_stops_alone() -> None:
    """v = (ELU's identity part) 3e-7 at w = 0 and 1 at w = 1: the first run's step is below τ, the second's is not."""
    forecaster, problem = constant(3e-7, tau=1e-6, layers=2)
    assert forecaster.trained is not None
    first, second, last = [layer for layer in forecaster.trained.network.body if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        first.weight[0, 0] = second.weight[0, 0] = last.weight[0, 0] = 1.0
    prefix = prefix_of([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], (0, 1, 2))
    rest, moving = forecaster.forecast(prefix, (10,)).flatten().tolist()
    assert rest == 0.0
    assert moving == pytest.approx(1 + 0.8 * (1 + 0.4), rel=1e-5)  # one midpoint step of dw/dt = w
    free = Gfm(Gfm.Config(tau=0.0)).with_networks(problem, forecaster.trained.networks)
    assert float(free.forecast(prefix, (10,))[0]) == pytest.approx(0.8 * 3e-7, rel=0.5)


def test_steps_taken_again_for_the_gradient_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large mini-batches autograd keeps less; the loss and its gradients must not show it."""

    def found(kept: int) -> tuple[list[Tensor], int]:
        monkeypatch.setattr("farcli.forecasters.gfm._KEPT", kept)
        generator, held = torch.Generator().manual_seed(0), 0
        weights_BTD = torch.randn(3, 6, 50, generator=generator)
        layout = layout_of([("w", (50,), "float32", "parameter")])
        problem = Problem(layout=layout, coordinates=50, runs=3, steps_C=(0, 1), steps_H=(5, 6, 7, 10), memory=10**9)
        network = Velocity(50, 8, 2)
        for parameter in network.parameters():
            torch.nn.init.uniform_(parameter, -1, 1, generator=generator)
        forecaster = Gfm(Gfm.Config()).with_networks(problem, [network])
        prefix = Prefix(weights_BCD=weights_BTD[:, :2], steps_C=(0, 1), layout=layout, start=0, runs_B=(0, 1, 2))

        def pack(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forecaster.loss(prefix, problem.steps_H, weights_BTD[:, 2:], torch.rand(3, generator=generator))
        loss.backward()
        return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)], held

    (plain, much), (again, little) = found(1 << 20), found(0)
    assert len(plain) == 7
    assert all(a.equal(b) for a, b in zip(plain, again, strict=True))
    assert little < 0.5 * much
