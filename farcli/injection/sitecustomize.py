"""What Python imports first in a recorded command: it waits for torch's optimisers, and imports nothing heavy.

`farcli record … -- CMD` and `farcli leap … -- CMD` put this folder in front of PYTHONPATH. A `sitecustomize` of the
environment's own, which this one hides, runs as if this one were not there.
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Waiting:
    """A finder that lets the import system find a module as always, and calls us when it has been loaded."""

    def __init__(self, calls):
        self.calls = calls

    def find_spec(self, name, path=None, target=None):
        call = self.calls.pop(name, None)
        if call is None:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                _after_loading(spec, call)
                return spec
        return None


def _after_loading(spec, call):
    load = getattr(spec.loader, "exec_module", None)
    if load is None:
        return

    def exec_module(module):
        load(module)
        _attempt(call, module)

    try:  # noqa: SIM105 - contextlib is one import more for every Python that starts
        spec.loader.exec_module = exec_module
    except AttributeError:
        pass


def _attempt(call, *words):
    try:
        call(*words)
    except ImportError as error:
        print(
            f"farcli: nothing will be recorded: {sys.executable} cannot import farcli ({error}). "
            "Install farcli where the training runs.",
            file=sys.stderr,
        )
    except Exception as error:  # the training comes first, whatever went wrong here
        print(f"farcli: nothing will be recorded: {type(error).__name__}: {error}", file=sys.stderr)


def _optimizers(module):
    from farcli.recording import injected

    injected.install(module, _companions)


def _companions():
    from farcli.integrations.script import Leap  # not before torch is all there

    return Leap


def _distributed(module):
    from farcli.recording import injected

    injected.watch_process_group(module)


def _root():
    from farcli.recording import injected

    injected.watch_root()


def _begin():
    sys.meta_path.insert(
        0, _Waiting({"torch.optim.optimizer": _optimizers, "torch.distributed.distributed_c10d": _distributed})
    )
    if f'"root": {os.getpid()},' in os.environ["FARCLI_RECORD"]:
        _attempt(_root)


def _run_hidden():
    """Run the sitecustomize that Python would have found without us."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != _HERE]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("FARCLI_RECORD"):
    _begin()
_run_hidden()
