"""Linear cross entropy by classes: the plan *classes* of plans.py, which needs neither whole rows nor a sum of dW.

Rows are whole only when all their classes have been seen. So there are two sweeps over the chunks:

    Z = X W^T + b of the chunk's classes        a matrix product
    what they add to each row                   cross_entropy_part; then the rows' states from all parts

    Z again, unless it was kept                 a matrix product
    dZ over Z                                   the backward kernel, with the rows' states
    dW, db of the chunk's classes               a matrix product, rounded once, and a sum
    dX += dZ W                                  a matrix product

That is four products in place of three, less what the chunks spare that are kept from the first sweep. Half types sum
dX in float32. float16 sums dW in float32 too, for the reason that chunks.py gives.

Shapes are those of chunks.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import matmul, ops, plans
from .chunks import Operands, check_classes, live_row_numbers
from .options import MEAN, NONE, SUM, Options
from .plans import LinearPlan
from .reference import Upstream


class _Chunk(NamedTuple):
    """The classes [begin, end) of all."""

    number: int
    begin: int
    end: int


class _Sweeps:
    """The operands without ignored rows, and the buffers of logits.

    Args:
        operands: the tensors.
        ignore_index: the class index of ignored rows.
        plan: says how many columns of logits a chunk has, and how many chunks are kept.
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
        input, self.linear_weight, self.linear_bias, target, self.weight = operands
        self.classes, *positions, _ = self.linear_weight.shape
        self.shape, self.columns = (input.shape[0], *positions), math.prod(positions)
        dtype = logits_dtype or input.dtype
        self.live = live_row_numbers(operands, ignore_index) if drops_ignored else None
        self.x, self.target = self.pick(input), self.pick(target)
        step = plan.chunk // self.columns
        begins = range(0, self.classes, step)
        self.chunks = [_Chunk(number, begin, min(begin + step, self.classes)) for number, begin in enumerate(begins)]
        self.recomputed = len(self.chunks) - plan.kept
        self.buffers = [self.x.new_empty(self.x.shape[0] * plan.chunk, dtype=dtype) for _ in range(plan.kept)]

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor [N, ...] that are not left out."""
        return tensor if self.live is None else tensor.index_select(0, self.live)

    def put(self, values: Tensor) -> Tensor:
        """A tensor [N, ...] with these values in the rows that are not left out, and 0 in the others."""
        if self.live is None:
            return values
        return values.new_zeros(self.shape[0], *values.shape[1:]).index_copy_(0, self.live, values)

    def target_of(self, chunk: _Chunk) -> Tensor:
        """The class indices, or the chunk's probabilities."""
        return self.target[:, chunk.begin : chunk.end] if self.target.is_floating_point() else self.target

    def matrix_of(self, chunk: _Chunk) -> Tensor:
        """The chunk's rows of the weight, [columns, D]."""
        return self.linear_weight[chunk.begin : chunk.end].flatten(0, -2)

    def buffer_of(self, chunk: _Chunk) -> Tensor:
        """The chunk's logits, [rows, columns]."""
        buffer = self.buffers[max(chunk.number - self.recomputed, 0)]
        columns = (chunk.end - chunk.begin) * self.columns
        return buffer[: self.x.shape[0] * columns].view(self.x.shape[0], columns)

    def shaped(self, logits: Tensor) -> Tensor:
        """Logits [rows, columns] as the operators take them, [rows, classes, *K]."""
        return logits.view(logits.shape[0], logits.shape[1] // self.columns, *self.shape[1:])

    def project(self, chunk: _Chunk) -> Tensor:
        """Computes the chunk's logits, [rows, columns]."""
        logits = self.buffer_of(chunk)
        bias = None if self.linear_bias is None else self.linear_bias[chunk.begin : chunk.end].flatten().contiguous()
        matmul.project(self.x, self.matrix_of(chunk), bias, logits)
        return logits

    def first(self, options: Options, wide: torch.dtype, stats: bool) -> Tensor:
        """The first sweep: what all classes add to the rows, [fields, rows, *K]."""
        part: Tensor | None = None
        for chunk in self.chunks:
            logits = self.shaped(self.project(chunk))
            arguments = (*options, wide, stats, chunk.begin, self.classes, part)
            part = ops.cross_entropy_part(logits, self.target_of(chunk), self.weight, *arguments)
        assert part is not None
        return part

    def second(self, has_first: bool) -> Iterator[tuple[_Chunk, Tensor]]:
        """The second sweep: each chunk with its logits [rows, columns], first those that were kept."""
        kept = self.recomputed if has_first else len(self.chunks)
        for chunk in self.chunks[kept:]:
            yield chunk, self.buffer_of(chunk)
        for chunk in self.chunks[:kept]:
            yield chunk, self.project(chunk)


class _GradientSums:
    """Those gradients of input, linear_weight and linear_bias that are needed."""

    def __init__(self, sweeps: _Sweeps, needs: Sequence[bool]) -> None:
        needs_input, needs_weight, needs_bias = needs
        x, weight = sweeps.x, sweeps.linear_weight
        sums, results = plans.input_sum_dtype(plans.CLASSES, x.dtype), plans.gradient_dtype(x.dtype)
        self.sweeps, self.is_first = sweeps, True
        self.input = x.new_empty(x.shape, dtype=sums) if needs_input else None
        self.weight = weight.new_empty(weight.shape, dtype=results) if needs_weight else None
        self.bias = weight.new_empty(weight.shape[:-1], dtype=sums) if needs_bias else None

    def add(self, chunk: _Chunk, gradient: Tensor) -> None:
        """Takes the gradient [rows, columns] of a chunk's logits, which this may overwrite."""
        sweeps = self.sweeps
        if self.bias is not None:
            of_bias = gradient.sum(0, dtype=self.bias.dtype)
            self.bias[chunk.begin : chunk.end] = of_bias.view(-1, *self.bias.shape[1:])
        gradient = matmul.narrowed(gradient, sweeps.x.dtype)
        if self.weight is not None:
            matmul.add_outer(self.weight[chunk.begin : chunk.end].flatten(0, -2), gradient, sweeps.x, True)
        if self.input is None:
            return
        # The product would round the targets' part. On CUDA it does not: there it is added in float32.
        apart = self.input.dtype != gradient.dtype and not sweeps.target.is_floating_point() and not gradient.is_cuda
        matrix = sweeps.matrix_of(chunk)
        if apart:
            index = sweeps.target.long() - chunk.begin
            classes = chunk.end - chunk.begin
            matmul.add_product_apart(
                self.input, gradient, matrix, index.reshape(len(index), sweeps.columns), classes, self.is_first
            )
        else:
            matmul.add_product(self.input, gradient, matrix, self.is_first)
        self.is_first = False

    def results(self) -> list[Tensor]:
        """The gradients that are needed, in the dtype of their sums, but that of the input in that of its gradient."""
        input, self.input = self.input, None
        if input is not None:
            input = self.sweeps.put(input.to(plans.gradient_dtype(self.sweeps.x.dtype)))
        return [t for t in (input, self.weight, self.bias) if t is not None]


def _finished(sweeps: _Sweeps, options: Options, wide: torch.dtype, stats: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The first sweep, and then the rows' losses, state and statistics."""
    options = options._replace(reduction=NONE)
    part = sweeps.first(options, wide, stats)
    indices = None if sweeps.target.is_floating_point() else sweeps.target
    arguments = (*options, wide, wide == torch.float64, stats, None, sweeps.classes)
    loss, state, _, *statistics = ops.cross_entropy_of_parts(part.unsqueeze(0), indices, sweeps.weight, *arguments)
    return loss, state, statistics


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
    """As chunks.forward, with the plan *classes*."""
    target, weight = operands.target, operands.weight
    check_classes(target, operands.linear_weight.shape[0], options.ignore_index)
    sweeps = _Sweeps(operands, options.ignore_index, plan, logits_dtype, not stats)
    loss, state, statistics = _finished(sweeps, options, wide, stats)
    sums = _GradientSums(sweeps, needs)
    results = [sweeps.put(values) for values in (loss, *statistics)]
    if not any(needs):
        return results, sweeps.put(state.movedim(0, -1)).movedim(-1, 0).contiguous(), []
    options = options._replace(reduction=SUM if denominator is None else MEAN)
    one = state.new_ones(())
    total = denominator if denominator is not None else state.new_ones((), dtype=torch.float64)
    for chunk, logits in sweeps.second(True):
        saved = (sweeps.target_of(chunk), weight, state, total, None)
        part = (chunk.begin, sweeps.classes)
        ops.cross_entropy_backward_(one, None, None, None, sweeps.shaped(logits), *saved, *options, *part)
        sums.add(chunk, logits)
    return results, state.new_empty(0), sums.results()


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
    """As chunks.gradients, with the plan *classes*. With a state there is no first sweep."""
    target, weight = operands.target, operands.weight
    sweeps = _Sweeps(operands, options.ignore_index, plan, logits_dtype, drops_ignored)
    options = options._replace(reduction=NONE)
    of_rows = [None if g is None else sweeps.pick(g).contiguous() for g in upstream]
    has_first = state is None
    if state is None:
        _, state, statistics = _finished(sweeps, options, wide, upstream.entropy is not None)
        entropy = statistics[2] if statistics else None
    elif sweeps.live is not None:
        state = state.index_select(1, sweeps.live)
    if upstream.entropy is None:
        entropy = None
    sums = _GradientSums(sweeps, needs)
    grad_target = target.new_empty(target.shape) if needs_target else None
    one = state.new_ones((), dtype=torch.float64)
    for chunk, logits in sweeps.second(has_first):
        saved = (sweeps.target_of(chunk), weight, state, one, entropy)
        arguments = (*of_rows, sweeps.shaped(logits), *saved, *options)
        part = (chunk.begin, sweeps.classes)
        if grad_target is None:
            ops.cross_entropy_backward_(*arguments, *part)
        else:
            gradient, of_target = ops.cross_entropy_backward(*arguments, True, True, *part)
            grad_target[:, chunk.begin : chunk.end] = of_target
            logits = gradient.flatten(1)
            del gradient, of_target  # before the next ones are made
        sums.add(chunk, logits)
        del logits
    return sums.results() + ([] if grad_target is None else [grad_target])
