"""What to record of a training, and at which steps. Standard library only: every recorded process imports it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from farcli.errors import UsageError

VARIABLE = "FARCLI_RECORD"
"""Environment variable that carries a plan to the processes of a recorded command."""
DEFAULT_EVERY = 50
DTYPES = ("keep", "float32", "bfloat16")
_LARGEST_STEP = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `farcli record … -- CMD`, `farcli leap … -- CMD` and `farcli.Recorder` were asked for.

    Attributes:
        output: path of the store; `{rank}` and `{date}` of a command's are filled in by the process that writes.
        every: steps between snapshots.
        at: instead, the steps of the snapshots.
        log_spaced: instead, so many snapshots spaced evenly in log(step): of `steps`, or of each factor of ten.
        steps: number of steps the training will take, where known; for `log_spaced`, and for leaps to end in time.
        params: patterns of tensor names to store; one that begins with "!" excludes.
        trainable_only: store only what an optimiser holds: no buffers, nothing frozen.
        dtype: "keep" stores what holds every tensor exactly, "float32" rounds float64.
        start_step: optimiser steps taken before this process began; found in the optimiser's state when None.
        resume: go on with an unfinished store.
        replace: an existing store gives way once the new one is finished.
        max_bytes: stop recording before the store grows beyond this.
        with_optimizer: also store Adam's moments.
        strict: an error of the recording ends the training.
        sync: how durable each snapshot is made, see the store.
        seed: for the header and for `{seed}` in `output`.
        session: marks the stores of one command.
        until: when to send the training SIGTERM, in seconds since the epoch.
        started: when the command began, in seconds since the epoch.
        root: process id of the command.
        command: its words, for the header.
        leap: how to leap while it trains, for `farcli.integrations.script`; None for not at all.
    """

    output: str
    every: int | None = None
    at: tuple[int, ...] = ()
    log_spaced: int | None = None
    steps: int | None = None
    params: tuple[str, ...] = ()
    trainable_only: bool = False
    dtype: str = "keep"
    start_step: int | None = None
    resume: bool = False
    replace: bool = False
    max_bytes: int | None = None
    with_optimizer: bool = False
    strict: bool = False
    sync: str = "none"
    seed: int | None = None
    session: str = ""
    until: float | None = None
    started: float = 0.0
    root: int = 0
    command: tuple[str, ...] = field(default=())
    leap: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("every", "log_spaced", "steps", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: expected a whole number of at least 1.")
        if self.start_step is not None and self.start_step < 0:
            raise UsageError(f"--start-step {self.start_step}: expected a whole number of at least 0.")
        given = [
            name
            for name, value in (("--every", self.every), ("--at", self.at), ("--log-spaced", self.log_spaced))
            if value
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} contradict each other: choose one.")
        if any(low >= high for low, high in pairwise(self.at)) or (self.at and self.at[0] < 0):
            raise UsageError(f"--at {','.join(map(str, self.at))}: expected ascending steps.")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype!r}: expected {', '.join(DTYPES)}.")
        if self.sync not in ("none", "commit", "always"):
            raise UsageError(f"--sync {self.sync!r}: expected none, commit or always.")
        if self.replace and self.resume:
            raise UsageError("--force and --resume contradict each other: choose one.")

    def to_json(self) -> str:
        """A text that `from_json` turns back into an equal plan."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
        }
        return cls(**given)

    def schedule(self) -> "Schedule":
        """At which steps snapshots are taken."""
        return Schedule(self)

    def spacing(self) -> dict[str, Any]:
        """The spacing of the snapshots, for the header."""
        if self.at:
            return {"at": list(self.at)}
        if self.log_spaced:
            return {"log_spaced": self.log_spaced, "steps": self.steps}
        return {"every": self.every or DEFAULT_EVERY}

    def selects(self, name: str) -> bool:
        """Whether a tensor of this name is to be stored."""
        return selects(self.params, name)


def selects(patterns: Sequence[str], name: str) -> bool:
    """Whether a name matches a selection: one of the patterns, and none of those that begin with "!"."""
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    if any(fnmatchcase(name, pattern) for pattern in unwanted):
        return False
    return not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)


class Schedule:
    """Says of each step whether a snapshot is due."""

    def __init__(self, plan: Plan) -> None:
        self._every = 0
        self._steps: frozenset[int] = frozenset()
        if plan.at:
            self._steps = frozenset(plan.at)
        elif plan.log_spaced:
            self._steps = frozenset(_log_steps(plan.log_spaced, plan.steps))
        else:
            self._every = plan.every or DEFAULT_EVERY

    def due(self, step: int) -> bool:
        """Whether the weights after this many steps are wanted."""
        return step % self._every == 0 if self._every else step in self._steps


def _log_steps(count: int, total: int | None) -> set[int]:
    """Step 0 and steps evenly spaced in log(step): `count` of `total`, or of each factor of ten."""
    if total is not None:
        return {0, *(round(total ** (i / max(count - 1, 1))) for i in range(count))}
    found, i = {0}, 0
    while (step := round(10 ** (i / count))) <= _LARGEST_STEP:
        found.add(step)
        i += 1
    return found
