"""Builds the CUDA library for every architecture, loads it and reads the compiler's resource report; needs no GPU.

It is setup.py's build, in build/ninja-cuda, with whatever torch is installed: `make wheel` compiles nothing again.
Where torch has no CUDA, an empty library stands for the one of torch's that is missing.

A warning of nvcc fails it, and so does a kernel that spills registers or keeps anything in a stack frame: its speed
would depend on memory that nobody asked for. The table has a line for each kernel and a column for each architecture:

    registers of a thread, then ! and what is wrong

    make cuda-check
    TORCH_CUDA_ARCH_LIST="9.0" make cuda-check        for one architecture: quicker, while something is tried
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from build_support.cuda_toolkit import find_nvcc  # noqa: E402

BUILD = ROOT / "build" / "ninja-cuda"  # BUILD of build_support/libraries.py

# Kernels that may spill up to so many bytes, or have such a stack frame: a regular expression of the name, the bytes,
# and the reason.
ALLOWED = [
    (
        r"^two_pass_rows<CrossEntropyOp<\w+, double,",
        100,
        "arithmetic in double has long subroutines, and is not there for its speed",
    ),
]


class Usage(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    registers: int
    stack: int
    spills: int  # bytes stored or loaded


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    answer = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short(name) for name in answer.stdout.splitlines()]


def short(name: str) -> str:
    """Without namespaces, the return type and the parameters."""
    name = re.sub(r"\b(softmax_ext|cuda|\w+_cu)::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def parse(log: str) -> dict[str, dict[str, Usage]]:
    """The report of ``ptxas -v``: for each kernel and architecture a line of its stack, and one of its registers."""
    usages: dict[str, dict[str, Usage]] = defaultdict(dict)
    name, arch, stack, spills = "", "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, arch, stack, spills = match[1], match[2], 0, 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            usages[name][arch] = Usage(int(match[1]), stack, spills)
            name = ""
    return usages


def complaint(name: str, usage: Usage) -> str:
    if max(usage.spills, usage.stack) <= max([size for pattern, size, _ in ALLOWED if re.search(pattern, name)] or [0]):
        return ""
    if usage.spills:
        return f"spills {usage.spills} B"
    return f"stack {usage.stack} B" if usage.stack else ""


def build_library(folder: str) -> Path | None:
    """Builds the library into that folder, what is up to date left as it is; None if that fails."""
    environment = {**os.environ, "FORCE_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        return None
    return Path(folder, "softmax_ext", "libsoftmax_ext_cuda.so")


def load(library: Path) -> str | None:
    """What is wrong with the library, in a sentence."""
    import torch

    if torch.version.cuda is None:
        ctypes.CDLL(str(BUILD / "libtorch_cuda.so"))  # the one that it was linked with
    try:
        ctypes.CDLL(str(library)).softmax_ext_cuda_architectures  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"the library does not load: {error}"
    print(f"cuda-check: the library is built, linked and loaded, {library.stat().st_size / 1e6:.1f} MB")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        library = build_library(folder)
        if library is None:
            print("cuda-check: the build failed; the messages are above", file=sys.stderr)
            return 1
        seconds = time.monotonic() - begin
        wrong = [sentence for sentence in [load(library)] if sentence]

    bad = 0
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for source in sources:
        log = (BUILD / "cuda" / f"{source.stem}.o.log").read_text()
        kernels = parse(log)
        if not kernels or log.count("Compiling entry function") != sum(map(len, kernels.values())):
            wrong.append(f"the compiler's report of {source.name} can't be read")
            continue
        if re.search(r"\bwarning\b", log):
            wrong.append(f"the compiler warns of {source.name}; the text is in {BUILD.name}/cuda/{source.stem}.o.log")
        architectures = list(dict.fromkeys(arch for usages in kernels.values() for arch in usages))
        print(f"\n{source.name}: {len(kernels)} kernels; registers of a thread")
        print("  " + "".join(f"{'sm_' + arch:>8}" for arch in architectures))
        names = dict(zip(kernels, demangle(list(kernels)), strict=True))
        for mangled, usages in sorted(kernels.items(), key=lambda item: names[item[0]]):
            complaints = {arch: text for arch, usage in usages.items() if (text := complaint(names[mangled], usage))}
            bad += bool(complaints)
            cells = [
                f"{usages[arch].registers}{'!' if arch in complaints else ''}" if arch in usages else "-"
                for arch in architectures
            ]
            print("  " + "".join(f"{cell:>8}" for cell in cells) + "  " + names[mangled])
            for arch, text in complaints.items():
                print(f"      ! sm_{arch}: {text}")
    print(f"\ncuda-check: {nvcc}, {len(sources)} sources, {seconds:.0f} s")
    if bad:
        wrong.append(f"{bad} kernels spill or have a stack frame")
    for sentence in wrong:
        print(f"cuda-check: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
