"""Builds softmax_ext's libraries. pyproject.toml holds the metadata; what is done is in build_support/:

    tools.py           what a build needs, and the C++ compiler
    cuda_toolkit.py    nvcc, and for which GPUs
    libraries.py       the libraries: which sources, with which flags
    ninja_build.py     compiles and links them
    commands.py        what setuptools calls

Environment: CXX, CXXFLAGS, LDFLAGS, and MAX_JOBS (how many compilers run at once). For CUDA, which is built where torch
has it and there is an nvcc:

    FORCE_CUDA=1             build it though torch has no CUDA, or stop; it is not loaded there
    FORCE_CPU=1              do not build it
    CUDA_HOME, CUDA_PATH     where bin/nvcc is; else PATH and /usr/local/cuda are searched
    TORCH_CUDA_ARCH_LIST     for which GPUs: "8.0;9.0+PTX"
    NVCC_FLAGS               for nvcc besides

In the source folder (build_ext --inplace, an editable installation) softmax_ext._C is built besides, for tests of the
kernels, where there are pybind11 and Python.h. For tests/tools/kernel_suite.py:

    SANITIZE=1               the CPU library and _C under AddressSanitizer and UBSan, in build/*-sanitized
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip and build leave it out

from build_support import tools

tools.check_build_tools()

from build_support import commands, libraries  # noqa: E402

# NinjaBuild adds the other libraries.
setup(
    ext_modules=[commands.extension(libraries.CPU)],
    cmdclass={"bdist_wheel": commands.AnyPythonWheel, "build_ext": commands.NinjaBuild},
)
