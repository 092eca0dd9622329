"""The scripts in `examples/` run as they stand; of Slurm only its commands are played, by scripts that do the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from farcli.store import Trajectory
from tests.recording.conftest import environment, same, state_of

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"
SRUN = """#!/bin/bash
# What srun does: start the step; and Slurm, of a job that comes near its limit: signal it, once.
shift
"$@" & step=$!
if [ ! -e signalled ]; then
    until [ -e "ckpts/$SLURM_ARRAY_TASK_ID/checkpoint.pt" ]; do sleep 0.01; done
    touch signalled
    kill -USR1 $step
fi
wait $step
"""
SCONTROL = '#!/bin/bash\necho "$@" >> requeued\n'


def run(folder: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(EXAMPLES)
    path = os.pathsep.join((str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    return subprocess.run(
        ["bash", f"examples/{script}"],
        cwd=folder,
        env=environment(PATH=path, **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def ends_in(store: Path, checkpoint: Path) -> bool:
    return same(state_of(Trajectory.open(store)), torch.load(checkpoint, weights_only=True)["model"])


def test_torchrun(tmp_path):
    pytest.importorskip("sklearn")
    done = run(tmp_path, "torchrun.sh")
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy" in done.stdout
    assert Trajectory.open(tmp_path / "digits-ddp.zarr").steps == [0, 20, 40, 60, 75]
    assert ends_in(tmp_path / "digits-ddp.zarr", tmp_path / "digits-ddp/checkpoint.pt")


def test_slurm(tmp_path, farcli):
    pytest.importorskip("sklearn")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    codes = []
    for task in ("0", "1", "0"):  # the first is stopped, and comes again
        done = run(tmp_path, "slurm.sh", SLURM_ARRAY_JOB_ID="71", SLURM_ARRAY_TASK_ID=task)
        codes.append(done.returncode)
        if codes == [138]:
            assert "stopped by signal 10; saved up to step" in done.stderr
            assert not Trajectory.open(tmp_path / "runs/71-0.zarr", partial=True).finished
    assert codes == [138, 0, 0]
    assert (tmp_path / "requeued").read_text() == "requeue 71_0\n"
    for task in (0, 1):
        assert ends_in(tmp_path / f"runs/71-{task}.zarr", tmp_path / f"ckpts/{task}/checkpoint.pt")
    stores = [f"runs/71-{task}.zarr" for task in (0, 1)]
    assert set(Trajectory.open(tmp_path / stores[0]).steps) >= {0, 20, 40, 60, 80, 100, 120, 125}
    fit = farcli("fit", "lfd2", stores[1], "-o", "a.safetensors", "--to", "60,80", "--context", 3, cwd=tmp_path)
    assert fit.code == 0, fit.err
    judged = farcli("eval", "a.safetensors", *stores, cwd=tmp_path)
    assert judged.code == 0, judged.err
