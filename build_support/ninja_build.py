"""Compiles and links a list of units with ninja, which does again what changed (headers included) and nothing else.

Neither setuptools nor torch.utils.cpp_extension can: their flags are those of a whole extension, and here the kernels
are compiled once for each instruction set.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from build_support.tools import stop


class Unit(NamedTuple):
    """One run of a compiler."""

    source: str
    object: str
    flags: list[str]
    rule: str = "compile"


class Library(NamedTuple):
    """What is linked from the units, and how."""

    units: list[Unit]
    link: list[str]
    jobs: int | None = None  # compilers at once; None: ninja's choice
    threads: int = 1  # architectures that one nvcc compiles for beside each other


def write_ninja(path: Path, compilers: dict[str, list[str]], library: Library, output: str) -> None:
    from ninja.ninja_syntax import Writer, escape

    def quoted(words: list[str]) -> str:
        return escape(shlex.join(words))

    with path.open("w") as file:
        ninja = Writer(file)
        ninja.variable("builddir", str(path.parent))
        ninja.pool("nvcc", max(1, (library.jobs or 1) // library.threads))
        # -MD, with the system headers: a new torch in the same place rebuilds what includes it. What
        # nvcc says of each kernel stays in a file; the rest is shown.
        report = "> $out.log 2>&1; status=$$?; grep -v -e 'ptxas info' -e 'bytes stack frame' $out.log; exit $$status"
        for rule, command in compilers.items():
            ninja.rule(
                rule,
                f"{quoted(command)} -MD -MF $out.d $flags -c $in -o $out {report if rule == 'nvcc' else ''}",
                description=f"{rule} $out",
                depfile="$out.d",
                deps="gcc",
                pool="nvcc" if rule == "nvcc" else None,
            )
        ninja.rule("link", f"{quoted(compilers['compile'])} $in $flags -o $out", description="link $out")
        for unit in library.units:
            ninja.build(unit.object, unit.rule, unit.source, variables={"flags": quoted(unit.flags)})
        objects = [unit.object for unit in library.units]
        ninja.build(output, "link", objects, variables={"flags": quoted(library.link)})


def run_ninja(path: Path, library: Library) -> None:
    ninja = [sys.executable, "-m", "ninja", "-f", str(path)]
    most = os.environ.get("MAX_JOBS") or library.jobs
    # By the environment, so that another number compiles nothing again.
    threads = f"--threads={library.threads} {os.environ.get('NVCC_APPEND_FLAGS', '')}"
    environment = {**os.environ, "NVCC_APPEND_FLAGS": threads}
    try:
        subprocess.run([*ninja, *(["-j", str(most)] if most else [])], check=True, env=environment)
        subprocess.run([*ninja, "-t", "cleandead"], check=True, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        stop("the build failed; the first error above says where.")
