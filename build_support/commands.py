"""setuptools' commands: what it builds is compiled by ninja, and its wheel is for every Python."""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from build_support import libraries
from build_support.cuda_toolkit import find_toolkit
from build_support.libraries import BUILD, CPU, CUDA, MODULE, SANITIZE
from build_support.ninja_build import Library, run_ninja, write_ninja
from build_support.tools import find_compiler

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "softmax_ext"


def extension(name: str) -> Extension:
    return Extension(f"{PACKAGE.name}.{name}", sources=[])


def remove_libraries(folder: Path) -> None:
    """What an earlier build left, and would be taken for this one's."""
    for old in folder.glob("*.so"):
        old.unlink()


class NinjaBuild(build_ext):
    """setuptools' build_ext, with ninja in the place of its own compiler calls."""

    def finalize_options(self) -> None:
        # Here and not in setup.py, so that an sdist needs no toolkit.
        self.toolkit = find_toolkit()
        # A sanitized build is for tests too.
        in_source_folder = self.inplace or self.editable_mode or SANITIZE
        self.without_module = libraries.without_module() if in_source_folder else "for the source folder alone"
        left_out = {CUDA: isinstance(self.toolkit, str), MODULE: self.without_module is not None}
        self.distribution.ext_modules = [extension(name) for name in BUILD if not left_out.get(name)]
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python, which is in _C alone."""
        filename = super().get_ext_filename(fullname)
        return filename if fullname.endswith(MODULE) else f"{filename.partition('.')[0]}.so"

    def build_extensions(self) -> None:
        import torch

        # Paths stay relative, so that no message in the library names a directory of this machine.
        os.chdir(ROOT)
        self.command, self.compiler_name = find_compiler()
        print(f"softmax_ext {self.distribution.get_version()}")
        print(f"  compiler   {self.compiler_name}")
        print(f"  torch      {torch.__version__}, headers in {libraries.torch_headers()[-1]}")
        if isinstance(self.toolkit, str):
            print(f"  CUDA       NOT BUILT: {self.toolkit}")
        if self.without_module is not None:
            print(f"  module _C  NOT BUILT: {self.without_module} (tests of the kernels need it, nothing else)")
        remove_libraries(Path(self.get_ext_fullpath(f"{PACKAGE.name}.{CPU}")).parent)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        library = self.library(name)
        print(f"  sources    {' '.join(dict.fromkeys(unit.source for unit in library.units))}", flush=True)
        compilers = {"compile": self.command, **({"nvcc": [self.toolkit.nvcc]} if name == CUDA else {})}
        folder = BUILD[name]
        output = folder / Path(self.get_ext_filename(ext.name)).name
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder / "build.ninja", compilers, library, str(output))
        run_ninja(folder / "build.ninja", library)

        installed = Path(self.get_ext_fullpath(ext.name))
        installed.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(output), str(installed))
        installed.chmod(0o755)  # whatever the umask was when it was linked

    def library(self, name: str) -> Library:
        version = self.distribution.get_version()
        if name == CPU:
            return libraries.cpu_library(version, self.compiler_name)
        if name == CUDA:
            return libraries.cuda_library(version, self.toolkit, self.command)
        return libraries.module_library()

    def copy_extensions_to_source(self) -> None:
        remove_libraries(PACKAGE)
        super().copy_extensions_to_source()


class AnyPythonWheel(bdist_wheel):
    """setuptools' wheel, for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]
