"""What a build needs of the machine: this system, torch, ninja, setuptools, a C++ compiler."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import NoReturn

# The least version of each. setuptools 77 is the first that reads pyproject.toml's license.
BUILD_TOOLS = {"torch": (2, 10), "ninja": (1, 11), "setuptools": (77, 0)}


def stop(message: str) -> NoReturn:
    raise SystemExit(f"softmax_ext: {message}")


def is_set(variable: str) -> bool:
    """Whether an environment variable is there, and neither empty nor 0."""
    return os.environ.get(variable, "") not in ("", "0")


def check_build_tools() -> None:
    """Stops with the command to type if something that the build needs is missing or too old."""
    if sys.platform != "linux":
        stop(f"builds on Linux only (x86-64 and ARM); this is {sys.platform}.")
    wrong = []
    for name, least in BUILD_TOOLS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < least:
            wrong.append(f"{name} {found} is too old")
    if not wrong:
        return
    tools = " ".join(f"'{name}>={major}.{minor}'" for name, (major, minor) in BUILD_TOOLS.items())
    stop(
        f"cannot build, since {', '.join(wrong)} in the environment that this build sees; type "
        f"pip install {tools}, then pip install --no-build-isolation . (without --no-build-isolation "
        "pip builds in an empty environment, which has no torch)."
    )


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler's command, and what it calls itself."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(command[0]):
        stop(
            f"no C++ compiler: {command[0]!r} is not on PATH. "
            "Install g++ or clang++, or name the one you have: CXX=g++-12."
        )
    answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    return command, answer.stdout.splitlines()[0]
