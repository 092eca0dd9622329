"""How good a forecast is: in weights, in loss, and in training steps saved.

Shape suffixes: B runs, H horizons, D coordinates, S tensors, T snapshots.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from farcli.layout import Segment

_DRAWS, _LEVEL = 2000, 0.95


def bootstrap_interval(values_B: np.ndarray | Sequence[float], of: Callable[..., Any] = np.mean) -> tuple[float, float]:
    """A 95 % interval of a statistic over runs, by drawing runs with replacement (percentile bootstrap).

    Of differences between two forecasts of the same runs it is a paired interval: how runs differ from one
    another cancels. With fewer than about eight runs it is too narrow; with one it is NaN.

    Args:
        values_B: one number for each run.
        of: the statistic, called with `axis`.

    Returns:
        The interval's ends; the same each time, since the draws are seeded.
    """
    values = np.asarray(values_B, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    found = of(values[drawn], axis=1)
    low, high = np.quantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


_SUMS = ("error_BHS", "product_BHS", "forecast_BHS", "true_BHS", "width_BHS", "covered_BHS")


@dataclass(slots=True)
class DisplacementSums:
    """Sums over coordinates that decide the weight-space measures, per run, horizon and tensor.

    With e = ŵ − w_m, p = ŵ − w_n (forecast displacement) and q = w_m − w_n (true displacement), w_n being
    the last observed weights: Σe², Σp·q, Σp², Σq². Sums of blocks add up to those of the whole.
    """

    shape: tuple[int, int, int]
    """(B runs, H horizons, S tensors)."""
    error_BHS: np.ndarray = field(init=False)
    product_BHS: np.ndarray = field(init=False)
    forecast_BHS: np.ndarray = field(init=False)
    true_BHS: np.ndarray = field(init=False)
    width_BHS: np.ndarray = field(init=False)
    """Σ of the widths of 90 % intervals, where the forecast has any."""
    covered_BHS: np.ndarray = field(init=False)
    """How many coordinates lie within them."""
    intervals: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        for name in _SUMS:
            setattr(self, name, np.zeros(self.shape))

    def add(
        self,
        rows: Sequence[int],
        segments: Sequence[Segment],
        last_BD: Tensor,
        forecast_BHD: Tensor,
        truth_BHD: Tensor,
        half_BHD: Tensor | None = None,
    ) -> None:
        """Take in one block.

        Args:
            rows: positions of the block's runs on axis B of the sums.
            segments: which columns belong to which tensor.
            last_BD: the last observed weights.
            forecast_BHD: the forecast.
            truth_BHD: the recorded future.
            half_BHD: half-widths of the forecast's intervals; None where it has none.
        """
        self.intervals = half_BHD is not None
        error = (forecast_BHD - truth_BHD).double()
        moved = (forecast_BHD - last_BD[:, None]).double()
        true = (truth_BHD - last_BD[:, None]).double()
        found = [
            (self.error_BHS, error * error),
            (self.product_BHS, moved * true),
            (self.forecast_BHS, moved * moved),
            (self.true_BHS, true * true),
        ]
        if half_BHD is not None:
            found += [(self.width_BHS, 2 * half_BHD.double()), (self.covered_BHS, (error.abs() <= half_BHD).double())]
        for total, product in found:
            for segment in segments:
                part = product[:, :, segment.start : segment.stop].sum(-1)
                total[list(rows), :, segment.slot] += part.cpu().numpy()

    @classmethod
    def joined(cls, parts: Sequence["DisplacementSums"]) -> "DisplacementSums":
        """The sums of the runs of several stores."""
        runs, horizons, tensors = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        whole = cls((runs, horizons, tensors))
        whole.intervals = all(part.intervals for part in parts)
        for name in _SUMS:
            getattr(whole, name)[:] = np.concatenate([getattr(part, name) for part in parts])
        return whole

    def errors(self, tensors: Sequence[int], coordinates: int, horizon: int) -> np.ndarray:
        """Mean squared error of each run; see `measures`."""
        return self.error_BHS[:, horizon, list(tensors)].sum(-1) / coordinates

    def measures(self, tensors: Sequence[int], coordinates: int, horizon: int) -> dict[str, float | None]:
        """MSE, skill and cosine over some tensors at one horizon, over all runs.

        Args:
            tensors: indices on axis S.
            coordinates: number of coordinates these tensors have together.
            horizon: index on axis H.

        Returns:
            "mse": mean squared error, over runs and coordinates;
            "skill": 1 − MSE / MSE of persistence (1 perfect, 0 as good as keeping w_n);
            "cosine": cosine between forecast and true displacement, mean over runs; NaN where nothing
            is forecast to move;
            "width": mean width of the 90 % intervals, "covered": share of coordinates within them (.9 is right);
            None where the forecast has none.
        """
        error, product, forecast, true = (
            total[:, horizon, list(tensors)].sum(-1)
            for total in (self.error_BHS, self.product_BHS, self.forecast_BHS, self.true_BHS)
        )
        norms = np.sqrt(forecast * true)
        cosine = np.divide(product, norms, out=np.full_like(product, np.nan), where=norms > 0)
        mse = float(error.mean() / coordinates)
        persistence = float(true.mean() / coordinates)
        return {
            "mse": mse,
            "skill": 1.0 - mse / persistence if persistence > 0 else float("nan"),
            "cosine": float(cosine.mean()) if np.isfinite(cosine).all() else float("nan"),
            **{
                key: float(total[:, horizon, list(tensors)].sum(-1).mean() / coordinates) if self.intervals else None
                for key, total in (("width", self.width_BHS), ("covered", self.covered_BHS))
            },
        }


def monotone(losses_T: Sequence[float]) -> np.ndarray:
    """The non-increasing sequence closest to a noisy loss curve in least squares (pool adjacent violators).

    Reading steps off this curve neither rewards a lucky dip nor punishes an unlucky bump, which the
    first crossing of a raw curve would.
    """
    values: list[float] = []
    weights: list[int] = []
    for loss in losses_T:
        values.append(float(loss))
        weights.append(1)
        while len(values) > 1 and values[-2] < values[-1]:
            total = weights[-2] + weights[-1]
            pooled = (values[-2] * weights[-2] + values[-1] * weights[-1]) / total
            values[-2:], weights[-2:] = [pooled], [total]
    return np.repeat(values, weights)


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Held-out loss of a recorded run at its snapshots: what a forecast's loss is weighed against."""

    steps_T: np.ndarray
    losses_T: np.ndarray
    """Non-increasing."""

    @classmethod
    def of(cls, steps: Sequence[int], losses: Sequence[float]) -> "LossCurve":
        """The curve of one run; snapshots whose loss is not finite are left out."""
        finite = [(step, loss) for step, loss in zip(steps, losses, strict=True) if np.isfinite(loss)]
        return cls(np.array([step for step, _ in finite], float), monotone([loss for _, loss in finite]))

    def steps_to(self, loss: float) -> tuple[float, bool]:
        """How many training steps of this run give a loss.

        Returns:
            The first step at which the curve is down at `loss`, interpolated between snapshots, and whether
            it is only a bound: the first step for a loss above the whole curve, the last for one below it.
            NaN where the curve is empty.
        """
        if not self.steps_T.size:
            return float("nan"), True
        if not np.isfinite(loss) or loss > self.losses_T[0]:
            return float(self.steps_T[0]), True
        index = int(np.argmax(self.losses_T <= loss)) if loss >= self.losses_T[-1] else -1
        if index < 0:
            return float(self.steps_T[-1]), True
        if index == 0:
            return float(self.steps_T[0]), False
        high, low = self.losses_T[index - 1], self.losses_T[index]
        share = (high - loss) / (high - low)
        left, right = self.steps_T[index - 1], self.steps_T[index]
        return float(left + share * (right - left)), False
