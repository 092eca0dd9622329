"""farcli: record how a network's weights move, forecast where they go, and count what a forecast is worth.

The verbs of the command line are public functions here, imported on first use so that
`import farcli` stays light: `record`, `fit`, `forecast`, `evaluate`, `inspect`, `export`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farcli.recording.recorder import Recorder
    from farcli.speculation.leaper import Leaper
    from farcli.store import Trajectory
    from farcli.verbs.evaluate import evaluate
    from farcli.verbs.export import export
    from farcli.verbs.fit import fit
    from farcli.verbs.forecast import forecast
    from farcli.verbs.inspect import inspect
    from farcli.verbs.record import record

__version__ = "0.1.0"

__all__ = [
    "Leaper",
    "Recorder",
    "Trajectory",
    "__version__",
    "evaluate",
    "export",
    "fit",
    "forecast",
    "inspect",
    "record",
]

_LAZY = {
    "Leaper": "farcli.speculation.leaper",
    "Recorder": "farcli.recording.recorder",
    "Trajectory": "farcli.store",
    "evaluate": "farcli.verbs.evaluate",
    "export": "farcli.verbs.export",
    "fit": "farcli.verbs.fit",
    "forecast": "farcli.verbs.forecast",
    "inspect": "farcli.verbs.inspect",
    "record": "farcli.verbs.record",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'farcli' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
