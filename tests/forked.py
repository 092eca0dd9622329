"""A process that has the large packages imported, and becomes the program once for each command: a fork each.

Importing torch, what its optimisers need, and zarr takes seconds, and hundreds of tests run a command. Each is a
process of its own here too, from the import of farcli's own modules to its exit code; only what is beneath is there.
"""

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_PACKAGES = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "zarr",
    "safetensors.torch",
    "typer",
    "rich",
)


class Forked:
    """The process, started when it is first needed; it ends with ours.

    Args:
        program: what `sys.argv[0]` says.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._process: subprocess.Popen[str] | None = None

    def run(self, words: Sequence[str], cwd: Path, env: Mapping[str, str]) -> tuple[int, str, str]:
        """Run a command: its exit code as `subprocess` has it, stdout and stderr."""
        if self._process is None:
            command = [sys.executable, "-P", __file__, self._program]
            self._process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            atexit.register(self._process.communicate)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            try:
                print(json.dumps([words, str(cwd), dict(env), str(out), str(err)]), file=process.stdin)
                code = int(process.stdout.readline())
            except BaseException:  # a test's time is up: the next one is not to read this one's answer
                process.kill()
                self._process = None
                raise
            return code, out.read_text(), err.read_text()


def _serve() -> None:
    for package in _PACKAGES:
        importlib.import_module(package)
    gc.collect()
    gc.freeze()  # so that collections do not copy what is shared
    assert len(os.listdir("/proc/self/task")) == 1, "only a process of one thread may fork"
    for line in iter(sys.stdin.readline, ""):
        words, cwd, env, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(words, cwd, env, out, err)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    for number, path, how in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        os.dup2(os.open(path, how | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[1:] = words
    from farcli.cli.main import main

    main()


if __name__ == "__main__":
    sys.argv[:] = sys.argv[1:]
    _serve()
