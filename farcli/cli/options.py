"""Options that several subcommands share, spelled once; and the command class with --config and --show-config."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from farcli.cli.output import Format
from farcli.errors import UsageError

Output = Annotated[Path, typer.Option("-o", "--output", help="Where to write; must not exist yet.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output, atomically.")]
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
    list[str] | None, typer.Option("--to", help="Steps to forecast: 600, 200,400,600, A:B:C or all; repeatable.")
]
From = Annotated[int | None, typer.Option("--from", help="Step of the last observed snapshot.")]
Partial = Annotated[bool, typer.Option("--partial", help="Accept a store whose recording has not finished.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="More detail; -vv shows tracebacks.")]


def steps_text(texts: list[str] | None) -> str | None:
    """Join repeated --to options into one selection."""
    if not texts:
        return None
    if len(texts) > 1 and any(":" in text or text == "all" for text in texts):
        raise UsageError(f"--to {' --to '.join(texts)}: give one slice, or several plain steps.")
    return ",".join(texts)


class Command(TyperCommand):
    """A subcommand that also takes --config FILE.toml (its own table) and --show-config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            TyperOption(
                param_decls=["--config"],
                type=str,
                expose_value=False,
                is_eager=True,
                callback=_read_config,
                help="TOML file with a table per subcommand; flags and FARCLI_* variables win over it.",
            ),
            TyperOption(
                param_decls=["--show-config"],
                is_flag=True,
                type=bool,
                default=False,
                expose_value=False,
                callback=_keep_flag,
                help="Print the merged options as JSON and stop.",
            ),
        ]

    def invoke(self, ctx: Any) -> Any:
        """Run the command, or print its options."""
        if ctx.meta.get("farcli.show_config"):
            print(json.dumps({self.name: ctx.params}, default=str))
            return None
        return super().invoke(ctx)


def _keep_flag(ctx: Any, _param: Any, value: bool) -> None:
    ctx.meta["farcli.show_config"] = bool(value)


def _read_config(ctx: Any, _param: Any, value: str | None) -> None:
    if not value:
        return
    try:
        tables = tomllib.loads(Path(value).read_text())
    except OSError as error:
        raise UsageError(f"{value}: cannot be read ({error.strerror}).") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{value}: not valid TOML ({error}).") from error
    table = tables.get(ctx.info_name, {})
    names = {param.name for param in ctx.command.params} | {"set"}
    for key in table:
        if key.replace("-", "_") not in names:
            raise UsageError(f"{value}: [{ctx.info_name}] has no option {key!r}.")
    defaults = {("settings" if key == "set" else key.replace("-", "_")): item for key, item in table.items()}
    if isinstance(defaults.get("settings"), dict):
        defaults["settings"] = [f"{key}={item}" for key, item in defaults["settings"].items()]
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
