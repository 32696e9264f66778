"""Exceptions for the derivatives that traced code cannot have, so that none is lost in silence.

torch.compile saves only values for a backward, so that this backward cannot be differentiated. torch does not always
raise then:

- Before 2.13 the gradient is a constant if no saved value requires grad.
- With every version a gradient penalty is left out where a derivative in certain tensors is asked for
  (``torch.autograd.grad``, ``backward(inputs=...)``, ``torch.autograd.functional.hessian``).
- With every version forward mode loses the tangent of an upstream gradient. Where nothing requires grad it also loses
  the tangent of an operator's input.

So the traced operators check, when they run, whether they are differentiated, and raise. ``refusing(value, upstream,
op)`` puts this check into a backward that is traced. ``refusing_backward(value, op)`` puts it behind results that torch
differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import internals
from .transforms import has_tangent

_WAY_OUT = "Call the function itself for it, neither compiled nor exported."


def is_backward_traced() -> bool:
    """Whether a backward is being traced and not differentiated. It must contain the check then."""
    return internals.is_tracing() and not torch.is_grad_enabled()


def refuse_derivatives(op: str, *operands: Tensor) -> None:
    """RuntimeError if the running backward was traced before and is now differentiated."""
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
    """RuntimeError if forward mode would lose the tangent of an operand."""
    if any(t is not None and has_tangent(t) for t in operands):
        raise RuntimeError(f"{op}: compiled and exported code has no derivative in forward mode here. {_WAY_OUT}")


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines an operator ``softmax_ext::name`` for every device, and returns it."""
    torch.library.define(f"softmax_ext::{name}", schema)
    torch.library.impl(f"softmax_ext::{name}", "default", kernel)
    torch.library.register_fake(f"softmax_ext::{name}", fake)
    return getattr(torch.ops.softmax_ext, name).default


# ---- in a backward that is traced ----


def _refusing(value: Tensor, upstream: Tensor, op: str) -> Tensor:
    refuse_derivatives(op, value, upstream)
    return value.clone()


# Returns a copy of ``value``, which is small. Without the argument ``upstream`` torch.compile could move the call into
# the forward.
refusing = define(
    "refusing",
    "(Tensor value, Tensor upstream, str op) -> Tensor",
    _refusing,
    lambda value, upstream, op: torch.empty_like(value),
)

# ---- behind torch's own operations ----


def _copy(value: Tensor, op: str) -> Tensor:
    refuse_tangents(op, value)
    return value.clone()


def _keep_op(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.op = inputs[1]


def _refusing_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return (refusing(grad, grad, ctx.op) if is_backward_traced() else grad), None


refusing_backward = define(
    "refusing_backward", "(Tensor value, str op) -> Tensor", _copy, lambda value, op: torch.empty_like(value)
)
torch.library.register_autograd("softmax_ext::refusing_backward", _refusing_backward, setup_context=_keep_op)
