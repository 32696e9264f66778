"""Linear cross entropy in chunks of rows, so that the logits never exist as a whole.

A chunk is one matrix product into a buffer that is used again, this package's cross-entropy kernel, which turns the
logits into their gradient where they lie, and the two matrix products of the gradients:

    Z = X W^T + b        dZ = p - y over Z        dX = dZ W        dW += dZ^T X, db += sum dZ

Shapes: ``input`` X [N, D], ``linear_weight`` [C, *K, D], ``linear_bias`` [C, *K]; the logits of a chunk are
[rows, C, *K], with class indices [N, *K] or probabilities [N, C, *K] as the target.

Gradients of half dtypes in the weight and the bias are summed over the chunks in float32. The mean's denominator
divides dZ, in the kernel, so that nothing else is rounded by it; but in float16, where small gradients would be lost to
underflow before a loss scale can lift them, all gradients are those of the sum, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, internals, ops
from .ops import NONE
from .reference import class_index, is_live

# A product that passes through a buffer of its own does so a slice at a time, which stays in cache.
_SLICE_BYTES = 2 << 20
# Logits that are not worth saving memory on.
_SMALL_BUFFER_BYTES = 32 << 20


class Problem(NamedTuple):
    """The operands, in the shapes above, and the options of a cross entropy."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


class Upstream(NamedTuple):
    """The gradients of what a call returns: each [N, *K] or None."""

    loss: Tensor | None
    lse: Tensor | None
    nll: Tensor | None
    entropy: Tensor | None


# ---- matrix products ----


@cache
def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def prefers_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies faster than what ``torch.mm`` calls: MKL, whose X W^T is slow in float32 on AMD.

    A rule and not a measurement, so that the same bits come out every time. For the other two products it is not asked:
    there MKL is nearly as fast, and the errors of its dZ W are a third smaller.
    """
    is_float = x.device.type == "cpu" and x.dtype == torch.float32
    has_onednn = internals.onednn_linear is not None and torch.backends.mkldnn.is_available()
    return is_float and x.shape[-1] > 0 and has_onednn and _amd()


def _onednn(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    assert internals.onednn_linear is not None
    return internals.onednn_linear(x, matrix, bias, "none", [], "")


def _slices(size: int, bytes_each: int) -> Iterator[slice]:
    step = max(_SLICE_BYTES // max(bytes_each, 1), 1)
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


def _project(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Out = x matrix^T + bias."""
    if prefers_onednn(x):  # which allocates its result: a slice at a time, so that malloc can use the memory again
        for s in _slices(matrix.shape[0], x.shape[0] * x.element_size()):
            out[:, s] = _onednn(x, matrix[s], None if bias is None else bias[s])
    elif bias is None:
        torch.mm(x, matrix.t(), out=out)
    else:
        torch.addmm(bias, x, matrix.t(), out=out)


def _multiply(dz: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Out = dz matrix; ``out`` may be wider than the factors."""
    if out.dtype == dz.dtype:
        torch.mm(dz, matrix, out=out)
    elif dz.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(out, dz, matrix, out.dtype, beta=0, out=out)
    else:
        for s in _slices(matrix.shape[0], matrix.shape[1] * out.element_size()):
            out.addmm_(dz[:, s].to(out.dtype), matrix[s].to(out.dtype), beta=1 if s.start else 0)


def _add_outer(total: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """Total += dz^T x, or = where it is the first; ``total`` may be wider than the factors."""
    beta = 0 if first else 1
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), x, beta=beta)
        return
    if dz.is_cuda and internals.product_of_halves is not None:
        internals.product_of_halves(total, dz.t(), x, total.dtype, beta=beta, out=total)
        return
    for s in _slices(total.shape[0], x.shape[1] * x.element_size()):
        # float16 could overflow: nothing has been divided by the number of rows yet.
        left, right = (dz[:, s].float(), x.float()) if dz.dtype == torch.float16 else (dz[:, s], x)
        product = left.t() @ right
        total[s].copy_(product) if first else total[s].add_(product)


def _add_outer_apart(total: Tensor, dz: Tensor, x: Tensor, classes: Tensor, first: bool) -> None:
    """The same, the part of the targets' classes [rows, K] by itself: it is taken out of dz [rows, C * K].

    It is nearly all of the gradient, one row for each position; so it is not rounded with the product.
    """
    positions = classes.shape[1]
    columns = classes * positions + torch.arange(positions, device=classes.device)
    values = dz.gather(1, columns).to(total.dtype)
    dz[torch.arange(dz.shape[0], device=dz.device)[:, None], columns] = 0
    _add_outer(total, dz, x, first)
    for k in range(positions):
        total.index_add_(0, columns[:, k], values[:, k : k + 1] * x)


# ---- chunks ----


def default_chunk_rows(rows: int, row_bytes: int, device: torch.device) -> int:
    """A ninth of the rows, or as many as fit into 32 MiB, within the bounds where matrix products run at full speed.

    On a CPU 128 to 512 rows: below, the weight is read too often for too little arithmetic; above, nothing is gained.
    On a GPU 1024 to 4096. ``row_bytes`` is the size of a row of logits.
    """
    least, most = (128, 512) if device.type == "cpu" else (1024, 4096)
    fitting = _SMALL_BUFFER_BYTES // max(row_bytes, 1)
    return min(max(rows // 144 * 16, fitting // 16 * 16, least), most)


def _checks_targets(target: Tensor) -> bool:
    """On a CPU always; elsewhere on demand, as targets_are_checked() of csrc/ops/cuda/cross_entropy.cpp has it."""
    on_demand = os.environ.get("SOFTMAX_EXT_CHECK_TARGETS", "") not in ("", "0")
    return not target.is_floating_point() and (target.device.type == "cpu" or on_demand)


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for a class out of range, before anything is computed; the kernels would see one chunk of them."""
    if not _checks_targets(target):
        return
    given = target.long()  # as uint8, 256 classes would be none
    bad = is_live(target, ignore_index) & ((given < 0) | (given >= classes))
    if bad.any():
        position = [int(i) for i in bad.nonzero()[0]]
        need = f"hold classes in [0, {classes}) or ignore_index ({ignore_index})"
        got = f"{int(target[tuple(position)])} at position {position}"
        checks.refuse(IndexError, "linear_cross_entropy", "target", need, got)


def live_rows(target: Tensor, ignore_index: int) -> Tensor:
    """Which of the N rows of class indices [N, *K] hold any that is not ignored."""
    live = is_live(target, ignore_index)
    return live.flatten(1).any(1) if live.dim() > 1 else live


class _Chunks:
    """The rows of a problem, chunk by chunk, with one buffer for the logits of each."""

    def __init__(self, problem: Problem, chunk_rows: int | None, drops_ignored: bool) -> None:
        self.problem = problem
        self.matrix = problem.linear_weight.flatten(0, -2)
        self.bias = None if problem.linear_bias is None else problem.linear_bias.flatten().contiguous()  # for oneDNN
        self.live = self._live_rows() if drops_ignored else None
        self.count = problem.input.shape[0] if self.live is None else self.live.numel()
        row_bytes = self.matrix.shape[0] * problem.input.element_size()
        default = default_chunk_rows(self.count, row_bytes, problem.input.device)
        self.rows = min(chunk_rows or default, max(self.count, 1))
        self.buffer = problem.input.new_empty(self.rows, self.matrix.shape[0])

    def _live_rows(self) -> Tensor | None:
        """The rows that are not ignored, or None for all. On CUDA the host would have to wait for their number."""
        target = self.problem.target
        if target.is_floating_point() or target.device.type != "cpu":
            return None
        live = live_rows(target, self.problem.ignore_index)
        return None if live.all() else live.nonzero().squeeze(1)

    def class_index(self, target: Tensor) -> Tensor:
        """The classes of a chunk's target, 0 where it is ignored."""
        live = is_live(target, self.problem.ignore_index)
        return class_index(target, live, self.problem.linear_weight.shape[0])

    def pick(self, rows: slice, tensor: Tensor) -> Tensor:
        """The given rows of a tensor [N, ...]."""
        return tensor[rows] if self.live is None else tensor.index_select(0, self.live[rows])

    def put(self, rows: slice, values: Tensor, into: Tensor) -> None:
        """The reverse of ``pick``."""
        if self.live is None:
            into[rows] = values
        else:
            into.index_copy_(0, self.live[rows], values)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, their input, their target, their logits [rows, C, *K] in the buffer)."""
        for begin in range(0, self.count, self.rows):
            rows = slice(begin, min(begin + self.rows, self.count))
            x = self.pick(rows, self.problem.input)
            logits = self.buffer[: rows.stop - rows.start]
            _project(x, self.matrix, self.bias, logits)
            yield (
                rows,
                x,
                self.pick(rows, self.problem.target),
                logits.unflatten(1, self.problem.linear_weight.shape[:-1]),
            )


def input_sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradient in the input before it is scaled."""
    return torch.float32 if dtype == torch.float16 else dtype


class _GradientSums:
    """The gradients of input, linear_weight and linear_bias, as far as they are needed, summed over the chunks."""

    def __init__(self, chunks: _Chunks, needs: Sequence[bool]) -> None:
        problem = chunks.problem
        self.chunks = chunks
        dtype = problem.input.dtype
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        needs_input, needs_weight, needs_bias = needs
        new = problem.input.new_empty if chunks.count else problem.input.new_zeros  # the first chunk fills it
        self.input = problem.input.new_zeros(problem.input.shape, dtype=input_sum_dtype(dtype)) if needs_input else None
        self.weight = new(chunks.matrix.shape, dtype=wide) if needs_weight else None
        self.bias = chunks.matrix.new_zeros(chunks.matrix.shape[0], dtype=wide) if needs_bias else None

    def add(self, rows: slice, x: Tensor, target: Tensor, gradient: Tensor) -> None:
        """The chunk's part, from its input and the gradient of its logits, which is not to be used afterwards."""
        dz = gradient.flatten(1)
        if self.input is not None:
            part = self.input[rows] if self.chunks.live is None else self.input.new_empty(x.shape)
            _multiply(dz, self.chunks.matrix, part)
            if self.chunks.live is not None:
                self.chunks.put(rows, part, self.input)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        if self.weight is None:
            return
        # Where the product would be rounded, which on CUDA it is not.
        apart = self.weight.dtype != dz.dtype and not target.is_floating_point() and not dz.is_cuda
        first = rows.start == 0
        if apart:
            _add_outer_apart(self.weight, dz, x, self.chunks.class_index(target).reshape(x.shape[0], -1), first)
        else:
            _add_outer(self.weight, dz, x, first)

    def results(self) -> list[Tensor]:
        """Those that are needed; the sums in the dtype they were made in."""
        shape = self.chunks.problem.linear_weight.shape
        weight = None if self.weight is None else self.weight.view(shape)
        bias = None if self.bias is None else self.bias.view(shape[:-1])
        return [t for t in (self.input, weight, bias) if t is not None]


def _operands(problem: Problem, target: Tensor) -> tuple[object, ...]:
    return target, problem.weight, 1, NONE, problem.ignore_index, problem.label_smoothing


def forward(
    problem: Problem,
    wide: torch.dtype,
    stats: bool,
    needs: Sequence[bool],
    grad_divisor: Tensor | None,
    chunk_rows: int | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The results of every position, and the gradients of the sum of the losses, or of that over ``grad_divisor``.

    Args:
        problem: the operands.
        wide: the dtype of the losses and of the statistics.
        stats: also lse, nll, entropy and prediction.
        needs: which of the gradients of input, linear_weight and linear_bias are wanted.
        grad_divisor: [] float64, what they are divided by, or None.
        chunk_rows: rows at once; None: :func:`default_chunk_rows`.

    Returns:
        ``[loss]`` or ``[loss, lse, nll, entropy, prediction]``, each [N, *K]; the gradients that are needed.
    """
    check_classes(problem.target, problem.linear_weight.shape[0], problem.ignore_index)
    chunks = _Chunks(problem, chunk_rows, not stats)
    sums = _GradientSums(chunks, needs)
    shape = (problem.input.shape[0], *problem.linear_weight.shape[1:-1])
    results = [problem.input.new_zeros(shape, dtype=wide) for _ in range(4 if stats else 1)]
    if stats:
        results.append(problem.input.new_zeros(shape, dtype=torch.int64))
    for rows, x, target, logits in chunks:
        options = (*_operands(problem, target), wide, problem.z_loss, problem.softcap, problem.logit_scale, stats)
        if any(needs):
            loss, _, _, *of_rows = ops.cross_entropy_(logits, *options, grad_divisor)
            sums.add(rows, x, target, logits)
        else:
            loss, _, _, *of_rows = ops.cross_entropy(logits, *options, False)
        for values, result in zip([loss, *of_rows], results, strict=False):
            chunks.put(rows, values, result)
    return results, sums.results()


def gradients(
    problem: Problem,
    wide: torch.dtype,
    upstream: Upstream,
    needs: Sequence[bool],
    needs_target: bool,
    chunk_rows: int | None,
) -> list[Tensor]:
    """The gradients of input, linear_weight, linear_bias and target that are needed, the logits computed again.

    ``wide`` is the dtype of the arithmetic on each logit.
    """
    chunks = _Chunks(problem, chunk_rows, upstream.lse is None and upstream.entropy is None)
    sums = _GradientSums(chunks, needs)
    grad_target = problem.target.new_empty(problem.target.shape) if needs_target else None
    one = problem.input.new_ones((), dtype=torch.float64)
    # Without statistics nothing is computed of an ignored row, whose lse and entropy have gradients all the same.
    stats = upstream.lse is not None or upstream.entropy is not None
    for rows, x, target, logits in chunks:
        operands = _operands(problem, target)
        options = (problem.z_loss, problem.softcap, problem.logit_scale)
        _, state, _, *of_rows = ops.cross_entropy(logits, *operands, wide, *options, stats, False)
        of_chunk = [None if g is None else chunks.pick(rows, g).contiguous() for g in upstream]
        entropy = of_rows[2] if upstream.entropy is not None else None
        gradient = logits
        call = (*of_chunk, logits, target, problem.weight, state, one, entropy, *operands[2:], *options)
        if grad_target is None:
            ops.cross_entropy_backward_(*call)
        else:
            gradient, of_target = ops.cross_entropy_backward(*call, True, True)
            chunks.put(rows, of_target, grad_target)
        sums.add(rows, x, target, gradient)
    return sums.results() + ([] if grad_target is None else [grad_target])
