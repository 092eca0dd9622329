"""Directions, criteria, regimes and AUC against independent truth."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from farcli.errors import UsageError
from farcli.layout import layout_of
from farcli.regimes import Probe, Thresholds, displacement_cosine, regimes, similarity
from farcli.speculation.offline import CRITERIA, along_moments, auc, causal_spread, past_share, reached
from farcli.verbs.leap_offline_predictors import Past, PrintedQuadratic, TableForecaster, _from_table

STEPS, DELTA = (40, 50, 60), 10


def past(curve):
    """Weights along a curve, at three snapshots, as a predictor sees them."""
    layout = layout_of([("weight", (4,), "float64", "parameter")])
    return Past(run=0, steps_C=STEPS, weights_CD=[curve(step) for step in STEPS], layout=layout)


def parabola(step):
    coefficients = np.random.default_rng(0).normal(size=(3, 4)) / [[1], [10], [1000]]
    return coefficients[0] + coefficients[1] * step + coefficients[2] * step**2


@pytest.mark.parametrize("ahead", [1, 5, 10, 25, 100])
def test_the_true_parabola_hits_and_the_printed_one_misses_by_s_second_differences(ahead):
    quadratic: TableForecaster = _from_table("quadratic", 5, {}, set())
    truth = parabola(60 + ahead)
    np.testing.assert_allclose(quadratic.forecast(past(parabola), ahead), truth, rtol=1e-9)
    bend = parabola(60) - 2 * parabola(50) + parabola(40)
    printed = PrintedQuadratic().forecast(past(parabola), ahead)
    np.testing.assert_allclose(truth - printed, ahead / DELTA * bend, rtol=1e-7)


@pytest.mark.parametrize("ahead", [1, 5, 100])
def test_a_straight_line_is_hit_by_linear(ahead):
    linear = _from_table("linear", 5, {}, set())
    line = lambda step: np.array([1.0, -2.0, 0.5, 0.0]) + 0.01 * step * np.array([1.0, 2.0, 0.0, -3.0])  # noqa: E731
    np.testing.assert_allclose(linear.forecast(past(line), ahead), line(60 + ahead), rtol=1e-12)


class TestMoments:
    def trained(self, updates, scale=1.0):
        """Adam under a constant gradient: corrected moments stay what they are, so the leap is exact."""
        weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        gradient = scale * torch.tensor([1.0, -2.0, 0.1, 3.0, -0.5], dtype=torch.float64)
        optimizer = torch.optim.Adam([weight], lr=0.01)
        for _ in range(updates):
            weight.grad = gradient.clone()
            optimizer.step()
        return weight, gradient, optimizer

    @pytest.mark.parametrize("ahead", [1, 7])
    def test_corrected_is_adam_itself_under_a_constant_gradient(self, ahead):
        weight, _, optimizer = self.trained(9)
        before, state = weight.detach().clone(), optimizer.state[weight]
        direction = along_moments(state["exp_avg"], state["exp_avg_sq"], updates=9)
        after, _, _ = self.trained(9 + ahead)
        torch.testing.assert_close((before + ahead * 0.01 * direction).detach(), after.detach(), rtol=1e-5, atol=1e-8)

    def test_uncorrected_is_too_long_when_young(self):
        weight, _, optimizer = self.trained(9)
        first, second = (optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))
        ratio = along_moments(first, second, updates=9, corrected=False) / along_moments(first, second, updates=9)
        expected = (1 - 0.9**9) / (1 - 0.999**9) ** 0.5
        assert expected > 6
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=1e-4, atol=0)

    def test_half_precision_loses_small_second_moments_and_divides_by_epsilon(self):
        weight, _, optimizer = self.trained(9, scale=1e-3)
        first, second = (optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq"))
        assert float(second.max()) < 1e-7
        found = along_moments(first, second, updates=9, corrected=False, precision=torch.float16)
        lost = second < 2**-25  # half of the smallest number above 0
        assert lost.any()
        torch.testing.assert_close(found[lost], -(first.half().float() / 1e-8)[lost])
        same = along_moments(first, second, updates=9, corrected=False, precision=torch.bfloat16)
        torch.testing.assert_close(same, along_moments(first, second, updates=9, corrected=False), rtol=1e-2, atol=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_auc_counts_pairs(pairs):
    signal, good = [float(value) for value, _ in pairs], [flag for _, flag in pairs]
    wins = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p, positive in zip(signal, good, strict=True)
        if positive
        for n, other in zip(signal, good, strict=True)
        if not other
    ]
    found = auc([*signal, np.nan], [*good, True])
    assert (found.positives, found.negatives) == (sum(good), len(good) - sum(good))
    if wins:
        assert found.value == pytest.approx(np.mean(wins))
        assert 0 <= found.low <= found.high <= 1
    else:
        assert np.isnan(found.value)


def test_auc_of_a_perfect_and_of_a_reversed_signal():
    good = [False] * 10 + [True] * 10
    assert auc(range(20), good).value == 1
    assert auc([-value for value in range(20)], good).value == 0
    assert auc(np.random.default_rng(0).normal(size=20), good).low < 0.5


losses = st.lists(st.floats(0.1, 10), min_size=2, max_size=20)


@given(losses, st.integers(1, 19), st.sampled_from([None, 2, 5]))
def test_the_causal_spread_never_sees_the_future(series, place, window):
    place = min(place, len(series) - 1)
    other = [*series[:place], *(100 - value for value in series[place:])]
    assert causal_spread(series, window)[:place] == causal_spread(other, window)[:place]


def test_the_causal_spread_of_all_and_of_the_last():
    series = [4.0, 2.0, 3.0, 3.0]
    assert causal_spread(series) == pytest.approx([0, 1, np.std([4, 2, 3]), np.std(series)])
    assert causal_spread(series, 2) == pytest.approx([0, 1, 0.5, 0])


def test_past_outcomes_leave_out_the_present_one():
    assert past_share([True, False, True, True], 2)[1:] == [1, 0.5, 0.5]
    assert np.isnan(past_share([True], 5)[0])


@pytest.mark.parametrize(
    ("forecast", "accepted"),
    [
        (1.9, {"strict", "adaptive", "proximity"}),
        (1.995, {"strict", "adaptive", "proximity", "proximity-printed"}),
        (2.0, {"adaptive", "proximity", "proximity-printed"}),
        (2.009, {"adaptive", "proximity", "proximity-printed"}),
        (2.05, {"adaptive"}),
        (2.2, set()),
        (float("nan"), set()),
    ],
)
def test_criteria(forecast, accepted):
    found = {name for name, each in CRITERIA.items() if not each.foresees and each.holds(forecast, 2.0, 0.1)}
    assert found == accepted


def test_a_cascade_ends_where_a_leap_is_no_better_than_the_one_before():
    assert reached([1.9, 1.8, 1.85, 1.7], 2.0) == 2
    assert reached([2.0], 2.0) == 0
    assert reached([1.9, 1.8], 2.0) == 2
    assert reached([], 2.0) == 0


def test_regimes_of_a_series():
    series = [0.5, 0.95, 0.92, 0.7, float("nan"), 0.91, 0.2, 0.95, 0.95, 0.95]
    assert regimes(series, Thresholds(0.5, 0.9)) == [
        *("transition", "transition", "stable", "transition", None),
        *("transition", "chaotic", "transition", "stable", "stable"),
    ]
    assert regimes(series, Thresholds(0.5, 0.9), confirm=1)[1] == "stable"


def test_thresholds_are_percentiles():
    found = Thresholds.of_percentiles([*range(11), float("nan")])
    assert (found.low, found.high) == (3, 7)
    with pytest.raises(UsageError, match="above high"):
        Thresholds(0.9, 0.5)
    with pytest.raises(UsageError, match="percentiles"):
        Thresholds.of_percentiles([1.0], 70, 30)


def test_similarity_is_the_mean_of_cosines():
    before, now = np.array([[1.0, 0.0], [3.0, 4.0]], np.float32), np.array([[0.0, 2.0], [6.0, 8.0]], np.float32)
    assert similarity(before, now) == pytest.approx(0.5)


def test_displacements_on_a_line_and_at_a_right_angle():
    a, b, c, d = (np.array(each, np.float32) for each in ([0, 0], [1, 1], [3, 3], [2, 0]))
    assert displacement_cosine(a, b, c) == pytest.approx(1)
    assert displacement_cosine(a, b, d) == pytest.approx(0)
    assert displacement_cosine(a, b, a) == pytest.approx(-1)
    assert np.isnan(displacement_cosine(a, a, b))


def test_the_probe_hears_what_goes_into_the_last_linear_layer_averaged_over_tokens():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    inputs = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    with Probe(model, 4) as probe:
        for batch in inputs.split(3):
            model(batch)
    expected = model[1](model[0](inputs)).mean(1)[:4].detach().numpy()
    np.testing.assert_allclose(probe.fingerprint(), expected, rtol=1e-6)
    model(inputs)  # outside the block nobody listens
    assert len(probe.fingerprint()) == 4
    with pytest.raises(UsageError, match=r"no nn\.Linear"):
        Probe(nn.Conv2d(1, 1, 1), 4)
