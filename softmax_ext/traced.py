"""The operators that torch.compile and torch.export see, and what they refuse: to lose a derivative in silence.

What is traced is one operator with a derivative of its own, which autograd.py registers. The arguments are those of the
operator that it calls, and the package's version (see ops.VERSION).

torch.compile keeps only numbers for a backward, so that nobody can differentiate it. Torch does not always say so:

- before 2.13 the gradient is a constant where nothing that was kept requires grad;
- with every version a gradient penalty is left out where a derivative is asked for in certain tensors
  (``torch.autograd.grad``, ``backward(inputs=...)``, ``torch.autograd.functional.hessian``);
- with every version forward mode loses the tangent of an upstream gradient and, where nothing requires grad, that of
  an operator's input.

So these operators look at what is going on when they run, and refuse. ``refusing(value, upstream, op)`` puts that into
a backward that is traced; ``softmax_backward`` has it in itself; ``refusing_backward(value, op)`` puts it behind
results that torch differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import internals, ops

_WAY_OUT = "Call the function itself for it, neither compiled nor exported."


def is_backward_traced() -> bool:
    """Whether a backward runs to be traced, not to be differentiated: then it must have what refuses in it."""
    return internals.is_tracing() and not torch.is_grad_enabled()


def _refuse_derivatives(op: str, *operands: Tensor) -> None:
    """RuntimeError where the backward that runs was traced before, and is differentiated."""
    in_backward = internals.graph_task() != -1
    if torch.is_grad_enabled() and (in_backward or any(t.requires_grad for t in operands)):
        differentiated = True
    else:
        differentiated = in_backward and internals.in_double_backward()
    if differentiated:
        raise RuntimeError(
            f"{op}: the backward of compiled code can't be differentiated again (create_graph=True). {_WAY_OUT}"
        )
    if internals.forward_mode_level() >= 0:
        raise RuntimeError(f"{op}: the backward of compiled code has no derivative in forward mode. {_WAY_OUT}")


def refuse_tangents(op: str, *operands: Tensor | None) -> None:
    """RuntimeError where forward mode would lose the tangent of one of them."""
    if internals.forward_mode_level() < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in operands):
        raise RuntimeError(f"{op}: compiled and exported code has no derivative in forward mode here. {_WAY_OUT}")


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator of this namespace, for every device."""
    torch.library.define(f"softmax_ext::{name}", schema)
    torch.library.impl(f"softmax_ext::{name}", "default", kernel)
    torch.library.register_fake(f"softmax_ext::{name}", fake)
    return getattr(torch.ops.softmax_ext, name).default


# ---- forward ----


def _cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> list[Tensor]:
    refuse_tangents("cross_entropy", input, target, weight)
    return ops.cross_entropy(input, target, weight, *options[:-1])  # type: ignore[no-any-return]


def _softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None, version: int) -> Tensor:
    refuse_tangents("log_softmax" if log else "softmax", input)
    return ops.softmax(input, dim, log, dtype)  # type: ignore[no-any-return]


cross_entropy = _define(
    "cross_entropy_traced",
    "(Tensor input, Tensor target, Tensor? weight, int dim, int reduction, int ignore_index, float label_smoothing, "
    "float z_loss, float? softcap, float logit_scale, ScalarType? dtype, bool stats, bool precompute_grad, int version)"
    " -> Tensor[]",
    _cross_entropy,
    lambda *arguments: ops._fake_cross_entropy(*arguments[:-1]),
)
softmax = _define(
    "softmax_traced",
    "(Tensor input, int dim, bool log, ScalarType? dtype, int version) -> Tensor",
    _softmax,
    lambda *arguments: ops._fake_softmax(*arguments[:-1]),
)

# ---- backward ----


def _refusing(value: Tensor, upstream: Tensor, op: str) -> Tensor:
    _refuse_derivatives(op, value, upstream)
    return value.clone()


def _softmax_backward(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    _refuse_derivatives("log_softmax" if log else "softmax", grad_output, output)
    return ops.softmax_backward(grad_output, output, dim, log, dtype)  # type: ignore[no-any-return]


# A copy of ``value``, which is small. ``upstream`` only keeps it from being computed in the forward.
refusing = _define(
    "refusing",
    "(Tensor value, Tensor upstream, str op) -> Tensor",
    _refusing,
    lambda value, upstream, op: torch.empty_like(value),
)
softmax_backward = _define(
    "softmax_backward_traced",
    "(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor",
    _softmax_backward,
    ops._fake_softmax_backward,
)

# ---- behind torch's own operations ----


def _copy(value: Tensor, op: str) -> Tensor:
    refuse_tangents(op, value)
    return value.clone()


def _keep_op(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.op = inputs[1]


def _refusing_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return (refusing(grad, grad, ctx.op) if is_backward_traced() else grad), None


refusing_backward = _define(
    "refusing_backward", "(Tensor value, str op) -> Tensor", _copy, lambda value, op: torch.empty_like(value)
)
torch.library.register_autograd("softmax_ext::refusing_backward", _refusing_backward, setup_context=_keep_op)
