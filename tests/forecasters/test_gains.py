"""When a gain on runs left out is believed, and which of several is taken."""

import math

import pytest
import torch

from farcli.forecasters.gains import believed, choose, mean_and_error


@pytest.mark.parametrize(
    ("more", "chosen"),
    [
        ([0.5] * 20, 0),  # less, beyond doubt
        ([1.2, 0.75] * 10, 1),  # less by .055 on average, within the error of that, and harms nobody
        ([1.2, 0.85] * 9 + [1.2, -0.1], 1),  # or one of twenty
        ([1.2, 0.85] * 9 + [-0.1, -0.1], 0),
    ],
)
def test_a_leap_that_harms_few_is_chosen_where_it_gains_about_as_much(more: list[float], chosen: int) -> None:
    best_R = torch.tensor([1.2, 1.0] * 8 + [2.0, 2.0, -0.5, -0.5], dtype=torch.float64)
    gain_RQ = torch.stack([best_R, torch.tensor(more, dtype=torch.float64)], dim=1)
    gain_RBQ = gain_RQ[:, None]
    assert choose(gain_RBQ) == chosen
    assert choose(torch.stack([best_R, torch.full_like(best_R, torch.nan)], dim=1)[:, None]) == 0
    assert choose(-gain_RBQ.abs()) in (0, 1)  # something, to be refused


@pytest.mark.parametrize(
    ("gains", "held"),
    [
        ([0.0] * 20, False),
        ([1.0] * 20, True),
        ([0.1] * 19 + [-1.0], False),  # above one standard error, but not by it
        ([1.0] * 19 + [-1.0], True),  # one of twenty is worse
        ([1.0, 1.0, 1.0, -0.9] * 5, True),  # five are, but by more than two standard errors on average
        ([1.0, 0.9, -0.9, -0.7] * 5, False),
        ([1.0] * 19 + [float("nan")], False),
    ],
)
def test_a_gain_is_believed_by_its_error_and_by_the_runs_it_harms(gains: list[float], held: bool) -> None:
    gain_R = torch.tensor(gains, dtype=torch.float64)
    assert bool(believed(gain_R[:, None])) is held
    assert believed(torch.stack([gain_R, gain_R], dim=1)[:, None]).tolist() == [held, held]


def test_runs_that_share_few_batches_know_no_more_than_these() -> None:
    """Runs that agree on every image of a small pool: the error is that of the images, however many runs there are."""
    generator = torch.Generator().manual_seed(0)
    pool, errors, found = 12, [], []
    for _ in range(2000):
        gain_P = 1 + torch.randn(pool, generator=generator, dtype=torch.float64)
        drawn = torch.stack([torch.randperm(pool, generator=generator)[:3] for _ in range(40)])
        mean, error = mean_and_error(gain_P[drawn], pool)
        errors.append(float(mean) - 1)
        found.append(float(error))
    true, said = (math.sqrt(sum(value**2 for value in values) / len(values)) for values in (errors, found))
    assert true == pytest.approx(12**-0.5, rel=0.1)
    assert 0.95 * true < said < 1.3 * true
    alone = mean_and_error(gain_P[drawn])[1]  # as if every run had batches of its own
    assert float(alone) < 0.5 * true


def test_a_gain_on_a_small_pool_is_believed_where_batches_agree() -> None:
    split = torch.tensor([[1.0, 1.0, -1.5]]).expand(20, 3)  # every run gains, on two batches of three
    assert bool(believed(split))
    assert not bool(believed(split, pool=4))
    assert bool(believed(split, pool=10**6))
    same = torch.ones(20, 3) + torch.linspace(-0.1, 0.1, 20)[:, None]
    assert bool(believed(same, pool=4))
    both = torch.stack([1.1 * split + 0.2, same], dim=-1)
    assert choose(both, pool=4) == 1
    single = torch.ones(20, 1) + torch.linspace(-0.1, 0.1, 20)[:, None]
    assert bool(believed(single, pool=1))  # of one batch nothing is known but its mean
