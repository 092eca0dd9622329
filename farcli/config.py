"""Reading what a person types: sizes, ranges of runs and steps, and `--set key=value` options.

Options of a method or workload are the fields of its own frozen dataclass `Config`; `configure`
fills one from strings, checking names and types.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from farcli.errors import UsageError
from farcli.registry import unknown

ConfigT = TypeVar("ConfigT")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "512M", "2G", "1.5Gi", "4096". K, M, G, T are powers of 1000; Ki, Mi, … of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"size {text!r}: expected a number of bytes like 512M, 2G or 1Gi.")
    number, unit, binary = match.groups()
    power = "KMGT".index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def format_size(count: float) -> str:
    """A size for people: 1.44 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def parse_duration(text: str) -> float:
    """Seconds of "3h50m", "90s", "15m" or "120"."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"time {text!r}: expected hours, minutes and seconds like 3h50m or 90s.")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


def parse_selection(text: str, available: Sequence[int], what: str) -> list[int]:
    """Choose from `available` by a slice "A:B[:C]" over values, or a list "A,B,C", or "all".

    "8:12" takes the available values v with 8 <= v < 12. A C takes every C-th of them. Negative
    values count from the end of `available`, so "-1" is the last one. A value named twice counts once.

    Raises:
        UsageError: nothing matches, a listed value is not available, or the text is no selection.
    """
    text = text.strip()
    if text == "all":
        return list(available)
    span = f"{available[0]}…{available[-1]}" if available else "none"
    try:
        if ":" in text:
            parts = [int(part) if part.strip() else None for part in text.split(":")]
            if len(parts) > 3 or (len(parts) == 3 and parts[2] is not None and parts[2] < 1):
                raise ValueError
            low, high = (_from_end(part, available) for part in parts[:2])
            chosen = [v for v in available if (low is None or v >= low) and (high is None or v < high)]
            chosen = chosen[:: parts[2] if len(parts) == 3 and parts[2] else 1]
            if high is not None and available and high > available[-1] + _spacing(available):
                raise UsageError(f"{what} {text!r}: out of range; there are {what} {span}.")
        else:
            chosen = [_from_end(int(part), available) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{what} {text!r}: expected A:B, A:B:C or a list A,B,C of whole numbers.") from None
    missing = [v for v in chosen if v not in set(available)]
    if missing or not chosen:
        found = f"{missing[0]} is not there" if missing else "nothing is selected"
        raise UsageError(f"{what} {text!r}: {found}; there are {what} {span}.")
    return list(dict.fromkeys(int(v) for v in chosen if v is not None))


def _from_end(value: int | None, available: Sequence[int]) -> int | None:
    if value is None or value >= 0:
        return value
    return available[value] if -value <= len(available) else value


def _spacing(available: Sequence[int]) -> int:
    return available[-1] - available[-2] if len(available) > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One field of a `Config`, for listings: name, type, default and one line of help."""

    name: str
    type: str
    default: Any
    help: str


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(str(value) for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return "|".join(_type_name(part) if part is not NoneType else "none" for part in get_args(hint))
    return getattr(hint, "__name__", str(hint))


def options_of(config: type) -> list[Option]:
    """The options of a `Config` dataclass; help comes from `metadata={"help": …}` of its fields."""
    hints = get_type_hints(config)
    return [
        Option(
            name=field.name,
            type=_type_name(hints[field.name]),
            default=field.default if field.default is not MISSING else None,
            help=str(field.metadata.get("help", "")),
        )
        for field in fields(config)
    ]


def _convert(text: str, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        for value in get_args(hint):
            if text == str(value):
                return value
        raise ValueError
    if get_origin(hint) in (Union, UnionType):
        if NoneType in get_args(hint) and text.lower() == "none":
            return None
        for part in get_args(hint):
            if part is NoneType:
                continue
            try:
                return _convert(text, part)
            except ValueError:
                continue
        raise ValueError
    if hint is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError
    if hint in (int, float, str):
        return hint(text)
    raise AssertionError(f"a Config field has type {hint}, which --set cannot fill")


def configure(config: type[ConfigT], values: Mapping[str, str], whose: str) -> ConfigT:
    """Build a `Config` from `--set` strings.

    Args:
        config: a frozen dataclass whose fields are bool, int, float, str, Literal or optional ones.
        values: option name → text as typed.
        whose: the method or workload, for messages.

    Raises:
        UsageError: an unknown option, a value of the wrong type, or one that `Config` refuses.
    """
    hints = get_type_hints(config)
    names = [field.name for field in fields(config)]  # pyright: ignore[reportArgumentType]
    converted: dict[str, Any] = {}
    for name, text in values.items():
        if name not in names:
            raise unknown(f"option of {whose}", name, names)
        try:
            converted[name] = _convert(text, hints[name])
        except ValueError:
            raise UsageError(f"{whose}: option {name}={text!r}, expected {_type_name(hints[name])}.") from None
    try:
        return config(**converted)
    except ValueError as error:
        raise UsageError(f"{whose}: {error}") from error


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """Turn ["lr=0.1", "optimizer=sgd"] into a dict.

    Raises:
        UsageError: a text has no "=".
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {text!r}: expected key=value.")
        pairs[name.strip()] = value.strip()
    return pairs
