"""The benchmark of recording measures what it says: run for real, on a small network."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts/bench_record.py"


def interval() -> Callable[[Sequence[float]], tuple[float, float, float]]:
    spec = spec_from_file_location("bench_record", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.interval


@pytest.mark.parametrize(("count", "rank"), [(2, 1), (6, 1), (8, 1), (9, 2), (12, 3), (20, 6), (30, 10)])
def test_the_interval_of_a_median_is_the_tables(count: int, rank: int):
    """Ranks for 95 % as in Conover, Practical Nonparametric Statistics, table of the sign test."""
    middle, low, high = interval()([float(number) for number in range(count, 0, -1)])
    assert (middle, low, high) == ((count + 1) / 2, rank, count + 1 - rank)


@pytest.mark.slow
def test_rows_of_a_small_network(tmp_path: Path):
    words = ["--workload", "digits-cnn", "--set", "width=64", "--rounds", "2", "--steps", "6", "--every", "3", "2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--results", str(tmp_path), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "record.ndjson").read_text().splitlines()]
    assert done.stdout.splitlines() == [json.dumps(row) for row in rows]
    assert [row["every"] for row in rows] == [3, 2]
    for row in rows:
        assert row["parameters"] == sum((64 * 9, 128, 128 * 64 * 9, 256, 512 * 10, 10))
        assert row["slowdown_low"] <= row["slowdown_percent"] <= row["slowdown_high"]
        assert row["longest_stall_seconds"] >= row["copy_seconds"] > 0
        assert row["longest_stall_copies"] == pytest.approx(row["longest_stall_seconds"] / row["copy_seconds"])
        assert row["longest_copy_copies"] >= 1
        assert row["longest_stall_memcpies"] == pytest.approx(row["longest_stall_seconds"] / row["memcpy_seconds"])
        assert row["longest_memcpy_memcpies"] >= 1
        assert row["copy_slowdown_percent"] > -100
        assert 1 <= row["snapshot_disk_bytes"] / (4 * row["parameters"]) < 1.3
        assert row["reached"] == {"slowdown": None, "stall": None}
    assert rows[0]["extra_bytes"] >= 0
    assert rows[1]["extra_bytes"] is None
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert "| 3 |" in (tmp_path / "record.md").read_text()


@pytest.mark.slow
def test_missing_data_are_named(tmp_path: Path):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "", "FARCLI_DATA": ""},
        timeout=240,
    )
    assert done.returncode == 1
    assert "bench_record: error: data=vader-movie: vaderSentiment-3.3.2*" in done.stderr
    assert "pip download" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_its_part_on_a_gpu_says_so(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda", "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1
    assert done.stderr == "bench_record: error: device 'cuda': this machine has no CUDA device that torch can use.\n"
    assert list(tmp_path.iterdir()) == []
