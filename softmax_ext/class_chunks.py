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

Shapes are those of operands.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import matmul, ops, plans
from .chunks import empty_results, state_shape
from .operands import Run, check_classes
from .options import MEAN, NONE, SUM
from .reference import Upstream


class _Chunk(NamedTuple):
    """The classes [begin, end) of all."""

    number: int
    begin: int
    end: int


class _Sweeps:
    """The live rows of a call, and the buffers of their logits."""

    def __init__(self, run: Run) -> None:
        _, self.linear_weight, self.linear_bias, target, self.weight, row_weight = run.operands
        self.run, self.live, plan = run, run.live, run.plan
        self.classes, *positions, _ = self.linear_weight.shape
        self.positions, self.columns = positions, math.prod(positions)
        self.x, self.target = self.live.input(), self.live.pick(target)
        self.row_weight = None if row_weight is None else self.live.pick(row_weight)
        step = plan.chunk // self.columns
        begins = range(0, self.classes, step)
        self.chunks = [_Chunk(number, begin, min(begin + step, self.classes)) for number, begin in enumerate(begins)]
        self.recomputed = len(self.chunks) - plan.kept
        self.buffers = [
            self.x.new_empty(self.x.shape[0] * plan.chunk, dtype=run.logits_dtype) for _ in range(plan.kept)
        ]

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
        return logits.view(logits.shape[0], logits.shape[1] // self.columns, *self.positions)

    def project(self, chunk: _Chunk) -> Tensor:
        """Computes the chunk's logits, [rows, columns]."""
        logits = self.buffer_of(chunk)
        bias = None if self.linear_bias is None else self.linear_bias[chunk.begin : chunk.end].flatten().contiguous()
        matmul.project(self.x, self.matrix_of(chunk), bias, logits)
        return logits

    def first(self, stats: bool) -> Tensor:
        """The first sweep: what all classes add to the rows, [fields, rows, *K]."""
        part: Tensor | None = None
        for chunk in self.chunks:
            logits = self.shaped(self.project(chunk))
            arguments = (*self.run.options, self.run.wide, stats, chunk.begin, self.classes, part)
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
        self.sweeps.buffers.clear()  # before the sum is converted
        if input is not None:
            input = input.to(plans.gradient_dtype(self.sweeps.x.dtype))
            live = self.sweeps.live
            if live.numbers is not None:
                of_rows = input
                input = input.new_zeros(self.sweeps.run.operands.input.shape)
                live.put(of_rows, input)
        return [t for t in (input, self.weight, self.bias) if t is not None]


def _finished(sweeps: _Sweeps, stats: bool, denominator: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The first sweep, and then the live rows' losses, state and statistics."""
    wide, options = sweeps.run.wide, sweeps.run.options._replace(reduction=NONE)
    parts = sweeps.first(stats).unsqueeze(0)
    indices = None if sweeps.target.is_floating_point() else sweeps.target
    arguments = (*options, wide, wide == torch.float64, stats, denominator, sweeps.classes, sweeps.row_weight)
    loss, state, _, *statistics = ops.cross_entropy_of_parts(parts, indices, sweeps.weight, *arguments)
    return loss, state, statistics


def forward(
    run: Run, stats: bool, needs: Sequence[bool], denominator: Tensor | None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """As chunks.forward, with the plan *classes*."""
    operands, live, options, wide, *_ = run
    check_classes(operands.target, operands.linear_weight.shape[0], options.ignore_index)
    sweeps = _Sweeps(run)
    loss, state, statistics = _finished(sweeps, stats, denominator)
    sums = _GradientSums(sweeps, needs)
    results = empty_results(run, stats)
    for values, result in zip([loss, *statistics], results, strict=True):
        live.put(values, result)
    if not any(needs):
        shape = state_shape(options, operands.target, operands.loss_shape, needs)
        of_rows = operands.input.new_zeros(shape, dtype=wide)
        live.put(state, of_rows, dim=1)
        return results, of_rows, []
    options = options._replace(reduction=SUM if denominator is None else MEAN)
    one = state.new_ones(())
    total = denominator if denominator is not None else state.new_ones((), dtype=torch.float64)
    for chunk, logits in sweeps.second(True):
        saved = (sweeps.target_of(chunk), operands.weight, state, total, None)
        part = (chunk.begin, sweeps.classes, sweeps.row_weight)
        ops.cross_entropy_backward_(one, None, None, None, sweeps.shaped(logits), *saved, *options, *part)
        sums.add(chunk, logits)
        del logits  # of a buffer
    return results, state.new_empty(0), sums.results()


def gradients(
    run: Run,
    upstream: Upstream,
    total: Tensor | None,
    state: Tensor | None,
    entropy: Tensor | None,
    needs: Sequence[bool],
    needs_target: bool,
) -> list[Tensor]:
    """As chunks.gradients, with the plan *classes*. With a state there is no first sweep."""
    operands, live, options, *_ = run
    sweeps = _Sweeps(run)
    options = options._replace(reduction=NONE)
    of_rows = [None if g is None else live.pick(g).contiguous() for g in upstream]
    has_first = state is None
    if state is None:
        _, state, statistics = _finished(sweeps, upstream.entropy is not None, None)
        entropy = statistics[2] if statistics else None
    else:
        state = live.pick(state, dim=1)
        entropy = live.pick(entropy) if entropy is not None and upstream.entropy is not None else None
    sums = _GradientSums(sweeps, needs)
    target = operands.target
    grad_target = target.new_empty(target.shape) if needs_target else None
    one = state.new_ones((), dtype=torch.float64) if total is None else total
    for chunk, logits in sweeps.second(has_first):
        saved = (sweeps.target_of(chunk), operands.weight, state, one, entropy)
        arguments = (*of_rows, sweeps.shaped(logits), *saved, *options)
        part = (chunk.begin, sweeps.classes, sweeps.row_weight)
        if grad_target is None:
            ops.cross_entropy_backward_(*arguments, *part)
        else:
            gradient, of_target = ops.cross_entropy_backward(*arguments, True, True, *part)
            grad_target[:, chunk.begin : chunk.end] = of_target
            logits = gradient.flatten(1)
            del gradient, of_target  # before the next ones are made
        sums.add(chunk, logits)
        del logits, arguments  # of a buffer
    return sums.results() + ([] if grad_target is None else [grad_target])
