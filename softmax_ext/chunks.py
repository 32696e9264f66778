"""Linear cross entropy by rows: the plans *whole* and *rows* of plans.py, which differ in how many a chunk has.

A chunk takes these steps, in a buffer that the next chunk uses again:

    Z = X W^T + b                   a matrix product
    dZ = p - y                      the cross-entropy kernel, which writes dZ over Z
    dX = dZ W                       a matrix product
    dW += dZ^T X, db += sum dZ      a matrix product and a sum

Shapes are those of operands.py. The logits of a chunk are [rows, C, *K].

With *rows* the gradients of weight and bias in half types are summed over the chunks in float32, and rounded at the
end. With *whole* there is one chunk, whose products are the gradients. The kernel divides dZ by the mean's denominator,
so that the division rounds nothing else. float16 is an exception: its small gradients would underflow before a loss
scale can enlarge them. There the gradients are those of the sum, in float32, with either plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import matmul, ops, plans
from .operands import Run, check_classes
from .options import NONE, Options
from .reference import Upstream, class_index, is_live

# Chunks of fewer rows take longer than their memory is worth.
_LEAST_ROWS = 16


class _Chunks:
    """The live rows of a call, chunk by chunk, with one buffer for the logits of all chunks in turn."""

    def __init__(self, run: Run) -> None:
        input, linear_weight, linear_bias, *_ = run.operands
        self.run, self.live = run, run.live
        self.matrix = linear_weight.flatten(0, -2)
        self.bias = None if linear_bias is None else linear_bias.flatten().contiguous()  # for oneDNN
        copies = run.live.numbers is not None and run.plan.name == plans.ROWS and run.limits.memory is not None
        rows = self._rows_with_copies() if copies else run.plan.chunk
        self.rows = max(min(rows, run.live.count), 1)
        self.buffer = input.new_empty(self.rows, self.matrix.shape[0], dtype=run.logits_dtype)

    def _rows_with_copies(self) -> int:
        """How many rows fit into the memory of the plan's chunk with copies of their input and of its gradient.

        They are as many as are worth a product, though, where a row of the input is longer than one of logits.
        """
        input = self.run.operands.input
        row = self.matrix.shape[0] * self.run.logits_dtype.itemsize
        copies = input.shape[1] * (input.element_size() + plans.gradient_dtype(input.dtype).itemsize)
        chunk = self.run.plan.chunk
        return max(chunk * row // max(row + copies, 1), min(chunk, _LEAST_ROWS))

    def class_index(self, target: Tensor) -> Tensor:
        """The class indices of a chunk's target, 0 for an ignored one."""
        live = is_live(target, self.run.options.ignore_index)
        return class_index(target, live, self.run.operands.linear_weight.shape[0])

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yields (rows, their input, their target, their logits [rows, C, *K] in the buffer) for each chunk."""
        operands, live = self.run.operands, self.live
        for begin in range(0, live.count, self.rows):
            rows = slice(begin, min(begin + self.rows, live.count))
            x = live.input(rows)
            logits = self.buffer[: rows.stop - rows.start]
            matmul.project(x, self.matrix, self.bias, logits)
            yield rows, x, live.pick(operands.target, rows), logits.unflatten(1, operands.linear_weight.shape[:-1])

    def row_weight(self, rows: slice) -> Tensor | None:
        """The row weights of a chunk."""
        row_weight = self.run.operands.row_weight
        return None if row_weight is None else self.live.pick(row_weight, rows)


class _GradientSums:
    """Those gradients of input, linear_weight and linear_bias that are needed, summed over the chunks."""

    def __init__(self, chunks: _Chunks, needs: Sequence[bool]) -> None:
        input = chunks.run.operands.input
        self.chunks = chunks
        wide = torch.float32 if input.dtype.itemsize == 2 else input.dtype
        needs_input, needs_weight, needs_bias = needs
        of_input = plans.gradient_dtype(input.dtype)
        of_weight = plans.weight_sum_dtype(chunks.run.plan.name, input.dtype)
        self.input = input.new_zeros(input.shape, dtype=of_input) if needs_input else None
        self.weight = input.new_empty(chunks.matrix.shape, dtype=of_weight) if needs_weight else None
        if self.weight is not None and not chunks.live.count:
            self.weight.zero_()  # otherwise the first chunk fills it
        self.bias = chunks.matrix.new_zeros(chunks.matrix.shape[0], dtype=wide) if needs_bias else None

    def add(self, rows: slice, x: Tensor, target: Tensor, gradient: Tensor) -> None:
        """Adds a chunk's part, from its input and the gradient of its logits, which this may overwrite."""
        logits = gradient.flatten(1)
        if self.bias is not None:
            self.bias += logits.sum(0, dtype=self.bias.dtype)
        dz = matmul.narrowed(logits, x.dtype)
        if self.input is not None:
            live = self.chunks.live
            part = self.input[rows] if live.numbers is None else self.input.new_empty(x.shape)
            matmul.add_product(part, dz, self.chunks.matrix, True)
            if live.numbers is not None:
                live.put(part, self.input, rows)
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
        shape = self.chunks.run.operands.linear_weight.shape
        weight = None if self.weight is None else self.weight.view(shape)
        bias = None if self.bias is None else self.bias.view(shape[:-1])
        return [t for t in (self.input, weight, bias) if t is not None]


def convert(sums: list[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Replaces each sum by one of its dtype, the smallest first: see plans.converting_bytes."""
    for i in sorted(range(len(sums)), key=lambda i: sums[i].numel()):
        sums[i] = sums[i].to(dtypes[i])


def state_shape(options: Options, target: Tensor, rows: Sequence[int], needs: Sequence[bool]) -> list[int]:
    """The shape of the state that ``forward`` returns; ``rows`` is [N, *K]."""
    return [0] if any(needs) else [ops.state_values(target.is_floating_point(), options), *rows]


def empty_results(run: Run, stats: bool) -> list[Tensor]:
    """``[loss]`` or ``[loss, lse, nll, entropy, prediction]`` with the values of ignored rows, each [N, *K]."""
    input, shape = run.operands.input, run.operands.loss_shape
    results = [input.new_zeros(shape, dtype=run.wide) for _ in range(4 if stats else 1)]
    return [*results, input.new_full(shape, -1, dtype=torch.int64)] if stats else results


def forward(
    run: Run, stats: bool, needs: Sequence[bool], denominator: Tensor | None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The results of every position, their state, and the gradients of the sum of the losses over ``denominator``.

    Args:
        run: of the plan *whole* or *rows*.
        stats: whether to return lse, nll, entropy and prediction too.
        needs: which of the gradients of input, linear_weight and linear_bias are needed.
        denominator: a total weight (reference.total_weight), or None for 1.

    Returns:
        ``[loss]`` or ``[loss, lse, nll, entropy, prediction]``, each [N, *K]; what :func:`gradients` takes as
        ``state``, or [0] if a gradient is needed; the gradients that are needed. The state of a row that was left out
        is 0.
    """
    operands, live, options, wide, *_ = run
    check_classes(operands.target, operands.linear_weight.shape[0], options.ignore_index)
    chunks = _Chunks(run)
    sums = _GradientSums(chunks, needs)
    results = empty_results(run, stats)
    shape = state_shape(options, operands.target, operands.loss_shape, needs)
    state = operands.input.new_zeros(shape, dtype=wide)
    options = options._replace(reduction=NONE)
    for rows, x, of_rows, logits in chunks:
        arguments = (logits, of_rows, operands.weight, *options, wide, stats)
        factors = chunks.row_weight(rows)
        if any(needs):
            loss, _, _, *statistics = ops.cross_entropy_(*arguments, denominator, factors)
            sums.add(rows, x, of_rows, logits)
        else:
            loss, of_state, _, *statistics = ops.cross_entropy(*arguments, False, denominator, factors)
            live.put(of_state, state, rows, 1)
        for values, result in zip([loss, *statistics], results, strict=False):
            live.put(values, result, rows)
    return results, state, sums.results()


def gradients(
    run: Run,
    upstream: Upstream,
    total: Tensor | None,
    state: Tensor | None,
    entropy: Tensor | None,
    needs: Sequence[bool],
    needs_target: bool,
) -> list[Tensor]:
    """Those gradients of input, linear_weight, linear_bias and target that are needed; computes the logits again.

    Args:
        run: of the plan *whole* or *rows*.
        upstream: a gradient for each position, [N, *K].
        total: a total weight with the denominator 1, or None for 1.
        state: what ``forward`` returned, or None: it is computed again.
        entropy: [N, *K], what ``forward`` returned. It is used where ``upstream`` has a gradient of it and there is a
            state.
        needs: which of the gradients of input, linear_weight and linear_bias are needed.
        needs_target: whether the target's gradient is needed.
    """
    operands, live, options, wide, *_ = run
    target, weight = operands.target, operands.weight
    of_entropy = upstream.entropy is not None
    chunks = _Chunks(run)
    sums = _GradientSums(chunks, needs)
    options = options._replace(reduction=NONE)
    grad_target = target.new_empty(target.shape) if needs_target else None
    one = operands.input.new_ones((), dtype=torch.float64) if total is None else total
    for rows, x, of_rows, logits in chunks:
        factors = chunks.row_weight(rows)
        kept: list[Tensor | None] = [None, None]
        if state is not None:
            kept[0] = live.pick(state, rows, 1).contiguous()
            kept[1] = live.pick(entropy, rows) if entropy is not None and of_entropy else None
        else:
            recomputed = (logits, of_rows, weight, *options, wide, of_entropy, False, None, factors)
            _, kept[0], _, *statistics = ops.cross_entropy(*recomputed)
            kept[1] = statistics[2] if of_entropy else None
        of_chunk = [None if g is None else live.pick(g, rows).contiguous() for g in upstream]
        arguments = (*of_chunk, logits, of_rows, weight, kept[0], one, kept[1], *options)
        gradient = logits
        if grad_target is None:
            ops.cross_entropy_backward_(*arguments, row_weight=factors)
        else:
            gradient, of_target = ops.cross_entropy_backward(*arguments, True, True, row_weight=factors)
            live.put(of_target, grad_target, rows)
            del of_target  # before the next one is made
        sums.add(rows, x, of_rows, gradient)
        del gradient
    return sums.results() + ([] if grad_target is None else [grad_target])
