"""benchmarks/gpu_run.sh, with stubs for the interpreter and for make: its steps, and what it says of them."""

import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

pytestmark = pytest.mark.devices("cpu")

SCRIPT = Path(cases.__file__).with_name("gpu_run.sh")
STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
case "$*" in
  *get_device_capability*) echo 9.0 ;;
  *build_ext*) exit "$STUB_BUILD" ;;
  *"pytest --device cuda"*) exit "$STUB_TESTS" ;;
  *"import hypothesis"*) exit 1 ;;
esac
"""

MAKE_STUB = """#!/usr/bin/env bash
echo "make $*" >>"$STUB_LOG"
exit "$STUB_MAKE"
"""


def gpu_run(
    tmp_path: Path, *arguments: str, times: int = 0, build: int = 0, tests: int = 0
) -> tuple[int, str, list[str]]:
    """Its exit status, what it printed, and what make and the interpreter were asked for."""
    stub, make, log = tmp_path / "python", tmp_path / "bin" / "make", tmp_path / "log"
    make.parent.mkdir()
    for path, text in ((stub, STUB), (make, MAKE_STUB)):
        path.write_text(text)
        path.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "STUB_LOG": str(log)}
    environment["PATH"] = f"{make.parent}:{environment['PATH']}"
    environment |= {"STUB_MAKE": str(times), "STUB_BUILD": str(build), "STUB_TESTS": str(tests)}
    command = [str(SCRIPT), *(arguments or [str(tmp_path / "results")])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(("times", "tests", "status"), [(0, 0, 0), (0, 1, 1), (1, 0, 1)])
def test_all_steps(times, tests, status, tmp_path):
    """Failing tests are said, and the benchmark runs all the same."""
    code, printed, asked = gpu_run(tmp_path, times=times, tests=tests)
    assert code == status
    of_make = [line for line in asked if line.startswith("make ")]
    assert of_make[0].endswith(" build/gpu_times/gpu_times")
    assert of_make[1:] == ([] if times else [f"make gpu-times GPU_TIMES_ARGS=--csv '{tmp_path}/results/gpu_times.csv'"])
    assert ("FAILED with status 1, gpu_times.log" in printed) == bool(times)
    steps = [line for line in asked if not line.startswith(("-c", "-m softmax_ext", "make "))]
    assert steps[0] == "setup.py build_ext --inplace"
    assert all(part in line for part, line in zip(["test_cuda.py", "--ignore", "sanitize"], steps[1:], strict=False))
    bench = "benchmarks/bench.py --device cuda --op"
    assert steps[-2].startswith(f"{bench} cross_entropy softmax --output {tmp_path}/results --seconds ")
    assert steps[-1].startswith(f"{bench} linear --output {tmp_path}/results --seconds ")
    assert "test_softmax.py" in steps[2]
    assert "skipped: no hypothesis" in printed
    assert ("FAILED with status 1, gpu_tests.log" in printed) == bool(tests)
    assert printed.splitlines()[-1].startswith("in all")
    logs = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert logs == ["gpu_bench.log", "gpu_build.log", "gpu_sanitizer.log", "gpu_tests.log", "gpu_times.log"]


def test_without_a_build(tmp_path):
    code, printed, asked = gpu_run(tmp_path, build=1)
    assert code == 2
    assert "FAILED with status 1, gpu_build.log" in printed
    assert asked[-1] == "setup.py build_ext --inplace"


@pytest.mark.parametrize("arguments", [["--help"], ["a", "b"]])
def test_how_it_is_called(arguments, tmp_path):
    assert gpu_run(tmp_path, *arguments) == (2, "usage: benchmarks/gpu_run.sh [DIRECTORY]\n", [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no torch that can use a GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []
