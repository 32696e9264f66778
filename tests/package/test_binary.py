"""What the built libraries may need from other libraries, and what the per-ISA objects may offer.

Three promises stand on this. One build serves every Python and every torch from 2.10 on: so the
libraries take nothing from Python, and from torch nothing but the stable C shims. One build runs on
every Linux that torch's wheels run on: so of the C and C++ libraries they take what was there in
2018. One build runs on every x86-64: so an inline function compiled
with -mavx512f must not be a weak symbol under a name that baseline code uses too, since the linker
keeps one copy of each name, and baseline code would then die of SIGILL on an older CPU.
"""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from softmax_ext import cuda, libraries

pytestmark = pytest.mark.devices("cpu")

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / "ninja" / "cpu"  # BUILD of build_support/libraries.py

# Undefined symbols, as nm prints them: with the version where the library that has it gives one.
ALLOWED = re.compile(
    r"""
      (aoti_torch|torch)_\w+            # torch's stable C shims
    | Sleef_\w+                         # libtorch_cpu exports the vectorised exp of double
    | .+@(GLIBC|GLIBCXX|CXXABI|GCC)_.+  # the C and C++ runtime
    | __gmon_start__ | _ITM_\w+TMCloneTable
    """,
    re.VERBOSE,
)

NEEDED = re.compile(r"(libtorch_cpu|libstdc\+\+|libm|libgcc_s|libc|libpthread|ld-linux[\w-]*)\.so.*")

# What the initialiser of the standard streams mentions.
STREAMS = {
    "_ZNSt8ios_base4InitC1Ev",
    "_ZNSt8ios_base4InitD1Ev",
    "__cxa_atexit",
    "__dso_handle",
    ".bss",
}


class Symbol(NamedTuple):
    kind: str  # nm's letter
    name: str  # mangled


def run(tool: str, *arguments: str) -> str:
    if not shutil.which(tool):
        pytest.skip(f"{tool} (binutils) is not installed")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def symbols(*arguments: str) -> Iterator[Symbol]:
    for line in run("nm", *arguments).splitlines():
        *_, kind, name = line.split()
        yield Symbol(kind, name)


def demangled(names: list[str]) -> str:
    return "".join(f"\n  {line}" for line in run("c++filt", *names).splitlines())


@pytest.fixture(scope="module")
def library() -> str:
    path = libraries.find("cpu")
    assert path is not None, "softmax_ext is installed without its library"
    return path


@pytest.fixture(scope="module")
def cuda_library() -> str:
    """The one that the package would load, or one built beside it to see that it links."""
    built = [cuda.path(), *sorted(map(str, (ROOT / "build" / "ninja-cuda").glob("libsoftmax_ext_cuda.so")))]
    found = [path for path in built if path is not None]
    if not found:
        pytest.skip("the CUDA library is not built")
    return found[0]


@pytest.fixture(params=["AVX2", "AVX512"])
def isa(request: pytest.FixtureRequest, library: str) -> str:
    if not Path(library).is_relative_to(ROOT):
        pytest.skip("softmax_ext is installed from a wheel: its objects are not here")
    if not list(OBJECTS.glob("*_kernel.DEFAULT.o")):
        pytest.skip(f"{OBJECTS} holds no objects")
    if not list(OBJECTS.glob(f"*_kernel.{request.param}.o")):
        pytest.skip(f"this build has no {request.param} kernels")
    return request.param


def test_needs_only_the_stable_abi_and_the_runtime(library):
    undefined = [s.name for s in symbols("-D", "--undefined-only", library)]
    assert any(name.startswith("aoti_torch_") for name in undefined), "nm does not show what is known to be there"
    assert any("@GLIBC_" in name for name in undefined), "nm prints no symbol versions here"
    unexpected = [name for name in undefined if not ALLOWED.fullmatch(name)]
    assert not unexpected, f"outside torch's stable ABI and the C and C++ runtime:{demangled(unexpected)}"


def test_links_no_other_library_and_no_path_of_this_machine(library):
    dynamic = re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", library))
    assert ("NEEDED", "libtorch_cpu.so") in dynamic
    unexpected = [(tag, value) for tag, value in dynamic if tag != "NEEDED" or not NEEDED.fullmatch(value)]
    assert not unexpected


FORBIDDEN = re.compile(
    r"socket|connect|send\w*|getaddrinfo|(f|fd|fre)?open(at)?(64)?|__open\w*|creat(64)?|mk\w*temp\w*|mkdir(at)?"
    r"|rename\w*|unlink(at)?|dlm?open|popen|system|v?fork|clone3?|exec\w+|posix_spawnp?|syscall"
    r"|_ZNSt\d+basic_o?fstream\w*"
)


def test_the_library_cannot_connect_open_or_start(library):
    """Of the C library it names nothing that could."""
    names = {line.split()[-1].partition("@")[0] for line in run("nm", "-D", "--undefined-only", library).splitlines()}
    assert {"mmap", "munmap"} <= names, "nm's format is another"
    assert not {name for name in names if FORBIDDEN.fullmatch(name)}


@pytest.mark.parametrize("kind", ["library", "cuda_library"])
def test_names_no_folder_of_this_machine(kind, request):
    """As torch's checks would, with the files they stand in: the same sources give the same bytes in any folder."""
    content = Path(request.getfixturevalue(kind)).read_bytes()
    assert b"torch/csrc/stable/" in content, "no name of a file is in it"
    # nvcc's: a name made from the folder of the source, in the place of an unnamed namespace, and its temporary files.
    assert b"_GLOBAL__N__" not in content
    assert b"tmpxft" not in content
    folders = {str(ROOT), str(Path(torch.__file__).parent), str(Path.home())}
    assert not [folder for folder in folders if folder.encode() in content]


def test_cuda_library_needs_only_the_stable_abi_and_the_runtime(cuda_library):
    """CUDA's run-time library is in it."""
    undefined = [s.name for s in symbols("-D", "--undefined-only", cuda_library)]
    assert "aoti_torch_get_current_cuda_stream" in undefined
    unexpected = [name for name in undefined if name.startswith("Sleef_") or not ALLOWED.fullmatch(name)]
    assert not unexpected, f"outside torch's stable ABI and the C and C++ runtime:{demangled(unexpected)}"


def offered(library: str) -> set[str]:
    """All but the weak symbols of the C++ library, which are the same everywhere."""
    return {s.name for s in symbols("-D", "--defined-only", library) if s.kind in "TD" and s.name[0] != "_"}


def test_offers_only_what_python_asks(library):
    declared = re.findall(r"\b(softmax_ext_cpu_\w+)\(", (ROOT / "csrc" / "cpu_questions.h").read_text())
    assert len(declared) > 5
    assert offered(library) == set(declared)


def test_cuda_library_offers_only_what_the_report_asks(cuda_library):
    assert offered(cuda_library) == {"softmax_ext_cuda_architectures", "softmax_ext_cuda_kernel_for"}


# What manylinux_2_28 allows, the tag of torch's own wheels (auditwheel's policy of that name).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def too_new(library: str) -> list[str]:
    found = re.findall(r"(\S+)@(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", run("nm", "-D", "--undefined-only", library))
    assert found, "nm prints no symbol versions here"
    return [
        f"{name}@{family}_{version}"
        for name, family, version in found
        if tuple(map(int, version.split("."))) > NEWEST[family]
    ]


old_systems = pytest.mark.skipif(platform.machine() != "x86_64", reason="csrc/old_runtime.cpp is for x86-64")


@old_systems
def test_asks_for_no_newer_system_than_torch(library):
    assert not too_new(library), "csrc/old_runtime.cpp must name these"


@old_systems
def test_cuda_library_asks_for_no_newer_system_than_torch(cuda_library):
    assert not too_new(cuda_library), "csrc/old_runtime.cpp must name these"


def test_cuda_library_links_no_other_library_and_no_path_of_this_machine(cuda_library):
    dynamic = re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", cuda_library))
    needed = re.compile(rf"{NEEDED.pattern}|(libtorch_cuda|libdl|librt)\.so.*")
    assert {("NEEDED", "libtorch_cpu.so"), ("NEEDED", "libtorch_cuda.so")} <= set(dynamic)
    unexpected = [(tag, value) for tag, value in dynamic if tag != "NEEDED" or not needed.fullmatch(value)]
    assert not unexpected


def test_isa_objects_export_nothing_that_other_code_could_call(isa):
    for path in OBJECTS.glob(f"*_kernel.{isa}.o"):
        exported = {s for s in symbols("--defined-only", str(path)) if s.kind.isupper() or s.kind in "uvw"}
        assert exported, f"{path.name} defines nothing: its kernels are missing"
        # A namespace in a mangled name is its length and itself. A name that has the ISA's anywhere
        # in it, be it in an argument, is one that no unit of another ISA can share.
        own = re.compile(rf"(?<!\d){len(isa)}{isa}")
        # DW.ref.*: the address of a runtime function, emitted where exceptions may pass. No code.
        leaks = [s.name for s in exported if not own.search(s.name) and not s.name.startswith("DW.ref.")]
        assert not leaks, f"{path.name} was compiled for {isa} and offers to everyone:{demangled(leaks)}"


def test_isa_objects_run_nothing_of_theirs_at_load_time(isa):
    for path in OBJECTS.glob(f"*_kernel.{isa}.o"):
        # The initialisers of a unit's globals, which the loader runs on every CPU. <iostream>,
        # which at::vec includes, brings one of baseline code that touches only the streams.
        if not any(s.name.startswith("_GLOBAL__") for s in symbols(str(path))):
            continue
        code = run("objdump", "-dr", "-j", ".text.startup", str(path))
        vectors = re.findall(r".*%[xyz]mm.*", code)
        assert not vectors, f"{path.name} was compiled for {isa} and runs this when it is loaded: {vectors}"
        mentions = set(re.findall(r"\bR_\w+\s+([\w.]+)", code))
        assert mentions <= STREAMS, f"{path.name} was compiled for {isa} and calls or sets {mentions} when it is loaded"
