"""verify, diff and pack through the real command."""

import json
import shutil

import numpy as np
import pytest

from tests.cli.test_bad_input import listing, refused

zarr = pytest.importorskip("zarr")


@pytest.fixture
def folder(small, tmp_path):
    for name in ("digits.zarr", "linreg.zarr"):
        shutil.copytree(small / name, tmp_path / name)
    shutil.copy(small / "lfd2.safetensors", tmp_path)
    return tmp_path


def rows(outcome):
    return [json.loads(line) for line in outcome.out.splitlines()]


def chunk_of(store):
    return next(path for path in sorted((store / "weights").iterdir()) if path.name.startswith("c."))


class TestVerify:
    def test_sound_stores_have_a_row_each(self, farcli, folder):
        outcome = farcli("verify", "digits.zarr", "linreg.zarr", cwd=folder)
        assert outcome.code == 0, outcome.err
        found = rows(outcome)
        assert [(row["store"], row["state"]) for row in found] == [("digits.zarr", "sound"), ("linreg.zarr", "sound")]
        assert found[0]["snapshots"] == 52
        assert found[0]["bytes"] > 0
        assert outcome.err == ""

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
    def test_damage_is_named_and_does_not_hide_the_next_store(self, farcli, folder, damage):
        victim = chunk_of(folder / "digits.zarr")
        data = bytearray(victim.read_bytes())
        data[100] ^= 0x10
        if damage == "remove":
            victim.unlink()
        else:
            victim.write_bytes({"flip": data, "truncate": data[: len(data) // 2], "empty": b""}[damage])
        before = listing(folder)
        outcome = farcli("verify", "digits.zarr", "nowhere.zarr", "linreg.zarr", cwd=folder)
        assert outcome.code == 3
        found = rows(outcome)
        states = {row["store"]: row["state"] for row in found if row["problem"] is None or row["run"] is None}
        assert states["linreg.zarr"] == "sound"
        assert states["nowhere.zarr"] == "unreadable"
        problems = [row["problem"] for row in found if row["store"] == "digits.zarr" and row["problem"]]
        assert problems
        assert victim.name in problems[0]
        assert "digits.zarr, nowhere.zarr" in outcome.err
        assert listing(folder) == before

    def test_not_finite_is_another_matter(self, farcli, folder):
        weights = zarr.open_array(folder / "digits.zarr/weights", mode="r+")
        weights[1, 2, 7] = np.nan
        outcome = farcli("verify", "digits.zarr", cwd=folder)
        assert outcome.code == 4
        named = rows(outcome)[1]
        assert (named["run"], named["step"], named["state"]) == (1, 10, "non-finite")
        assert "0.weight" in named["problem"]
        allowed = farcli("verify", "digits.zarr", "--allow-non-finite", cwd=folder)
        assert allowed.code == 0
        assert rows(allowed) != []

    def test_unfinished(self, farcli, folder):
        (folder / "digits.zarr/zarr.json").unlink()
        outcome = farcli("verify", "digits.zarr", cwd=folder)
        assert outcome.code == 3
        assert "not finished" in rows(outcome)[0]["problem"]
        assert farcli("verify", "digits.zarr", "--partial", cwd=folder).code == 0


class TestDiff:
    def test_equal_stores(self, farcli, folder):
        shutil.copytree(folder / "digits.zarr", folder / "copy.zarr")
        outcome = farcli("diff", "digits.zarr", "copy.zarr", "--check", cwd=folder)
        assert outcome.code == 0, outcome.err
        found = rows(outcome)
        assert {row["state"] for row in found} == {"equal"}
        assert {row["snapshots"] for row in found} == {52}

    def test_one_value_is_found(self, farcli, folder):
        shutil.copytree(folder / "digits.zarr", folder / "copy.zarr")
        weights = zarr.open_array(folder / "copy.zarr/weights", mode="r+")
        weights[2, 3, 7] += np.float32(0.5)
        outcome = farcli("diff", "digits.zarr", "copy.zarr", cwd=folder)
        assert outcome.code == 0
        [row] = [row for row in rows(outcome) if row["state"] != "equal"]
        assert (row["tensor"], row["run"], row["step"], row["differing"]) == ("0.weight", 2, 15, 1)
        assert row["max_abs"] == pytest.approx(0.5, rel=1e-5)
        assert row["relative_l2"] > 0
        assert farcli("diff", "digits.zarr", "copy.zarr", "--check", cwd=folder).code == 5
        assert farcli("diff", "digits.zarr", "copy.zarr", "--check", "--run", "1", cwd=folder).code == 0
        assert farcli("diff", "digits.zarr", "copy.zarr", "--check", "--step", "20", cwd=folder).code == 0

    def test_a_store_and_its_export(self, farcli, folder):
        words = ("--run", "1", "--step", "20")
        assert farcli("export", "digits.zarr", *words, "-o", "one.safetensors", cwd=folder).code == 0
        outcome = farcli("diff", "digits.zarr", "one.safetensors", *words, "--check", cwd=folder)
        assert outcome.code == 0, outcome.err
        other = farcli("diff", "one.safetensors", "digits.zarr", "--run", "1", "--step", "25", cwd=folder)
        assert any(row["state"] == "differs" for row in rows(other))

    def test_names_and_shapes_that_differ(self, farcli, folder):
        from safetensors.numpy import save_file

        save_file({"w": np.zeros((2, 3), "f4"), "only": np.ones(2, "f4")}, folder / "a.safetensors")
        save_file({"w": np.zeros((3, 2), "f4"), "other": np.ones(2, "f4")}, folder / "b.safetensors")
        outcome = farcli("diff", "a.safetensors", "b.safetensors", "--check", cwd=folder)
        assert outcome.code == 5
        assert {(r["tensor"], r["state"]) for r in rows(outcome)} == {
            ("w", "shape"),
            ("only", "only in A"),
            ("other", "only in B"),
        }

    def test_bad_input(self, farcli, folder):
        (folder / "notes.txt").write_text("hello")
        for words, code, text in (
            (("digits.zarr", "nowhere.zarr"), 3, "nowhere.zarr"),
            (("digits.zarr", "notes.txt", "--run", "0"), 3, "notes.txt"),
            (("digits.zarr", "lfd2.safetensors"), 2, "--run"),
            (("digits.zarr", "digits.zarr", "--run", "9"), 2, "no run 9"),
            (("digits.zarr", "digits.zarr", "--step", "7"), 2, "no step 7"),
            (("digits.zarr", "digits.zarr", "--memory", "1K"), 6, "too small"),
        ):
            refused(farcli, folder, ("diff", *words), code, text)


class TestPack:
    @pytest.mark.parametrize("codec", ["none", "zstd", "pcodec"])
    def test_a_packed_store_serves_every_command(self, farcli, folder, codec):
        if codec == "pcodec":
            pytest.importorskip("pcodec")
        done = farcli("pack", "digits.zarr", "-o", "packed.zarr", "--codec", codec, cwd=folder)
        assert done.code == 0, done.err
        [row] = rows(done)
        assert row["lossless"] is True
        assert farcli("diff", "digits.zarr", "packed.zarr", "--check", cwd=folder).code == 0
        assert farcli("verify", "packed.zarr", cwd=folder).code == 0
        words = ("--to", "40,60")
        for store in ("digits.zarr", "packed.zarr"):
            made = f"{store}.safetensors"
            fitted = farcli("fit", "lfd2", store, "-o", made, "--train-runs", "0:2", *words, cwd=folder)
            assert fitted.code == 0, fitted.err
            forecast = farcli("forecast", made, store, "-o", f"f-{store}", "--runs", "2:4", cwd=folder)
            assert forecast.code == 0, forecast.err
        assert farcli("diff", "f-digits.zarr", "f-packed.zarr", "--check", cwd=folder).code == 0
        # What was fitted on the one knows its runs in the other.
        weighed = farcli("eval", "digits.zarr.safetensors", "packed.zarr", "--runs", "0:2", "-q", cwd=folder)
        assert all(row["in_sample"] for row in rows(weighed) if row["method"] == "lfd2")

    def test_lossy_states_its_bound_and_inspect_shows_it(self, farcli, folder):
        done = farcli("pack", "digits.zarr", "-o", "packed.zarr", "--codec", "bitround:9", cwd=folder)
        assert done.code == 0, done.err
        note = json.loads(farcli("inspect", "packed.zarr", cwd=folder).out)["header"]["pack"]
        assert note["relative_bound"] == 2.0**-10
        assert 0 < note["rms_error_in_updates"] < 1
        shown = farcli("inspect", "packed.zarr", "--format", "table", cwd=folder).out
        assert "pack.rms_error_in_updates" in shown

    def test_thinning_and_runs(self, farcli, folder):
        words = ("pack", "digits.zarr", "-o", "thin.zarr", "--steps", "0:61:4", "--runs", "1:3")
        assert farcli(*words, cwd=folder).code == 0
        found = json.loads(farcli("inspect", "thin.zarr", cwd=folder).out)
        assert (found["steps"], found["runs"]) == ([0, 20, 40, 60], [1, 2])
        assert farcli("diff", "digits.zarr", "thin.zarr", "--step", "40", "--run", "2", "--check", cwd=folder).code == 0

    def test_in_place(self, farcli, folder):
        shutil.copytree(folder / "digits.zarr", folder / "copy.zarr")
        done = farcli("pack", "copy.zarr", "--in-place", cwd=folder)
        assert done.code == 0, done.err
        assert farcli("diff", "digits.zarr", "copy.zarr", "--check", cwd=folder).code == 0
        assert json.loads(farcli("inspect", "copy.zarr", cwd=folder).out)["header"]["pack"]["codec"] == "zstd"
        for words in (("--codec", "bitround:8"), ("--steps", "0:61:2"), ("--runs", "0"), ("--dtype", "float16")):
            refused(farcli, folder, ("pack", "copy.zarr", "--in-place", *words), 2, words[0], "--force")
        assert farcli("pack", "copy.zarr", "--in-place", "--runs", "0", "--force", cwd=folder).code == 0

    def test_bad_input(self, farcli, folder):
        (folder / "file").write_text("x")
        for words, code, text in (
            (("nowhere.zarr", "-o", "p.zarr"), 3, "nowhere.zarr"),
            (("digits.zarr",), 2, "--in-place"),
            (("digits.zarr", "-o", "p.zarr", "--in-place"), 2, "--in-place"),
            (("digits.zarr", "-o", "linreg.zarr"), 2, "already exists"),
            (("digits.zarr", "-o", "digits.zarr", "--force"), 2, "--in-place"),
            (("digits.zarr", "-o", "file", "--force"), 2, "not a trajectory store"),
            (("digits.zarr", "-o", "p.zarr", "--codec", "zstdd"), 2, "Did you mean 'zstd'"),
            (("digits.zarr", "-o", "p.zarr", "--codec", "bitround:99"), 2, "bitround:N"),
            (("digits.zarr", "-o", "p.zarr", "--dtype", "int8"), 2, "int8"),
            (("digits.zarr", "-o", "p.zarr", "--chunk", "1,2"), 2, "--chunk"),
            (("digits.zarr", "-o", "p.zarr", "--runs", "9"), 2, "0…3"),
            (("digits.zarr", "-o", "p.zarr", "--memory", "1K"), 6, "--memory"),
        ):
            refused(farcli, folder, ("pack", *words), code, text)
        (folder / "digits.zarr/zarr.json").unlink()
        refused(farcli, folder, ("pack", "digits.zarr", "-o", "p.zarr"), 3, "not finished")

    def test_a_damaged_store_is_not_packed(self, farcli, folder):
        victim = chunk_of(folder / "digits.zarr")
        data = bytearray(victim.read_bytes())
        data[200] ^= 1
        victim.write_bytes(data)
        for words in (("-o", "p.zarr"), ("--in-place",)):
            refused(farcli, folder, ("pack", "digits.zarr", *words), 3, victim.name)


class TestExport:
    def test_weights_that_are_not_finite_are_written_and_named(self, farcli, folder):
        from safetensors.numpy import load_file

        from farcli.layout import layout_of
        from farcli.store import TrajectoryWriter

        layout = layout_of([("a", (2,), "float32", "parameter"), ("b", (2,), "float32", "parameter")])
        with TrajectoryWriter.create(folder / "wild.zarr", layout, [0]) as writer:
            for step, value in ((0, 1.0), (5, np.inf)):
                writer.append(step, np.array([0, 1, value, 2], np.float32), run=0)
            writer.finish()
        for step, said in ((0, ""), (5, "run 0, step 5 holds NaN or Inf (tensor 'b')")):
            outcome = farcli("export", "wild.zarr", "--step", step, "-o", f"{step}.safetensors", cwd=folder)
            assert outcome.code == 0, outcome.err
            assert said in outcome.err
            assert outcome.err.count("\n") == bool(said)
        assert np.isinf(load_file(folder / "5.safetensors")["b"][0])
