"""The ledger as arrays, in a group of the store of a leaping training, that any Zarr reader opens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import StoreError

LEDGER = "ledger"
"""The group."""

Rows = Sequence[Mapping[str, Any]]


def write_ledger(path: Path, rows: Rows, parts: Mapping[str, Rows]) -> None:
    """Write the ledger of a store; by hand, since a script that is ending can start no thread for zarr any more.

    Args:
        path: of the group.
        rows: what every run came to.
        parts: tables by name, each a group: a column of numbers is an array, with NaN for what is not known; one of
            texts an attribute.
    """
    finite = [
        {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]
    _node(path, "group", attributes={"rows": finite})
    for name, table in parts.items():
        columns = {key: [row[key] for row in table] for key in (table[0] if table else ())}
        texts = {key: values for key, values in columns.items() if any(isinstance(value, str) for value in values)}
        _node(path / name, "group", attributes=texts)
        for key in columns.keys() - texts.keys():
            values = np.array([np.nan if value is None else value for value in columns[key]], dtype="<f8")
            _node(
                path / name / key,
                "array",
                shape=[len(values)],
                data_type="float64",
                chunk_grid={"name": "regular", "configuration": {"chunk_shape": [len(values)]}},
                chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}},
                fill_value="NaN",
                codecs=[{"name": "bytes", "configuration": {"endian": "little"}}],
                attributes={},
                dimension_names=[name],
            )
            (path / name / key / "c").mkdir(exist_ok=True)
            (path / name / key / "c" / "0").write_bytes(values.tobytes())


def _node(path: Path, kind: str, **document: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"zarr_format": 3, "node_type": kind, **document}, allow_nan=False)
    (path / "zarr.json").write_text(text, encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a finished store's runs.

    Raises:
        StoreError: it holds no ledger.
    """
    return list(_group(path).attrs["rows"])


def read_part(path: Path, name: str) -> list[dict[str, Any]]:
    """A table of a store's ledger, row by row; empty where there is none of that name.

    Raises:
        StoreError: it holds no ledger.
    """
    group = _group(path)
    if name not in group:
        return []
    part = group[name]
    columns = {key: part[key][:].tolist() for key in part.array_keys()} | dict(part.attrs)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _group(path: Path) -> Any:
    import zarr

    try:
        group: Any = zarr.open_group(path / LEDGER, mode="r")
        group.attrs["rows"]
    except (FileNotFoundError, KeyError) as error:
        raise StoreError(f"{path}: holds no ledger of leaps, it is another kind of recording.") from error
    return group
