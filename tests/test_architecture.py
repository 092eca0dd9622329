"""A convention that is not executed is a wish."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_point_down():
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_code_is_formatted_and_clean():
    ruff = Path(sys.executable).with_name("ruff")
    for words in (("format", "--check", "."), ("check", ".")):
        done = subprocess.run([ruff, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
