import sys
from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from farcli.errors import UsageError
from farcli.training import TrainingRun, reestimate, run_seed, workload_from
from farcli.workloads.digits_cnn import DigitsCnn, DigitsCnnConfig

SEED = run_seed(0, 0)


@pytest.fixture(scope="module")
def workload() -> DigitsCnn:
    return DigitsCnn(DigitsCnnConfig())


def test_all_images_are_used_once(workload: DigitsCnn):
    (images, labels), *more = workload.calibration(SEED)
    assert not more
    assert (len(images), len(labels)) == (1297, 1297)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-4)
    pixels, answers = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(1797)[500:]
    assert np.array_equal(labels.numpy(), answers[order])
    correlation = np.corrcoef(images.numpy().ravel(), pixels[order].ravel())[0, 1]
    assert correlation == pytest.approx(1, abs=1e-6)


def test_an_epoch_shows_each_image_at_most_once_and_epochs_differ(workload: DigitsCnn):
    batches = workload.batches([SEED])
    first, second = ([batch[0] for batch in islice(batches, 20)] for _ in range(2))
    assert all(len(batch) == 64 for batch in first)
    assert len({image.numpy().tobytes() for batch in first for image in batch}) == 1280
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], next(workload.batches([run_seed(0, 1)]))[0])


def test_size_is_as_documented(workload: DigitsCnn):
    layout = TrainingRun(workload, [SEED]).layout
    assert (layout.parameters, layout.size, layout.integers) == (1922, 1970, 2)


def test_images_held_back_are_those_not_trained_on_and_change_nothing_else(workload: DigitsCnn):
    with pytest.raises(UsageError, match="no images are left") as caught:
        workload.verification(SEED, 0, 1)
    assert caught.value.hint is not None
    less = workload_from("digits-cnn", {"held_back": "300"})
    (trained,), (whole,) = (list(each.calibration(SEED)) for each in (less, workload))
    assert len(trained[0]) == 997
    back = [label for draw in range(2) for _, labels in less.verification(SEED, draw, 2) for label in labels.tolist()]
    assert len(back) == 256
    assert np.all(np.bincount(back) <= np.bincount(whole[1][:300]))
    assert torch.equal(trained[1], whole[1][300:])
    assert float(trained[0].mean()) == pytest.approx(0, abs=1e-5)


def test_it_learns_to_read(workload: DigitsCnn):
    run = TrainingRun(workload, [SEED])
    run.advance(80)
    early = workload.evaluate(run.model, SEED)
    run.advance(220)
    late = workload.evaluate(run.model, SEED)
    assert late["loss"] < 0.6 * early["loss"]
    assert late["accuracy"] > 0.96
    assert run.integers().tolist() == [[300, 300]]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
def test_every_optimiser_trains_with_its_default_rate(optimizer: str):
    workload = workload_from("digits-cnn", {"optimizer": optimizer})
    run = TrainingRun(workload, [SEED])
    run.advance(100)
    assert workload.evaluate(run.model, SEED)["loss"] < 0.25


def test_chance_is_the_class_frequencies(workload: DigitsCnn):
    chance = workload.chance()
    assert np.log(10) < chance["loss"] < np.log(10) + 0.02
    assert 0.05 < chance["accuracy"] < 0.15


def test_reestimated_statistics_are_those_of_the_training_images(workload: DigitsCnn):
    run = TrainingRun(workload, [SEED])
    run.advance(10)
    reestimate(workload, run.model, SEED)
    images, _ = next(workload.calibration(SEED))
    with torch.no_grad():
        outputs = run.model.get_submodule("0")(images).double().transpose(0, 1).flatten(1)
    state = run.model.state_dict()
    torch.testing.assert_close(state["1.running_mean"].double(), outputs.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state["1.running_var"].double(), outputs.var(1), rtol=1e-4, atol=1e-5)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match="scikit-learn") as caught:
        workload_from("digits-cnn", {})
    assert caught.value.hint == "pip install 'farcli[demo]'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": "1"}, "batch=1"),
        ({"batch": "2000"}, "there are 1297 training images"),
        ({"width": "0"}, "width=0"),
        ({"held_back": "-1"}, "held_back=-1"),
        ({"held_back": "1240"}, "batch=64, but there are 57 training images"),
        ({"held_back": "9999"}, "there are 0 training images"),
        ({"lr": "-1"}, "lr=-1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("digits-cnn", options)
    assert message in str(caught.value)
