"""Leap while a workload trains: the engine at work, every proposal a row, and a control to count by."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from farcli.errors import StoppedError, StoreError, UsageError
from farcli.metrics import LossCurve
from farcli.provenance import provenance
from farcli.regimes import PUBLISHED, Probe, Thresholds, regimes
from farcli.speculation.arms import Arm, arms_of
from farcli.speculation.leaper import Leaper
from farcli.speculation.options import Leaping, last_leap, require_leaps
from farcli.speculation.validation import Validation
from farcli.store import Trajectory
from farcli.store.disk import Sync
from farcli.training import TrainingRun, describe_workload, run_seed, threads, workload_from
from farcli.verbs.leap_ledger import Curve, Journal
from farcli.workloads.base import Workload, evaluating

_PARTS = 4
"""Of a verification batch, judged one by one."""
_PROBES = 64
"""Examples of a draw, at most, whose activations are compared."""


class WorkloadValidation(Validation):
    """A workload's own verification data: fresh for each draw, never trained on, never reported.

    Args:
        workload: that trains.
        seed: of the run.
        batches: in a draw.
    """

    def __init__(self, workload: Workload, seed: int, batches: int) -> None:
        self._workload = workload
        self._seed = seed
        self._batches = batches

    @property
    def cost(self) -> float:
        """A forward pass is a third of a step."""
        return self._batches / 3

    def losses(self, model: nn.Module, draw: int) -> list[float]:
        """The workload's own loss on quarters of each batch of the draw: their spread says how sure a verdict is."""
        batches = self._workload.verification(self._seed, draw, self._batches)
        axis = int(self._workload.lockstep)
        probed = any(isinstance(each, nn.Linear) for each in model.modules())
        with (
            threads(self._workload.threads),
            evaluating(model),
            Probe(model, _PROBES) if probed else nullcontext() as probe,
        ):
            losses = [
                float(self._workload.loss(model, part).sum())
                for batch in batches
                for part in zip(*(each.chunk(_PARTS, axis) for each in batch), strict=True)
            ]
        self.fingerprint = probe.fingerprint() if probe is not None else None
        return losses


def leap(
    workload: str,
    output: Path | None,
    *,
    predictors: Sequence[str] = ("spectral",),
    strengths: Sequence[float] = (1.0,),
    leaping: Leaping | None = None,
    settings: Mapping[str, str] | None = None,
    batches: int = 1,
    control: bool = False,
    warm_start: str | None = None,
    runs: int = 1,
    steps: int | None = None,
    every: int | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    sync: Sync = "commit",
    time_limit: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[float, float, str], None] = lambda done, total, text: None,
    told: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Train a workload with leaps, and say what they were worth.

    Args:
        workload: a name in the table of workloads, or "package.module:Class".
        output: the store to write: the weights while they leap, `average.zarr` within it for their running average,
            and the ledger as arrays in the group `ledger`; None writes nothing.
        predictors: names, or "none" alone; more than one, or more than one strength, are arms of a bandit beside
            "no leap".
        strengths: what their moves are multiplied by.
        leaping: how to leap.
        settings: options of the predictors, as text; of several, those that know them.
        batches: of verification data in a draw.
        warm_start: a recording of a sibling run; training starts from its last weights. What that run took is in the
            rows as `sibling_steps`, and is no part of `cost`: whoever trains one run alone has to add it.
        control: train the same runs without leaps beside them, and count equivalent steps by them.
        runs: how many; run r has the seed `run_seed(seed, r)`, as in `record`.
        steps: optimiser steps of each run; the workload's own number when None.
        every: steps between snapshots and held-out losses; the workload's own number when None.
        seed: of everything random.
        options: `--set` options of the workload.
        overwrite: replace an existing store.
        resume: go on with an unfinished store of the same command.
        sync: how durable each snapshot is made.
        time_limit: seconds after which to stop as if by a signal.
        stop: asked before every step.
        report: called with (steps done, steps in all, text).
        told: called with the row of every proposal when its verdict is there.

    Returns:
        A row for each run: path, workload, run, seed, steps, predictor, gate, proposals, accepted, rejected,
        unverified, verification and proposing (cost, in steps), lost (steps, by roll-backs), cost (all of it), loss,
        average_loss (held-out, at the end), chance; after a warm start sibling_steps; with a control also control_loss,
        control_average_loss, equivalent_steps (of the control's average to the leaping run's average loss), net_steps
        (equivalent steps − cost), speedup (their ratio), and `bound`, true where the control never got there, so that
        all three are at least what they say (0: at most, where it began better).

    Raises:
        UsageError: an argument cannot be meant, the output exists, or it holds another training.
        NonFiniteError: training diverged, and no leap is to blame.
        StoppedError: `stop` or `time_limit` said so; the store can be resumed.
    """
    began = time.monotonic()
    for name, value in (("runs", runs), ("steps", steps), ("every", every), ("batches", batches)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: expected a whole number of at least 1.")
    task = workload_from(workload, options or {}, steps=steps)
    steps = steps or task.default_steps
    every = every or task.default_every
    how = leaping or Leaping()
    how = replace(how, until=last_leap(how, steps))
    arms_R = [arms_of(predictors, strengths, settings or {}) for _ in range(runs)]
    require_leaps(how, [arm.predictor.context for arm in arms_R[0] if arm.strength], steps)
    sibling = None if warm_start is None else last_weights(warm_start)
    asked = {
        "predictors": list(predictors),
        "strengths": list(strengths),
        "settings": dict(settings or {}),
        "leaping": asdict(how),
        "batches": batches,
        "warm_start": None if sibling is None else described(sibling),
    }
    if how.gate != "none":
        task.verification(run_seed(seed, 0), 0, batches)  # refuses where there is none, before anything is trained
    schedule = sorted({*range(0, steps + 1, every), steps})
    seeds = [run_seed(seed, run) for run in range(runs)]
    deadline = began + time_limit if time_limit is not None else float("inf")
    header = {
        "workload": describe_workload(workload, task),
        "seed": seed,
        "seeds": seeds,
        "recording": {"steps": steps, "snapshots": {"every": every}},
        "leap": asked,
        "provenance": provenance(threads=task.threads or torch.get_num_threads()),
    }
    journal = Journal(output, header, schedule, runs, replace=overwrite, resume=resume, sync=sync)

    def labelled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        path, chance = None if output is None else str(output), task.chance()["loss"]
        whose = {"path": path, "workload": workload}
        what = {"steps": steps, "predictor": ",".join(predictors), "gate": how.gate}
        return [
            {**whose, "run": run, "seed": own, **what, **row, "chance": chance}
            for run, (own, row) in enumerate(zip(seeds, rows, strict=True))
        ]

    if journal.finished is not None:
        return labelled(journal.finished)
    _rehearse(task, seeds[0], arms_of(predictors, strengths, settings or {}), how, sibling)
    done_steps = steps * (2 if control else 1)
    rows = []
    with journal:
        for run, own in enumerate(seeds):

            def reported(done: int, text: str, run: int = run) -> None:
                report(run * done_steps + done, runs * done_steps, f"run {run}, {text}")

            def stopped() -> bool:
                return stop() or time.monotonic() > deadline

            rows.append(
                _train(
                    task,
                    own,
                    run,
                    schedule,
                    arms=arms_R[run],
                    leaping=how,
                    batches=batches,
                    control=control,
                    sibling=sibling,
                    journal=journal,
                    stopped=stopped,
                    report=reported,
                    told=told,
                )
            )
        journal.finish()
    return labelled(rows)


def _train(
    task: Workload,
    seed: int,
    run: int,
    schedule: Sequence[int],
    *,
    arms: Sequence[Arm],
    leaping: Leaping,
    batches: int,
    control: bool,
    sibling: Trajectory | None,
    journal: Journal,
    stopped: Callable[[], bool],
    report: Callable[[int, str], None],
    told: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One run with leaps, and its control."""
    if (done := journal.ended(run)) is not None:
        return done
    steps = schedule[-1]
    beside = journal.control(run)
    if control and not beside:
        beside = _control(task, seed, schedule, leaping, stopped, report)
    before = steps if control else 0
    training = TrainingRun(task, [seed])
    if sibling is not None:
        start_from(training, sibling)
    fresh = task.batches([seed], steps)  # beyond those that training takes
    leaper = Leaper(
        training.model,
        training.optimizer,
        arms,
        options=leaping,
        step_flops=step_operations(task, seed),
        validate=None if leaping.gate == "none" else WorkloadValidation(task, seed, batches),
        fresh=lambda: task.loss(training.model, next(fresh)).sum(),
        told=lambda entry: told({"run": run, **entry.row()}),
    )
    curve = journal.begin(run, training, leaper)
    with leaper:
        for step in schedule:
            if step < training.step:
                continue
            while training.step < step:
                if stopped():
                    journal.stop(run, training, leaper, curve, beside)
                leaper.loss(float(training.advance(1)[0]))
                report(before + training.step, _news(training.step, curve, leaper, beside))
            if step == steps:
                leaper.finish()
            if not curve or curve[-1][0] < step:
                journal.snapshot(run, step, training, leaper)
                curve.append((step, *_losses(task, seed, training, leaper)))
    account = leaper.account
    row: dict[str, Any] = {
        "proposals": account.proposals,
        "accepted": account.accepted,
        "rejected": account.rejected,
        "unverified": account.unverified,
        "verification": account.verification,
        "proposing": account.proposing,
        "lost": account.lost,
        "cost": account.cost,
        "loss": curve[-1][1],
        "average_loss": curve[-1][2],
    }
    if sibling is not None:
        row["sibling_steps"] = sibling.steps[-1]
    if beside:
        equivalent, bound = _average_curve(beside).steps_to(curve[-1][2])
        row |= {
            "control_loss": beside[-1][1],
            "control_average_loss": beside[-1][2],
            "equivalent_steps": equivalent,
            "bound": bound,
            "net_steps": equivalent - account.cost,
            "speedup": equivalent / account.cost,
        }
    journal.end(run, row, leaper.entries, curve, beside)
    return row


def _rehearse(task: Workload, seed: int, arms: Sequence[Arm], leaping: Leaping, sibling: Trajectory | None) -> None:
    """Take one step of a run that is thrown away, so that what cannot leap is refused before anything is written.

    Raises:
        UsageError: a predictor cannot leap in this training.
        StoreError: the sibling is of another network.
    """
    training = TrainingRun(task, [seed])
    if sibling is not None:
        start_from(training, sibling)
    fresh = task.batches([seed])
    leaper = Leaper(
        training.model,
        training.optimizer,
        arms,
        options=leaping,
        gate="none",
        fresh=lambda: task.loss(training.model, next(fresh)).sum(),
    )
    training.advance(1)
    leaper.require()


def last_weights(path: str) -> Trajectory:
    """The recording of one run to start from.

    Raises:
        UsageError: it holds several runs.
    """
    sibling = Trajectory.open(path)
    if len(sibling.runs) != 1:
        raise UsageError(
            f"--warm-start-from {path}: holds {len(sibling.runs)} runs, expected one.",
            "Record the sibling alone: farcli record WORKLOAD --runs 1.",
        )
    return sibling


def described(sibling: Trajectory) -> dict[str, Any]:
    """What a store says of the run it was started from."""
    made = sibling.header.get("provenance")
    return {
        "path": str(sibling.path),
        "id": made.get("id") if isinstance(made, Mapping) else None,
        "workload": sibling.header.get("workload"),
        "seeds": sibling.header.get("seeds"),
        "step": sibling.steps[-1],
    }


def start_from(training: TrainingRun, sibling: Trajectory) -> None:
    """Put the last weights and buffers of another run in place; optimiser, step and data order are the run's own.

    Raises:
        StoreError: it is another network, or its weights are not finite.
    """
    if sibling.layout != training.layout:
        raise StoreError(
            f"{sibling.path}: is of another network: D = {sibling.layout.size}, this one has {training.layout.size}."
        )
    run, step = sibling.runs[0], sibling.steps[-1]
    vectors = sibling.read([run], [step])[:, 0]
    if not np.isfinite(vectors).all():
        raise StoreError(f"{sibling.path}: its weights at step {step} are not finite.")
    training.load(vectors, sibling.integers(run, step)[None])


def _control(
    task: Workload,
    seed: int,
    schedule: Sequence[int],
    leaping: Leaping,
    stopped: Callable[[], bool],
    report: Callable[[int, str], None],
) -> Curve:
    """The same run without leaps, its average kept alike: held-out losses at the same steps.

    Raises:
        StoppedError: between two steps; a control is trained again from its seed.
    """
    training = TrainingRun(task, [seed])
    still = Leaper(training.model, training.optimizer, [], options=leaping, gate="none")
    curve: Curve = []
    with still:
        for step in schedule:
            while training.step < step:
                if stopped():
                    raise StoppedError(
                        f"stopped at step {training.step} of the control.", "Run it again with --resume."
                    )
                training.advance(1)
                report(training.step, f"control, step {training.step}")
            curve.append((step, *_losses(task, seed, training, still)))
    return curve


def step_operations(task: Workload, seed: int) -> float:
    """Floating-point operations of a training step: of the matrix products, forwards and backwards."""
    model = task.model([seed])
    with threads(task.threads), torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
        task.loss(model, next(task.batches([seed]))).sum().backward()
    return float(counter.get_total_flops())


def _average_curve(curve: Curve) -> LossCurve:
    return LossCurve.of([step for step, *_ in curve], [average for *_, average in curve])


def _losses(task: Workload, seed: int, training: TrainingRun, leaper: Leaper) -> tuple[float, float]:
    """Held-out loss of the weights and of their running average."""
    with threads(task.threads):
        own = task.evaluate(training.model, seed)["loss"]
        with leaper.average():
            return own, task.evaluate(training.model, seed)["loss"]


def _news(step: int, curve: Curve, leaper: Leaper, control: Curve) -> str:
    """Where a leaping run stands, in a line that a narrow terminal has room for."""
    account = leaper.account
    news = []
    if curve:
        news.append(f"loss {curve[-1][2]:.4g}")
    if control and len(curve) > 1:
        equivalent, _ = _average_curve(control).steps_to(curve[-1][2])
        news.append(f"net {equivalent - curve[-1][0] - account.verification - account.proposing:+.0f}")
    news.append(f"{account.accepted + account.unverified} kept, {account.rejected} rejected")
    verdicts = {entry.verdict_step: entry.activation_cosine for entry in leaper.entries}
    if similar := [each for each in verdicts.values() if each is not None]:
        news.append(str(regimes(similar, Thresholds(*PUBLISHED))[-1]))
    return f"step {step}: {', '.join(news)}"
