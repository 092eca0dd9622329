"""The optimiser that recorded runs were trained by, and what follows from it for a forecaster fitted on others."""

from collections.abc import Sequence

from farcli.errors import FarcliError
from farcli.forecasters.base import FittedForecaster, Known
from farcli.forecasters.update_rules import UpdateRule
from farcli.forecasting import Method
from farcli.stream import Source
from farcli.training import workload_of


def update_rule(sources: Sequence[Source], last: int) -> UpdateRule | None:
    """The update rule of all these runs up to step `last`; None where it is not known, not one, or not constant."""
    rules = set()
    for source in sources:
        try:
            workload = workload_of(source.trajectory.header)
            if workload is None or any(workload.rate(step) != 1 for step in range(last)):
                return None
            rules.add(UpdateRule.of(workload.optimizer(workload.model([0]))))
        except FarcliError:  # of another version, or its data are not here: then its rule is not known here
            return None
    return rules.pop() if len(rules) == 1 else None


def warning_of(method: Method, source: Source, last: int) -> str:
    """What a user should know before `method` forecasts these runs up to step `last`; empty where there is nothing."""
    forecaster = method.forecaster
    if not isinstance(forecaster, FittedForecaster):
        return ""
    found = forecaster.warning(Known(optimizer=lambda: update_rule([source], last)))
    return f"{method.source}: {found}" if found else ""
