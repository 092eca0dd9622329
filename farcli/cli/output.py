"""Rows on stdout: a table for people, NDJSON for pipes, CSV on request. The same keys in all three."""

import csv
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any, Literal

Format = Literal["auto", "table", "ndjson", "csv"]
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table: the key of the rows, its heading, how numbers are shown, whether long text wraps.

    On a narrow terminal the columns that can be spared are left out, those with the highest number first.
    """

    key: str
    heading: str
    form: str = ""
    wrap: bool = False
    spare: int = 0


def chosen_format(wanted: Format) -> Literal["table", "ndjson", "csv"]:
    """Resolve "auto": a table on a terminal, NDJSON elsewhere."""
    if wanted != "auto":
        return wanted
    return "table" if sys.stdout.isatty() else "ndjson"


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as strict JSON: NaN and infinities become null and are named under "non_finite"."""
    odd = [key for key, value in row.items() if isinstance(value, float) and not isfinite(value)]
    clean: dict[str, Any] = {"schema": SCHEMA}
    clean.update({key: None if key in odd else value for key, value in row.items()})
    if odd:
        clean["non_finite"] = odd
    return clean


def emit(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column] | None = None,
    *,
    form: Format = "auto",
    title: str | None = None,
    notes: Sequence[str] = (),
    rule_before: Sequence[int] = (),
) -> None:
    """Print rows.

    Args:
        rows: what to print; keys are the documented ones of the command.
        columns: which keys a table shows and how; all of them when None. NDJSON and CSV print every key.
        form: the format asked for.
        title: shown above a table.
        notes: lines below a table.
        rule_before: indices of rows that a table sets off with a rule above them.
    """
    kind = chosen_format(form)
    if kind == "ndjson":
        for row in rows:
            print(json.dumps(plain(row), allow_nan=False))
    elif kind == "csv":
        keys = list(dict.fromkeys(key for row in rows for key in plain(row)))
        writer = csv.DictWriter(sys.stdout, keys, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in plain(row).items()})
    else:
        _table(rows, columns or _all_columns(rows), title, notes, set(rule_before))
    sys.stdout.flush()


def _all_columns(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [Column(key=key, heading=key) for key in keys]


def _cell(value: Any, form: str) -> str:
    if value is None or value == "" or (isinstance(value, float) and isnan(value)):
        return "·"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format(value, form or ".4g") if isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return format(value, form) if form and not isinstance(value, str) else str(value)


def _table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    title: str | None,
    notes: Sequence[str],
    rules: set[int],
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    console = _console(sys.stdout)
    columns, left_out = _fitting(rows, columns, console.width)
    for column in columns:
        numeric = any(isinstance(row.get(column.key), int | float) for row in rows)
        table.add_column(column.heading, justify="right" if numeric else "left", no_wrap=not column.wrap)
    for index, row in enumerate(rows):
        if index in rules and index:
            table.add_section()
        cells = [Text(_cell(row.get(column.key), column.form)) for column in columns]
        table.add_row(*cells, style=row.get("_style"))
    console.print(table)
    if left_out:
        notes = [*notes, f"Left out on a narrow terminal: {', '.join(left_out)} (--format ndjson has all)."]
    for note in notes:
        console.print(Text(note), style="dim", soft_wrap=True)


def _fitting(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], width: int
) -> tuple[list[Column], list[str]]:
    """The columns that fit, and the headings of those left out."""
    widths = {
        column.key: max(len(column.heading), *(len(_cell(row.get(column.key), column.form)) for row in rows)) + 2
        for column in columns
        if rows
    }
    kept, left_out = list(columns), []
    for column in sorted((column for column in columns if column.spare), key=lambda column: -column.spare):
        if sum(widths.get(each.key, 0) for each in kept if not each.wrap) <= width:
            break
        kept.remove(column)
        left_out.append(column.heading)
    return kept, left_out


def emit_pairs(row: Mapping[str, Any], *, form: Format = "auto", title: str | None = None) -> None:
    """Print one row: as aligned "key  value" lines on a terminal, else as `emit` does."""
    if chosen_format(form) != "table":
        emit([row], form=form)
        return
    from rich.text import Text

    console = _console(sys.stdout)
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    width = max((len(key) for key in row), default=0)
    for key, value in row.items():
        text = ", ".join(f"{k}={_cell(v, '')}" for k, v in value.items()) if isinstance(value, dict) else None
        console.print(Text(f"  {key:<{width}}  {_cell(value, '') if text is None else text}"), soft_wrap=True)


def emit_made(row: Mapping[str, Any], *, form: Format, quiet: bool) -> None:
    """Print the row of a command that wrote something; only its path when quiet."""
    if quiet:
        print(row["path"], flush=True)
    else:
        emit_pairs(row, form=form)


def _console(stream: Any) -> Any:
    """A rich console that wraps nothing in a pipe; NO_COLOR, FORCE_COLOR and TERM are rich's own."""
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(file=stream, highlight=False, width=width)


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(f"farcli: {text}", file=sys.stderr, flush=True)


def saying(quiet: bool) -> Callable[[str], None]:
    """What says such lines; with --quiet, nothing."""
    return (lambda text: None) if quiet else say
