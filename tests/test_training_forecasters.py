"""Forecasters fitted by gradient, from store to file to rows: what is reported, and how a fit fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from farcli import evaluate, fit, inspect, record
from farcli.errors import FarcliError, NonFiniteError, ResourceError, StoreError
from farcli.layout import layout_of
from farcli.store import TrajectoryWriter
from tests.conftest import Outcome


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    record("linreg", folder / "linreg.zarr", runs=6, steps=20, seed=1)
    record("digits-cnn", folder / "digits.zarr", runs=2, steps=14, every=2, seed=3)
    return folder


def fit_quickly(method: str, store: Path, output: Path, /, **more: Any) -> dict[str, Any]:
    options = {"epochs": "3", **more.pop("options", {})}
    return fit(method, [str(store)], output, options=options, device="cpu", **more)


@pytest.mark.parametrize("method", ["gfm", "introspection", "wnn", "dlinear", "lstm", "transformer"])
def test_fit_and_evaluate(method: str, stores: Path, tmp_path: Path) -> None:
    file, lines = tmp_path / f"{method}.safetensors", []
    row = fit_quickly(method, stores / "linreg.zarr", file, train_runs="0:4", report=lambda *line: lines.append(line))
    assert row["epochs"] == row["updates"] == row["epoch"] == 3
    assert row["loss"] > 0
    assert row["validation_loss"] is None
    assert lines[-1] == (3, 3, f"epoch 3, loss {row['loss']:.4g}")
    found = evaluate([str(file)], str(stores / "linreg.zarr"), device="cpu")
    own = [r for r in found if r["method"] == method]
    assert own
    assert all(r["mse"] > 0 and r["runs"] == 2 for r in own)
    header = inspect(str(file))
    assert header["provenance"]["updates"] == 3
    assert header["options"]["epochs"] == 3


def test_equal_seeds_give_equal_files(stores: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit_quickly("gfm", stores / "linreg.zarr", tmp_path / name, options={"epochs": "20"})
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)


def test_a_fit_that_is_there_is_taken(stores: Path, tmp_path: Path) -> None:
    fit_quickly("lstm", stores / "linreg.zarr", tmp_path / "lstm", resume=True)
    written = (tmp_path / "lstm").read_bytes()
    assert fit_quickly("lstm", stores / "linreg.zarr", tmp_path / "lstm", resume=True)["seconds"] is None
    assert (tmp_path / "lstm").read_bytes() == written


def test_divergence_leaves_the_best_state(farcli: Callable[..., Outcome], stores: Path, tmp_path: Path) -> None:
    file, options = tmp_path / "gfm.safetensors", {"epochs": "1000", "lr": "1e15"}
    settings = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    outcome = farcli("fit", "gfm", stores / "linreg.zarr", "-o", file, *settings)
    assert outcome.code == 4
    assert "gfm: the fit diverged: the loss is" in outcome.err
    assert f"Its best state is in {file}" in outcome.err
    assert "Lower the learning rate: --set lr=0.0001" in outcome.err
    assert evaluate([str(file)], str(stores / "linreg.zarr"), runs="all", device="cpu")
    # It is not what was asked for, and a resumed fit says so.
    with pytest.raises(NonFiniteError, match="holds the best state of a fit that diverged"):
        fit("gfm", [str(stores / "linreg.zarr")], file, options=options, resume=True)


def test_a_joint_method_names_the_largest_size(stores: Path, tmp_path: Path) -> None:
    store, file = stores / "digits.zarr", tmp_path / "x"
    with pytest.raises(
        ResourceError, match=r"gfm: D = 1922 parameters take .* but the budget is 1 MB, which allows D = \d+"
    ):
        fit_quickly("gfm", store, file, memory=2_000_000)
    assert not file.exists()
    assert fit_quickly("lstm", store, file, memory=2_000_000)["parameters"] == 1922


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gfm", {"updates": "2"}),
        ("lstm", {"updates": "2", "channels": "joint"}),
        ("lfd2", {"map": "dense"}),
        ("lfd2", {"map": "dense", "ridge": "loo"}),
    ],
)
def test_the_largest_size_that_is_named_fits_and_the_next_does_not(
    method: str, options: dict[str, str], tmp_path: Path
) -> None:
    def fitted(size: int) -> dict[str, Any]:
        layout = layout_of([("weight", (size,), "float32", "parameter")])
        rng, store = np.random.default_rng(size), tmp_path / f"{size}.zarr"
        with TrajectoryWriter.create(store, layout, [0, 1, 2], planned_steps=range(8), lockstep=True) as writer:
            for step in range(8):
                writer.append(step, rng.standard_normal((3, size), dtype=np.float32))
            writer.finish()
        return fit(method, [str(store)], tmp_path / "x", options=options, device="cpu", memory=4_000_000, replace=True)

    def refused(size: int) -> int:
        with pytest.raises(ResourceError, match=rf"{method}: .*D = {size} .* which allows D = \d+") as caught:
            fitted(size)
        return int(str(caught.value).rsplit("D = ", 1)[1].rstrip("."))

    largest = refused(100_000)  # where not even one run's snapshots fit
    assert fitted(largest)["parameters"] == largest
    assert refused(largest + 1) == largest


@pytest.mark.parametrize(
    ("method", "more", "code", "message"),
    [
        ("gfm", {"train_runs": "0:1", "options": {"validation": "0.5"}}, 2, "of 1 training runs leaves 0"),
        ("gfm", {"options": {"patience": "3"}}, 2, "patience = 3 needs validation runs"),
        ("gfm", {"options": {"units": "metric"}}, 2, "units='metric', expected as-printed|corrected"),
        ("wnn", {"context": 4}, 2, "wnn: needs a context of at least 5 snapshots, got 4"),
        ("lstm", {"options": {"epochs": "many"}}, 2, "option epochs='many', expected int"),
        ("nino-mlp", {"options": {"weights": "absent.pt"}}, 3, "absent.pt: no such file"),
    ],
)
def test_bad_input(method: str, more: dict[str, Any], code: int, message: str, stores: Path, tmp_path: Path) -> None:
    options = more.get("options", {})
    rest = {key: value for key, value in more.items() if key != "options"}
    with pytest.raises(FarcliError) as caught:
        fit(method, [str(stores / "linreg.zarr")], tmp_path / "x", options=options, **rest)
    assert caught.value.exit_code == code
    assert message in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_tampered_file_is_refused(stores: Path, tmp_path: Path) -> None:
    file = tmp_path / "lstm.safetensors"
    fit_quickly("lstm", stores / "linreg.zarr", file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["head.weight"] = tensors["head.weight"][:, :3].contiguous()
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(StoreError, match=r"lstm.safetensors: is damaged"):
        evaluate([str(file)], str(stores / "linreg.zarr"))
