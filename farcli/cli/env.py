"""`farcli env`."""

from farcli.cli.options import FormatOption


def env(format: FormatOption = "auto") -> None:
    """Print versions and the machine, for bug reports and logs."""
    import os
    import platform

    from farcli.cli.output import emit_pairs
    from farcli.provenance import versions

    emit_pairs({**versions(), "platform": platform.platform(), "cores": os.cpu_count()}, form=format)
