"""The operators that torch.compile and torch.export see instead of a Function.

torch.compile refuses a Function that defines ``jvp``, and loses the second derivative of a Function that does not. So
the trace gets one operator instead, whose derivative is the Function's backward. The arguments of this operator are
those of the operator that it calls, and the package's version (see ops.VERSION). refusals.py says which derivatives
it refuses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import linear_ops, ops
from ..operands import Operands
from ..options import SCHEMA, Options
from ..plans import Limits
from . import linear, refusals
from .cross_entropy import CrossEntropy
from .softmax import Softmax
from .transforms import is_plain, spread

# ---- cross entropy ----


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any) -> list[Tensor]:
    refusals.refuse_tangents("cross_entropy", input, target, weight)
    return ops.cross_entropy(input, target, weight, *arguments[:-1])  # type: ignore[no-any-return]


def _fake_cross_entropy(*arguments: Any) -> list[Tensor]:
    return ops.fake_cross_entropy(*arguments[:-1])


def _keep_for_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, target, weight, *arguments = inputs
    options, (dtype, stats, _, denominator, row_weight, _) = Options.split(arguments)
    ctx.inputs = len(inputs)
    CrossEntropy.setup_context(ctx, (input, target, weight, denominator, options, dtype, stats, row_weight), output)


def _cross_entropy_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad_input, grad_target, *_ = CrossEntropy.backward(ctx, *grads)
    return grad_input, grad_target, *[None] * (ctx.inputs - 2)


cross_entropy = refusals.define(
    "cross_entropy_traced",
    f"(Tensor input, Tensor target, Tensor? weight, {SCHEMA}, ScalarType? dtype, bool stats, bool precompute_grad, "
    "Tensor? denominator, Tensor? row_weight, int version) -> Tensor[]",
    _cross_entropy,
    _fake_cross_entropy,
)
torch.library.register_autograd(
    "softmax_ext::cross_entropy_traced", _cross_entropy_backward, setup_context=_keep_for_cross_entropy
)

# ---- softmax ----


def _softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None, version: int) -> Tensor:
    refusals.refuse_tangents("log_softmax" if log else "softmax", input)
    return ops.softmax(input, dim, log, dtype)  # type: ignore[no-any-return]


def _fake_softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None, version: int) -> Tensor:
    return ops.fake_softmax(input, dim, log, dtype)


def _keep_for_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    Softmax.setup_context(ctx, inputs[:-1], output)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *Softmax.backward(ctx, grad), None


softmax = refusals.define(
    "softmax_traced",
    "(Tensor input, int dim, bool log, ScalarType? dtype, int version) -> Tensor",
    _softmax,
    _fake_softmax,
)
torch.library.register_autograd("softmax_ext::softmax_traced", _softmax_backward, setup_context=_keep_for_softmax)

# ---- linear cross entropy: its operator in linear_ops.py is the one that is traced ----


def _keep_for_linear(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, arguments = inputs[:6], inputs[6:]
    options, (dtype, stats, *others) = Options.split(arguments)
    limits, (ctx.needs, later, *_) = Limits.split(others)
    ctx.call = linear_ops.Call(options, dtype, stats, limits, tuple(later))
    ctx.inputs = len(inputs)
    kept, computed = linear.kept_of(output, stats), []
    if any(ctx.needs):
        computed = output[7 if stats else 3 :]
        kept = kept._replace(state=None)
    ctx.save_for_backward(*operands, *kept, *computed)
    ctx.set_materialize_grads(False)


def _linear_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    operands, kept, computed = Operands(*saved[:6]), linear.Kept(*saved[6:9]), saved[9:]
    nothing = [None] * (ctx.inputs - 4)
    upstream = linear.upstream_of(grads if ctx.call.stats else grads[:3])
    is_constant = torch.compiler.is_compiling() or is_plain(upstream)
    *needs, needs_target = ctx.needs_input_grad[:4]
    has_all = all(has or not needed for has, needed in zip(ctx.needs, needs, strict=True))
    if not (any(ctx.needs) and has_all and is_constant and not needs_target):
        return *linear.recomputed_gradients((*needs, needs_target), operands, ctx.call, upstream, kept), *nothing
    grad_loss = upstream.loss
    if grad_loss is None:
        return *[None] * 4, *nothing
    if refusals.is_backward_traced():
        grad_loss = refusals.refusing(grad_loss, grad_loss, "linear_cross_entropy")
    found = linear.handed_on(spread(computed, ctx.needs), operands, ctx.call, grad_loss, kept.total, False)
    return *found, None, *nothing


linear_ops.forward.register_autograd(_linear_backward, setup_context=_keep_for_linear)
