"""Loads the CUDA library, which registers the operators for CUDA tensors, and asks it what was built.

``library`` is the loaded library. If it could not be loaded, ``library`` is None, ``missing`` is a sentence that says
why, and CUDA tensors are refused with that sentence. With a torch without CUDA nothing is loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import NoReturn

import torch

from . import libraries

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/dtype.h


def path() -> str | None:
    """The path of the library, or None if it was not built."""
    return libraries.find("cuda")


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    found = path()
    if torch.version.cuda is None:
        built = "; the CUDA kernels are built, and need one that has" if found else ""
        return None, f"torch {torch.__version__} has no CUDA{built}"
    if found is None:
        return None, (
            "softmax_ext was built without CUDA; in the project's folder type: FORCE_CUDA=1 "
            f"{libraries.REINSTALL} (the toolkit must be of CUDA {torch.version.cuda.split('.')[0]})"
        )
    try:
        kernels = libraries.load(found)
        kernels.softmax_ext_cuda_architectures.restype = ctypes.c_char_p
        kernels.softmax_ext_cuda_kernel_for.restype = ctypes.c_char_p
        kernels.softmax_ext_cuda_kernel_for.argtypes = [ctypes.c_int64, ctypes.c_int32]
    except (OSError, AttributeError) as error:
        return None, (
            f"softmax_ext's CUDA kernels do not load with torch {torch.__version__}: they were built as "
            f"{libraries.built_as(found)} ({libraries.first_line(error)}); "
            f"build them again with this torch: FORCE_CUDA=1 {libraries.REINSTALL}"
        )
    return kernels, None


library: ctypes.CDLL | None = None
missing: str | None = None
_refusals: torch.library.Library | None = None


def load(operators: Iterable[str]) -> None:
    """Loads the library. If torch has CUDA but the library cannot be loaded, makes the operators raise."""
    global library, missing, _refusals
    library, missing = _load()
    if library is None and torch.version.cuda is not None:
        _refusals = refuse(operators)


def refuse(operators: Iterable[str]) -> torch.library.Library:
    """Registers, in place of the CUDA kernels, a function that raises NotImplementedError with ``missing``."""

    def refused(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{missing}; until then use input.cpu().")

    registered = torch.library.Library("softmax_ext", "IMPL", "CUDA")
    for name in operators:
        registered.impl(name, refused)
    return registered


def is_broken() -> bool:
    """Whether the library was built and torch has CUDA, but the library does not load."""
    return library is None and torch.version.cuda is not None and path() is not None


def architectures() -> str:
    """The compute capabilities that the library was compiled for, in nvcc's form: "75;80;86"."""
    assert library is not None
    return str(library.softmax_ext_cuda_architectures().decode())


def kernel_for(classes: int, dtype: torch.dtype, device: int) -> str:
    """The name of the kernel for rows of a cross entropy on that device; "unknown" if the library cannot tell."""
    assert library is not None
    with torch.cuda.device(device):
        name = library.softmax_ext_cuda_kernel_for(classes, _DTYPES.index(dtype))
    return "unknown" if name is None else str(name.decode())
