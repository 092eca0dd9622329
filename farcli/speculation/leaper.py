"""The engine: watches a training from its optimiser's hooks, proposes leaps, verifies them, keeps or takes them back.

Shape suffixes: D trained coordinates, N batches of a draw of verification data.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from statistics import fmean, stdev
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from farcli.errors import FarcliError, NonFiniteError, StoppedError, UsageError
from farcli.regimes import similarity
from farcli.speculation.arms import Arm, build_predictor
from farcli.speculation.bandit import Bandit
from farcli.speculation.base import Observed, Proposal
from farcli.speculation.gates import Gate, Judged, delayed, heard, immediate
from farcli.speculation.ledger import Account, Entry, Verdict
from farcli.speculation.options import Leaping
from farcli.speculation.trained import Average, Saved, Trained, foreach_copy
from farcli.speculation.validation import Function, Validation, mean_over_processes, processes

_SLOPES = 4
"""Looks at the slope along the last leap, before the next point."""


@dataclass(slots=True)
class _Window:
    """Training since the last verified state, with leaps in it."""

    start: int
    saved: Saved
    average: dict[str, Any]
    predictors: list[dict[str, Tensor]]
    point_D: Tensor
    entries: list[int]
    arm: int


def _similarity(before_PF: np.ndarray | None, after_PF: np.ndarray | None) -> float | None:
    return None if before_PF is None or after_PF is None else similarity(before_PF, after_PF)


class Leaper:
    """Leaps while a training runs; the loop stays as it is.

        with farcli.Leaper(model, optimizer, validate=held_out_loss) as leaper:
            for batch in batches:
                …
                optimizer.step()        # the leaper works in the optimiser's hook
        with leaper.average():          # the running average: what to evaluate and to keep
            torch.save(model.state_dict(), "model.pt")

    Args:
        model: the network.
        optimizer: that trains it, or several side by side: the last one's step counts.
        predictor: a name, or arms of a bandit: (name, predictor, strength).
        options: how to leap; or give its fields as keywords.
        validate: `Validation`, or a function of the model that returns a held-out loss. Without one the gate
            "delayed" goes by the training's losses, which the loop must then say by `loss`, each step's.
        step_flops: floating-point operations of a training step, to count proposals by; None has them timed.
        fresh: returns the training loss of the model on the next fresh batch, for predictors that ask for gradients.
        settings: options of the predictor, as text.
        told: called with every entry of the ledger when its verdict is there.
        step: optimiser steps taken before.

    Attributes:
        step: optimiser steps taken.
        entries: the ledger.
        verification: cost so far of verifying, in training steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        predictor: str | Sequence[Arm] = "spectral",
        *,
        options: Leaping | None = None,
        validate: Validation | Callable[[nn.Module], float] | None = None,
        step_flops: float | None = None,
        fresh: Callable[[], Tensor] | None = None,
        settings: Mapping[str, str] | None = None,
        told: Callable[[Entry], None] = lambda entry: None,
        step: int = 0,
        **fields: Any,
    ) -> None:
        try:
            self.options = replace(options or Leaping(), **fields)
        except (TypeError, ValueError) as error:
            raise UsageError(f"leap: {error}") from error
        self._model = model
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._trained = Trained(model, self._optimizers)
        self._average = Average(self._trained, model, self.options.memory, self.options.stride)
        if isinstance(predictor, str):
            arms: list[Arm] = [Arm(predictor, build_predictor(predictor, settings or {}), 1.0)]
        else:
            arms = list(predictor)
        self._arms = arms
        self._bandit = Bandit([arm.strength for arm in arms], seed=self.options.seed) if len(arms) > 1 else None
        if self.options.gate not in ("none", "delayed") and validate is None:
            raise UsageError(
                f"leap: gate {self.options.gate!r} verifies on held-out data, and there is none.",
                "Give a validation function, or choose the gate delayed, which can go by the training's losses.",
            )
        self._validation = Function(validate, lambda: self._seconds) if callable(validate) else validate
        if fresh is None and (needy := [arm.name for arm in arms if arm.predictor.takes_batches]):
            raise UsageError(
                f"leap: {needy[0]} takes gradients on fresh batches, and nobody gives it any.",
                "Give `fresh`, a function that returns the training loss of the next batch, or take another predictor.",
            )
        self._fresh = fresh
        self._told = told
        self.step = self._began = step
        self.entries: list[Entry] = []
        self.verification = 0.0
        keep = max(3, *(arm.predictor.context for arm in arms)) if arms else 3
        self._points: deque[tuple[int, Tensor]] = deque(maxlen=keep)
        self._window: _Window | None = None
        self._draw = 0
        self._scale = 1.0
        self._lost = 0
        self._off = False
        self._trusted: set[int] = set()
        """Arms of windows kept since the last one lost."""
        self._losses: list[float] = []
        self._measured_at = 0
        self._paces: list[float] = []
        self._highest = 0.0
        self._slopes: list[float] = []
        self._rises: deque[float] = deque(maxlen=4)
        self._proposal_costs: dict[int, float] = {}
        self._step_flops = step_flops
        self._proposing = 0.0
        self._last_move: Tensor | None = None
        self._hooks: list[Any] = []
        self._seconds = 0.0
        self._ended: float | None = None
        self._able = False
        self._points.append((step, self._trained.read()))
        self._unit = 0.0 if self._validation is None else self._validation.cost
        hear = self.options.gate == "delayed" and self._validation is None
        self._heard: deque[tuple[int, Tensor | float]] | None = (
            deque(maxlen=2 * (self.options.window + self.options.every)) if hear else None
        )

    # ------------------------------------------------------------------ doors

    def __enter__(self) -> "Leaper":
        from torch._compile import _disable_dynamo

        def after(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.after_step()

        self._hooks.append(self._optimizers[-1].register_step_post_hook(_disable_dynamo(after)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None:
            self.finish()
        elif not issubclass(kind, StoppedError):  # what was stopped is saved as it is, and goes on
            self.retreat("training ended with an error")

    def detach(self) -> None:
        """Leave the optimiser's hook: no step is counted any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def device(self) -> torch.device:
        """Where the trained weights are."""
        return self._trained.device

    def loss(self, value: float | Tensor) -> None:
        """Say the training loss of the step just taken; one that is not finite takes back unverified leaps.

        Args:
            value: a number; or a scalar tensor, which on a GPU is not waited for, nor looked at before a verdict.
        """
        value = value.detach() if isinstance(value, Tensor) else value
        if self._heard is not None:
            self._heard.append((self.step, value))
        if self._window is None or processes() > 1 or (isinstance(value, Tensor) and value.device.type != "cpu"):
            return  # of several processes no one may go back alone
        if not isfinite(float(value)):
            self._roll_back(Judged(False, float("nan"), float(value), "the training loss is not finite"))

    @contextmanager
    def average(self) -> Iterator[None]:
        """Within it, the network is the running average of its training; afterwards itself again, bit for bit."""
        with self._average.instead():
            yield

    @property
    def account(self) -> Account:
        """The ledger in sum."""
        return Account.of(self.entries, self.step, self.verification, self._proposing)

    # ------------------------------------------------------------------ steps

    def after_step(self) -> None:
        """An optimiser step has been taken; called by the hook, or by a loop that has none."""
        self.step += 1
        if self._ended is not None:
            took = perf_counter() - self._ended
            self._seconds = took if not self._seconds else self._seconds + (took - self._seconds) * 0.1
        if not self._able:
            self.require()
        self._highest = max(self._highest, self._trained.rate)
        if self.step % self.options.stride == 0:
            self._average.update()
        due = self.step % max(1, self.options.every // _SLOPES) == 0
        if due and self.options.watch and self._last_move is not None and len(self._slopes) < _SLOPES:
            self._slopes.append(self._trained.slope(self._last_move))
        if self.step % self.options.every == 0:
            self._point()
        self._ended = perf_counter()

    def require(self) -> None:
        """See whether every predictor can leap in this training, once the optimiser has taken a step.

        Raises:
            UsageError: one cannot.
        """
        seen = self._seen()
        for arm in self._arms:
            arm.predictor.require(seen, every=self.options.every, ahead=self._ahead)
        self._able = True

    @property
    def _ahead(self) -> int:
        return self.options.ahead or self.options.every * self.options.period

    def finish(self) -> None:
        """Training is over: the last verdict, on what is left of the budget or not; no leap stays unverified."""
        if self._window is not None:
            self._verdict()

    def retreat(self, reason: str) -> None:
        """Take back what has not been verified, bit for bit."""
        if self._window is not None:
            self._roll_back(Judged(False, float("nan"), float("nan"), reason))

    def _point(self) -> None:
        weights_D = self._trained.read()
        if not bool(torch.isfinite(weights_D).all()):
            if self._window is None:
                raise NonFiniteError(f"leap: weights are not finite at step {self.step}, and no leap is to blame.")
            self._roll_back(Judged(False, float("nan"), float("nan"), "weights are not finite"))
            return
        self._points.append((self.step, weights_D))
        self._watch()
        window = self._window
        if window is not None and self.step - window.start >= self.options.window and self._affordable():
            self._verdict()
        if self._may_leap():
            self._leap()

    def _may_leap(self) -> bool:
        options = self.options
        frozen = self._trained.rate < options.freeze * self._highest
        late = options.until is not None and self.step > options.until
        due = (self.step // options.every) % options.period == 0
        if not self._arms or not due or self._off or frozen or late or self.step < options.start:
            return False
        return self._heard is None or self._heard_enough()

    def _heard_enough(self) -> bool:
        """Whether there are losses before a window to compare it with: as many as half a window has steps."""
        assert self._heard is not None
        if not self._heard and self.step - self._began >= self.options.window:
            raise UsageError(
                "leap: there is no validation function, and no training loss was heard to verify leaps by.",
                "Give a validation function, or say every step's loss: leaper.loss(loss).",
            )
        return len(self._heard) >= max(2, self.options.window // 2)

    # ------------------------------------------------------------------ leaps

    def _leap(self) -> None:
        options = self.options
        now = options.gate not in ("none", "delayed")
        cosine = self._cosine()
        if self._window is not None:
            index = self._window.arm
        else:
            index = self._bandit.choose(cosine) if self._bandit is not None else 0
        arm = self._arms[index]
        opens = options.gate == "delayed" and self._window is None
        unknown = arm.strength != 0 and index not in self._trusted
        look = opens and options.look and self._validation is not None and unknown
        if (now or look) and not self._affordable():
            return
        if len(self._points) < arm.predictor.context:
            return
        if self._proposing + self._proposal_cost(index) > options.compute * self.step:
            return
        window = self._window
        if opens:
            window = self._open(index)
        strength = arm.strength * self._scale
        proposal = self._propose(index, self._ahead, strength)
        self._proposing += proposal.cost
        size = float(proposal.move_D.norm())
        if size == 0 and (self._bandit is None or now):
            return  # there is no past yet to go on from, or nothing that a gate could judge
        entry = Entry(
            step=self.step,
            predictor=arm.name,
            strength=strength,
            ahead=self._ahead,
            length=size / max(self._pace_length(), 1e-30),
            displacement_cosine=cosine,
            cost=proposal.cost,
        )
        self.entries.append(entry)
        if not isfinite(size):
            arm.predictor.rejected()
            self._settle(entry, "rejected", "the forecast is not finite")
            return
        if now:
            self._judge_now(entry, index, proposal)
            return
        if size == 0:  # the arm "no leap" does nothing at all, and there is nothing to watch
            self._last_move = None
        elif look:
            judged = self._try(entry, arm, proposal, "strict")
            if not judged.kept:
                if self._bandit is not None:
                    self._bandit.reward(index, -1)
                self._settle(entry, "rejected", f"first look: {judged.reason}")
                return
        else:
            self._trained.add(proposal.move_D)
            self._made(proposal)
        if window is None:
            self._settle(entry, "unverified", "no gate")
        else:
            self._window = window
            window.entries.append(len(self.entries) - 1)

    def _proposal_cost(self, index: int) -> float:
        """Of the next proposal of an arm, in training steps; 0 where nothing is known before the first."""
        known = self._arms[index].predictor.operations(self._trained.layout, self._trained.tables)
        last = self._proposal_costs.get(index, 0.0)  # with the gradients it took
        if known == 0 or (known is not None and self._step_flops is not None):
            return max(last, known / (self._step_flops or 1.0))
        return last

    def _propose(self, index: int, ahead: int, strength: float) -> Proposal:
        """A proposal, and its cost in training steps: by operations where a step's are known, else by the clock."""
        predictor = self._arms[index].predictor
        known = predictor.operations(self._trained.layout, self._trained.tables)
        if known == 0 or (known is not None and self._step_flops is not None):
            proposal = predictor.propose(self._seen(), ahead, strength)
            own = known / (self._step_flops or 1.0)
        elif self._step_flops is None:
            began = perf_counter()
            proposal = predictor.propose(self._seen(), ahead, strength)
            own = (perf_counter() - began) / self._seconds if self._seconds else 0.0
            own = mean_over_processes([own], self._trained.device)[0]  # all are to leap alike
        elif index not in self._proposal_costs:
            with FlopCounterMode(display=False) as counter:
                proposal = predictor.propose(self._seen(), ahead, strength)
            own = counter.get_total_flops() / self._step_flops
        else:
            proposal = predictor.propose(self._seen(), ahead, strength)
            own = self._proposal_costs[index] - proposal.cost
        self._proposal_costs[index] = own + proposal.cost
        return replace(proposal, cost=own + proposal.cost)

    def _made(self, proposal: Proposal) -> None:
        """The weights have leapt: the average and the past move with them."""
        if proposal.average:
            self._average.add(proposal.move_D)
        for _, point_D in self._points:
            point_D.add_(proposal.move_D)
        self._points[-1] = (self.step, self._trained.read())  # exact, where narrower tensors were rounded
        self._last_move = proposal.move_D
        self._slopes.clear()
        if self.options.moments != "keep":
            self._weaken_moments(0.0 if self.options.moments == "reset" else 0.5)

    def _judge_now(self, entry: Entry, index: int, proposal: Proposal) -> None:
        """An immediate gate's verdict, and what the leap was worth."""
        judged = self._try(entry, self._arms[index], proposal, self.options.gate)
        self._learn_pace(judged.before)
        entry.equivalent_steps = self._worth(judged.before - judged.after) if isfinite(judged.after) else None
        if self._bandit is not None and entry.equivalent_steps is not None:
            gained = entry.equivalent_steps if judged.kept else 0.0
            self._bandit.reward(index, (gained - entry.cost) / (self.options.every * self.options.period))
        self._settle(entry, "accepted" if judged.kept else "rejected", judged.reason)

    def _try(self, entry: Entry, arm: Arm, proposal: Proposal, gate: Gate) -> Judged:
        """Leap, and take it back at once where the gate says so; or where judging fails."""
        own = [tensor.detach().clone() for tensor in self._trained.tensors]
        kept = False
        try:
            before_N, before = self._measure()
            self._trained.add(proposal.move_D)
            after_N, after = self._measure()
            judged = immediate(gate, before_N, after_N, self._losses, self.options.tolerance)
            judged = replace(judged, similarity=_similarity(before, after))
            kept = judged.kept
        except BaseException:
            self._settle(entry, "rejected", "the verification failed")
            raise
        finally:
            if not kept:
                with torch.no_grad():
                    foreach_copy(self._trained.tensors, own)
                arm.predictor.rejected()
        self._draw += 1
        self._pay(entry)
        self._note(entry, judged)
        if kept:
            self._made(proposal)
        return judged

    # ---------------------------------------------------------------- windows

    def _open(self, arm: int) -> _Window:
        """Keep everything as it is now: this is where a window that is lost goes back to."""
        return _Window(
            start=self.step,
            saved=Saved.of(self._model, self._optimizers),
            average=self._average.state(),
            predictors=self._remembered(),
            point_D=self._points[-1][1].clone(),
            entries=[],
            arm=arm,
        )

    def _verdict(self) -> None:
        """What the window came to; then it is kept, or gone back on."""
        window = self._window
        assert window is not None
        try:
            judged = self._judge_heard(window) if self._heard is not None else self._judge_average(window)
        except BaseException:
            self.retreat("the verification failed")
            raise
        self._pay(*self._entries_of(window))
        if not judged.kept:
            self._roll_back(judged)
            return
        self._window = None
        pace = (judged.before - judged.after) / max(1, self.step - window.start)
        usual = fmean(self._paces[-5:]) if self._paces else None
        if self._bandit is not None and usual:
            self._bandit.reward(window.arm, (pace - usual) / abs(usual))
        self._paces.append(pace)
        self._lost = 0
        self._trusted.add(window.arm)
        self._close(window, judged, "accepted")

    def _judge_average(self, window: _Window) -> Judged:
        """By the running average, on fresh batches."""
        with self._average.instead():
            after_N, after = self._measure()
        now = self._average.state()
        self._average.restore(window.average)
        try:
            with self._average.instead():
                before_N, before = self._measure()
        finally:
            self._average.restore(now)
        self._draw += 1
        return replace(delayed(before_N, after_N, self.options.margin), similarity=_similarity(before, after))

    def _judge_heard(self, window: _Window) -> Judged:
        """By the training's own losses: those of the window's later half, and as many from before it."""
        assert self._heard is not None
        middle = window.start + (self.step - window.start) // 2
        after = [value for step, value in self._heard if step > middle]
        before = [value for step, value in self._heard if step <= window.start][-len(after) :]
        losses = mean_over_processes([float(value) for value in (*before, *after)], self._trained.device)
        return heard(losses[: len(before)], losses[len(before) :], self.options.margin)

    def _roll_back(self, judged: Judged) -> None:
        window, self._window = self._window, None
        assert window is not None
        window.saved.restore(self._model, self._optimizers)
        self._average.restore(window.average)
        for arm, state in zip(self._arms, window.predictors, strict=True):
            arm.predictor.restore(state)
        self._points.clear()
        self._points.append((self.step, window.point_D))
        self._last_move = None
        self._slopes.clear()
        if self._heard is not None:
            while self._heard and self._heard[-1][0] > window.start:
                self._heard.pop()
        self._lost += 1
        self._scale /= 2
        self._off = self._lost >= self.options.patience
        self._trusted.clear()
        if self._bandit is not None:
            self._bandit.reward(window.arm, -1)
        self.entries[window.entries[0]].lost_steps = self.step - window.start
        self._close(window, judged, "rolled back")

    def _close(self, window: _Window, judged: Judged, verdict: Verdict) -> None:
        for entry in self._entries_of(window):
            self._note(entry, judged)
            self._settle(entry, verdict, judged.reason)

    def _note(self, entry: Entry, judged: Judged) -> None:
        entry.loss_before, entry.loss_after, entry.verdict_step = judged.before, judged.after, self.step
        entry.activation_cosine = judged.similarity

    def _entries_of(self, window: _Window) -> list[Entry]:
        return [self.entries[index] for index in window.entries]

    def _settle(self, entry: Entry, verdict: Verdict, reason: str) -> None:
        entry.verdict, entry.reason = verdict, reason
        self._told(entry)

    # ----------------------------------------------------------- measurements

    def _measure(self) -> tuple[list[float], np.ndarray | None]:
        """Losses on the batches of the draw, and the network's fingerprint on them."""
        assert self._validation is not None
        device = self._trained.device
        losses: list[float] = []
        error: Exception | None = None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                losses = self._validation.losses(self._model, self._draw)
            except Exception as caught:
                if processes() == 1:
                    raise
                error = caught
        if processes() > 1 and max(mean_over_processes([float(error is not None)], device)) > 0:
            raise error or FarcliError("leap: the verification failed in another process.")
        *losses, self._unit = mean_over_processes([*losses, self._validation.cost], device)
        return losses, self._validation.fingerprint

    def _pay(self, *entries: Entry) -> None:
        """Charge one verification, shared by the entries it judged."""
        cost = self._pair_cost()
        self.verification += cost
        for entry in entries:
            entry.cost += cost / len(entries)

    def _pair_cost(self) -> float:
        """Of verifying once, in training steps: two measurements, as the last one was; the same in all processes."""
        return 2 * self._unit

    def _affordable(self) -> bool:
        return self.verification + self._pair_cost() <= self.options.budget * self.step

    def _learn_pace(self, loss: float) -> None:
        """How fast loss falls, from what immediate gates measured before their leaps."""
        if self._losses and isfinite(loss):
            steps = max(1, self.step - self._measured_at)
            self._paces.append((self._losses[-1] - loss) / steps)
        self._losses.append(loss)
        self._measured_at = self.step

    def _worth(self, gain: float) -> float | None:
        """What a fall of the loss is worth in steps, at the mean pace of the last measurements."""
        pace = fmean(self._paces[-5:]) if self._paces else 0.0
        return gain / pace if pace > 0 else None

    def _cosine(self) -> float | None:
        """Between training's last two displacements."""
        if len(self._points) < 3:
            return None
        (_, first), (_, second), (_, third) = list(self._points)[-3:]
        before_D, last_D = second - first, third - second
        norms = float(before_D.norm() * last_D.norm())
        return float(before_D @ last_D) / norms if norms > 0 else None

    def _pace_length(self) -> float:
        return float((self._points[-1][1] - self._points[-2][1]).norm()) if len(self._points) > 1 else 0.0

    def _seen(self) -> Observed:
        return Observed(
            steps_C=tuple(step for step, _ in self._points),
            weights_CD=[point_D for _, point_D in self._points],
            average_D=self._average.weights_D,
            layout=self._trained.layout,
            tables=self._trained.tables,
            rate=self._trained.rate,
            moments=self._trained.moments,
            gradient=self._gradient,
        )

    def _gradient(self, weights_D: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient on the next fresh batch, at weights that are not the network's."""
        assert self._fresh is not None
        own = Saved.of(self._model, ())
        grads = [tensor.grad for tensor in self._trained.tensors]
        try:
            self._trained.write(weights_D)
            for tensor in self._trained.tensors:
                tensor.grad = None
            loss = self._fresh()
            loss.backward()
            return float(loss.detach()), self._trained.gradients()
        finally:
            own.restore(self._model, ())
            for tensor, grad in zip(self._trained.tensors, grads, strict=True):
                tensor.grad = grad

    # --------------------------------------------------------------- watching

    def _watch(self) -> None:
        """See whether the loss rises along the leaps made: free, since training's own gradients say so.

        The slopes are inner products of the last leap with the gradients of the batches after it. Where their mean,
        in standard errors, is above `watch` on average over four leaps, leaps become half as long, and end below an
        eighth.

        Source: ours; the derivative is that of hypergradient descent (Baydin et al., arXiv 1703.04782).
        """
        slopes, self._slopes = [each for each in self._slopes if isfinite(each)], []
        if not self.options.watch or len(slopes) < 3:
            return
        self._rises.append(fmean(slopes) / max(stdev(slopes) / sqrt(len(slopes)), 1e-30))
        self._last_move = None  # a leap is looked at once
        if len(self._rises) == self._rises.maxlen and fmean(self._rises) > self.options.watch:
            self._rises.clear()
            self._scale /= 2
            self._off = self._off or self._scale < 1 / 8

    @torch.no_grad()
    def _weaken_moments(self, share: float) -> None:
        for optimizer in self._optimizers:
            for state in optimizer.state.values():
                for name in ("exp_avg", "momentum_buffer"):
                    if isinstance(state.get(name), Tensor):
                        state[name].mul_(share)

    # ------------------------------------------------------------------ state

    def _remembered(self) -> list[dict[str, Tensor]]:
        return [{key: each.clone() for key, each in arm.predictor.state().items()} for arm in self._arms]

    def state_dict(self) -> dict[str, Any]:
        """All that leaping goes on from after a checkpoint, next to the model's and the optimiser's own state."""
        window = self._window
        return {
            "step": self.step,
            "verification": self.verification,
            "draw": self._draw,
            "scale": self._scale,
            "lost": self._lost,
            "off": self._off,
            "trusted": sorted(self._trusted),
            "losses": list(self._losses),
            "measured_at": self._measured_at,
            "paces": list(self._paces),
            "highest": self._highest,
            "slopes": list(self._slopes),
            "rises": list(self._rises),
            "proposing": self._proposing,
            "proposal_costs": dict(self._proposal_costs),
            "last_move": None if self._last_move is None else self._last_move.clone(),
            "points": [(step, point_D.clone()) for step, point_D in self._points],
            "average": self._average.state(),
            "predictors": self._remembered(),
            "bandit": None if self._bandit is None else self._bandit.state(),
            "entries": [entry.row() for entry in self.entries],
            "unit": self._unit,
            "heard": [(step, float(value)) for step, value in self._heard or ()],
            "window": None
            if window is None
            else {
                "start": window.start,
                "values": window.saved.values,
                "states": window.saved.states,
                "average": window.average,
                "predictors": window.predictors,
                "point": window.point_D,
                "entries": list(window.entries),
                "arm": window.arm,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; load the model's and the optimiser's own state as well.

        Raises:
            UsageError: it is of another network, or of other predictors.
        """
        sizes = {point_D.numel() for _, point_D in state["points"]}
        if sizes != {self._trained.layout.size} or len(state["predictors"]) != len(self._arms):
            raise UsageError(
                f"leap: the saved state is of {sorted(sizes)} parameters and {len(state['predictors'])} predictors, "
                f"expected {self._trained.layout.size} and {len(self._arms)}."
            )
        self.step, self.verification, self._draw = state["step"], state["verification"], state["draw"]
        self._scale, self._lost, self._off = state["scale"], state["lost"], state["off"]
        self._trusted = set(state["trusted"])
        self._losses, self._paces, self._slopes = list(state["losses"]), list(state["paces"]), list(state["slopes"])
        self._proposing = state["proposing"]
        self._proposal_costs = dict(state.get("proposal_costs", {}))
        self._rises.clear()
        self._rises.extend(state["rises"])
        self._highest, self._measured_at = state["highest"], state["measured_at"]
        self._last_move = None if state["last_move"] is None else self._here(state["last_move"])
        self._points.clear()
        self._points.extend((step, self._here(point_D)) for step, point_D in state["points"])
        self._average.restore(state["average"])
        self._unit = state["unit"]
        if self._heard is not None:
            self._heard.clear()
            self._heard.extend(state["heard"])
        for arm, remembered in zip(self._arms, state["predictors"], strict=True):
            arm.predictor.restore({key: self._here(each) for key, each in remembered.items()})
        if self._bandit is not None:
            self._bandit.restore(state["bandit"])
        self.entries = [Entry(**row) for row in state["entries"]]
        window = state["window"]
        self._window = window and _Window(
            start=window["start"],
            saved=Saved(window["values"], window["states"]),
            average=window["average"],
            predictors=[{key: self._here(each) for key, each in one.items()} for one in window["predictors"]],
            point_D=self._here(window["point"]),
            entries=list(window["entries"]),
            arm=window["arm"],
        )

    def _here(self, tensor: Tensor) -> Tensor:
        """A copy where the weights are: checkpoints are often loaded on the CPU."""
        return tensor.to(self._trained.device, copy=True)
