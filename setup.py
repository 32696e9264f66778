"""Builds the extension module softmax_ext._C: which sources, with which flags, for which ISAs.

pyproject.toml holds the metadata; this file only compiles. It writes build/ninja/build.ninja and
runs ninja, which rebuilds what changed (headers included) and nothing else. One library runs on
every CPU of its architecture:

    csrc/module.cpp          once             the Python module; sees pybind11, no torch header
    csrc/ops/*.cpp           once             the operators, in torch's stable ABI
    csrc/cpu/*_kernel.cpp    once per ISA     the SIMD kernels, over the headers of at::vec
    csrc/cpu/*.cpp           once             the rest: picks among the ISAs at run time

Environment: CXX, CXXFLAGS, LDFLAGS, and MAX_JOBS (how many compilers run at once).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/ninja")

# What a build needs, and the least version of each.
# setuptools 77 is the first that reads pyproject.toml's license.
BUILD_TOOLS = {"torch": (2, 10), "ninja": (1, 11), "pybind11": (2, 13), "setuptools": (77, 0)}

# The torch whose stable ABI the operators are compiled for: one build serves it and later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"

# What the kernels of an x86-64 build are compiled with, for each ISA. AVX512 here is what torch
# means by it: F, DQ, VL and BW together.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
X86_ISAS: dict[str, list[str]] = {"DEFAULT": [], "AVX2": AVX2, "AVX512": AVX512}
OTHER_ISAS: dict[str, list[str]] = {"DEFAULT": []}

# No -march=native, which would tie the library to this CPU; no -ffast-math, which would break
# logits of -inf.
COMMON_FLAGS = [
    *("-std=c++17", "-O3", "-Wall", "-Wextra"),
    *("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
]


class Unit(NamedTuple):
    """One run of the compiler."""

    source: str
    object: str
    flags: list[str]


def stop(message: str) -> NoReturn:
    raise SystemExit(f"softmax_ext: {message}")


def check_build_tools() -> None:
    """Stops with the command to type if something that the build needs is missing or too old."""
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
        f"cannot build: {', '.join(wrong)} in the environment that this build sees. Type\n\n"
        f"    pip install {tools}\n"
        f"    pip install --no-build-isolation .\n\n"
        "Without --no-build-isolation pip builds in an empty environment, without your torch."
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


def find_units(version: str, compiler: str) -> list[Unit]:
    """Every source in csrc with its flags, once for each ISA where it is a kernel."""
    import pybind11
    import torch

    python_headers = sysconfig.get_path("include")
    if not Path(python_headers, "Python.h").exists():
        stop(f"no Python.h in {python_headers}: install python3-dev (python3-devel).")

    isas = X86_ISAS if platform.machine() == "x86_64" else OTHER_ISAS
    common = [*COMMON_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-Icsrc"]
    with_isas = [f"-DSOFTMAX_EXT_WITH_{isa}" for isa in isas if isa != "DEFAULT"]
    torch_headers = [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *("-isystem", str(Path(torch.__file__).parent / "include")),
    ]
    module = [
        f'-DSOFTMAX_EXT_VERSION="{version}"',
        f'-DSOFTMAX_EXT_BUILT_TORCH="{torch.__version__}"',
        f'-DSOFTMAX_EXT_COMPILER="{compiler}"',
        *("-isystem", pybind11.get_include()),
        *("-isystem", python_headers),
    ]

    def unit(source: Path, *flags: str, isa: str = "") -> Unit:
        name = source.relative_to("csrc").with_suffix(f".{isa}.o" if isa else ".o")
        return Unit(str(source), str(BUILD / name), [*common, *flags])

    units = [unit(Path("csrc/module.cpp"), *with_isas, *module)]
    target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    for source in sorted([*Path("csrc/ops").glob("*.cpp"), *Path("csrc/ops/cpu").glob("*.cpp")]):
        units.append(unit(source, target, *torch_headers))
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        if not source.stem.endswith("_kernel"):
            units.append(unit(source, *with_isas))
            continue
        for isa, isa_flags in isas.items():
            # at::vec's own switch.
            capability = [f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}"]
            # GCC takes the operand that its AVX-512 intrinsics leave undefined on purpose for a
            # mistake (GCC bug 105593).
            quiet = isa == "AVX512" and "clang" not in compiler
            warnings = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"] if quiet else []
            units.append(unit(source, *torch_headers, *capability, *isa_flags, *warnings, isa=isa))

    print(f"softmax_ext {version}")
    print(f"  compiler   {compiler}")
    print(f"  torch      {torch.__version__}, headers in {torch_headers[-1]}")
    print(f"  ISAs       {' '.join(isas)}, chosen at run time")
    print(f"  sources    {' '.join(dict.fromkeys(u.source for u in units))}")
    print("  CUDA       not built: this version has no CUDA kernels", flush=True)
    return units


def link_flags() -> list[str]:
    """No rpath: torch is imported before the extension, so its library is in the process already.

    libstdc++ stands before libtorch_cpu, which exports copies of some of its functions.
    """
    import torch

    return [
        *shlex.split(os.environ.get("LDFLAGS", "")),
        *("-shared", "-Wl,--as-needed", "-lstdc++"),
        *(f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"),
    ]


def write_ninja(path: Path, command: list[str], units: list[Unit], library: str) -> None:
    from ninja.ninja_syntax import Writer, escape

    def quoted(words: list[str]) -> str:
        return escape(shlex.join(words))

    cxx = quoted(command)
    with path.open("w") as file:
        ninja = Writer(file)
        ninja.variable("builddir", str(BUILD))
        # -MD, with the system headers: a new torch in the same place rebuilds what includes it.
        ninja.rule(
            "compile",
            f"{cxx} -MD -MF $out.d $flags -c $in -o $out",
            description="compile $out",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", f"{cxx} $in $flags -o $out", description="link $out")
        for unit in units:
            flags = {"flags": quoted(unit.flags)}
            ninja.build(unit.object, "compile", unit.source, variables=flags)
        flags = {"flags": quoted(link_flags())}
        ninja.build(library, "link", [unit.object for unit in units], variables=flags)


class NinjaBuild(build_ext):
    """setuptools' build_ext, with ninja in the place of its own compiler calls."""

    def build_extension(self, ext: Extension) -> None:
        # Paths stay relative, so that no message in the library names a directory of this machine.
        os.chdir(ROOT)
        command, compiler = find_compiler()
        units = find_units(self.distribution.get_version(), compiler)
        library = BUILD / Path(self.get_ext_filename(ext.name)).name
        BUILD.mkdir(parents=True, exist_ok=True)
        write_ninja(BUILD / "build.ninja", command, units, str(library))

        ninja = [sys.executable, "-m", "ninja", "-f", str(BUILD / "build.ninja")]
        jobs = os.environ.get("MAX_JOBS")
        try:
            subprocess.run([*ninja, *(["-j", jobs] if jobs else [])], check=True)
            subprocess.run([*ninja, "-t", "cleandead"], check=True, stdout=subprocess.DEVNULL)
        except subprocess.CalledProcessError:
            stop("the build failed; the first error above says where.")

        installed = Path(self.get_ext_fullpath(ext.name))
        installed.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(installed))


if sys.platform != "linux":
    stop(f"builds on Linux only (x86-64 and ARM); this is {sys.platform}.")
check_build_tools()
# A CUDA library (csrc/cuda, compiled by nvcc) becomes the second Extension of this list.
setup(ext_modules=[Extension("softmax_ext._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
