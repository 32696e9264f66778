"""What the built library may need from other libraries, and what its per-ISA objects may offer.

Two promises stand on this. One build serves every torch from 2.10 on: so the library takes nothing
from torch but the stable C shims. One build runs on every x86-64: so an inline function compiled
with -mavx512f must not be a weak symbol under a name that baseline code uses too, since the linker
keeps one copy of each name, and baseline code would then die of SIGILL on an older CPU.
"""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from softmax_ext import cuda

pytestmark = pytest.mark.devices("cpu")

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "ninja" / "cpu"  # setup.py's BUILD

# Undefined symbols, as nm prints them: with the version where the library that has it gives one.
ALLOWED = re.compile(
    r"""
      (aoti_torch|torch)_\w+            # torch's stable C shims
    | Sleef_\w+                         # libtorch_cpu exports the vectorised exp of double
    | _?Py\w+                           # Python's C API
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
    spec = importlib.util.find_spec("softmax_ext._C")
    assert spec is not None, "softmax_ext is installed without its extension"
    assert spec.origin is not None
    return spec.origin


@pytest.fixture(scope="module")
def cuda_library() -> str:
    """The one that the package would load, or one built beside it to see that it links."""
    built = [cuda.path(), *sorted(map(str, (ROOT / "build" / "ninja-cuda").glob("_cuda*.so")))]
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


def test_cuda_library_needs_only_the_stable_abi_and_the_runtime(cuda_library):
    """CUDA's run-time library is in it."""
    undefined = [s.name for s in symbols("-D", "--undefined-only", cuda_library)]
    assert "aoti_torch_get_current_cuda_stream" in undefined
    unexpected = [name for name in undefined if name.startswith("Sleef_") or not ALLOWED.fullmatch(name)]
    assert not unexpected, f"outside torch's stable ABI and the C and C++ runtime:{demangled(unexpected)}"


def test_cuda_library_offers_only_what_the_report_asks(cuda_library):
    """And the weak symbols of the C++ library, which are the same everywhere."""
    own = {s.name for s in symbols("-D", "--defined-only", cuda_library) if s.kind in "TD" and s.name[0] != "_"}
    assert own == {"softmax_ext_cuda_architectures", "softmax_ext_cuda_kernel_for"}


def test_cuda_library_links_no_other_library_and_no_path_of_this_machine(cuda_library):
    dynamic = re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", run("readelf", "--dynamic", "--wide", cuda_library))
    needed = re.compile(rf"{NEEDED.pattern}|(libtorch_cuda|libdl|librt)\.so.*")
    assert ("NEEDED", "libtorch_cpu.so") in dynamic
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
