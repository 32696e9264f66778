"""Cross entropy of a linear layer's output for autograd: the Functions around the operators of linear_ops.py.

- LinearCrossEntropy computes the loss in forward. Its backward computes the logits again, chunk by chunk. It serves any
  upstream gradient, any number of backwards, and transforms.
- EagerLinearCrossEntropy computes the gradients in forward too, with three matrix products a chunk. Its first backward
  multiplies them by the upstream gradient and hands them over.
- LinearCrossEntropyBackward is the gradient in chunks. As it is a Function, ``torch.func`` and ``create_graph`` do not
  need all logits at once either (``torch.func`` in compiled code does).

Double backward and forward mode use all logits at once: F.linear and the cross entropy of its output, which have all
derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import float16, internals, linear_ops, ops
from ..dtypes import arithmetic_dtype
from ..linear_ops import Call
from ..operands import Operands, rows_are_live
from ..options import MEAN
from ..reference import Rows, Upstream, divisor_of
from . import refusals
from .cross_entropy import BackwardCall, CrossEntropy, CrossEntropyBackward, Results, formula_gradients
from .transforms import is_batched, is_plain, is_plain_backward, nested_forward_mode, one_by_one, spread

NOTHING = (False, False, False)
"""No gradient of input, linear_weight and linear_bias is needed."""


def without_ignored(operands: Operands, ignore_index: int) -> Operands:
    """The operands with an input of 0 in the rows that are not live, since their input may hold anything, NaN too."""
    input, target = operands.input, operands.target
    if target.is_floating_point():
        return operands
    live = rows_are_live(target, ignore_index).unsqueeze(1)
    return operands._replace(input=torch.where(live, input, torch.zeros_like(input)))


def logits_of(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """The output of the linear layer, [N, C, *K], computed in ``dtype`` if it is given."""
    if dtype is not None:
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    *classes, features = linear_weight.shape  # reshape and not flatten, which autograd's own vmap does not have
    bias = None if linear_bias is None else linear_bias.reshape(math.prod(classes))
    logits = F.linear(input, linear_weight.reshape(math.prod(classes), features), bias)
    return logits.reshape(input.shape[0], *classes)


# ---- the gradient ----


class _Needs(NamedTuple):
    """Which gradients a backward needs."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    target: bool


def _gradients_through_logits(
    operands: Operands, call: Call, upstream: Upstream, total: Tensor, needs: _Needs
) -> list[Tensor | None]:
    """The gradients from all logits at once, by operations that can be differentiated and batched again."""
    operands = without_ignored(operands, call.options.ignore_index)
    input, linear_weight, linear_bias, target, weight, row_weight = operands
    logits = logits_of(input, linear_weight, linear_bias, call.limits.logits_dtype)
    options = call.options
    wide = arithmetic_dtype(input.dtype, target.dtype, call.dtype or input.dtype)
    if is_batched(upstream) and not is_plain_backward():
        arguments = (logits, target, weight, total, options, (True, needs.target), row_weight)
        of_logits, of_target = formula_gradients(upstream, *arguments)
    else:
        denominator = total if options.reduction == MEAN else None
        results = Results(*CrossEntropy.apply(logits, target, weight, denominator, options, wide, True, row_weight))
        kept = (logits, target, weight, results.state, results.total_weight, results.entropy)
        backward = BackwardCall(*upstream, *kept, options, True, needs.target, row_weight)
        gradients = CrossEntropyBackward.apply(*backward)
        of_logits, of_target = spread(gradients, (True, needs.target))
    assert of_logits is not None
    dz = of_logits.reshape(input.shape[0], math.prod(linear_weight.shape[:-1])).to(input.dtype)
    return [
        dz @ linear_weight.reshape(dz.shape[1], input.shape[1]) if needs.input else None,
        (dz.mT @ input).view(linear_weight.shape) if needs.linear_weight else None,
        dz.sum(0).view(linear_weight.shape[:-1]) if needs.linear_bias else None,
        of_target,
    ]


class Kept(NamedTuple):
    """What a backward needs of forward's results. It is constant: each derivative goes by the operands."""

    total: Tensor
    state: Tensor | None = None
    entropy: Tensor | None = None


def kept_of(results: Sequence[Tensor], stats: bool) -> Kept:
    """What forward keeps for the backward, of its results."""
    _, total, state, *statistics = results
    return Kept(total, state, statistics[2] if stats else None)


class LinearCrossEntropyBackward(Function):
    """(*upstream, *kept, *operands, call, needs) -> those gradients of the operands that ``needs`` names."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *tensors, call, needs = args
        return tuple(linear_ops.backward(*tensors, *call.backward_arguments(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.call, ctx.needs = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved, given = ctx.saved_tensors, spread(grads, ctx.needs)
        which = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def of_differentiable(*values: Tensor) -> list[Tensor]:
            tensors = list(saved)
            for i, value in zip(which, values, strict=True):
                tensors[i] = value
            upstream, kept = Upstream(*tensors[:4]), Kept(*tensors[4:7])
            found = _gradients_through_logits(Operands(*tensors[7:]), ctx.call, upstream, kept.total, ctx.needs)
            return [g for g, grad in zip(found, given, strict=True) if g is not None and grad is not None]

        pull_back = torch.func.vjp(of_differentiable, *(saved[i] for i in which))[1]
        slopes = pull_back([grad for grad in grads if grad is not None])
        return tuple(spread(slopes, ctx.needs_input_grad))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(LinearCrossEntropyBackward, info.batch_size, in_dims, args)


def recomputed_gradients(
    needed: Sequence[bool], operands: Operands, call: Call, upstream: Upstream, kept: Kept
) -> list[Tensor | None]:
    """The gradients of input, linear_weight, linear_bias and target; computes the logits again.

    None for a gradient that is not needed.
    """
    needs = _Needs(*needed)
    if all(g is None for g in upstream) or not any(needs):
        return [None] * 4
    if refusals.is_backward_traced():
        given = next(g for g in upstream if g is not None)
        kept = kept._replace(total=refusals.refusing(kept.total, given, "linear_cross_entropy"))
    if torch.compiler.is_compiling() or is_plain(upstream):
        found = linear_ops.backward(*upstream, *kept, *operands, *call.backward_arguments(needs))
    elif internals.forward_mode_level() >= 0 or is_batched(upstream):
        return _gradients_through_logits(operands, call, upstream, kept.total, needs)
    else:  # autograd takes the entropy for a result, which has a derivative of its own
        kept = Kept(kept.total, *(None if t is None else t.detach() for t in kept[1:]))
        found = LinearCrossEntropyBackward.apply(*upstream, *kept, *operands, call, needs)
    return spread(found, needs)


def _scaled(gradient: Tensor, scale: Tensor, consumes: bool) -> Tensor:
    """The gradient times ``scale``, which is [], or [N] for its rows; in place if ``consumes``."""
    if consumes:
        ops.scale_rows_(gradient, scale, 1 if scale.dim() else 0)
        return gradient
    wide = torch.float32 if gradient.dtype.itemsize == 2 else gradient.dtype
    return gradient.to(wide) * scale.to(wide).reshape(-1, *[1] * (gradient.dim() - 1))


def handed_on(
    computed: list[Tensor | None],
    operands: Operands,
    call: Call,
    grad_loss: Tensor,
    total: Tensor,
    consumes: bool,
) -> list[Tensor | None]:
    """The gradients that forward computed, multiplied by the upstream gradient, in place if ``consumes``.

    Empties ``computed``, so that each is freed before the next is converted (plans.converting_bytes).

    A gradient that only ignored rows contribute to is 0 for any upstream gradient, inf and NaN included.
    """
    target = operands.target
    scale = grad_loss.to(total.dtype)
    if call.options.reduction == MEAN and operands.input.dtype == torch.float16:  # forward did not divide by it
        scale = scale / divisor_of(total)
    divisor = float16.divisor_of_forward(operands, call.options)
    if divisor is not None:
        scale = scale * divisor
    of_input = scale
    if not target.is_floating_point():
        live, one = rows_are_live(target, call.options.ignore_index), torch.ones_like(scale)
        scale, of_input = torch.where(live.any(), scale, one), torch.where(live, scale, one)
    found: list[Tensor | None] = [None] * 3
    order = [i for i, gradient in enumerate(computed) if gradient is not None]
    if consumes:  # otherwise nothing is freed, and in traced code a size may have no value
        order.sort(key=[0 if gradient is None else gradient.numel() for gradient in computed].__getitem__)
    for i in order:
        gradient, computed[i] = computed[i], None
        assert gradient is not None
        found[i] = _scaled(gradient, scale if i else of_input, consumes).to(operands.input.dtype)
    return found


# ---- the loss, with all derivatives ----


class LinearCrossEntropy(Function):
    """(*operands, denominator, call) -> (loss, total_weight, state, *statistics)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        *operands, denominator, call = args
        return tuple(linear_ops.forward(*operands, *call.arguments(NOTHING, False, denominator)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *operands, _, ctx.call = inputs
        ctx.dtypes = [t.dtype for t in output]
        kept = kept_of(output, ctx.call.stats)
        ctx.save_for_backward(*operands, *kept)
        ctx.save_for_forward(*operands, kept.total)
        ctx.mark_non_differentiable(kept.total, kept.state, *output[6:])  # the prediction
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # only once: non-reentrant checkpoints free a saved tensor when it is unpacked
        operands, kept = Operands(*saved[:6]), Kept(*saved[6:])
        found = recomputed_gradients(ctx.needs_input_grad[:4], operands, ctx.call, upstream_of(grads), kept)
        return *found, None, None, None, None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, total = saved
        options = ctx.call.options
        operands = without_ignored(Operands(*tensors), options.ignore_index)
        input, linear_weight, linear_bias, target, weight, row_weight = operands
        of_input, of_linear_weight, of_linear_bias, of_target, of_weight, *_ = tangents
        if of_weight is not None:
            raise RuntimeError("linear_cross_entropy: weight has no forward-mode derivative here. Use weight.detach().")
        wide = ctx.call.limits.logits_dtype
        logits = logits_of(input, linear_weight, linear_bias, wide)
        along = torch.zeros_like(logits)
        if of_input is not None:
            of_input = without_ignored(operands._replace(input=of_input), options.ignore_index).input
            along = along + logits_of(of_input, linear_weight, None, wide)
        if of_linear_weight is not None:
            along = along + logits_of(input, of_linear_weight, None, wide)
        if of_linear_bias is not None:
            along = along + of_linear_bias
        rows = Rows(logits, target, weight, options, row_weight, total)
        loss, *stats = rows.derivative(along, of_target)
        results = [rows.reduce_slope(loss), None, None, *stats, None][: len(ctx.dtypes)]
        return tuple(None if t is None else t.to(d) for t, d in zip(results, ctx.dtypes, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(LinearCrossEntropy, info.batch_size, in_dims, args)


def upstream_of(grads: Sequence[Tensor | None]) -> Upstream:
    """The Upstream in ``grads``, the gradients of the results (loss, total_weight, state, *statistics)."""
    loss, _, _, *statistics = grads
    lse, nll, entropy, *_ = statistics or (None, None, None)
    return Upstream(loss, lse, nll, entropy)


# ---- eager calls ----


class EagerLinearCrossEntropy(Function):
    """(*operands, denominator, call) -> (loss, *statistics); forward computes the loss's gradients too.

    The statistics have no derivative.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *operands, denominator, ctx.call = args
        ctx.set_materialize_grads(False)
        needs = list(ctx.needs_input_grad[:3])
        loss, total, _, *others = linear_ops.forward(*operands, *ctx.call.arguments(needs, False, denominator))
        count = 4 if ctx.call.stats else 0
        statistics, computed = others[:count], others[count:]
        # The gradients are no saved tensors: nobody else sees them, and backward hands over the only reference. They
        # are in a list because compiled autograd calls backward with another ctx, which refers to the same list.
        ctx.gradients = [spread(computed, needs)]
        ctx.save_for_backward(*operands, total)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *of_statistics: None) -> tuple[Tensor | None, ...]:
        *tensors, total = ctx.saved_tensors
        operands = Operands(*tensors)
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        upstream = Upstream(grad_loss, None, None, None)
        computed = ctx.gradients.pop() if ctx.gradients else None
        if computed is None or not is_plain(upstream):
            found = recomputed_gradients(ctx.needs_input_grad[:4], operands, ctx.call, upstream, Kept(total))
        else:
            found = [*handed_on(computed, operands, ctx.call, grad_loss, total, True), None]
        return *found, None, None, None, None
