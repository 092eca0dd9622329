"""The recorder inside an unmodified script: torch's global step hooks, the end of the process, its signals.

Imported by the injected `sitecustomize` while torch is being imported, so this module imports neither torch nor
anything heavy; what needs them is imported at the first optimiser step.
"""

import atexit
import glob
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from farcli.recording.messages import say, stopped
from farcli.recording.plan import VARIABLE, Plan

if TYPE_CHECKING:
    from torch import nn

    from farcli.recording.recorder import Recording

_EXIT_SECONDS = 20.0
"""How long processes with sharded weights wait for each other at the end."""
_ROOT_SPEAKS = "FARCLI_RECORD_ROOT_SPEAKS"
"""Environment variable that tells processes of a command that the first one will say if nothing was recorded."""
_session: "Session | None" = None


class Companion(Protocol):
    """What works beside a recording, on the training itself: leaping, which this package knows nothing of."""

    def after(self, optimizer: Any) -> None:
        """An outermost step has ended, its snapshot has not been taken yet."""
        ...

    def end(self, *, orderly: bool) -> None:
        """The training is over, its last snapshot is taken; the store is still open."""
        ...


class Companions(Protocol):
    """Makes them."""

    def __call__(self, plan: Plan, recording: "Recording", roots: Sequence["nn.Module"]) -> Companion:
        """A companion of a recording of the training of some networks."""
        ...

    def steps_taken(self, plan: Plan, path: Path, roots: Sequence["nn.Module"]) -> int | None:
        """Steps a resumed training has behind it, where a companion knows: the optimiser's count may be set back."""
        ...


def install(module: Any, companions: Callable[[], Companions]) -> None:
    """Hook into `torch.optim.optimizer`, which has just been imported.

    Args:
        module: it.
        companions: gives what makes a companion, where the plan asks for one.
    """
    session = _the_session()
    session.companions = companions
    from torch._compile import _disable_dynamo

    # Kept out of graphs: `torch.compile` may be put round `optimizer.step`. (The wrapper is cached in an attribute
    # of the function, which a bound method cannot take.)
    @_disable_dynamo
    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        session.before(optimizer)

    @_disable_dynamo
    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        session.after(optimizer)

    module.register_optimizer_step_pre_hook(before)
    module.register_optimizer_step_post_hook(after)
    session.torch_is_here = True


def watch_root() -> None:
    """This process is the command itself: if nothing is recorded, it is the one to say so."""
    _the_session().is_root = True
    os.environ[_ROOT_SPEAKS] = "1"


def watch_process_group(module: Any) -> None:
    """Take the last snapshot of sharded weights before the process group that can read them goes away."""
    destroy = module.destroy_process_group

    def destroy_process_group(group: Any = None) -> Any:
        if _session is not None and group in (None, module.GroupMember.WORLD):
            _session.group_ends()
        return destroy(group)

    destroy_process_group.__doc__ = destroy.__doc__
    module.destroy_process_group = destroy_process_group


def _the_session() -> "Session":
    global _session  # noqa: PLW0603 - there is one interpreter to hook into
    if _session is None:
        _session = Session(Plan.from_json(os.environ[VARIABLE]))
    return _session


class Session:
    """All that a process of a recorded command knows.

    Attributes:
        is_root: whether this process is the command itself.
        torch_is_here: whether torch's optimisers were imported.
        companions: gives what makes a companion of a recording.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.is_root = False
        self.torch_is_here = False
        self.companions: Callable[[], Companions] | None = None
        self._recording: Recording | None = None
        self._companion: Companion | None = None
        self._past: weakref.WeakSet[Any] = weakref.WeakSet()
        """Optimisers of trainings that are over."""
        self._off = False
        self._speaks = True
        """Whether errors are said here: what goes wrong alike in all processes is said once."""
        self._recorded: list[tuple[Path, int]] = []
        self._warned: set[str] = set()
        self._outermost: Any = None
        self._signal: int | None = None
        self._exit_status: Any = None
        self._fatal = False
        self._deadline = plan.until
        self._pid = os.getpid()
        atexit.register(self._leave)  # first in, last out
        # Earlier than atexit, while threads can still be joined; also run by children of multiprocessing.
        getattr(threading, "_register_atexit", atexit.register)(self._end)
        os.register_at_fork(after_in_child=self._forked)
        self._watch_exit()

    # ------------------------------------------------------------------ steps

    def before(self, optimizer: Any) -> None:
        """Hook in front of every optimiser's step."""
        if self._off:
            return
        if self._outermost is None:
            from farcli.recording.recorder import Outermost

            self._outermost = Outermost()
        if self._outermost.enter():
            self._careful(self._begin, optimizer)

    def after(self, optimizer: Any) -> None:
        """Hook behind every optimiser's step."""
        if self._outermost is None:
            return
        try:
            recording = self._recording
            if not self._off and recording is not None and self._outermost.ends() and recording.knows(optimizer):
                if self._companion is not None:
                    self._companion.after(optimizer)  # a snapshot is of the weights that training goes on from
                self._careful(recording.after, optimizer)
        finally:
            self._outermost.leave()
        if self._signal is not None:
            self._die(self._signal)
        if self._deadline is not None and time.time() > self._deadline:
            self._deadline = None
            say("--time-limit is reached: the training gets SIGTERM.")
            os.kill(self._pid, signal.SIGTERM)  # a script that handles it saves its own state

    def _begin(self, optimizer: Any) -> None:
        self._exit_status = None
        recording = self._recording
        if recording is not None and not recording.knows(optimizer):
            if recording.owns(optimizer):
                recording.join(optimizer)
            elif optimizer in self._past:
                self._warn("an earlier training goes on beside a later one; its steps are not recorded any more")
                return
            else:
                self._close(finish=True)
                recording = None
        if recording is None:
            recording = self._recording = self._start(optimizer)
        if recording is not None:
            recording.before(optimizer)

    def _start(self, optimizer: Any) -> "Recording | None":
        from farcli.recording import names
        from farcli.recording.recorder import Recording, process_count, process_rank
        from farcli.recording.regions import any_says_so

        if optimizer in self._past:
            return None
        rank = process_rank()
        path = Path(self.plan.output.replace("{rank}", str(rank)))
        self._speaks = writes = rank == 0 or "{rank}" in self.plan.output
        live = [each for each in names.live_optimizers() if each not in self._past and _hooked(each)]
        optimizers = [optimizer, *(each for each in live if each is not optimizer)]
        roots = names.find_roots(optimizers)
        places = names.name_tensors(optimizers, roots, names.calling_frame())
        sharded = any(names.is_sharded(place.tensor()) for place in places)
        if sharded:
            self._speaks, writes = True, rank == 0
        if not (writes or sharded or self.plan.leap):
            self._off = True
            return None
        together = bool(self.plan.leap) and not sharded and process_count() > 1
        companions = self.companions() if self.plan.leap and self.companions is not None else None
        plan = self.plan
        try:
            if companions is not None and plan.start_step is None and not sharded:
                plan = replace(plan, start_step=companions.steps_taken(plan, path, roots))
            recording = Recording(
                plan,
                places,
                optimizers,
                path,
                writes=writes,
                exclusive=False,
                door="command",
                header={"leap": self.plan.leap} if self.plan.leap else None,
                on_error=self._failed,
            )
        except Exception:
            if together:
                any_says_so(True)
            raise
        if together and any_says_so(False):  # who leaps without the others waits for them for ever
            self._off = True
            return None
        if writes:
            self._recorded.append((recording.path, 0))
        if not sharded:
            for root in roots:
                # A network that nobody holds any more is let go of at once, as without us.
                weakref.finalize(names.unwrapped(root), self._gone, weakref.ref(recording)).atexit = False
        self._handle_signals()
        if companions is not None:
            self._companion = companions(plan, recording, roots)
        return recording

    # ----------------------------------------------------------------- errors

    def _careful(self, work: Callable[..., None], *words: Any) -> None:
        """Do work of ours; no error of it reaches the training, unless that was asked for."""
        try:
            work(*words)
        except Exception as error:
            if self._recording is not None:
                self._recording.fail(error)
                # Other processes read shards, or leap, together with this one: it goes on, without its store.
                if not self._recording.sharded and self._companion is None:
                    self._off = True
            else:
                self._failed(error)
                self._off = True
        if self._fatal and self.plan.strict and sys.exc_info()[0] is None:
            self._off = True
            raise RuntimeError("farcli record --strict: recording failed")

    def _failed(self, error: Exception) -> None:
        self._fatal = True
        text = stopped(error)
        if self._speaks:
            say(text.replace("the training goes on", "--strict ends the training") if self.plan.strict else text)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            say(f"{text}.")

    # -------------------------------------------------------------------- end

    def group_ends(self) -> None:
        """The process group is about to be destroyed; every process comes here."""
        if self._recording is not None and self._recording.sharded:
            self._careful(self._recording.settle)

    def _gone(self, ref: "weakref.ref[Recording]") -> None:
        recording = ref()
        if recording is not None and recording is self._recording and not self._off:
            self._careful(recording.settle)
            self._part(orderly=True)

    def _part(self, *, orderly: bool) -> None:
        companion, self._companion = self._companion, None
        if companion is not None:
            companion.end(orderly=orderly)

    def _close(self, *, finish: bool) -> None:
        recording, self._recording = self._recording, None
        if recording is None:
            return
        self._past.update(recording.optimizers)
        try:
            recording.settle(alone=recording.sharded and not self._together())
        finally:
            self._part(orderly=finish)
            recording.close(finish=finish)

    def _together(self) -> bool:
        """Whether all processes have come to their end, so that sharded weights can be read once more."""
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_initialized():
            return False
        try:
            store = distributed.distributed_c10d._get_default_store()
            key = f"farcli/{self.plan.session}/end"
            store.set_timeout(timedelta(seconds=_EXIT_SECONDS))
            store.add(key, 1)
            until = time.monotonic() + _EXIT_SECONDS
            while store.add(key, 0) < distributed.get_world_size():
                if time.monotonic() > until:
                    return False
                time.sleep(0.01)
        except Exception:  # the other end of the store may be gone already
            return False
        return True

    def _end(self) -> None:
        """The interpreter is about to end: the last snapshot, and the sentence where there was none."""
        if os.getpid() != self._pid:
            return
        if self._signal is not None:
            self._die(self._signal)
        crashed = getattr(sys, "last_value", None) is not None or self._exit_status not in (None, 0, False)
        self._careful_at_end(finish=not crashed)
        self._off = True
        if not self._recorded and not self._fatal and self._should_speak():
            say(f"no optimiser ran that could be recorded: {self.plan.output} was not written.")
            self._fatal = True

    def _careful_at_end(self, *, finish: bool) -> None:
        try:
            self._close(finish=finish)
        except Exception as error:
            self._failed(error)

    def _should_speak(self) -> bool:
        """Whether it is for this process to say that nothing was recorded."""
        if not self.is_root:
            helper = "multiprocessing.spawn" in sys.modules and _is_child()
            if helper or not self.torch_is_here or os.environ.get(_ROOT_SPEAKS):
                return False
        stem, suffix = os.path.splitext(self.plan.output)
        pattern = glob.escape(stem).replace("{rank}", "*") + "*" + glob.escape(suffix)
        for path in glob.glob(pattern):
            record = os.path.join(path, "weights", "zarr.json")
            if os.path.exists(record) and os.path.getmtime(record) >= self.plan.started - 2:
                return False
        return True

    def _leave(self) -> None:
        """The very last: give a failed recording its exit code, where --strict asked for one."""
        if not (self._fatal and self.plan.strict and os.getpid() == self._pid):
            return
        if self._exit_status in (None, 0) and getattr(sys, "last_value", None) is None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _watch_exit(self) -> None:
        """Remember the status given to `sys.exit`: a training that says it failed is not finished."""
        leave = sys.exit

        def exit_(status: Any = None, /) -> Any:
            self._exit_status = status
            return leave(status)

        exit_.__doc__, exit_.__name__ = leave.__doc__, leave.__name__
        sys.exit = exit_

    # ---------------------------------------------------- processes, signals

    def _forked(self) -> None:
        """A forked child (a data loader's worker) has nothing to do with the parent's recording."""
        self._pid = os.getpid()
        self._recording = self._companion = None
        self._recorded = []
        self._outermost = None
        self._signal = None
        self.is_root = self.torch_is_here = False

    def _handle_signals(self) -> None:
        """Where the script lets SIGTERM or SIGUSR1 kill it, save first and die of them then."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._pid and self._outermost is not None and self._outermost.stepping:
            self._signal = number  # weights are half updated: the end of the step comes first
            return
        self._die(number)

    def _die(self, number: int) -> None:
        if os.getpid() == self._pid and self._recording is not None:
            recording, self._recording = self._recording, None
            self._off = True
            try:
                recording.settle(alone=True)
            except Exception as error:
                self._failed(error)
            self._part(orderly=False)
            try:
                writes = recording.home is not None
                recording.close(finish=False)
                if writes:
                    say(f"{recording.path}: stopped by signal {number}; saved up to step {recording.step}.")
            except Exception as error:
                self._failed(error)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _hooked(optimizer: Any) -> bool:
    """Whether an optimiser is torch's own kind; wrappers (accelerate) hold one that is."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


def _is_child() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None
