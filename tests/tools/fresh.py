"""Runs a function of a test file in a Python process of its own, and forks there.

A forked process has none of the threads of the one it came from. pytest's may have had any number of them, also
autograd's, without which torch refuses a backward; and a forked pytest whose test fails goes on with all other tests.
"""

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import forked

import softmax_ext

PLACES = [Path(softmax_ext.__file__).parents[1], Path(__file__).parent]


def run(function: Callable[..., None], *arguments: object) -> None:
    """Calls the function of a test file there; what it raises fails the test. The arguments are given by their repr."""
    name, file = function.__name__, Path(inspect.getfile(function))
    output(f"from {file.stem} import {name}\n{name}(*{arguments!r})", file.parent)


def output(program: str, *places: Path) -> str:
    """What a program prints there; it finds modules in ``places`` too."""
    path = os.pathsep.join(map(str, [*PLACES, *places]))
    # autograd starts a thread for each GPU that it sees, before any fork.
    done = forked.python("-c", program, path=path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fork(function: Callable[..., None], *arguments: object) -> int:
    """Starts the function in a forked process, which ends with it whatever it does; for `wait`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(child: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the forked process ended with status {status}"
