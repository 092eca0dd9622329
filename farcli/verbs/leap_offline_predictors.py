"""What leaps on a recorded run: Leap+Verify's predictors, and any forecaster that needs no fitting.

Shape suffixes: C snapshots of the context, D trained coordinates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from farcli.artefact import build
from farcli.config import configure
from farcli.errors import NonFiniteError, StoreError, UsageError
from farcli.forecasters.base import FittedForecaster, Forecaster, Prefix
from farcli.forecasters.table import FORECASTERS
from farcli.layout import Layout
from farcli.recording.background import read_journal
from farcli.recording.recorder import MOMENTS
from farcli.registry import unknown
from farcli.speculation.offline import along_moments, printed_quadratic
from farcli.store import Trajectory, is_store
from farcli.training import workload_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a predictor may look at: nothing later than the snapshot it leaps from.

    Attributes:
        run: label of the run.
        steps_C: steps of the snapshots, equally far apart; the last is where the leap starts.
        weights_CD: the trained coordinates at these steps.
        layout: of the whole vector.
    """

    run: int
    steps_C: tuple[int, ...]
    weights_CD: Sequence[np.ndarray]
    layout: Layout


class LeapPredictor(Protocol):
    """Says where the weights will be."""

    name: str

    @property
    def context(self) -> int:
        """Snapshots it needs."""
        ...

    def forecast(self, past: Past, ahead: int) -> np.ndarray:
        """Trained coordinates `ahead` steps after the last snapshot of `past`, shape [D]."""
        ...


@final
class TableForecaster:
    """A method of `farcli methods`."""

    def __init__(self, name: str, forecaster: Forecaster, context: int) -> None:
        self.name = name
        self._forecaster = forecaster
        # linear and quadratic are the paper's: through the last two or three snapshots
        least = name in ("persistence", "linear", "quadratic")
        self.context = forecaster.min_context if least else max(context, forecaster.min_context)

    def forecast(self, past: Past, ahead: int) -> np.ndarray:
        """The method's forecast from the last `context` snapshots."""
        steps = past.steps_C[-self.context :]
        seen = self._forecaster.observed(steps)
        chosen_CD = [past.weights_CD[past.steps_C.index(step)] for step in seen]
        prefix = Prefix(
            weights_BCD=torch.from_numpy(np.stack(chosen_CD)[None]),
            steps_C=seen,
            layout=past.layout,
            start=0,
            runs_B=(0,),
        )
        return self._forecaster.forecast(prefix, (steps[-1] + ahead,))[0, 0].numpy()


@final
class PrintedQuadratic:
    """Leap+Verify's quadratic with the coefficient as printed."""

    name = "quadratic-printed"
    context = 3

    def forecast(self, past: Past, ahead: int) -> np.ndarray:
        """See `printed_quadratic`."""
        first, middle, last = past.weights_CD[-3:]
        slope, bend = printed_quadratic(ahead, past.steps_C[-1] - past.steps_C[-2])
        return (last + slope * (last - middle) + bend * ((last - middle) - (middle - first))).astype(last.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentumConfig:
    """Options of the predictors along Adam's moments."""

    lr: float | None = field(default=None, metadata={"help": "learning rate; none means the recorded one"})
    beta1: float = field(default=0.9, metadata={"help": "decay of Adam's first moment"})
    beta2: float = field(default=0.999, metadata={"help": "decay of its second moment"})
    epsilon: float = field(default=1e-8, metadata={"help": "added to the root of the second moment"})


@dataclass(frozen=True, slots=True)
class Variant:
    """A reading of Leap+Verify's momentum predictor; see `along_moments`.

    Attributes:
        corrected: whether moments are bias-corrected.
        precision: what they were stored in.
        scaled: whether the step is multiplied by the learning rate.
    """

    corrected: bool
    precision: torch.dtype
    scaled: bool = True


MOMENTUM = {
    "momentum": Variant(True, torch.float32),
    "momentum-bf16": Variant(True, torch.bfloat16),
    "momentum-fp16": Variant(True, torch.float16),
    "momentum-uncorrected": Variant(False, torch.float32),
    "momentum-uncorrected-bf16": Variant(False, torch.bfloat16),
    "momentum-as-coded": Variant(False, torch.float16),
    "momentum-printed": Variant(False, torch.float32, scaled=False),
}
"""By name: moments in float32, bfloat16 or float16, bias-corrected or not; as coded: float16 and not; as printed:
without the learning rate."""


@final
class Momentum:
    """K updates of Adam with its moments held fixed."""

    context = 1

    def __init__(self, name: str, config: MomentumConfig, truth: Trajectory) -> None:
        self.name = name
        self._variant = MOMENTUM[name]
        self._config = config
        self._truth = truth
        self._moments = _RecordedMoments(truth, name)
        self._rate = (lambda run, step: 1.0) if not self._variant.scaled else _rates(truth, config, name)

    def forecast(self, past: Past, ahead: int) -> np.ndarray:
        """Weights + K·rate·direction; tensors that have no moments stay."""
        now_D, step = past.weights_CD[-1], past.steps_C[-1]
        moved_D = now_D.copy()
        rate = self._rate(past.run, step)
        for place, first, second in self._moments.at(past.run, step):
            direction = along_moments(
                first,
                second,
                updates=step,
                betas=(self._config.beta1, self._config.beta2),
                epsilon=self._config.epsilon,
                corrected=self._variant.corrected,
                precision=self._variant.precision,
            )
            moved_D[place] += ahead * rate * direction.numpy()
        return moved_D


class _RecordedMoments:
    """Adam's moments as `record --with-optimizer` stored them."""

    def __init__(self, truth: Trajectory, who: str) -> None:
        path = truth.path / MOMENTS
        if not is_store(path):
            raise UsageError(
                f"{truth.path}: holds no moments of an optimiser, which {who} goes along.",
                "Record it with --with-optimizer, or choose other --predictors.",
            )
        self._stored = Trajectory.open(path, partial=not truth.finished)
        slots = {slot.name: slot for slot in self._stored.layout.floats}
        found = [
            (slot, slots[f"{slot.name}.exp_avg"], slots[f"{slot.name}.exp_avg_sq"])
            for slot in truth.layout.floats
            if f"{slot.name}.exp_avg" in slots and f"{slot.name}.exp_avg_sq" in slots
        ]
        kinds = sorted({name.rsplit(".", 1)[1] for name in slots})
        if any(slot.shape != each.shape for slot, *moments in found for each in moments) or (
            not found and "exp_avg_sq" in kinds
        ):
            raise StoreError(f"{path}: holds the moments of another network than {truth.path} is of.")
        if not found:
            raise UsageError(
                f"{path}: holds {', '.join(kinds) or 'nothing'} of its optimiser, but {who} needs Adam's exp_avg and "
                "exp_avg_sq.",
                "Record a training with Adam or AdamW, or choose other --predictors.",
            )
        self._places = [tuple(slice(slot.offset, slot.stop) for slot in each) for each in found]
        self._last: tuple[int, int, np.ndarray] | None = None

    def at(self, run: int, step: int) -> list[tuple[slice, Tensor, Tensor]]:
        """Of each tensor its place in the weights, exp_avg and exp_avg_sq, float32."""
        if self._last is None or self._last[:2] != (run, step):
            vector = self._stored.read([run], [step])[0, 0].astype(np.float32)
            if not np.isfinite(vector).all():
                raise NonFiniteError(
                    f"{self._stored.path}: run {run}, step {step}: its moments are not finite.",
                    "Choose other runs with --runs or steps with --steps.",
                )
            self._last = run, step, vector
        vector = torch.from_numpy(self._last[2])
        return [(place, vector[first], vector[second]) for place, first, second in self._places]


def _rates(truth: Trajectory, config: MomentumConfig, who: str) -> Callable[[int, int], float]:
    """The learning rate of the update that leaves a snapshot: given, the workload's, or the journal's."""
    given = config.lr
    if given is not None:
        return lambda run, step: given
    workload = workload_of(truth.header)
    if workload is not None:
        full = workload.config.lr
        assert full is not None  # resolved
        return lambda run, step: full * workload.rate(step)
    journal = read_journal(truth.path)

    def rate(run: int, step: int) -> float:
        said = set(journal.get(step, {}).get("lr") or ())
        if len(said) != 1 or None in said:
            raise UsageError(
                f"{truth.path}: step {step}: its journal has {len(said) or 'no'} learning rates, and {who} needs one.",
                "Give it: --set lr=3e-4.",
            )
        return float(said.pop())

    return rate


def predictors_of(
    names: Sequence[str], truth: Trajectory, *, context: int, options: Mapping[str, str]
) -> list[LeapPredictor]:
    """The predictors by their names.

    Args:
        names: of `MOMENTUM`, quadratic-printed, or of `farcli methods`.
        truth: the recorded runs.
        context: snapshots that methods see which make use of more than they need.
        options: as typed: key, or NAME.key where several would take it.

    Raises:
        UsageError: a name is unknown or given twice, a method has to be fitted, nobody takes an option, or the store
            holds no moments.
    """
    repeated = next((name for name in names if list(names).count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"--predictors: {repeated} is named twice.")
    used: set[str] = set()
    found: list[LeapPredictor] = []
    for name in names:
        if name == PrintedQuadratic.name:
            found.append(PrintedQuadratic())
        elif name in MOMENTUM:
            own = _own(name, MomentumConfig, options, used)
            found.append(Momentum(name, configure(MomentumConfig, own, name), truth))
        elif name in FORECASTERS or ":" in name:
            found.append(_from_table(name, context, options, used))
        else:
            raise unknown("predictor", name, [*MOMENTUM, PrintedQuadratic.name, *FORECASTERS])
    unused = next((key for key in options if key not in used), None)
    if unused is not None:
        raise UsageError(f"--set {unused}: none of {', '.join(names)} has this option.")
    return found


def _from_table(name: str, context: int, options: Mapping[str, str], used: set[str]) -> TableForecaster:
    plain: Forecaster = build(name, {})
    if isinstance(plain, FittedForecaster):
        raise UsageError(
            f"{name}: must be fitted before it can forecast, and offline leaps take only what needs no fitting.",
            "`farcli methods` says which do.",
        )
    return TableForecaster(name, build(name, _own(name, type(plain).Config, options, used)), context)


def _own(name: str, config: Any, options: Mapping[str, str], used: set[str]) -> dict[str, str]:
    """The options that are meant for one predictor."""
    known = {each.name for each in fields(config)}
    own: dict[str, str] = {}
    for key, value in options.items():
        whose, dot, rest = key.partition(".")
        if key in known or (dot and whose == name):
            own[rest if dot else key] = value
            used.add(key)
    return own
