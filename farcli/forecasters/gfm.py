"""Gradient Flow Matching: the motion of all weights as one flow, dw/dt = v(w, t).

Shape suffixes: B runs, C snapshots of the context, H horizons, D coordinates; N = C + 1 knots of a path.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from farcli.forecasters.base import Coupling, Descent, Prefix, Problem, Trained, TrainedForecaster, require_fitted
from farcli.forecasters.scaling import forecast_channels

_KEPT = 1 << 20
"""Numbers of a mini-batch's forecasts up to which autograd keeps what led to them, some 18 times as many; of more it
keeps nothing, and the step to each target is taken again for the gradient, to the same bits."""


@final
class Velocity(nn.Module):
    """v(w, t): Linear(D + 1 → hidden), ELU, …, Linear(hidden → D)."""

    def __init__(self, size: int, hidden: int, layers: int) -> None:
        super().__init__()
        widths = [size + 1] + [hidden] * layers
        body = [module for i in range(layers) for module in (nn.Linear(widths[i], widths[i + 1]), nn.ELU())]
        self.body = nn.Sequential(*body, nn.Linear(hidden, size))

    def forward(self, weights_BD: Tensor, time_B: Tensor) -> Tensor:
        """Velocities [B, D] at the given points and times."""
        return self.body(torch.cat([weights_BD, time_B[:, None]], dim=-1))


@final
class Gfm(TrainedForecaster):
    """ŵ_m = w_n + ∫ v(w, t) dt from n/m to 1, t = i/m, with v fitted on other runs.

    L = β·Z·‖v(w(t), t) − prefix target‖² + γ·(1 − Z)·‖v(w(t), t) − tail target‖² + ζ·‖ŵ_m − w_m‖², averaged over
    runs and coordinates; t ~ U(0, 1), Z = 1(t < n/m); w(t) is linear between the snapshots w_0 … w_n, and a straight
    line to w_m beyond. ŵ_m in the last term is one midpoint step from w_n:
    w_mid = w_n + (Δt/2)·v(w_n, n/m), ŵ_m = w_n + Δt·v(w_mid, n/m + Δt/2), Δt = 1 − n/m.
    A context of one snapshot is the paper's n = 0 (eq. 6): no prefix term is left.

    The paper contradicts itself in two places; both readings run:
    units=as-printed: targets w(t + 1/m) − w(t) and w_m − w_n, which eq. 9 adds up though one is per snapshot, the
    other per remaining time, and the integral is per t; corrected: the slope of w(t) in both parts.
    path=w_0: beyond the prefix w(t) = (1 − t)·w_0 + t·w_m as Algorithm 1, line 2, has it (it jumps at n/m);
    w_n: from w_n to w_m, as the text has it.

    Source: arXiv 2505.20221, eq. 6 and 9, Algorithm 1, Table 5; protocol D2 of our reproduction (one midpoint
    step at inference where the paper says Euler, losses averaged over coordinates).
    Differs: snapshots may be spaced unequally (1/m is then the interval at hand); of several target steps the last
    is m, every one is reached by a step of its own, and the ζ term is their mean. With n = 0 the ζ term stays,
    unless ζ = 0. channels=shared is ours, for D that no v on whole vectors can hold (it has 2·64·D weights): blocks of
    one coordinate, each forecast by the same v from its own w_n and t.
    """

    name = "gfm"
    reference = "Gradient Flow Matching (arXiv 2505.20221), as printed or with its units and path corrected"
    vectorised_batch = 256
    draws = True

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(Descent):
        """Options."""

        beta: float = field(default=1.0, metadata={"help": "β: weight of the flow along the prefix"})
        gamma: float = field(default=1.0, metadata={"help": "γ: weight of the flow from the prefix to the target"})
        zeta: float = field(default=100.0, metadata={"help": "ζ: weight of the forecast's own error"})
        channels: Literal["joint", "shared"] = field(
            default="joint",
            metadata={
                "help": "joint: v moves whole vectors; shared: one v for every coordinate alone, which takes any D"
            },
        )
        units: Literal["as-printed", "corrected"] = field(
            default="as-printed", metadata={"help": "corrected: all velocities per unit of t"}
        )
        path: Literal["w_0", "w_n"] = field(
            default="w_0",
            metadata={"help": "where the line to w_m starts: w_0 as in Algorithm 1, w_n as in the text"},
        )
        integrator: Literal["midpoint", "euler", "rk4"] = field(
            default="midpoint", metadata={"help": "how the flow is followed; the paper says euler"}
        )
        steps: int = field(default=1, metadata={"help": "integration steps to each target"})
        tau: float = field(default=1e-6, metadata={"help": "a run stops where its next step is shorter than this"})
        hidden: int = field(default=64, metadata={"help": "width of v"})
        layers: int = field(default=3, metadata={"help": "hidden layers of v"})
        lr: float = field(default=1e-4, metadata={"help": "Adam's learning rate"})
        batch: int = field(default=16, metadata={"help": "runs a mini-batch, or (run, coordinate) pairs"})

        def __post_init__(self) -> None:
            Descent.__post_init__(self)
            for name in ("beta", "gamma", "zeta", "tau"):
                if not 0 <= getattr(self, name) < float("inf"):
                    raise ValueError(f"{name} = {getattr(self, name)}, expected a finite number of 0 or more.")
            if not self.beta + self.gamma + self.zeta:
                raise ValueError("beta, gamma and zeta are all 0: nothing is left to learn from.")
            for name in ("steps", "hidden", "layers"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} = {getattr(self, name)}, expected 1 or more.")

    def __init__(self, config: Config, trained: Trained[Velocity] | None = None) -> None:
        self._config, self._trained = config, trained

    @property
    def config(self) -> Config:
        """The options."""
        return self._config

    @property
    def trained(self) -> Trained[Velocity] | None:
        """V."""
        return self._trained

    @property
    def coupling(self) -> Coupling:
        """Joint: v sees whole vectors; coordinate-wise with channels=shared."""
        return Coupling.JOINT if self._config.channels == "joint" else Coupling.COORDINATEWISE

    @property
    def transferable(self) -> bool:
        """Whether v is shared by all coordinates."""
        return self._config.channels == "shared"

    @property
    def min_context(self) -> int:
        """One snapshot: n = 0."""
        return 1

    def network(self, problem: Problem) -> Velocity:
        """A fresh v."""
        return Velocity(
            problem.coordinates if self._config.channels == "joint" else 1, self._config.hidden, self._config.layers
        )

    def vectorised(self, problem: Problem) -> bool:
        """Also where autograd keeps what led to a mini-batch's forecasts: `vmap` recomputes nothing."""
        size = problem.coordinates if self._config.channels == "joint" else 1
        kept = self._config.batch * size * len(problem.steps_H) <= _KEPT
        return kept and super().vectorised(problem)

    def loss(self, prefix: Prefix, steps_H: Sequence[int], truth_BHD: Tensor, random_B: Tensor | None) -> Tensor:
        """L_CFM + ζ·L_consistency at one random time for each run."""
        config, velocity = self._config, require_fitted(self.name, self._trained).network
        weights_BCD, truth_BHD = prefix.weights_BCD.float(), truth_BHD.float()
        knots_BND = torch.cat([weights_BCD, truth_BHD[:, -1:]], dim=1)
        times_N = _times((*prefix.steps_C, steps_H[-1]), prefix.steps_C[0], steps_H[-1]).to(knots_BND.device)
        assert random_B is not None
        time_B = random_B.to(knots_BND.device)
        point_BD, target_BD, early_B = conditional_flow(
            knots_BND, times_N, time_B, corrected=config.units == "corrected", from_first=config.path == "w_0"
        )
        weight_B = torch.where(early_B, config.beta, config.gamma)
        error_BD = velocity(point_BD, time_B) - target_BD
        loss = (weight_B * error_BD.square().mean(dim=-1)).mean()
        if config.zeta:
            forecast_BHD = self._midpoint(prefix, steps_H)
            loss = loss + config.zeta * (forecast_BHD - truth_BHD).square().mean()
        return loss

    def _midpoint(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """One midpoint step from w_n to each target: [B, H, D]."""
        last_BD = prefix.weights_BCD[:, -1].float()
        again = last_BD.numel() * len(steps_H) > _KEPT

        def moved(start: float, stop: float) -> Tensor:
            return self._follow(last_BD, start, stop, steps=1, integrator="midpoint")

        moved_HBD = [
            checkpoint(moved, *span, use_reentrant=False, preserve_rng_state=False) if again else moved(*span)
            for span in self._spans(prefix, steps_H)
        ]
        return last_BD[:, None] + torch.stack(moved_HBD, dim=1)

    def forecast_alone(self, prefix: Prefix, steps_H: Sequence[int]) -> Tensor:
        """Follow the flow from w_n to each target: [B, H, D]; coordinates that were not fitted keep w_n."""
        self.rows(prefix, steps_H)
        config, spans = self._config, self._spans(prefix, steps_H)
        size = require_fitted(self.name, self._trained).problem.coordinates

        def moved(weights_NCK: Tensor) -> Tensor:
            last_NK = weights_NCK[:, -1].float()
            follow = [self._follow(last_NK, *span, steps=config.steps, integrator=config.integrator) for span in spans]
            return torch.stack(follow, dim=1)

        return forecast_channels(prefix, list(range(len(spans))), moved, size if config.channels == "joint" else None)

    def _spans(self, prefix: Prefix, steps_H: Sequence[int]) -> list[tuple[float, float]]:
        """From the time n/m of w_n to each target's, on the scale where the last fitted target is at 1."""
        problem = require_fitted(self.name, self._trained).problem
        first = prefix.steps_C[0]
        last = first + problem.steps_H[-1] - problem.steps_C[0]
        start, *stops = _times((prefix.steps_C[-1], *steps_H), first, last).tolist()
        return [(start, stop) for stop in stops]

    def _follow(self, start_BD: Tensor, start: float, stop: float, *, steps: int, integrator: str) -> Tensor:
        """Displacement [B, D] from time `start` to `stop` along the flow through `start_BD`."""
        velocity, step = require_fitted(self.name, self._trained).network, (stop - start) / steps

        def at(moved_BD: Tensor, time: float) -> Tensor:
            return velocity(start_BD + moved_BD, start_BD.new_full((len(start_BD),), time))

        moved_BD = torch.zeros_like(start_BD)
        going_B1 = torch.ones_like(start_BD[:, :1], dtype=torch.bool)
        for k in range(steps):
            update_BD = step * slope(at, moved_BD, start + k * step, step, integrator)
            going_B1 = going_B1 & (update_BD.detach().norm(dim=-1, keepdim=True) >= self._config.tau)
            moved_BD = moved_BD + torch.where(going_B1, update_BD, 0.0)
        return moved_BD


def _times(steps: Sequence[int], first: int, last: int) -> Tensor:
    """T of optimiser steps: 0 at `first`, 1 at `last`."""
    return torch.tensor([(step - first) / (last - first) for step in steps])


def conditional_flow(
    knots_BND: Tensor, times_N: Tensor, time_B: Tensor, *, corrected: bool, from_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Where v is looked at and what it should be there.

    Args:
        knots_BND: w_0, …, w_n, w_m.
        times_N: their times, from 0 to 1.
        time_B: t of each run.
        corrected: targets are slopes per unit of t; else as eq. 9 prints them.
        from_first: beyond the prefix the path comes from w_0, not from w_n.

    Returns:
        w(t) and its target, both [B, D], and whether t is in the prefix, [B].
    """
    last = len(times_N) - 2  # index of w_n, and of the tail's piece
    piece_B = (torch.searchsorted(times_N, time_B, right=True) - 1).clamp(0, last)
    early_B = piece_B < last
    rows_B = torch.arange(len(time_B), device=time_B.device)
    w0_BD, wn_BD, wm_BD = knots_BND[:, 0], knots_BND[:, last], knots_BND[:, -1]
    gap_B = times_N[piece_B + 1] - times_N[piece_B]

    def linear(at_B: Tensor) -> Tensor:
        """The path through all knots."""
        own_B = (torch.searchsorted(times_N, at_B, right=True) - 1).clamp(0, last)
        share_B = (at_B - times_N[own_B]) / (times_N[own_B + 1] - times_N[own_B])
        return torch.lerp(knots_BND[rows_B, own_B], knots_BND[rows_B, own_B + 1], share_B[:, None])

    point_BD = linear(time_B)
    if from_first:
        point_BD = torch.where(early_B[:, None], point_BD, torch.lerp(w0_BD, wm_BD, time_B[:, None]))
    if corrected:
        prefix_BD = (knots_BND[rows_B, piece_B + 1] - knots_BND[rows_B, piece_B]) / gap_B[:, None]
        tail_BD = (wm_BD - (w0_BD if from_first else wn_BD)) / (1.0 if from_first else 1 - times_N[last])
    else:
        prefix_BD = linear(time_B + gap_B) - linear(time_B)
        tail_BD = wm_BD - wn_BD
    return point_BD, torch.where(early_B[:, None], prefix_BD, tail_BD), early_B


def slope(at: Callable[[Tensor, float], Tensor], moved_BD: Tensor, time: float, step: float, integrator: str) -> Tensor:
    """The mean velocity over one step, to the integrator's order.

    Args:
        at: velocity at a displacement and a time.
        moved_BD: displacement at the beginning of the step.
        time: time at the beginning of the step.
        step: its length.
        integrator: "euler", "midpoint" or "rk4": of order 1, 2 or 4.
    """
    first_BD = at(moved_BD, time)
    if integrator == "euler":
        return first_BD
    second_BD = at(moved_BD + step / 2 * first_BD, time + step / 2)
    if integrator == "midpoint":
        return second_BD
    third_BD = at(moved_BD + step / 2 * second_BD, time + step / 2)
    fourth_BD = at(moved_BD + step * third_BD, time + step)
    return (first_BD + 2 * second_BD + 2 * third_BD + fourth_BD) / 6
