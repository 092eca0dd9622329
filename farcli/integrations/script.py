"""Leaping inside an unmodified script, beside its recording: `farcli leap … -- CMD`.

Made by the injected recorder at the training's first step. What goes wrong here reaches the training only as
verified weights and a line on stderr, unless `--strict` asked for more.
"""

import json
import math
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from farcli.errors import FarcliError, UsageError
from farcli.files import staged_file
from farcli.recording.messages import say, stopped
from farcli.recording.names import skipped, unwrapped
from farcli.recording.plan import Plan
from farcli.recording.recorder import Recording, captured, independent, process_count, process_rank
from farcli.recording.regions import any_says_so
from farcli.registry import resolve
from farcli.speculation.arms import arms_of
from farcli.speculation.arrays import LEDGER, write_ledger
from farcli.speculation.hearing import Losses
from farcli.speculation.leaper import Leaper
from farcli.speculation.ledger import Account, Entry
from farcli.speculation.options import Leaping, enough_to_verify, require_leaps
from farcli.speculation.trained import Saved

ROWS = "ledger.ndjson"
"""File inside a store: a line for every proposal as its verdict falls."""
KEPT = "leaper"
"""Folder inside a store: what leaping goes on from, at the steps where the script took its optimiser's state."""
_KEEP = 2
"""Files there: the newest, for the checkpoint that was being written may be lost."""


def leap_section(
    predictors: Sequence[str],
    strengths: Sequence[float],
    leaping: Leaping,
    settings: Mapping[str, str],
    validate: str | None,
    steps: int | None = None,
) -> dict[str, Any]:
    """What a plan carries to the processes of a command, and the store's header says.

    Args:
        predictors: names.
        strengths: of the arms.
        leaping: how to leap.
        settings: options of the predictors, as text.
        validate: "package.module:function", from a network to a held-out loss, in the script's process.
        steps: that the command will take, where known.

    Raises:
        UsageError: a predictor or one of its options is unknown, one takes batches, no leap fits into the steps,
            `validate` is no name of a function, or the gate needs one.
    """
    arms = arms_of(predictors, strengths, settings)
    if needy := [arm.name for arm in arms if arm.predictor.takes_batches]:
        raise UsageError(
            f"leap: {needy[0]} takes gradients on fresh batches, which a command does not hand out.",
            "Choose another predictor.",
        )
    if steps is not None:
        require_leaps(leaping, [arm.predictor.context for arm in arms if arm.strength], steps)
    if validate is not None and not all(part.strip() for part in [*validate.partition(":")[::2]]):
        raise UsageError(f"--validate {validate!r}: expected package.module:function.")
    if validate is None and leaping.gate not in ("none", "delayed"):
        raise UsageError(
            f"--gate {leaping.gate}: verifies on held-out data, and there is none.",
            "Give --validate pkg.mod:fn, or choose --gate delayed, which can go by the training's losses.",
        )
    return {
        "predictors": list(predictors),
        "strengths": list(strengths),
        "leaping": asdict(leaping),
        "settings": dict(settings),
        "validate": validate,
    }


class Leap:
    """Leaps with one recorded training.

    Args:
        plan: of the command; `plan.leap` is a `leap_section`.
        recording: of the training.
        roots: the networks it trains.
    """

    def __init__(self, plan: Plan, recording: Recording, roots: Sequence[nn.Module]) -> None:
        self._plan = plan
        self._recording = recording
        self._root = weakref.ref(unwrapped(roots[0])) if len(roots) == 1 else None
        self._leaper: Leaper | None = None
        self._round: list[int] = []
        """Ids of the optimisers in the order of their first steps, where there are several."""
        self._turn = 0
        self._complete = len(independent(recording.optimizers)) == 1
        self._members = {id(optimizer) for optimizer in recording.optimizers} if self._complete else set()
        self._losses = Losses()
        self._recent: list[Tensor] = []
        self._over = False
        self._error: Exception | None = None
        self._late = False
        self._unwritable = False
        self._hooks: list[Any] = []
        self._speaks = process_rank() == 0
        with self._care():
            if recording.sharded:
                raise UsageError("its weights are spread over processes (FSDP), which leaping cannot do yet")
            if len(roots) != 1:
                raise UsageError(f"it trains {len(roots)} networks side by side, expected one")
            assert plan.leap is not None
            section = plan.leap
            self._options = Leaping(**enough_to_verify(section["leaping"], plan.steps))
            self._validate = _imported(section["validate"]) if section["validate"] else None
            self._drop_rows(recording.step)
            if self._complete:
                self._begin()
        if not recording.sharded and process_count() > 1 and any_says_so(self._over):
            self.stop(FarcliError("leaping could not begin in another process"))

    def after(self, optimizer: Any) -> None:
        """An optimiser has stepped: when all have, leap where a leap is due."""
        if not (self._over or skipped(optimizer)):
            with self._care():
                self._step(optimizer)
        if self._error is not None and self._plan.strict:
            error, self._error = self._error, None
            raise RuntimeError("farcli leap --strict: leaping failed") from error

    def _step(self, optimizer: Any) -> None:
        if captured():
            raise UsageError("the training step is captured in a CUDA graph")
        if not self._complete and not self._takes_turns(optimizer):
            return
        if self._leaper is None:
            self._begin()
            return
        if id(optimizer) not in self._members:
            raise UsageError(f"another optimizer ({type(optimizer).__name__}) trains the network from here on")
        with _signals_later():
            self._leaper.after_step()
            self._hear(self._leaper)
            if self._plan.steps is not None and self._leaper.step >= self._plan.steps:
                self._leaper.finish()  # the script may save its model next

    def stop(self, error: Exception) -> None:
        """Take back what is not verified, and leap no more."""
        if self._over:
            return
        self._over, self._error = True, error
        self._losses.close()
        text = stopped(error, "leaping")
        if self._leaper is not None:
            try:
                self._leaper.retreat("leaping stopped")
            except Exception as another:  # only a network that has become another one cannot go back
                text += f" Leaps that were not verified stay: {another}"
        if self._speaks:
            say(text.replace("the training goes on", "--strict ends the training") if self._plan.strict else text)

    def end(self, *, orderly: bool) -> None:
        """Give the last window its verdict, write the ledger, and say what came of it.

        The weights stay as the script has left them, for it has saved them by now.
        """
        self._losses.close()
        for hook in self._hooks:
            hook.remove()
        leaper, self._leaper = self._leaper, None
        if leaper is None:
            return
        pending = [entry for entry in leaper.entries if entry.verdict == "pending"]
        try:
            if pending:
                self._judge_late(leaper, pending, orderly=orderly and not self._over)
            if self._speaks:
                self._write(leaper.account)
                say(f"{self._recording.path}: {_sum(leaper.account)}")
                if pending:
                    say(_late(pending))
        except Exception as error:
            self._over = True
            if self._speaks:
                say(f"the ledger is not complete: {' '.join(str(error).split())}")

    # ------------------------------------------------------------------------

    def _begin(self) -> None:
        section, root = self._plan.leap, None if self._root is None else self._root()
        assert section is not None
        assert root is not None
        validate = self._validate
        # The network is held weakly, so that a script that lets go of it frees it as without us.
        reference = weakref.ref(root)
        self._leaper = Leaper(
            cast(nn.Module, weakref.proxy(root)),
            self._recording.optimizers,
            arms_of(section["predictors"], section["strengths"], section["settings"]),
            options=self._options,
            validate=None if validate is None else lambda _: validate(reference()),
            told=self._told,
            step=self._recording.step,
        )
        if self._plan.resume and self._leaper.step:
            self._go_on(self._leaper, root)
        self._hooks = [each.register_state_dict_post_hook(_keeping(self)) for each in self._recording.optimizers]

    def keep(self) -> None:
        """The script takes its optimiser's state, so as to go on from here some day: leaping is to go on as well.

        Not in its own file, which stays what it is, but in the store.
        """
        leaper, home = self._leaper, self._recording.home
        if leaper is None or home is None or self._over:
            return
        root = None if self._root is None else self._root()
        assert root is not None
        file = home / KEPT / f"{leaper.step}-{_digest(root)}.pt"
        try:
            with staged_file(file, replace=True) as temporary:
                torch.save(leaper.state_dict(), temporary)
            for old in sorted(file.parent.glob("*.pt"), key=_step_of)[:-_KEEP]:
                old.unlink()
        except (FarcliError, OSError, RuntimeError) as error:
            self._complain(f"{file}: cannot be written, so that leaping cannot be resumed from here ({error}).")

    @staticmethod
    def steps_taken(plan: Plan, path: Path, roots: Sequence[nn.Module]) -> int | None:
        """Of a training that was leapt with: a roll-back sets an optimiser's count back, and not the training's."""
        file = _kept(path, unwrapped(roots[0])) if plan.resume and len(roots) == 1 else None
        return None if file is None else _step_of(file)

    def _go_on(self, leaper: Leaper, root: nn.Module) -> None:
        """Be what was kept when the script took the state that it has now come back with."""
        file = _kept(self._recording.path, root)
        if file is None or _step_of(file) != leaper.step:
            if self._speaks:
                say(
                    f"{self._recording.path / KEPT}: holds no state of leaping with these weights; the training goes "
                    f"on from step {leaper.step}, and leaping begins anew."
                )
            return
        leaper.load_state_dict(torch.load(file, map_location=leaper.device, weights_only=True))
        home = self._recording.home
        if home is not None:
            settled = [entry for entry in leaper.entries if entry.verdict != "pending"]
            (home / ROWS).write_text("".join(_line(entry) for entry in settled), encoding="utf-8")

    def _takes_turns(self, optimizer: Any) -> bool:
        """Whether a step of several optimisers is complete: who takes part is known when the first begins again."""
        key = id(optimizer)
        if self._leaper is None and key not in self._round:
            self._round.append(key)
            return False
        self._members.update(self._round)
        if len(self._round) == 1:  # the others are not used
            self._complete = True
            return True
        if key != self._round[self._turn]:
            raise UsageError("its optimizers are not stepped in turn, once each")
        self._turn = (self._turn + 1) % len(self._round)
        return self._turn == 0

    def _hear(self, leaper: Leaper) -> None:
        loss = self._losses.take()
        if loss is None:
            return
        leaper.loss(loss)
        self._recent.append(loss)
        if leaper.step % self._options.every == 0:
            self._recording.loss = float(torch.stack(self._recent).mean())  # for the journal of snapshots
            self._recent.clear()

    def _judge_late(self, leaper: Leaper, pending: Sequence[Entry], *, orderly: bool) -> None:
        """The verdict on a window that the training's end has cut short: told, but not acted upon."""
        self._late = True
        root = None if self._root is None else self._root()
        try:
            if orderly and root is not None and process_count() == 1:
                own = Saved.of(root, ())
                try:
                    leaper.finish()
                finally:
                    own.restore(root, ())
        finally:
            for entry in pending:
                if entry.verdict == "pending":
                    entry.verdict, entry.reason = "unverified", "the training ended before the verdict"
                    self._told(entry)

    def _told(self, entry: Entry) -> None:
        home = self._recording.home
        if self._late and entry.verdict == "rolled back":
            entry.verdict, entry.lost_steps = "unverified", 0
            entry.reason = f"the training ended before the verdict, which is to go back: {entry.reason}"
        if home is None:
            return
        try:
            with open(home / ROWS, "a", encoding="utf-8") as file:
                file.write(_line(entry))
        except OSError as error:  # a verdict stands, whether or not it can be written down
            self._complain(f"{home / ROWS}: cannot be written ({error.strerror}).")

    def _complain(self, text: str) -> None:
        if not self._unwritable:
            self._unwritable = True
            say(text)

    def _drop_rows(self, step: int) -> None:
        """Of a resumed recording, the rows of steps that are taken again."""
        home = self._recording.home
        if home is not None and (home / ROWS).exists():
            kept = [row for row in read_ledger(home) if row["step"] < step]
            (home / ROWS).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def _write(self, account: Account) -> None:
        home = self._recording.home
        if home is not None:
            rows = [{key: row[key] for key in row if key != "kind"} for row in read_ledger(home)]
            write_ledger(home / LEDGER, [asdict(account)], {"proposal": rows})

    @contextmanager
    def _care(self) -> Iterator[None]:
        """Within it no error of ours reaches the training; `after` raises it where `--strict` asked for that."""
        try:
            yield
        except Exception as error:
            self.stop(error)


def _line(entry: Entry) -> str:
    row = {"kind": "leap", "run": 0, **entry.row()}
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
    return json.dumps(finite) + "\n"


def _kept(store: Path, model: nn.Module) -> Path | None:
    """What was kept when a network had the weights that it has now; in several processes, by all of them or none."""
    found = max((store / KEPT).glob(f"*-{_digest(model)}.pt"), key=_step_of, default=None)
    if process_count() > 1 and any_says_so(found is None):
        return None
    return found


def _step_of(file: Path) -> int:
    return int(file.stem.partition("-")[0])


def _digest(model: nn.Module) -> str:
    """Of its parameters."""
    digest = sha256()
    for tensor in model.parameters():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _keeping(leap: Leap) -> Callable[[Any, Any], None]:
    """A hook of `optimizer.state_dict` that keeps nothing alive."""
    reference = weakref.ref(leap)

    def hook(_optimizer: Any, _state: Any) -> None:
        leap = reference()
        if leap is not None:
            leap.keep()

    return hook


def read_ledger(store: Path) -> list[dict[str, Any]]:
    """The proposals of a script's training so far; a line that a killed process left unfinished is left out."""
    rows = []
    for line in (store / ROWS).read_text(encoding="utf-8").splitlines() if (store / ROWS).exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


@contextmanager
def _signals_later() -> Iterator[None]:
    """Within it a signal waits: a script that saves itself in a handler must not meet half a verification."""
    came: list[int] = []

    def wait(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            handler = signal.getsignal(number)
            if callable(handler):  # what is ignored or kills needs nothing to wait for
                handlers[number] = handler
                signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _imported(name: str) -> Callable[[Any], float]:
    """The validation function, found as the script finds its own modules; the script itself is not run again."""
    module = name.partition(":")[0]
    main = sys.modules["__main__"]
    own = Path(getattr(main, "__file__", None) or "-").stem
    spec = getattr(main, "__spec__", None)
    if module == (spec.name if spec is not None else own):
        name = f"__main__:{name.partition(':')[2]}"
    function = resolve("validation function", name, {})
    if not callable(function):
        raise UsageError(f"--validate {name}: is {type(function).__name__}, expected a function.")
    return cast(Callable[[Any], float], function)


def _sum(account: Account) -> str:
    return (
        f"{_leaps(account.proposals)} proposed in {account.steps} steps: {account.accepted} kept, "
        f"{account.rejected} not, {account.unverified} unverified; verifying cost {account.verification:.1f} steps, "
        f"{account.lost} steps were thrown away."
    )


def _leaps(count: int) -> str:
    return f"{count} leap{'' if count == 1 else 's'}"


def _late(pending: Sequence[Entry]) -> str:
    verdict = "had no verdict yet when the training ended"
    if any(entry.verdict == "accepted" for entry in pending):
        verdict = "verified only after the training had ended, and to be kept"
    elif any("go back" in entry.reason for entry in pending):
        verdict = "verified only after the training had ended, and to be taken back"
    return (
        f"{_leaps(len(pending))} {verdict}: the weights that the script has saved have them in. "
        "With --steps N, the number of steps it takes, the last ones are verified in time."
    )
