"""Bad input through the real command: one clear line, its exit code, nothing half-written left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from farcli.artefact import _digest as digest
from farcli.artefact import _header_digest as header_digest
from tests.conftest import PROGRAM

zarr = pytest.importorskip("zarr")


@pytest.fixture
def folder(small, tmp_path):
    """A copy to damage."""
    for name in ("digits.zarr", "linreg.zarr", "forecast.zarr"):
        shutil.copytree(small / name, tmp_path / name)
    shutil.copy(small / "lfd2.safetensors", tmp_path)
    return tmp_path


def listing(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def refused(farcli, folder, words, code, *texts):
    """The command fails with `code` and one line that holds `texts`; files are as they were."""
    before = listing(folder)
    outcome = farcli(*words, cwd=folder)
    assert outcome.code == code, (outcome.code, outcome.err)
    lines = outcome.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("farcli: error: ")]
    assert len(errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    for text in texts:
        assert text in outcome.err, outcome.err
    assert listing(folder) == before
    return outcome.err


FORECAST = ("forecast", "lfd2.safetensors", "digits.zarr", "-o", "new.zarr")
FIT = ("fit", "lfd2", "digits.zarr", "-o", "new.safetensors")


class TestStores:
    @pytest.mark.parametrize(
        "words",
        [
            ("fit", "lfd2", "nowhere.zarr", "-o", "new.safetensors"),
            ("forecast", "lfd2.safetensors", "nowhere.zarr", "-o", "new.zarr"),
            ("eval", "forecast.zarr", "nowhere.zarr"),
            ("inspect", "nowhere.zarr"),
            ("export", "nowhere.zarr", "--step", "5", "-o", "new.safetensors"),
            ("plot", "forecast.zarr", "nowhere.zarr", "-o", "new.png"),
        ],
    )
    def test_missing(self, farcli, folder, words):
        refused(farcli, folder, words, 3, "nowhere.zarr")

    @pytest.mark.parametrize("words", [FIT, FORECAST, ("eval", "forecast.zarr", "digits.zarr")])
    def test_unfinished(self, farcli, folder, words):
        (folder / "digits.zarr" / "zarr.json").unlink()
        refused(farcli, folder, words, 3, "digits.zarr", "not finished", "--resume")

    def test_unfinished_is_read_on_request(self, farcli, folder):
        (folder / "digits.zarr" / "zarr.json").unlink()
        assert farcli(*FIT, "--partial", cwd=folder).code == 0
        assert json.loads(farcli("inspect", "digits.zarr", cwd=folder).out)["finished"] is False

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
    @pytest.mark.parametrize("words", [FIT, FORECAST, ("eval", "forecast.zarr", "digits.zarr")])
    def test_damaged(self, farcli, folder, words, damage):
        data_files = [path for path in (folder / "digits.zarr/weights").rglob("*") if path.is_file()]
        data_files = [path for path in data_files if path.name != "zarr.json"]
        assert data_files
        for victim in data_files:
            data = bytearray(victim.read_bytes())
            if damage == "flip":
                data[100] ^= 0x10
                victim.write_bytes(data)
            elif damage == "remove":
                victim.unlink()
            else:
                victim.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
        refused(farcli, folder, words, 3, "digits.zarr")

    def test_foreign_group(self, farcli, folder):
        group = zarr.create_group(folder / "other.zarr")
        group.create_array("weights", shape=(2, 3, 4), dtype="f4")
        refused(farcli, folder, ("fit", "mean", "other.zarr", "-o", "new.safetensors"), 3, "other.zarr", "farcli")

    def test_a_folder_and_a_file_that_are_no_stores(self, farcli, folder):
        (folder / "folder").mkdir()
        (folder / "notes.txt").write_text("hello")
        for name in ("folder", "notes.txt"):
            refused(farcli, folder, ("fit", "mean", name, "-o", "new.safetensors"), 3, name)
            refused(farcli, folder, ("inspect", name), 3, name)

    def test_newer_schema(self, farcli, folder):
        for path in (folder / "digits.zarr/zarr.json", folder / "digits.zarr/weights/zarr.json"):
            path.write_text(re.sub(r'"schema":\s*1\b', '"schema": 99', path.read_text()))
        refused(farcli, folder, FIT, 3, "digits.zarr", "schema 99")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_weights_that_are_not_finite(self, farcli, folder, value):
        weights = zarr.open_array(folder / "digits.zarr/weights", mode="r+")
        weights[1, 0, 7] = value
        for words in (FIT, FORECAST, ("eval", "forecast.zarr", "digits.zarr", "--runs", "2")):
            if words[0] == "eval":
                weights[2, 0, 7] = value
            message = refused(farcli, folder, words, 4, "digits.zarr", "run", "step 0", "0.weight")
            assert str(value) in message

    def test_the_truth_comes_last(self, farcli, folder):
        refused(farcli, folder, ("eval", "digits.zarr", "forecast.zarr"), 2, "digits.zarr", "recorded truth")
        refused(farcli, folder, ("eval", "digits.zarr"), 2, "digits.zarr")

    def test_a_diverged_snapshot_would_distort_equivalent_steps(self, farcli, folder):
        """`eval` reads every snapshot of a run for its loss curve, also those that no forecast looks at."""
        weights = zarr.open_array(folder / "digits.zarr/weights", mode="r+")
        weights[2, 3, 7] = np.nan
        words = ("eval", "linear", "digits.zarr", "--to", "60", "--runs", "2:4")
        refused(farcli, folder, words, 4, "digits.zarr", "run 2, step 15")

    @pytest.mark.parametrize(
        ("old", "new", "text"),
        [
            ('"seeds"', '"sseds"', "seed"),
            ('"digits-cnn"', '"digits-cmm"', "--loss"),
            ('"width": "8"', '"width": "9"', "digits.zarr"),
        ],
    )
    def test_a_header_that_does_not_fit(self, farcli, folder, old, new, text):
        path = folder / "digits.zarr/zarr.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        refused(farcli, folder, ("eval", "linear", "digits.zarr", "-q"), 3, "digits.zarr", text)

    def test_a_loss_function_that_fails(self, farcli, folder):
        (folder / "mine.py").write_text(
            "def bad(state): raise RuntimeError('my own trouble')\ndef none(state): return {'acc': 1.0}\n"
        )
        env = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        for name, text in (("bad", "my own trouble"), ("none", "acc"), ("missing", "no 'missing'")):
            words = ("eval", "linear", "digits.zarr", "-q", "--loss", f"mine:{name}")
            outcome = farcli(*words, cwd=folder, env=env)
            assert (outcome.code, outcome.out) == (2, "")
            assert text in outcome.err
            assert "bug" not in outcome.err


class TestForecasters:
    def test_fitted_on_another_network(self, farcli, folder):
        words = ("forecast", "lfd2.safetensors", "linreg.zarr", "-o", "new.zarr")
        refused(farcli, folder, words, 2, "lfd2.safetensors was fitted on D = ", "linreg.zarr has D = 2")

    def test_prefix_shorter_than_the_context(self, farcli, folder):
        refused(farcli, folder, (*FIT, "--context", "40"), 2, "digits.zarr", "13 snapshots", "40")
        refused(farcli, folder, (*FIT, "--context", "1"), 2, "lfd2", "at least 2")
        refused(farcli, folder, (*FORECAST, "--from", "5"), 2, "prefix")
        refused(farcli, folder, ("eval", "quadratic", "digits.zarr", "--context", "2"), 2, "quadratic", "at least 3")

    def test_nothing_left_to_forecast(self, farcli, folder):
        refused(farcli, folder, (*FIT, "--context", "13"), 2, "nothing to forecast")

    def test_missing_foreign_and_damaged_files(self, farcli, folder):
        refused(farcli, folder, ("forecast", "no.safetensors", "digits.zarr", "-o", "new.zarr"), 3, "no.safetensors")
        save_file({"a": torch.zeros(3)}, folder / "foreign.safetensors")
        (folder / "broken.safetensors").write_bytes((folder / "lfd2.safetensors").read_bytes()[:40])
        for name in ("foreign.safetensors", "broken.safetensors"):
            refused(farcli, folder, ("forecast", name, "digits.zarr", "-o", "new.zarr"), 3, name)
            refused(farcli, folder, ("inspect", name), 3, name)

    def test_a_forecaster_that_was_tampered_with(self, farcli, folder):
        data = bytearray((folder / "lfd2.safetensors").read_bytes())
        data[-3] ^= 1
        (folder / "lfd2.safetensors").write_bytes(data)
        refused(farcli, folder, FORECAST, 3, "lfd2.safetensors", "damaged")

    def test_a_forecaster_of_another_version(self, farcli, folder):
        """Its file is whole, but holds other tensors than this version's."""
        path = folder / "lfd2.safetensors"
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["farcli"])
            tensors = {name: file.get_tensor(name)[..., :-1].contiguous() for name in file.keys()}  # noqa: SIM118
        header["tensors"] = digest(tensors)
        header["digest"] = header_digest(header)
        save_file(tensors, path, metadata={"farcli": json.dumps(header)})
        refused(farcli, folder, FORECAST, 3, "lfd2.safetensors", "another version of lfd2", "expected [", "Fit it")

    @pytest.mark.parametrize(
        ("key", "value", "text"),
        [
            ("targets", [20, 25, 30, 35, 40, 45, 50, 55, 65], "its header is not the one that was written"),
            ("options", {"bias": "False"}, "its header is not the one that was written"),
            ("digest", None, "its header is not the one that was written"),
            ("schema", 1, "its header is not the one that was written"),
            ("schema", 0, "has schema 0, expected 1 to 2"),
            ("schema", "2", "has schema '2', expected 1 to 2"),
        ],
    )
    def test_a_header_that_was_tampered_with(self, farcli, folder, key, value, text):
        path = folder / "lfd2.safetensors"
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["farcli"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert header.get(key) != value
        header[key] = value
        save_file(tensors, path, metadata={"farcli": json.dumps(header)})
        for words in (FORECAST, ("eval", "lfd2.safetensors", "digits.zarr"), ("inspect", "lfd2.safetensors")):
            refused(farcli, folder, words, 3, "lfd2.safetensors: ", text, "Fit it again")

    def test_options_that_do_not_apply(self, farcli, folder):
        for words, text in (
            ((*FORECAST, "--context", "4"), "fitted already"),
            (("eval", "forecast.zarr", "digits.zarr", "--context", "4"), "--context"),
            (("eval", "linear", "digits.zarr", "--verify", "4", "--lengths", "half"), "--lengths 'half'"),
            (("eval", "linear", "digits.zarr", "--verify", "4", "--lengths", "1,0"), "--lengths 1,0"),
            (("eval", "linear", "digits.zarr", "--lengths", "0.5,1"), "--verify N"),
            (("eval", "linear", "linreg.zarr", "--loss", "a:b", "--control"), "--control needs the training of a"),
            (("eval", "forecast.zarr", "digits.zarr", "--set", "span=2"), "--set"),
            (("eval", "forecast.zarr", "digits.zarr", "--from", "20"), "starts at step 15"),
            (("eval", "linear", "digits.zarr", "--context", "0"), "at least 1"),
            (("eval", "linear", "linear", "digits.zarr"), "twice"),
            (("fit", "lfd2", "digits.zarr", "digits.zarr", "-o", "new.safetensors"), "twice"),
        ):
            refused(farcli, folder, words, 2, text)

    def test_a_method_that_must_be_fitted_first(self, farcli, folder):
        refused(
            farcli, folder, ("forecast", "lfd2", "digits.zarr", "-o", "new.zarr"), 2, "must be fitted", "farcli fit"
        )


class TestFits:
    def test_too_few_runs(self, farcli, folder):
        linreg = ("linreg.zarr", "-o", "new.safetensors", "-q")
        words = ("fit", "gfm", *linreg, "--set", "validation=0.99")
        refused(farcli, folder, words, 2, "gfm: validation = 0.99 of", "expected at least 1 on each side")
        words = ("fit", "far", *linreg, "--train-runs", "0:2")
        assert "ridge" not in refused(farcli, folder, words, 2, "far: leaving one", "at least 3 training runs, found 2")
        words = ("fit", "lfd2", *linreg, "--train-runs", "0:2", "--set", "ridge=loo")
        refused(farcli, folder, words, 2, "lfd2: leaving one", "--set ridge=1e-3")
        refused(farcli, folder, ("fit", "loss-lfd", *linreg, "--context", "2"), 2, "loss-lfd", "at least 3 snapshots")
        words = ("fit", "far", "digits.zarr", "-o", "new.safetensors", "-q", "--context", "1")
        refused(farcli, folder, words, 2, "far: from a single snapshot", "parameters are more than 4", "--context of 2")

    def test_other_grids_and_other_networks(self, farcli, folder):
        words = ("record", "linreg", "-o", "coarse.zarr", "--runs", "3", "--steps", "20", "--every", "4", "-q")
        assert farcli(*words, cwd=folder).code == 0
        words = ("fit", "lfd2", "linreg.zarr", "coarse.zarr", "-o", "new.safetensors", "-q")
        refused(farcli, folder, words, 2, "coarse.zarr: step 5 is not recorded")
        words = ("fit", "lfd2", "digits.zarr", "linreg.zarr", "-o", "new.safetensors", "-q")
        refused(farcli, folder, words, 2, "linreg.zarr: holds another network (D = 2) than digits.zarr (D = ", "pad")
        for name, hidden in (("deep", "2,2,1"), ("wide", "4,1")):
            words = ("record", "mlp", "-o", f"{name}.zarr", "--steps", "6", "--set", f"hidden={hidden}", "-q")
            assert farcli(*words, cwd=folder).code == 0
        words = ("fit", "lfd2", "deep.zarr", "wide.zarr", "-o", "new.safetensors", "-q")
        refused(farcli, folder, words, 2, "wide.zarr: holds another network than deep.zarr: other tensors")
        assert farcli("fit", "gfm", "linreg.zarr", "-o", "g.safetensors", "--set", "epochs=1", cwd=folder).code == 0
        words = ("forecast", "g.safetensors", "coarse.zarr", "-o", "new.zarr", "-q")
        refused(farcli, folder, words, 2, "coarse.zarr")

    def test_a_fit_that_diverges_keeps_its_best_state(self, farcli, folder):
        words = ("fit", "gfm", "linreg.zarr", "-o", "new.safetensors", "--set", "lr=1e30", "--set", "epochs=9", "-q")
        outcome = farcli(*words, cwd=folder)
        assert (outcome.code, outcome.out) == (4, "")
        assert re.search(r"gfm: the fit diverged: .* at update \d+; the last finite loss was \d", outcome.err)
        assert "best state is in new.safetensors" in outcome.err
        assert "hint: Lower the learning rate: --set lr=0.0001." in outcome.err
        assert farcli("inspect", "new.safetensors", cwd=folder).code == 0
        for words in (
            ("eval", "new.safetensors", "linreg.zarr"),
            ("forecast", "new.safetensors", "linreg.zarr", "-o", "new.zarr"),
        ):
            outcome = farcli(*words, cwd=folder)
            assert outcome.code == 0
            assert "farcli: new.safetensors: holds the best state of a fit that diverged" in outcome.err

    def test_runs_trained_by_another_rule_are_said(self, farcli, folder):
        words = ("record", "linreg", "-o", "adam.zarr", "--runs", "4", "--steps", "20")
        assert farcli(*words, "--set", "optimizer=adam", "-q", cwd=folder).code == 0
        assert farcli("fit", "far", "linreg.zarr", "-o", "new.safetensors", "-q", cwd=folder).code == 0
        said = (
            "farcli: new.safetensors: was fitted on runs by sgd, but these are by adam, and it runs that optimiser on"
        )
        for words in (
            ("eval", "new.safetensors", "adam.zarr"),
            ("forecast", "new.safetensors", "adam.zarr", "-o", "new.zarr"),
        ):
            outcome = farcli(*words, cwd=folder)
            assert outcome.code == 0
            assert said in outcome.err
        own = farcli("eval", "new.safetensors", "linreg.zarr", cwd=folder)
        assert own.code == 0
        assert "was fitted on runs by" not in own.err
        words = ("record", "linreg", "-o", "cosine.zarr", "--runs", "4", "--steps", "20", "--set", "schedule=cosine")
        assert farcli(*words, "-q", cwd=folder).code == 0
        falling = farcli("eval", "new.safetensors", "cosine.zarr", cwd=folder)
        assert falling.code == 0
        assert "at one rate, but a schedule changes that of these runs at step 1: fit on" in falling.err

    def test_a_leap_whose_fit_diverges_says_so(self, farcli, folder):
        words = ("fit", "loss-lfd", "linreg.zarr", "-o", "new.safetensors", "--set", "lr=1e30", "--context", "5", "-q")
        outcome = farcli(*words, cwd=folder)
        assert (outcome.code, outcome.out) == (4, "")
        assert re.search(r"loss-lfd: the fit diverged: .* at update \d+; the last finite loss was \d", outcome.err)
        assert farcli("inspect", "new.safetensors", cwd=folder).code == 0

    def test_parameters_that_never_move(self, farcli, folder):
        weights = zarr.open_array(folder / "linreg.zarr/weights", mode="r+")
        weights[..., 1] = 0.5
        assert farcli("fit", "far", "linreg.zarr", "-o", "new.safetensors", "-q", cwd=folder).code == 0
        assert farcli("forecast", "new.safetensors", "linreg.zarr", "-o", "new.zarr", "-q", cwd=folder).code == 0
        forecast = zarr.open_array(folder / "new.zarr/weights", mode="r")[:]
        assert np.isfinite(forecast).all()
        np.testing.assert_allclose(forecast[..., 1], 0.5, atol=1e-3)

    def test_weights_that_never_move(self, farcli, folder):
        words = ("record", "linreg", "-o", "still.zarr", "--runs", "6", "--steps", "20", "--set", "lr=0", "-q")
        assert farcli(*words, cwd=folder).code == 0
        for method in ("far", "lfd2", "gfm", "drift", "loss-lfd"):
            options = ("--set", "epochs=5") if method == "gfm" else ()
            outcome = farcli("fit", method, "still.zarr", "-o", "m.safetensors", "-q", "--force", *options, cwd=folder)
            assert outcome.code == 0, outcome.err
            words = ("forecast", "m.safetensors", "still.zarr", "-o", "f.zarr", "--force", "-q")
            assert farcli(*words, cwd=folder).code == 0
            forecast = zarr.open_array(folder / "f.zarr/weights", mode="r")[:]
            truth = zarr.open_array(folder / "still.zarr/weights", mode="r")[:]
            if method != "gfm":  # which five epochs teach nothing
                np.testing.assert_allclose(forecast[:, -1], truth[:, -1], atol=1e-4)
            assert np.isfinite(forecast).all()

    def test_a_file_of_another_version(self, farcli, folder):
        path = folder / "lfd2.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = re.sub(rb"(schema\W+)2\b", rb"\g<1>9", data[8 : 8 + size])
        assert header != data[8 : 8 + size]
        path.write_bytes(data[:8] + header + data[8 + size :])
        refused(farcli, folder, FORECAST, 3, "lfd2.safetensors: has schema 9", "Upgrade farcli")


class TestNames:
    @pytest.mark.parametrize(
        ("words", "guess"),
        [
            (("fit", "lfd", "digits.zarr", "-o", "new.safetensors"), "Did you mean 'lfd2'?"),
            (("forecast", "linaer", "digits.zarr", "-o", "new.zarr"), "Did you mean 'linear'?"),
            (("eval", "persistance", "digits.zarr"), "Did you mean 'persistence'?"),
            (("record", "digit-cnn", "-o", "new.zarr"), "Did you mean 'digits-cnn'?"),
            ((*FIT, "--set", "ridgee=1"), "Did you mean 'ridge'?"),
            (("record", "linreg", "-o", "new.zarr", "--set", "optimiser=sgd"), "Did you mean 'optimizer'?"),
            (("fitt", "lfd2"), "fitt"),
            ((*FIT, "--contxt", "3"), "--contxt"),
        ],
    )
    def test_unknown(self, farcli, folder, words, guess):
        refused(farcli, folder, words, 2, guess)

    def test_options_with_impossible_values(self, farcli, folder):
        for words, text in (
            ((*FIT, "--set", "map=sparse"), "shared|dense"),
            ((*FIT, "--set", "beta"), "key=value"),
            ((*FIT, "--memory", "lots"), "512M"),
            ((*FIT, "--device", "abacus"), "abacus"),
            (("record", "linreg", "-o", "new.zarr", "--runs", "0"), "at least 1"),
            (("record", "linreg", "-o", "new.zarr", "--steps", "x"), "--steps"),
            (("record", "linreg", "-o", "new.zarr", "--set", "optimizer=sgdd"), "sgd|momentum"),
            (("eval", "persistence", "digits.zarr", "--max", "mse"), "mse=0.05"),
            (("eval", "persistence", "digits.zarr", "--loss", "nothing"), "package.module:function"),
            (("plot", "persistence", "digits.zarr", "-o", "new.bmp"), ".png"),
        ):
            refused(farcli, folder, words, 2, text)


class TestRanges:
    @pytest.mark.parametrize(
        ("words", "texts"),
        [
            ((*FIT, "--train-runs", "0:8"), ("0:8", "0…3")),
            ((*FIT, "--train-runs", "5"), ("5", "0…3")),
            ((*FIT, "--to", "999"), ("999",)),
            ((*FIT, "--horizon", "99"), ("99", "8 snapshots")),
            ((*FIT, "--to", "30", "--horizon", "2"), ("--horizon and --to",)),
            ((*FORECAST, "--runs", "9"), ("9", "0…3")),
            ((*FORECAST, "--to", "33"), ("33", "not among them")),
            ((*FORECAST, "--to", "5"), ("5", "not after")),
            (("eval", "forecast.zarr", "digits.zarr", "--runs", "0"), ("0", "2…3")),
            (("eval", "forecast.zarr", "digits.zarr", "--to", "7"), ("7",)),
            (("export", "digits.zarr", "--run", "0", "--step", "7", "-o", "m.safetensors"), ("step 7", "nearest")),
            (("export", "digits.zarr", "--run", "9", "--step", "5", "-o", "m.safetensors"), ("run 9",)),
            (("export", "digits.zarr", "--step", "5", "-o", "m.safetensors"), ("4 runs", "--run")),
        ],
    )
    def test_out_of_range(self, farcli, folder, words, texts):
        refused(farcli, folder, words, 2, *texts)


class TestOutputs:
    @pytest.mark.parametrize(
        "words",
        [
            ("record", "linreg", "-o", "linreg.zarr"),
            ("fit", "lfd2", "digits.zarr", "-o", "lfd2.safetensors"),
            ("forecast", "lfd2.safetensors", "digits.zarr", "-o", "forecast.zarr"),
            ("export", "digits.zarr", "--run", "0", "-o", "lfd2.safetensors"),
            ("plot", "forecast.zarr", "digits.zarr", "-o", "forecast.zarr"),
        ],
    )
    def test_an_output_that_exists(self, farcli, folder, words):
        refused(farcli, folder, words, 2, words[-1], "exists", "--force")

    @pytest.mark.parametrize(
        "words",
        [
            ("forecast", "linear", "digits.zarr", "-o", "digits.zarr"),
            ("forecast", "linear", "digits.zarr", "-o", "digits.zarr/forecast.zarr"),
            ("fit", "lfd2", "digits.zarr", "-o", "digits.zarr/lfd2.safetensors"),
            ("export", "digits.zarr", "--run", "0", "-o", "digits.zarr/zarr.json"),
        ],
    )
    def test_an_output_never_replaces_its_input(self, farcli, folder, words):
        refused(farcli, folder, (*words, "--force"), 2, "its own input")

    def test_an_unfinished_recording_is_offered_to_be_resumed(self, farcli, folder):
        (folder / "linreg.zarr/zarr.json").unlink()
        refused(farcli, folder, ("record", "linreg", "-o", "linreg.zarr"), 2, "unfinished", "--resume")

    def test_force_replaces(self, farcli, folder):
        before = (folder / "forecast.zarr/zarr.json").read_bytes()
        assert farcli(*FORECAST[:4], "forecast.zarr", "--runs", "1:3", "--force", cwd=folder).code == 0
        assert (folder / "forecast.zarr/zarr.json").read_bytes() != before
        assert farcli("eval", "forecast.zarr", "digits.zarr", "--runs", "2", cwd=folder).code == 0

    def test_resuming_something_else(self, farcli, folder):
        words = ("record", "linreg", "-o", "linreg.zarr", "--runs", "6", "--steps", "20", "--seed", "2", "--resume")
        refused(farcli, folder, words, 2, "linreg.zarr", "seed")

    def test_resuming_what_is_done_changes_nothing(self, farcli, folder):
        before = listing(folder)
        words = ("record", "linreg", "-o", "linreg.zarr", "--runs", "6", "--steps", "20", "--seed", "1", "--resume")
        outcome = farcli(*words, cwd=folder)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["path"] == "linreg.zarr"
        assert listing(folder) == before

    def test_fit_and_forecast_resume_only_what_they_were_asked_for(self, farcli, folder):
        fit = ("fit", "lfd2", "digits.zarr", "-o", "lfd2.safetensors", "--context", "4", "--train-runs", "0:2")
        ahead = ("forecast", "lfd2.safetensors", "digits.zarr", "-o", "forecast.zarr")
        before = listing(folder)
        for words in ((*fit, "--resume"), (*ahead, "--runs", "2:4", "--resume")):
            outcome = farcli(*words, cwd=folder)
            assert outcome.code == 0, outcome.err
            assert json.loads(outcome.out)["seconds"] is None
            assert listing(folder) == before
        refused(farcli, folder, (*fit, "--resume", "--set", "ridge=1"), 2, "lfd2.safetensors", "another fit", "ridge")
        refused(farcli, folder, (*ahead, "--runs", "1:4", "--resume"), 2, "forecast.zarr", "another forecast", "runs")
        refused(farcli, folder, (*ahead, "--resume", "--force"), 2, "contradict")

    def test_a_dry_run_writes_nothing(self, farcli, folder):
        before = listing(folder)
        for words in (FIT, FORECAST, ("record", "linreg", "-o", "new.zarr", "--runs", "3")):
            outcome = farcli(*words, "--dry-run", cwd=folder)
            assert outcome.code == 0, outcome.err
            assert json.loads(outcome.out)["runs"]
            assert listing(folder) == before

    def test_too_little_memory(self, farcli, folder):
        message = refused(farcli, folder, (*FIT, "--memory", "10K"), 6, "--memory 10 kB", "too small")
        enough = re.search(r"at least ([\d.]+) ([kM])B", message)
        assert enough, message
        assert farcli(*FIT, "--memory", f"{enough[1]}{enough[2]}", cwd=folder).code == 0

    def test_a_dense_map_too_large(self, farcli, folder):
        refused(farcli, folder, (*FIT, "--set", "map=dense", "--memory", "2M"), 6, "D = ")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path):
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
        yield place
        subprocess.run(["umount", str(place)], check=True)

    @pytest.mark.parametrize(
        "words",
        [
            ("forecast", "lfd2.safetensors", "digits.zarr", "-o", "disk/new.zarr"),
            ("fit", "mean", "digits.zarr", "-o", "disk/new.safetensors"),
            ("plot", "forecast.zarr", "digits.zarr", "-o", "disk/new.png"),
        ],
    )
    def test_no_space(self, farcli, folder, disk, words):
        outcome = farcli(*words, cwd=folder)
        assert outcome.code == 6, outcome.err
        assert "no space" in outcome.err.lower()
        assert "Traceback" not in outcome.err
        assert not list(disk.iterdir())

    def test_a_recording_keeps_what_was_committed(self, farcli, folder, disk):
        words = ("record", "digits-cnn", "-o", "disk/new.zarr", "--runs", "3", "--steps", "60", "--every", "5")
        outcome = farcli(*words, cwd=folder)
        assert outcome.code == 6, outcome.err
        assert "no space" in outcome.err.lower()
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_recording_resumes_bit_equal(farcli, tmp_path, number):
    words = ["record", "digits-cnn", "-o", "run.zarr", "--runs", "2", "--steps", "300", "--every", "10", "--seed", "5"]
    process = subprocess.Popen(
        [PROGRAM, *words], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    weights = tmp_path / "run.zarr/weights/zarr.json"
    while not weights.exists() or json.loads(weights.read_text())["shape"][1] < 3:
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out == ""
    assert "--resume" in err
    assert not (tmp_path / "run.zarr/zarr.json").exists()
    assert farcli("fit", "lfd2", "run.zarr", "-o", "x.safetensors", cwd=tmp_path).code == 3
    assert farcli(*words, "--resume", cwd=tmp_path).code == 0
    assert farcli(*[w if w != "run.zarr" else "whole.zarr" for w in words], cwd=tmp_path).code == 0
    stopped, whole = (zarr.open_array(tmp_path / name / "weights", mode="r")[:] for name in ("run.zarr", "whole.zarr"))
    np.testing.assert_array_equal(stopped, whole)


def test_a_stopped_fit_goes_on_bit_equal(farcli, folder):
    words = ["fit", "gfm", "linreg.zarr", "-o", "cut.safetensors", "--set", "epochs=250", "--set", "batch=2"]
    for seconds in (3, 6, 12):  # as long as it may take to import torch and begin
        process = subprocess.Popen(
            [PROGRAM, *words], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        if process.returncode == 75:
            break
    assert process.returncode == 75, err
    assert out == ""
    assert re.search(r"gfm: stopped after epoch \d+, loss .*\.cut\.safetensors\.fitting", err)
    assert "--resume" in err
    assert not (folder / "cut.safetensors").exists()
    assert farcli(*words, "--resume", cwd=folder).code == 0
    assert not list(folder.glob(".*.fitting"))
    assert farcli(*[w if w != "cut.safetensors" else "whole.safetensors" for w in words], cwd=folder).code == 0
    cut, whole = (load_file(folder / f"{name}.safetensors") for name in ("cut", "whole"))
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in cut)


def test_outputs_can_be_read_as_the_umask_allows(farcli, folder):
    assert farcli(*FIT, "-q", cwd=folder).code == 0
    (folder / "plain").touch()
    assert (folder / "new.safetensors").stat().st_mode == (folder / "plain").stat().st_mode


def test_a_killed_forecast_leaves_nothing(farcli, folder):
    before = listing(folder)
    process = subprocess.Popen([PROGRAM, *FORECAST], cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    # Wherever the signal lands: nothing of the output, or all of it.
    try:
        process.wait(timeout=1.6)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    if listing(folder) != before:
        assert farcli("inspect", "new.zarr", cwd=folder).code == 0
        assert json.loads(farcli("inspect", "new.zarr", cwd=folder).out)["finished"]
        shutil.rmtree(folder / "new.zarr")
        assert listing(folder) == before


def test_paths_with_spaces_and_signs(farcli, small, tmp_path):
    odd = tmp_path / "a b [c] ü"
    assert farcli("forecast", small / "lfd2.safetensors", small / "digits.zarr", "-o", odd / "f.zarr").code == 0
    assert Path(odd / "f.zarr/zarr.json").exists()
