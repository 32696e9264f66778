"""Linear cross entropy for autograd: the operators around chunks.py, and the Functions around the operators.

    EagerLinearCrossEntropy   forward computes the gradients as well, three matrix products a chunk; the first backward
                              scales them and hands them over
    LinearCrossEntropy        forward computes the loss; backward computes the logits again, chunk by chunk, which
                              serves any upstream gradient, any number of times, and transforms

The gradient in chunks is a Function of its own, LinearCrossEntropyBackward, so that ``torch.func`` and
``create_graph`` hold no logits either (compiled, ``torch.func`` does). A derivative of it (double backward), and any in
forward mode, comes from ``linear`` and the cross entropy of whole logits, whose Functions have all derivatives.
torch.compile and torch.export see the operators.

``call`` stands for (reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, dtype, stats, chunk_rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import chunks, internals, ops, traced
from .autograd import (
    CrossEntropy,
    CrossEntropyBackward,
    _formula_gradients,
    _is_batched,
    _nested_forward_mode,
    _one_by_one,
    _plain_backward,
    _spread,
)
from .chunks import Problem, Upstream
from .ops import MEAN, NONE, _arithmetic_dtype
from .reference import Options, Rows, total_weight


class Call(NamedTuple):
    """The arguments that are not tensors."""

    reduction: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype | None
    stats: bool
    chunk_rows: int | None

    def options(self) -> Options:
        """As a cross entropy of the whole logits takes them."""
        return Options(
            1,
            self.reduction,
            self.ignore_index,
            self.label_smoothing,
            self.z_loss,
            self.softcap,
            self.logit_scale,
        )


_TENSORS = 5  # input, linear_weight, linear_bias, target, weight
_NOTHING = (False, False, False)


def _problem(tensors: Sequence[Any], call: Call) -> Problem:
    options = (call.ignore_index, call.label_smoothing, call.z_loss, call.softcap, call.logit_scale)
    return Problem(*(*tensors, *options))


def _divides(call: Call, input: Tensor) -> bool:
    """Whether gradients computed in forward are divided by the mean's denominator (see chunks.py)."""
    return call.reduction == MEAN and input.dtype != torch.float16


# ---- operators ----


def _forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype | None,
    stats: bool,
    chunk_rows: int | None,
    needs: Sequence[bool],
    version: int,
) -> list[Tensor]:
    traced.refuse_tangents("linear_cross_entropy", input, linear_weight, linear_bias, target)
    call = Call(reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, dtype, stats, chunk_rows)
    wide = _arithmetic_dtype(input.dtype, target.dtype, dtype or input.dtype)
    problem = _problem((input, linear_weight, linear_bias, target, weight), call)
    total = total_weight(target, weight, 1, ignore_index)
    grad_divisor = total if _divides(call, input) else None
    with torch.autocast(input.device.type, enabled=False):  # which would undo float32 products of float16
        (loss, *of_rows), gradients = chunks.forward(problem, wide, stats, needs, grad_divisor, chunk_rows)
    if reduction != NONE:
        loss = loss.sum(dtype=torch.float64)
    if reduction == MEAN:
        loss = loss / total
    return [loss.to(dtype or input.dtype), total, *of_rows, *gradients]


def _fake_forward(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *arguments: Any
) -> list[Tensor]:
    _, *call, needs, _ = arguments
    reduction, dtype, stats = call[0], call[6], call[7]
    rows = [input.shape[0], *linear_weight.shape[1:-1]]
    wide = _arithmetic_dtype(input.dtype, target.dtype, dtype or input.dtype)
    results = [
        input.new_empty(rows if reduction == NONE else [], dtype=dtype or input.dtype),
        input.new_empty([], dtype=torch.float64),
    ]
    if stats:
        results += [input.new_empty(rows, dtype=wide) for _ in range(3)]
        results.append(input.new_empty(rows, dtype=torch.int64))
    sums = torch.float32 if input.dtype.itemsize == 2 else input.dtype
    if needs[0]:
        results.append(input.new_empty(input.shape, dtype=chunks.input_sum_dtype(input.dtype)))
    results += [
        input.new_empty(linear_weight.shape[: linear_weight.dim() - i], dtype=sums)
        for i, needed in enumerate(needs[1:])
        if needed
    ]
    return results


def _backward(
    grad_loss: Tensor | None,
    grad_lse: Tensor | None,
    grad_nll: Tensor | None,
    grad_entropy: Tensor | None,
    total: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    chunk_rows: int | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    call = Call(reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, None, False, chunk_rows)
    # The loss and the statistics are float64 where forward computed in it.
    given = [t.dtype for t in (grad_loss, grad_lse, grad_nll, grad_entropy) if t is not None]
    wide = _arithmetic_dtype(input.dtype, target.dtype, *given)
    if grad_loss is not None:
        grad_loss = grad_loss.to(wide)
        if reduction == MEAN:
            grad_loss = grad_loss / total.to(wide)
        grad_loss = grad_loss.expand(input.shape[0], *linear_weight.shape[1:-1])
    upstream = Upstream(grad_loss, grad_lse, grad_nll, grad_entropy)
    operands = (input, linear_weight, linear_bias, target)
    *parameters, needs_target = needs
    problem = _problem((*operands, weight), call)
    with torch.autocast(input.device.type, enabled=False):
        results = chunks.gradients(problem, wide, upstream, parameters, needs_target, chunk_rows)
    likes = [t for t, needed in zip(operands, needs, strict=True) if needed and t is not None]
    return [result.to(like.dtype) for result, like in zip(results, likes, strict=True)]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    operands, needs = arguments[5:9], arguments[-1]
    return [t.new_empty(t.shape) for t, needed in zip(operands, needs, strict=True) if needed]


_OPERANDS = "Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight"
_OPTIONS = "int reduction, int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
_UPSTREAM = "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_nll, Tensor? grad_entropy"

# -> [loss, total_weight] + [lse, nll, entropy, prediction] if stats + the gradients of input, linear_weight and
#    linear_bias that ``needs`` names, for an upstream gradient of 1 (float16 with the mean: of total_weight); the sums
#    of half types are float32
_forward_op = torch.library.custom_op(
    "softmax_ext::linear_cross_entropy",
    _forward,
    mutates_args=(),
    schema=f"({_OPERANDS}, {_OPTIONS}, ScalarType? dtype, bool stats, SymInt? chunk_rows, bool[] needs, "
    "int version) -> Tensor[]",
)
_forward_op.register_fake(_fake_forward)

# -> the gradients of input, linear_weight, linear_bias and target that ``needs`` names
_backward_op = torch.library.custom_op(
    "softmax_ext::linear_cross_entropy_backward",
    _backward,
    mutates_args=(),
    schema=f"({_UPSTREAM}, Tensor total, {_OPERANDS}, {_OPTIONS}, SymInt? chunk_rows, bool[] needs) -> Tensor[]",
)
_backward_op.register_fake(_fake_backward)


# ---- gradients ----


def logits_of(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """[N, C, *K]."""
    *classes, features = linear_weight.shape  # reshaped: autograd's own vmap knows no flatten
    bias = None if linear_bias is None else linear_bias.reshape(math.prod(classes))
    logits = F.linear(input, linear_weight.reshape(math.prod(classes), features), bias)
    return logits.reshape(input.shape[0], *classes)


def _gradients_through_logits(tensors: Sequence[Any], call: Call, upstream: Upstream, needs: Sequence[bool]) -> Any:
    """The gradients by operations that can all be differentiated and batched again."""
    input, linear_weight, linear_bias, target, weight = tensors
    logits = logits_of(input, linear_weight, linear_bias)
    options = call.options()
    wide = _arithmetic_dtype(input.dtype, target.dtype, call.dtype or input.dtype)
    of_logits: Any
    if _is_batched(upstream) and not _plain_backward():
        total = total_weight(target, weight, 1, call.ignore_index)
        of_logits, *of_target = _formula_gradients(upstream, logits, target, weight, total, options, (True, needs[3]))
    else:
        _, state, total, _, _, entropy, _ = CrossEntropy.apply(logits, target, weight, *options, wide, True)
        of_logits, *of_target = CrossEntropyBackward.apply(
            *upstream, logits, target, weight, state, total, entropy, *options, True, needs[3]
        )
    dz = of_logits.reshape(input.shape[0], math.prod(linear_weight.shape[:-1]))
    gradients: list[Tensor | None] = [None] * 4
    if needs[0]:
        gradients[0] = dz @ linear_weight.reshape(dz.shape[1], input.shape[1])
    if needs[1]:
        gradients[1] = (dz.mT @ input).view(linear_weight.shape)
    if needs[2]:
        gradients[2] = dz.sum(0).view(linear_weight.shape[:-1])
    if needs[3]:
        gradients[3] = of_target[0]
    return gradients


class LinearCrossEntropyBackward(Function):
    """(*upstream, total, input, linear_weight, linear_bias, target, weight, *call, *needs) -> the gradients needed."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        tensors, call, needs = LinearCrossEntropyBackward._parts(args)
        return tuple(_backward_op(*tensors, *call[:6], call.chunk_rows, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.call, ctx.needs = LinearCrossEntropyBackward._parts(inputs)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _parts(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Call, list[bool]]:
        return args[:10], Call(*args[10:-4]), list(args[-4:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved, given = ctx.saved_tensors, _spread(grads, ctx.needs)
        which = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def gradients(*values: Tensor) -> list[Tensor]:
            tensors = list(saved)
            for i, value in zip(which, values, strict=True):
                tensors[i] = value
            found = _gradients_through_logits(tensors[5:], ctx.call, Upstream(*tensors[:4]), ctx.needs)
            return [g for g, grad in zip(found, given, strict=True) if grad is not None]

        pull_back = torch.func.vjp(gradients, *(saved[i] for i in which))[1]
        slopes = pull_back([grad for grad in grads if grad is not None])
        return tuple(_spread(slopes, ctx.needs_input_grad))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(LinearCrossEntropyBackward, info.batch_size, in_dims, args)


def _is_plain(upstream: Sequence[Tensor | None]) -> bool:
    """Whether nothing differentiates or batches the gradient."""
    return _plain_backward() and not _is_batched(upstream)


def _gradients(ctx: Any, tensors: Sequence[Any], upstream: Upstream, total: Tensor) -> Sequence[Tensor | None]:
    """Those of input, linear_weight, linear_bias and target, None where not needed."""
    needs = list(ctx.needs_input_grad[:4])
    if all(g is None for g in upstream) or not any(needs):
        return [None] * 4
    call: Call = ctx.call
    if traced.is_backward_traced():
        given = next(g for g in upstream if g is not None)
        total = traced.refusing(total, given, "linear_cross_entropy")
    if torch.compiler.is_compiling() or _is_plain(upstream):
        results = _backward_op(*upstream, total, *tensors, *call[:6], call.chunk_rows, needs)
    elif internals.forward_mode_level() >= 0 or _is_batched(upstream):
        return _gradients_through_logits(tensors, call, upstream, needs)  # type: ignore[no-any-return]
    else:
        results = LinearCrossEntropyBackward.apply(*upstream, total, *tensors, *call, *needs)
    return _spread(tuple(results), tuple(needs))


def _upstream(grads: Sequence[Tensor | None], stats: bool) -> Upstream:
    """From the gradients of the results [loss, total_weight, *statistics]."""
    return Upstream(grads[0], *(grads[2:5] if stats else (None, None, None)))


def _scaled(gradient: Tensor, scale: Tensor, consumes: bool) -> Tensor:
    """Scale: [], or [N] for the rows of the gradient."""
    if consumes:
        ops.scale_rows_(gradient, scale, 1 if scale.dim() else 0)
        return gradient
    wide = torch.float32 if gradient.dtype.itemsize == 2 else gradient.dtype
    return gradient.to(wide) * scale.to(wide).reshape(-1, *[1] * (gradient.dim() - 1))


def _handed_on(
    computed: Sequence[Tensor | None],
    tensors: Sequence[Any],
    call: Call,
    grad_loss: Tensor,
    total: Tensor,
    consumes: bool,
) -> list[Tensor | None]:
    """The gradients that forward computed, multiplied by the upstream gradient, in place if ``consumes``.

    What comes of ignored rows alone is 0 whatever that is, inf and NaN too.
    """
    input, target = tensors[0], tensors[3]
    scale = grad_loss.to(total.dtype)
    if call.reduction == MEAN and not _divides(call, input):
        scale = scale / total
    of_input = scale
    if not target.is_floating_point():
        live, one = chunks.live_rows(target, call.ignore_index), torch.ones_like(scale)
        scale, of_input = torch.where(live.any(), scale, one), torch.where(live, scale, one)
    return [
        None if gradient is None else _scaled(gradient, factor, consumes).to(like.dtype)
        for gradient, factor, like in zip(computed, (of_input, scale, scale), tensors, strict=False)
    ]


# ---- Functions ----


class LinearCrossEntropy(Function):
    """(input, linear_weight, linear_bias, target, weight, *call) -> (loss, total_weight, *statistics)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(_forward_op(*args, _NOTHING, ops.VERSION))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = Call(*inputs[_TENSORS:])
        ctx.dtypes = [t.dtype for t in output]
        ctx.save_for_backward(*inputs[:_TENSORS], output[1])
        ctx.save_for_forward(*inputs[:_TENSORS], output[1])
        ctx.mark_non_differentiable(output[1], *output[5:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, total = ctx.saved_tensors
        gradients = _gradients(ctx, tensors, _upstream(grads, ctx.call.stats), total)
        return *gradients, None, *[None] * len(Call._fields)

    @staticmethod
    @_nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        input, linear_weight, linear_bias, target, weight, total = saved
        if tangents[4] is not None:
            raise RuntimeError("linear_cross_entropy: weight has no forward-mode derivative here. Use weight.detach().")
        logits = logits_of(input, linear_weight, linear_bias)
        along = torch.zeros_like(logits)
        if tangents[0] is not None:
            along = along + logits_of(tangents[0], linear_weight, None)
        if tangents[1] is not None:
            along = along + logits_of(input, tangents[1], None)
        if tangents[2] is not None:
            along = along + tangents[2]
        rows = Rows(logits, target, weight, ctx.call.options())
        loss, *stats = rows.derivative(along, tangents[3])
        results = [rows.reduce_slope(loss, total), None, *stats, None][: len(ctx.dtypes)]
        return tuple(None if t is None else t.to(d) for t, d in zip(results, ctx.dtypes, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _one_by_one(LinearCrossEntropy, info.batch_size, in_dims, args)


class EagerLinearCrossEntropy(Function):
    """(input, linear_weight, linear_bias, target, weight, call) -> loss, its gradients computed on the way."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.call = args
        ctx.set_materialize_grads(False)
        needs = list(ctx.needs_input_grad[:3])
        loss, total, *gradients = _forward_op(*tensors, *ctx.call, needs, ops.VERSION)
        # No saved tensors: nobody sees them, and backward hands on the only reference. In a list, since compiled
        # autograd calls backward with another ctx, which shares what this one refers to.
        ctx.gradients = [_spread(tuple(gradients), tuple(needs))]
        ctx.save_for_backward(*tensors, total)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, total = ctx.saved_tensors
        nothing = (None,) * 3  # target, weight, call
        if grad_loss is None:
            return None, None, None, *nothing
        upstream = Upstream(grad_loss, None, None, None)
        computed = ctx.gradients.pop() if ctx.gradients else None
        if computed is None or not _is_plain(upstream):
            return *_gradients(ctx, tensors, upstream, total), None, None
        return *_handed_on(computed, tensors, ctx.call, grad_loss, total, True), *nothing


# ---- torch.compile and torch.export ----


def _trace(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *_, needs, _ = inputs
    ctx.call = Call(*inputs[_TENSORS:-2])
    ctx.needs = needs
    computed = output[2:] if any(needs) else []
    ctx.save_for_backward(*inputs[:_TENSORS], output[1], *computed)
    ctx.set_materialize_grads(False)


def _traced_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    *tensors, total = saved[: _TENSORS + 1]
    nothing = [None] * (len(Call._fields) + 2)
    upstream = _upstream(grads, ctx.call.stats)
    is_constant = torch.compiler.is_compiling() or _is_plain(upstream)
    has_all = all(has or not needed for has, needed in zip(ctx.needs, ctx.needs_input_grad[:3], strict=True))
    if not (any(ctx.needs) and has_all and is_constant and not ctx.needs_input_grad[3]):
        return *_gradients(ctx, tensors, upstream, total), None, *nothing
    if grads[0] is None:
        return *[None] * _TENSORS, *nothing
    computed = _spread(tuple(saved[_TENSORS + 1 :]), tuple(ctx.needs))
    grad_loss = grads[0]
    if traced.is_backward_traced():
        grad_loss = traced.refusing(grad_loss, grad_loss, "linear_cross_entropy")
    return *_handed_on(computed, tensors, ctx.call, grad_loss, total, False), None, None, *nothing


_forward_op.register_autograd(_traced_backward, setup_context=_trace)


# ---- the way of a call ----


def _precomputes(tensors: Sequence[Any], call: Call) -> bool:
    """Whether the gradients can be computed before their upstream gradient is known: it is one factor for all."""
    target = tensors[3]
    return call.reduction != NONE and not call.stats and not target.requires_grad


def linear_cross_entropy(tensors: Sequence[Any], call: Call, transformed: bool) -> Sequence[Tensor]:
    """[loss] or [loss, lse, nll, entropy, prediction].

    Args:
        tensors: input [N, D], linear_weight [C, *K, D], linear_bias [C, *K] or None, target, weight [C] or None.
        call: the options.
        transformed: whether torch.func or forward mode is at work.
    """
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[:4]]
    precomputes = any(needs) and _precomputes(tensors, call)
    if torch.compiler.is_compiling() or not (any(needs) or transformed):
        results = _forward_op(*tensors, *call, needs[:3] if precomputes else _NOTHING, ops.VERSION)
    elif precomputes and not transformed and not internals.saved_tensor_hooks_active():
        return [EagerLinearCrossEntropy.apply(*tensors, call)]
    else:
        results = LinearCrossEntropy.apply(*tensors, *call)
    loss, _, *stats = results
    return [loss, *stats[: 4 if call.stats else 0]]
