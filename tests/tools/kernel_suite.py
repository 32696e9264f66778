"""Runs the tests that call the CPU kernels, on a library built with sanitizers or once for each instruction set.

    python tests/tools/kernel_suite.py sanitized [--sample N] [arguments of pytest]   AddressSanitizer and UBSan
    python tests/tools/kernel_suite.py isas [--sample N] [arguments of pytest]        each kernel set of this processor

The sanitized library is built in build/sanitized/, with a copy of the package; that in softmax_ext/ stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS / "emulator"))

from emulator import sanitizer_environment  # noqa: E402

SANITIZED = ROOT / "build" / "sanitized"

# Files without a test of the CPU kernels, or which test the same calls of them as another does.
NOT_OF_THE_KERNELS = {
    "benchmarks": "the benchmarks",
    "test_binary.py": "the symbols of the library in softmax_ext/",
    "test_compile.py": "what torch.compile makes of the operators' schemas",
    "test_cuda.py": "CUDA",
    "test_cuda_kernels.py": "CUDA",
    "test_emulator.py": "the emulator of CUDA, which has a sanitized build of its own",
    "test_diagnostics.py": "processes of their own, which choose the kernel set themselves",
    "test_fresh.py": "processes",
    "test_setup.py": "setup.py",
}

# What cannot be under AddressSanitizer.
NOT_SANITIZED: dict[str, str] = {}


def selection(left_out: dict[str, str]) -> list[str]:
    return [f"--ignore={path}" for name in left_out for path in TESTS.rglob(name)]


def build_sanitized() -> None:
    environment = {**os.environ, "SANITIZE": "1", "FORCE_CPU": "1"}
    # What an earlier build copied may be gone from the package.
    shutil.rmtree(SANITIZED, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", str(SANITIZED)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    (library,) = (SANITIZED / "softmax_ext").glob("libsoftmax_ext_cpu.so")
    code = library.read_bytes()
    for function in (b"__asan_report_load", b"__ubsan_handle"):
        if function not in code:
            raise SystemExit(f"{library} is not sanitized: it never calls {function.decode()}*")


def pytest(arguments: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Runs the tests on the softmax_ext in ``folder``."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += [*selection(NOT_OF_THE_KERNELS), *arguments, str(TESTS)]
    # `-m` finds the package in the folder that it is started from.
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=False).returncode


def run_sanitized(arguments: list[str]) -> int:
    build_sanitized()
    environment = sanitizer_environment()
    # A failed allocation is to raise in torch, as without a sanitizer.
    environment["ASAN_OPTIONS"] += ":allocator_may_return_null=1"
    skipped = selection(NOT_SANITIZED)
    return pytest([*skipped, "--sanitized", "-o", "timeout=1200", *arguments], SANITIZED, environment)


def run_isas(arguments: list[str]) -> int:
    command = [sys.executable, "-c", "from softmax_ext import ops; print(*ops.library.available_isas())"]
    isas = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for isa in isas:
        print(f"kernel set {isa}", flush=True)
        status = pytest(arguments, ROOT, {"SOFTMAX_EXT_CPU_CAPABILITY": isa})
        if status != 0:
            return status
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sanitized", "isas"])
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="of every file, one in N tests, drawn by their names; of the fuzz, one call in N",
    )
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.sample:
        names = {path.name for path in TESTS.rglob("test_*.py")} - {"test_fuzz.py"}
        pytest_arguments += [f"--sample={name}={arguments.sample}" for name in sorted(names)]
        os.environ["FUZZ_EXAMPLES"] = str(2000 // arguments.sample)
    return run_sanitized(pytest_arguments) if arguments.what == "sanitized" else run_isas(pytest_arguments)


if __name__ == "__main__":
    raise SystemExit(main())
