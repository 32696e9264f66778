"""Installs a wheel and runs the smoke test on it on emulated x86-64 processors that lack what this one has.

    python tests/package/old_cpu.py [CPU ...]

An instruction that such a processor does not know ends the process with SIGILL. The emulator is qemu-user; where it is
not installed the script says so and ends with status 1: nothing was tested.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# The kernel set that must be chosen there.
CPUS = {"Nehalem": "DEFAULT", "Haswell": "AVX2"}


def install_wheel(folder: Path) -> None:
    """Builds a wheel of this checkout and unpacks it into ``folder``, outside the checkout."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = folder / "wheels"
    build = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)]
    subprocess.run(build, env={**os.environ, "FORCE_CPU": "1"}, check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)


def passes(cpu: str, folder: Path) -> bool:
    emulated = ["qemu-x86_64", "-cpu", cpu, sys.executable]
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_CPU_CAPABILITY")}
    environment["PYTHONPATH"] = str(folder / "site")
    begin = time.monotonic()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*emulated, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    # A process that the smoke test starts is not emulated: hence the report once more, of this processor.
    report, smoke = run("-m", "softmax_ext"), run(str(HERE / "smoke.py"))
    chosen = next((line for line in report.stdout.splitlines() if line.startswith("CPU kernels chosen")), "no report")
    right = report.returncode == smoke.returncode == 0 and CPUS[cpu] in chosen.split()
    last = smoke.stdout.strip().splitlines()[-1:] or ["nothing said"]
    print(f"{cpu}: {'right' if right else 'WRONG'} in {time.monotonic() - begin:.0f} s: {chosen}; {last[0]}")
    if not right:
        print(f"  status {report.returncode} of the report, {smoke.returncode} of the test; must choose {CPUS[cpu]}")
        # For each thread the emulator names the features that it lacks itself.
        lines = [line for line in (report.stderr + smoke.stderr).splitlines() if "warning: TCG" not in line]
        print(*lines[-20:], sep="\n")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cpus", nargs="*", metavar="CPU", help=f"of {', '.join(CPUS)}; default: all")
    cpus = parser.parse_args().cpus or list(CPUS)
    if platform.machine() != "x86_64" or not shutil.which("qemu-x86_64"):
        print("old CPUs: NOT TESTED, needs an x86-64 processor and qemu-x86_64 (package qemu-user)")
        return 1
    with tempfile.TemporaryDirectory() as name:
        install_wheel(Path(name))
        wrong = [cpu for cpu in cpus if not passes(cpu, Path(name))]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
