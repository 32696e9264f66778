"""The plans of a linear cross entropy: which one a call takes, in chunks of which size, and what memory that is.

A plan is chosen once for a call, from shapes and dtypes alone. chunks.py and class_chunks.py run it.

- **whole**: all logits in one buffer, three products. In bfloat16 the product itself is the weight's gradient: it adds
  up in float32 and is rounded once.
- **rows**: the logits of a chunk of rows at a time. In half types the weight's gradient is added up over the chunks in
  float32.
- **classes**: the logits of a chunk of classes at a time, and those of a chunk twice unless it is kept: up to four
  products. The weight's gradient is complete with each chunk. In half types the input's is added up in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from . import checks, matmul

WHOLE, ROWS, CLASSES = "whole", "rows", "classes"

# A smaller buffer of logits is not worth the time that it costs.
_SMALL_BUFFER_BYTES = 32 << 20
# Where each chunk is added to a float32 sum, more rows than these hardly save any time.
_MOST_ROWS_OF_A_SUM = 16384
# The size of a default chunk is a multiple of this.
_STEP = 16
# So many chunks of classes are kept if each can have as many classes as make a product fast.
_MOST_KEPT = 8
# What is known of a row from some of its classes: csrc/row_part.h, without statistics.
_PART_BYTES = 24


class LinearPlan(NamedTuple):
    """How :func:`softmax_ext.linear_cross_entropy` computes a call.

    Attributes:
        name: "whole", "rows" or "classes".
        chunk: the number of rows of a chunk; with "classes" the number of classes.
        chunks: the number of chunks.
        kept: how many chunks have their logits in memory at once. With "classes" the others are computed twice.
        products: the matrix products of a training step, each of N x D x C multiplications.
        bytes: the most memory that forward and backward take, beyond what was there before the call and beyond the
            gradients of input and weight.
    """

    name: str
    chunk: int
    chunks: int
    kept: int
    products: float
    bytes: int


class Limits(NamedTuple):
    """The keywords of a call that say how it is computed; see linear_cross_entropy."""

    chunk_rows: int | None = None
    memory: int | None = None
    logits_dtype: torch.dtype | None = None
    live_rows: int | None = None

    @staticmethod
    def split(arguments: Sequence[Any]) -> tuple[Limits, Sequence[Any]]:
        """Splits arguments that begin with the limits into these and the other arguments."""
        count = len(Limits._fields)
        return Limits(*arguments[:count]), arguments[count:]


LIMITS_SCHEMA = "SymInt? chunk_rows, SymInt? memory, ScalarType? logits_dtype, SymInt? live_rows"
"""The fields of Limits in the schema of an operator."""


class Problem(NamedTuple):
    """What a plan depends on besides the limits.

    Attributes:
        rows: N.
        features: D.
        classes: C, those of all positions K together.
        dtype: that of input and weight.
        device: its type.
        needs_input: whether the input's gradient is computed.
        needs_weight: whether the weight's gradient is computed.
        target_bytes: the size of an element of the target's gradient; 0 if that is not computed.
        positions: K.
        logits_dtype: that of the logits; None: ``dtype``.
    """

    rows: int
    features: int
    classes: int
    dtype: torch.dtype
    device: str
    needs_input: bool = True
    needs_weight: bool = True
    target_bytes: int = 0
    positions: int = 1
    logits_dtype: torch.dtype | None = None

    @property
    def logit_bytes(self) -> int:
        """The size of a logit."""
        return (self.logits_dtype or self.dtype).itemsize

    @property
    def row_bytes(self) -> int:
        """The size of a row of logits."""
        return self.classes * self.logit_bytes


def default_chunk_rows(rows: int, row_bytes: int, device: str) -> int:
    """A ninth of the rows or as many as fit into 32 MiB, whichever is more, but within bounds.

    The bounds are 128 to 512 rows on a CPU and 1024 to 4096 on a GPU. With fewer rows the weight is read too often for
    the arithmetic; with more rows the products get no faster. ``row_bytes`` is the size of a row of logits.
    """
    least, most = _bounds(device)
    fitting = _SMALL_BUFFER_BYTES // max(row_bytes, 1)
    return min(max(rows // 144 * _STEP, fitting // _STEP * _STEP, least), most)


def _bounds(device: str) -> tuple[int, int]:
    return (128, 512) if device == "cpu" else (1024, 4096)


def _useful_classes(device: str) -> int:
    """With fewer classes in a chunk its products are slower."""
    return 1024 if device == "cpu" else 4096


# ---- dtypes of the gradients ----


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient that forward computes, before it is multiplied by the upstream gradient."""
    return torch.float32 if dtype == torch.float16 else dtype


def weight_sum_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the plan ``name`` adds up the weight's gradient."""
    return torch.float32 if name == ROWS and dtype.itemsize == 2 else gradient_dtype(dtype)


def input_sum_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the plan ``name`` adds up the input's gradient."""
    return torch.float32 if name == CLASSES and dtype.itemsize == 2 else gradient_dtype(dtype)


# ---- memory ----


def converting_bytes(counts: Sequence[int], wide: int, narrow: int) -> int:
    """The most memory beyond the results while sums are converted one by one, the smallest first, and then freed.

    Args:
        counts: the number of elements of each.
        wide: the size of an element of a sum.
        narrow: the size of an element of a result.
    """
    peaks, kept = [0], 0
    for count in sorted(counts, reverse=True):
        peaks.append(count * wide + kept)
        kept += count * (wide - narrow)
    return max(peaks)


def _bytes(problem: Problem, name: str, chunk: int, kept: int = 1) -> int:
    """The ``bytes`` of a plan with ``kept`` chunks of ``chunk`` rows or classes at once."""
    rows, features, classes, dtype, device, needs_input, needs_weight, target_bytes, positions, _ = problem
    of_input = input_sum_dtype(name, dtype) if needs_input else dtype
    of_weight = weight_sum_dtype(name, dtype) if needs_weight else dtype
    # The number of elements of each sum that is wider than its gradient.
    wide = [rows * features] * (of_input != dtype) + [classes * features] * (of_weight != dtype)
    shape = (rows, chunk) if name == CLASSES else (chunk, classes)
    logits = shape[0] * shape[1]
    buffers = kept * logits * problem.logit_bytes
    if target_bytes:  # the kernel writes both gradients into new memory
        buffers += logits * (problem.logit_bytes + target_bytes)
    if name == CLASSES:
        buffers += 2 * rows * positions * _PART_BYTES
    widest = max(of_input, of_weight, key=_size)
    scratch = matmul.scratch_bytes(shape[0], features, shape[1], dtype, widest, device, name == CLASSES)
    if problem.logit_bytes > dtype.itemsize:
        scratch = max(scratch, matmul.projecting_bytes(shape[0], features, shape[1], device))
    computing = buffers + scratch + sum(wide) * (4 - dtype.itemsize)
    return max(computing, converting_bytes(wide, 4, dtype.itemsize)) if rows else 0


def _size(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _largest_chunk(problem: Problem, name: str, budget: int, most: int) -> int:
    """The largest chunk, up to ``most``, with which a plan takes no more than ``budget``; 0 if there is none."""
    least = max(problem.positions, 1) if name == CLASSES else 1
    for step in (least * _STEP, least):
        low, high = 0, most // step
        while low < high:
            middle = (low + high + 1) // 2
            if _bytes(problem, name, middle * step) <= budget:
                low = middle
            else:
                high = middle - 1
        if low:
            return low * step
    return 0


# ---- the choice ----


def _plan(problem: Problem, name: str, chunk: int) -> LinearPlan:
    chunk = max(min(chunk, problem.rows), 1)
    return LinearPlan(name, chunk, -(-problem.rows // chunk), 1, 3, _bytes(problem, name, chunk))


def _classes_plan(problem: Problem, memory: int) -> LinearPlan | None:
    """The plan *classes* that keeps as many logits as ``memory`` holds; None if it does not fit."""
    columns = _largest_chunk(problem, CLASSES, memory, problem.classes)
    if not columns:
        return None
    useful = max(_useful_classes(problem.device), problem.positions)
    kept = min(max(columns // useful, 1), _MOST_KEPT)
    chunk = columns // kept
    step = problem.positions * (_STEP if chunk >= problem.positions * _STEP else 1)
    chunk = chunk // step * step
    chunks = -(-problem.classes // chunk)
    chunk = min(chunk, -(-problem.classes // (chunks * step)) * step)  # so that the last one, which is kept, is no rest
    kept = min(kept, chunks)
    recomputed = (chunks - kept) * chunk / problem.classes
    return LinearPlan(CLASSES, chunk, chunks, kept, round(3 + recomputed, 2), _bytes(problem, CLASSES, chunk, kept))


def _useful_chunk(problem: Problem) -> int:
    """With more rows in a chunk *rows* gets no faster."""
    sums = problem.needs_weight and weight_sum_dtype(ROWS, problem.dtype) != problem.dtype
    return _MOST_ROWS_OF_A_SUM if sums else _bounds(problem.device)[1]


def _rows_plan(problem: Problem) -> LinearPlan:
    """The plan *rows* with its default chunk: as many rows as take no more memory than ``default_chunk_rows``.

    These are more where converting the weight's sum takes the most.
    """
    default = default_chunk_rows(problem.rows, problem.row_bytes, problem.device)
    budget = _bytes(problem, ROWS, default)
    return _plan(problem, ROWS, max(_largest_chunk(problem, ROWS, budget, _useful_chunk(problem)), default))


@lru_cache(maxsize=1024)
def choose(problem: Problem, limits: Limits) -> LinearPlan:
    """The plan of a call; ValueError if no plan fits into the memory.

    Args:
        problem: the shapes and dtypes.
        limits: ``chunk_rows`` stands for *rows*. ``memory``, the most bytes that the plan may take, is by default as
            many as *rows* takes with its default chunk. ``live_rows`` has no part in it.
    """
    chunk_rows, memory, logits_dtype, _ = limits
    problem = problem._replace(logits_dtype=logits_dtype)
    if chunk_rows is not None:
        return _plan(problem, ROWS, chunk_rows)
    whole = _plan(problem, WHOLE, problem.rows)
    if memory is None:
        rows = _rows_plan(problem)
        return whole if whole.bytes <= rows.bytes else rows
    if whole.bytes <= memory:
        return whole
    chunk = _largest_chunk(problem, ROWS, memory, min(_useful_chunk(problem), problem.rows))
    if chunk >= _bounds(problem.device)[0]:
        return _plan(problem, ROWS, chunk)
    # Each chunk reads one of the operands whole: the larger the chunk, the fewer times.
    classes = _classes_plan(problem, memory)
    if classes is not None and classes.chunk > chunk:
        return classes
    if not chunk:
        least = min(whole.bytes, _bytes(problem, ROWS, 1), _bytes(problem, CLASSES, problem.positions))
        checks.refuse(ValueError, "linear_cross_entropy", "memory", f"be at least {least} bytes here", f"{memory}")
    return _plan(problem, ROWS, chunk)


def all_plans(problem: Problem, memory: int | None) -> list[LinearPlan]:
    """Each plan as it would be with this ``memory``, whether it is chosen or not, the fastest first."""
    rows = _rows_plan(problem)
    budget = rows.bytes if memory is None else memory
    chosen = choose(problem, Limits(memory=memory))
    found = [_plan(problem, WHOLE, problem.rows), chosen if chosen.name == ROWS else rows]
    classes = _classes_plan(problem, budget)
    return [*found, classes] if classes is not None else found


def linear_plan(
    rows: int,
    in_features: int,
    num_classes: int,
    dtype: torch.dtype,
    *,
    memory: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LinearPlan:
    """The plan by which :func:`softmax_ext.linear_cross_entropy` computes a call.

    It is the plan of a training step with class indices and reduction "mean" or "sum" in which input and weight need a
    gradient. A call with fewer gradients may take another. Nothing is computed or allocated.

    Args:
        rows: N, the rows of the input.
        in_features: D.
        num_classes: C; of a weight ``(C, d1, ..., in_features)`` the product ``C * d1 * ...``.
        dtype: that of input and weight; under autocast that of autocast.
        memory: as in :func:`softmax_ext.linear_cross_entropy`.
        chunk_rows: as in :func:`softmax_ext.linear_cross_entropy`.
        logits_dtype: as in :func:`softmax_ext.linear_cross_entropy`.
        device: that of the input; only its type matters.

    Returns:
        The plan, with its name, its chunks, its products and its bytes.

    Raises:
        TypeError: for a size that is no int, or a dtype that is none.
        NotImplementedError: for a dtype that the kernels do not compute.
        ValueError: for a negative size, and as in :func:`softmax_ext.linear_cross_entropy`.
    """
    problem = checked_problem("linear_plan", rows, in_features, num_classes, dtype, device)
    return choose(problem, check_limits("linear_plan", dtype, chunk_rows, memory, logits_dtype))


def checked_problem(
    op: str, rows: int, in_features: int, num_classes: int, dtype: torch.dtype, device: torch.device | str
) -> Problem:
    """The problem of a training step, or the exceptions of :func:`linear_plan`."""
    sizes = []
    for argument, value in (("rows", rows), ("in_features", in_features), ("num_classes", num_classes)):
        sizes.append(checks.integer(op, argument, value))
        if sizes[-1] < 0:
            checks.refuse(ValueError, op, argument, "not be negative", f"{value}")
    if not isinstance(dtype, torch.dtype):
        checks.refuse(TypeError, op, "dtype", "be a torch.dtype", checks.describe(dtype))
    checks.check_dtype(op, dtype)
    return Problem(sizes[0], sizes[1], sizes[2], dtype, torch.device(device).type)


def check_limits(
    op: str, dtype: torch.dtype, chunk_rows: int | None, memory: int | None, logits_dtype: torch.dtype | None
) -> Limits:
    """The limits of a call with operands of ``dtype``, or the exceptions of :func:`linear_plan`."""
    if chunk_rows is not None:
        chunk_rows = checks.integer(op, "chunk_rows", chunk_rows)
        if chunk_rows < 1:
            checks.refuse(ValueError, op, "chunk_rows", "be at least 1, or None", f"{chunk_rows}")
        if memory is not None:
            got = f"{checks.describe(memory)}"
            checks.refuse(ValueError, op, "memory", "be None with chunk_rows", got, "Use one of the two.")
    if memory is not None:
        memory = checks.integer(op, "memory", memory)
        if memory < 0:
            checks.refuse(ValueError, op, "memory", "not be negative", f"{memory}")
    if logits_dtype is not None:
        if not isinstance(logits_dtype, torch.dtype):
            checks.refuse(TypeError, op, "logits_dtype", "be torch.float32 or None", checks.describe(logits_dtype))
        if logits_dtype != torch.float32 or dtype == torch.float64:
            need = "be None with float64 operands" if dtype == torch.float64 else "be torch.float32 or None"
            checks.refuse(ValueError, op, "logits_dtype", need, f"{logits_dtype}")
    return Limits(chunk_rows, memory, logits_dtype)
