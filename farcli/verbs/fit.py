"""Fit a forecaster on recorded runs."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace as replaced
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farcli.artefact import Artefact, build, load, save
from farcli.errors import NonFiniteError, ResourceError, UsageError
from farcli.files import check_outcome
from farcli.fitting.descent import DivergedError, Saved, descend
from farcli.fitting.networks import require_room
from farcli.fitting.solving import solve
from farcli.forecasters.base import (
    Coupling,
    FittedForecaster,
    Forecaster,
    Known,
    Prefix,
    Problem,
    SolvedForecaster,
    Sums,
    TrainedForecaster,
)
from farcli.forecasting import TrainingData, check_context, choose_context, choose_targets, require_same_network
from farcli.provenance import provenance
from farcli.stream import Block, Stream, open_sources, require_finite, resolve_device
from farcli.training import threads
from farcli.verbs.training_loss import training_loss
from farcli.verbs.update_rule import update_rule

_MOST_THREADS = 8
"""Threads that sum up; with more, the memory bus sets the pace."""


def fit(
    method: str,
    stores: Sequence[str],
    output: Path,
    *,
    context: int = 5,
    start: int | None = None,
    targets: str | None = None,
    horizon: int | None = None,
    train_runs: str | None = None,
    options: Mapping[str, str] | None = None,
    device: str = "auto",
    memory: int = 2_000_000_000,
    replace: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    partial: bool = False,
    stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] = lambda: nullcontext(lambda: False),
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Fit a method on the prefixes and futures of recorded runs and write it to a file.

    Args:
        method: a name in the table of forecasters, or "package.module:Class".
        stores: recorded runs; all of one network and one grid of steps.
        output: the safetensors file to write.
        context: snapshots of the prefix.
        start: step of the last observed snapshot; the end of the first `context` snapshots when None.
        targets: steps to forecast, as typed; every later recorded step when None.
        horizon: forecast the next so many snapshots instead.
        train_runs: runs to learn from, as typed; all when None.
        options: `--set` options of the method.
        device: where to compute.
        memory: bytes that the data and the method's own state may take.
        replace: replace an existing file.
        resume: where this very fit exists already, do nothing and return its row; where one by gradient was stopped,
            go on from what it saved last, when it was asked to stop and every half minute or so.
        dry_run: write nothing, return the row that would come out.
        partial: accept unfinished stores.
        stopping: what a fit by gradient runs within; it yields whether to save and stop, asked after every epoch.
        report: called with (done, total, text).

    Returns:
        A row: path, method, runs, stores, parameters, context, targets, seconds (None where nothing was written).

    Raises:
        FarcliError: see the exit codes.
    """
    check_outcome(output, replace=replace, resume=resume, inputs=stores)
    forecaster = build(method, options or {})
    sources = open_sources(stores, train_runs, partial=partial)
    first = sources[0].trajectory
    ids = [source.trajectory.id for source in sources]
    for source in sources:
        if ids.count(source.trajectory.id) > 1:
            raise UsageError(f"{source.trajectory.path}: is named twice; its runs would count double.")
    for source in sources[1:]:
        require_same_network(source.trajectory, first, "fitted")
    steps_C = choose_context(first, context, start)
    check_context(forecaster, method, steps_C)
    if horizon is not None:
        if targets is not None:
            raise UsageError("--horizon and --to both say what to forecast; give one of them.")
        later = [step for step in first.steps if step > steps_C[-1]]
        if not 1 <= horizon <= len(later):
            raise UsageError(
                f"--horizon {horizon}: {first.path} has {len(later)} snapshots after step {steps_C[-1]}; "
                f"expected 1 to {len(later)}."
            )
        targets = ",".join(map(str, later[:horizon]))
    steps_H = choose_targets(first, steps_C[-1], targets, recorded=True)

    problem = Problem(
        layout=first.layout,
        coordinates=first.layout.parameters,
        runs=sum(len(source.runs) for source in sources),
        steps_C=steps_C,
        steps_H=steps_H,
        memory=memory // 2,
    )
    if isinstance(forecaster, FittedForecaster):
        known = Known(
            optimizer=lambda: update_rule(sources, steps_H[-1]), loss=lambda: training_loss(sources, steps_C[-1])
        )
        forecaster = forecaster.prepared(problem, known)
    problem = replaced(problem, steps_C=forecaster.observed(steps_C))
    training = [TrainingData.of(source).to_json() for source in sources]
    row = {
        "path": str(output),
        "method": method,
        "runs": problem.runs,
        "stores": len(sources),
        "parameters": problem.coordinates,
        "context": list(steps_C),
        "targets": list(steps_H),
        "seconds": None,
    }
    if resume and output.exists():
        _require_same(output, method, forecaster, problem, steps_C, training)
        return row
    if dry_run:
        return row
    began = time.perf_counter()

    def keep(fitted: Forecaster, **more: Any) -> None:
        artefact = Artefact(
            method=method,
            forecaster=fitted,
            problem=problem,
            context=steps_C,
            provenance=provenance(training=training, options=dict(options or {}), **more),
        )
        save(artefact, output, replace=replace)

    found: dict[str, Any] = {}
    if isinstance(forecaster, SolvedForecaster | TrainedForecaster):
        try:
            stream = Stream(
                sources,
                coupling=forecaster.coupling,
                steps_C=problem.steps_C,
                steps_H=steps_H,
                coordinates=problem.coordinates,
                device=resolve_device(device),
                memory=memory,
                share=0.5,
            )
        except ResourceError:
            if forecaster.coupling is Coupling.JOINT:
                require_room(forecaster, problem)  # what it can hold is less than what can be read
            raise
        try:
            if isinstance(forecaster, SolvedForecaster):
                spread = bound(_spread, stream, report) if stream.spreads else None
                forecaster = solve(forecaster, problem, lambda: _blocks(stream, report), spread=spread)
            else:
                identity = json.dumps([method, str(forecaster.config), steps_C, steps_H, training])
                saved = Saved(_saved(output), identity, resume=resume)
                with stopping() as stop:
                    fitted = descend(
                        forecaster,
                        problem,
                        lambda: _blocks(stream, _silent),
                        device=stream.device,
                        saved=saved,
                        stop=stop,
                        report=report,
                    )
                saved.remove()
                forecaster, found = fitted.forecaster, fitted.summary()
        except DivergedError as error:
            _saved(output).unlink(missing_ok=True)
            if error.best is None:
                raise
            keep(error.best, diverged=str(error))
            raise NonFiniteError(f"{error} Its best state is in {output}.", error.hint) from error
        except NonFiniteError:
            # Fitting shows that something is not finite, at no cost; only then is it looked for.
            for block in stream:
                path = sources[block.source].trajectory.path
                require_finite(block.prefix.weights_BCD, block, path, problem.steps_C)
                require_finite(block.truth_BHD, block, path, steps_H)
            raise
    seconds = time.perf_counter() - began
    if isinstance(forecaster, FittedForecaster):
        found |= forecaster.notes()
    keep(forecaster, **found)
    if "diverged" in found:
        raise NonFiniteError(
            f"{method}: the fit diverged: {found['diverged']}. What was best before is in {output}.",
            f"Lower the learning rate: --set lr={type(forecaster.config)().lr:g}.",
        )
    return row | {"seconds": seconds} | found


def _saved(output: Path) -> Path:
    """Where a fit by gradient keeps what it needs to go on."""
    return output.with_name(f".{output.name}.fitting")


def _silent(done: float, total: float, text: str) -> None:
    """No progress: a fit by gradient counts updates, not blocks."""


def _require_same(
    output: Path,
    method: str,
    forecaster: Forecaster,
    problem: Problem,
    steps_C: tuple[int, ...],
    training: list[dict[str, Any]],
) -> None:
    """Refuse to take another fit for the one asked for."""
    found = load(output)
    for what, there, wanted in (
        ("method", found.method, method),
        ("options", found.forecaster.config, forecaster.config),
        ("context", found.context, steps_C),
        ("targets", found.problem.steps_H, problem.steps_H),
        ("training data", found.provenance.get("training"), training),
    ):
        if there != wanted:
            raise UsageError(
                f"{output}: holds another fit: its {what} is {there}, not {wanted}.",
                hint="Choose another -o, or pass --force to replace it.",
            )
    if "diverged" in found.provenance:
        raise NonFiniteError(
            f"{output}: holds the best state of a fit that diverged: {found.provenance['diverged']}",
            "Choose other options, and pass --force to replace it.",
        )


def _spread(
    stream: Stream, report: Callable[[float, float, str], None], work: Callable[[Iterator[Block]], Sums]
) -> Iterator[Sums]:
    total = stream.runs * stream.coordinates
    done = 0
    count = torch.get_num_threads()
    with threads(1):  # else each thread would start as many of its own
        for part, size in stream.spread(work, threads=min(count, _MOST_THREADS)):
            yield part
            done += size
            report(done, total, "")


def _blocks(stream: Stream, report: Callable[[float, float, str], None]) -> Iterator[tuple[Prefix, Tensor]]:
    done = 0
    total = stream.runs * stream.coordinates
    for block in stream:
        yield block.prefix, block.truth_BHD
        done += len(block.runs) * (block.stop - block.prefix.start)
        report(done, total, str(stream.sources[block.source].trajectory.path))
