"""Counts machine instructions in the text of ``cuobjdump -sass``: those of a kernel, and those of its loops.

A loop is what compilers call a natural loop: a branch backwards to a block that every path to the branch passes, and
all blocks between the two. So code that the compiler has moved behind the kernel's end, from where it jumps back, makes
no loop.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate that it depends on, or nothing
    opcode: str
    operands: str

    @property
    def wide_loads(self) -> bool:
        return re.fullmatch(r"LDG\b.*\.128\b.*", self.opcode) is not None

    @property
    def wide_stores(self) -> bool:
        return re.fullmatch(r"STG\b.*\.128\b.*", self.opcode) is not None


class Count(NamedTuple):
    """Of some instructions, without the padding."""

    instructions: int
    loads: int  # of 16 bytes, from global memory
    stores: int  # of 16 bytes, to global memory


def find_cuobjdump(nvcc: str | None = None) -> str | None:
    """On PATH, in the CUDA toolkit or in the package nvidia-cuda-cuobjdump; it finds its nvdisasm beside it."""
    places = [Path(found)] if (found := shutil.which("cuobjdump")) else []
    if nvcc:
        places.append(Path(nvcc).resolve().with_name("cuobjdump"))
    if package := importlib.util.find_spec("nvidia"):
        places += [
            path for one in package.submodule_search_locations or [] for path in Path(one).glob("*/bin/cuobjdump")
        ]
    return next((str(path) for path in places if path.exists()), None)


def disassemble(cuobjdump: str, file: Path, arch: str, kernels: list[str]) -> str:
    """The machine code of those kernels, by their mangled names."""
    command = [cuobjdump, "-sass", "-arch", f"sm_{arch}", "-fun", ",".join(kernels), str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name."""
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            code = kernels.setdefault(match[1], [])
        elif match := INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return kernels


def count(code: list[Instruction]) -> Count:
    return Count(
        sum(one.opcode != "NOP" for one in code),
        sum(one.wide_loads for one in code),
        sum(one.wide_stores for one in code),
    )


# ---- loops -----------------------------------------------------------------------------------------------------------


def target_of(one: Instruction) -> int | None:
    """Where a branch or a call goes; None where it goes nowhere, or by a table."""
    is_jump = one.opcode.partition(".")[0] in ("BRA", "CALL")
    return int(re.split(r",\s*|\s+", one.operands)[-1], 16) if is_jump else None


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction the addresses at which it may go on.

    The table of a BRX, which is a switch, is not in the text. It is taken to go wherever nothing else does, from there
    to the next BRX.
    """
    targets = {target_of(one) for one in code}
    answer: list[list[int]] = []
    table: list[int] = []
    for i, one in enumerate(code):
        name = one.opcode.partition(".")[0]
        comes = True  # to the next instruction. CALL does, in the end, and BSYNC stands right before where it waits.
        goes: list[int] = []
        if name == "BRA":
            goes = [target_of(one)]
            comes = bool(one.guard) or len(re.split(r",\s*|\s+", one.operands)) > 1
        elif name == "BRX":
            goes = table = []
            comes = bool(one.guard)
        elif name in ("EXIT", "RET"):
            comes = bool(one.guard)
        elif name in ("JMP", "JMX", "BRXU"):
            raise ValueError(f"can't follow {one.opcode} {one.operands} at {one.address:#x}")
        answer.append(goes)
        if i + 1 < len(code):
            following = code[i + 1].address
            if comes:
                goes.append(following)
            elif following not in targets:
                table.append(following)
    return answer


def blocks_of(code: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """The basic blocks by their first address, and which follow each."""
    follow = successors(code)
    starts = {code[0].address}
    for after, following in zip(follow, code[1:], strict=False):
        if after != [following.address]:
            starts.update(after, [following.address])
    blocks: dict[int, list[Instruction]] = {}
    edges: dict[int, list[int]] = {}
    start = code[0].address
    for one, after in zip(code, follow, strict=True):
        if one.address in starts:
            start = one.address
            blocks[start] = []
        blocks[start].append(one)
        edges[start] = after
    return blocks, edges


def dominators(first: int, edges: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, those that every path to it passes, itself among them."""
    order: list[int] = []
    stack, seen = [first], {first}
    while stack:
        block = stack.pop()
        order.append(block)
        for after in edges[block]:
            if after not in seen:
                seen.add(after)
                stack.append(after)
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for after in edges[block]:
            before[after].append(block)
    answer = {block: set(order) for block in order}
    answer[first] = {first}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            passed = set.intersection(*(answer[one] for one in before[block])) | {block}
            changed = changed or passed != answer[block]
            answer[block] = passed
    return answer


def loops(code: list[Instruction]) -> list[set[int]]:
    """Each loop as the set of its blocks' first addresses; branches back to the same block are one loop."""
    blocks, edges = blocks_of(code)
    passed = dominators(code[0].address, edges)
    before: dict[int, list[int]] = {block: [] for block in blocks}
    for block in passed:
        for after in edges[block]:
            before[after].append(block)
    found: dict[int, set[int]] = {}
    for block in passed:
        for head in edges[block]:
            if head not in passed[block]:
                continue
            body = found.setdefault(head, {head})
            stack = [block]
            while stack:
                one = stack.pop()
                if one not in body:
                    body.add(one)
                    stack += before[one]
    return list(found.values())


def main_loop(code: list[Instruction], stores: bool) -> Count | None:
    """The innermost loop of most loads of 16 bytes, among those with or those without stores of 16 bytes.

    Innermost: no loop in it loads 16 bytes. Of several with as many loads, the one of most instructions.
    """
    blocks, _ = blocks_of(code)
    counted = []
    for body in loops(code):
        whole = count([one for start in body for one in blocks[start]])
        if whole.loads:
            counted.append((body, whole))
    innermost = [one for body, one in counted if not any(other < body for other, _ in counted)]
    fitting = [one for one in innermost if bool(one.stores) == stores]
    return max(fitting, key=lambda one: (one.loads, one.instructions), default=None)
