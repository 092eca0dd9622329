"""Slow momentum whose matrices go at one pace in all their directions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from farcli.errors import UsageError
from farcli.layout import Layout, Slot
from farcli.speculation.base import Observed, Predictor, Proposal
from farcli.speculation.predictors.slow_momentum import SlowMomentum

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


@final
class Spectral(Predictor):
    """Momentum on displacements, its matrices made nearly orthogonal.

    With d = w_t − w_{t−P} and b ← μb + d, leap to w_{t−P} + (1 − κ)d + κ·s·U(d + μb), matrix by matrix.

    U replaces a matrix's singular values by about 1; s gives the result `gain` times the Frobenius norm that d has,
    so that the leap goes about as far as training did, but as fast in the directions where it crept as where it ran.
    Tensors of one axis and embeddings, whose rows have nothing to do with each other, stay where they are.

    Source: ours. Orthogonalised momentum is Muon's (Jordan et al. 2024), whose Newton-Schulz coefficients these are;
    Nesterov momentum on displacements is SNOO's (arXiv 2510.15830).
    """

    reference = "orthogonalised momentum on displacements: ours, from Muon (Jordan et al. 2024) and SNOO"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        """Options."""

        momentum: float = field(default=0.0, metadata={"help": "μ, what is kept of earlier displacements"})
        share: float = field(default=1.0, metadata={"help": "κ, of the displacement that is made orthogonal"})
        gain: float = field(default=1.3, metadata={"help": "length of the orthogonal part, in lengths of d"})

        def __post_init__(self) -> None:
            if not 0 <= self.momentum < 1:
                raise ValueError(f"momentum = {self.momentum}, expected 0 or more and less than 1.")

    _config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._momentum = SlowMomentum(config.momentum)

    @property
    def context(self) -> int:
        """Two points."""
        return 2

    def require(self, seen: Observed, *, every: int, ahead: int) -> None:
        """The network has to have a matrix."""
        if not any(_is_map(slot, seen.tables) for slot in seen.layout.floats):
            shapes = ", ".join(f"{slot.name} {list(slot.shape)}" for slot in seen.layout.floats[:4])
            raise UsageError(
                f"spectral: leaps with matrices and convolutions, and the network has none: {shapes}"
                f"{', …' if len(seen.layout.floats) > 4 else ''}.",
                "Choose another predictor: outer, shift, …; see farcli methods --leaps.",
            )

    def propose(self, seen: Observed, ahead: int, strength: float) -> Proposal:
        """κ(s·U − d) for each matrix."""
        kappa, done_D = self._config.share, seen.displacement()
        ahead_D = self._momentum.ahead(done_D)
        move_D = torch.zeros_like(done_D)
        for slot in seen.layout.floats:
            if not _is_map(slot, seen.tables):
                continue
            rows = slice(slot.offset, slot.stop)
            done, wanted = done_D[rows], ahead_D[rows].view(slot.shape[0], -1)
            even = orthogonal(wanted).reshape(-1)
            size = float(even.norm())
            if size > 0:
                even = even * (self._config.gain * float(done.norm()) / size)
                move_D[rows] = (even - done) * (kappa * strength)
        return Proposal(move_D=move_D)

    def operations(self, layout: Layout, tables: frozenset[str]) -> float:
        """Of each round on an n × m matrix, n ≤ m: two products of 2n²m and one of 2n³."""
        total = 0.0
        for slot in layout.floats:
            if _is_map(slot, tables):
                n, m = sorted((slot.shape[0], slot.size // slot.shape[0]))
                total += _ROUNDS * (4 * n * n * m + 2 * n**3)
        return total

    def state(self) -> Mapping[str, Tensor]:
        """The momentum b."""
        return self._momentum.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take b back."""
        self._momentum.restore(state)


def _is_map(slot: Slot, tables: frozenset[str]) -> bool:
    """Whether a tensor is a matrix between two spaces; convolutions are, from all but their first axis."""
    return len(slot.shape) > 1 and 1 < slot.shape[0] < slot.size and slot.name not in tables


def orthogonal(matrix: Tensor) -> Tensor:
    """About UVᵀ of a matrix USVᵀ: singular values between .7 and 1.2 after five rounds of a quintic Newton-Schulz."""
    a, b, c = _QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-30)
    for _ in range(_ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
