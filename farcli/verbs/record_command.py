"""Record an unmodified training script, or leap with it: set the stage, then become the command."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from farcli.errors import StoreError, UnfinishedError, UsageError
from farcli.files import refuse_existing
from farcli.recording.messages import say
from farcli.recording.plan import VARIABLE, Plan
from farcli.store import Trajectory, is_store
from farcli.store.disk import being_written, is_locked, owner

_PYTHON = re.compile(r"python[0-9.]*|pypy[0-9.]*")
_ISOLATING = {"I": "-I", "E": "-E", "S": "-S"}


def record_command(command: Sequence[str], plan: Plan, *, dry_run: bool = False) -> dict[str, Any]:
    """Run a command in place of this process, with its training recorded.

    The command keeps this process id, its exit code and its signals. Only when there is nothing to run does
    this return: on `dry_run`, and where `plan.resume` finds the recording finished.

    Args:
        command: the program and its arguments.
        plan: what to record.
        dry_run: change nothing.

    Returns:
        A row: path, command, snapshots (None before there is a store), finished.

    Raises:
        UsageError: the command does not exist, or the output exists or is being written.
        StoreError: the store to resume is none.
    """
    output = Path(plan.output).absolute()
    verb = "leap" if plan.leap else "record"
    row: dict[str, Any] = {"path": plan.output, "command": list(command), "snapshots": None, "finished": False}
    program = shutil.which(command[0])
    if program is None:
        raise UsageError(
            f"{command[0]}: no such command.",
            f"Give the command as you would run it: farcli {verb} -o RUN.zarr -- CMD.",
        )
    if is_locked(output / "weights"):
        raise being_written(output, owner(output / "weights"))
    if not plan.resume:
        refuse_existing(output, plan.replace)
        if plan.replace and output.exists() and not is_store(output):
            raise UsageError(f"{output}: exists and is not a trajectory store; it is not replaced.")
    elif os.path.lexists(output):
        stored = _resumable(output)
        row |= {"snapshots": len(stored.steps), "finished": stored.finished}
        if stored.finished:
            return row
    if dry_run:
        return row
    isolated = _isolated(command)
    if isolated is not None:
        what = f"{' '.join(command[:2])}: {isolated} makes Python ignore PYTHONPATH, so nothing can be recorded"
        if plan.strict:
            raise UsageError(
                f"{what}.",
                f"Leave {isolated} out, or use farcli.{'Leaper' if plan.leap else 'Recorder'} in the script.",
            )
        say(f"{what}; the command runs as it is.")
    plan = replace(
        plan,
        output=str(output),
        session=uuid4().hex,
        started=time.time(),
        root=os.getpid(),
        command=tuple(command),
    )
    _become(program, command, injected_environment(plan, os.environ))


def injected_environment(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which Python records: the plan, and our folder in front of PYTHONPATH."""
    spec = find_spec("farcli.injection")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = str(Path(next(iter(spec.submodule_search_locations))).absolute())
    before = environment.get("PYTHONPATH")
    return {
        **environment,
        VARIABLE: plan.to_json(),
        "PYTHONPATH": folder if not before else os.pathsep.join((folder, before)),
    }


def expand_output(
    template: str, *, seed: int | None, launches: bool = True, environment: Mapping[str, str] | None = None
) -> str:
    """Fill in `{job}`, `{task}`, `{seed}`, `{date}` and, under a launcher, `{rank}`.

    Args:
        template: what was given as `-o`.
        seed: what `{seed}` stands for.
        launches: whether a command follows: `{rank}` is then left to the processes that it starts.
        environment: ours, unless given.

    Raises:
        UsageError: the environment does not say what a name stands for, or there is no such name.
    """
    known = os.environ if environment is None else environment
    values = {
        "job": known.get("SLURM_ARRAY_JOB_ID") or known.get("SLURM_JOB_ID"),
        "task": known.get("SLURM_ARRAY_TASK_ID"),
        "seed": None if seed is None else str(seed),
        "date": time.strftime("%Y%m%d"),
        "rank": known.get("RANK") or known.get("SLURM_PROCID"),
    }

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise UsageError(f"-o {template}: {{{name}}} stands for nothing; known are {', '.join(values)}.")
        value = values[name]
        if value is None and name == "rank" and launches:
            return "{rank}"
        if value is None:
            source = {"job": "SLURM_JOB_ID", "task": "SLURM_ARRAY_TASK_ID", "rank": "RANK"}.get(name, f"--{name}")
            raise UsageError(f"-o {template}: {{{name}}} needs {source}, which is not set.")
        return value

    return re.sub(r"\{(\w*)\}", fill, template)


def _resumable(path: Path) -> Trajectory:
    if not is_store(path):
        raise StoreError(f"{path}: exists and is not a trajectory store; there is nothing to resume.")
    try:
        return Trajectory.open(path)
    except UnfinishedError:
        return Trajectory.open(path, partial=True)


def _isolated(command: Sequence[str]) -> str | None:
    """The flag by which a Python command line leaves us out, if it has one."""
    if not _PYTHON.fullmatch(os.path.basename(command[0])):
        return None
    for word in command[1:]:
        if not word.startswith("-") or word.startswith("--") or word in ("-", "-c", "-m"):
            return None
        for letter in word[1:]:
            if letter in _ISOLATING:
                return _ISOLATING[letter]
            if letter in "cmWX":
                break  # the rest of the word, or the next one, belongs to it
    return None


def _become(program: str, command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    # Python ignores these, and what is ignored stays so across exec: `… | head` would not end the command.
    for name in ("SIGPIPE", "SIGXFZ", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, list(command), environment)
    except OSError as error:
        raise UsageError(f"{command[0]}: cannot be run ({error.strerror}).") from error
