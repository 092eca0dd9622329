"""farcli: record how a network's weights move, forecast where they go, and count what a forecast is worth.

The verbs of the command line are public functions here, imported on first use so that
`import farcli` stays light: `record`, `fit`, `forecast`, `evaluate`, `inspect`, `export`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_VERBS = {
    "record": "farcli.verbs.record:record",
    "fit": "farcli.verbs.fit:fit",
    "forecast": "farcli.verbs.forecast:forecast",
    "evaluate": "farcli.verbs.evaluate:evaluate",
    "inspect": "farcli.verbs.inspect:inspect",
    "export": "farcli.verbs.export:export",
    "Trajectory": "farcli.store:Trajectory",
}

__all__ = ["Trajectory", "__version__", "evaluate", "export", "fit", "forecast", "inspect", "record"]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'farcli' has no attribute {name!r}")
    module, attribute = _VERBS[name].split(":")
    return getattr(import_module(module), attribute)
