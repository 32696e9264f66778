"""Builds softmax_ext's libraries: which sources, with which flags, for which processors.

pyproject.toml holds the metadata; this file only compiles. For each library it writes a build.ninja
and runs ninja, which rebuilds what changed (headers included) and nothing else. No Python is in the
libraries: one wheel serves every version of it.

libsoftmax_ext_cpu.so, in build/ninja: the operators' schemas and the CPU. One library runs on every
CPU of its architecture:

    csrc/*.cpp               once             what Python asks; no torch header
    csrc/ops/*.cpp           once             the operators, in torch's stable ABI
    csrc/ops/cpu/*.cpp       once             and what they do on the CPU
    csrc/cpu/*_kernel.cpp    once per ISA     the SIMD kernels, over the headers of at::vec
    csrc/cpu/*.cpp           once             the rest: picks among the ISAs at run time

libsoftmax_ext_cuda.so, in build/ninja-cuda, where torch has CUDA and there is an nvcc: the same
operators for CUDA tensors. No GPU is needed to build it:

    csrc/ops/*.cpp           C++ compiler     as above
    csrc/ops/cuda/*.cpp      C++ compiler     and what they do with CUDA tensors
    csrc/cuda/*              nvcc             the kernels; no torch header

softmax_ext._C, in build/ninja-module, in the source folder alone (build_ext --inplace, an editable
installation) and where there are pybind11 and Python.h: csrc/module/, for tests of the kernels.

Environment: CXX, CXXFLAGS, LDFLAGS, and MAX_JOBS (how many compilers run at once). For CUDA:

    FORCE_CUDA=1             build it though torch has no CUDA, or stop; it is not loaded there
    FORCE_CPU=1              do not build it
    CUDA_HOME, CUDA_PATH     where bin/nvcc is; else PATH and /usr/local/cuda are searched
    TORCH_CUDA_ARCH_LIST     for which GPUs: "8.0;9.0+PTX"
    NVCC_FLAGS               for nvcc besides

For tests/tools/kernel_suite.py:

    SANITIZE=1               the CPU library and _C under AddressSanitizer and UBSan, in build/*-sanitized
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("SANITIZE", "") not in ("", "0")

# The names of the extensions, and where each is built.
CPU, CUDA, MODULE = "libsoftmax_ext_cpu", "libsoftmax_ext_cuda", "_C"
SUFFIX = "-sanitized" if SANITIZE else ""
BUILD = {
    CPU: Path(f"build/ninja{SUFFIX}"),
    CUDA: Path("build/ninja-cuda"),
    MODULE: Path(f"build/ninja-module{SUFFIX}"),
}

# What a build needs, and the least version of each.
# setuptools 77 is the first that reads pyproject.toml's license.
BUILD_TOOLS = {"torch": (2, 10), "ninja": (1, 11), "setuptools": (77, 0)}

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

# Compute capabilities from Turing on, which is what CUDA 13 compiles for; the last one's PTX, from
# which the driver makes code for newer GPUs. What nvcc does not know is left out.
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"

# What one nvcc takes at most.
NVCC_BYTES = 3 << 30

# The time of the files in an sdist and a wheel: 1980, the earliest that a wheel can hold, or what was asked for.
ARCHIVE_TIME = int(os.environ.get("SOURCE_DATE_EPOCH", "315532800"))


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


class Toolkit(NamedTuple):
    """A CUDA toolkit and what it is to compile for."""

    nvcc: str
    version: str
    gencode: list[str]
    architectures: str  # as the library reports them


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


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def find_nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and not shutil.which(f"{home}/bin/nvcc"):
            stop(f"{variable} is {home}, where there is no bin/nvcc. Set it right, or FORCE_CPU=1.")
        if home:
            return f"{home}/bin/nvcc"
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_toolkit() -> Toolkit | str:
    """The toolkit to build the CUDA library with, or why that library is not built."""
    import torch

    force, cuda = is_set("FORCE_CUDA"), torch.version.cuda
    if is_set("FORCE_CPU"):
        if force:
            stop("FORCE_CUDA and FORCE_CPU are both set. Unset one.")
        return "FORCE_CPU is set"
    if cuda is None and not force:
        return f"this torch, {torch.__version__}, has no CUDA (FORCE_CUDA=1 compiles it all the same)"
    nvcc = find_nvcc()
    if nvcc is None:
        reason = (
            "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda: install the CUDA toolkit"
            f"{f' {cuda}' if cuda else ''} or set CUDA_HOME to where it is"
        )
        return stop(f"{reason}.") if force else reason
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", answer).group(1)
    if cuda and cuda.split(".")[0] != version.split(".")[0]:
        stop(
            f"{nvcc} is of CUDA {version}, torch {torch.__version__} of CUDA {cuda}: the numbers "
            f"before the point must be the same. Set CUDA_HOME to a toolkit {cuda.split('.')[0]}.x, "
            f"install a torch for CUDA {version.split('.')[0]}, or set FORCE_CPU=1 to build without."
        )
    return Toolkit(nvcc, version, *find_architectures(nvcc, version))


def find_architectures(nvcc: str, version: str) -> tuple[list[str], str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST or the default, and the architectures by nvcc's names."""
    answer = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = re.findall(r"compute_(\d+)", answer.stdout)
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    chosen = []  # (number, whether PTX too)
    for word in dict.fromkeys(re.findall(r"[^;,\s]+", given) or CUDA_ARCHITECTURES.split(";")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", word)
        if not match:
            hint = "This build asks no GPU. " if word.lower() == "native" else ""
            stop(
                f"TORCH_CUDA_ARCH_LIST must list compute capabilities, as in '8.0;9.0+PTX'; got "
                f"{word!r}. {hint}nvidia-smi --query-gpu=compute_cap --format=csv tells a GPU's."
            )
        number = match[1] + match[2]
        if number.rstrip("af") in known:
            chosen.append((number, bool(match[3])))
        elif given.strip("; ,"):
            names = " ".join(f"{n[:-1]}.{n[-1]}" for n in known)
            stop(f"TORCH_CUDA_ARCH_LIST has {word}; nvcc {version} compiles for {names}.")
    if not given.strip("; ,"):
        chosen[-1] = (chosen[-1][0], True)
    flags = []
    for number, ptx in chosen:
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, ";".join(f"{number}+PTX" if ptx else number for number, ptx in chosen)


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path("csrc").glob(pattern))


def torch_headers() -> list[str]:
    import torch

    headers = str(Path(torch.__file__).parent / "include")
    return [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        # Their checks hold the names of their files: the library is to name no folder of this machine.
        f"-ffile-prefix-map={headers}=torch",
        *("-isystem", headers),
    ]


def common_flags() -> list[str]:
    return [*COMMON_FLAGS, *sanitizers(), *shlex.split(os.environ.get("CXXFLAGS", "")), "-Icsrc"]


def sanitizers() -> list[str]:
    return SANITIZERS if SANITIZE else []


def link_flags(name: str, libraries: list[str]) -> list[str]:
    """No rpath: torch is imported before the library, so its libraries are in the process already.

    libstdc++ stands before libtorch_cpu, which exports copies of some of its functions.
    """
    import torch

    return [
        *sanitizers(),
        *shlex.split(os.environ.get("LDFLAGS", "")),
        *("-shared", f"-Wl,-soname,{name}.so", "-Wl,--as-needed", "-lstdc++"),
        # What nobody defines ends the build, not the user's import. (The sanitizers' functions are in the process.)
        *([] if SANITIZE else ["-Wl,-z,defs"]),
        *(f"-L{Path(torch.__file__).parent / 'lib'}", *libraries),
    ]


def object_of(library: str, source: Path, suffix: str = ".o") -> str:
    return str(BUILD[library] / source.relative_to("csrc").with_suffix(suffix))


def operator_units(library: str, device: str) -> list[Unit]:
    """The operators, and what they do on one device."""
    flags = [*common_flags(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *torch_headers()]
    paths = sources("ops/*.cpp", f"ops/{device}/*.cpp")
    return [Unit(str(path), object_of(library, path), flags) for path in paths]


def versions(version: str) -> list[str]:
    import torch

    return [f'-DSOFTMAX_EXT_VERSION="{version}"', f'-DSOFTMAX_EXT_BUILT_TORCH="{torch.__version__}"']


def record_unit(library: str, version: str) -> Unit:
    source = Path("csrc/build_record.cpp")
    return Unit(str(source), object_of(library, source), [*common_flags(), *versions(version)])


def old_runtime(library: str) -> tuple[list[Unit], list[str]]:
    """What keeps the library to the C and C++ libraries of old systems: a unit, and flags for the linker."""
    if platform.machine() != "x86_64" or SANITIZE:
        return [], []
    source = Path("csrc/old_runtime.cpp")
    text, runtime = source.read_text(), ["-DSOFTMAX_EXT_CUDA_RUNTIME"]
    if library != CUDA:
        text, runtime = (
            re.sub(r"^#ifdef SOFTMAX_EXT_CUDA_RUNTIME\n.*?^#endif", "", text, flags=re.MULTILINE | re.DOTALL),
            [],
        )
    names = re.findall(r"^(?:OLD_FUNCTION|REPLACED)\((\w+)", text, re.MULTILINE)
    unit = Unit(str(source), object_of(library, source), [*common_flags(), *runtime])
    return [unit], [f"-Wl,--wrap={name}" for name in names]


def cpu_library(version: str, compiler: str) -> Library:
    isas = X86_ISAS if platform.machine() == "x86_64" else OTHER_ISAS
    told = [*versions(version), f'-DSOFTMAX_EXT_COMPILER="{compiler}"']
    source = Path("csrc/cpu_questions.cpp")
    units = [Unit(str(source), object_of(CPU, source), [*common_flags(), *told])]
    units += [record_unit(CPU, version), *operator_units(CPU, "cpu"), *kernel_units(isas, compiler)]
    old_units, old_flags = old_runtime(CPU)
    print(f"  ISAs       {' '.join(isas)}, chosen at run time")
    return Library([*units, *old_units], [*link_flags(CPU, ["-ltorch_cpu", "-lpthread"]), *old_flags])


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


def with_isas(isas: dict[str, list[str]]) -> list[str]:
    return [f"-DSOFTMAX_EXT_WITH_{isa}" for isa in isas if isa != "DEFAULT"]


def kernel_units(isas: dict[str, list[str]], compiler: str) -> list[Unit]:
    """The kernels for each of the ISAs, and the choice among them."""

    def unit(source: Path, *flags: str, suffix: str = ".o") -> Unit:
        return Unit(str(source), object_of(CPU, source, suffix), [*common_flags(), *flags])

    units = []
    for source in sources("cpu/*.cpp"):
        if not source.stem.endswith("_kernel"):
            units.append(unit(source, *with_isas(isas)))
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


def nvcc_jobs() -> int:
    """As many as there are processors and memory for."""
    jobs = os.environ.get("MAX_JOBS")
    if jobs:
        return max(1, int(jobs))
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    fit = int(free[1]) * 1024 // NVCC_BYTES if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), fit))


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
    units += [record_unit(CUDA, version), *operator_units(CUDA, "cuda")]
    # CUDA's own run-time library is linked in: the library then needs none of a certain name and
    # version at run time, wherever pip or the system put torch's. Streams and memory are the
    # driver's, so that the two work on the same ones.
    answer = subprocess.run(
        [toolkit.nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=True
    )
    paths = shlex.split(re.search(r"LIBRARIES=(.*)", answer.stderr)[1])
    runtime = [*paths, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    print(f"  CUDA       {toolkit.version}, {toolkit.nvcc}, {jobs} at once; about eight minutes of one processor")
    print(f"  GPUs       {toolkit.architectures.replace(';', ' ')} (TORCH_CUDA_ARCH_LIST chooses others)")
    # One source takes longer than all others together.
    threads = max(min(2, jobs), jobs // max(1, len(kernels)))
    old_units, old_flags = old_runtime(CUDA)
    # Without the symbols of what is hidden: among them are nvcc's temporary files, of other names each time.
    link = [*link_flags(CUDA, [torch_cuda(command), "-ltorch_cpu", *runtime]), *old_flags, "-Wl,--strip-all"]
    return Library([*units, *old_units], link, jobs, threads)


def torch_cuda(command: list[str]) -> str:
    """A library to link with in the place of torch's, which not every torch has: the result is the same with all."""
    library = BUILD[CUDA] / "libtorch_cuda.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library)]
    subprocess.run([*command, *flags, "csrc/ops/cuda/stub/torch_cuda.cpp"], check=True)
    return str(library)


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
            flags = {"flags": quoted(unit.flags)}
            ninja.build(unit.object, unit.rule, unit.source, variables=flags)
        flags = {"flags": quoted(library.link)}
        ninja.build(output, "link", [unit.object for unit in library.units], variables=flags)


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


def library_file() -> ModuleType:
    """The package's module of that name; the package itself can't be imported before it is built."""
    spec = importlib.util.spec_from_file_location("library_file", ROOT / "softmax_ext" / "library_file.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NinjaBuild(build_ext):
    """setuptools' build_ext, with ninja in the place of its own compiler calls."""

    def finalize_options(self) -> None:
        # Here and not below, so that an sdist needs no toolkit.
        self.toolkit = find_toolkit()
        # A sanitized build is for tests too.
        in_source_folder = self.inplace or self.editable_mode or SANITIZE
        self.without_module = without_module() if in_source_folder else "for the source folder alone"
        left_out = {CUDA: isinstance(self.toolkit, str), MODULE: self.without_module is not None}
        self.distribution.ext_modules = [
            Extension(f"softmax_ext.{name}", sources=[]) for name in BUILD if not left_out.get(name)
        ]
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python, which is in _C alone."""
        filename = super().get_ext_filename(fullname)
        return filename if fullname.endswith(MODULE) else f"{filename.partition('.')[0]}.so"

    def build_extensions(self) -> None:
        import torch

        # Paths stay relative, so that no message in the library names a directory of this machine.
        os.chdir(ROOT)
        self.command, self.compiler_name = find_compiler()
        print(f"softmax_ext {self.distribution.get_version()}")
        print(f"  compiler   {self.compiler_name}")
        print(f"  torch      {torch.__version__}, headers in {torch_headers()[-1]}")
        if isinstance(self.toolkit, str):
            print(f"  CUDA       NOT BUILT: {self.toolkit}")
        if self.without_module is not None:
            print(f"  module _C  NOT BUILT: {self.without_module} (tests of the kernels need it, nothing else)")
        # What an earlier build left would be taken for this one's.
        for old in Path(self.get_ext_fullpath(f"softmax_ext.{CPU}")).parent.glob("*.so"):
            old.unlink()
        super().build_extensions()

    def copy_extensions_to_source(self) -> None:
        if isinstance(self.toolkit, str):
            (ROOT / "softmax_ext" / f"{CUDA}.so").unlink(missing_ok=True)
        if self.without_module is not None:
            for old in (ROOT / "softmax_ext").glob(f"{MODULE}.*.so"):
                old.unlink()
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        name, version = ext.name.rpartition(".")[2], self.distribution.get_version()
        compilers = {"compile": self.command}
        if name == CUDA:
            compilers["nvcc"] = [self.toolkit.nvcc]
            library = cuda_library(version, self.toolkit, self.command)
        else:
            library = cpu_library(version, self.compiler_name) if name == CPU else module_library()
        print(f"  sources    {' '.join(dict.fromkeys(u.source for u in library.units))}", flush=True)
        output = BUILD[name] / Path(self.get_ext_filename(ext.name)).name
        BUILD[name].mkdir(parents=True, exist_ok=True)
        write_ninja(BUILD[name] / "build.ninja", compilers, library, str(output))
        run_ninja(BUILD[name] / "build.ninja", library)

        installed = Path(self.get_ext_fullpath(ext.name))
        installed.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(output), str(installed))
        if name != MODULE:
            library_file().seal(str(installed))


class AnyPythonWheel(bdist_wheel):
    """setuptools' wheel, for every Python 3, and of the same bytes for the same files."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        super().run()
        *_, path = self.distribution.dist_files[-1]
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                member = zipfile.ZipInfo(name, time.gmtime(ARCHIVE_TIME)[:6])
                member.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
                archive.writestr(member, content, zipfile.ZIP_DEFLATED)


class SameBytesSdist(sdist):
    """setuptools' sdist, of the same bytes for the same files: no order, time, owner or umask is in it."""

    def make_archive(self, base_name: str, format: str, *arguments: object, base_dir: str, **options: object) -> str:
        if format != "gztar":
            stop(f"makes an sdist as .tar.gz only; {format} was asked for.")

        def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = ARCHIVE_TIME
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        path = Path(f"{base_name}.tar.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", 9, file, mtime=ARCHIVE_TIME) as zipped,
            tarfile.open(None, "w", zipped, format=tarfile.PAX_FORMAT) as archive,
        ):
            # In order of the names, folders before what is in them.
            archive.add(base_dir, filter=anonymous)
        return str(path)


if __name__ == "__main__":
    if sys.platform != "linux":
        stop(f"builds on Linux only (x86-64 and ARM); this is {sys.platform}.")
    check_build_tools()
    # NinjaBuild adds the others.
    setup(
        ext_modules=[Extension(f"softmax_ext.{CPU}", sources=[])],
        cmdclass={"bdist_wheel": AnyPythonWheel, "build_ext": NinjaBuild, "sdist": SameBytesSdist},
    )
