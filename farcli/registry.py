"""Tables of names that resolve to classes on first use, and "did you mean" for those that do not.

A table of strings, not decorators: a decorator registers only what was imported, so listing the
methods would import torch.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from farcli.errors import UsageError


def unknown(kind: str, name: str, available: Iterable[str]) -> UsageError:
    """The error for a name that is in no table."""
    names = sorted(available)
    close = get_close_matches(name, names, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"Unknown {kind} {name!r}.{guess} Available: {', '.join(names)}.")


def resolve(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object a name stands for.

    Args:
        kind: what the table holds, for the error message ("forecaster").
        name: a key of `table`, or "package.module:Name" for one from outside.
        table: name → "package.module:Name".

    Raises:
        UsageError: the name is unknown, or what it points to cannot be imported.
    """
    target = table.get(name)
    if target is None:
        if ":" not in name:
            raise unknown(kind, name, table)
        target = name
    module, _, attribute = target.partition(":")
    if name in table:
        return getattr(import_module(module), attribute)
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        raise UsageError(f"{kind} {name!r}: cannot import {module!r} ({error}).") from error
    except AttributeError as error:
        raise UsageError(f"{kind} {name!r}: module {module!r} has no {attribute!r}.") from error
