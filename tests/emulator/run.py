"""Runs tests on the CUDA kernels without a GPU, on the emulator of this folder: twice, plain and sanitized.

The kernels run some hundred times slower than on the CPU's own, so of the tests below a sample runs, drawn by their
names: one in so many. Every dtype, layout and kernel has its share.

    python tests/emulator/run.py [--build plain|sanitized] [--sample N] [arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import emulator

TESTS = Path(__file__).resolve().parents[1]

# One in so many tests of each file runs: (plain, sanitized).
SAMPLE = {
    "unit/test_cross_entropy.py": (4, 60),
    "unit/test_denominator.py": (2, 30),
    "unit/test_row_weight.py": (2, 30),
    "unit/test_softmax.py": (2, 30),
    "unit/test_layouts.py": (1, 15),
    "unit/test_numerics.py": (1, 15),
    "unit/test_inplace.py": (1, 15),
    "unit/test_parts.py": (2, 15),
    "unit/test_linear.py": (4, 60),
    "unit/test_linear_plans.py": (8, 120),
    "unit/test_linear_rows.py": (2, 30),
    "gpu/test_cuda_kernels.py": (1, 5),
    "gpu/test_cuda.py": (1, 5),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", choices=["plain", "sanitized"], help="default: one after the other")
    parser.add_argument("--sample", type=int, help="instead of the samples of SAMPLE; 1: all")
    arguments, pytest_arguments = parser.parse_known_args()
    for kind in [arguments.build] if arguments.build else ["plain", "sanitized"]:
        sanitized = kind == "sanitized"
        command = [sys.executable, "-m", "pytest", "--device", "emulated"]
        command += ["--sanitized"] if sanitized else []
        for name, samples in SAMPLE.items():
            file = TESTS / name
            command += ["--sample", f"{file.name}={arguments.sample or samples[sanitized]}", str(file)]
        environment = {**os.environ, **(emulator.sanitizer_environment() if sanitized else {})}
        print(f"CUDA kernels on the emulator, {kind} build", flush=True)
        status = subprocess.run([*command, *pytest_arguments], env=environment, check=False).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
