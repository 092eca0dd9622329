"""Stores of schema 1 as they were written once, kept for ever: still read bit-exactly, still written the same.

Written by `python -m tests.store.test_store_golden`; run it again only for a new schema, into a new folder.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from farcli.store import Trajectory
from tests.store.cases import Case, files

GOLDEN = Path(__file__).parents[1] / "golden" / "schema1"
HEADER = {"provenance": {"id": "0123456789abcdef", "seed": 0}, "workload": {"name": "golden"}}
CASES = {
    "chunks": Case(6, lockstep=True, chunk=(2, 2, 6), integers=1, labels=(4, 7, 8), steps=(0, 5, 20)),
    "shards": Case(40, chunk=(1, 1, 16), integers=1, labels=(0, 1), steps=(0, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_reads_golden(name: str) -> None:
    case = CASES[name]
    expected = json.loads((GOLDEN / "values.json").read_text())[name]
    trajectory = Trajectory.open(GOLDEN / f"{name}.zarr")
    read = trajectory.read(expected["runs"], expected["steps"])
    assert read.view("uint32").tolist() == np.asarray(expected["bits"], "uint32").tolist()
    assert [[trajectory.integers(r, t).tolist() for t in trajectory.steps] for r in trajectory.runs] == (
        expected["integers"]
    )
    assert trajectory.layout == case.layout
    assert {key: trajectory.header[key] for key in HEADER} == HEADER
    assert list(trajectory.verify()) == []


@pytest.mark.parametrize("name", CASES)
def test_writes_golden(name: str, tmp_path: Path) -> None:
    golden = Trajectory.open(GOLDEN / f"{name}.zarr")
    case = CASES[name]
    with case.create(tmp_path / "a.zarr", header=HEADER) as writer:
        with writer.columns(case.labels, case.steps) as sink:
            sink.write(0, golden.read(case.labels, case.steps))
            sink.integers(np.array([[golden.integers(run, step) for step in case.steps] for run in case.labels]))
        writer.finish()
    assert files(tmp_path / "a.zarr") == files(GOLDEN / f"{name}.zarr")


def write_golden() -> None:
    GOLDEN.mkdir(parents=True)
    expected = {}
    for name, case in CASES.items():
        case.write(GOLDEN / f"{name}.zarr", header=HEADER)
        expected[name] = {
            "runs": case.labels,
            "steps": case.steps,
            "bits": case.weights.view("uint32").tolist(),
            "integers": case.counts.tolist(),
        }
    (GOLDEN / "values.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    write_golden()
