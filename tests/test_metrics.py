import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farcli.layout import layout_of
from farcli.metrics import DisplacementSums, LossCurve, bootstrap_interval, monotone

LAYOUT = layout_of([("a", (3,), "float32", "parameter"), ("b", (2, 2), "float32", "parameter")])


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    last = torch.randn(4, 7, generator=generator)
    return last, *(torch.randn(4, 3, 7, generator=generator) for _ in range(2))


def test_measures_equal_dense_numpy():
    last, forecast, truth = weights(0)
    sums = DisplacementSums((4, 3, 2))
    sums.add(range(4), LAYOUT.segments(0, 7), last, forecast, truth)
    w, f, y = (t.double().numpy() for t in (last, forecast, truth))
    for h in range(3):
        found = sums.measures([0, 1], 7, h)
        mse = ((f[:, h] - y[:, h]) ** 2).mean()
        keep = ((w - y[:, h]) ** 2).mean()
        p, q = f[:, h] - w, y[:, h] - w
        cosine = ((p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1)).mean()
        assert found["mse"] == pytest.approx(mse, rel=1e-6)
        assert found["skill"] == pytest.approx(1 - mse / keep, rel=1e-6)
        assert found["cosine"] == pytest.approx(cosine, rel=1e-6)
        only_b = sums.measures([1], 4, h)
        assert only_b["mse"] == pytest.approx(((f[:, h, 3:] - y[:, h, 3:]) ** 2).mean(), rel=1e-6)


@given(st.integers(1, 6), st.integers(1, 3))
def test_blocks_add_up(cut, split):
    last, forecast, truth = weights(1)
    whole, parts = DisplacementSums((4, 3, 2)), DisplacementSums((4, 3, 2))
    whole.add(range(4), LAYOUT.segments(0, 7), last, forecast, truth)
    for rows in (list(range(split)), list(range(split, 4))):
        for start, stop in ((0, cut), (cut, 7)):
            view = (t[rows][..., start:stop] for t in (last, forecast, truth))
            parts.add(rows, LAYOUT.segments(start, stop), *view)
    np.testing.assert_allclose(parts.error_BHS, whole.error_BHS, rtol=1e-12)
    np.testing.assert_allclose(parts.product_BHS, whole.product_BHS, rtol=1e-12)


def test_the_bootstrap_of_a_mean_is_its_normal_interval_for_many_runs():
    values = np.random.default_rng(3).exponential(size=400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=half / 5)
    assert high == pytest.approx(values.mean() + half, abs=half / 5)
    assert bootstrap_interval(values) == (low, high)


def test_the_bootstrap_covers_as_often_as_it_says():
    generator = np.random.default_rng(4)
    intervals = [bootstrap_interval(generator.normal(size=30)) for _ in range(300)]
    assert 0.9 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.98


def test_one_run_or_a_loss_that_is_not_finite_has_no_interval():
    assert np.isnan(bootstrap_interval([1.0])).all()
    assert np.isnan(bootstrap_interval([1.0, np.inf])).all()


def test_keeping_the_weights_has_no_skill_and_no_direction():
    last, _, truth = weights(2)
    sums = DisplacementSums((4, 3, 2))
    sums.add(range(4), LAYOUT.segments(0, 7), last, last[:, None].expand(-1, 3, -1), truth)
    found = sums.measures([0, 1], 7, 0)
    assert found["skill"] == 0.0
    assert np.isnan(found["cosine"])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_monotone_is_the_least_squares_projection(losses):
    fitted = monotone(losses)
    assert (np.diff(fitted) <= 1e-12).all()
    # Projection onto a cone: the residual is orthogonal to the fit, and every step function is no better.
    residual = np.array(losses) - fitted
    assert abs(residual @ fitted) <= 1e-6 * (1 + np.abs(losses).sum() ** 2)
    partial = np.cumsum(residual)
    assert (partial <= 1e-6).all()
    assert abs(partial[-1]) <= 1e-6


def test_snapshots_without_a_finite_loss_are_left_out():
    clean, gap = LossCurve.of([0, 20], [2.0, 1.0]), LossCurve.of([0, 10, 20], [2.0, float("nan"), 1.0])
    for loss in (2.5, 2.0, 1.7, 1.0, 0.5):
        assert gap.steps_to(loss) == clean.steps_to(loss)
    step, bounded = LossCurve.of([0, 10], [float("nan"), float("inf")]).steps_to(1.0)
    assert np.isnan(step)
    assert bounded


class TestLossCurve:
    curve = LossCurve.of([0, 10, 20, 40], [2.0, 1.0, 1.0, 0.5])

    @pytest.mark.parametrize(
        ("loss", "step", "bounded"),
        [
            (2.0, 0, False),
            (1.5, 5, False),
            (1.0, 10, False),  # the first step at which it is reached
            (0.75, 30, False),
            (0.5, 40, False),
            (0.4, 40, True),
            (3.0, 0, True),
            (float("nan"), 0, True),
        ],
    )
    def test_steps_to(self, loss, step, bounded):
        assert self.curve.steps_to(loss) == (pytest.approx(step), bounded)

    def test_a_lucky_dip_is_not_a_gain(self):
        noisy = LossCurve.of([0, 1, 2, 3, 4], [1.0, 0.9, 0.2, 0.9, 0.5])
        assert noisy.losses_T[2] == pytest.approx(0.55)
        assert noisy.steps_to(0.6)[0] > 1 + 0.3 / 0.7  # where the raw curve first crosses
        assert noisy.steps_to(0.3) == (4, True)  # the dip to 0.2 counts for nothing

    @given(st.lists(st.floats(0.01, 5), min_size=2, max_size=20), st.floats(0, 6))
    def test_lower_losses_never_cost_fewer_steps(self, losses, loss):
        curve = LossCurve.of(range(len(losses)), losses)
        assert curve.steps_to(loss)[0] <= curve.steps_to(loss * 0.9)[0] + 1e-9
