"""The one code path that steps a built-in workload, and the one that evaluates it at given weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from farcli import weights
from farcli.config import configure, options_of
from farcli.errors import FarcliError, StoreError, UsageError
from farcli.files import staged_file
from farcli.layout import Layout, layout_of
from farcli.recording.names import places_of
from farcli.recording.picture import moments_of
from farcli.registry import resolve
from farcli.workloads.base import Batch, Workload, evaluating
from farcli.workloads.optimisation import spanning
from farcli.workloads.randomness import drawing, noise
from farcli.workloads.table import WORKLOADS


def workload_from(name: str, options: Mapping[str, str], *, steps: int | None = None) -> Workload:
    """A workload by its name in the table (or "package.module:Class"), with options as typed.

    Args:
        name: of the workload.
        options: by name; the rest have their defaults.
        steps: that a schedule of the learning rate spans if no option says so; the workload's own number when None.

    Raises:
        UsageError: an unknown name or option, or its data is not there.
    """
    chosen = _class_of(name)
    config = configure(chosen.Config, options, name)
    if steps is not None:
        try:
            config = spanning(config, steps)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
    return chosen(config)


def _class_of(name: str) -> type[Workload]:
    chosen = resolve("workload", name, WORKLOADS)
    if not (isinstance(chosen, type) and issubclass(chosen, Workload)):
        raise UsageError(f"workload {name!r}: is {chosen!r}, expected a subclass of farcli.workloads.base.Workload.")
    return chosen


def describe_workload(name: str, workload: Workload) -> dict[str, Any]:
    """A JSON object that `workload_of` rebuilds the workload from: its name and every option as text."""
    config = workload.config
    return {
        "name": name,
        "options": {field.name: _as_typed(getattr(config, field.name)) for field in fields(config)},
    }


def completed(description: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe_workload` wrote, with options that came after it at their defaults; as it is where unreadable.

    So that recordings of the same training compare as equal whichever version made them.
    """
    try:
        known = options_of(_class_of(description["name"]).Config)
        options = {option.name: _as_typed(option.default) for option in known} | dict(description["options"])
    except (FarcliError, KeyError, TypeError):
        return dict(description)
    return {**description, "options": options}


def workload_of(header: Mapping[str, Any]) -> Workload | None:
    """The workload a store was recorded from, or None where its header names none.

    Raises:
        StoreError: the header's entry is not readable.
        UsageError: it names a workload or option that this version does not have.
    """
    entry = header.get("workload")
    if entry is None:
        return None
    if not (isinstance(entry, Mapping) and isinstance(entry.get("name"), str)):
        raise StoreError(f"header: workload is {entry!r}, expected a name and options.")
    options = entry.get("options")
    if not (isinstance(options, Mapping) and all(isinstance(text, str) for text in options.values())):
        raise StoreError(f"header: options of workload {entry['name']!r} are {options!r}, expected texts by name.")
    return workload_from(entry["name"], options)


def _as_typed(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def run_seed(seed: int, run: int) -> int:
    """The seed of one run: a hash, so that no two commands' seeds share runs.

    Args:
        seed: of the whole command, at least 0.
        run: label of the run.

    Returns:
        A whole number below 2⁵³, which every JSON reader keeps exactly.
    """
    if seed < 0:
        raise UsageError(f"seed {seed}: expected a whole number of at least 0.")
    return int(np.random.SeedSequence(seed, spawn_key=(run,)).generate_state(1, np.uint64)[0] >> np.uint64(11))


class TrainingRun:
    """A run in training, or all runs of a lockstep workload at once.

    The same seeds give the same weights, bit for bit, on the same machine and versions.

    Args:
        workload: what to train.
        seeds: one for each run; exactly one unless the workload trains in lockstep.

    Attributes:
        step: optimiser steps taken; it decides the learning rate.
        layout: of one run's vectors.
    """

    def __init__(self, workload: Workload, seeds: Sequence[int]) -> None:
        assert workload.lockstep or len(seeds) == 1
        self.workload = workload
        self.model = workload.model(seeds)
        self.optimizer = workload.optimizer(self.model)
        self.layout = weights.layout_of_module(self.model, lead=int(workload.lockstep))
        self.step = 0
        self._seeds = list(seeds)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._noise = noise(seeds[0])
        self._drawn = 0
        self._batches = workload.batches(seeds)

    def advance(self, steps: int) -> np.ndarray:
        """Train for some steps, at least one.

        Returns:
            The last step's training loss, shape [R].
        """
        assert steps >= 1
        loss = torch.empty(0)
        with threads(self.workload.threads), drawing(self._noise):
            for _ in range(steps):
                multiple = self.workload.rate(self.step)
                for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                    group["lr"] = rate * multiple
                loss = self.workload.loss(self.model, next(self._batches))
                self._drawn += 1
                self.optimizer.zero_grad()
                loss.sum().backward()  # of independent runs: each gets the gradient of its own loss
                self.optimizer.step()
                self.step += 1
        return loss.detach().reshape(-1).double().cpu().numpy()

    def save(self, path: Path) -> None:
        """Write all that training goes on from, whole or not at all: weights, optimiser, step, data order, noise.

        Raises:
            UsageError: the system refuses.
            ResourceError: no space left.
        """
        state = {
            "torch": str(torch.__version__),
            "seeds": self._seeds,
            "step": self.step,
            "drawn": self._drawn,
            "noise": self._noise,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with staged_file(path, replace=True) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)  # given a path, it tells of a full disk in words of its own

    def restore(self, path: Path, most: int) -> bool:
        """Go on from what `save` wrote, bit for bit, if it is of these seeds, this torch and at most `most` steps.

        Returns:
            Whether it was; nothing changes where not.

        Raises:
            StoreError: the file cannot be read.
        """
        try:
            with ZipFile(path) as archive:  # torch itself does not look at the checksums it writes
                broken = archive.testzip()
            if broken is not None:
                raise BadZipFile(broken)
            state = torch.load(path, weights_only=True)
            if (state["torch"], state["seeds"]) != (str(torch.__version__), self._seeds) or state["step"] > most:
                return False
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self._drawn, self._noise = state["step"], state["drawn"], state["noise"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError, BadZipFile) as error:
            raise StoreError(
                f"{path}: the saved training cannot be read ({type(error).__name__}).",
                "Remove this file: the run is then trained again from its seed.",
            ) from error
        self._batches = self.workload.batches(self._seeds, self._drawn)
        return True

    def vectors(self) -> np.ndarray:
        """A copy of the weights and float buffers, shape [R, D]."""
        return self._flat()[0]

    def integers(self) -> np.ndarray:
        """A copy of the integer buffers, shape [R, I]."""
        return self._flat()[1]

    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        floats, integers = weights.flatten(self.model, self.layout)
        return np.atleast_2d(floats.numpy()), np.atleast_2d(integers.numpy())

    def moments(self) -> tuple[Layout, np.ndarray]:
        """A copy of what the optimiser keeps for each coordinate (Adam's moments), and its layout.

        Returns:
            Layout with tensors "name.exp_avg", "name.exp_avg_sq" or whatever else the optimiser keeps, empty
            before the first step and for one that keeps nothing; vectors of shape [R, M].
        """
        lead = int(self.workload.lockstep)
        places = moments_of(places_of(self.model), [self.optimizer])
        tensors = [place.tensor().detach().cpu() for place in places]
        layout = layout_of(
            (place.name, tuple(tensor.shape[lead:]), str(tensor.dtype).removeprefix("torch."), "parameter")
            for place, tensor in zip(places, tensors, strict=True)
        )
        wide = torch.float64 if any(slot.dtype == "float64" for slot in layout.slots) else torch.float32
        rows = [tensor.to(wide).reshape(len(self._seeds), -1) for tensor in tensors]
        return layout, (torch.cat(rows, dim=1) if rows else torch.empty(len(self._seeds), 0)).numpy()

    def load(self, vectors: np.ndarray | Tensor, integers: np.ndarray | Tensor | None = None) -> None:
        """Go on from other weights; optimiser state, step and data order stay as they are.

        Args:
            vectors: shape [R, D].
            integers: shape [R, I]; None keeps the integer buffers.
        """
        whole = self.integers() if integers is None else integers
        if not self.workload.lockstep:
            (vectors,), (whole,) = vectors, whole
        weights.load(self.model, self.layout, vectors, whole)


class Network:
    """A workload's network, to be evaluated at many weight vectors without being built again.

    Args:
        workload: whose held-out measure is taken.
        layout: layout of the vectors.

    Raises:
        StoreError: the layout is not that of the workload's network.
    """

    def __init__(self, workload: Workload, layout: Layout) -> None:
        self.workload = workload
        self.layout = layout
        self.model = workload.model([0])
        own = weights.layout_of_module(self.model, lead=int(workload.lockstep))
        if own != layout:
            raise StoreError(
                f"the stored vectors have D = {layout.size} in {len(layout.slots)} tensors, but the workload's "
                f"network has D = {own.size} in {len(own.slots)}, or calls them differently.",
                "Was the store recorded with another version of the workload?",
            )

    def evaluate(
        self,
        vector: np.ndarray | Tensor,
        integers: np.ndarray | Tensor | None,
        seed: int,
        *,
        reestimate_buffers: bool = False,
    ) -> dict[str, float]:
        """Held-out measures of the network at one weight vector.

        Args:
            vector: weights and float buffers, shape [D].
            integers: integer buffers, shape [I]; None where the layout has none.
            seed: of the run, which decides its held-out data.
            reestimate_buffers: take BatchNorm statistics from training data instead of from `vector`.

        Returns:
            What `Workload.evaluate` returns; NaN or Inf where the weights lead there.
        """
        with threads(self.workload.threads):
            self._load(vector, integers, seed if reestimate_buffers else None)
            return self.workload.evaluate(self.model, seed)

    def verify(
        self,
        vector: np.ndarray | Tensor,
        integers: np.ndarray | Tensor | None,
        seed: int,
        batches: Sequence[Batch],
        *,
        reestimate_buffers: bool = False,
    ) -> float:
        """Mean loss of some batches, in evaluation mode; the other arguments as in `evaluate`."""
        with threads(self.workload.threads):
            self._load(vector, integers, seed if reestimate_buffers else None)
            with evaluating(self.model):
                return sum(float(self.workload.loss(self.model, batch).sum()) for batch in batches) / len(batches)

    def reestimated(self, vector: np.ndarray | Tensor, integers: np.ndarray | Tensor | None, seed: int) -> np.ndarray:
        """The same vector, shape [D], with BatchNorm statistics that fit its weights."""
        with threads(self.workload.threads):
            self._load(vector, integers, seed)
            return weights.flatten(self.model, self.layout)[0].reshape(-1).numpy()

    def _load(self, vector: np.ndarray | Tensor, integers: np.ndarray | Tensor | None, calibrated: int | None) -> None:
        """Take these weights; and BatchNorm statistics from training data of the run with that seed, where given."""
        if self.workload.lockstep:
            vector, integers = vector[None], None if integers is None else integers[None]
        weights.load(self.model, self.layout, vector, integers)
        if calibrated is not None:
            reestimate(self.workload, self.model, calibrated)


def reestimate(workload: Workload, model: nn.Module, seed: int) -> None:
    """Replace BatchNorm statistics, in place, by those of the workload's calibration batches at the present weights.

    The mean over the batches; everything but BatchNorm is in evaluation mode (dropout would make it
    random), and the count of batches seen in training is kept. Nothing changes without BatchNorm.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    with evaluating(model):
        for norm, (_, count) in zip(norms, before, strict=True):
            norm.num_batches_tracked = None if count is None else torch.zeros_like(count)
            norm.reset_running_stats()
            norm.momentum = None  # torch's cumulative average, which divides by the count
            norm.train()
        for batch in workload.calibration(seed):
            workload.loss(model, batch)
    for norm, (momentum, count) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, count


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within it, torch computes with so many threads; None changes nothing."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
