"""What there is by name: methods and workloads, each with its options."""

from dataclasses import asdict
from typing import Any

from farcli.config import options_of
from farcli.forecasters.base import FittedForecaster, Forecaster
from farcli.forecasters.table import FORECASTERS
from farcli.registry import resolve
from farcli.speculation.base import Predictor
from farcli.speculation.options import Leaping
from farcli.speculation.predictors.forecast import Forecast
from farcli.speculation.table import PREDICTORS
from farcli.workloads.base import Workload
from farcli.workloads.table import WORKLOADS


def methods() -> list[dict[str, Any]]:
    """One row a forecaster: method, needs_fit, min_context, reference, options."""
    rows = []
    for name in FORECASTERS:
        cls: type[Forecaster] = resolve("forecaster", name, FORECASTERS)
        rows.append(
            {
                "method": name,
                "needs_fit": issubclass(cls, FittedForecaster),
                "min_context": cls(cls.Config()).min_context,
                "reference": cls.reference,
                "options": [asdict(option) for option in options_of(cls.Config)],
            }
        )
    return rows


def predictors() -> list[dict[str, Any]]:
    """One row a predictor of leaps while training: predictor, context, reference, options.

    Forecasters come last but one, as one row with what they have in common, and the leaper's own options last.
    """
    rows = []
    for name in PREDICTORS:
        cls: type[Predictor] = resolve("predictor", name, PREDICTORS)
        rows.append(
            {
                "predictor": name,
                "context": cls(cls.Config()).context,
                "reference": cls.reference,
                "options": [asdict(option) for option in options_of(cls.Config)],
            }
        )
    others = [
        ("(forecasters)", f"by name or FILE.safetensors: {Forecast.reference}", Forecast.Config),
        ("(any)", "options of leaping itself, --leap key=value", Leaping),
    ]
    for name, reference, config in others:
        options = [asdict(option) for option in options_of(config)]
        rows.append({"predictor": name, "context": None, "reference": reference, "options": options})
    return rows


def workloads() -> list[dict[str, Any]]:
    """One row a workload: workload, steps, every, needs, summary, options."""
    rows = []
    for name in WORKLOADS:
        cls: type[Workload] = resolve("workload", name, WORKLOADS)
        rows.append(
            {
                "workload": name,
                "steps": cls.default_steps,
                "every": cls.default_every,
                "needs": f"farcli[{cls.needs}]" if cls.needs else None,
                "summary": cls.summary,
                "options": [asdict(option) for option in options_of(cls.Config)],
            }
        )
    return rows
