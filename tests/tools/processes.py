"""Python processes with the package as it is, or with a copy of it in which something is broken."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked

import softmax_ext

PACKAGE = Path(softmax_ext.__file__).parent
COMMAND = "pip install --no-build-isolation"


def python(*arguments: str, path: Path | str = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with the package from ``path``, away from the source tree. torch is in the process already."""
    return forked.python(*arguments, path=str(path), env=_environment() | environment, timeout=120)


def started(*arguments: str, path: Path | str = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same from the start of the interpreter on, as users have it."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=_environment() | {"PYTHONPATH": str(path), **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("SOFTMAX_EXT_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY")}


def report(result: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The lines of ``name   value``."""
    return dict(
        re.split(r" {2,}", line, maxsplit=1) for line in result.stdout.splitlines() if re.search(r"\S {2,}\S", line)
    )


def copy_of_the_package(where: Path) -> Path:
    shutil.copytree(PACKAGE, where / "softmax_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return where


def the_library(where: Path, device: str = "cpu") -> Path:
    return where / "softmax_ext" / f"libsoftmax_ext_{device}.so"


# What is said where torch has CUDA and the library is missing, unreadable, or another's.
REFUSED = """
import sys, torch
torch.version.cuda = torch.version.cuda or "13.0"
import softmax_ext
from softmax_ext import cuda
assert cuda.library is None
x = torch.randn(2, 3)
torch.testing.assert_close(softmax_ext.softmax(x, 1), x.softmax(1))
key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.softmax_ext.softmax.default.redispatch(key, x, 1, False, None)
except NotImplementedError as error:
    print(error)
"""
