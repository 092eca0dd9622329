import subprocess
import sys

import pytest

from farcli.errors import UsageError
from farcli.registry import resolve


def test_names_and_paths_resolve():
    table = {"size": "farcli.config:parse_size"}
    assert resolve("thing", "size", table)("1k") == 1000
    assert resolve("thing", "farcli.config:parse_size", {})("1k") == 1000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("siez", "Did you mean 'size'"),
        ("no.such.module:x", "cannot import"),
        ("farcli.config:nothing", "has no 'nothing'"),
    ],
)
def test_unknown_names_are_said_plainly(name, message):
    with pytest.raises(UsageError, match=message):
        resolve("thing", name, {"size": "farcli.config:parse_size"})


def test_listing_methods_and_help_import_nothing_heavy():
    code = (
        "import sys, farcli.cli.main, farcli.forecasters.table, farcli.workloads.table;"
        "heavy = {'torch', 'zarr', 'numpy', 'numcodecs', 'rich', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
