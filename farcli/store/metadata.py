"""The JSON documents of a store: arrays, header, commit record and completion marker.

A store is a Zarr v3 group:

- `weights/zarr.json` is the commit record. While recording, its shape, its attribute `steps` (the
  optimiser steps of axis 1) and its attribute `snapshots` (how many of them each run has) change
  together in one atomically replaced file; its attribute `farcli` is the header.
- `zarr.json` of the group is the completion marker, written last: header, steps, and the metadata of
  all arrays consolidated. Without it no Zarr reader takes the folder for a group.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from farcli.errors import DamagedError, StoreError
from farcli.layout import Layout
from farcli.store.codecs import Decode, decoder

SCHEMA = 1
KEY = "farcli"
KINDS = ("run", "forecast", "optimizer")
DOCUMENT = "zarr.json"
DIMENSIONS = ("run", "step", "parameter")
INTEGER_DIMENSIONS = ("run", "step", "integer")
FLOATS = ("float32", "float64", "float16")
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_RESERVED = ("schema", "kind", "layout", "runs", "planned_steps", "steps")
_LARGEST = 2**62
"""Bytes an array can sensibly declare; beyond it index arithmetic would overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayMetadata:
    """What the `zarr.json` of an array says about its place on disk.

    Attributes:
        shape: its shape.
        dtype: its dtype, little-endian.
        outer: shape of the part that lies in one file.
        inner: shape of the part that is decoded and checked at once; equals `outer` unless sharded.
        sharded: whether a file holds several inner chunks and an index.
        separator: between the numbers in a chunk's file name.
        native: whether we read the files ourselves: chunks with a CRC-32C, plain or in a codec of `pack`.
        decode: how a chunk is decoded; None for plain little-endian bytes, and where it is not ours to read.
        attributes: the array's attributes.
        document: the whole document.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    outer: tuple[int, ...]
    inner: tuple[int, ...]
    sharded: bool
    separator: str
    native: bool
    decode: Decode | None
    attributes: dict[str, Any]
    document: dict[str, Any]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk, without its checksum."""
        return prod(self.inner) * self.dtype.itemsize

    @property
    def chunks_per_file(self) -> tuple[int, ...]:
        """Inner chunks of one file, along each axis."""
        return tuple(o // i for o, i in zip(self.outer, self.inner, strict=True))

    def key(self, *chunk: int) -> str:
        """File name of an outer chunk, relative to the array's folder."""
        return self.separator.join(("c", *map(str, chunk)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a store says about itself.

    Attributes:
        kind: one of `KINDS`.
        layout: where each tensor lies in the vector.
        runs: labels of axis 0.
        planned_steps: steps the finished store will have; None where this was not known.
        values: the whole attribute.
    """

    kind: str
    layout: Layout
    runs: list[int]
    planned_steps: list[int] | None
    values: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is committed.

    Attributes:
        header: of the store.
        weights: metadata of the array of weights.
        steps: of axis 1.
        snapshots: how many of the steps each run has.
    """

    header: Header
    weights: ArrayMetadata
    steps: list[int]
    snapshots: list[int]


def header_values(
    kind: str, layout: Layout, runs: Sequence[int], planned_steps: Sequence[int] | None, more: dict[str, Any]
) -> dict[str, Any]:
    """The attribute `farcli` of a new store."""
    taken = [key for key in more if key in _RESERVED]
    assert not taken, f"header keys {taken} are the store's own"
    values: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "layout": layout.to_json(), "runs": list(runs)}
    if planned_steps is not None:
        values["planned_steps"] = list(planned_steps)
    return values | more


def array_document(
    *,
    shape: Sequence[int],
    dtype: np.dtype,
    outer: Sequence[int],
    inner: Sequence[int] | None,
    dimensions: Sequence[str],
    attributes: dict[str, Any] | None = None,
    chain: Sequence[dict[str, Any]] = (LITTLE,),
) -> dict[str, Any]:
    """The `zarr.json` of an array in one of the layouts we write.

    Args:
        shape: of the array.
        dtype: of the array.
        outer: shape of what one file holds.
        inner: shape of the inner chunks of a sharded array, or None.
        dimensions: names of the axes.
        attributes: attributes of the array.
        chain: codecs of a chunk, before its checksum.
    """
    codecs: list[dict[str, Any]] = [*chain, {"name": "crc32c"}]
    if inner is not None:
        sharding = {
            "chunk_shape": list(inner),
            "codecs": codecs,
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(outer)}},
        # One flat folder: a snapshot is one file, without two folders of its own around it.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        # NaN is the second line of defence: readers other than ours show a missing chunk as this.
        "fill_value": "NaN" if dtype.kind == "f" else 0,
        "codecs": codecs,
        "dimension_names": list(dimensions),
        "attributes": attributes or {},
        "storage_transformers": [],
    }


def group_document(header: dict[str, Any], arrays: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The completion marker: the group's `zarr.json`."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {KEY: header},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
    }


def encode(document: dict[str, Any]) -> bytes:
    """The bytes of a document."""
    return json.dumps(document, allow_nan=False).encode()


def read_document(path: Path, store: Path) -> dict[str, Any]:
    """Read a `zarr.json`.

    Raises:
        DamagedError: it is missing, unreadable or no JSON object.
    """
    name = path.relative_to(store)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{store}: {name} is missing.") from None
    except OSError as error:
        raise DamagedError(f"{store}: {name} cannot be read ({error.strerror}).") from error
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise DamagedError(f"{store}: {name} is not JSON ({error}).") from error
    if not isinstance(value, dict) or not isinstance(value.get("attributes", {}), dict):
        raise DamagedError(f"{store}: {name} is not the metadata of a Zarr group or array.")
    return value


def parse_header(values: Any, store: Path) -> Header:
    """Check the attribute `farcli` of a store.

    Raises:
        StoreError: it is not of this schema, or contradicts itself.
    """
    if not isinstance(values, dict) or "schema" not in values:
        raise StoreError(
            f"{store}: is a Zarr store but not one of farcli's (no {KEY!r} in its attributes).",
            hint="farcli reads stores that `farcli record` or `farcli forecast` wrote.",
        )
    schema = values["schema"]
    if isinstance(schema, int) and schema > SCHEMA:
        raise StoreError(
            f"{store}: has schema {schema}, but this farcli reads schema {SCHEMA}.", hint="Install a newer farcli."
        )
    if schema != SCHEMA or values.get("kind") not in KINDS:
        raise StoreError(
            f"{store}: has schema {schema!r} and kind {values.get('kind')!r}, expected schema {SCHEMA} and a kind of "
            f"{', '.join(KINDS)}."
        )
    try:
        layout = Layout.from_json(values.get("layout"))
    except StoreError as error:
        raise StoreError(f"{store}: {error}") from error
    runs = whole_numbers(values.get("runs"), "runs", store)
    if len(set(runs)) != len(runs) or not runs:
        raise StoreError(f"{store}: its runs {_short(runs)} are empty or repeat a label.")
    planned = values.get("planned_steps")
    if planned is not None:
        planned = increasing_steps(planned, "planned_steps", store)
    return Header(kind=values["kind"], layout=layout, runs=runs, planned_steps=planned, values=values)


def whole_numbers(value: Any, what: str, store: Path) -> list[int]:
    """Check a list of whole numbers from a document."""
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        raise StoreError(f"{store}: its {what} are {_short(value)}, expected a list of whole numbers.")
    return value


def increasing_steps(value: Any, what: str, store: Path) -> list[int]:
    """Check a list of steps from a document."""
    steps = whole_numbers(value, what, store)
    for before, after in pairwise(steps):
        if after <= before:
            raise StoreError(f"{store}: its {what} do not increase ({after} follows {before}).")
    return steps


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def parse_array(document: dict[str, Any], name: str, dimensions: Sequence[str], store: Path) -> ArrayMetadata:
    """Check the `zarr.json` of an array and find out how its files are laid out.

    Raises:
        StoreError: it is no such array, or declares the impossible.
    """
    where = f"{store}: {name}/{DOCUMENT}"
    try:
        if document["node_type"] != "array" or document["zarr_format"] != 3:
            raise StoreError(f"{where}: is not a Zarr v3 array.")
        shape = _lengths(document["shape"], 0)
        grid = document["chunk_grid"]
        outer = _lengths(grid["configuration"]["chunk_shape"], 1)
        data_type = document["data_type"]
        names = document.get("dimension_names")
        inner, native, decode = _codecs(document["codecs"], outer)
        encoding = document["chunk_key_encoding"]
        separator = encoding.get("configuration", {}).get("separator", "/" if encoding["name"] == "default" else ".")
        native &= encoding["name"] == "default" and not document.get("storage_transformers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{where}: is not readable ({type(error).__name__}: {error}).") from error
    if list(names or ()) != list(dimensions):
        raise StoreError(f"{where}: its dimensions are {names}, expected {list(dimensions)}.")
    allowed = FLOATS if dimensions == DIMENSIONS else ("int64",)
    if data_type not in allowed:
        raise StoreError(f"{where}: its data type is {data_type!r}, expected {' or '.join(allowed)}.")
    if not len(shape) == len(outer) == len(inner) == len(dimensions):
        raise StoreError(f"{where}: its shape is {shape}, its chunks are {outer}, expected {len(dimensions)} axes.")
    dtype = np.dtype(data_type).newbyteorder("<")
    for lengths in (shape, outer):
        if prod(lengths) * dtype.itemsize > _LARGEST:
            raise StoreError(f"{where}: declares the impossible size {lengths}.")
    if any(o % i for o, i in zip(outer, inner, strict=True)):
        raise StoreError(f"{where}: shards of {outer} cannot be cut into chunks of {inner}.")
    return ArrayMetadata(
        shape=shape,
        dtype=dtype,
        outer=outer,
        inner=inner,
        sharded=inner != outer or _names(document["codecs"])[:1] == ["sharding_indexed"],
        separator=separator,
        native=native,
        decode=decode if native else None,
        attributes=document.get("attributes") or {},
        document=document,
    )


def _lengths(value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and n >= least for n in value):
        raise ValueError(f"{_short(value)} are not lengths")
    return tuple(value)


def _names(codecs: Any) -> list[str]:
    return [codec if isinstance(codec, str) else codec["name"] for codec in codecs]


def _is_plain(codecs: Any) -> bool:
    """Whether a chain is little-endian bytes followed by a CRC-32C."""
    if _names(codecs) != ["bytes", "crc32c"]:
        return False
    return isinstance(codecs[0], dict) and codecs[0].get("configuration", {}).get("endian") == "little"


def _codecs(codecs: Any, outer: tuple[int, ...]) -> tuple[tuple[int, ...], bool, Decode | None]:
    """Shape of the inner chunks, whether the chain is one we read ourselves, and how a chunk is decoded."""
    if _names(codecs) == ["sharding_indexed"]:
        sharding = codecs[0]["configuration"]
        inner, readable, decode = _codecs(sharding["codecs"], _lengths(sharding["chunk_shape"], 1))
        indexed = _is_plain(sharding["index_codecs"]) and sharding.get("index_location", "end") == "end"
        return inner, readable and indexed, decode
    if _is_plain(codecs):
        return outer, True, None
    decode = decoder(codecs[:-1]) if _names(codecs)[-1:] == ["crc32c"] else None
    return outer, decode is not None, decode


def read_record(store: Path, *, finished: bool) -> Record:
    """Read what is committed: from the completion marker of a finished store, else from the commit record.

    Raises:
        StoreError: the store is not one this farcli can read, or its metadata contradict each other.
        DamagedError: metadata are missing or unreadable.
    """
    if finished:
        header = parse_header(read_document(store / DOCUMENT, store).get("attributes", {}).get(KEY), store)
        document = read_document(store / "weights" / DOCUMENT, store)
        steps = increasing_steps(header.values.get("steps"), "steps", store)
        snapshots = [len(steps)] * len(header.runs)
    else:
        document = read_document(store / "weights" / DOCUMENT, store)
        attributes = document.get("attributes", {})
        header = parse_header(attributes.get(KEY), store)
        steps = increasing_steps(attributes.get("steps"), "steps", store)
        snapshots = whole_numbers(attributes.get("snapshots"), "snapshots", store)
        if len(snapshots) != len(header.runs) or max(snapshots) != len(steps) or min(snapshots) < 0:
            raise StoreError(
                f"{store}: it names {len(header.runs)} runs and {len(steps)} steps, but has snapshots "
                f"{_short(snapshots)} of the runs."
            )
    weights = parse_array(document, "weights", DIMENSIONS, store)
    expected = (len(header.runs), len(steps), header.layout.size)
    if weights.shape != expected:
        raise StoreError(
            f"{store}: its weights have shape {weights.shape}, but it names {expected[0]} runs, {expected[1]} steps "
            f"and tensors of {expected[2]} coordinates in all."
        )
    return Record(header=header, weights=weights, steps=steps, snapshots=snapshots)
