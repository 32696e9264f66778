"""Cross entropy of logits for autograd.

- CrossEntropy is used within transforms and has all derivatives. It has the default strategy: backward reads the saved
  logits again.
- EagerCrossEntropy is used outside of transforms, where the Function itself must cost little. It has the default
  strategy, precompute_grad and inplace.
- CrossEntropyBackward is the kernels' gradient. Its derivatives are the formulas of reference.py.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .. import internals, ops
from ..dtypes import arithmetic_dtype
from ..options import MEAN, NONE, Options
from ..reference import Rows, Upstream, divisor_of, shares, total_weight, undivided
from . import refusals
from .transforms import is_batched, is_plain, is_plain_backward, nested_forward_mode, one_by_one, spread, to_front

# ---- the gradient ----


class BackwardCall(NamedTuple):
    """The arguments of CrossEntropyBackward; also their gradients and their vmapped dimensions, in the same order."""

    grad_loss: Tensor | None = None
    grad_lse: Tensor | None = None
    grad_nll: Tensor | None = None
    grad_entropy: Tensor | None = None
    input: Any = None
    target: Any = None
    weight: Any = None
    state: Any = None
    total_weight: Any = None
    entropy: Any = None
    options: Any = None
    needs_input: Any = None
    needs_target: Any = None
    row_weight: Any = None

    @property
    def upstream(self) -> Upstream:
        """The upstream gradients of the loss and the statistics."""
        return Upstream(self.grad_loss, self.grad_lse, self.grad_nll, self.grad_entropy)


class CrossEntropyBackward(Function):
    """BackwardCall -> those of (grad_input, grad_target) that are needed. Linear in the upstream gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        call = BackwardCall(*args)
        tensors = (call.input, call.target, call.weight, call.state, call.total_weight, call.entropy)
        needs = (call.needs_input, call.needs_target)
        grads = ops.cross_entropy_backward(*call.upstream, *tensors, *call.options, *needs, row_weight=call.row_weight)
        return tuple(grad for grad, needed in zip(grads, needs, strict=True) if needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        call = BackwardCall(*inputs)
        ctx.options, ctx.needs = call.options, (call.needs_input, call.needs_target)
        kept = (*call.upstream, call.input, call.target, call.weight, call.total_weight, call.row_weight)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *upstream, input, target, weight, total, row_weight = ctx.saved_tensors
        rows = Rows(input, target, weight, ctx.options, row_weight, total)
        g = rows.row_gradients(upstream)
        along_input, along_target = spread(grads, ctx.needs)
        slopes = rows.derivative(along_input, along_target)
        slopes = slopes._replace(loss=rows.reduce_slope(slopes.loss))
        needs = BackwardCall(*ctx.needs_input_grad)
        of_upstream = [
            slope.to(like.dtype) if needed and like is not None else None
            for slope, like, needed in zip(slopes, upstream, needs.upstream, strict=True)
        ]
        return BackwardCall(*of_upstream)._replace(
            input=rows.gradient_derivative(g, along_input, along_target) if needs.input else None,
            target=rows.target_gradient_derivative(g, along_input).to(target.dtype) if needs.target else None,
        )

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        *upstream, input, target, weight, total, row_weight = saved
        rows = Rows(input, target, weight, ctx.options, row_weight, total)
        g = rows.row_gradients(upstream)
        along = BackwardCall(*tangents)
        dg = rows.row_gradients(along.upstream)
        needs_input, needs_target = ctx.needs
        out = []
        if needs_input:
            out.append(rows.gradient(dg) + rows.gradient_derivative(g, along.input, along.target))
        if needs_target:
            of_target = rows.target_gradient(dg) + rows.target_gradient_derivative(g, along.input)
            out.append(of_target.to(target.dtype))
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size, call = info.batch_size, BackwardCall(*args)
        dims: Any = BackwardCall(*in_dims)
        if dims.weight is not None or (dims.total_weight is not None and _scales_z_loss(call, dims)):
            return one_by_one(CrossEntropyBackward, size, in_dims, args)
        of_rows = undivided(call.total_weight) if _scales_z_loss(call, dims) else None
        options: Options = call.options
        input = to_front(call.input, dims.input, size)
        lse, nll, entropy = (
            None if g is None else to_front(g, d, size)
            for g, d in zip(call.upstream[1:], dims.upstream[1:], strict=True)
        )
        grads = CrossEntropyBackward.apply(
            *BackwardCall(
                _loss_of_rows(call, dims, size, input),
                lse,
                nll,
                entropy,
                input,
                to_front(call.target, dims.target, size),
                call.weight,
                to_front(call.state, dims.state, size, to=1).contiguous(),
                torch.ones((), dtype=torch.float64, device=input.device) if of_rows is None else of_rows,
                None if call.entropy is None else to_front(call.entropy, dims.entropy, size).contiguous(),
                options._replace(dim=options.dim + 1, reduction=NONE),
                call.needs_input,
                call.needs_target,
                None if call.row_weight is None else to_front(call.row_weight, dims.row_weight, size),
            )
        )
        return grads, (0,) * len(grads)


def _scales_z_loss(call: BackwardCall, dims: Any) -> bool:
    """Whether the total weight of each sample has a factor of z_loss."""
    shape = list(call.total_weight.shape)
    if dims.total_weight is not None:
        del shape[dims.total_weight]
    return shape == [2]


def _loss_of_rows(call: BackwardCall, dims: BackwardCall, size: int, input: Tensor) -> Tensor | None:
    """The upstream gradient of each row's loss, from that of each sample's loss; ``input`` has the samples in front."""
    if call.grad_loss is None:
        return None
    batch_dim: Any = dims.grad_loss
    grad = to_front(call.grad_loss, batch_dim, size)
    if call.options.reduction == NONE:
        return grad
    grad = grad.to(call.state.dtype)
    if call.options.reduction == MEAN:
        total = divisor_of(call.total_weight) if dims.total_weight is None else call.total_weight
        grad = grad / to_front(total, dims.total_weight, size).to(grad.dtype)
    rows = [n for d, n in enumerate(input.shape) if d != call.options.dim + 1]
    return grad.reshape(size, *[1] * (len(rows) - 1)).expand(rows)


def formula_gradients(
    upstream: Upstream,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    options: Options,
    needs: Sequence[bool],
    row_weight: Tensor | None = None,
) -> list[Tensor | None]:
    """(grad_input, grad_target) by torch's operations, for batched gradients that are differentiated again.

    Where autograd batches gradients, torch's operations have a graph and tangents, but a Function silently loses both.
    """
    rows = Rows(input, target, weight, options, row_weight, total)
    of_rows = rows.row_gradients(upstream)
    needs_input, needs_target = needs
    grad_target = rows.target_gradient(of_rows).to(target.dtype) if needs_target else None
    return [rows.gradient(of_rows) if needs_input else None, grad_target]


def _gradients(
    ctx: Any, loss: Tensor | None, lse: Tensor | None, nll: Tensor | None, entropy: Tensor | None
) -> Sequence[Tensor | None]:
    """(grad_input, grad_target) from the upstream gradients; None for a gradient that is not needed."""
    if loss is None and lse is None and nll is None and entropy is None:
        return None, None
    needs_input, needs_target = needs = ctx.needs_input_grad[:2]
    # Only once, because non-reentrant checkpoints free a saved tensor when it is unpacked.
    input, target, weight, state, total, entropy_values, row_weight = ctx.saved_tensors
    if refusals.is_backward_traced():
        given = next(g for g in (loss, lse, nll, entropy) if g is not None)
        total = refusals.refusing(total, given, "cross_entropy")
    tensors = (loss, lse, nll, entropy, input, target, weight, state, total, entropy_values)
    if not is_plain_backward():
        upstream = Upstream(loss, lse, nll, entropy)
        if is_batched(upstream):
            return formula_gradients(upstream, input, target, weight, total, ctx.options, needs, row_weight)
        return spread(CrossEntropyBackward.apply(*tensors, ctx.options, *needs, row_weight), needs)
    grad_input, grad_target = ops.cross_entropy_backward(*tensors, *ctx.options, *needs, row_weight=row_weight)
    return grad_input if needs_input else None, grad_target if needs_target else None


# ---- the loss, with all derivatives ----


class Results(NamedTuple):
    """The operator's results, or their gradients; without statistics only the first three."""

    loss: Tensor
    state: Tensor
    total_weight: Tensor
    lse: Any = None
    nll: Any = None
    entropy: Any = None
    prediction: Any = None


class CrossEntropy(Function):
    """The loss with all derivatives.

    (input, target, weight, denominator, options, dtype, stats, row_weight) -> Results: all seven with ``stats``, else
    three.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        input, target, weight, denominator, options, dtype, stats, row_weight = args
        return tuple(ops.cross_entropy(input, target, weight, *options, dtype, stats, False, denominator, row_weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        input, target, weight, _, ctx.options, _, ctx.stats, row_weight = inputs
        results = Results(*output)
        ctx.dtypes = (results.loss.dtype, results.state.dtype)
        kept = (input, target, weight, results.state, results.total_weight, results.entropy, row_weight)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        prediction = [results.prediction] if ctx.stats else []
        ctx.mark_non_differentiable(results.state, results.total_weight, *prediction)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = Results(*grads)  # type: ignore[arg-type]
        grad_input, grad_target = _gradients(ctx, given.loss, given.lse, given.nll, given.entropy)
        return grad_input, grad_target, None, None, None, None, None, None

    @staticmethod
    @nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        input, target, weight, _, total, _, row_weight = saved
        along_input, along_target, along_weight, *_ = tangents
        if along_weight is not None:
            raise RuntimeError("cross_entropy: weight has no forward-mode derivative here. Use weight.detach().")
        rows = Rows(input, target, weight, ctx.options, row_weight, total)
        along = rows.derivative(along_input, along_target)
        loss_dtype, stats_dtype = ctx.dtypes
        loss = rows.reduce_slope(along.loss).to(loss_dtype)
        if not ctx.stats:
            return loss, None, None
        return (loss, None, None, *(t.to(stats_dtype) for t in along[1:]), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        input, target, weight, denominator, options, dtype, stats, row_weight = args
        input_dim, target_dim, weight_dim, denominator_dim, *_, row_weight_dim = in_dims
        has_factor = options.scales_z_loss(target, weight)  # of each sample
        if denominator is not None:
            has_factor = denominator.dim() > (denominator_dim is not None)
        if weight_dim is not None or has_factor:
            return one_by_one(CrossEntropy, size, in_dims, args)
        x, y = to_front(input, input_dim, size), to_front(target, target_dim, size)
        factors = None if row_weight is None else to_front(row_weight, row_weight_dim, size)
        loss_dtype = dtype or x.dtype
        wide = arithmetic_dtype(loss_dtype, x.dtype)
        row_options = options._replace(dim=options.dim + 1, reduction=NONE)
        loss, state, _, *rest = CrossEntropy.apply(x, y, weight, None, row_options, wide, stats, factors)
        if denominator is None:
            total = _weight_per_sample(y, weight, options, factors)
        else:
            total = to_front(denominator, denominator_dim, size).clone()  # a result must not be an argument
        if options.reduction != NONE:
            loss = _sum_per_sample(loss)
        if options.reduction == MEAN:
            loss = loss / total.to(loss.dtype)
        return (loss.to(loss_dtype), state, total, *rest), (0, 1, 0, *[0] * len(rest))


def _sum_per_sample(rows: Tensor) -> Tensor:
    """The sum over all dimensions but the first."""
    return rows.flatten(1).sum(1) if rows.dim() > 1 else rows


def _weight_per_sample(target: Tensor, weight: Tensor | None, options: Options, row_weight: Tensor | None) -> Tensor:
    """``total_weight`` of each sample target[i], row_weight[i]. ``options`` are those of one sample."""
    if target.is_floating_point():
        if row_weight is not None and target.shape[options.dim + 1] != 0:
            return _sum_per_sample(row_weight.double())
        sample = target.new_empty(()).expand(target.shape[1:])
        return total_weight(sample, weight, options).expand(target.shape[0])
    return _sum_per_sample(shares(target, weight, options.ignore_index, row_weight).double())


# torch binds the arguments of ``forward`` to its signature at every call. With the signature stored here, inspect does
# not compute it each time, which took a quarter of a call on a small input.
_forward: Any
for _forward in (CrossEntropyBackward.forward, CrossEntropy.forward):
    _forward.__signature__ = inspect.signature(_forward)


# ---- eager calls ----


def _may_have_written(error: Exception, input: Tensor) -> bool:
    """Whether an operator that raised may have begun to write.

    On the CPU it has not, because it allocates all memory before it writes. On CUDA it may have queued the kernel that
    writes and failed to queue another.
    """
    return input.is_cuda and not isinstance(error, IndexError)


def _keep_gradient(reference: weakref.ref[Tensor], grad: Tensor) -> None:
    """As retain_grad() does. The reference is weak, since the logits refer to the node that has this hook."""
    logits = reference()
    if logits is not None:
        logits.grad = grad.clone() if logits.grad is None else logits.grad + grad


class InplaceCrossEntropy(Function):
    """Logits -> the same tensor, after its gradient was written over it.

    So everything that is computed from the tensor afterwards depends on this node. Nothing of it has a derivative with
    respect to the logits, whose values are lost. Of a base, of which the logits are a view, other parts may be used.
    """

    @staticmethod
    def replaces_history_of(logits: Tensor) -> None:
        """Makes the caller's tensor the result."""
        if logits.retains_grad:  # torch would move that to the result
            logits.register_hook(partial(_keep_gradient, weakref.ref(logits)))
        internals.replace_history(_inplace, logits)

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.mark_dirty(input)
        ctx.set_materialize_grads(False)
        ctx.is_view = internals.view_base(input) is not input
        return input

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        if ctx.is_view and not internals.is_batched_gradient(grad) and not grad.any():
            return grad  # the zeros that a base, of which another part is used, has here
        raise RuntimeError(
            "cross_entropy: inplace=True has written the gradient over the logits, and they are used again afterwards. "
            "Compute what needs them before, or use inplace=False. return_stats=True gives predictions and entropy."
        )


@dataclass
class _EarlyGradient:
    """The gradient of a graph with ``precompute_grad`` or ``inplace``, and what has happened to it.

    An object of its own, because compiled autograd calls backward with another ctx, which refers to the same object.
    """

    inplace: bool = False  # the gradient is or will be in the logits' memory
    logits: Tensor | None = None  # the caller's tensor, until backward has written over it
    unscaled: bool = False  # forward wrote it there; the upstream gradient is not multiplied into it yet
    overwritten: bool = False  # the logits are lost
    gradient: list[Tensor] = field(default_factory=list)  # in memory of its own, until it is taken. Not a saved
    # tensor: its taker must hold the only reference.


class EagerCrossEntropy(Function):
    """(input, target, weight, call) -> loss, or a tuple with statistics.

    ``call`` is (options, dtype, stats, precompute_grad, inplace, denominator, row_weight).

    On a small input the code around the kernels takes most of the time. This form of CrossEntropy has less of it:
    ``forward`` sees ``ctx``, returns only the caller's results, saves nothing for forward mode, and has few arguments.

    The first backward takes a precomputed gradient, multiplies it in place by an upstream gradient other than 1, and
    hands it over. A further backward computes the gradient again from the logits. If they are overwritten, it raises.

    A gradient over the logits is a saved tensor, so autograd notices a write to it before backward uses it.
    Saved-tensor hooks would move it to other memory. So functional.py uses the default strategy under such hooks.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, call: tuple[Any, ...]) -> Any:
        ctx.options, dtype, stats, precompute_grad, inplace, *factors = call
        ctx.set_materialize_grads(False)
        results: list[Tensor]
        if precompute_grad and inplace:
            results = _overwrite(input, target, weight, *ctx.options, dtype, stats, *factors)
            input = input.detach()  # it holds the gradient now, so it must not be saved as an input of the graph
            ctx.early = _EarlyGradient(inplace=True, unscaled=True, overwritten=True)
        else:
            results = ops.cross_entropy(input, target, weight, *ctx.options, dtype, stats, precompute_grad, *factors)
            if precompute_grad:
                ctx.early = _EarlyGradient(gradient=[results.pop()])
            else:
                ctx.early = _EarlyGradient(inplace=True, logits=input) if inplace else None
        if not stats:
            loss, state, total = results[:3]
            ctx.save_for_backward(input, target, weight, state, total, None, factors[1])
            return loss
        loss, state, total, lse, nll, entropy, prediction = results
        ctx.save_for_backward(input, target, weight, state, total, entropy, factors[1])
        ctx.mark_non_differentiable(prediction)
        return loss, lse, nll, entropy, prediction

    @staticmethod
    def backward(
        ctx: Any,
        loss: Tensor | None,
        lse: Tensor | None = None,
        nll: Tensor | None = None,
        entropy: Tensor | None = None,
        prediction: None = None,
    ) -> tuple[Tensor | None, ...]:
        early: _EarlyGradient | None = ctx.early
        if early is not None and early.inplace:
            return _gradient_inplace(ctx, early, Upstream(loss, lse, nll, entropy)), None, None, None
        if early is not None and early.gradient and any(g is not None for g in (loss, lse, nll, entropy)):
            gradient = early.gradient.pop()
            if loss is not None and lse is nll is entropy is None and is_plain((loss,)):
                _scale(ctx, gradient, loss)
                return gradient, None, None, None
        grad_input, grad_target = _gradients(ctx, loss, lse, nll, entropy)
        return grad_input, grad_target, None, None


def _overwrite(input: Tensor, *arguments: Any) -> list[Tensor]:
    """Calls the operator that writes the gradient over the logits, and tells autograd that the logits have changed."""
    written = True
    try:
        return list(ops.cross_entropy_(input, *arguments))
    except Exception as error:
        written = _may_have_written(error, input)
        raise
    finally:  # also if KeyboardInterrupt, which waits for the operator, is raised before the next line
        if written:
            torch.autograd.graph.increment_version(input)


def _gradient_inplace(ctx: Any, early: _EarlyGradient, upstream: Upstream) -> Tensor | None:
    if all(g is None for g in upstream):
        return None
    refused = None
    if not is_plain(upstream):
        refused = "it can't be differentiated again (create_graph=True) or batched"
    elif early.overwritten and not early.unscaled:
        refused = "a second backward through it is not possible"
    elif early.unscaled and any(g is not None for g in upstream[1:]):
        refused = "its statistics can't be differentiated"
    if refused:
        writes = "has written" if early.overwritten else "writes"
        raise RuntimeError(
            f"cross_entropy: inplace=True {writes} the gradient over the logits, so {refused}. Use inplace=False."
        )
    input, target, weight, state, total, entropy, row_weight = ctx.saved_tensors
    gradient: Tensor = input.detach()
    written = True
    try:
        if early.unscaled:
            _scale(ctx, gradient, upstream.loss)
        else:
            tensors = (*upstream, gradient, target, weight, state, total, entropy)
            ops.cross_entropy_backward_(*tensors, *ctx.options, row_weight=row_weight)
    except Exception as error:
        written = _may_have_written(error, input)
        raise
    finally:
        if written:
            torch.autograd.graph.increment_version(input)
            early.overwritten, early.unscaled = True, False
            if early.logits is not None:
                InplaceCrossEntropy.replaces_history_of(early.logits)
                early.logits = None
    return gradient


def _scale(ctx: Any, gradient: Tensor, grad_loss: Any) -> None:
    """Multiplies a precomputed gradient by its upstream gradient, in place."""
    if gradient.dtype == torch.float16 and ctx.options.reduction == MEAN:  # forward did not divide it by the total
        *_, total, _, _ = ctx.saved_tensors
        grad_loss = grad_loss.to(total.dtype) / divisor_of(total)
    ops.scale_rows_(gradient, grad_loss, ctx.options.dim)


_apply = internals.eager_apply(EagerCrossEntropy)
_inplace = internals.eager_apply(InplaceCrossEntropy)


def eager_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *call: Any) -> Sequence[Tensor]:
    """EagerCrossEntropy: the loss, then the statistics."""
    weight = None if weight is None else internals.alive(weight)
    input = internals.alive(input)
    target = internals.alive(target)
    *_, precompute_grad, inplace, _, _ = call
    if not (precompute_grad and inplace):
        results = _apply(input, target, weight, call)
    else:
        version = input._version
        try:
            results = _apply(input, target, weight, call)
        finally:  # after KeyboardInterrupt too
            if input._version != version:
                InplaceCrossEntropy.replaces_history_of(input)
    return results if type(results) is tuple else (results,)
