"""Finds the CUDA toolkit, and decides whether and for which GPUs the CUDA library is built.

torch.utils.cpp_extension does the like, and is not used. Its CUDA_HOME is None where torch has no CUDA, so that nothing
could be compiled there, and is a folder without an nvcc where only the driver is installed. Its list of architectures
is by default that of the GPUs in this machine, and the build of a wheel needs none. (Both are in torch 2.13 and 2.14.)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import NamedTuple

from build_support.tools import is_set, stop

# Compute capabilities from Turing on, which is what CUDA 13 compiles for; the last one's PTX, from
# which the driver makes code for newer GPUs. What nvcc does not know is left out.
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


class Toolkit(NamedTuple):
    """A CUDA toolkit and what it is to compile for."""

    nvcc: str
    version: str
    gencode: list[str]
    architectures: str  # as the library reports them


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
    given = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    chosen = []  # (number, whether PTX too)
    for word in dict.fromkeys(given or CUDA_ARCHITECTURES.split(";")):
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
        elif given:
            names = " ".join(f"{n[:-1]}.{n[-1]}" for n in known)
            stop(f"TORCH_CUDA_ARCH_LIST has {word}; nvcc {version} compiles for {names}.")
    if not given:
        chosen[-1] = (chosen[-1][0], True)
    flags = []
    for number, ptx in chosen:
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags, ";".join(f"{number}+PTX" if ptx else number for number, ptx in chosen)
