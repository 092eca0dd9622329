"""`farcli inspect`."""

from itertools import pairwise
from typing import Annotated, Any

import typer

from farcli.cli.options import FormatOption


def inspect(
    path: Annotated[str, typer.Argument(metavar="STORE|FILE", help="A trajectory store, or a fitted forecaster.")],
    format: FormatOption = "auto",
) -> None:
    """Describe a store or a fitted forecaster: header first, like ncdump -h."""
    from farcli.cli.output import chosen_format, emit, emit_pairs
    from farcli.verbs.inspect import inspect as describe

    row = describe(path)
    if chosen_format(format) != "table":
        emit([row], form=format)
    elif row["kind"] == "snapshot":
        emit_pairs(row, form=format)
    elif row["kind"] == "forecaster":
        _print_forecaster(row)
    else:
        _print_store(row)


def _span(values: list[Any]) -> str:
    if len(values) > 3 and len({b - a for a, b in pairwise(values)}) == 1:
        return f"{values[0]}, {values[1]}, … {values[-1]} ({len(values)})"
    shown = ", ".join(map(str, values[:12]))
    return f"{shown}, … ({len(values)})" if len(values) > 12 else shown


def _print_store(row: dict[str, Any]) -> None:
    from farcli.config import format_size

    storage, header = row["storage"], row["header"]
    done = sum(row["snapshots"])
    state = "finished" if row["finished"] else f"unfinished, {done} snapshots so far"
    print(f"{row['path']}: {row['kind']}, {state}")
    print("dimensions:")
    print(f"    run = {len(row['runs'])} ;  // {_span(row['runs'])}")
    print(f"    step = {len(row['steps'])} ;  // {_span(row['steps'])}")
    total = row["parameters"] + row["buffers"]
    print(f"    parameter = {total} ;  // {row['parameters']} parameters, {row['buffers']} in buffers")
    if row["integers"]:
        print(f"    integer = {row['integers']} ;")
    print("tensors:")
    slots = row["layout"]["slots"]
    width = max((len(slot["name"]) for slot in slots), default=0)
    limit = 60
    for slot in slots[:limit]:
        shape = "×".join(map(str, slot["shape"])) or "scalar"
        print(f"    {slot['dtype']:<9} {slot['name']:<{width}} {shape:>14}  @{slot['offset']} {slot['role']}")
    if len(slots) > limit:
        print(f"    … {len(slots) - limit} more (--format ndjson lists all)")
    for alias, name in row["layout"]["tied"]:
        print(f"    {alias} is tied to {name}")
    print("storage:")
    for key, value in storage.items():
        text = format_size(value) if key.endswith("bytes") and isinstance(value, int) else value
        print(f"    {key} = {text} ;")
    print("header:")
    for key, value in header.items():
        if isinstance(value, dict):
            for inner, item in value.items():
                print(f"    {key}.{inner} = {_short(item)} ;")
        else:
            print(f"    {key} = {_short(value)} ;")


def _short(value: Any) -> str:
    text = (
        " ".join(map(str, value)) if isinstance(value, list) and all(isinstance(v, str) for v in value) else str(value)
    )
    return text if len(text) <= 160 else text[:157] + "…"


def _print_forecaster(row: dict[str, Any]) -> None:
    from farcli.cli.output import Column, emit

    print(f"{row['path']}: forecaster {row['method']} ({row['reference']})")
    for key in ("coupling", "parameters", "options"):
        print(f"    {key} = {row[key]} ;")
    print(f"    context = {_span(row['context'])} ;  // steps; looks at {_span(row['observed'])}")
    print(f"    targets = {_span(row['targets'])} ;")
    for key, value in row["provenance"].items():
        print(f"    provenance.{key} = {_short(value)} ;")
    rows = row.get("coefficients")
    if rows:
        emit(
            rows,
            [Column(key=key, heading=key, form="+.4f" if key not in ("step", "tensor") else "") for key in rows[0]],
            form="table",
        )
