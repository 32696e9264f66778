"""Builds the program of this folder, which calls the kernels of csrc/cpu without torch, and runs it.

    python tests/native/run.py [--trials N] [BUILD ...]

    plain      as the CPU library is compiled
    address    with AddressSanitizer and UBSan
    thread     with ThreadSanitizer
    aarch64    cross-compiled by aarch64-linux-gnu-g++, on an emulated ARM processor
    Nehalem    plain, on an emulated x86-64 processor without AVX
    Haswell    plain, on one with AVX2 and without AVX-512

Without names the first three. Each then commits faults on purpose (faults.cpp), which must not pass. Where the emulator
(qemu-user) or the cross compiler (g++-aarch64-linux-gnu) is not installed it says so, goes on and ends with status 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))

from build_support import libraries  # noqa: E402
from build_support.ninja_build import Library, Unit, run_ninja, write_ninja  # noqa: E402
from build_support.tools import find_compiler  # noqa: E402

BUILD = Path("build/native")
CROSS = "aarch64-linux-gnu-g++"
CROSS_LIBRARIES = "/usr/aarch64-linux-gnu"

THREAD_SANITIZER = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=thread"]


class Build(NamedTuple):
    """How the program is compiled and run, what it must have tried, and what its faults must end in."""

    folder: str
    emulator: list[str]
    arguments: list[str]
    isas: str | None  # None: whatever this processor has
    faults: dict[str, tuple[str, ...]]  # any of these words on stderr, or a signal of this name


SEGV, ILL = "SIGSEGV", "SIGILL"
NEHALEM, HASWELL = (["qemu-x86_64", "-cpu", cpu] for cpu in ("Nehalem", "Haswell"))
ARM = ["qemu-aarch64", "-L", CROSS_LIBRARIES]
# qemu 7.2 reads all lanes of AVX's masked loads (vmaskmov), and so the guarded page that a processor leaves alone.
READABLE = ["--readable"]
BUILDS = {
    "plain": Build("plain", [], [], None, {"overrun": (SEGV,)}),
    "address": Build("address", [], [], None, {"overrun": ("AddressSanitizer",), "shift": ("runtime error: shift",)}),
    "thread": Build("thread", [], [], None, {"race": ("ThreadSanitizer: data race",)}),
    "aarch64": Build("aarch64", ARM, [], "DEFAULT", {"overrun": (SEGV,)}),
    "Nehalem": Build("plain", NEHALEM, [], "DEFAULT", {"overrun": (SEGV,), "avx2": (ILL,), "avx512": (ILL,)}),
    "Haswell": Build("plain", HASWELL, READABLE, "DEFAULT AVX2", {"overrun": (SEGV,), "avx512": (ILL,)}),
}


def build(folder: str) -> Path:
    """Compiles what has changed, and returns the program."""
    command, compiler = find_compiler()
    isas = libraries.X86_ISAS if platform.machine() == "x86_64" else libraries.OTHER_ISAS
    extra: list[str] = {"address": libraries.SANITIZERS, "thread": THREAD_SANITIZER}.get(folder, [])
    if folder == "aarch64":
        command, compiler, isas = [CROSS], CROSS, libraries.OTHER_ISAS
        # What GCC 12 says of arm_neon.h and std::pair: uninitialised values that are not used, and its own older ABI.
        extra = ["-Wno-maybe-uninitialized", "-Wno-psabi"]
    target = BUILD / folder

    def placed(unit: Unit) -> Unit:
        name = unit.object.removeprefix(f"{libraries.BUILD[libraries.CPU]}/")
        return unit._replace(object=str(target / name), flags=[*unit.flags, *extra])

    target_version = f"-DTORCH_TARGET_VERSION={libraries.TORCH_TARGET_VERSION}"
    own = [*libraries.common_flags(), target_version, *libraries.torch_headers()]
    sources = [*sorted(HERE.relative_to(ROOT).glob("*.cpp")), Path("csrc/ops/cpu/block_cache.cpp")]
    units = [Unit(str(path), str(target / "own" / f"{path.stem}.o"), [*own, *extra]) for path in sources]
    units += [placed(unit) for unit in libraries.kernel_units(isas, compiler)]
    target.mkdir(parents=True, exist_ok=True)
    program = target / "native_kernels"
    library = Library(units, [*extra, "-pthread"])
    write_ninja(target / "build.ninja", {"compile": command}, library, str(program))
    run_ninja(target / "build.ninja", library)
    return program


def missing(build_: Build) -> str | None:
    """What this build needs and is not installed."""
    for tool in [*build_.emulator[:1], *([CROSS] if build_.folder == "aarch64" else [])]:
        if not shutil.which(tool):
            return tool
    return None


def without_random_addresses() -> list[str]:
    """ThreadSanitizer of GCC 12 does not start where the kernel spreads addresses widely."""
    command = ["setarch", platform.machine(), "--addr-no-randomize"]
    if not shutil.which("setarch") or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        return []
    return command


def is_stopped(command: list[str], words: tuple[str, ...]) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # qemu-user dies of the signal itself, and says so.
    signals = {-11: SEGV, -4: ILL}
    said = done.stderr + signals.get(done.returncode, "")
    return done.returncode != 0 and any(word in said for word in words)


def run(name: str, trials: int) -> bool:
    chosen = BUILDS[name]
    tool = missing(chosen)
    if tool:
        print(f"native {name}: NOT TESTED, {tool} is not installed", flush=True)
        return False
    begin = time.monotonic()
    program = str(build(chosen.folder))
    built = time.monotonic()
    command = [*chosen.emulator, *(without_random_addresses() if name == "thread" else []), program, *chosen.arguments]
    done = subprocess.run([*command, str(trials)], stdout=subprocess.PIPE, text=True, check=False)
    right = done.returncode == 0 and (chosen.isas is None or f"on {chosen.isas}, and the block cache" in done.stdout)
    print(f"native {name}: {done.stdout.strip() or f'ended with status {done.returncode}'}")
    for fault, words in chosen.faults.items():
        if not is_stopped([*command, "--fault", fault], words):
            print(f"native {name}: the fault on purpose, {fault}, was not stopped with {' or '.join(words)}")
            right = False
    seconds = time.monotonic() - built
    print(f"native {name}: {'right' if right else 'WRONG'}, {built - begin:.0f} s to build, {seconds:.0f} s to run")
    sys.stdout.flush()
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="*", metavar="BUILD", help=", ".join(BUILDS))
    parser.add_argument("--trials", type=int, default=100, help="of each kernel for each instruction set")
    arguments = parser.parse_args()
    unknown = set(arguments.builds) - set(BUILDS)
    if unknown:
        parser.error(f"no build of the name {', '.join(sorted(unknown))}; there are {', '.join(BUILDS)}")
    os.chdir(ROOT)
    names = arguments.builds or ["plain", "address", "thread"]
    wrong = [name for name in names if not run(name, arguments.trials)]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
