"""Linear cross entropy by rows: the plans *whole* and *rows* of plans.py, which differ in how many a chunk has.

A chunk takes these steps, in a buffer that the next chunk uses again:

    Z = X W^T + b                   a matrix product
    dZ = p - y                      the cross-entropy kernel, which writes dZ over Z
    dX = dZ W                       a matrix product
    dW += dZ^T X, db += sum dZ      a matrix product and a sum

Shapes: ``input`` X [N, D], ``linear_weight`` W [C, *K, D], ``linear_bias`` b [C, *K]. The logits of a chunk are
[rows, C, *K]. The target has class indices [N, *K] or probabilities [N, C, *K].

With *rows* the gradients of weight and bias in half types are summed over the chunks in float32, and rounded at the
end. With *whole* there is one chunk, whose products are the gradients. The kernel divides dZ by the mean's denominator,
so that the division rounds nothing else. float16 is an exception: its small gradients would underflow before a loss
scale can enlarge them. There the gradients are those of the sum, in float32, with either plan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, matmul, ops, plans
from .options import NONE, Options
from .plans import LinearPlan, Problem
from .reference import Upstream, class_index, is_live


class Operands(NamedTuple):
    """The tensors of a call, in the shapes above; ``weight`` [C] holds the class weights."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None

    def problem(self, needs: Sequence[bool], needs_target: bool) -> Problem:
        """What the plan depends on; ``needs`` says which gradients of input, weight and bias are computed."""
        needs_input, needs_weight, _ = needs
        classes, positions = math.prod(self.linear_weight.shape[:-1]), math.prod(self.linear_weight.shape[1:-1])
        of_target = self.target.element_size() if needs_target else 0
        sizes, device = (self.input.shape[0], self.input.shape[1], classes), self.input.device.type
        return Problem(*sizes, self.input.dtype, device, needs_input, needs_weight, of_target, positions)


def _checks_targets(target: Tensor) -> bool:
    """On a CPU always; elsewhere on demand, as targets_are_checked() of csrc/ops/cuda/cross_entropy.cpp has it."""
    on_demand = os.environ.get("SOFTMAX_EXT_CHECK_TARGETS", "") not in ("", "0")
    return not target.is_floating_point() and (target.device.type == "cpu" or on_demand)


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for a class out of range, before anything is computed. The kernels see one chunk only."""
    if not _checks_targets(target):
        return
    given = target.long()  # as uint8, 256 classes would wrap to 0
    bad = is_live(target, ignore_index) & ((given < 0) | (given >= classes))
    if bad.any():
        position = [int(i) for i in bad.nonzero()[0]]
        need = f"hold classes in [0, {classes}) or ignore_index ({ignore_index})"
        got = f"{int(target[tuple(position)])} at position {position}"
        checks.refuse(IndexError, "linear_cross_entropy", "target", need, got)


def live_rows(target: Tensor, ignore_index: int) -> Tensor:
    """[N] bool: which rows of the class indices [N, *K] hold an index that is not ignored."""
    live = is_live(target, ignore_index)
    return live.flatten(1).any(1) if live.dim() > 1 else live


def live_row_numbers(operands: Operands, ignore_index: int) -> Tensor | None:
    """The numbers of the rows that are not ignored, or None for all rows.

    Always None on CUDA, where the host would have to wait for how many there are.
    """
    target = operands.target
    if target.is_floating_point() or target.device.type != "cpu":
        return None
    live = live_rows(target, ignore_index)
    return None if live.all() else live.nonzero().squeeze(1)


class _Chunks:
    """The rows of the operands, chunk by chunk, with one buffer for the logits of all chunks in turn.

    Args:
        operands: the tensors.
        ignore_index: the class index of ignored rows.
        plan: says how many rows a chunk has.
        logits_dtype: that of the logits; None: the input's.
        drops_ignored: whether ignored rows may be left out.
    """

    def __init__(
        self,
        operands: Operands,
        ignore_index: int,
        plan: LinearPlan,
        logits_dtype: torch.dtype | None,
        drops_ignored: bool,
    ) -> None:
        input, linear_weight, linear_bias, *_ = operands
        self.operands, self.ignore_index = operands, ignore_index
        self.matrix = linear_weight.flatten(0, -2)
        self.bias = None if linear_bias is None else linear_bias.flatten().contiguous()  # for oneDNN
        self.plan, self.rows = plan, plan.chunk
        self.logits_dtype = logits_dtype or input.dtype
        self.live = live_row_numbers(operands, ignore_index) if drops_ignored else None
        if self.live is not None and plan.name == plans.ROWS:
            self.rows = self._rows_with_copies()
        self.count = input.shape[0] if self.live is None else self.live.numel()
        self.rows = max(min(self.rows, self.count), 1)
        self.buffer = input.new_empty(self.rows, self.matrix.shape[0], dtype=self.logits_dtype)

    def _rows_with_copies(self) -> int:
        """How many rows fit into the memory of the plan's chunk with copies of their input and of its gradient."""
        input = self.operands.input
        row = self.matrix.shape[0] * self.logits_dtype.itemsize
        copies = input.shape[1] * (input.element_size() + plans.gradient_dtype(input.dtype).itemsize)
        return self.plan.chunk * row // max(row + copies, 1)

    def class_index(self, target: Tensor) -> Tensor:
        """The class indices of a chunk's target, 0 for an ignored one."""
        live = is_live(target, self.ignore_index)
        return class_index(target, live, self.operands.linear_weight.shape[0])

    def pick(self, rows: slice, tensor: Tensor, dim: int = 0) -> Tensor:
        """The rows of a tensor that belong to a chunk; ``dim`` is the tensor's dimension of size N."""
        if self.live is None:
            return tensor.narrow(dim, rows.start, rows.stop - rows.start)
        return tensor.index_select(dim, self.live[rows])

    def put(self, rows: slice, values: Tensor, into: Tensor, dim: int = 0) -> None:
        """Writes the values of a chunk's rows into a tensor: the reverse of ``pick``."""
        if self.live is None:
            into.narrow(dim, rows.start, rows.stop - rows.start).copy_(values)
        else:
            into.index_copy_(dim, self.live[rows], values)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yields (rows, their input, their target, their logits [rows, C, *K] in the buffer) for each chunk."""
        for begin in range(0, self.count, self.rows):
            rows = slice(begin, min(begin + self.rows, self.count))
            x = self.pick(rows, self.operands.input)
            logits = self.buffer[: rows.stop - rows.start]
            matmul.project(x, self.matrix, self.bias, logits)
            target = self.pick(rows, self.operands.target)
            yield rows, x, target, logits.unflatten(1, self.operands.linear_weight.shape[:-1])


class _GradientSums:
    """Those gradients of input, linear_weight and linear_bias that are needed, summed over the chunks."""

    def __init__(self, chunks: _Chunks, needs: Sequence[bool]) -> None:
        input = chunks.operands.input
        self.chunks = chunks
        wide = torch.float32 if input.dtype.itemsize == 2 else input.dtype
        needs_input, needs_weight, needs_bias = needs
        new = input.new_empty if chunks.count else input.new_zeros  # the first chunk fills the sum, if there is one
        of_input = plans.gradient_dtype(input.dtype)
        of_weight = plans.weight_sum_dtype(chunks.plan.name, input.dtype)
        self.input = input.new_zeros(input.shape, dtype=of_input) if needs_input else None
        self.weight = new(chunks.matrix.shape, dtype=of_weight) if needs_weight else None
        self.bias = chunks.matrix.new_zeros(chunks.matrix.shape[0], dtype=wide) if needs_bias else None

    def add(self, rows: slice, x: Tensor, target: Tensor, gradient: Tensor) -> None:
        """Adds a chunk's part, from its input and the gradient of its logits, which this may overwrite."""
        logits = gradient.flatten(1)
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        dz = matmul.narrowed(logits, x.dtype)
        if self.input is not None:
            part = self.input[rows] if self.chunks.live is None else self.input.new_empty(x.shape)
            matmul.add_product(part, dz, self.chunks.matrix, True)
            if self.chunks.live is not None:
                self.chunks.put(rows, part, self.input)
        if self.weight is None:
            return
        # The product would round the targets' part. On CUDA it does not: there it is added in float32.
        apart = self.weight.dtype != dz.dtype and not target.is_floating_point() and not dz.is_cuda
        first = rows.start == 0
        if apart:
            matmul.add_outer_apart(self.weight, dz, x, self.chunks.class_index(target).reshape(x.shape[0], -1), first)
        else:
            matmul.add_outer(self.weight, dz, x, first)

    def results(self) -> list[Tensor]:
        """The gradients that are needed, in the dtype of their sums."""
        shape = self.chunks.operands.linear_weight.shape
        weight = None if self.weight is None else self.weight.view(shape)
        bias = None if self.bias is None else self.bias.view(shape[:-1])
        return [t for t in (self.input, weight, bias) if t is not None]


def convert(sums: list[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Replaces each sum by one of its dtype, the smallest first: see plans.converting_bytes."""
    for i in sorted(range(len(sums)), key=lambda i: sums[i].numel()):
        sums[i] = sums[i].to(dtypes[i])


def state_shape(target: Tensor, rows: Sequence[int], needs: Sequence[bool]) -> list[int]:
    """The shape of the state that ``forward`` returns; ``rows`` is [N, *K]."""
    if any(needs):
        return [0]
    return [4 if target.is_floating_point() else 2, *rows]


def forward(
    operands: Operands,
    options: Options,
    wide: torch.dtype,
    stats: bool,
    needs: Sequence[bool],
    denominator: Tensor | None,
    plan: LinearPlan,
    logits_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The results of every position, their state, and the gradients of the sum of the losses over ``denominator``.

    Args:
        operands: the tensors.
        options: those of the cross entropy; the reduction is ignored.
        wide: the dtype of the losses and of the statistics.
        stats: whether to return lse, nll, entropy and prediction too.
        needs: which of the gradients of input, linear_weight and linear_bias are needed.
        denominator: [] float64, or None for 1.
        plan: *whole* or *rows*.
        logits_dtype: that of the logits; None: the input's.

    Returns:
        ``[loss]`` or ``[loss, lse, nll, entropy, prediction]``, each [N, *K]; what :func:`gradients` takes as
        ``state``, or [0] if a gradient is needed; the gradients that are needed. The state of a row that was left out
        is 0.
    """
    input, linear_weight, _, target, weight = operands
    check_classes(target, linear_weight.shape[0], options.ignore_index)
    chunks = _Chunks(operands, options.ignore_index, plan, logits_dtype, not stats)
    sums = _GradientSums(chunks, needs)
    options = options._replace(reduction=NONE)
    shape = (input.shape[0], *linear_weight.shape[1:-1])
    results = [input.new_zeros(shape, dtype=wide) for _ in range(4 if stats else 1)]
    if stats:
        results.append(input.new_zeros(shape, dtype=torch.int64))
    state = input.new_zeros(state_shape(target, shape, needs), dtype=wide)
    for rows, x, of_rows, logits in chunks:
        arguments = (logits, of_rows, weight, *options, wide, stats)
        if any(needs):
            loss, _, _, *statistics = ops.cross_entropy_(*arguments, denominator)
            sums.add(rows, x, of_rows, logits)
        else:
            loss, of_state, _, *statistics = ops.cross_entropy(*arguments, False)
            chunks.put(rows, of_state, state, 1)
        for values, result in zip([loss, *statistics], results, strict=False):
            chunks.put(rows, values, result)
    return results, state, sums.results()


def gradients(
    operands: Operands,
    options: Options,
    wide: torch.dtype,
    upstream: Upstream,
    state: Tensor | None,
    entropy: Tensor | None,
    needs: Sequence[bool],
    needs_target: bool,
    drops_ignored: bool,
    plan: LinearPlan,
    logits_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Those gradients of input, linear_weight, linear_bias and target that are needed; computes the logits again.

    Args:
        operands: the tensors.
        options: those of the cross entropy; the reduction is ignored.
        wide: the dtype of the arithmetic on each logit.
        upstream: a gradient for each position, [N, *K].
        state: what ``forward`` returned, or None: it is computed again.
        entropy: [N, *K], what ``forward`` returned. It is used where ``upstream`` has a gradient of it and there is a
            state.
        needs: which of the gradients of input, linear_weight and linear_bias are needed.
        needs_target: whether the target's gradient is needed.
        drops_ignored: whether ignored rows may be left out.
        plan: *whole* or *rows*.
        logits_dtype: that of the logits; None: the input's.
    """
    target, weight = operands.target, operands.weight
    stats = upstream.entropy is not None
    chunks = _Chunks(operands, options.ignore_index, plan, logits_dtype, drops_ignored)
    sums = _GradientSums(chunks, needs)
    options = options._replace(reduction=NONE)
    grad_target = target.new_empty(target.shape) if needs_target else None
    one = operands.input.new_ones((), dtype=torch.float64)
    for rows, x, of_rows, logits in chunks:
        kept: list[Tensor | None] = [None, None]
        if state is not None:
            kept[0] = chunks.pick(rows, state, 1).contiguous()
            kept[1] = chunks.pick(rows, entropy) if entropy is not None and upstream.entropy is not None else None
        else:
            _, kept[0], _, *statistics = ops.cross_entropy(logits, of_rows, weight, *options, wide, stats, False)
            kept[1] = statistics[2] if upstream.entropy is not None else None
        of_chunk = [None if g is None else chunks.pick(rows, g).contiguous() for g in upstream]
        arguments = (*of_chunk, logits, of_rows, weight, kept[0], one, kept[1], *options)
        gradient = logits
        if grad_target is None:
            ops.cross_entropy_backward_(*arguments)
        else:
            gradient, of_target = ops.cross_entropy_backward(*arguments, True, True)
            chunks.put(rows, of_target, grad_target)
            del of_target  # before the next one is made
        sums.add(rows, x, of_rows, gradient)
        del gradient
    return sums.results() + ([] if grad_target is None else [grad_target])
