"""What became of every leap proposed: one row each."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pending", "accepted", "rejected", "rolled back", "unverified", "skipped"]


@dataclass(slots=True, kw_only=True)
class Entry:
    """One proposal.

    Attributes:
        step: at which it was made.
        predictor: by which.
        strength: of the leap.
        ahead: steps it was to leap.
        length: of the leap, in lengths of training's displacement since the last point.
        displacement_cosine: between training's last two displacements; None where there are not two.
        activation_cosine: of the verification data's activations, between the two networks that were compared: before
            and after the leap (immediate, or a first look refused), or the averages at the window's two ends. None
            where nobody took them.
        loss_before: on verification data, before the leap (immediate), or of the average where the window began.
        loss_after: right after the leap (immediate), or of the average at the verdict.
        verdict_step: step of the verdict.
        cost: of proposing and verifying, in training steps.
        equivalent_steps: training steps that the fall of the loss at an immediate gate is worth, at the pace at which
            loss fell between gates; an estimate, since only a control run knows. None where there is no pace, and for
            delayed verdicts, which have nothing to compare a window with.
        lost_steps: training steps thrown away by a roll-back.
        verdict: what became of it.
        reason: in words.
    """

    step: int
    predictor: str
    strength: float
    ahead: int
    length: float
    displacement_cosine: float | None = None
    activation_cosine: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    verdict_step: int | None = None
    cost: float = 0.0
    equivalent_steps: float | None = None
    lost_steps: int = 0
    verdict: Verdict = "pending"
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """For printing."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A training's leaps in sum.

    Attributes:
        steps: that training took.
        proposals: leaps proposed.
        accepted: those that were kept after verification.
        unverified: those that were kept without.
        rejected: those refused at once, or rolled back.
        verification: steps' worth of verifying.
        proposing: steps' worth of making proposals.
        lost: steps thrown away by roll-backs; they are among `steps`.
        equivalent: steps that accepted leaps were worth, by the estimate of the rows that have one.
    """

    steps: int
    proposals: int
    accepted: int
    unverified: int
    rejected: int
    verification: float
    proposing: float
    lost: int
    equivalent: float

    @classmethod
    def of(cls, entries: list[Entry], steps: int, verification: float, proposing: float) -> "Account":
        """Add up."""
        kept = [entry for entry in entries if entry.verdict == "accepted"]
        return cls(
            steps=steps,
            proposals=len(entries),
            accepted=len(kept),
            unverified=sum(entry.verdict == "unverified" for entry in entries),
            rejected=sum(entry.verdict in ("rejected", "rolled back") for entry in entries),
            verification=verification,
            proposing=proposing,
            lost=sum(entry.lost_steps for entry in entries),
            equivalent=sum(entry.equivalent_steps or 0.0 for entry in kept),
        )

    @property
    def cost(self) -> float:
        """Of the whole training, in steps: those taken and what proposing and verifying cost."""
        return self.steps + self.verification + self.proposing
