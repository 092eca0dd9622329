"""Options that several subcommands share, spelled once."""

import inspect
import json
import tomllib
from collections.abc import Callable
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.models import OptionInfo

from farcli.cli.output import Format
from farcli.errors import UsageError
from farcli.registry import unknown

Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write; must not exist yet.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output, atomically.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Do nothing where the output is there already and is what was asked for.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be made and its size; write nothing.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="table on a terminal, ndjson in a pipe, unless said otherwise.")
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress; writing commands print only the path.")]
Runs = Annotated[str | None, typer.Option("--runs", help="Runs to use: 8:12, 0,3,5 or all.")]
Memory = Annotated[str, typer.Option("--memory", help="Memory the data may take: 512M, 2G, 1Gi.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Option of the method or workload, key=value; repeatable.")
]
To = Annotated[
    list[str] | None,
    typer.Option("--to", help="Steps to forecast: 600, 200,400,600, START:STOP:STEP or all; repeatable."),
]
From = Annotated[int | None, typer.Option("--from", help="Step of the last observed snapshot.")]
Context = Annotated[
    int | None, typer.Option("--context", help="Snapshots of the observed prefix, for methods that were not fitted.")
]
Transfer = Annotated[bool, typer.Option("--transfer", help="Allow a map that was fitted on another network.")]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a store whose recording has not finished.")]


def complete_methods(incomplete: str) -> list[str]:
    """Names of methods, for the shell's completion."""
    from farcli.forecasters.table import FORECASTERS

    return [name for name in FORECASTERS if name.startswith(incomplete)]


def steps_text(texts: list[str] | None) -> str | None:
    """Join repeated --to options into one selection."""
    if not texts:
        return None
    if len(texts) > 1 and any(":" in text or text == "all" for text in texts):
        raise UsageError(f"--to {' --to '.join(texts)}: give one slice, or several plain steps.")
    return ",".join(texts)


def subcommand(name: str, run: Callable[..., None]) -> Callable[..., None]:
    """Add to a subcommand what every one takes: --config, --show-config, -v, and FARCLI_* variables."""

    @wraps(run)
    def wrapped(ctx: typer.Context, **given: Any) -> None:
        del given["config"], given["verbose"]  # read by their callback and by the program itself
        if given.pop("show_config"):
            called = {str(param.name): _long(param) for param in ctx.command.params}
            print(json.dumps({ctx.info_name: {called[key]: value for key, value in given.items()}}, default=str))
            return
        run(**given)

    signature = inspect.signature(run)
    shared = {"config": (_Config, None), "show_config": (_ShowConfig, False), "verbose": (_Verbose, 0)}
    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(_with_variables(name, parameter) for parameter in signature.parameters.values()),
        *(
            inspect.Parameter(word, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation)
            for word, (annotation, default) in shared.items()
        ),
    ]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _with_variables(command: str, parameter: inspect.Parameter) -> inspect.Parameter:
    """Let FARCLI_FIT_MEMORY, or FARCLI_MEMORY for all subcommands, stand for `fit --memory`."""
    plain, *extras = get_args(parameter.annotation) or (parameter.annotation,)
    for index, extra in enumerate(extras):
        if isinstance(extra, OptionInfo):
            # typer takes the first name for a default until it has seen the annotation
            names = [name for name in (extra.default, *(extra.param_decls or ())) if isinstance(name, str)]
            name = next(n for n in names if n.startswith("--")).removeprefix("--").replace("-", "_").upper()
            extras[index] = copy(extra)  # shared by several subcommands
            extras[index].envvar = [f"FARCLI_{command.upper()}_{name}", f"FARCLI_{name}"]
            extras[index].show_envvar = False
            return parameter.replace(annotation=Annotated[plain, extras[index]])
    return parameter


def _long(param: Any) -> str:
    """The name an option has on the command line and in a configuration file."""
    return next((opt.lstrip("-") for opt in param.opts if opt.startswith("--")), str(param.name))


def _read_config(ctx: typer.Context, value: str | None) -> str | None:
    """Make a file's table for this subcommand the defaults of its options."""
    if not value:
        return value
    try:
        tables = tomllib.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {value}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {value}: is not valid TOML ({error}).") from error
    names = {opt.lstrip("-"): param.name for param in ctx.command.params for opt in param.opts}
    commands = ctx.parent.command.commands if ctx.parent is not None else {}  # pyright: ignore[reportAttributeAccessIssue]
    for key, table in tables.items():
        if key not in commands:
            raise unknown(f"subcommand in {value}", key, commands)
        if not isinstance(table, dict):
            raise UsageError(f"{value}: {key} must be a table, [{key}], of options.")
    defaults: dict[str, Any] = {}
    for key, item in tables.get(str(ctx.info_name), {}).items():
        if key not in names:
            raise unknown(f"option of [{ctx.info_name}] in {value}", key, names)
        defaults[str(names[key])] = [f"{k}={v}" for k, v in item.items()] if isinstance(item, dict) else item
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


_Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        is_eager=True,
        envvar="FARCLI_CONFIG",
        show_envvar=False,
        callback=_read_config,
        metavar="FILE",
        help="TOML with a table per subcommand; flags and FARCLI_* variables win over it.",
    ),
]
_ShowConfig = Annotated[bool, typer.Option("--show-config", help="Print the merged options as JSON and stop.")]
_Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="More detail; -vv shows tracebacks.")]
