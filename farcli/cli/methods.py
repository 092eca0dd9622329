"""`farcli methods`."""

from typing import Annotated

import typer

from farcli.cli.options import FormatOption


def methods(
    leaps: Annotated[bool, typer.Option("--leaps", help="The predictors of `farcli leap` while training.")] = False,
    format: FormatOption = "auto",
) -> None:
    """List the forecasters there are, or the predictors of leaps, each with its options."""
    from farcli.cli.output import Column, chosen_format, emit
    from farcli.verbs.listings import methods as listed
    from farcli.verbs.listings import predictors

    if leaps:
        rows = predictors()
        columns = [
            Column(key="predictor", heading="predictor"),
            Column(key="context", heading="points"),
            Column(key="reference", heading="reference", wrap=True),
        ]
        emit(rows, columns, form=format)
        if chosen_format(format) == "table":
            print_options([(row["predictor"], row["options"]) for row in rows], flag="--option")
        return
    rows = listed()
    columns = [
        Column(key="method", heading="method"),
        Column(key="needs_fit", heading="needs fit"),
        Column(key="min_context", heading="least context"),
        Column(key="reference", heading="reference", wrap=True),
    ]
    emit(rows, columns, form=format)
    if chosen_format(format) == "table":
        print_options([(row["method"], row["options"]) for row in rows])


def print_options(entries: list[tuple[str, list[dict]]], flag: str = "--set") -> None:
    """The options of methods or workloads, as a table of its own."""
    from farcli.cli.output import Column, emit

    rows = [{"of": name, **option} for name, options in entries for option in options]
    columns = [
        Column(key="of", heading=f"{flag} for"),
        Column(key="name", heading="key"),
        Column(key="type", heading="value", wrap=True),
        Column(key="default", heading="default"),
        Column(key="help", heading="meaning", wrap=True),
    ]
    emit(rows, columns, form="table")
