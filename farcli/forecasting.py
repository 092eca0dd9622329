"""From what a user names, a file or a method, to forecasts of blocks of weights.

Shape suffixes: B runs, C snapshots of the context, H horizons, D coordinates of the block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farcli.artefact import Artefact, build, load
from farcli.config import parse_selection
from farcli.errors import StoreError, UsageError
from farcli.forecasters.base import FittedForecaster, Forecaster, Prefix
from farcli.forecasters.table import FORECASTERS
from farcli.layout import Layout
from farcli.policies import Buffers
from farcli.registry import unknown
from farcli.store import Trajectory
from farcli.stream import Source, Stream, require_finite
from farcli.training import completed

DEFAULT_CONTEXT = 5
"""Snapshots of a prefix where nothing says otherwise: GFM's n = 4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Runs a forecaster has seen.

    Attributes:
        id: of the store.
        path: where it was.
        runs: labels of the runs.
        seeds: seeds of these runs, where the store was recorded from a workload; else empty.
        workload: name and options of that workload.
    """

    id: str
    path: str
    runs: tuple[int, ...]
    seeds: tuple[int, ...] = ()
    workload: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, source: Source) -> "TrainingData":
        """What provenance must keep of a source."""
        trajectory = source.trajectory
        return cls(
            id=trajectory.id,
            path=str(trajectory.path),
            runs=source.runs,
            seeds=tuple(_seeds(trajectory)[run] for run in source.runs if run in _seeds(trajectory)),
            workload=trajectory.header.get("workload"),
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object for provenance."""
        return {
            "id": self.id,
            "path": self.path,
            "runs": list(self.runs),
            "seeds": list(self.seeds),
            "workload": self.workload,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainingData":
        """Read what `to_json` wrote."""
        return cls(
            id=str(value["id"]),
            path=str(value["path"]),
            runs=tuple(int(run) for run in value["runs"]),
            seeds=tuple(int(seed) for seed in value.get("seeds", ())),
            workload=value.get("workload"),
        )


def _seeds(trajectory: Trajectory) -> dict[int, int]:
    """Seed of each run; empty where the header names none."""
    seeds = trajectory.header.get("seeds")
    if not isinstance(seeds, list) or len(seeds) != len(trajectory.runs):
        return {}
    return dict(zip(trajectory.runs, seeds, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A forecaster set to a place in a run.

    Attributes:
        label: what rows call it.
        source: file or name it came from.
        forecaster: ready to forecast.
        context: steps of the prefix; its last is the start of the forecast.
        targets: steps it can forecast from there; None for any.
        training: what it was fitted on.
        diverged: how its fit ended, where it did not end well.
    """

    label: str
    source: str
    forecaster: Forecaster
    context: tuple[int, ...]
    targets: tuple[int, ...] | None
    training: tuple[TrainingData, ...]
    diverged: str = ""

    @property
    def start(self) -> int:
        """Step of the last observed snapshot."""
        return self.context[-1]

    @property
    def observed(self) -> tuple[int, ...]:
        """Steps it reads."""
        return self.forecaster.observed(self.context)


def is_file_like(text: str) -> bool:
    """Whether an argument is meant as a path and not as a method's name."""
    return text not in FORECASTERS and (text.endswith(".safetensors") or "/" in text or Path(text).is_file())


def resolve_method(
    text: str,
    truth: Trajectory,
    *,
    start: int | None = None,
    context: int | None = None,
    options: Mapping[str, str] | None = None,
    transfer: bool = False,
) -> Method:
    """The method a user named, set to a place in the runs of a store.

    Args:
        text: a file that `farcli fit` wrote, or the name of a method that needs no fitting.
        truth: the store whose prefixes it will see.
        start: step of the last observed snapshot; where the method was fitted, or the end of the first
            `context` snapshots, when None.
        context: snapshots of the prefix, for methods that were not fitted.
        options: `--set` options, for methods that were not fitted.
        transfer: allow a map fitted on another network, where the method has no coefficients of its own per tensor.

    Raises:
        UsageError: unknown method, wrong network, prefix too short, or steps that are not recorded.
        StoreError: the file is missing or damaged.
    """
    if is_file_like(text):
        for option, given in (("--set", options), ("--context", context)):
            if given:
                raise UsageError(f"{text}: is fitted already; {option} applies to methods named, not to files.")
        return _fitted(load(Path(text)), text, truth, start, transfer)
    if text not in FORECASTERS and ":" not in text:
        raise unknown("forecaster", text, FORECASTERS)
    forecaster = build(text, options or {})
    if isinstance(forecaster, FittedForecaster):
        raise UsageError(
            f"{text}: must be fitted before it can forecast.",
            hint=f"farcli fit {text} {truth.path} -o {text}.safetensors",
        )
    count = max(DEFAULT_CONTEXT, forecaster.min_context) if context is None else context
    steps = choose_context(truth, count, start)
    check_context(forecaster, text, steps)
    return Method(label=text, source=text, forecaster=forecaster, context=steps, targets=None, training=())


def _fitted(artefact: Artefact, path: str, truth: Trajectory, start: int | None, transfer: bool) -> Method:
    forecaster, problem = artefact.forecaster, artefact.problem
    check_network(path, artefact, truth.layout, str(truth.path), transfer)
    shift = 0 if start is None else start - artefact.context[-1]
    context = tuple(step + shift for step in artefact.context)
    observed = set(forecaster.observed(context))
    missing = [step for step in context if step in observed and step not in set(truth.steps)]
    if missing:
        have = [step for step in truth.steps if step <= context[-1]]
        raise UsageError(
            f"{truth.path}: the prefix is too short or on another grid: {path} looks at steps "
            f"{', '.join(map(str, sorted(observed)))}, and step {missing[0]} is not recorded "
            f"({len(have)} snapshots up to step {context[-1]}).",
            hint="Choose another place with --from, or fit with this store's steps.",
        )
    fitted = isinstance(forecaster, FittedForecaster)
    return Method(
        label=artefact.method,
        source=path,
        forecaster=forecaster,
        context=context,
        targets=tuple(step + shift for step in problem.steps_H) if fitted else None,
        training=tuple(TrainingData.from_json(t) for t in artefact.provenance.get("training", ())),
        diverged=str(artefact.provenance.get("diverged", "")),
    )


def check_network(path: str, artefact: Artefact, layout: Layout, where: str, transfer: bool) -> None:
    """Refuse a forecaster that was fitted on another network.

    Raises:
        UsageError: the layouts differ, and the method cannot or was not told to transfer.
    """
    fitted = artefact.problem.layout
    if fitted == layout or not isinstance(artefact.forecaster, FittedForecaster):
        return
    if transfer and artefact.forecaster.transferable:
        return
    if fitted.parameters != layout.parameters:
        what = f"on D = {fitted.parameters} parameters, but {where} has D = {layout.parameters}"
    else:
        what = f"on a network with other tensors than {where}, though both have D = {layout.parameters} parameters"
    if artefact.forecaster.transferable:
        hint = "Its map is shared by all coordinates: pass --transfer to apply it to another network."
    else:
        hint = "Fit a forecaster on runs of this network."
    raise UsageError(f"{path} was fitted {what}.", hint=hint)


def require_same_network(truth: Trajectory, first: Trajectory, doing: str) -> None:
    """Refuse a store of another network than the first one's.

    Args:
        truth: the store.
        first: the one named before.
        doing: what is done to them together: "fitted", "evaluated".

    Raises:
        UsageError: their layouts differ.
    """
    if truth.layout == first.layout:
        return
    if truth.layout.parameters != first.layout.parameters:
        what = f"(D = {truth.layout.parameters}) than {first.path} (D = {first.layout.parameters})"
    else:
        what = f"than {first.path}: other tensors, though both have D = {first.layout.parameters}"
    raise UsageError(
        f"{truth.path}: holds another network {what}; stores {doing} together must hold the same one.",
        hint="Networks of other shapes can be stored as one padded vector where the workload has an option pad.",
    )


def choose_context(truth: Trajectory, count: int, start: int | None) -> tuple[int, ...]:
    """The `count` snapshots that end at step `start`, or the first `count` ones.

    Raises:
        UsageError: `start` is not recorded, or there are fewer than `count` snapshots up to it.
    """
    if count < 1:
        raise UsageError(f"--context {count}: expected at least 1.")
    steps = truth.steps
    if start is not None and start not in steps:
        raise UsageError(
            f"--from {start}: {truth.path} has no snapshot at that step; it has steps {steps[0]}…{steps[-1]}."
        )
    end = count if start is None else steps.index(start) + 1
    if len(steps) < count or end < count:
        upto = "" if start is None else f" up to step {start}"
        raise UsageError(
            f"{truth.path}: the prefix has {min(end, len(steps))} snapshots{upto}, "
            f"but a context of {count} was asked for.",
            hint="Record more snapshots, or ask for a shorter --context.",
        )
    return tuple(steps[end - count : end])


def check_context(forecaster: Forecaster, name: str, context: Sequence[int]) -> None:
    """Refuse a context shorter than the method needs.

    Raises:
        UsageError: it is.
    """
    if len(context) < forecaster.min_context:
        raise UsageError(
            f"{name}: needs a context of at least {forecaster.min_context} snapshots, got {len(context)}.",
            hint="Give a larger --context.",
        )


def choose_targets(truth: Trajectory, start: int, text: str | None, *, recorded: bool) -> tuple[int, ...]:
    """Steps to forecast.

    Args:
        truth: the store.
        start: step of the last observed snapshot.
        text: a selection; every recorded step after `start` when None.
        recorded: whether the steps must be recorded (to fit and to evaluate) or may lie beyond (to forecast).

    Raises:
        UsageError: nothing is left, or a step is not recorded or not in the future.
    """
    later = [step for step in truth.steps if step > start]
    if text is None or text == "all":
        chosen = later
    elif ":" in text or recorded or "-" in text:
        chosen = parse_selection(text, later, "steps")
    else:
        try:
            chosen = [int(part) for part in text.split(",")]
        except ValueError:
            raise UsageError(f"--to {text!r}: expected steps like 600 or 200,400,600.") from None
    if not chosen:
        raise UsageError(f"{truth.path}: nothing to forecast: no step is recorded after step {start}.")
    early = [step for step in chosen if step <= start]
    if early:
        raise UsageError(f"--to {early[0]}: is not after the last observed step, {start}.")
    return tuple(sorted(set(chosen)))


def forecast_block(method: Method, prefix: Prefix, steps_H: Sequence[int], buffers: Buffers) -> Tensor:
    """Forecast one block, with the stated policy for buffers.

    Args:
        method: what forecasts.
        prefix: a block whose snapshots include those that `method` observes.
        steps_H: steps to forecast.
        buffers: "keep" gives buffers their last observed values; "forecast" treats them like weights,
            where the method has no coefficients bound to single parameters (else they are kept).

    Returns:
        Weights of shape [B, H, D].
    """
    at = {step: index for index, step in enumerate(prefix.steps_C)}
    observed = method.observed
    rows = [at[step] for step in observed]
    if rows != list(range(len(prefix.steps_C))):
        prefix = replace(prefix, weights_BCD=prefix.weights_BCD[:, rows], steps_C=observed)
    last = prefix.weights_BCD[:, -1:]
    parameters = prefix.layout.parameters
    fixed = prefix.start + prefix.weights_BCD.shape[-1] - max(parameters, prefix.start)
    if fixed <= 0 or (buffers == "forecast" and method.forecaster.transferable):
        return method.forecaster.forecast(prefix, steps_H)
    # Some columns are buffers that keep their last observed value.
    moving = prefix.weights_BCD.shape[-1] - fixed
    kept = last[..., moving:].expand(-1, len(steps_H), -1)
    if not moving:
        return kept.clone()
    inner = replace(prefix, weights_BCD=prefix.weights_BCD[..., :moving])
    return torch.cat([method.forecaster.forecast(inner, steps_H), kept], dim=-1)


def interval_block(method: Method, prefix: Prefix, steps_H: Sequence[int]) -> Tensor | None:
    """Half-widths of the 90 % intervals of one block without buffers, [B, H, D]; None where there are none."""
    if not isinstance(method.forecaster, FittedForecaster):
        return None
    rows = [prefix.steps_C.index(step) for step in method.observed]
    seen = replace(prefix, weights_BCD=prefix.weights_BCD[:, rows], steps_C=method.observed)
    return method.forecaster.half_width(seen, steps_H)


def forecast_vectors(
    method: Method,
    source: Source,
    steps_H: Sequence[int],
    *,
    buffers: Buffers,
    memory: int,
    device: torch.device,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Whole forecast vectors, one after the other: (run, step, weights of shape [D]).

    As many horizons are assembled at once as fit into half of `memory`.
    """
    trajectory = source.trajectory
    size = trajectory.layout.size
    group = max(1, min(len(steps_H), memory // 2 // max(1, size * trajectory.dtype.itemsize)))
    for run in source.runs:
        for first in range(0, len(steps_H), group):
            steps = steps_H[first : first + group]
            vectors = np.empty((len(steps), size), trajectory.dtype)
            for block, forecast_BHD in forecast_stream(
                method,
                Source(trajectory=trajectory, runs=(run,)),
                steps,
                buffers=buffers,
                memory=memory,
                share=0.5,
                device=device,
            ):
                vectors[:, block.prefix.start : block.stop] = forecast_BHD[0].cpu().numpy()
            for step, vector in zip(steps, vectors, strict=True):
                yield run, step, vector


def forecast_stream(
    method: Method,
    source: Source,
    steps_H: Sequence[int],
    *,
    buffers: Buffers,
    memory: int,
    device: torch.device,
    share: float = 1.0,
) -> Iterator[tuple[Any, Tensor]]:
    """Forecast all coordinates of some runs, block by block: (block, weights_BHD).

    Raises:
        NonFiniteError: the prefix holds NaN or Inf.
    """
    stream = Stream(
        [source],
        coupling=method.forecaster.coupling,
        steps_C=method.observed,
        device=device,
        memory=memory,
        share=share,
        extra_rows=2 * len(steps_H),
    )
    for block in stream:
        require_finite(block.prefix.weights_BCD, block, source.trajectory.path, method.observed)
        yield block, forecast_block(method, block.prefix, steps_H, buffers)


def check_targets(method: Method, steps_H: Sequence[int]) -> None:
    """Refuse steps that a fitted method has no coefficients for.

    Raises:
        UsageError: names the first one.
    """
    if method.targets is None:
        return
    for step in steps_H:
        if step not in method.targets:
            raise UsageError(
                f"{method.source}: was fitted to forecast steps {method.targets[0]}…{method.targets[-1]} "
                f"({len(method.targets)} of them) from step {method.start}; step {step} is not among them.",
                hint="Fit again with that step in --to.",
            )


def overlap(training: Sequence[TrainingData], truth: Trajectory) -> tuple[int, ...]:
    """Runs of a store that a method was fitted on: of this very store, or of another recording of the same runs."""
    found = {run for data in training if data.id == truth.id for run in data.runs}
    workload = truth.header.get("workload")
    if workload is not None:
        same = completed(workload)
        seen = {seed for data in training if data.workload and completed(data.workload) == same for seed in data.seeds}
        found |= {run for run, seed in _seeds(truth).items() if seed in seen}
    return tuple(sorted(found))


def reopen(training: Sequence[TrainingData], near: Trajectory) -> list[Source] | None:
    """The training runs behind a forecast, if their stores can still be found; None otherwise."""
    sources = []
    for data in training:
        if data.id == near.id:
            trajectory = near
        else:
            try:
                trajectory = Trajectory.open(data.path)
            except StoreError:
                return None
            if trajectory.id != data.id:
                return None
        sources.append(Source(trajectory=trajectory, runs=data.runs))
    return sources or None
