"""`farcli workloads`."""

from farcli.cli.options import FormatOption


def workloads(format: FormatOption = "auto") -> None:
    """List the training runs that can be recorded by name, each with its options."""
    from farcli.cli.methods import print_options
    from farcli.cli.output import Column, chosen_format, emit
    from farcli.verbs.listings import workloads as listed

    rows = listed()
    columns = [
        *(Column(key=key, heading=key) for key in ("workload", "steps", "every", "needs")),
        Column(key="summary", heading="summary", wrap=True),
    ]
    emit(rows, columns, form=format)
    if chosen_format(format) == "table":
        print_options([(row["workload"], row["options"]) for row in rows])
