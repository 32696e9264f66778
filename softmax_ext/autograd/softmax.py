"""Softmax and log-softmax for autograd. The gradient is a Function too, so that it has derivatives."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import internals, ops
from . import refusals
from .transforms import is_batched, is_plain_backward, nested_forward_mode, to_front

# ---- the gradient ----


def _gradient_by_formula(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """The same as SoftmaxBackward by torch's operations, for batched gradients that are differentiated again.

    Where autograd batches gradients, torch's operations have a graph and tangents, but a Function silently loses both.
    """
    wide = torch.promote_types(output.dtype, torch.float32)
    g, y = grad_output.to(wide), output.to(wide)
    if log:
        return (g - y.exp() * g.sum(dim, keepdim=True)).to(dtype)
    return (y * (g - (g * y).sum(dim, keepdim=True))).to(dtype)


def _traced_gradient(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    refusals.refuse_derivatives("log_softmax" if log else "softmax", grad_output, output)
    return ops.softmax_backward(grad_output, output, dim, log, dtype)  # type: ignore[no-any-return]


# The gradient in a backward that is traced.
_softmax_backward_traced = refusals.define(
    "softmax_backward_traced",
    "(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor",
    _traced_gradient,
    ops.fake_softmax_backward,
)


class SoftmaxBackward(Function):
    """(grad_output, output, dim, log, dtype) -> grad_input of softmax or log_softmax, of ``dtype``."""

    @staticmethod
    def forward(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Any:
        return ops.softmax_backward(grad_output, output, dim, log, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad_output, y, ctx.dim, ctx.log, ctx.dtype = inputs
        ctx.save_for_backward(grad_output, y)
        ctx.save_for_forward(grad_output, y)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, y = ctx.saved_tensors
        v = v.to(y.dtype)
        if ctx.log:
            p, total = y.exp(), g.sum(ctx.dim, keepdim=True)
            return v - (v * p).sum(ctx.dim, keepdim=True), -v * p * total, None, None, None
        v_mean, g_mean = ((t * y).sum(ctx.dim, keepdim=True) for t in (v, g))
        return y * (v - v_mean), v * (g - g_mean) - g * v_mean, None, None, None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Any) -> Any:
        g, y = saved
        dg, dy = (torch.zeros_like(y) if t is None else t for t in tangents[:2])
        if ctx.log:
            p, total = y.exp(), g.sum(ctx.dim, keepdim=True)
            out = dg - p * (dg.sum(ctx.dim, keepdim=True) + dy * total)
        else:
            mean, change = (t.sum(ctx.dim, keepdim=True) for t in (g * y, dg * y + g * dy))
            out = dy * (g - mean) + y * (dg - change)
        return out.to(ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], g: Tensor, y: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Any:
        g, y = (to_front(t, d, info.batch_size) for t, d in ((g, in_dims[0]), (y, in_dims[1])))
        return SoftmaxBackward.apply(g, y, dim + 1, log, dtype), 0


# ---- the function ----


class Softmax(Function):
    """(input, dim, log, dtype) -> softmax or log_softmax over dim, which is not negative."""

    @staticmethod
    def forward(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Any:
        return ops.softmax(input, dim, log, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, ctx.dim, ctx.log, _ = inputs
        ctx.dtype, ctx.output_dtype = input.dtype, output.dtype
        ctx.save_for_backward(output)
        ctx.save_for_forward(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient: Any = ops.softmax_backward
        if refusals.is_backward_traced():
            gradient = _softmax_backward_traced
        elif not is_plain_backward():
            gradient = _gradient_by_formula if is_batched((grad,)) else SoftmaxBackward.apply
        return gradient(grad, *ctx.saved_tensors, ctx.dim, ctx.log, ctx.dtype), None, None, None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], tangent: Tensor, *_: None) -> Any:
        (x,) = saved  # the input and not the output, because nested forward mode would miss the output's tangent
        t = tangent.to(ctx.output_dtype)
        p = internals.softmax(x, ctx.dim, ctx.output_dtype)
        centred = t - (t * p).sum(ctx.dim, keepdim=True)
        return centred if ctx.log else p * centred

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, dim: int, log: bool, dtype: Any) -> Any:
        return Softmax.apply(to_front(input, in_dims[0], info.batch_size), dim + 1, log, dtype), 0


# torch asks for the signature at every call; see cross_entropy.py.
_forward: Any
for _forward in (SoftmaxBackward.forward, Softmax.forward):
    _forward.__signature__ = inspect.signature(_forward)

_apply = internals.eager_apply(Softmax)


def eager_softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Tensor:
    """Softmax or log-softmax outside of transforms."""
    return _apply(internals.alive(input), dim, log, dtype)  # type: ignore[no-any-return]
