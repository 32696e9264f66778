"""Compiles every CUDA source for every architecture and reads the compiler's resource report; needs no GPU.

Then builds the library that torch loads, for one architecture, against whatever torch is installed. With a torch
without CUDA it can be linked, not loaded: the stream is asked of a library that only the others have.

A warning fails it, and so does a kernel that spills registers or keeps anything in a stack frame: its speed would
depend on memory that nobody asked for. The table has a line for each kernel and a column for each architecture:

    registers of a thread, then ! and what is wrong

    make cuda-check
    python tests/cuda_check.py [--arch 80 90] [--source cross_entropy.cu] [--jobs 2]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda_check"
ARCHITECTURES = ["75", "80", "86", "89", "90", "100", "120"]  # the last one as PTX too

FLAGS = [
    *("-std=c++17", "-O3", "-Icsrc", '-DSOFTMAX_EXT_CUDA_ARCHITECTURES="checked"'),
    *("-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror,-fPIC"),
    *("-Xptxas", "-v"),  # spills and stack frames stand in the report: no warning, so that all are seen at once
]

# Kernels that may spill up to so many bytes, or have such a stack frame: a regular expression of the name, the bytes,
# and the reason.
ALLOWED = [
    (
        r"^stream_rows<CrossEntropyOp<\w+, double,",
        100,
        "arithmetic in double has long subroutines, and is not there for its speed",
    ),
]


class Usage(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    registers: int
    stack: int
    spills: int  # bytes stored or loaded
    shared: int  # static


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and shutil.which(f"{home}/bin/nvcc"):
            return f"{home}/bin/nvcc"
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    answer = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short(name) for name in answer.stdout.splitlines()]


def short(name: str) -> str:
    """Without namespaces, the return type and the parameters."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"\b(softmax_ext|cuda)::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def parse(log: str) -> dict[str, Usage]:
    """The report of ``ptxas -v``: for each kernel a line of its stack frame and one of its registers."""
    usages = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name, stack, spills = match[1], 0, 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            usages[name] = Usage(int(match[1]), stack, spills, int(shared[1]) if shared else 0)
            name = ""
    return usages


def compile_all(nvcc: str, sources: list[Path], architectures: list[str], jobs: int | None) -> bool:
    """Writes an object and a log for each source and architecture. True if all compile."""
    from ninja.ninja_syntax import Writer, escape

    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "build.ninja").open("w") as file:
        ninja = Writer(file)
        ninja.variable("builddir", escape(str(BUILD)))
        flags = " ".join(f"'{flag}'" for flag in FLAGS)
        # The report goes to a file beside the object; the rest of what nvcc says is shown where it fails.
        ninja.rule(
            "nvcc",
            f"'{nvcc}' {flags} $gencode -MD -MF $out.d -c $in -o $out > $out.log 2>&1 "
            "|| (grep -v -e 'ptxas info' -e 'bytes stack frame' $out.log; exit 1)",
            description="nvcc $in for $arch",
            depfile="$out.d",
            deps="gcc",
        )
        for source in sources:
            for arch in architectures:
                gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
                if arch == architectures[-1]:
                    gencode += f" -gencode=arch=compute_{arch},code=compute_{arch}"
                output = escape(str(BUILD / f"{source.stem}.sm_{arch}.o"))
                variables = {"gencode": gencode, "arch": f"sm_{arch}"}
                ninja.build(output, "nvcc", escape(str(source.relative_to(ROOT))), variables=variables)
    command = [sys.executable, "-m", "ninja", "-f", str(BUILD / "build.ninja"), "-k", "0"]
    command += ["-j", str(jobs)] if jobs else []
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def complaint(name: str, usage: Usage) -> str:
    if max(usage.spills, usage.stack) <= max([size for pattern, size, _ in ALLOWED if re.search(pattern, name)] or [0]):
        return ""
    if usage.spills:
        return f"spills {usage.spills} B"
    return f"stack {usage.stack} B" if usage.stack else ""


def check_library() -> str | None:
    """Builds the library by setup.py and loads it. What is wrong with it, in a sentence."""
    import torch

    target = BUILD / "library"
    shutil.rmtree(target, ignore_errors=True)
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        return f"the library does not build:\n{done.stdout}"
    (library,) = target.glob("softmax_ext/_cuda*.so")
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        if torch.version.cuda is None and "aoti_torch_get_current_cuda_stream" in str(error):
            print(
                f"cuda-check: the library is built and linked; torch {torch.__version__}, without CUDA, can't load it"
            )
            return None
        return f"the library does not load: {error}"
    if torch.version.cuda is None:
        return f"the library loads with torch {torch.__version__}, which has no CUDA"
    print("cuda-check: the library is built, linked and loaded")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="such as 80 90; default: all")
    parser.add_argument("--source", nargs="+", help="names in csrc/cuda; default: all")
    parser.add_argument(
        "--jobs", type=int, default=int(os.environ.get("MAX_JOBS", 0)) or None, help="compilers at once"
    )
    parser.add_argument("--skip-without-nvcc", action="store_true", help="no failure where there is no nvcc")
    arguments = parser.parse_args()

    nvcc = find_nvcc()
    if nvcc is None:
        place = "nvcc not found in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        if arguments.skip_without_nvcc:
            print(f"cuda-check: {place}: the CUDA kernels were not checked")
            return 0
        print(f"cuda-check: {place}: install the CUDA toolkit or set CUDA_HOME", file=sys.stderr)
        return 1

    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if arguments.source:
        sources = [source for source in sources if source.name in arguments.source]
    if not sources:
        print("cuda-check: no such source in csrc/cuda", file=sys.stderr)
        return 1

    begin = time.monotonic()
    if not compile_all(nvcc, sources, arguments.arch, arguments.jobs):
        print("cuda-check: nvcc failed; the messages are above", file=sys.stderr)
        return 1
    seconds = time.monotonic() - begin

    wrong = 0
    for source in sources:
        kernels: dict[str, dict[str, Usage]] = defaultdict(dict)
        for arch in arguments.arch:
            for name, usage in parse((BUILD / f"{source.stem}.sm_{arch}.o.log").read_text()).items():
                kernels[name][arch] = usage
        if not kernels:
            print(f"cuda-check: the compiler's report of {source.name} names no kernel", file=sys.stderr)
            return 1
        print(f"\n{source.name}: {len(kernels)} kernels; registers of a thread")
        print("  " + "".join(f"{'sm_' + arch:>8}" for arch in arguments.arch))
        names = dict(zip(kernels, demangle(list(kernels)), strict=True))
        for mangled, usages in sorted(kernels.items(), key=lambda item: names[item[0]]):
            complaints = {arch: text for arch, usage in usages.items() if (text := complaint(names[mangled], usage))}
            wrong += bool(complaints)
            cells = [
                f"{usages[arch].registers}{'!' if arch in complaints else ''}" if arch in usages else "-"
                for arch in arguments.arch
            ]
            print("  " + "".join(f"{cell:>8}" for cell in cells) + "  " + names[mangled])
            for arch, text in complaints.items():
                print(f"      ! sm_{arch}: {text}")
    print(f"\ncuda-check: {nvcc}, {len(sources)} sources, {len(arguments.arch)} architectures, {seconds:.0f} s")
    if wrong:
        print(f"cuda-check: {wrong} kernels spill or have a stack frame", file=sys.stderr)
    whole = arguments.source is None and arguments.arch == ARCHITECTURES
    complaint_of_library = check_library() if whole else None
    if complaint_of_library:
        print(f"cuda-check: {complaint_of_library}", file=sys.stderr)
    return 1 if wrong or complaint_of_library else 0


if __name__ == "__main__":
    raise SystemExit(main())
