"""The trained networks against their papers' formulas, and on families they can learn; the averages by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from farcli.errors import StoreError, UsageError
from farcli.fitting.descent import descend
from farcli.forecasters.base import Prefix, TrainedForecaster
from farcli.forecasters.nino_mlp import NinoMlp, kind_of
from farcli.forecasters.wnn import TwoStreams, scaled
from farcli.layout import layout_of
from tests.forecasters.trajectories import LAYOUT, NINO, Data, create, drifting, fitted

SHARED = Path(__file__).parents[3] / "shared" / "data" / "nino"
PUBLISHED = [SHARED / "nino_mlp.pt", SHARED / "nino_mlp_h32.pt"]


def settling(seed: int, runs: int = 12) -> Data:
    """w(t) = end + (start − end)·e^(−t/80), no noise: each weight's future is a function of its past."""
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of([("w", (6,), "float32", "parameter")])
    start_BD, end_BD = torch.randn(runs, 6, generator=generator), torch.randn(runs, 6, generator=generator)
    steps_C, steps_H = (0, 20, 40, 60, 80), (120, 200)
    pace_T = torch.exp(-torch.tensor(steps_C + steps_H) / 80.0)
    return Data(layout, steps_C, steps_H, end_BD[:, None] + pace_T[None, :, None] * (start_BD - end_BD)[:, None])


@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("introspection", {}, 0.05),
        ("introspection", {"scale": "none"}, 0.05),
        ("wnn", {"penalty": 0.0}, 0.05),
        ("dlinear", {}, 0.01),
        ("dlinear", {"channels": "joint"}, 0.05),
        ("lstm", {}, 0.05),
        ("transformer", {}, 0.05),
    ],
    ids=lambda value: str(value) if isinstance(value, str | dict) else "",
)
def test_learns_what_can_be_learned(name: str, options: dict[str, Any], bound: float) -> None:
    """On fresh runs, in units of persistence's squared error."""
    # Maps that mix channels have to learn from many runs that they need not.
    data, fresh = settling(seed=0, runs=100 if "channels" in options else 12), settling(seed=1)
    forecaster = create(name, lr=0.01, batch=72, epochs=400, **options)
    assert isinstance(forecaster, TrainedForecaster)
    observed, problem = data.observed(forecaster)
    found = descend(forecaster, problem, observed.passes()).forecaster
    truth_BHD = fresh.weights_BTD[:, 5:]
    error = (found.forecast(fresh.prefix(), fresh.steps_H) - truth_BHD).square().mean()
    assert float(error / (truth_BHD - fresh.weights_BTD[:, 4:5]).square().mean()) < bound


def test_gfm_learns_a_common_end() -> None:
    data, fresh = settling(seed=0, runs=40), settling(seed=1)
    ends_D = data.weights_BTD[:1, -1].clone()
    for own in (data, fresh):
        own.weights_BTD[:, -1] = ends_D
    forecaster = create("gfm", lr=3e-3, batch=40, epochs=300)
    assert isinstance(forecaster, TrainedForecaster)
    found = descend(forecaster, data.problem(), data.passes()).forecaster
    moved = (ends_D - fresh.weights_BTD[:, 4]).square().mean()
    error = (found.forecast(fresh.prefix(), fresh.steps_H)[:, 1] - ends_D).square().mean()
    assert float(error / moved) < 0.05


# ------------------------------------------------------------------------- WNN


def test_wnn_has_the_papers_size() -> None:
    assert sum(parameter.numel() for parameter in TwoStreams(1).parameters()) == 9425


def test_wnn_scaling_by_hand() -> None:
    values = torch.tensor([1.0, 1.5, 0.5, 2.5, 2.0])
    scaled_NC, unit_N = scaled(values[None, :, None])
    expected = [(value - 1.0) / (2.0 + 1e-5) / 2 for value in values.tolist()]
    assert scaled_NC[0].tolist() == pytest.approx(expected)
    # Undone: x̂ = x̂′·2·(range + 1e-5) + x_0, so that x′_4 becomes x_4.
    assert float(scaled_NC[0, -1] * unit_N[0]) + 1.0 == pytest.approx(2.0)


def test_wnn_moves_with_its_weights(data: Data) -> None:
    """Shifted and stretched weights get a shifted and stretched forecast: its scaling sees neither."""
    forecaster, prefix = fitted(data, "wnn"), data.prefix()
    moved = replace(prefix, weights_BCD=3 * prefix.weights_BCD.double() - 5)
    expected = 3 * forecaster.forecast(replace(prefix, weights_BCD=prefix.weights_BCD.double()), data.steps_H) - 5
    torch.testing.assert_close(forecaster.forecast(moved, data.steps_H), expected, rtol=0, atol=2e-3)


def test_dlinear_moves_with_its_weights(data: Data) -> None:
    forecaster, prefix = fitted(data, "dlinear"), data.prefix()
    moving = replace(prefix, weights_BCD=prefix.weights_BCD.double()[..., : LAYOUT.slice_of("frozen").start])
    moved = replace(moving, weights_BCD=3 * moving.weights_BCD - 5)
    expected = 3 * forecaster.forecast(moving, data.steps_H) - 5
    torch.testing.assert_close(forecaster.forecast(moved, data.steps_H), expected, rtol=0, atol=2e-2)


def test_dlinear_by_hand() -> None:
    """One channel, four values, window 3: RevIN, moving average with repeated ends, two maps, RevIN undone."""
    data = drifting(seed=5)
    forecaster = create("dlinear", epochs=3, lr=0.1)
    assert isinstance(forecaster, TrainedForecaster)
    found = descend(forecaster, data.problem(), data.passes()).forecaster
    tensors = {key: value.double().numpy() for key, value in found.tensors().items()}
    values = data.weights_BTD[2, :5, 17].double().numpy()
    gain, shift = tensors["gain_K"][0], tensors["shift_K"][0]
    x = (values - values.mean()) / np.sqrt(values.var() + 1e-5) * gain + shift
    padded = np.concatenate([x[:1], x, x[-1:]])
    trend = np.convolve(padded, np.ones(3) / 3, mode="valid")
    y = tensors["trend.weight"] @ trend + tensors["trend.bias"]
    y += tensors["remainder.weight"] @ (x - trend) + tensors["remainder.bias"]
    expected = (y - shift) / gain * np.sqrt(values.var() + 1e-5) + values.mean()
    forecast = found.forecast(data.prefix(), data.steps_H)[2, :, 17]
    np.testing.assert_allclose(forecast.numpy(), expected, rtol=2e-5, atol=2e-5)


def test_introspection_says_what_covers_it() -> None:
    assert "patent" in type(create("introspection")).reference
    assert "10,755,199" in (type(create("introspection")).__doc__ or "")


# ------------------------------------------------------------------------ NiNo


def nino_by_hand(state: dict[str, Tensor], tensor_CN: np.ndarray, kind: int, k: int) -> np.ndarray:
    """Horizon k of one tensor, after the authors' scale_params, NiNoModel and unscale_params."""
    arrays = {key: value.double().numpy() for key, value in state.items()}
    mean, std = tensor_CN.mean(), tensor_CN.std(ddof=1)
    x = (tensor_CN.T - mean) / (std + 1e-6)
    h = x @ arrays["edge_proj.fc.0.weight"].T + arrays["edge_proj.fc.0.bias"] + arrays["layer_embed.weight"][kind]
    for layer in (0, 2, 4):
        h = h @ arrays[f"edge_mlp.fc.{layer}.weight"].T + arrays[f"edge_mlp.fc.{layer}.bias"]
        h = h / (1 + np.exp(-h))
    out = h @ arrays["edge_mlp.fc.6.weight"][k - 1] + arrays["edge_mlp.fc.6.bias"][k - 1]
    return (x[:, -1] + out) * (std + 1e-6) + mean


@pytest.mark.parametrize("file", [Path(NINO), *PUBLISHED], ids=lambda file: file.name)
def test_nino_by_hand(file: Path) -> None:
    if not file.exists():
        pytest.skip(f"{file} is not here")
    state = torch.load(file, weights_only=True)["state_dict"]
    data = drifting(seed=3, dtype=torch.float64)
    steps_C = (0, 200, 400, 600, 800)
    prefix = replace(data.prefix(), steps_C=steps_C)
    found = NinoMlp(NinoMlp.Config(weights=str(file))).forecast(prefix, (1000, 4200, 8800))
    for name, kind in (("conv.weight", 2), ("conv.bias", 2), ("norm.weight", 4), ("head.weight", 1), ("frozen", 2)):
        own = LAYOUT.slice_of(name)
        for h, k in enumerate((1, 17, 40)):
            expected = nino_by_hand(state, data.weights_BTD[1, :5, own].numpy(), kind, k)
            np.testing.assert_allclose(found[1, h, own].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_nino_between_horizons() -> None:
    nino = create("nino-mlp", weights=NINO)
    prefix = replace(drifting(seed=3).prefix(), steps_C=(0, 200, 400, 600, 800))
    now, one, half, two = nino.forecast(prefix, (801, 1000, 1100, 1200)).unbind(1)
    torch.testing.assert_close(half, (one + two) / 2)
    torch.testing.assert_close(now, prefix.weights_BCD[:, -1], rtol=0, atol=0.1)


def test_nino_kinds() -> None:
    tensors = [
        ("conv.weight", (8, 3, 3, 3), "float32", "parameter"),
        ("fc.weight", (4, 8), "float32", "parameter"),
        ("norm.weight", (8,), "float32", "parameter"),
        ("norm.bias", (8,), "float32", "parameter"),
        ("scale", (), "float32", "parameter"),
    ]
    assert [kind_of(slot) for slot in layout_of(tensors).slots] == [3, 1, 4, 2, 2]  # type: ignore[arg-type]


def test_nino_without_its_file(tmp_path: Path) -> None:
    prefix = drifting(seed=0).prefix()
    with pytest.raises(UsageError, match="no weights were given, expected --set weights=FILE"):
        create("nino-mlp").forecast(prefix, (80,))
    with pytest.raises(StoreError, match=r"absent.pt: no such file"):
        create("nino-mlp", weights=str(tmp_path / "absent.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(StoreError, match=r"text.pt: is not a readable file of weights"):
        create("nino-mlp", weights=str(tmp_path / "text.pt"))
    torch.save({"state_dict": {"other": torch.ones(2)}}, tmp_path / "other.pt")
    with pytest.raises(StoreError, match=r"other.pt: holds no state_dict with layer_embed.weight"):
        create("nino-mlp", weights=str(tmp_path / "other.pt"))
    content = torch.load(NINO, weights_only=True)
    content["state_dict"]["edge_mlp.fc.6.bias"] = torch.ones(20)
    torch.save(content, tmp_path / "short.pt")
    with pytest.raises(StoreError, match=r"'edge_mlp.fc.6.bias' has shape \(20,\), expected \(40,\)"):
        create("nino-mlp", weights=str(tmp_path / "short.pt"))
    with pytest.raises(UsageError, match=r"step 700 is 42.6667 intervals of 15 steps ahead, expected at most 40"):
        create("nino-mlp", weights=NINO).forecast(prefix, (700,))


# ------------------------------------------------------------------ yardsticks


def one(values: list[float], steps: tuple[int, ...]) -> Prefix:
    layout = layout_of([("w", (1,), "float64", "parameter")])
    weights_BCD = torch.tensor(values, dtype=torch.float64)[None, :, None]
    return Prefix(weights_BCD=weights_BCD, steps_C=steps, layout=layout, start=0, runs_B=(0,))


def test_averages_by_hand() -> None:
    prefix = one([8.0, 4.0, 2.0], (0, 1, 2))
    # 0.9·(0.9·8 + 0.1·4) + 0.1·2
    assert create("ema", decay=0.9).forecast(prefix, (3, 9)).flatten().tolist() == pytest.approx([7.04, 7.04])
    assert create("lawa").forecast(prefix, (3, 9)).flatten().tolist() == pytest.approx([14 / 3, 14 / 3])
    assert create("lawa", latest=2).forecast(prefix, (3,)).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([8.0, 4.0, 2.0], [1.0, 0.5, 0.0]),  # halves to 0
        ([0.0, 4.0, 2.0], [3.0, 2.5, 8 / 3]),  # swings about 8/3
        ([0.0, 1.0, 3.0], [3.0, 3.0, 3.0]),  # runs away: keeps w_n
        ([5.0, 5.0, 5.0], [5.0, 5.0, 5.0]),
        ([5.0, 5.0, 6.0], [6.0, 6.0, 6.0]),
    ],
)
@pytest.mark.parametrize(("name", "options"), [("aitken", {}), ("dmd", {"modes": "coordinate"}), ("dmd", {})])
def test_fixed_points_by_hand(name: str, options: dict[str, Any], values: list[float], expected: list[float]) -> None:
    found = create(name, **options).forecast(one(values, (0, 10, 20)), (30, 40, 1000)).flatten().tolist()
    assert found == pytest.approx(expected, abs=1e-9)


def test_dmd_of_rank_one_follows_the_strongest_mode() -> None:
    """Two weights decay at rates of their own; the large one's is found, the small one is left where it is."""
    times = torch.arange(5, dtype=torch.float64)
    weights_BCD = torch.stack([100 * 0.8**times, 0.001 * 0.3**times], dim=-1)[None]
    layout = layout_of([("w", (2,), "float64", "parameter")])
    prefix = Prefix(weights_BCD=weights_BCD, steps_C=(0, 1, 2, 3, 4), layout=layout, start=0, runs_B=(0,))
    large, small = create("dmd", rank=1).forecast(prefix, (6,)).flatten().tolist()
    assert large == pytest.approx(100 * 0.8**6, rel=1e-6)
    assert abs(small - 0.001 * 0.3**4) < 1e-4 * (100 * 0.8**4 - large)
    both = create("dmd").forecast(prefix, (6,)).flatten().tolist()
    assert both == pytest.approx([100 * 0.8**6, 0.001 * 0.3**6], rel=1e-4)


def test_uneven_snapshots_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"aitken needs 3 evenly spaced snapshots .* found at most 2 among steps 0, 1, 3"
    ):
        create("aitken").observed((0, 1, 3))
