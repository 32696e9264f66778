"""What code that was traced cannot differentiate, and says so: no derivative is lost in silence.

torch.compile keeps only numbers for a backward, so that nobody can differentiate it. Torch does not always say so:

- before 2.13 the gradient is a constant where nothing that was kept requires grad;
- with every version a gradient penalty is left out where a derivative is asked for in certain tensors
  (``torch.autograd.grad``, ``backward(inputs=...)``, ``torch.autograd.functional.hessian``);
- with every version forward mode loses the tangent of an upstream gradient and, where nothing requires grad, that of
  an operator's input.

So the operators that are traced look at what is going on when they run, and refuse. ``refusing(value, upstream, op)``
puts that into a backward that is traced; ``refusing_backward(value, op)`` puts it behind results that torch
differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import internals

_WAY_OUT = "Call the function itself for it, neither compiled nor exported."


def is_backward_traced() -> bool:
    """Whether a backward runs to be traced, not to be differentiated: then it must have what refuses in it."""
    return internals.is_tracing() and not torch.is_grad_enabled()


def refuse_derivatives(op: str, *operands: Tensor) -> None:
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


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator of this namespace, for every device."""
    torch.library.define(f"softmax_ext::{name}", schema)
    torch.library.impl(f"softmax_ext::{name}", "default", kernel)
    torch.library.register_fake(f"softmax_ext::{name}", fake)
    return getattr(torch.ops.softmax_ext, name).default


# ---- in a backward that is traced ----


def _refusing(value: Tensor, upstream: Tensor, op: str) -> Tensor:
    refuse_derivatives(op, value, upstream)
    return value.clone()


# A copy of ``value``, which is small. ``upstream`` only keeps it from being computed in the forward.
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
