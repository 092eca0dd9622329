"""A fitted forecaster in one safetensors file: its tensors, options, problem and provenance."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farcli.config import configure
from farcli.errors import StoreError, UsageError
from farcli.files import staged_file
from farcli.forecasters.base import FittedForecaster, Forecaster, Problem
from farcli.forecasters.table import FORECASTERS
from farcli.layout import Layout
from farcli.registry import resolve

SCHEMA = 2
"""1 had no digest of the header."""
_KEY = "farcli"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A forecaster with what it was fitted for and how.

    Attributes:
        method: its name in the table, or "package.module:Class".
        forecaster: ready to forecast.
        problem: layout, observed and target steps it was fitted for.
        context: steps of the whole prefix, of which `problem.steps_C` are those the method looks at.
        provenance: versions, command, training stores and runs.
    """

    method: str
    forecaster: Forecaster
    problem: Problem
    context: tuple[int, ...]
    provenance: dict[str, Any]


def build(method: str, options: Mapping[str, str]) -> Forecaster:
    """The unfitted forecaster a name and its options stand for.

    Raises:
        UsageError: unknown method or option.
    """
    cls: type[Forecaster] = resolve("forecaster", method, FORECASTERS)
    if not isinstance(cls, type) or not issubclass(cls, Forecaster):
        raise UsageError(f"forecaster {method!r}: is not a Forecaster class.")
    return cls(configure(cls.Config, options, method))


def save(artefact: Artefact, path: Path, *, replace: bool) -> None:
    """Write the file; it appears whole or not at all.

    Raises:
        UsageError: the file exists and `replace` is false.
        ResourceError: the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    forecaster, problem = artefact.forecaster, artefact.problem
    tensors = forecaster.tensors() if isinstance(forecaster, FittedForecaster) else {}
    header = {
        "schema": SCHEMA,
        "method": artefact.method,
        "options": {key: str(value) for key, value in asdict(forecaster.config).items()},
        "layout": problem.layout.to_json(),
        "coordinates": problem.coordinates,
        "runs": problem.runs,
        "context": list(artefact.context),
        "observed": list(problem.steps_C),
        "targets": list(problem.steps_H),
        "tensors": _digest(tensors),
        "provenance": artefact.provenance,
    }
    header["digest"] = _header_digest(json.loads(json.dumps(header)))  # of what a reader will see
    with staged_file(path, replace) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})  # straight from the tensors: no copy
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):  # the system's, told in words
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes, dtypes and bytes: safetensors itself has no checksum."""
    digest = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _header_digest(header: Mapping[str, Any]) -> str:
    """A fingerprint of all that the header says beside it."""
    rest = {key: value for key, value in header.items() if key != "digest"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load(path: Path) -> Artefact:
    """Read a file that `save` wrote.

    Raises:
        StoreError: missing, damaged, not ours, or of a newer schema.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise StoreError(f"{path}: no such file.", hint="`farcli fit METHOD STORE -o FILE` makes one.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: not a readable safetensors file ({error}).") from error
    if text is None:
        raise StoreError(f"{path}: is a safetensors file, but not one that `farcli fit` wrote.")
    try:
        header = json.loads(text)
        if "step" in header:
            raise StoreError(f"{path}: is a snapshot that `farcli export` wrote, not a forecaster.")
        schema, method = header["schema"], str(header["method"])
        if not isinstance(schema, int) or schema < 1:
            raise StoreError(f"{path}: has schema {schema!r}, expected 1 to {SCHEMA}.", hint="Fit it again.")
        if schema > SCHEMA:
            raise StoreError(
                f"{path}: has schema {schema}, and this farcli reads up to {SCHEMA}.", hint="Upgrade farcli."
            )
        if (schema > 1 or "digest" in header) and header.get("digest") != _header_digest(header):
            raise StoreError(f"{path}: is damaged: its header is not the one that was written.", hint="Fit it again.")
        problem = Problem(
            layout=Layout.from_json(header["layout"]),
            coordinates=int(header["coordinates"]),
            runs=int(header["runs"]),
            steps_C=tuple(int(step) for step in header["observed"]),
            steps_H=tuple(int(step) for step in header["targets"]),
            memory=0,
        )
        context = tuple(int(step) for step in header["context"])
        options, provenance = dict(header["options"]), dict(header["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: its farcli header cannot be read.", hint="Fit it again.") from error
    if header.get("tensors") != _digest(tensors):
        raise StoreError(f"{path}: is damaged: its tensors are not those that were written.", hint="Fit it again.")
    try:
        unfitted = build(method, options)
    except UsageError as error:
        raise StoreError(f"{path}: was fitted by a method this farcli does not have so: {error}") from error
    forecaster = unfitted
    if isinstance(unfitted, FittedForecaster):
        try:
            forecaster = type(unfitted).restore(unfitted.config, problem, tensors)
        except StoreError as error:
            raise StoreError(f"{path}: was fitted by another version of {error}", hint="Fit it again.") from error
    return Artefact(method=method, forecaster=forecaster, problem=problem, context=context, provenance=provenance)
