"""What the backward of compiled code refuses: to be differentiated itself, which torch.compile cannot.

torch.compile keeps only numbers for a backward, so that nobody can differentiate it. Torch does not always say so:

- before 2.13 the gradient is a constant where nothing that was kept requires grad;
- with every version a gradient penalty is left out where a derivative is asked for in certain tensors
  (``torch.autograd.grad``, ``backward(inputs=...)``, ``torch.autograd.functional.hessian``);
- with every version forward mode loses the tangent of an upstream gradient.

So the operators of a compiled backward look at what is going on when they run, and refuse.

``refusing(value, upstream, op)`` puts that into a traced backward; ``softmax_backward`` has it in itself;
``refusing_backward(value, op)`` puts it behind results that torch differentiates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import internals, ops

_WAY_OUT = "Call the function without torch.compile for it."


def _refuse_derivatives(op: str) -> None:
    if torch.is_grad_enabled() or internals.in_double_backward():
        raise RuntimeError(
            f"{op}: the backward of compiled code can't be differentiated again (create_graph=True). {_WAY_OUT}"
        )
    if internals.forward_mode_level() >= 0:
        raise RuntimeError(f"{op}: the backward of compiled code has no derivative in forward mode. {_WAY_OUT}")


def _refusing(value: Tensor, upstream: Tensor, op: str) -> Tensor:
    _refuse_derivatives(op)
    return value.clone()


def _softmax_backward(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    _refuse_derivatives("log_softmax" if log else "softmax")
    return ops.softmax_backward(grad_output, output, dim, log, dtype)  # type: ignore[no-any-return]


def _keep_op(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.op = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return (refusing(grad, grad, ctx.op) if internals.is_tracing() else grad), None


# A copy of ``value``, which is small. ``upstream`` only keeps it from being computed in the forward.
torch.library.define("softmax_ext::refusing", "(Tensor value, Tensor upstream, str op) -> Tensor")
torch.library.impl("softmax_ext::refusing", "default", _refusing)
torch.library.register_fake("softmax_ext::refusing", lambda value, upstream, op: torch.empty_like(value))
refusing = torch.ops.softmax_ext.refusing.default

torch.library.define(
    "softmax_ext::softmax_backward_traced",
    "(Tensor grad_output, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor",
)
torch.library.impl("softmax_ext::softmax_backward_traced", "default", _softmax_backward)
torch.library.register_fake("softmax_ext::softmax_backward_traced", ops._fake_softmax_backward)
softmax_backward = torch.ops.softmax_ext.softmax_backward_traced.default


# For results of torch's own operations: a copy, whose backward refuses where it is compiled.
torch.library.define("softmax_ext::refusing_backward", "(Tensor value, str op) -> Tensor")
torch.library.impl("softmax_ext::refusing_backward", "default", lambda value, op: value.clone())
torch.library.register_fake("softmax_ext::refusing_backward", lambda value, op: torch.empty_like(value))
torch.library.register_autograd("softmax_ext::refusing_backward", _backward, setup_context=_keep_op)
refusing_backward = torch.ops.softmax_ext.refusing_backward.default
