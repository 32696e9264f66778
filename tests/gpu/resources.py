"""What the compiler says of each CUDA kernel: its registers, spills and stack, and how many blocks of it fit."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from typing import NamedTuple

# Kernels that may spill up to so many bytes, or have such a stack frame: a regular expression of the name, the bytes,
# and the reason.
ALLOWED = [
    (
        r"^thread_rows<CrossEntropyOp<float, float, \(Kind\)0>, 64, false>",
        24,
        "64 logits and the row's own values are just too much for the compiler for 12.0",
    ),
    (
        r"^streamed_rows<CrossEntropyOp<\w+, double,",
        100,
        "arithmetic in double has long subroutines, and is not there for its speed",
    ),
    (
        r"^thread_rows<SoftmaxOp<float, float>, 64, false>",
        210,
        "the compiler for 10.0 computes the places of all 64 classes beforehand; what is stored and loaded counts",
    ),
]


class Usage(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    registers: int
    stack: int
    spills: int  # bytes stored or loaded


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    answer = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return [short(name) for name in answer.stdout.splitlines()]


def short(name: str) -> str:
    """Without namespaces, the return type and the parameters."""
    name = re.sub(r"\b(softmax_ext|cuda|\w+_cu)::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def parse(log: str) -> dict[str, dict[str, Usage]]:
    """The report of ``ptxas -v``: for each kernel and architecture a line of its stack, and one of its registers."""
    usages: dict[str, dict[str, Usage]] = defaultdict(dict)
    name, arch, stack, spills = "", "", 0, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            name, arch, stack, spills = match[1], match[2], 0, 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            usages[name][arch] = Usage(int(match[1]), stack, spills)
            name = ""
    return usages


def complaint(name: str, usage: Usage) -> str:
    if max(usage.spills, usage.stack) <= max([size for pattern, size, _ in ALLOWED if re.search(pattern, name)] or [0]):
        return ""
    if usage.spills:
        return f"spills {usage.spills} B"
    return f"stack {usage.stack} B" if usage.stack else ""


def blocks_that_fit(registers: int, threads: int) -> int:
    """Blocks on a multiprocessor of compute capability 9.0, as far as registers and warps decide.

    A warp gets registers in units of 256, from those of one of the four schedulers. Shared memory is not counted.
    """
    warps = -(-threads // 32)
    a_warp = -(-32 * registers // 256) * 256
    most_warps = min(64, 4 * (65536 // 4 // a_warp))
    return min(32, most_warps // warps)
