"""What the Functions share: torch.func's transforms, forward mode, and gradients that autograd batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .. import internals

# ---- what is going on ----


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work, which only the full Functions understand."""
    return internals.transforms_active() or internals.forward_mode_level() >= 0


def needs_plain_formulas(target: Tensor, weight: Tensor | None, transformed: bool, compiling: bool) -> bool:
    """Whether a derivative may be asked for that no Function has.

    That is one in the class weights, which torch has for probabilities only, and any within a transform that is itself
    compiled: Dynamo takes no ``jvp`` and would lose the derivatives of a Function in silence.
    """
    if transformed:
        return compiling or (weight is not None and target.is_floating_point())
    return weight is not None and weight.requires_grad and torch.is_grad_enabled()


def is_batched(upstream: Sequence[Tensor | None]) -> bool:
    """Whether autograd batches the gradient (``is_grads_batched``)."""
    return any(g is not None and internals.is_batched_gradient(g) for g in upstream)


def is_plain_backward() -> bool:
    """Whether nothing differentiates the gradient, so that backward may call the operator itself."""
    return not (torch.is_grad_enabled() or in_transform())


def is_plain(upstream: Sequence[Tensor | None]) -> bool:
    """Whether nothing differentiates or batches the gradient."""
    return is_plain_backward() and not is_batched(upstream)


# ---- forward mode ----


def nested_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a ``jvp`` be differentiated in forward mode itself.

    Torch runs a Function's jvp with forward mode switched off, so that an outer level of it would see a constant and
    second derivatives would be wrong in silence. Here it is on, and the level being computed is taken off the inputs.
    """

    def nested(ctx: Any, *tangents: Any) -> Any:
        with internals.forward_mode_enabled():
            saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            return jvp(ctx, saved, *tangents)

    return nested


# ---- vmap ----


def to_front(tensor: Tensor, batch_dim: int | None, size: int, to: int = 0) -> Tensor:
    """The vmapped dimension moved to ``to``; a tensor without one is expanded."""
    if batch_dim is None:
        return tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])
    return tensor.movedim(batch_dim, to)


# Dynamo traces this loop where compiled code is vmapped, and fails; its import costs the first call a second.
@internals.disable_dynamo
def one_by_one(function: type[Function], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Vmap as a loop, for arguments that the kernels take only once per call.

    An empty batch takes its shapes and its graph from a sample of zeros, which is left out.
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
    """One entry for each of ``needs``; ``grads`` holds those that are needed."""
    remaining = iter(grads)
    return [next(remaining) if needed else None for needed in needs]
