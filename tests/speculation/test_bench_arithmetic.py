"""What the benchmark of leaps makes of losses and costs."""

import runpy
from pathlib import Path

import pytest

cost_to = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "leap_bench.py"))["cost_to"]
INF = float("inf")


@pytest.mark.parametrize(
    ("losses", "cost", "beyond"),
    [
        ([3.0, 2.0], 300 * 2**0.5, False),  # half way down, over log cost
        ([2.4, 2.3], 300.0, True),  # there already with the least that ran: no more is claimed than that
        ([2.4, 2.6], 300.0, True),
        ([2.8, 2.6], 600 * 2**0.5, True),  # half as far again
        ([2.61, 2.6], 1200.0, True),  # but no further than twice what ran
        ([2.6, 2.7], INF, True),
        ([INF, 2.0], 600.0, False),
        ([2.6, INF], INF, True),
        ([INF, INF], INF, True),
    ],
)
def test_cost_to_a_loss(losses: list[float], cost: float, beyond: bool) -> None:
    found, bound = cost_to([300.0, 600.0], losses, 2.5)
    assert found == pytest.approx(cost)
    assert bound is beyond
