"""Finds the libraries with the kernels beside this file, loads them, and asks them how they were built.

The libraries do not use Python's ABI. torch loads the operators by the library's path. ctypes calls the functions for
the report and for the choice of the instruction set. So one file serves every Python and every torch from 2.10 on.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import torch

from ._version import __version__

PACKAGE = Path(__file__).resolve().parent
INSTALL = "pip install --no-build-isolation ."
"""The command that builds and installs the package; to be typed in the project's folder."""
INSTALL_HERE = "pip install --no-build-isolation --editable ."
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
"""The same command over an installed package. For a wheel its file name stands in place of the dot."""


_RECORD = b"softmax_ext build record: "  # csrc/build_record.cpp


def find(device: str) -> str | None:
    """The path of the library for "cpu" or "cuda", or None. A dangling link counts, so that ``load`` reports it."""
    path = PACKAGE / f"libsoftmax_ext_{device}.so"
    return str(path) if path.exists() or path.is_symlink() else None


def _record(path: str) -> str | None:
    """The versions of softmax_ext and torch that the library was built from, or None. OSError if it can't be read."""
    with Path(path).open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which mmap refuses
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.rfind(_RECORD)  # it stands near the end
            if begin < 0:
                return None
            return content[begin + len(_RECORD) : content.find(b"\0", begin)].decode(errors="replace")


def built_as(path: str) -> str:
    """The versions that the library was built from, for a message."""
    try:
        return _record(path) or "unknown versions (it is damaged, or another library)"
    except OSError:
        return "unknown versions (it can't be read)"


def load(path: str) -> ctypes.CDLL:
    """Loads the library, which registers its operators. If that fails, an OSError whose first line says why."""
    loaded = [other for other in torch.ops.loaded_libraries if Path(other).name == Path(path).name and other != path]
    if loaded:  # its operators can be registered once
        raise OSError(f"this process has loaded {loaded[0]} already; start Python anew")
    record = _record(path)
    if record is None:
        raise OSError("it has no record of its build")
    if not record.startswith(f"softmax_ext {__version__},"):  # its operators may differ from this version's
        raise OSError(f"the rest of the package is softmax_ext {__version__}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise OSError(str(error.__cause__ or error)) from error  # torch's own text has the path but no reason
    return ctypes.CDLL(path)


class CpuLibrary:
    """The library of the CPU kernels."""

    def __init__(self, path: str) -> None:
        """OSError if the file does not load, AttributeError if it is another library."""
        self.path = path
        library = load(path)
        built_torch, compiler = library.softmax_ext_cpu_built_torch, library.softmax_ext_cpu_compiler
        self._compiled_isa = library.softmax_ext_cpu_compiled_isa
        self._isa_available = library.softmax_ext_cpu_isa_available
        self._selected_isa = library.softmax_ext_cpu_selected_isa
        self._select_isa = library.softmax_ext_cpu_select_isa
        for text in (built_torch, compiler, self._compiled_isa, self._selected_isa):
            text.restype = ctypes.c_char_p
        for flag in (self._isa_available, self._select_isa):
            flag.restype = ctypes.c_bool
        self.built_torch: str = built_torch().decode()
        self.compiler: str = compiler().decode()

    def compiled_isas(self) -> list[str]:
        """Names of the instruction sets that were compiled, weakest first."""
        names: list[str] = []
        while (name := self._compiled_isa(len(names))) is not None:
            names.append(name.decode())
        return names

    def available_isas(self) -> list[str]:
        """The names of the compiled instruction sets that this processor can run, weakest first."""
        return [name for name in self.compiled_isas() if self._isa_available(name.encode())]

    def selected_isa(self) -> str:
        """The name of the instruction set in use."""
        return str(self._selected_isa().decode())

    def select_isa(self, isa: str) -> None:
        """Uses this instruction set from now on. ValueError if this processor cannot run it."""
        if not self._select_isa(isa.encode()):
            raise ValueError(f"select_isa: isa must be one of {', '.join(self.available_isas())}; got {isa}.")


def load_cpu() -> tuple[CpuLibrary | None, str | None]:
    """(the CPU library, None), or (None, a sentence that says why it cannot be loaded)."""
    path = find("cpu")
    if path is None:
        return None, _not_built()
    try:
        return CpuLibrary(path), None
    except (OSError, AttributeError) as error:
        return None, (
            f"the CPU library {path} was found but does not load with torch {torch.__version__}: "
            f"it was built as {built_as(path)} ({first_line(error)}); "
            f"build it again with this torch: {REINSTALL}"
        )


def first_line(error: Exception) -> str:
    """The first line of the error's text, without the dump of symbols that may follow."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _not_built() -> str:
    """A sentence that says where the library is missing.

    It names an installed package that this one hides, as happens when Python is started in the project's folder.
    """
    for folder in sys.path:
        other = Path(folder or ".").resolve() / PACKAGE.name
        if other != PACKAGE and any(other.glob("libsoftmax_ext_cpu.so")):
            return (
                f"the CPU library is not built: it is not in {PACKAGE}, the folder of the package that runs, which "
                f"hides the one in {other}; start Python in another folder, or build in this one: {INSTALL_HERE}"
            )
    return f"the CPU library is not built: it is not in {PACKAGE}; in the project's folder type: {INSTALL}"
