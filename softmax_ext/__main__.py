"""``python -m softmax_ext`` prints what was built, what runs here, and which kernels are chosen.

If the libraries do not load, it prints why. ``python -m softmax_ext plan`` prints the plans of a linear cross entropy.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from . import cuda, internals, libraries, matmul, ops, plan_command
from ._version import __version__

# The report names the CUDA kernel for rows of these lengths.
_CLASSES = (10, 1000, 32000, 128256, 262144)


def _report_cuda() -> list[tuple[str, str]]:
    if cuda.library is None:
        return [("CUDA", f"no: {cuda.missing}")]
    lines = [
        ("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} devices"),
        ("CUDA library", str(cuda.path())),
        ("CUDA kernels compiled", f"for {cuda.architectures().replace(';', ', ')}"),
    ]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        lines.append((f"CUDA device {device}", f"{torch.cuda.get_device_name(device)}, {major}.{minor}"))
        for dtype in (torch.float32, torch.bfloat16):
            chosen = (f"{classes}: {cuda.kernel_for(classes, dtype, device)}" for classes in _CLASSES)
            lines.append((f"  {str(dtype).removeprefix('torch.')} classes", ", ".join(chosen)))
    return lines


def _origin() -> str:
    """The wheel that the running package was installed from; pip's record beside the package names it."""
    try:
        found = metadata.distribution("softmax_ext")
    except metadata.PackageNotFoundError:
        found = None
    wheel = found and found.read_text("WHEEL")
    if not found or not wheel or Path(str(found.locate_file("softmax_ext"))).resolve() != libraries.PACKAGE:
        return f"no wheel: it runs from {libraries.PACKAGE}"
    tags = [line.partition(": ")[2] for line in wheel.splitlines() if line.startswith("Tag: ")]
    return f"softmax_ext-{found.version}-{' '.join(tags)}.whl in {libraries.PACKAGE}"


def _report() -> list[tuple[str, str]]:
    lines = [
        ("softmax_ext", __version__),
        ("installed from", _origin()),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch running", torch.__version__),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("CPU as torch sees it", torch.backends.cpu.get_cpu_capability()),
    ]
    if ops.library is None:
        return [*lines, ("CPU library", f"NOT LOADED: {ops.load_error}")]
    if ops.load_error is not None:
        lines.append(("NOT USABLE", ops.load_error))
    built = ops.library
    return [
        *lines,
        ("CPU library", built.path),
        ("built as", f"softmax_ext {__version__}, for torch >= 2.10, with the headers of torch {built.built_torch}"),
        ("compiler", built.compiler),
        ("CPU kernels compiled", ", ".join(built.compiled_isas())),
        ("CPU kernels available", ", ".join(built.available_isas())),
        ("CPU kernels chosen", f"{built.selected_isa()} (SOFTMAX_EXT_CPU_CAPABILITY forces another)"),
        (
            "float32 products",
            f"{'oneDNN for X W^T, ' if matmul.prefers_onednn('cpu', torch.float32, 1) else ''}torch.mm",
        ),
        *(("not in this torch", f"{i.name}, for {i.purpose}; instead: {i.without}") for i in internals.missing()),
        *_report_cuda(),
    ]


def main() -> int:
    """Prints the report, or what ``plan`` asks for. Returns 1 if a library does not load, else 0."""
    if sys.argv[1:2] == ["plan"]:
        plan_command.main(sys.argv[2:])
        return 0
    for name, value in _report():
        print(f"{name:22} {value}")
    return 1 if ops.load_error is not None or cuda.is_broken() else 0


if __name__ == "__main__":
    sys.exit(main())
