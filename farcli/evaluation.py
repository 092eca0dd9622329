"""Weighing candidates against a recorded truth: one pass for the weights, one network for the losses.

Shape suffixes: B runs, H horizons, D coordinates of a block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from farcli import weights
from farcli.cooling import FallingRate, Results
from farcli.errors import NonFiniteError, StoreError, UsageError
from farcli.forecasters.base import Coupling
from farcli.forecasting import Method, TrainingData, forecast_block, forecast_vectors, interval_block
from farcli.metrics import DisplacementSums, LossCurve
from farcli.policies import Buffers, EvalBuffers
from farcli.store import Trajectory
from farcli.stream import Block, Source, Stream, require_finite
from farcli.training import Network, workload_of
from farcli.workloads.base import Batch

_WORKING_ROWS = 6
"""Rows per run and horizon that one comparison of a forecast with the truth holds in memory."""

Report = Callable[[float, float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every candidate of one evaluation is held against.

    Attributes:
        source: the recorded truth and its runs under evaluation.
        prefix: steps of the longest prefix among the candidates; its last is where all forecasts start.
        steps_H: steps that are forecast.
        policy: what a forecast does with BatchNorm statistics.
        buffers: what becomes of them when a loss is measured.
        memory: bytes that the data may take.
        device: where to compute.
        report: called with (done, total, text).
    """

    source: Source
    prefix: tuple[int, ...]
    steps_H: tuple[int, ...]
    policy: Buffers
    buffers: EvalBuffers
    memory: int
    device: torch.device
    report: Report

    @property
    def origin(self) -> int:
        """Step of the last observed snapshot."""
        return self.prefix[-1]

    @property
    def truth(self) -> Trajectory:
        """The recorded runs."""
        return self.source.trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One forecast to weigh: a method that forecasts here and now, or a stored forecast.

    Attributes:
        label: what rows call it.
        role: "forecast" for what the user named, "yardstick" for what stands beside it.
        method: how it forecasts; None for a stored one.
        stored: the stored forecast; None for a method.
        training: what it was fitted on.
    """

    label: str
    role: Literal["forecast", "yardstick"]
    method: Method | None
    stored: Trajectory | None
    training: tuple[TrainingData, ...] = ()

    @property
    def coupling(self) -> Coupling:
        """How its weights come: blocks of coordinates, or whole vectors."""
        return Coupling.COORDINATEWISE if self.method is None else self.method.forecaster.coupling

    def block(self, block: Block, setting: Setting) -> Tensor:
        """Its weights for one block, shape [B, H, D]."""
        if self.method is not None:
            return forecast_block(self.method, block.prefix, setting.steps_H, setting.policy)
        assert self.stored is not None
        values = self.stored.read(block.runs, setting.steps_H, block.prefix.start, block.stop)
        return torch.from_numpy(values).to(block.truth_BHD)

    def half_width(self, block: Block, setting: Setting) -> Tensor | None:
        """Half-widths of its 90 % intervals, [B, H, D]; None where it has none, or where it is a stored forecast."""
        return None if self.method is None else interval_block(self.method, block.prefix, setting.steps_H)

    def vectors(self, setting: Setting) -> Iterator[tuple[int, int, np.ndarray]]:
        """Whole vectors, buffers included: (run, step, weights of shape [D])."""
        if self.method is not None:
            yield from forecast_vectors(
                self.method,
                setting.source,
                setting.steps_H,
                buffers=setting.policy,
                memory=setting.memory,
                device=setting.device,
            )
            return
        assert self.stored is not None
        for run in setting.source.runs:
            for step in setting.steps_H:
                yield run, step, self.stored.read([run], [step])[0, 0]


def compare(candidates: Sequence[Candidate], setting: Setting) -> list[DisplacementSums]:
    """The weight-space sums of every candidate, in one pass over the truth for each coupling.

    Raises:
        NonFiniteError: the recorded weights hold NaN or Inf.
    """
    layout, path = setting.truth.layout, setting.truth.path
    row = {run: index for index, run in enumerate(setting.source.runs)}
    shape = (len(setting.source.runs), len(setting.steps_H), len(layout.floats))
    sums = [DisplacementSums(shape) for _ in candidates]
    for coupling in Coupling:
        members = [index for index, candidate in enumerate(candidates) if candidate.coupling is coupling]
        if not members:
            continue
        stream = Stream(
            [setting.source],
            coupling=coupling,
            steps_C=setting.prefix,
            steps_H=setting.steps_H,
            coordinates=layout.parameters,
            device=setting.device,
            memory=setting.memory,
            share=0.5,
            extra_rows=_WORKING_ROWS * len(setting.steps_H),
        )
        for block in stream:
            require_finite(block.prefix.weights_BCD, block, path, setting.prefix)
            require_finite(block.truth_BHD, block, path, setting.steps_H)
            for index in members:
                sums[index].add(
                    [row[run] for run in block.runs],
                    block.prefix.segments,
                    block.prefix.weights_BCD[:, -1],
                    candidates[index].block(block, setting),
                    block.truth_BHD,
                    candidates[index].half_width(block, setting),
                )
            setting.report(block.stop, layout.parameters, "weights")
    return sums


def part_way(last_D: np.ndarray, forecast_D: np.ndarray, share: float) -> np.ndarray:
    """The weights at a share of the way from w_n to a forecast, at either end exactly: [D]."""
    if share in (0, 1):  # where the forecast is not finite, w_n is
        return forecast_D if share else last_D
    return last_D + share * (forecast_D - last_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How forecasts are verified before they are measured.

    Attributes:
        loss: (vector [D], integers [I], run) → loss on data that no measure reports on.
        lengths: shares of the way from w_n to a forecast that are tried; the one with the lowest loss counts.
    """

    loss: Callable[[np.ndarray, np.ndarray, int], float]
    lengths: tuple[float, ...]

    def passed(
        self, last_D: np.ndarray, forecast_D: np.ndarray, integers: np.ndarray, run: int, kept: float
    ) -> tuple[float, np.ndarray]:
        """The share of the way that lowers the loss of w_n, `kept`, most, and the weights there; 0 and w_n if none."""
        best, length, chosen_D = kept, 0.0, last_D
        for share in self.lengths:
            there_D = part_way(last_D, forecast_D, share)
            lost = self.loss(there_D, integers, run)
            if lost < best:  # NaN is no gain
                best, length, chosen_D = lost, share, there_D
        return length, chosen_D


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Held-out measures of a network at given weights.

    Attributes:
        of: (vector [D], integers [I], run) → {"loss": …, "accuracy": …}.
        chance: the same measures for a guess that ignores the input; None where nobody knows it.
        cost: of checking one forecast, in training steps: verifying it, where that is done, else one measurement;
            None where nobody knows it.
        network: what is measured; None where it is out of sight.
        verification: by which forecasts are shortened or refused before they are measured; None where none are.
    """

    of: Callable[[np.ndarray, np.ndarray, int], dict[str, float]]
    chance: dict[str, float] | None
    cost: float | None
    network: Network | None = None
    verification: Verification | None = None


def measure_of_workload(
    truth: Trajectory, buffers: EvalBuffers, verify: int = 0, lengths: Sequence[float] = (1.0,)
) -> Measure | None:
    """The held-out measure of the workload a store was recorded from; None where it names none.

    Args:
        truth: the store.
        buffers: what becomes of BatchNorm statistics.
        verify: batches to verify a forecast on; 0 measures every forecast as it is.
        lengths: shares of the way to it that are verified.

    Raises:
        StoreError: the workload cannot be built again, or is not that of the stored network.
        UsageError: it has no data to verify on.
    """
    try:
        workload = workload_of(truth.header)
        network = Network(workload, truth.layout) if workload is not None else None
    except (UsageError, StoreError) as error:
        raise StoreError(
            f"{truth.path}: its workload cannot be built again: {error}",
            hint="Pass --loss package.module:function to measure the loss yourself.",
        ) from error
    if workload is None or network is None:
        return None
    seeds_R = truth.header.get("seeds")
    if not isinstance(seeds_R, list) or len(seeds_R) != len(truth.runs):
        raise StoreError(f"{truth.path}: its header holds no seed for each of its {len(truth.runs)} runs.")
    seeds = dict(zip(truth.runs, seeds_R, strict=True))
    anew = buffers == "reestimate"

    def of(vector: np.ndarray, integers: np.ndarray, run: int) -> dict[str, float]:
        return network.evaluate(vector, integers, seeds[run], reestimate_buffers=anew)

    @cache
    def batches(run: int) -> Sequence[Batch]:
        return workload.verification(seeds[run], 0, verify)

    def lost(vector: np.ndarray, integers: np.ndarray, run: int) -> float:
        return network.verify(vector, integers, seeds[run], batches(run), reestimate_buffers=anew)

    # A forward pass is a third of a step; a verified forecast takes one at w_n too.
    looks, cost = (1 + len(lengths), len(batches(truth.runs[0])) / 3) if verify else (1, workload.evaluation_cost())
    if anew:
        cost += workload.calibration_cost()
    return Measure(
        of=of,
        chance=workload.chance(),
        cost=looks * cost,
        network=network,
        verification=Verification(loss=lost, lengths=tuple(lengths)) if verify else None,
    )


def measure_of_function(truth: Trajectory, text: str) -> Measure:
    """A measure by a function of the user's: state_dict → loss, or a mapping with "loss".

    Raises:
        UsageError: the function cannot be found.
    """
    module, colon, name = text.partition(":")
    if not colon:
        raise UsageError(f"--loss {text!r}: expected package.module:function.")
    try:
        function: Callable[[dict[str, Tensor]], Any] = getattr(import_module(module), name)
    except ImportError as error:
        raise UsageError(f"--loss {text!r}: cannot import {module!r} ({error}).") from error
    except AttributeError as error:
        raise UsageError(f"--loss {text!r}: module {module!r} has no {name!r}.") from error

    def of(vector: np.ndarray, integers: np.ndarray, run: int) -> dict[str, float]:
        state = weights.unflatten(torch.from_numpy(vector), torch.from_numpy(integers), truth.layout)
        try:
            value = function(state)
            measures = (
                {key: float(v) for key, v in value.items()} if isinstance(value, Mapping) else {"loss": float(value)}
            )
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"--loss {text}: raised {type(error).__name__}: {error}") from error
        if "loss" not in measures:
            raise UsageError(
                f"--loss {text}: returned {', '.join(measures) or 'nothing'}, expected a number or a loss."
            )
        return measures

    return Measure(of=of, chance=None, cost=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Held-out measures of the recorded runs along training, and of every candidate.

    Attributes:
        recorded: of the runs at every snapshot.
        curves: run → the loss curve that equivalent steps are read from.
        forecast: per candidate, at every horizon; of a refused forecast those of w_n.
        lengths: per candidate and (run, step) the share of the way that passed verification; 0 where none did.
        control: of the runs trained on with a rate that falls to 0 at a step: every horizon, and steps around the
            first one; None where nobody asked.
        finished: of runs trained on from a candidate's forecast for as long as the first horizon is ahead, the rate
            falling to 0, by the candidate's place and, of these, at the forecast's horizon; None where nobody asked.
    """

    recorded: Results
    curves: dict[int, LossCurve]
    forecast: list[Results]
    lengths: list[dict[tuple[int, int], float]]
    control: Results | None = None
    finished: dict[int, Results] | None = None


def control_ends(setting: Setting) -> list[int]:
    """Steps at which the rate of the control's trainings is 0: horizons, and ¼ to 4 times the way to the first."""
    ahead = setting.steps_H[0] - setting.origin
    around = {-(-ahead // 4), -(-ahead // 2), ahead, 2 * ahead, 4 * ahead}
    return sorted({setting.origin + steps for steps in around} | set(setting.steps_H))


def held_out(candidates: Sequence[Candidate], setting: Setting, measure: Measure) -> HeldOut:
    """Measure the recorded runs at every snapshot and every candidate at every horizon.

    Raises:
        NonFiniteError: a recorded snapshot holds NaN or Inf.
    """
    truth, runs = setting.truth, setting.source.runs
    origin = setting.origin
    total = len(runs) * (len(truth.steps) + len(candidates) * len(setting.steps_H))
    done = 0

    def recorded_vector(run: int, step: int) -> np.ndarray:
        vector = truth.read([run], [step])[0, 0]
        if not np.isfinite(vector).all():
            raise NonFiniteError(
                f"{truth.path}: run {run}, step {step}: its weights are not finite, and its losses are what "
                "forecasts are weighed against.",
                hint="Choose other runs with --runs.",
            )
        return vector

    @lru_cache(maxsize=1)  # forecasts come run by run
    def last(run: int) -> np.ndarray:
        return recorded_vector(run, origin)

    def measured(vector: np.ndarray, run: int, step: int, text: str) -> dict[str, float]:
        nonlocal done
        done += 1
        setting.report(done, total, text)
        return measure.of(vector, truth.integers(run, step), run)

    recorded: Results = {
        run: {
            step: measured(recorded_vector(run, step), run, step, "held-out loss of the recorded runs")
            for step in truth.steps
        }
        for run in runs
    }
    verification = measure.verification
    kept: dict[int, float] = {}
    if verification is not None:
        kept = {run: verification.loss(last(run), truth.integers(run, origin), run) for run in runs}
    forecast: list[Results] = []
    lengths: list[dict[tuple[int, int], float]] = []
    for candidate in candidates:
        results: Results = {run: {} for run in runs}
        passed: dict[tuple[int, int], float] = {}
        before: tuple[int, int, np.ndarray] | None = None
        for run, step, vector in candidate.vectors(setting):
            if before is not None and before[0] == run and np.array_equal(before[2], vector):
                results[run][step], passed[run, step] = results[run][before[1]], passed[run, before[1]]
                done += 1  # many forecast the same at every step
                continue
            length, chosen = 1.0, vector
            if verification is not None:
                length, chosen = verification.passed(last(run), vector, truth.integers(run, origin), run, kept[run])
            before, passed[run, step] = (run, step, vector), length
            if length:
                results[run][step] = measured(chosen, run, origin, f"held-out loss of {candidate.label}")
            else:
                results[run][step] = recorded[run][origin]
                done += 1
        forecast.append(results)
        lengths.append(passed)
    curves = {run: LossCurve.of(truth.steps, [recorded[run][step]["loss"] for step in truth.steps]) for run in runs}
    return HeldOut(recorded=recorded, curves=curves, forecast=forecast, lengths=lengths)


def finished(
    candidates: Sequence[Candidate],
    steps: Mapping[int, Sequence[int]],
    setting: Setting,
    measure: Measure,
    found: HeldOut,
    warn: Callable[[str], None],
) -> HeldOut:
    """What was found, and beside it the control, and candidates after training on from their forecasts.

    Args:
        candidates: all that were weighed.
        steps: horizons from whose forecasts to train on, by a candidate's place.
        setting: of the evaluation.
        measure: of it.
        found: of all candidates.
        warn: called where a run trained again is not what was recorded.

    Raises:
        UsageError: the runs are of no workload, or their rate is not constant.
    """
    runs, origin, end, ends = setting.source.runs, setting.origin, setting.steps_H[0], control_ends(setting)
    results: dict[int, Results] = {}
    with TemporaryDirectory() as folder:
        falling = FallingRate(Path(folder), setting.truth, runs, origin, ends[-1], measure.of, warn, setting.report)
        control = falling.trained(ends)
        for place, candidate in enumerate(candidates):
            results[place] = {run: {} for run in runs}
            trained = {run: {end: control[run][end]} for run in runs}
            before = [found.recorded[run][origin] for run in runs]
            for step in steps[place]:
                reached = [found.forecast[place][run][step] for run in runs]
                if reached != before:  # many forecast the same at every step, and some w_n
                    alone = replace(setting, steps_H=(step,))
                    trained = falling.trained([end], _verified(candidate, alone, found.lengths[place]))
                    before = reached
                for run in runs:
                    results[place][run][step] = trained[run][end]
    return replace(found, control=control, finished=results)


def _verified(
    candidate: Candidate, setting: Setting, lengths: Mapping[tuple[int, int], float]
) -> Iterator[tuple[int, np.ndarray]]:
    """A candidate's weights, shortened as its verification said: (run, weights of shape [D])."""
    for run, step, vector in candidate.vectors(setting):
        last_D = setting.truth.read([run], [setting.origin])[0, 0]
        yield run, part_way(last_D, vector, lengths[run, step])
