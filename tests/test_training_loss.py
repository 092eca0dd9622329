"""What forecasters that are fitted on loss are handed."""

import pytest
import torch

import farcli
from farcli.store import Trajectory
from farcli.stream import Source
from farcli.training import Network, workload_of
from farcli.verbs.training_loss import training_loss


@pytest.mark.parametrize("held_back", [0, 300])
def test_the_last_batches_are_of_what_is_held_back_from_training_where_anything_is(tmp_path, held_back):
    path = tmp_path / "digits.zarr"
    options = {"held_back": str(held_back)}
    farcli.record("digits-cnn", path, runs=2, steps=10, every=5, seed=3, options=options)
    truth = Trajectory.open(path)
    loss, workload = training_loss([Source(trajectory=truth, runs=(0, 1))], 5), workload_of(truth.header)
    assert loss is not None
    assert workload is not None
    network = Network(workload, truth.layout)
    for run, seed in enumerate(truth.header["seeds"]):
        batches = workload.batches([seed])
        expected = [next(batches) for _ in range(loss.batches)]
        if held_back:
            expected[-3:] = workload.verification(seed, 0, 3)
        vector = torch.from_numpy(truth.read([run], [5])[0, 0])
        for number, batch in enumerate(expected):
            found = float(loss.at(vector[: truth.layout.parameters], run, number))
            assert found == pytest.approx(network.verify(vector, truth.integers(run, 5), seed, [batch]), rel=1e-5)
