"""The program: its subcommands, and the one boundary where errors become a line and an exit code."""

import errno
import os
import sys
import traceback
from typing import Annotated

import typer

import farcli
from farcli.cli import (
    diff,
    env,
    evaluate,
    export,
    fit,
    forecast,
    inspect,
    leap,
    methods,
    pack,
    plot,
    record,
    verify,
    workloads,
)
from farcli.cli.options import subcommand
from farcli.cli.signals import Terminated, unwind_on_signals
from farcli.errors import FarcliError

_EPILOG = "Exit codes: 0 done, 1 error, 2 usage, 3 store, 4 non-finite, 5 check failed, 6 memory or disk, 75 requeue."

app = typer.Typer(
    name="farcli",
    help="Record how a network's weights move during training, forecast where they go, "
    "and count honestly what a forecast is worth.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"farcli {farcli.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _name, _module, _panel in (
    ("record", record.record, "Trajectories"),
    ("fit", fit.fit, "Forecasts"),
    ("forecast", forecast.forecast, "Forecasts"),
    ("eval", evaluate.evaluate, "Forecasts"),
    ("leap", leap.leap, "Forecasts"),
    ("plot", plot.plot, "Forecasts"),
    ("inspect", inspect.inspect, "Trajectories"),
    ("export", export.export, "Trajectories"),
    ("pack", pack.pack, "Trajectories"),
    ("verify", verify.verify, "Trajectories"),
    ("diff", diff.diff, "Trajectories"),
    ("methods", methods.methods, "Listings"),
    ("workloads", workloads.workloads, "Listings"),
    ("env", env.env, "Listings"),
):
    _parser = record.RecordCommand if _name in ("record", "leap") else None
    app.command(_name, cls=_parser, rich_help_panel=_panel)(subcommand(_name, _module))


def main() -> None:
    """Run the command line and exit."""
    unwind_on_signals()
    try:
        code = app(standalone_mode=False, prog_name="farcli")
        sys.stdout.flush()
    except Terminated as signal:
        code = 128 + signal.number
        print("farcli: stopped by a signal; nothing half-written was left.", file=sys.stderr)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
        print("farcli: interrupted.", file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output has gone: silence, and no second complaint when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:  # the one boundary: whatever it is becomes one line and an exit code
        if _verbose():
            traceback.print_exception(error)
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


def _verbose() -> bool:
    """Whether -vv was given, in any spelling; the parser may have failed before it knew."""
    words = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    short = sum(len(word) - 1 for word in words if word.startswith("-v") and set(word[1:]) == {"v"})
    return short + words.count("--verbose") >= 2


def _explain(error: Exception) -> int:
    """Say in one line what went wrong; returns the exit code."""
    if isinstance(error, FarcliError):
        return _report(str(error), error.hint, error.exit_code)
    message = getattr(error, "format_message", None)
    if callable(message):  # a usage error of the option parser, whose class moves between versions of typer
        text = str(message())
        return _report(text, _usage_hint(error), 2) if text.strip() else 2  # empty: the help was printed
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return _report("out of memory.", "Give a smaller --memory, fewer runs or steps, or a smaller network.", 6)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _report("no space left where the output goes.", "Free some space and run the command again.", 6)
    hint = "This is a bug in farcli. Run again with -vv for details."
    return _report(f"{type(error).__name__}: {error}", hint, 1)


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"See `{context.command_path if context else 'farcli'} --help`."


def _report(text: str, hint: str | None, code: int) -> int:
    print(f"farcli: error: {' '.join(text.split())}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
