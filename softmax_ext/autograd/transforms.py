"""Helpers of all Functions for torch.func's transforms, forward mode, and gradients that autograd batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import internals

# ---- which transforms are active ----


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is active. Then only a Function with all derivatives may be used."""
    return internals.transforms_active() or internals.forward_mode_level() >= 0


def needs_plain_formulas(target: Tensor, weight: Tensor | None, transformed: bool, compiling: bool) -> bool:
    """Whether a derivative may be asked for that no Function has.

    There are two kinds. The first is a derivative in the class weights, which torch has for probabilities only. The
    second is any derivative in a transform that is compiled: Dynamo accepts no ``jvp``, and would silently lose the
    derivatives of a Function.
    """
    if transformed:
        return compiling or (weight is not None and target.is_floating_point())
    return weight is not None and weight.requires_grad and torch.is_grad_enabled()


def is_batched(upstream: Sequence[Tensor | None]) -> bool:
    """Whether autograd batches the gradient (``is_grads_batched``)."""
    return any(g is not None and internals.is_batched_gradient(g) for g in upstream)


def is_plain_backward() -> bool:
    """Whether nothing differentiates the gradient, and torch.func does not batch it.

    Then backward may call the operator itself.
    """
    return not (torch.is_grad_enabled() or in_transform())


def is_plain(upstream: Sequence[Tensor | None]) -> bool:
    """Whether nothing differentiates or batches the gradient."""
    return is_plain_backward() and not is_batched(upstream)


# ---- forward mode ----


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward mode is at work and the tensor has a tangent there."""
    return internals.forward_mode_level() >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def nested_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a ``jvp`` differentiable in forward mode.

    torch runs a Function's jvp with forward mode switched off. An outer level of forward mode then sees a constant, and
    second derivatives are silently wrong. So this switches forward mode on, and removes from the saved tensors the
    tangents of the level that the jvp computes.
    """

    def nested(ctx: Any, *tangents: Any) -> Any:
        with internals.forward_mode_enabled():
            saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            return jvp(ctx, saved, *tangents)

    return nested


# ---- vmap ----


def to_front(tensor: Tensor, batch_dim: int | None, size: int, to: int = 0) -> Tensor:
    """The tensor with its vmapped dimension moved to ``to``; expanded there to ``size`` if it has none."""
    if batch_dim is None:
        return tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])
    return tensor.movedim(batch_dim, to)


# Where compiled code is vmapped, Dynamo would trace this loop, and fail. The first call imports Dynamo to switch it
# off, which takes a second.
@internals.disable_dynamo
def one_by_one(function: type[Function], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """A vmap as a loop, for arguments that the kernels accept only once per call.

    For an empty batch one sample of zeros gives the shapes and the graph, and is then left out.
    """

    def sample(i: int) -> list[Any]:
        def of(arg: Any, batch_dim: Any) -> Any:
            if not isinstance(arg, Tensor) or batch_dim is None:
                return arg
            return arg.select(batch_dim, i) if size else arg.sum(batch_dim, dtype=arg.dtype)

        return [of(arg, batch_dim) for arg, batch_dim in zip(args, in_dims, strict=True)]

    results = [function.apply(*sample(i)) for i in range(max(size, 1))]
    return tuple(torch.stack(r)[:size] for r in zip(*results, strict=True)), (0,) * len(results[0])


# ---- gradients that are not all needed ----


def spread(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """One entry for each of ``needs``: the next of ``grads`` if it is needed, else None."""
    remaining = iter(grads)
    return [next(remaining) if needed else None for needed in needs]
