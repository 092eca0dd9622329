import numpy as np
import pytest
import torch

from farcli.errors import UsageError
from farcli.training import TrainingRun, reestimate, run_seed, workload_from
from farcli.workloads.vit import VisionTransformer

SEED = run_seed(0, 0)
DIGITS = {"data": "digits", "batch": "64", "patch": "4", "hidden": "32", "depth": "1"}


def parameters(options: dict[str, str], shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    config = workload_from("vit", {"data": "digits"} | options).config
    return sum(parameter.numel() for parameter in VisionTransformer(config, shape).parameters())


def test_the_papers_transformer_is_among_the_options():
    config = workload_from("vit", {"data": "digits"}).config
    grid = [(depth, hidden) for depth in range(1, 5) for hidden in (64, 128, 256, 512, 1024)]
    for depth, hidden in grid:
        paper = type(config)(data="digits", depth=depth, hidden=hidden, patch=32)
        count = sum(parameter.numel() for parameter in VisionTransformer(paper, (3, 32, 32)).parameters())
        assert (count == 924_554) == ((depth, hidden) == (4, 128))
    assert parameters({}) == 80_970


def test_tokens_are_patches_in_reading_order():
    config = workload_from("vit", DIGITS).config
    network = VisionTransformer(config, (2, 8, 12))
    seen = []
    network.embedding.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    images = torch.randn(3, 2, 8, 12)
    network(images)
    corners = [(row, column) for row in (0, 4) for column in (0, 4, 8)]
    expected = torch.stack([images[:, :, r : r + 4, c : c + 4].flatten(1) for r, c in corners], dim=1)
    assert torch.equal(seen[0], expected)


def test_positions_matter_and_a_single_token_has_none():
    config = workload_from("vit", DIGITS).config
    network = VisionTransformer(config, (1, 8, 8)).eval()
    images = torch.randn(4, 1, 8, 8)
    moved = torch.cat([images[:, :, 4:], images[:, :, :4]], dim=2)
    assert not torch.allclose(network(images), network(moved), atol=1e-4)
    with torch.no_grad():
        network.positions.zero_()
    torch.testing.assert_close(network(images), network(moved), rtol=1e-4, atol=1e-5)
    assert VisionTransformer(config, (1, 4, 4)).positions is None


def test_dropout_is_drawn_from_the_seed_in_training_only():
    run, again, other = (
        TrainingRun(workload_from("vit", DIGITS | {"dropout": share}), [SEED]) for share in ("0.3", "0.3", "0.0")
    )
    torch.manual_seed(5)
    losses = [run.advance(1)[0] for _ in range(4)]
    torch.manual_seed(6)
    assert [again.advance(1)[0] for _ in range(4)] == losses
    assert again.vectors().tobytes() == run.vectors().tobytes()
    assert other.advance(1)[0] != losses[0]
    before = run.vectors()
    assert run.workload.evaluate(run.model, SEED) == run.workload.evaluate(run.model, SEED)
    run.load(before)
    again.load(before)
    assert run.advance(1)[0] == again.advance(1)[0]  # evaluating has drawn nothing


def test_each_step_drops_others(tmp_path):
    """At a rate of 0 and one batch for all the loss moves with what is dropped alone, also after a resume."""
    options = DIGITS | {"dropout": "0.3", "lr": "0", "optimizer": "sgd", "batch": "1297"}
    run, again = (TrainingRun(workload_from("vit", options), [SEED]) for _ in range(2))
    losses = [run.advance(1)[0] for _ in range(3)]
    assert len(np.unique(losses)) == 3
    run.save(tmp_path / "training.pt")
    later = [run.advance(1)[0] for _ in range(2)]
    assert again.restore(tmp_path / "training.pt", most=3)
    assert [again.advance(1)[0] for _ in range(2)] == later


def test_without_batchnorm_there_is_nothing_to_estimate_again():
    run = TrainingRun(workload_from("vit", DIGITS), [SEED])
    before = run.vectors()
    reestimate(run.workload, run.model, SEED)
    assert run.vectors().tobytes() == before.tobytes()


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
def test_every_optimiser_trains_with_its_default_rate(rule: str):
    workload = workload_from("vit", DIGITS | {"optimizer": rule})
    run = TrainingRun(workload, [SEED])
    run.advance(150)
    assert workload.evaluate(run.model, SEED)["loss"] < 0.5 * workload.chance()["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": "33"}, "hidden=33, expected a multiple of heads=2"),
        ({"depth": "0"}, "depth=0"),
        ({"dropout": "1"}, "dropout=1.0"),
        ({"patch": "5"}, "patch=5 does not divide images of 8×8"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("vit", DIGITS | options)
    assert message in str(caught.value)
