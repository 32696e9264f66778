"""Errors of softmax_ext and of eager torch in units in the last place, against 60 digits: docs/accuracy.md's tables.

python benchmarks/studies/accuracy.py             writes the tables between their comments, in minutes (make accuracy)
python benchmarks/studies/accuracy.py --print     prints them and writes nothing
python benchmarks/studies/accuracy.py --emulated  prints those of the CUDA kernels, run by tests/emulator/

mpmath computes every result from the logits as they are stored in their dtype. The unit in the last place (ULP) of an
exact value is the distance of the dtype's numbers around it; below the smallest normal number it is that number's.
Ends with status 1 where torch is ahead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor

import softmax_ext
from softmax_ext import ops

_ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(_ROOT / "benchmarks"))

from readme import between  # noqa: E402  from that folder

_DOCUMENT = _ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- written by benchmarks/studies/accuracy.py -->", "<!-- end of the tables -->"
_DIGITS = 60
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_BATCH = 10  # rows that a mean is taken over

LOSS, MEAN_LOSS = "loss", "mean loss"
GRADIENT, MEAN_GRADIENT = "gradient", "gradient of the mean"
SOFTMAX, LOG_SOFTMAX = "softmax", "log_softmax"


# ---- inputs ----


class Problem(NamedTuple):
    """Logits [rows, classes] and their classes [rows]; the logits are capped if there is a softcap."""

    logits: Tensor
    target: Tensor
    softcap: float | None = None

    def batches(self) -> list[Problem]:
        """The rows, so many at a time."""
        parts = zip(self.logits.split(_BATCH), self.target.split(_BATCH), strict=True)
        return [Problem(*part, self.softcap) for part in parts]


def _normal(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(rows, classes, dtype=torch.float64), torch.randint(classes, (rows,))


def random(dtype: torch.dtype, rows: int, classes: int) -> Problem:
    """Normal logits."""
    logits, target = _normal(rows, classes)
    return Problem(logits.to(dtype), target)


def peaked(dtype: torch.dtype, rows: int, classes: int) -> Problem:
    """The same, the target's raised so that its probability is 0.999."""
    logits, target = _normal(rows, classes)
    logits = logits.to(dtype).double()
    others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return Problem(logits.scatter(1, target[:, None], others + torch.log(torch.tensor(999.0))).to(dtype), target)


def offset(dtype: torch.dtype, rows: int, classes: int) -> Problem:
    """1e4 added; where the dtype's numbers are far apart there, the logits are too."""
    logits, target = _normal(rows, classes)
    spacing = 2**13 * torch.finfo(dtype).eps  # around 1e4
    return Problem((1e4 + max(1.0, spacing / 3) * logits).to(dtype), target)


def flat(dtype: torch.dtype, rows: int, classes: int) -> Problem:
    """0.1 times normal: all probabilities are about the same."""
    return Problem((0.1 * torch.randn(rows, classes, dtype=torch.float64)).to(dtype), torch.randint(classes, (rows,)))


def apart(dtype: torch.dtype, rows: int, classes: int) -> Problem:
    """The same in memory where the logits of a class, not of a row, are adjacent."""
    problem = flat(dtype, rows, classes)
    return problem._replace(logits=problem.logits.t().contiguous().t())


def capped(dtype: torch.dtype, rows: int, classes: int) -> Problem:
    """20 times normal, capped to (-10, 10)."""
    logits, target = _normal(rows, classes)
    return Problem((20 / 3 * logits).to(dtype), target, 10.0)


class Input(NamedTuple):
    """A kind of logits, and how many of them."""

    make: Callable[[torch.dtype, int, int], Problem]
    rows: int
    classes: int


INPUTS = {
    "random": Input(random, 400, 200),
    "peaked": Input(peaked, 400, 200),
    "offset": Input(offset, 400, 200),
    "10 classes": Input(random, 5000, 10),
    "33 classes, flat": Input(flat, 1500, 33),
    "100 classes, apart": Input(apart, 500, 100),
    "1e5 classes": Input(random, 2, 100_000),
    "capped": Input(capped, 400, 200),
}


# ---- exact results ----


class Exact(NamedTuple):
    """Values of 60 digits as the sum of two float64: 100 bits and more."""

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, values: list[mpmath.mpf]) -> Exact:
        """The two parts of each."""
        high = [float(value) for value in values]
        low = [float(value - part) for value, part in zip(values, high, strict=True)]
        return cls(torch.tensor(high, dtype=torch.float64), torch.tensor(low, dtype=torch.float64))


def ulps(actual: Tensor, exact: Exact) -> Tensor:
    """The error of each value in the unit in the last place of the exact one, in the dtype of ``actual``."""
    info = torch.finfo(actual.dtype)
    magnitude = exact.high.abs().clamp(min=info.smallest_normal)
    power = magnitude / torch.frexp(magnitude).mantissa / 2  # of two, the largest not above it; exactly
    unit = info.eps * power
    difference = (actual.detach().flatten().double() - exact.high) - exact.low  # of neighbours: the first is exact
    return difference.abs() / unit


class _Row:
    """One row of logits in 60 digits."""

    def __init__(self, logits: Tensor, target: int, softcap: float | None = None) -> None:
        values = [mpmath.mpf(x) for x in logits.double().tolist()]
        slopes = [mpmath.mpf(1)] * len(values)
        if softcap is not None:
            cap = mpmath.mpf(softcap)
            slopes = [mpmath.sech(x / cap) ** 2 for x in values]
            values = [cap * mpmath.tanh(x / cap) for x in values]
        most = max(values)
        self._below = [x - most for x in values]
        exponentials = [mpmath.exp(x) for x in self._below]
        total = mpmath.fsum(exponentials)
        self._log_total = mpmath.log(total)
        self.softmax = [e / total for e in exponentials]
        self.gradient = list(self.softmax)
        self.gradient[target] -= 1
        self.gradient = [g * slope for g, slope in zip(self.gradient, slopes, strict=True)]
        self.loss = self._log_total - self._below[target]

    def log_softmax(self) -> list[mpmath.mpf]:
        return [x - self._log_total for x in self._below]


def exact_results(problem: Problem) -> dict[str, Exact]:
    """Every result of a problem, flat; the means are of its batches. A softmax has no cap."""
    with mpmath.workdps(_DIGITS):
        rows = [_Row(x, int(y), problem.softcap) for x, y in zip(problem.logits, problem.target, strict=True)]
        batches = [rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)]
        results = {
            LOSS: Exact.of([row.loss for row in rows]),
            MEAN_LOSS: Exact.of([mpmath.fsum(row.loss for row in batch) / len(batch) for batch in batches]),
            GRADIENT: Exact.of([g for row in rows for g in row.gradient]),
            MEAN_GRADIENT: Exact.of([g / len(batch) for batch in batches for row in batch for g in row.gradient]),
        }
        if problem.softcap is None:
            results[SOFTMAX] = Exact.of([p for row in rows for p in row.softmax])
            results[LOG_SOFTMAX] = Exact.of([value for row in rows for value in row.log_softmax()])
        return results


# ---- results to judge ----

Loss = Callable[..., Tensor]


def _loss_and_gradient(function: Loss, problem: Problem, reduction: str) -> tuple[Tensor, Tensor]:
    logits = problem.logits.detach().clone().requires_grad_()
    options = {} if problem.softcap is None else {"softcap": problem.softcap}
    loss = function(logits, problem.target, reduction=reduction, **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), logits.grad


def _results(loss: Loss, softmax: Loss, log_softmax: Loss, problem: Problem) -> dict[str, Tensor]:
    losses, gradient = _loss_and_gradient(loss, problem, "none")
    means = [_loss_and_gradient(loss, batch, "mean") for batch in problem.batches()]
    results = {
        LOSS: losses,
        MEAN_LOSS: torch.stack([mean for mean, _ in means]),
        GRADIENT: gradient,
        MEAN_GRADIENT: torch.cat([gradient for _, gradient in means]),
    }
    if problem.softcap is None:
        results |= {SOFTMAX: softmax(problem.logits, -1), LOG_SOFTMAX: log_softmax(problem.logits, -1)}
    return results


def _torch_loss(logits: Tensor, target: Tensor, *, reduction: str, softcap: float | None = None) -> Tensor:
    capped_logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(capped_logits, target, reduction=reduction)


def _precomputed(*arguments: Tensor, **options: object) -> Tensor:
    return softmax_ext.cross_entropy(*arguments, precompute_grad=True, **options)


def torch_errors(problem: Problem, exact: dict[str, Exact]) -> dict[str, Tensor]:
    """Of eager torch, for each result."""
    results = _results(_torch_loss, F.softmax, F.log_softmax, problem)
    return {name: ulps(value, exact[name]) for name, value in results.items()}


def our_errors(problem: Problem, exact: dict[str, Exact]) -> dict[str, Tensor]:
    """Of softmax_ext: of the gradient's two strategies the larger one, value by value."""
    errors: dict[str, Tensor] = {}
    for loss in (softmax_ext.cross_entropy, _precomputed):
        for name, value in _results(loss, softmax_ext.softmax, softmax_ext.log_softmax, problem).items():
            error = ulps(value, exact[name])
            errors[name] = torch.maximum(errors.get(name, error), error)
    return errors


# ---- tables ----


class Cell(NamedTuple):
    """The errors of one result of one input, in ULP."""

    input: str
    result: str
    ours_max: float
    torch_max: float
    ours_mean: float
    torch_mean: float


class Posed(NamedTuple):
    """A problem with its exact results."""

    name: str
    problem: Problem
    exact: dict[str, Exact]


def pose(dtype: torch.dtype, inputs: dict[str, Input]) -> list[Posed]:
    """The inputs in a dtype, always from the same seed."""
    torch.manual_seed(0)
    problems = {name: kind.make(dtype, kind.rows, kind.classes) for name, kind in inputs.items()}
    return [Posed(name, problem, exact_results(problem)) for name, problem in problems.items()]


def cells(posed: list[Posed]) -> list[Cell]:
    """Every input and result."""
    found = []
    for name, problem, exact in posed:
        ours, torchs = our_errors(problem, exact), torch_errors(problem, exact)
        for result, error in ours.items():
            both = (error, torchs[result])
            found.append(Cell(name, result, *(f(e).item() for f in (torch.max, torch.mean) for e in both)))
    return found


# Few roundings make up their errors. The largest may then be torch's or ours by chance: a tenth more counts as equal.
FLAT = [name for name, input in INPUTS.items() if input.make in (flat, apart)]


def _fails(cell: Cell) -> bool:
    by_chance = cell.input in FLAT and cell.ours_max <= 1.1 * cell.torch_max
    return bool(set(behind(cell)) - ({"max"} if by_chance else set()))


def behind(cell: Cell) -> list[str]:
    """Which of the cell's figures are larger than torch's, by more than the hundredth of an ULP that a table shows."""
    pairs = {"max": (cell.ours_max, cell.torch_max), "mean": (cell.ours_mean, cell.torch_mean)}
    return [which for which, (ours, torchs) in pairs.items() if ours > torchs + 0.005]


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 99.5 else f"{value:.3g}"


def table(dtype: torch.dtype, found: list[Cell]) -> str:
    """In Markdown, under the dtype as a heading; below it, where torch is ahead."""
    head = ["logits", "result", "softmax_ext, max", "torch, max", "softmax_ext, mean", "torch, mean"]
    lines = [f"### {str(dtype).removeprefix('torch.')}", "", f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * 4]
    for cell in found:
        lines.append(f"| {cell.input} | {cell.result} | {' | '.join(_figure(value) for value in cell[2:])} |")
    worse = [f"{which} of {cell.input}, {cell.result}" for cell in found for which in behind(cell)]
    lines += ["", f"torch is ahead in {len(worse)} of {2 * len(found)}{': ' if worse else ''}{'; '.join(worse)}."]
    return "\n".join(lines)


def _emulate_cuda() -> None:
    """Puts the emulator's kernels in the place of the CPU's."""
    sys.path.append(str(_ROOT / "tests" / "emulator"))
    import emulator

    torch.ops.load_library(emulator.build("libemulated.so"))


def _environment() -> str:
    isa = ops.library.selected_isa()
    return f"softmax_ext {softmax_ext.__version__} with {isa} kernels, torch {torch.__version__}."


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--emulated", action="store_true", help="the CUDA kernels, on the CPU; writes nothing")
    options = parser.parse_args(arguments)
    if options.emulated:
        _emulate_cuda()
    found = {dtype: cells(pose(dtype, INPUTS)) for dtype in DTYPES}
    text = "\n\n".join([_environment(), *(table(dtype, of_dtype) for dtype, of_dtype in found.items())])
    if options.print or options.emulated:
        print(text)
    else:
        _DOCUMENT.write_text(between(_DOCUMENT.read_text(), BEGIN, END, text))
    return 1 if any(_fails(cell) for of_dtype in found.values() for cell in of_dtype) else 0


if __name__ == "__main__":
    sys.exit(main())
