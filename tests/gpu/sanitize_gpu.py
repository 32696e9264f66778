"""Runs a few tests on a GPU under compute-sanitizer: memcheck, then racecheck.

    python tests/gpu/sanitize_gpu.py [--tool memcheck|racecheck] [arguments of pytest]

Without compute-sanitizer (part of the CUDA toolkit) it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("memcheck", "racecheck")
FOUND = 77  # compute-sanitizer's exit status where it has found something

# Under it a kernel takes hundreds of times longer: every kernel and every way of writing, on small inputs.
SELECTION = [
    str(HERE / "test_cuda.py"),
    *("-k", "test_every_kernel or test_a_wrong_class"),
]


def find() -> str | None:
    """The program, on PATH or beside nvcc."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    folders = [f"{home}/bin" for home in homes if home] + ([str(Path(nvcc).resolve().parent)] if nvcc else [])
    places = os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=places)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tool", choices=TOOLS, help="default: one after the other")
    arguments, pytest_arguments = parser.parse_known_args()
    sanitizer = find()
    if sanitizer is None:
        print("compute-sanitizer: SKIPPED, neither on PATH nor in CUDA_HOME/bin; it is part of the CUDA toolkit")
        return 0
    status = 0
    for tool in [arguments.tool] if arguments.tool else TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--kernel-regex", "kns=softmax_ext"]
        command += [sys.executable, "-m", "pytest", "--device", "cuda", "-p", "no:xdist", "-o", "timeout=0"]
        # Each tensor an allocation of its own, so that what is out of bounds of it is out of bounds.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        print(f"compute-sanitizer: {tool}", flush=True)
        done = subprocess.run([*command, *SELECTION, *pytest_arguments], env=environment, check=False)
        if done.returncode != 0:
            what = "has found errors" if done.returncode == FOUND else f"ended with status {done.returncode}"
            print(f"compute-sanitizer: {tool} {what}")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
