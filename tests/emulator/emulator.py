"""Builds what runs CUDA kernels on the CPU, with the C++ compiler alone, in build/emulator/.

    selftest           the program of selftest.cu
    gpu_times          the program of benchmarks/gpu_times, with the kernels of csrc/cuda
    libemulated.so     the kernels of csrc/cuda and the operators of csrc/ops/cuda, unmodified, on CPU tensors: loaded
                       after softmax_ext it replaces the CPU kernels

Both come in two builds: plain, and sanitized by AddressSanitizer and UBSan. A process that loads the sanitized library
must have been started with ``sanitizer_environment()``.

    python tests/emulator/emulator.py [--sanitized]    builds the library and prints its path
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulator"

TORCH_TARGET_VERSION = "0x020a000000000000"  # as in build_support/libraries.py

ARCHITECTURES = '-DSOFTMAX_EXT_CUDA_ARCHITECTURES="emulated"'
FLAGS = [
    *("-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    "-Wno-maybe-uninitialized",  # of a thread's chunks that its row lacks, which are neither loaded nor used
    *("-fPIC", "-fvisibility=hidden", f"-I{HERE.relative_to(ROOT) / 'include'}"),
]
# Fused multiply-adds only where the source says so: what is rounded does not depend on the compiler. GCC 12 makes one
# aligned load of four single ones (load_values in chunks.cuh) that are no multiple of 16 bytes.
PLAIN = ["-O2", "-ffp-contract=off", "-fno-tree-slp-vectorize"]
SANITIZED = [
    *("-O1", "-ffp-contract=off", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"),
    # Without float-divide-by-zero, which is no error in IEEE arithmetic.
    *("-fsanitize=address", "-fsanitize=undefined"),
]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def sources(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted((ROOT / "csrc").glob(pattern))]


def library_sources() -> list[Path]:
    found = sources("cuda/*.cu", "cuda/*.cpp", "ops/*.cpp", "ops/cuda/*.cpp")
    # The stream is torch's, in a library that only a torch with CUDA has.
    return [HERE / "stream.cpp", *(path for path in found if path.name != "cuda_stream.cpp")]


def torch_flags() -> tuple[list[str], list[str]]:
    """For the compiler and for the linker."""
    import torch

    folder = Path(torch.__file__).parent
    compile_flags = [
        "-DSOFTMAX_EXT_CUDA_KEY=CPU",
        ARCHITECTURES,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *("-isystem", str(folder / "include")),
    ]
    return compile_flags, ["-shared", f"-L{folder / 'lib'}", "-ltorch_cpu"]


def build(target: str, sanitized: bool = False) -> Path:
    """Builds "selftest", "gpu_times" or "libemulated.so", as far as it is not up to date, and returns its path."""
    from ninja.ninja_syntax import Writer, escape

    if target == "selftest":
        units, compile_flags, link_flags = [HERE / "selftest.cu"], [], []
    elif target == "gpu_times":
        units = [ROOT / "benchmarks" / "gpu_times" / "main.cu", *sources("cuda/*.cu", "cuda/*.cpp")]
        compile_flags, link_flags = [ARCHITECTURES], []
    else:
        units = library_sources()
        compile_flags, link_flags = torch_flags()
    kind = SANITIZED if sanitized else PLAIN
    folder = BUILD / ("sanitized" if sanitized else "plain") / target.partition(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / target

    def quoted(words: list[str]) -> str:
        return escape(shlex.join(words))

    # Processes of one test run build the same thing.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with (folder / "build.ninja").open("w") as file:
            ninja = Writer(file)
            ninja.variable("builddir", escape(str(folder)))
            cxx = quoted(compiler())
            ninja.rule(
                "compile",
                f"{cxx} -MMD -MF $out.d {quoted([*FLAGS, *kind, *compile_flags])} -x c++ -c $in -o $out",
                description="compile $in for the CPU",
                depfile="$out.d",
                deps="gcc",
            )
            ninja.rule("link", f"{cxx} {quoted(kind)} $in {quoted(link_flags)} -ldl -o $out", description="link $out")
            objects = []
            for source in [HERE / "emulator.cpp", *units]:
                relative = source.relative_to(ROOT)
                objects.append(str(folder / relative.with_suffix(".o")))
                ninja.build(escape(objects[-1]), "compile", escape(str(relative)))
            ninja.build(escape(str(output)), "link", [escape(o) for o in objects])
        command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the build of {target} failed:\n{done.stdout}")
    return output


def sanitizer_environment() -> dict[str, str]:
    """What AddressSanitizer asks of the environment of a Python that loads a library built with it."""

    def library(name: str) -> str:
        answer = subprocess.run([*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    return {
        # libstdc++ beside it: AddressSanitizer looks for the real __cxa_throw when the process starts.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python and torch keep memory to the end.
        "ASAN_OPTIONS": "detect_leaks=0:" + os.environ.get("ASAN_OPTIONS", ""),
        "UBSAN_OPTIONS": "print_stacktrace=1:" + os.environ.get("UBSAN_OPTIONS", ""),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sanitized", action="store_true", help="with AddressSanitizer and UBSan")
    try:
        print(build("libemulated.so", parser.parse_args().sanitized))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
