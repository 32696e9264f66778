"""The libraries: of which sources, with which flags, for which processors.

No Python is in the first two: one wheel serves every version of it.

libsoftmax_ext_cpu.so, in build/ninja: the operators' schemas and the CPU. One library runs on every
CPU of its architecture:

    csrc/*.cpp               once             what Python asks; no torch header
    csrc/ops/*.cpp           once             the operators, in torch's stable ABI
    csrc/ops/cpu/*.cpp       once             and what they do on the CPU
    csrc/cpu/*_kernel.cpp    once per ISA     the SIMD kernels, over the headers of at::vec
    csrc/cpu/*.cpp           once             the rest: picks among the ISAs at run time

libsoftmax_ext_cuda.so, in build/ninja-cuda: the same operators for CUDA tensors. No GPU is needed to build it:

    csrc/ops/*.cpp           C++ compiler     as above
    csrc/ops/cuda/*.cpp      C++ compiler     and what they do with CUDA tensors
    csrc/cuda/*              nvcc             the kernels; no torch header

softmax_ext._C, in build/ninja-module: csrc/module/, for tests of the kernels.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

from build_support.cuda_toolkit import Toolkit
from build_support.ninja_build import Library, Unit
from build_support.tools import is_set

SANITIZE = is_set("SANITIZE")

# The names of the extensions, and where each is built.
CPU, CUDA, MODULE = "libsoftmax_ext_cpu", "libsoftmax_ext_cuda", "_C"
SUFFIX = "-sanitized" if SANITIZE else ""
BUILD = {
    CPU: Path(f"build/ninja{SUFFIX}"),
    CUDA: Path("build/ninja-cuda"),
    MODULE: Path(f"build/ninja-module{SUFFIX}"),
}

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

# Whatever they find ends the process. Without float-divide-by-zero, which is no error in IEEE arithmetic.
SANITIZERS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer"),
    *("-fsanitize=address", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
]

# What one nvcc takes at most.
NVCC_BYTES = 3 << 30


# ---- what they have in common ----


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path("csrc").glob(pattern))


def object_of(library: str, source: Path, suffix: str = ".o") -> str:
    return str(BUILD[library] / source.relative_to("csrc").with_suffix(suffix))


def torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def torch_headers() -> list[str]:
    """The folder of torch.utils.cpp_extension.include_paths() that is not deprecated, as system headers."""
    headers = str(torch_folder() / "include")
    # Their checks hold the names of their files: the library is to name no folder of this machine.
    return [f"-ffile-prefix-map={headers}=torch", "-isystem", headers]


def sanitizers() -> list[str]:
    return SANITIZERS if SANITIZE else []


def common_flags() -> list[str]:
    return [*COMMON_FLAGS, *sanitizers(), *shlex.split(os.environ.get("CXXFLAGS", "")), "-Icsrc"]


def link_flags(name: str, libraries: list[str]) -> list[str]:
    """No rpath: torch is imported before the library, so its libraries are in the process already.

    libstdc++ stands before libtorch_cpu, which exports copies of some of its functions.
    """
    return [
        *sanitizers(),
        *shlex.split(os.environ.get("LDFLAGS", "")),
        *("-shared", f"-Wl,-soname,{name}.so", "-Wl,--as-needed", "-lstdc++"),
        # What nobody defines ends the build, not the user's import. (The sanitizers' functions are in the process.)
        *([] if SANITIZE else ["-Wl,-z,defs"]),
        *(f"-L{torch_folder() / 'lib'}", *libraries),
    ]


def versions(version: str) -> list[str]:
    import torch

    return [f'-DSOFTMAX_EXT_VERSION="{version}"', f'-DSOFTMAX_EXT_BUILT_TORCH="{torch.__version__}"']


def operator_units(library: str, device: str, version: str) -> list[Unit]:
    """The record of the build; the operators, and what they do on one device."""
    record = Path("csrc/build_record.cpp")
    flags = [*common_flags(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *torch_headers()]
    paths = sources("ops/*.cpp", f"ops/{device}/*.cpp")
    return [
        Unit(str(record), object_of(library, record), [*common_flags(), *versions(version)]),
        *(Unit(str(path), object_of(library, path), flags) for path in paths),
    ]


def old_runtime(library: str) -> tuple[list[Unit], list[str]]:
    """What keeps the library to the C and C++ libraries of old systems: a unit, and flags for the linker."""
    if platform.machine() != "x86_64" or SANITIZE:
        return [], []
    source = Path("csrc/old_runtime.cpp")
    text, runtime = source.read_text(), ["-DSOFTMAX_EXT_CUDA_RUNTIME"]
    if library != CUDA:
        of_cuda = r"^#ifdef SOFTMAX_EXT_CUDA_RUNTIME\n.*?^#endif"
        text, runtime = re.sub(of_cuda, "", text, flags=re.MULTILINE | re.DOTALL), []
    names = re.findall(r"^(?:OLD_FUNCTION|REPLACED)\((\w+)", text, re.MULTILINE)
    unit = Unit(str(source), object_of(library, source), [*common_flags(), *runtime])
    return [unit], [f"-Wl,--wrap={name}" for name in names]


# ---- the CPU ----


def cpu_library(version: str, compiler: str) -> Library:
    isas = X86_ISAS if platform.machine() == "x86_64" else OTHER_ISAS
    told = [*versions(version), f'-DSOFTMAX_EXT_COMPILER="{compiler}"']
    source = Path("csrc/cpu_questions.cpp")
    units = [Unit(str(source), object_of(CPU, source), [*common_flags(), *told])]
    units += [*operator_units(CPU, "cpu", version), *kernel_units(isas, compiler)]
    old_units, old_flags = old_runtime(CPU)
    print(f"  ISAs       {' '.join(isas)}, chosen at run time")
    return Library([*units, *old_units], [*link_flags(CPU, ["-ltorch_cpu", "-lpthread"]), *old_flags])


def kernel_units(isas: dict[str, list[str]], compiler: str) -> list[Unit]:
    """The kernels for each of the ISAs, and the choice among them."""

    def unit(source: Path, *flags: str, suffix: str = ".o") -> Unit:
        return Unit(str(source), object_of(CPU, source, suffix), [*common_flags(), *flags])

    with_isas = [f"-DSOFTMAX_EXT_WITH_{isa}" for isa in isas if isa != "DEFAULT"]
    units = []
    for source in sources("cpu/*.cpp"):
        if not source.stem.endswith("_kernel"):
            units.append(unit(source, *with_isas))
            continue
        for isa, isa_flags in isas.items():
            # at::vec's own switch.
            flags = [*torch_headers(), f"-DCPU_CAPABILITY={isa}", f"-DCPU_CAPABILITY_{isa}", *isa_flags]
            # GCC takes the operand that its AVX-512 intrinsics leave undefined on purpose for a
            # mistake (GCC bug 105593).
            if isa == "AVX512" and "clang" not in compiler:
                flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
            units.append(unit(source, *flags, suffix=f".{isa}.o"))
    return units


# ---- CUDA ----


def cuda_library(version: str, toolkit: Toolkit, command: list[str]) -> Library:
    kernels, jobs = sources("cuda/*.cu", "cuda/*.cpp"), nvcc_jobs()
    flags = [
        *("-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
        f'-DSOFTMAX_EXT_CUDA_ARCHITECTURES="{toolkit.architectures}"',
        *toolkit.gencode,
        *("-Xptxas", "-v"),  # registers and spills, which tests/gpu/cuda_check.py reads from the log beside the object
        *([f"-ccbin={command[0]}"] if len(command) == 1 else []),
        *shlex.split(os.environ.get("NVCC_FLAGS", "")),
    ]
    units = [Unit(str(path), object_of(CUDA, path), flags, "nvcc") for path in kernels]
    units += operator_units(CUDA, "cuda", version)
    # CUDA's own run-time library is linked in: the library then needs none of a certain name and
    # version at run time, wherever pip or the system put torch's. Streams and memory are the
    # driver's, so that the two work on the same ones.
    answer = subprocess.run(
        [toolkit.nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    paths = shlex.split(re.search(r"LIBRARIES=(.*)", answer.stderr)[1])
    runtime = [*paths, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    print(f"  CUDA       {toolkit.version}, {toolkit.nvcc}, {jobs} at once; about ten minutes of one processor")
    print(f"  GPUs       {toolkit.architectures.replace(';', ' ')} (TORCH_CUDA_ARCH_LIST chooses others)")
    # One source takes longer than all others together.
    threads = max(min(2, jobs), jobs // max(1, len(kernels)))
    old_units, old_flags = old_runtime(CUDA)
    # Without the symbols of what is hidden: among them are nvcc's temporary files, of other names each time.
    link = [*link_flags(CUDA, [torch_cuda(command), "-ltorch_cpu", *runtime]), *old_flags, "-Wl,--strip-all"]
    return Library([*units, *old_units], link, jobs, threads)


def nvcc_jobs() -> int:
    """As many as there are processors and memory for."""
    jobs = os.environ.get("MAX_JOBS")
    if jobs:
        return max(1, int(jobs))
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    fit = int(free[1]) * 1024 // NVCC_BYTES if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), fit))


def torch_cuda(command: list[str]) -> str:
    """A library to link with in the place of torch's, which not every torch has: the result is the same with all."""
    library = BUILD[CUDA] / "libtorch_cuda.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([*command, *flags, "csrc/ops/cuda/stub/torch_cuda.cpp"], check=True)
    return str(library)


# ---- the module for tests ----


def without_module() -> str | None:
    """Why _C can't be built."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    python_headers = sysconfig.get_path("include")
    if not Path(python_headers, "Python.h").exists():
        return f"no Python.h in {python_headers} (python3-dev, python3-devel)"
    return None


def module_library() -> Library:
    import pybind11

    includes = [*("-isystem", pybind11.get_include()), *("-isystem", sysconfig.get_path("include"))]
    source = Path("csrc/module/module.cpp")
    # The CPU library is in the process when the module is imported, and is found by its name.
    link = ["-shared", *sanitizers(), f"-L{BUILD[CPU]}", f"-l{CPU.removeprefix('lib')}"]
    return Library([Unit(str(source), object_of(MODULE, source), [*common_flags(), *includes])], link)
