"""The rows of an evaluation: measures over all runs, places, and how sure they are.

Shape suffixes: B runs of all stores, C candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from farcli.cooling import steps_to_reach
from farcli.evaluation import Candidate, HeldOut, Measure, Setting
from farcli.forecasting import overlap
from farcli.layout import Layout
from farcli.metrics import DisplacementSums, bootstrap_interval

TRUE, CONTROL, CHANCE = "true future", "falling rate", "chance"
_LOSS_KEYS = (
    "loss",
    "accuracy",
    "equivalent_steps",
    "equivalent_steps_low",
    "equivalent_steps_high",
    "bounded",
    "net_steps",
    "control_steps",
    "control_furthest",
    "finished_loss",
    "saved_steps",
    "better",
    "not_worse",
    "kept",
    "length",
)
_RANK_KEYS = ("ranked_by", "rank", "behind", "behind_low", "behind_high", "gain", "gain_low", "gain_high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """The candidates of one store, weighed."""

    candidates: Sequence[Candidate]
    setting: Setting
    sums: Sequence[DisplacementSums]
    measure: Measure | None
    found: HeldOut | None


def weighed_rows(weighed: Sequence[Weighed], *, per_tensor: bool) -> list[dict[str, Any]]:
    """The rows of an evaluation; see `farcli.verbs.evaluate.evaluate`.

    Args:
        weighed: the same candidates at the same steps, on each store.
        per_tensor: add rows for each tensor.
    """
    first = weighed[0]
    setting, candidates = first.setting, first.candidates
    layout = setting.truth.layout
    sums = [DisplacementSums.joined([each.sums[index] for each in weighed]) for index in range(len(candidates))]
    parameters = [index for index, slot in enumerate(layout.floats) if slot.role == "parameter"]
    stated = "reestimate" if setting.buffers == "reestimate" else setting.policy
    if layout.size == layout.parameters:
        stated = None  # the network has none
    measured = all(each.found is not None for each in weighed)
    control = _control(weighed) if measured else None
    finish = setting.steps_H[0] - setting.origin
    cost = first.measure.cost if first.measure is not None else None
    in_sample = [
        any(set(overlap(e.candidates[i].training, e.setting.truth)) & set(e.setting.source.runs) for e in weighed)
        for i in range(len(candidates))
    ]
    rows: list[dict[str, Any]] = []
    no_loss: dict[str, Any] = dict.fromkeys(_LOSS_KEYS)
    for h, step in enumerate(setting.steps_H):
        base = {
            "step": step,
            "ahead": step - setting.origin,
            "runs": sum(len(each.setting.source.runs) for each in weighed),
            "stores": len(weighed),
            "buffers": stated,
        }
        losses = [_Losses.of(weighed, index, step) if measured else None for index in range(len(candidates))]
        errors_CB = [each.errors(parameters, layout.parameters, h) for each in sums]
        judged_CB = [each.loss_B for each in losses if each is not None] or errors_CB
        kept_B = losses[0].kept_B if losses and losses[0] is not None else _persistence(sums[0], parameters, layout, h)
        ranks = _ranks(judged_CB, kept_B, "loss" if measured else "mse")
        for index, candidate in enumerate(candidates):
            who = {**base, "method": candidate.label, "role": candidate.role, "in_sample": in_sample[index]}
            of_loss = losses[index]
            rows.append(
                {
                    **who,
                    "tensor": None,
                    **sums[index].measures(parameters, layout.parameters, h),
                    **(of_loss.measures(cost, control, finish) if of_loss is not None else no_loss),
                    **ranks[index],
                }
            )
            if per_tensor:
                rows += [
                    {
                        **who,
                        "tensor": layout.floats[slot].name,
                        **sums[index].measures([slot], layout.floats[slot].size, h),
                        **dict.fromkeys((*_LOSS_KEYS, *_RANK_KEYS)),
                    }
                    for slot in parameters
                ]
        nobody = {**base, "in_sample": False, "tensor": None}
        truth = _Losses.of(weighed, TRUE, step).measures(cost, control) if measured else no_loss
        exact = {"mse": 0.0, "skill": 1.0, "cosine": 1.0, "width": None, "covered": None}
        rows.append({**nobody, "method": TRUE, "role": "truth", **exact, **truth, **dict.fromkeys(_RANK_KEYS)})
        if control is not None:
            unknown = dict.fromkeys(("mse", "skill", "cosine", "width", "covered", *_RANK_KEYS))
            found = _Losses.of(weighed, CONTROL, step).measures(base["ahead"], control)
            rows.append({**nobody, "method": CONTROL, "role": "control", **unknown, **found})
        if first.measure is not None and first.measure.chance is not None:
            empty = dict.fromkeys(("mse", "skill", "cosine", "width", "covered", *_LOSS_KEYS, *_RANK_KEYS))
            rows.append({**nobody, "method": CHANCE, "role": "chance", **empty, **first.measure.chance})
    return rows


def _control(weighed: Sequence[Weighed]) -> list[tuple[int, float]] | None:
    """Steps ahead and mean loss of the runs trained on with a falling rate, over all stores; None without them."""
    found = [each.found.control for each in weighed if each.found is not None]
    runs = [measures for results in found if results is not None for measures in results.values()]
    if not runs:
        return None
    origin = weighed[0].setting.origin
    return [(end - origin, float(np.mean([measures[end]["loss"] for measures in runs]))) for end in sorted(runs[0])]


def _persistence(sums: DisplacementSums, parameters: Sequence[int], layout: Layout, horizon: int) -> np.ndarray:
    return sums.true_BHS[:, horizon, list(parameters)].sum(-1) / layout.parameters


def _ranks(judged_CB: Sequence[np.ndarray], kept_B: np.ndarray, by: str) -> list[dict[str, Any]]:
    """Places of the candidates by the mean over runs of what they are judged by, the smaller the better."""
    means = [float(values.mean()) for values in judged_CB]
    order = sorted(range(len(means)), key=lambda index: (not np.isfinite(means[index]), means[index]))
    best_B = judged_CB[order[0]]
    found: list[dict[str, Any]] = [{} for _ in means]
    for place, index in enumerate(order, 1):
        values_B = judged_CB[index]
        row: dict[str, Any] = {"ranked_by": by, "rank": place}
        for key, differences_B in (("behind", values_B - best_B), ("gain", kept_B - values_B)):
            low, high = bootstrap_interval(differences_B)
            row |= {key: float(differences_B.mean()), f"{key}_low": _number(low), f"{key}_high": _number(high)}
        found[index] = row
    return found


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Losses:
    """Held-out measures of one candidate at one horizon, of every run."""

    loss_B: np.ndarray
    kept_B: np.ndarray
    """Loss of the last observed weights."""
    worth_B: np.ndarray
    bounded: int
    accuracies: list[float]
    finished_B: np.ndarray | None
    """Loss after training on from there, the rate falling to 0; None where nobody asked."""
    length_B: np.ndarray | None
    """Share of the way to the forecast that passed verification, 0 where none did; None where nothing is verified."""

    @classmethod
    def of(cls, weighed: Sequence[Weighed], candidate: int | str, step: int) -> "_Losses":
        """Of a candidate, or of what is held beside: the recorded future (TRUE) or the control (CONTROL)."""
        losses, kept, worth, accuracies, lengths, finished, bounded = [], [], [], [], [], [], 0
        judged = candidate if isinstance(candidate, int) else None
        verified = judged is not None and all(each.measure and each.measure.verification for each in weighed)
        for each in weighed:
            assert each.found is not None
            beside = {TRUE: each.found.recorded, CONTROL: each.found.control}
            results = beside[candidate] if isinstance(candidate, str) else each.found.forecast[candidate]
            assert results is not None
            for run in each.setting.source.runs:
                lengths += [each.found.lengths[judged][run, step]] if judged is not None else []
                measures, keep = results[run][step], each.found.recorded[run][each.setting.origin]["loss"]
                steps, bound = each.found.curves[run].steps_to(measures["loss"])
                losses.append(measures["loss"])
                kept.append(keep)
                worth.append(steps - each.found.curves[run].steps_to(keep)[0])
                bounded += bound
                if judged is not None and each.found.finished is not None:
                    after = each.found.finished[judged][run].get(step)
                    finished += [after["loss"]] if after is not None else []
                accuracies += [measures["accuracy"]] if "accuracy" in measures else []
        return cls(
            loss_B=np.array(losses),
            kept_B=np.array(kept),
            worth_B=np.array(worth),
            bounded=bounded,
            accuracies=accuracies,
            finished_B=np.array(finished) if finished else None,
            length_B=np.array(lengths) if verified else None,
        )

    def measures(
        self, cost: float | None, control: Sequence[tuple[int, float]] | None, finish: int = 0
    ) -> dict[str, Any]:
        """Means and medians over the runs.

        Args:
            cost: of checking one forecast, in training steps.
            control: steps and mean losses of the runs trained on with a falling rate.
            finish: steps that training went on from there.
        """
        equivalent = float(np.median(self.worth_B))
        low, high = bootstrap_interval(self.worth_B, np.median)
        length_B, loss, kept = self.length_B, float(self.loss_B.mean()), float(self.kept_B.mean())
        finished = None if self.finished_B is None else float(self.finished_B.mean())
        reached = None if control is None or finished is None else steps_to_reach(finished, kept, control)
        return {
            "loss": loss,
            "accuracy": float(np.mean(self.accuracies)) if self.accuracies else None,
            "equivalent_steps": equivalent,
            "equivalent_steps_low": _number(low),
            "equivalent_steps_high": _number(high),
            "bounded": self.bounded,
            "net_steps": equivalent - cost if cost is not None else None,
            "control_steps": None if control is None else steps_to_reach(loss, kept, control),
            "control_furthest": None if control is None else control[-1][0],
            "finished_loss": finished,
            "saved_steps": None if reached is None else reached - finish,
            "better": float((self.loss_B < self.kept_B).mean()),
            "not_worse": float((self.loss_B <= self.kept_B).mean()),
            "kept": None if length_B is None else float((length_B > 0).mean()),
            "length": None if length_B is None or not length_B.any() else float(length_B[length_B > 0].mean()),
        }
