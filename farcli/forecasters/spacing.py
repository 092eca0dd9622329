"""Evenly spaced snapshots among those of a context."""

from collections.abc import Sequence

from farcli.errors import UsageError
from farcli.forecasters.base import require_future


def evenly_spaced(who: str, least: int, steps_C: Sequence[int], *, most: int | None = None) -> tuple[int, ...]:
    """The evenly spaced snapshots that end at the last one: the most there are, of several the closest.

    Args:
        who: the method's name, for messages.
        least: how many it needs.
        steps_C: steps of the context.
        most: how many it takes, at most.

    Raises:
        UsageError: there are fewer than `least`.
    """
    require_future(who, least, steps_C, ())
    recorded, last = set(steps_C), steps_C[-1]
    best: tuple[int, ...] = ()
    for before in reversed(steps_C[:-1]):
        gap = last - before
        found = [last]
        while found[-1] - gap in recorded and (most is None or len(found) < most):
            found.append(found[-1] - gap)
        if len(found) > len(best):
            best = tuple(reversed(found))
    if len(best) < least:
        raise UsageError(
            f"{who} needs {least} evenly spaced snapshots that end at the last, found at most {len(best)} "
            f"among steps {', '.join(map(str, steps_C))}.",
            "Give a longer --context, or record with --every.",
        )
    return best
