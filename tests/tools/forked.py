"""Runs programs as `python` would, in processes that have torch already: its import takes two seconds, a fork none.

Each is forked from a server, which has imported torch, and neither softmax_ext nor pytest; nor does this file.
multiprocessing starts the server at the first call, and ends it with pytest.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "sympy"])  # which torch.testing imports at the first comparison


def python(*arguments: str, path: str, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As ``python -W ignore -c PROGRAM ...`` or ``-m MODULE`` with PYTHONPATH=path, away from the source tree."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        process = _context.Process(target=_run, args=(arguments, path, env, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        stdout, stderr = (Path(output).read_text() for output in outputs)
    return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _run(arguments: tuple[str, ...], path: str, env: dict[str, str], outputs: list[str]) -> None:
    """In the forked process. What is raised here multiprocessing prints, and ends with status 1."""
    for number, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    os.chdir("/")
    os.environ.clear()
    os.environ.update(env)
    # Without what pytest has put there.
    installed = [place for place in sys.path if place.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = ["", *path.split(os.pathsep), *installed]
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    option, what, *rest = arguments
    sys.orig_argv = [sys.executable, *arguments]
    sys.argv = [option, *rest]
    if option == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
