"""``python -m softmax_ext``: what was built, what runs here, which kernels were chosen.

It works where the extension does not load, and says why.
"""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import ops
from ._version import __version__


def _report() -> list[tuple[str, str]]:
    lines = [
        ("softmax_ext", __version__),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch running", torch.__version__),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("CPU as torch sees it", torch.backends.cpu.get_cpu_capability()),
        ("CUDA", f"no: softmax_ext {__version__} has no CUDA kernels; CUDA tensors are refused"),
    ]
    if ops.extension is None:
        return [*lines, ("extension", f"NOT LOADED: {ops.load_error}")]
    if ops.load_error is not None:
        lines.append(("NOT USABLE", ops.load_error))
    built = ops.extension
    return [
        *lines,
        ("extension", str(built.__file__)),
        ("built as", f"softmax_ext {built.version}, for torch >= 2.10, with the headers of torch {built.built_torch}"),
        ("compiler", built.compiler),
        ("CPU kernels compiled", ", ".join(built.compiled_isas())),
        ("CPU kernels available", ", ".join(built.available_isas())),
        ("CPU kernels chosen", f"{built.selected_isa()} (SOFTMAX_EXT_CPU_CAPABILITY forces another)"),
    ]


def main() -> int:
    """Prints the report; 1 if the extension can't be used."""
    for name, value in _report():
        print(f"{name:22} {value}")
    return 0 if ops.load_error is None else 1


if __name__ == "__main__":
    sys.exit(main())
