"""The time of a step of linear_cross_entropy with each plan under the same budget: docs/performance.md's table.

python benchmarks/studies/plans.py             writes the table between its comments, in some minutes
python benchmarks/studies/plans.py --print     prints it and writes nothing

A step is forward and backward; each figure is the best of several. The budgets are shares of the logits' bytes. *rows*
has the largest chunk that fits and is of use, *classes* as many chunks as fit.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from softmax_ext import linear_cross_entropy, plans
from softmax_ext.plans import CLASSES, ROWS, Limits, LinearPlan, Problem

_DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- written by benchmarks/studies/plans.py -->", "<!-- end of the plans -->"
_SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)
_CASES = (
    ((2048, 768, 50257), torch.float32),
    ((2048, 768, 50257), torch.bfloat16),
    ((4096, 1024, 128256), torch.bfloat16),
    ((1024, 4096, 32000), torch.bfloat16),
)
_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Line(NamedTuple):
    """One budget: the plans that fit, the one that is chosen, and their times in ms."""

    budget: int
    rows: LinearPlan | None
    classes: LinearPlan | None
    chosen: LinearPlan
    times: dict[str, float]


@contextmanager
def _always(plan: LinearPlan) -> Iterator[None]:
    """Every call takes this plan."""
    choose = plans.choose
    plans.choose = lambda problem, limits: plan  # type: ignore[assignment]
    try:
        yield
    finally:
        plans.choose = choose


def _rows_plan(problem: Problem, budget: int) -> LinearPlan | None:
    most = min(plans._useful_chunk(problem), problem.rows)
    chunk = plans._largest_chunk(problem, ROWS, budget, most)
    return plans._plan(problem, ROWS, chunk) if chunk else None


class Steps:
    """Operands of a size, and the time of a step on them."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        rows, features, classes = size
        self.x = torch.randn(rows, features).to(dtype).requires_grad_()
        self.w = (0.02 * torch.randn(classes, features)).to(dtype).requires_grad_()
        self.y = torch.randint(0, classes, (rows,))

    def time(self, plan: LinearPlan | None) -> float:
        """Milliseconds of a step by a plan; of eager torch without one."""
        begin = time.perf_counter()
        if plan is None:
            loss = F.cross_entropy(F.linear(self.x, self.w), self.y)
        else:
            with _always(plan):
                loss = linear_cross_entropy(self.x, self.w, self.y)
        if plan is None:
            loss.backward()
        else:
            with _always(plan):
                loss.backward()
        self.x.grad = self.w.grad = None
        return 1000 * (time.perf_counter() - begin)


def measure(size: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> tuple[float, list[Line]]:
    """Eager torch's time, and a line for each share; all take turns."""
    problem = Problem(*size, dtype, "cpu")
    lines = []
    for share in _SHARES:
        budget = int(share * size[0] * size[2] * dtype.itemsize)
        try:
            chosen = plans.choose(problem, Limits(memory=budget))
        except ValueError:
            continue
        rows, classes = _rows_plan(problem, budget), plans._classes_plan(problem, budget)
        lines.append(Line(budget, rows, classes, chosen, {ROWS: math.inf, CLASSES: math.inf, chosen.name: math.inf}))
    steps, eager = Steps(size, dtype), math.inf
    for _ in range(repeats):
        eager = min(eager, steps.time(None))
        for line in lines:
            for plan in {plan.name: plan for plan in (line.rows, line.classes, line.chosen) if plan}.values():
                line.times[plan.name] = min(line.times[plan.name], steps.time(plan))
    return eager, lines


def _cell(plan: LinearPlan | None, line: Line) -> str:
    if plan is None:
        return "does not fit"
    text = f"{line.times[plan.name]:.0f} ({plan.chunks} x {plan.chunk})"
    return f"**{text}**" if plan == line.chosen else text


def table(repeats: int) -> str:
    """The whole table."""
    out = [
        "| rows x width x classes | eager, ms | budget | rows: ms (chunks x rows) | classes: ms (chunks x classes) |",
        "|---|---|---|---|---|",
    ]
    for size, dtype in _CASES:
        eager, lines = measure(size, dtype, repeats)
        name = f"{'x'.join(map(str, size))}-{_SHORT[dtype]}"
        for line in lines:
            share = round(size[0] * size[2] * dtype.itemsize / line.budget)
            rows = _cell(line.rows, line)
            if line.chosen.name == plans.WHOLE:
                rows = f"**{line.times[plans.WHOLE]:.0f} (whole)**"
            budget = f"1/{share}: {line.budget / 2**20:.0f} MiB"
            out.append(f"| {name} | {eager:.0f} | {budget} | {rows} | {_cell(line.classes, line)} |")
    return "\n".join(out)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    text = table(options.repeats)
    if options.print:
        print(text)
        return
    before, rest = _DOCUMENT.read_text().split(BEGIN)
    _DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
