"""What the plain CUDA kernels may cost on compute capability 9.0: LIMITS, and instructions.csv, what they cost last.

The cards wait for instructions before they wait for memory, so each costs time. docs/performance.md says more.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Literal, NamedTuple

from instructions import Instruction, count, main_loop
from resources import Usage, blocks_that_fit

ARCH = "90"
RECORD = Path(__file__).with_name("instructions.csv")
TOLERANCE = 1.1  # times what was recorded: another nvcc counts a little differently


class Limit(NamedTuple):
    """Of each kernel whose name matches."""

    kernel: str  # a regular expression
    what: Literal["forward", "backward", "fused"]
    instructions: float  # an element, at most
    registers: int  # of a thread, at most
    threads: int  # of a block, as it is launched
    elements: int  # in 16 bytes
    chunks: int = 0  # of 16 bytes that a thread keeps; for what has no loop
    inputs: int = 1


def streamed(element: str, size: int) -> str:
    return rf"^streamed_rows<CrossEntropyOp<{element}, float, \(Kind\)0>, {size}, \(Scope\)1"


def kept(element: str, scope: int) -> str:
    return rf"^kept_rows<CrossEntropyOp<{element}, float, \(Kind\)0>, \(Scope\){scope}"


# forward: the loop that loads and stores nothing. backward: the loop that does both. fused: the whole kernel, with what
# only some threads or some rows run.
LIMITS = [
    Limit(streamed("__nv_bfloat16", 8), "forward", 6.5, 64, 256, elements=8),
    Limit(streamed("__nv_bfloat16", 8), "backward", 9, 64, 256, elements=8),
    Limit(streamed("float", 4), "forward", 7.5, 64, 256, elements=4),
    Limit(streamed("float", 4), "backward", 10, 64, 256, elements=4),
    Limit(kept("__nv_bfloat16", 2), "fused", 37, 64, 512, elements=8, chunks=8),
    Limit(kept("float", 2), "fused", 58, 64, 1024, elements=4, chunks=8),
]


def has_limit(kernel: str) -> bool:
    return any(re.search(limit.kernel, kernel) for limit in LIMITS)


class Cost(NamedTuple):
    """A line of instructions.csv."""

    kernel: str
    what: str
    instructions: float  # an element
    registers: int
    stack: int
    blocks: int  # that fit on a multiprocessor


def cost(limit: Limit, kernel: str, code: list[Instruction], usage: Usage) -> Cost | None:
    """None where the kernel has no such loop."""
    counted = count(code) if limit.chunks else main_loop(code, stores=limit.what == "backward")
    if counted is None:
        return None
    elements = (limit.chunks or counted.loads / limit.inputs) * limit.elements
    each = round(counted.instructions / elements, 1)
    return Cost(kernel, limit.what, each, usage.registers, usage.stack, blocks_that_fit(usage.registers, limit.threads))


def complaints(limit: Limit, found: Cost, recorded: Cost | None) -> list[str]:
    """What is wrong with a kernel, in sentences; `recorded`: what it cost last, if that is known."""
    wrong = []
    if found.instructions > limit.instructions:
        wrong.append(f"{found.instructions} instructions an element; at most {limit.instructions} are wanted")
    if found.registers > limit.registers:
        wrong.append(f"{found.registers} registers; at most {limit.registers} are wanted")
    if found.stack:
        wrong.append(f"a stack frame of {found.stack} B")
    if recorded is None:
        wrong.append(f"no record in {RECORD.name}")
    else:
        if found.instructions > TOLERANCE * recorded.instructions:
            wrong.append(f"{found.instructions} instructions an element; {recorded.instructions} were recorded")
        if found.blocks < recorded.blocks:
            wrong.append(f"{found.blocks} blocks fit on a multiprocessor; {recorded.blocks} were recorded")
    return [f"{found.kernel}, {found.what}: {sentence}" for sentence in wrong]


def check(
    codes: dict[str, list[Instruction]], usages: dict[str, Usage], record: dict[tuple[str, str], Cost] | None
) -> tuple[list[Cost], list[str]]:
    """The cost of every kernel that a limit is for, and what is wrong. `record` None: nothing is compared with it."""
    costs, wrong = [], []
    for limit in LIMITS:
        names = [name for name in sorted(codes) if re.search(limit.kernel, name)]
        if not names:
            wrong.append(f"no kernel is called {limit.kernel}, of which the {limit.what} is limited")
        for name in names:
            found = cost(limit, name, codes[name], usages[name])
            if found is None:
                wrong.append(f"{name} has no loop that is its {limit.what}")
                continue
            costs.append(found)
            wrong += complaints(limit, found, found if record is None else record.get((name, limit.what)))
    return costs, wrong


def read_record() -> dict[tuple[str, str], Cost]:
    if not RECORD.exists():
        return {}
    with RECORD.open(newline="") as file:
        rows = [
            Cost(row["kernel"], row["what"], float(row["instructions"]), *(int(row[name]) for name in Cost._fields[3:]))
            for row in csv.DictReader(file)
        ]
    return {(row.kernel, row.what): row for row in rows}


def write_record(costs: list[Cost]) -> None:
    with RECORD.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Cost._fields)
        writer.writerows(costs)


def markdown(costs: list[Cost]) -> str:
    """As docs/performance.md has it."""
    lines = [
        "| kernel | | instructions an element | registers | stack | blocks that fit |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| `{c.kernel}` | {c.what} | {c.instructions} | {c.registers} | {c.stack} | {c.blocks} |" for c in costs]
    return "\n".join(lines)
