"""The optimiser that recorded runs were trained by, and what a user should know of a forecaster fitted on others."""

from collections.abc import Iterator, Sequence

from farcli.errors import FarcliError
from farcli.forecasters.base import FittedForecaster, Known
from farcli.forecasters.update_rules import UpdateRule
from farcli.forecasting import Method
from farcli.stream import Source
from farcli.training import workload_of
from farcli.workloads.base import Workload


def update_rule(sources: Sequence[Source], last: int) -> UpdateRule | None:
    """The update rule of all these runs up to step `last`; None where it is not known, not one, or not constant."""
    workloads = [_workload(source) for source in sources]
    if any(workload is None or workload.rate_change(last) is not None for workload in workloads):
        return None
    rules = {UpdateRule.of(workload.optimizer(workload.model([0]))) for workload in workloads if workload is not None}
    return rules.pop() if len(rules) == 1 else None


def rate_change(source: Source, last: int) -> int | None:
    """The first update of these runs, up to step `last`, that a schedule gives another rate; None if none is known."""
    workload = _workload(source)
    return None if workload is None else workload.rate_change(last)


def warnings_of(method: Method, source: Source, last: int) -> Iterator[str]:
    """What a user should know before `method` forecasts these runs up to step `last`."""
    if method.diverged:
        yield f"{method.source}: holds the best state of a fit that diverged."
    if isinstance(method.forecaster, FittedForecaster):
        known = Known(optimizer=lambda: update_rule([source], last), rate_change=lambda: rate_change(source, last))
        if found := method.forecaster.warning(known):
            yield f"{method.source}: {found}"


def _workload(source: Source) -> Workload | None:
    """What the runs are of; None where that is not known here: it is of another version, or its data are elsewhere."""
    try:
        return workload_of(source.trajectory.header)
    except FarcliError:
        return None
