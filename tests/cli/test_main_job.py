"""The README's commands, as they stand there, in a real shell."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from farcli import Trajectory

README = Path(__file__).parents[2] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def run_block(start, folder):
    """Run the README's commands that begin so, in a shell."""
    [commands] = [block for block in blocks("sh") if block.startswith(start)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The main job, run once."""
    return run_block("farcli record digits-cnn -o runs/digits.zarr", tmp_path_factory.mktemp("job"))


def test_a_verified_forecast_lowers_the_loss(tmp_path):
    _, rows, _ = run_block("farcli record digits-cnn -o checked.zarr", tmp_path)
    found = {(row["step"], row["method"]): row for row in rows[2:]}
    for step in (120, 165, 225):
        far, kept = found[step, "far"], found[step, "persistence"]
        assert (far["kept"], far["not_worse"]) == (1, 1)
        assert far["loss"] < 0.85 * kept["loss"]
        assert far["net_steps"] > 15


def test_every_command_prints_its_row(job):
    _, rows, _ = job
    record, fit, forecast = rows[:3]
    assert (record["runs"], record["snapshots"]) == (12, 31)
    assert fit["runs"] == 8
    assert fit["context"] == [0, 20, 40, 60, 80]
    assert forecast["runs"] == [8, 9, 10, 11]
    assert forecast["targets"] == list(range(100, 601, 20))
    assert all(row["schema"] == 1 for row in rows)


def test_the_forecast_is_worth_what_the_readme_says(job):
    _, rows, _ = job
    found = {(row["step"], row["method"]): row for row in rows[3:]}
    near = found[160, "lfd2"]
    assert near["loss"] < found[160, "persistence"]["loss"]
    assert near["better"] == 1.0
    assert near["net_steps"] > 0
    assert found[160, "true future"]["loss"] < near["loss"]
    assert found[600, "true future"]["loss"] < 0.1
    assert found[600, "chance"]["loss"] > 2
    assert found[600, "linear"]["loss"] > found[600, "persistence"]["loss"]
    assert not any(row["in_sample"] for row in rows[3:])


def test_the_readmes_python_works(job):
    folder, _, _ = job
    code = "\n".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


def test_inspect_shows_the_header(job, farcli):
    folder, _, _ = job
    text = farcli("inspect", "runs/digits.zarr", "--format", "table", cwd=folder).out
    for part in ("run = 12", "step = 31", "1922 parameters", "running_var", "digits-cnn", "crc32c", "finished"):
        assert part in text
    row = json.loads(farcli("inspect", "lfd2.safetensors", cwd=folder).out)
    assert row["method"] == "lfd2"
    assert row["context"] == [0, 20, 40, 60, 80]
    assert len(row["coefficients"]) == 26


def test_an_exported_snapshot_loads_strictly(job, farcli):
    from safetensors.torch import load_file

    from farcli.training import workload_from

    folder, _, _ = job
    network = workload_from("digits-cnn", {})
    truth = json.loads(farcli("inspect", "runs/digits.zarr", cwd=folder).out)
    for store, run, step in (("runs/digits.zarr", 8, 600), ("forecast.zarr", 9, 160)):
        output = folder / f"{run}.safetensors"
        done = farcli("export", store, "--run", run, "--step", step, "-o", output, cwd=folder)
        assert done.code == 0, done.err
        model = network.model([truth["header"]["seeds"][run]])
        model.load_state_dict(load_file(output), strict=True)
        loss = network.evaluate(model, truth["header"]["seeds"][run])["loss"]
        assert loss < 0.3


def test_plots_are_pictures(job, farcli):
    folder, _, _ = job
    rows = farcli("eval", "forecast.zarr", "runs/digits.zarr", "--to", "all", "-q", cwd=folder)
    (folder / "rows.ndjson").write_text(rows.out)
    for words in (("forecast.zarr", "runs/digits.zarr", "-o", "a.png"), ("rows.ndjson", "-o", "b.svg")):
        done = farcli("plot", *words, cwd=folder)
        assert done.code == 0, done.err
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    drawing = (folder / "b.svg").read_text()
    for text in ("true future", "lfd2", "persistence", "chance", "held-out loss", "training step"):
        assert text in drawing


class TestShape:
    """Streams, formats, exit codes."""

    def test_formats_hold_the_same(self, job, farcli):
        folder, _, _ = job
        words = ("eval", "linear", "runs/digits.zarr", "--to", "600", "-q", "--runs", "8")
        ndjson = [json.loads(line) for line in farcli(*words, "--format", "ndjson", cwd=folder).out.splitlines()]
        csv = farcli(*words, "--format", "csv", cwd=folder).out.splitlines()
        table = farcli(*words, "--format", "table", cwd=folder).out
        assert csv[0].split(",") == list(dict.fromkeys(key for row in ndjson for key in row))
        assert len(csv) == 1 + len(ndjson)
        for row in ndjson:
            assert row["method"] in table

    def test_a_terminal_gets_a_table_that_fits(self, job):
        """A pseudo-terminal of 80 columns."""
        folder, _, _ = job
        program = Path(sys.executable).with_name("farcli")
        command = f"stty cols 80; exec {program} eval forecast.zarr runs/digits.zarr"
        done = subprocess.run(
            ["script", "-qec", f"bash -c '{command}'", "/dev/null"],
            cwd=folder,
            env={**os.environ, "NO_COLOR": "1", "TERM": "xterm"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if " persistence " in line and "+0 " in line]
        assert len(lines) == 6, done.stdout
        assert "…" not in "".join(lines)

    def test_max_is_a_check(self, job, farcli):
        folder, _, _ = job
        words = ("eval", "forecast.zarr", "runs/digits.zarr", "--to", "160")
        assert farcli(*words, "--max", "mse=1", cwd=folder).code == 0
        failed = farcli(*words, "--max", "mse=0", cwd=folder)
        assert failed.code == 5
        assert json.loads(failed.out.splitlines()[0])["method"] == "lfd2"  # the rows come all the same

    def test_quiet_leaves_only_the_path(self, job, farcli, tmp_path):
        folder, _, _ = job
        done = farcli("forecast", "linear", "runs/digits.zarr", "-o", tmp_path / "x.zarr", "-q", cwd=folder)
        assert (done.out, done.err) == (f"{tmp_path / 'x.zarr'}\n", "")

    def test_a_closed_pipe_is_quiet(self, job):
        folder, _, _ = job
        program = Path(sys.executable).with_name("farcli")
        command = f"{program} eval linear runs/digits.zarr --to all -q | head -1"
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.stdout.count("\n") == 1
        assert done.stderr == ""

    def test_the_module_is_the_program(self, farcli):
        done = subprocess.run([sys.executable, "-m", "farcli", "-V"], capture_output=True, text=True, check=True)
        assert done.stdout == farcli("-V").out

    def test_config_variables_and_flags(self, job, farcli, tmp_path):
        folder, _, _ = job
        (tmp_path / "c.toml").write_text('[fit]\ncontext = 3\nmemory = "1G"\n[fit.set]\nridge = 0.5\n')
        words = ("fit", "lfd2", "runs/digits.zarr", "-o", "x.safetensors", "--config", tmp_path / "c.toml")

        def shown(*more, **env):
            done = farcli(*words, "--show-config", *more, cwd=folder, env=env)
            assert done.code == 0, done.err
            return json.loads(done.out)["fit"]

        assert (shown()["context"], shown()["memory"], shown()["set"]) == (3, "1G", ["ridge=0.5"])
        assert shown(FARCLI_FIT_CONTEXT="4")["context"] == 4
        assert shown(FARCLI_MEMORY="3G")["memory"] == "3G"
        assert shown("--context", "6", FARCLI_FIT_CONTEXT="4")["context"] == 6
        plain = words[:-2]
        done = farcli(*plain, "--show-config", cwd=folder, env={"FARCLI_CONFIG": str(tmp_path / "c.toml")})
        assert json.loads(done.out)["fit"]["context"] == 3
        for text, message in (
            ("[fit]\ncontxt = 3\n", "Did you mean 'context'"),
            ("[fti]\ncontext = 3\n", "Did you mean 'fit'"),
            ("context = 3\n", "Unknown subcommand"),
            ("fit = 3\n", "must be a table"),
            ("[fit\n", "not valid TOML"),
        ):
            (tmp_path / "c.toml").write_text(text)
            done = farcli(*words, cwd=folder)
            assert done.code == 2, text
            assert message in done.err

    def test_listings(self, farcli):
        methods = [json.loads(line) for line in farcli("methods").out.splitlines()]
        assert {"lfd2", "persistence", "mean"} <= {row["method"] for row in methods}
        workloads = [json.loads(line) for line in farcli("workloads").out.splitlines()]
        assert {"digits-cnn", "linreg"} <= {row["workload"] for row in workloads}
        assert all(option["help"] for row in methods + workloads for option in row["options"])

    def test_completion_offers_methods(self, farcli):
        env = {"_FARCLI_COMPLETE": "complete_bash", "COMP_WORDS": "farcli fit l", "COMP_CWORD": "2"}
        assert set(farcli(env=env).out.split()) >= {"lfd2", "linear", "lsq-line"}


def test_a_forecast_is_a_trajectory(job, farcli, tmp_path):
    """Commands compose like filters: what forecast writes, every reader takes."""
    folder, _, _ = job
    row = json.loads(farcli("inspect", "forecast.zarr", cwd=folder).out)
    assert (row["kind"], row["runs"], row["finished"]) == ("forecast", [8, 9, 10, 11], True)
    zarr = pytest.importorskip("zarr")
    weights = zarr.open_group(folder / "forecast.zarr", mode="r")["weights"][:]
    assert weights.shape == (4, 26, 1970)
    assert np.isfinite(weights).all()
    assert torch.from_numpy(weights).dtype == torch.float32


def test_intervals_are_stored_beside_the_forecast(job, farcli, tmp_path):
    folder, *_ = job
    fitted, out, halves = tmp_path / "i.safetensors", tmp_path / "f.zarr", tmp_path / "half.zarr"
    words = ("fit", "lfd2", "runs/digits.zarr", "-o", fitted, "--train-runs", "0:8", "--to", "100,160")
    assert farcli(*words, "--set", "ridge=loo", "--set", "intervals=true", "-q", cwd=folder).code == 0
    words = ("runs/digits.zarr", "--runs", "8:12", "--to", "100,160")
    row = json.loads(farcli("forecast", fitted, *words, "-o", out, "--intervals", halves, cwd=folder).out)
    runs, steps = [8, 9, 10, 11], [100, 160]
    paths = (folder / "runs/digits.zarr", out, halves)
    truth, forecast, half = (Trajectory.open(path).read(runs, steps) for path in paths)
    moving = half[0, 0] > 0  # buffers have no interval
    assert moving.sum() == row["parameters"]
    assert 0.8 < (abs(forecast - truth) <= half)[..., moving].mean() < 0.99
    np.testing.assert_allclose(row["width"], 2 * half[..., moving].mean((0, 2), dtype=np.float64), rtol=1e-5)
    done = farcli("eval", halves, "runs/digits.zarr", cwd=folder)
    assert (done.code, "not a forecast" in done.err) == (2, True)
    plain = tmp_path / "plain.zarr"
    done = farcli("forecast", "lfd2.safetensors", *words, "-o", plain, "--intervals", tmp_path / "h", cwd=folder)
    assert (done.code, "lfd2.safetensors: has no intervals" in done.err) == (2, True)
    assert not plain.exists()
    assert not (tmp_path / "h").exists()
