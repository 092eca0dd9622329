"""The training loss of recorded runs at any weights: what forecasters that are fitted on loss are handed."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from farcli.errors import UsageError
from farcli.forecasters.base import JUDGING, TrainingLoss
from farcli.stream import Source
from farcli.training import Network, threads, workload_of
from farcli.workloads.base import Batch, Workload

_BATCHES = 9
"""Batches of each run: held back from training where the workload holds back so many, since training loss falls for
ever. Where it holds back fewer, those to judge by are; the others are the first that the run was trained on."""


class _Loss(nn.Module):
    """A network and its loss, so that weights can be given to both in one call."""

    def __init__(self, workload: Workload, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._workload = workload

    def forward(self, batch: Batch) -> Tensor:
        return self._workload.loss(self.network, batch)


@final
class WorkloadLoss(TrainingLoss):
    """The loss of the workload that the stores were recorded from, on what it holds back, else on training batches.

    In evaluation mode, with each run's BatchNorm statistics at the last observed step: as `eval` measures.

    Args:
        workload: of all sources.
        sources: the training runs.
        step: the last observed step.
    """

    def __init__(self, workload: Workload, sources: Sequence[Source], step: int) -> None:
        self._workload = workload
        self._layout = sources[0].trajectory.layout
        floats = self._layout.floats
        self._slots = tuple([s for s in floats if (s.role == "parameter") == trained] for trained in (True, False))
        self._loss = _Loss(workload, Network(workload, self._layout).model.eval())
        self._seeds: list[int] = []
        self._buffers: list[Tensor] = []
        for source in sources:
            trajectory = source.trajectory
            seeds = dict(zip(trajectory.runs, trajectory.header["seeds"], strict=True))
            for run in source.runs:
                self._seeds.append(int(seeds[run]))
                whole = trajectory.read([run], [step], self._layout.parameters, self._layout.size)[0, 0]
                self._buffers.append(torch.from_numpy(whole))
        self._held: dict[int, list[Batch]] = {}

    @property
    def batches(self) -> int:
        """How many batches each run has."""
        return _BATCHES

    def at(self, weights_D: Tensor, run: int, batch: int) -> Tensor:
        """The loss of one run's batch at these weights; gradients flow."""
        if run not in self._held:
            self._held[run] = self._drawn(self._seeds[run])
        values: dict[str, Any] = {}
        # Buffers apart from weights: BatchNorm refuses statistics that gradients flow through. And split at once:
        # the gradient of a slice is a whole vector, most of it zeros, for each tensor.
        for slots, vector in zip(self._slots, (weights_D, self._buffers[run]), strict=True):
            for slot, part in zip(slots, vector.split([slot.size for slot in slots]), strict=True):
                own = part.view(slot.shape).to(getattr(torch, slot.dtype))
                values[f"network.{slot.name}"] = own[None] if self._workload.lockstep else own
        with threads(self._workload.threads):
            return functional_call(self._loss, values, (self._held[run][batch],)).sum()

    def _drawn(self, seed: int) -> list[Batch]:
        try:
            fresh = self._workload.verification(seed, 0, _BATCHES)
            if len(fresh) == _BATCHES:
                return list(fresh)
            judging = self._workload.verification(seed, 0, JUDGING)
        except UsageError:
            judging = []
        batches = self._workload.batches([seed])
        return [next(batches) for _ in range(_BATCHES - len(judging))] + list(judging)


def training_loss(sources: Sequence[Source], step: int) -> WorkloadLoss | None:
    """The training loss of these runs; None where their stores name no workload, or not all the same.

    Raises:
        FarcliError: the workload cannot be built here: its data are missing, or it is of another version.
    """
    header = sources[0].trajectory.header
    if any(source.trajectory.header.get("workload") != header.get("workload") for source in sources):
        return None
    workload = workload_of(header)
    if workload is None or not all(isinstance(source.trajectory.header.get("seeds"), list) for source in sources):
        return None
    return WorkloadLoss(workload, sources, step)
