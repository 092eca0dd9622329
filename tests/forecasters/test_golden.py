"""A forecaster's file that an earlier version wrote, kept for ever."""

from pathlib import Path

import torch

from farcli.artefact import load
from farcli.forecasters.base import Prefix

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_file_of_the_first_schema_forecasts_as_when_it_was_written():
    """`fit lfd2 golden/schema1/chunks.zarr --context 2 --to 20`; its header has no digest."""
    artefact = load(GOLDEN / "forecaster1/lfd2.safetensors")
    weights_BCD = torch.arange(10.0).reshape(1, 2, 5) / 10
    prefix = Prefix(weights_BCD=weights_BCD, steps_C=(0, 5), layout=artefact.problem.layout, start=0, runs_B=(0,))
    [[found_D]] = artefact.forecaster.forecast(prefix, [20]).tolist()
    then = [-0.15686702728271484, -0.18657666444778442, -0.216286301612854, -0.24599593877792358, -0.2757056951522827]
    torch.testing.assert_close(torch.tensor(found_D), torch.tensor(then), rtol=1e-6, atol=1e-7)
