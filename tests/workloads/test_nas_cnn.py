from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, batch_norm, conv2d, relu

from farcli.errors import UsageError
from farcli.training import Network, TrainingRun, run_seed, workload_from
from farcli.workloads.nas_cnn import FREE, NasCnn, NasNetwork, format_cell, parse_cell

SEED = run_seed(0, 0)
WHOLE = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|none~1|nor_conv_3x3~2|"
DIGITS = {"data": "digits", "batch": "64"}


def test_a_cell_computes_what_its_notation_says():
    """Against the sums written out, operation by operation."""
    network = NasNetwork(parse_cell(WHOLE), 3, workload_from("nas-cnn", DIGITS | {"width": "4"}).config)
    state, images = network.state_dict(), torch.randn(5, 3, 12, 12)

    def convolution(place: str, inputs: torch.Tensor, pad: int) -> torch.Tensor:
        outputs = conv2d(relu(inputs), state[f"{place}.1.weight"], padding=pad)
        return batch_norm(outputs, None, None, state[f"{place}.2.weight"], state[f"{place}.2.bias"], training=True)

    def cell(place: str, zero: torch.Tensor) -> torch.Tensor:
        one = convolution(f"{place}.0", zero, 1)
        inside = torch.ones(1, 1, *zero.shape[2:])
        counted = avg_pool2d(inside, 3, 1, 1, divisor_override=1)  # pixels under the window, none outside the image
        two = convolution(f"{place}.1", zero, 0) + avg_pool2d(one, 3, 1, 1, divisor_override=1) / counted
        return zero + convolution(f"{place}.5", two, 1)

    first = cell("first.0", conv2d(images, state["stem.weight"], state["stem.bias"], stride=2, padding=1))
    reduced = conv2d(relu(first), state["reduction.weight"], state["reduction.bias"], stride=2, padding=1)
    pooled = relu(cell("second.0", reduced)).mean((2, 3))
    expected = pooled @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_the_notation_is_read_and_written():
    assert parse_cell(WHOLE) == (
        "nor_conv_3x3",
        "nor_conv_1x1",
        "avg_pool_3x3",
        "skip_connect",
        "none",
        "nor_conv_3x3",
    )
    for cell in product(("none", "skip_connect", "nor_conv_1x1"), repeat=6):
        if cell[3] != "none":
            assert parse_cell(format_cell(cell)) == cell


def test_the_default_has_the_papers_number_of_parameters_on_colour_images():
    plain = workload_from("nas-cnn", DIGITS).config
    for cell in (plain.arch, WHOLE.replace("nor_conv_3x3", "skip_connect").replace("nor_conv_1x1", "none")):
        network = NasNetwork(parse_cell(cell), 3, plain)
        assert sum(parameter.numel() for parameter in network.parameters()) == 5418


def test_random_cells_differ_between_runs_but_not_in_shape():
    workload = workload_from("nas-cnn", DIGITS | {"arch": "random", "width": "4"})
    assert isinstance(workload, NasCnn)
    seeds = [run_seed(0, run) for run in range(40)]
    cells = {workload.cell(seed) for seed in seeds}
    assert len(cells) > 30
    assert all(operation in FREE for cell in cells for operation in cell)
    assert len({TrainingRun(workload, [seed]).layout.size for seed in seeds}) == 1
    first, second = seeds[:2]
    assert workload.cell(first) != workload.cell(second)
    run = TrainingRun(workload, [second])
    run.advance(5)
    expected = workload.evaluate(run.model, second)
    foreign = workload.model([first])
    foreign.load_state_dict(run.model.state_dict())
    assert workload.evaluate(foreign, second) == expected  # the run's cells, not those of the network it is loaded into
    assert workload.evaluate(foreign, first) != expected
    assert foreign.cell == workload.cell(first)
    assert Network(workload, run.layout).evaluate(run.vectors()[0], None, second) == expected


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
def test_every_optimiser_trains_with_its_default_rate(rule: str):
    workload = workload_from("nas-cnn", DIGITS | {"optimizer": rule, "stride": "1", "width": "8"})
    run = TrainingRun(workload, [SEED])
    run.advance(150)
    assert workload.evaluate(run.model, SEED)["loss"] < 0.75 * workload.chance()["loss"]


def test_bfloat16_trains_too(tmp_path: Path):
    workload = workload_from("nas-cnn", DIGITS | {"dtype": "bfloat16", "optimizer": "adam", "lr": "0.01"})
    run = TrainingRun(workload, [SEED])
    run.advance(60)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.bfloat16}
    assert np.array_equal(run.vectors(), run.vectors().astype(np.float32))
    assert workload.evaluate(run.model, SEED)["loss"] < 0.8 * workload.chance()["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet"}, "arch='resnet', expected NAS-Bench-201's notation"),
        ({"arch": WHOLE.replace("~1|+", "~0|+")}, "expected NAS-Bench-201's notation"),
        ({"arch": WHOLE.replace("avg_pool", "max_pool")}, "unknown operation 'max_pool_3x3'"),
        ({"arch": "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"}, "no way leads"),
        ({"arch": "|skip_connect~0|+|none~0|none~1|+|none~0|none~1|skip_connect~2|"}, "no way leads"),
        ({"width": "0"}, "width=0"),
        ({"cells": "-1"}, "cells=-1"),
        ({"stride": "0"}, "stride=0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        workload_from("nas-cnn", DIGITS | options)
    assert message in str(caught.value)
