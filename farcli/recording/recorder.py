"""The recorder: counts optimiser steps, takes a snapshot when one is due, and the last one at the end."""

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Literal, cast

import torch
from torch import nn

from farcli.errors import FarcliError, UsageError
from farcli.layout import Layout
from farcli.provenance import provenance
from farcli.recording.background import Background, Buffer
from farcli.recording.messages import say, stopped
from farcli.recording.names import Place, is_sharded, name_tensors, places_of, skipped, step_base, tensors_of
from farcli.recording.picture import Picture, moments_of
from farcli.recording.plan import Plan
from farcli.recording.regions import FirstPart, OtherPart, Region, agree, any_says_so, spread
from farcli.store import Trajectory, TrajectoryWriter, is_store
from farcli.store.disk import Sync

MOMENTS = "optimizer.zarr"
"""Store inside a store: the moments of `--with-optimizer`."""


class Outermost:
    """Tells the steps a training takes from those that optimisers take within another's step.

    ZeRO, Lookahead, SAM and a class that calls `super().step()` step inside a step. Depth is not counted: an
    exception leaves a step without the hook behind it. A step counts as open while its frame is running.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def _open(self) -> list[FrameType]:
        if not hasattr(self._local, "frames"):
            self._local.frames = []
        return self._local.frames

    @property
    def stepping(self) -> bool:
        """Whether this thread is within a step."""
        return bool(self._open)

    def enter(self) -> bool:
        """A step begins; whether it is an outermost one."""
        frames = self._open
        frame = _step_frame()
        if frames:
            running = set()
            each: FrameType | None = frame.f_back
            while each is not None:
                running.add(each)
                each = each.f_back
            frames[:] = [known for known in frames if known in running]
        frames.append(frame)
        return len(frames) == 1

    def ends(self) -> bool:
        """Whether the step that is ending is an outermost one; `leave` must follow."""
        return len(self._open) == 1

    def leave(self) -> None:
        """The step has ended."""
        if self._open:
            self._open.pop()


def _step_frame() -> FrameType:
    """The frame of torch's wrapper round `step`, which has called our hook."""
    frame = sys._getframe(2)
    first = frame
    for _ in range(12):
        if frame.f_code.co_filename.endswith("optimizer.py"):
            return frame
        if frame.f_back is None:
            break
        frame = frame.f_back
    return first


class Recording:
    """One training of one network (or of several side by side) on its way into one store.

    Args:
        plan: what to record.
        places: where the network's tensors are.
        optimizers: those that train it.
        path: of the store.
        writes: whether this process writes; others only help to read what is spread over processes.
        exclusive: whether an existing store is an error; else a number is put behind the name.
        door: how the recorder was started, for the header.
        header: more for the header.
        on_error: called once, with the error that ended the recording.

    Attributes:
        path: of the store, once it is open.
        step: optimiser steps taken.
        failed: whether an error has ended the recording.
    """

    def __init__(
        self,
        plan: Plan,
        places: Sequence[Place],
        optimizers: Sequence[Any],
        path: Path,
        *,
        writes: bool,
        exclusive: bool,
        door: str,
        header: Mapping[str, Any] | None,
        on_error: Callable[[Exception], None],
    ) -> None:
        self.path = path
        self.failed = False
        self._plan = plan
        self._schedule = plan.schedule()
        self._places = list(places)
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._writes = writes
        self._exclusive = exclusive
        self._header = {**(header or {}), "recording": {"door": door, "snapshots": plan.spacing()}}
        if plan.dtype == "bfloat16":
            self._header["recording"]["rounded"] = plan.dtype
        if plan.session:
            self._header["recording"]["session"] = plan.session
        self._on_error = on_error
        self._trained = {id(tensor) for tensor in tensors_of(optimizers)}
        base = step_base(optimizers) if plan.start_step is None else plan.start_step
        self._header["recording"]["start_step"] = self.step = base
        self._counts: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary(dict.fromkeys(optimizers, base))
        self._several = len(independent(optimizers)) > 1
        self._pending: int | None = None
        self._sink: Background | None = None
        self._moments: Background | None = None
        self._moments_picture: Picture | None = None
        self._last: Buffer | None = None
        """What was handed over last; stays as it is until the next but one."""
        self._newest: int | None = None
        """Step of the last snapshot, equal in all processes, whether or not it could be stored."""
        self._groups: list[dict[str, Any]] = []
        self._taken = 0
        self._captured = False
        self._settled = False
        self.loss: float | None = None
        self._began = monotonic()
        self._picture = Picture(self._places, optimizers, plan)
        for sentence in self._picture.skipped:
            say(f"{sentence}.")
        self._limit = self._most_snapshots()
        self._shared = self._picture.sharded and spread(self._places)
        """Whether all processes write, each its part."""
        if writes or self._shared:
            try:
                self._open_store()
            except Exception as error:
                if not self._picture.sharded:
                    raise
                self.fail(error)  # the other processes go on reading together, and would wait for this one for ever
        self._take(base)

    # ------------------------------------------------------------------ steps

    def knows(self, optimizer: Any) -> bool:
        """Whether an optimiser's steps are counted here."""
        return optimizer in self._counts

    def owns(self, optimizer: Any) -> bool:
        """Whether an optimiser trains only tensors of this recording."""
        return {id(tensor) for tensor in tensors_of([optimizer])} <= {id(place.tensor()) for place in self._places}

    def join(self, optimizer: Any) -> None:
        """Count another optimiser of the same network from here on: a new phase of the training."""
        self._counts[optimizer] = self.step
        self._optimizers.append(weakref.ref(optimizer))

    @property
    def optimizers(self) -> list[Any]:
        """The optimisers that are still alive."""
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    @property
    def home(self) -> Path | None:
        """The folder that holds the store while it is written; None where this process writes none."""
        return self._sink.writer.home if self._writes and self._sink is not None else None

    @property
    def sharded(self) -> bool:
        """Whether snapshots need all processes."""
        return self._picture.sharded

    def before(self, optimizer: Any) -> None:
        """An optimiser is about to step."""
        if self._pending is not None and self._counts[optimizer] + 1 > self.step:
            # With several optimisers a step is complete when the next one begins, whoever begins it.
            step, self._pending = self._pending, None
            self._take(step)

    def after(self, optimizer: Any) -> None:
        """An optimiser has stepped."""
        if skipped(optimizer):
            return
        if captured():
            # What is captured runs later, over and over, without us; a copy now would become a part of it.
            if not self._captured:
                self._captured = True
                say(
                    f"{self.path}: the training step is captured in a CUDA graph, whose replays cannot be counted: "
                    "only the first and the last snapshot are recorded. Leave optimizer.step() out of the graph."
                )
            return
        self._counts[optimizer] += 1
        if self._counts[optimizer] > self.step:
            self.step = self._counts[optimizer]
            if self._schedule.due(self.step):
                if self._several:
                    self._pending = self.step
                else:
                    self._take(self.step)

    # -------------------------------------------------------------------- end

    def settle(self, *, alone: bool = False) -> None:
        """Take the last snapshot, of the weights as they are, and let go of the network.

        Args:
            alone: other processes may not be here: do nothing that needs them.
        """
        if self._settled:
            return
        self._settled = True
        self._pending = None
        try:
            if self._picture.sharded and alone:
                if self._sink is not None:
                    self._sink.hurry()
                return
            try:
                self._picture.tensors()
            except FarcliError as error:  # rounded to be saved, say: what was recorded before is whole
                if self._writes and not self.failed:
                    say(f"{self.path}: {error} Its last snapshot is of step {self._newest}, before that.")
                return
            if self._newest != self.step:
                self._take(self.step, last=True)
            else:
                self._replace_last()
        finally:
            self._places.clear()
            self._groups.clear()
            self._picture.release()

    def close(self, *, finish: bool) -> None:
        """Write what is left and close the store; a finished one cannot be resumed, an unfinished one can."""
        for sink in (self._moments, self._sink):  # the inner store first: finishing may rename the outer one
            if sink is not None:
                sink.close(finish=finish and not self.failed)
        self._moments = self._sink = None

    @property
    def snapshots(self) -> int:
        """Snapshots taken by this process."""
        return self._taken

    def fail(self, error: Exception) -> None:
        """End the recording; where weights are spread over processes, go on helping to read them."""
        if not self.failed:
            self.failed = True
            part = self._sink.writer if self._sink is not None else None
            if not (isinstance(part, OtherPart) and part.tell(error)):
                self._on_error(error)

    # -------------------------------------------------------------- snapshots

    def _most_snapshots(self) -> int | None:
        if self._plan.max_bytes is None:
            return None
        each = self._picture.nbytes * (3 if self._plan.with_optimizer else 1)
        if each * 2 > self._plan.max_bytes:
            raise UsageError(
                f"--max-bytes {self._plan.max_bytes}: is less than the first and the last snapshot, {2 * each} bytes."
            )
        return self._plan.max_bytes // each

    def _take(self, step: int, *, last: bool = False) -> None:
        if self._limit is not None and not last and self._taken >= self._limit - 1:
            if self._taken == self._limit - 1:
                self._taken += 1
                if self._writes:
                    say(f"{self.path}: --max-bytes is reached at step {step}; only the last snapshot is still to come.")
            return
        self._taken += 1
        self._newest = step
        if self._sink is not None and not self.failed:
            name = self._picture.thawed(thorough=last)
            if name is not None and not self.sharded:
                self._start_over(name, step)
        stores = self._sink is not None and not self.failed
        if self._plan.with_optimizer and (stores or self.sharded):
            self._take_moments(step)
        if self._sink is not None and stores:
            self._last = self._submit(self._sink, self._picture, step)
        elif self.sharded:
            self._picture.gather()

    def _submit(self, sink: Background, picture: Picture, step: int, *, again: bool = False) -> Buffer:
        buffer = sink.take()
        try:
            buffer.ready = picture.copy(buffer.floats, buffer.integers)
        except BaseException:
            sink.put_back(buffer)
            raise
        buffer.note = {"seconds": round(monotonic() - self._began, 6), "lr": self._rates()}
        if self.loss is not None:
            buffer.note["loss"] = self.loss
        sink.submit(step, buffer, again=again)
        return buffer

    def _rates(self) -> list[float | None]:
        """Learning rate of each group; at the end of a function that trains, the optimiser may be gone already."""
        alive = independent(self.optimizers)
        if alive:
            self._groups = [group for optimizer in alive for group in optimizer.param_groups]
        return [_rate(group) for group in self._groups]

    def _replace_last(self) -> None:
        """Store the weights a training ends with, if they are not those it had after its last step.

        Averaged weights may have been swapped in, or BatchNorm have seen more data.
        """
        sink, stored, buffer, differs = self._sink, self._last, None, False
        if sink is not None and stored is not None and not self.failed:
            changed = self._picture.thawed(thorough=True)
            if changed is not None:
                say(f"{self.path}: {changed!r} did not require gradients and changed after the last snapshot.")
            buffer = sink.take()
            buffer.ready = self._picture.copy(buffer.floats, buffer.integers)
            for each in (buffer, stored):
                if each.ready is not None:
                    each.ready.synchronize()
            differs = buffer.differs(stored)
        elif self._picture.sharded:
            self._picture.gather()
        if self._shared:
            differs = any_says_so(differs)  # a snapshot is stored by all or by none
        if sink is not None and buffer is not None and stored is not None:
            if differs:
                buffer.note = dict(stored.note)
                sink.submit(self.step, buffer, again=True)
            else:
                sink.put_back(buffer)

    def _take_moments(self, step: int) -> None:
        if self._moments_picture is None:
            places = moments_of([p for p in self._places if self._plan.selects(p.name)], self.optimizers)
            if not places:
                return  # before the first step there are none
            self._moments_picture = Picture(places, [], Plan(output=self._plan.output), everything=True)
            if self._writes and self._sink is not None:
                self._moments = self._open_moments(self._sink.writer.home, self._moments_picture)
        if self._moments is not None and not self.failed:
            self._submit(self._moments, self._moments_picture, step)
        elif self.sharded:
            self._moments_picture.gather()

    def _open_moments(self, home: Path, picture: Picture) -> Background:
        writer = TrajectoryWriter.create(
            home / MOMENTS,
            picture.layout,
            [0],
            kind="optimizer",
            dtype=str(picture.dtype).removeprefix("torch."),
            sync=cast(Sync, self._plan.sync),
        )
        return Background(writer, picture.buffers, self.fail)

    # ------------------------------------------------------------------ store

    def _open_store(self, *, everything: bool = False) -> None:
        writer: TrajectoryWriter | None = None
        region: Region | None = None
        picture = self._picture
        try:
            if self._writes:
                writer = self._open_writer(everything=everything)
                if picture.once:
                    picture.write_once(writer.home)
        except BaseException:
            if writer is not None:
                writer.close()
            writer = None
            raise
        finally:
            if self._shared:
                region = agree(writer)  # every process must come here, also where there is no store
        try:
            if region is not None:
                picture.region = slice(region.start, region.stop)
                sync = self._plan.sync != "none"
                mine = FirstPart(writer, region) if writer else OtherPart(picture.layout, region, sync=sync)
                self._sink = Background(mine, picture.buffers, self.fail)
            elif writer is not None:
                self._sink = Background(writer, picture.buffers, self.fail)
        except BaseException:
            if writer is not None:
                writer.close()
            raise

    def _open_writer(self, *, everything: bool) -> TrajectoryWriter:
        picture = self._picture
        header = self._header | {"provenance": provenance(**_said(self._plan))}
        if picture.once:
            header["frozen"] = picture.once_header()
        if self._plan.seed is not None:
            header["seed"] = self._plan.seed
        dtype = str(picture.dtype).removeprefix("torch.")
        wanted = self.path
        parts = process_count() if self._shared else 1
        writer, self.path = open_store(
            wanted, picture.layout, dtype, header, self._plan, self.step, exclusive=self._exclusive, parts=parts
        )
        if self.path != wanted and not everything:
            say(f"{wanted}: holds another training of this command; this one is recorded in {self.path}.")
        return writer

    def _start_over(self, name: str, step: int) -> None:
        """A tensor that did not require gradients has changed: go on in another store, which has it each time."""
        before, self._exclusive = self.path, False
        self.close(finish=True)
        self._moments_picture = None
        optimizers = self.optimizers
        self._picture.release()
        self._picture = Picture(self._places, optimizers, self._plan, everything=True)
        self._plan = replace(self._plan, resume=False, replace=False)
        self._open_store(everything=True)
        say(
            f"{name!r} was stored once, as it did not require gradients, but has changed by step {step}: "
            f"{before} ends here, {self.path} goes on and stores it each time."
        )


def open_store(
    path: Path,
    layout: Layout,
    dtype: str,
    header: dict[str, Any],
    plan: Plan,
    base: int,
    *,
    exclusive: bool,
    parts: int = 1,
) -> tuple[TrajectoryWriter, Path]:
    """Start a store, or go on with one.

    Args:
        path: of the store.
        layout: of the vectors.
        dtype: of the weights.
        header: of a new store.
        plan: says whether to resume or to replace.
        base: the step that is recorded next; what a resumed store has of it and beyond is dropped.
        exclusive: whether an existing store is an error; else the first free name with a number is taken.
        parts: how many processes will write each snapshot of a new store.

    Returns:
        The writer and the path it writes.

    Raises:
        UsageError: it exists, is being written, or holds another network.
    """
    sync = cast(Sync, plan.sync)
    if plan.resume and is_store(path) and not _is_of_session(path, plan.session):
        stored = Trajectory.open(path, partial=True)
        if stored.layout != layout:
            raise UsageError(
                f"{path}: holds another network ({_difference(stored.layout, layout)}); it is left as it is."
            )
        writer = TrajectoryWriter.resume(path, sync=sync)
        keep = sum(step < base for step in writer.steps)
        if keep < len(writer.steps) and not keep and base == 0:
            say(f"{path}: the training starts at step 0 again; its {len(writer.steps)} snapshots are recorded anew.")
        writer.rewind(keep)
        return writer, path
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        gives_way = plan.replace and number == 1 and not _is_of_session(candidate, plan.session)
        try:
            writer = TrajectoryWriter.create(
                candidate, layout, [0], header=header, dtype=dtype, parts=parts, sync=sync, replace=gives_way
            )
        except UsageError:
            if exclusive or gives_way or not os.path.lexists(candidate):
                raise
            continue
        return writer, candidate
    raise AssertionError("unreachable")


def _is_of_session(path: Path, session: str) -> bool:
    """Whether a store was written by the same command; an unreadable one was not."""
    if not session:
        return False
    try:
        header = Trajectory.open(path, partial=True).header
    except FarcliError:
        return False
    recording = header.get("recording")
    return isinstance(recording, Mapping) and recording.get("session") == session


def _difference(stored: Layout, wanted: Layout) -> str:
    before = {slot.name: slot for slot in stored.slots}
    now = {slot.name: slot for slot in wanted.slots}
    for name in before:
        if name not in now:
            return f"it has {name!r}, this one has not"
    for name, slot in now.items():
        if name not in before:
            return f"this one has {name!r}, it has not"
        if before[name].shape != slot.shape or before[name].dtype != slot.dtype:
            return (
                f"{name!r} is {before[name].dtype}{list(before[name].shape)} there, {slot.dtype}{list(slot.shape)} here"
            )
    return f"D = {stored.size} there, {wanted.size} here"


def captured() -> bool:
    """Whether what this thread asks of CUDA is not done but recorded into a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _said(plan: Plan) -> dict[str, Any]:
    return {"command": list(plan.command)} if plan.command else {}


def independent(optimizers: Sequence[Any]) -> list[Any]:
    """Those that train tensors of their own; an optimiser that wraps another holds the same ones."""
    seen: set[int] = set()
    found = []
    for optimizer in sorted(optimizers, key=lambda each: -len(tensors_of([each]))):
        own = {id(tensor) for tensor in tensors_of([optimizer])}
        if not own <= seen:
            found.append(optimizer)
            seen |= own
    return found


def _rate(group: Mapping[str, Any]) -> float | None:
    """A group's learning rate; one that lives on a device is not waited for."""
    rate = group.get("lr")
    if rate is None or (isinstance(rate, torch.Tensor) and rate.device.type != "cpu"):
        return None
    return float(rate)


def process_rank() -> int:
    """This process's rank: torch's own where a process group is up, else what the launcher says."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK") or 0)


def process_count() -> int:
    """How many processes train together."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    return 1


class Recorder:
    """Records a training of your own: `with Recorder(model, optimizer, "run.zarr", every=50): train()`.

    The snapshot taken on entry is of the step the optimiser says it has taken (0 for a new one); the last one,
    taken when the block ends, is of the weights as they are then. A block that ends with an exception leaves the
    store unfinished, with everything up to there. Under DDP only rank 0 writes; weights sharded by
    `fully_shard` are gathered tensor by tensor and each rank writes a part of every snapshot, so that every rank
    needs the recorder.

    Args:
        model: the network; or several by name, which then begin the names of their tensors.
        optimizer: what trains it, or several that do.
        store: path of the store to write.
        every: steps between snapshots; 50 when nothing is said.
        at: instead, the steps of the snapshots.
        log_spaced: instead, so many snapshots evenly spaced in log(step): of `steps`, or of each factor of ten.
        steps: steps the training will take; for `log_spaced` only.
        params: patterns of tensor names to store; "!pattern" excludes.
        trainable_only: store neither buffers nor frozen parameters.
        dtype: "keep" holds every tensor exactly, "float32" rounds float64, "bfloat16" rounds to 8 bits of
            precision (kept as float32, which `pack` halves): too coarse for fine-tuning, whose updates are as small.
        start_step: steps taken before; found in the optimiser's state when None.
        resume: go on with an existing store; what it has of `start_step` and beyond is replaced.
        replace: an existing store gives way once the new one is finished.
        max_bytes: stop recording before the store grows beyond this.
        with_optimizer: also store Adam's moments, in `STORE/optimizer.zarr`.
        strict: raise errors of the recording; else they are one line on stderr and recording stops.
        header: JSON values to put into the store's header.

    Raises:
        UsageError: an argument cannot be meant, or the store exists.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Any,
        store: str | Path,
        *,
        every: int | None = None,
        at: Sequence[int] = (),
        log_spaced: int | None = None,
        steps: int | None = None,
        params: Sequence[str] = (),
        trainable_only: bool = False,
        dtype: str = "keep",
        start_step: int | None = None,
        resume: bool = False,
        replace: bool = False,
        max_bytes: int | None = None,
        with_optimizer: bool = False,
        strict: bool = True,
        sync: Literal["none", "commit", "always"] = "none",
        header: Mapping[str, Any] | None = None,
    ) -> None:
        self._plan = Plan(
            output=str(store),
            every=every,
            at=tuple(at),
            log_spaced=log_spaced,
            steps=steps,
            params=tuple(params),
            trainable_only=trainable_only,
            dtype=dtype,
            start_step=start_step,
            resume=resume,
            replace=replace,
            max_bytes=max_bytes,
            with_optimizer=with_optimizer,
            strict=strict,
            sync=sync,
        )
        self._models = dict(model) if isinstance(model, Mapping) else {"": model}
        given = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self._optimizers = [inner_optimizer(each) for each in given]
        self._header = header
        self._outermost = Outermost()
        self._recording: Recording | None = None
        self._hooks: list[Any] = []
        self._error: Exception | None = None

    def __enter__(self) -> "Recorder":
        with self._care():
            self._start()
        # Whoever enters without `with` (a Trainer's callbacks) may not be told of an exception that ends the training.
        # Earlier than atexit, while threads can still be joined.
        getattr(threading, "_register_atexit", atexit.register)(_left_open, weakref.ref(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        recording = self._recording
        if recording is not None:
            with self._care():
                recording.settle(alone=kind is not None)
            with self._care():
                recording.close(finish=kind is None)
            self._recording = None
        if kind is None:
            self._raise()

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self._recording.step if self._recording is not None else 0

    def loss(self, value: float) -> None:
        """Say the loss of the current step; the next snapshot's journal line has it."""
        if self._recording is not None:
            self._recording.loss = float(value)

    def _start(self) -> None:
        places = name_tensors(self._optimizers, list(self._models.values()), None)
        if len(self._models) > 1 or "" not in self._models:
            places = name_by_key(self._optimizers, self._models)
        sharded = any(is_sharded(place.tensor()) for place in places)
        writes = process_rank() == 0
        if not (writes or sharded):
            return
        self._recording = Recording(
            self._plan,
            places,
            self._optimizers,
            Path(self._plan.output),
            writes=writes,
            exclusive=True,
            door="python",
            header=self._header,
            on_error=self._failed,
        )
        for optimizer in self._optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(_undynamoed(self._before)))
            self._hooks.append(optimizer.register_step_post_hook(_undynamoed(self._after)))

    def _before(self, optimizer: Any) -> None:
        if self._outermost.enter() and self._recording is not None:
            with self._care():
                self._recording.before(optimizer)
            self._raise()

    def _after(self, optimizer: Any) -> None:
        try:
            if self._outermost.ends() and self._recording is not None:
                with self._care():
                    self._recording.after(optimizer)
                self._raise()
        finally:
            self._outermost.leave()

    def _care(self) -> "Care":
        return Care(self._recording, self._failed)

    def _failed(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            if not self._plan.strict:
                say(stopped(error))

    def _raise(self) -> None:
        if self._error is not None and self._plan.strict:
            error, self._error = self._error, None
            raise error


def _left_open(ref: "weakref.ref[Recorder]") -> None:
    """The interpreter is about to end: a recording that is still open is left to be resumed."""
    recorder = ref()
    if recorder is not None:
        recorder.__exit__(SystemExit, None, None)


class Care:
    """Within it no error of ours reaches the training: it ends the recording instead."""

    def __init__(self, recording: Recording | None, on_error: Callable[[Exception], None]) -> None:
        self._recording = recording
        self._on_error = on_error

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(value, Exception):
            return False  # an interrupt is the training's own
        if self._recording is not None:
            self._recording.fail(value)
        else:
            self._on_error(value)
        return True


def name_by_key(optimizers: Sequence[Any], models: Mapping[str, nn.Module]) -> list[Place]:
    """Name the tensors of several networks by the names they were given."""
    places = [place for name, model in models.items() for place in places_of(model, f"{name}.")]
    known = {id(place.tensor()) for place in places}
    if any(id(tensor) not in known for tensor in tensors_of(optimizers)):
        raise UsageError(f"the optimizer trains tensors of none of the models {', '.join(models)}.")
    return places


def inner_optimizer(optimizer: Any) -> Any:
    """The torch optimiser inside wrappers (accelerate, Lightning) that are none themselves."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "_optimizer", None)
        if inner is None:
            raise UsageError(f"optimizer: is {type(optimizer).__name__}, expected a torch.optim.Optimizer.")
        optimizer = inner
    return optimizer


def _undynamoed(function: Callable[[Any], None]) -> Callable[..., None]:
    """A hook that calls the function and is kept out of graphs, where `optimizer.step` is compiled."""
    from torch._compile import _disable_dynamo

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        function(optimizer)

    return _disable_dynamo(hook)
