"""Builds the CUDA library for every architecture, loads it and reads the compiler's resource report; needs no GPU.

It is setup.py's build, in build/ninja-cuda, with whatever torch is installed: `make wheel` compiles nothing again.
Where torch has no CUDA, an empty library stands for the one of torch's that is missing.

A warning of nvcc fails it, and so does a kernel that spills registers or keeps anything in a stack frame: its speed
would depend on memory that nobody asked for. The table has a line for each kernel and a column for each architecture:

    registers of a thread, then ! and what is wrong

For compute capability 9.0 it also counts the machine instructions of the plain kernels (instructions.py), and fails
where they are above the limits or above what was recorded (limits.py).

    make cuda-check
    TORCH_CUDA_ARCH_LIST="9.0" make cuda-check        for one architecture: quicker, while something is tried
    python tests/gpu/cuda_check.py --record           writes the counts to instructions.csv
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import instructions
import limits
from resources import Usage, complaint, demangle, parse

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from build_support.cuda_toolkit import find_nvcc  # noqa: E402

BUILD = ROOT / "build" / "ninja-cuda"  # BUILD of build_support/libraries.py


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


def report(source: Path) -> tuple[dict[str, dict[str, Usage]], list[str]]:
    """Prints what the compiler says of a source's kernels; returns it by their mangled names, and what is wrong."""
    log = (BUILD / "cuda" / f"{source.stem}.o.log").read_text()
    kernels = parse(log)
    if not kernels or log.count("Compiling entry function") != sum(map(len, kernels.values())):
        return {}, [f"the compiler's report of {source.name} can't be read"]
    wrong, bad = [], 0
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
    if bad:
        wrong.append(f"{bad} kernels of {source.name} spill or have a stack frame")
    return kernels, wrong


def check_instructions(reports: dict[Path, dict[str, dict[str, Usage]]], nvcc: str, records: bool) -> list[str]:
    """Counts the instructions of the kernels that limits.py names; what is wrong with them."""
    cuobjdump = instructions.find_cuobjdump(nvcc)
    if cuobjdump is None:
        return ["no cuobjdump, which counts instructions: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"]
    codes, usages = {}, {}
    for source, kernels in reports.items():
        with_code = [mangled for mangled in kernels if limits.ARCH in kernels[mangled]]
        names = dict(zip(with_code, demangle(with_code), strict=True))
        wanted = [mangled for mangled in with_code if limits.has_limit(names[mangled])]
        if not wanted:
            continue
        text = instructions.disassemble(cuobjdump, BUILD / "cuda" / f"{source.stem}.o", limits.ARCH, wanted)
        for mangled, code in instructions.parse(text).items():
            codes[names[mangled]], usages[names[mangled]] = code, kernels[mangled][limits.ARCH]
    costs, wrong = limits.check(codes, usages, None if records else limits.read_record())
    print(f"\nmachine instructions for sm_{limits.ARCH}:\n\n{limits.markdown(costs)}")
    if records:
        limits.write_record(costs)
        print(f"\ncuda-check: recorded in {limits.RECORD.name}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-without-nvcc", action="store_true", help="no failure where there is no nvcc")
    parser.add_argument("--record", action="store_true", help="write the counts of instructions to instructions.csv")
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

    reports = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        reports[source], complaints = report(source)
        wrong += complaints
    if any(limits.ARCH in usages for kernels in reports.values() for usages in kernels.values()):
        wrong += check_instructions(reports, nvcc, arguments.record)
    else:
        print(f"\ncuda-check: nothing was compiled for sm_{limits.ARCH}, so no instructions were counted")
    print(f"\ncuda-check: {nvcc}, {len(reports)} sources, {seconds:.0f} s")
    for sentence in wrong:
        print(f"cuda-check: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
