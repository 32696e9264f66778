"""The torch.autograd.Functions around the operators: backward, double backward, forward mode and vmap.

Cross entropy has one Function for each way to hold the gradient:

    CrossEntropy             keeps the logits; backward reads them again. All of autograd works, transforms included.
    EagerCrossEntropy        the same for every other call, where the Function itself must cost little.
    OverwritingCrossEntropy  precompute_grad and inplace: a gradient that is consumed, logits that are overwritten.

The kernels' gradient is a Function of its own, CrossEntropyBackward, whose derivatives are reference.py's formulas.
torch.compile refuses a Function that defines ``jvp``, and loses the second derivative of one that does not. It and
torch.export see an operator instead that has the same backward (at the end).

``options`` stands everywhere for (dim, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import internals, ops, traced
from .ops import MEAN, NONE
from .reference import Options, Rows, row_weights, total_weight

# Results of a cross-entropy operator: always three, with statistics seven.
_LOSS, _STATE, _TOTAL, _LSE, _NLL, _ENTROPY, _PREDICTION = range(7)


def _plain_backward() -> bool:
    """Whether backward may call the operator itself: nothing differentiates or batches the gradient."""
    return not (torch.is_grad_enabled() or internals.transforms_active() or internals.forward_mode_level() >= 0)


def _nested_forward_mode(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a ``jvp`` be differentiated in forward mode itself.

    Torch runs a Function's jvp with forward mode switched off, so that an outer level of it would see a constant and
    second derivatives would be wrong in silence. Here it is on, and the level being computed is taken off the inputs.
    """

    def nested(ctx: Any, *tangents: Any) -> Any:
        with internals.forward_mode_enabled():
            saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            return jvp(ctx, saved, *tangents)

    return nested


def _to_front(tensor: Tensor, batch_dim: int | None, size: int, to: int = 0) -> Tensor:
    """The vmapped dimension moved to ``to``; a tensor without one is expanded."""
    if batch_dim is None:
        return tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])
    return tensor.movedim(batch_dim, to)


# Dynamo traces this loop where compiled code is vmapped, and fails; its import costs the first call a second.
@internals.disable_dynamo
def _one_by_one(function: type[Function], size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Vmap as a loop, for arguments that the kernels take only once per call.

    An empty batch takes its shapes and its graph from a sample of zeros, which is left out.
    """

    def sample(i: int) -> list[Any]:
        return [
            a if d is None else a.select(d, i) if size else a.sum(d, dtype=a.dtype)
            for a, d in zip(args, in_dims, strict=True)
        ]

    results = [function.apply(*sample(i)) for i in range(max(size, 1))]
    return tuple(torch.stack(r)[:size] for r in zip(*results, strict=True)), (0,) * len(results[0])


def _per_sample(rows: Tensor) -> Tensor:
    """Sums all but the first dimension."""
    return rows.flatten(1).sum(1) if rows.dim() > 1 else rows


def _per_sample_weight(target: Tensor, weight: Tensor | None, dim: int, ignore_index: int) -> Tensor:
    """``total_weight`` of each target[i]; dim as in the target of one sample."""
    if target.is_floating_point():
        sample = target.new_empty(()).expand(target.shape[1:])
        return total_weight(sample, weight, dim, ignore_index).expand(target.shape[0])
    return _per_sample(row_weights(target, weight, ignore_index).double())


def _spread(grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    """One entry for each of ``needs``; ``grads`` holds those that are needed."""
    remaining = iter(grads)
    return [next(remaining) if needed else None for needed in needs]


def _is_batched(upstream: Sequence[Tensor | None]) -> bool:
    """Whether autograd batches the gradient (``is_grads_batched``)."""
    return any(g is not None and internals.is_batched_gradient(g) for g in upstream)


def _formula_gradients(
    upstream: Sequence[Tensor | None],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    options: Options,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """(grad_input, grad_target) by torch's operations, where a batched gradient is differentiated itself.

    Autograd's batching keeps the graph and the tangents of those, and silently none of a Function.
    """
    rows = Rows(input, target, weight, options)
    of_rows = rows.row_gradients(upstream, total)
    needs_input, needs_target = needs
    grad_target = rows.target_gradient(of_rows).to(target.dtype) if needs_target else None
    return [rows.gradient(of_rows) if needs_input else None, grad_target]


def _gradients(
    ctx: Any, loss: Tensor | None, lse: Tensor | None, nll: Tensor | None, entropy: Tensor | None
) -> Sequence[Tensor | None]:
    """(grad_input, grad_target) from the upstream gradients, None where not needed."""
    if loss is None and lse is None and nll is None and entropy is None:
        return None, None
    needs_input, needs_target = needs = ctx.needs_input_grad[:2]
    saved = ctx.saved_tensors  # once: non-reentrant checkpoints let go of what has been unpacked
    if traced.is_backward_traced():
        upstream = next(g for g in (loss, lse, nll, entropy) if g is not None)
        saved = [*saved[:4], traced.refusing(saved[4], upstream, "cross_entropy"), saved[5]]
    call = (loss, lse, nll, entropy, *saved, *ctx.options, needs_input, needs_target)
    if not _plain_backward():
        if _is_batched(call[:4]):
            input, target, weight, _, total, _ = saved
            return _formula_gradients(call[:4], input, target, weight, total, Options(*ctx.options), needs)
        return _spread(CrossEntropyBackward.apply(*call), needs)
    grad_input, grad_target = ops.cross_entropy_backward(*call)
    return grad_input if needs_input else None, grad_target if needs_target else None


class CrossEntropyBackward(Function):
    """(grad_input, grad_target) from the upstream gradients, those not needed left out; linear in the gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        grads = ops.cross_entropy_backward(*args)
        return tuple(grad for grad, needed in zip(grads, args[17:], strict=True) if needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, needs_input, needs_target = inputs
        ctx.options = Options(*tensors[10:])
        ctx.needs = (needs_input, needs_target)
        ctx.save_for_backward(*tensors[:7], tensors[8])
        ctx.save_for_forward(*tensors[:7], tensors[8])
        ctx.set_materialize_grads(False)

    @staticmethod
    def _problem(ctx: Any, saved: Sequence[Any]) -> tuple[Rows, Any]:
        *upstream, input, target, weight, total = saved
        rows = Rows(input, target, weight, ctx.options)
        return rows, rows.row_gradients(upstream, total)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        rows, g = CrossEntropyBackward._problem(ctx, saved)
        v, t = _spread(grads, ctx.needs)
        target, total = saved[5], saved[-1]
        slopes = rows.derivative(v, t)
        upstream: list[Tensor | None] = []
        for i, (like, slope) in enumerate(zip(saved[:4], slopes, strict=True)):
            if like is None or not ctx.needs_input_grad[i]:
                upstream.append(None)
            else:
                upstream.append((rows.reduce_slope(slope, total) if i == 0 else slope).to(like.dtype))
        grad_input = rows.gradient_derivative(g, v, t) if ctx.needs_input_grad[4] else None
        grad_target = rows.target_gradient_derivative(g, v) if ctx.needs_input_grad[5] else None
        if grad_target is not None:
            grad_target = grad_target.to(target.dtype)
        return (*upstream, grad_input, grad_target, *[None] * 13)

    @staticmethod
    @_nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        rows, g = CrossEntropyBackward._problem(ctx, saved)
        total, target = saved[-1], saved[5]
        dg = rows.row_gradients(tangents[:4], total)
        dx, dq = tangents[4], tangents[5]
        out = []
        if ctx.needs[0]:
            out.append(rows.gradient(dg) + rows.gradient_derivative(g, dx, dq))
        if ctx.needs[1]:
            out.append((rows.target_gradient(dg) + rows.target_gradient_derivative(g, dx)).to(target.dtype))
        return tuple(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        upstream, (input, target, weight, state, total, entropy) = list(args[:4]), args[4:10]
        options, needs = Options(*args[10:17]), args[17:]
        if in_dims[6] is not None:
            return _one_by_one(CrossEntropyBackward, size, in_dims, args)
        batched = [None if a is None else _to_front(a, d, size) for a, d in zip(upstream, in_dims, strict=False)]
        x = _to_front(input, in_dims[4], size)
        rows_shape = [s for d, s in enumerate(x.shape) if d != options.dim + 1]
        if batched[0] is not None and options.reduction != NONE:
            per_sample = batched[0].to(state.dtype)
            if options.reduction == MEAN:
                per_sample = per_sample / _to_front(total, in_dims[8], size).to(state.dtype)
            batched[0] = per_sample.reshape(size, *[1] * (len(rows_shape) - 1)).expand(rows_shape)
        grads = CrossEntropyBackward.apply(
            *batched,
            x,
            _to_front(target, in_dims[5], size),
            weight,
            _to_front(state, in_dims[7], size, to=1).contiguous(),
            torch.ones((), dtype=torch.float64, device=x.device),
            None if entropy is None else _to_front(entropy, in_dims[9], size).contiguous(),
            *options._replace(dim=options.dim + 1, reduction=NONE),
            *needs,
        )
        return grads, (0,) * len(grads)


class CrossEntropy(Function):
    """(input, target, weight, *options, dtype, stats) -> the results of the operator."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(ops.cross_entropy(*args, False))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[3:10]
        ctx.stats = inputs[11]
        ctx.dtypes = (output[_LOSS].dtype, output[_STATE].dtype)
        entropy = output[_ENTROPY] if ctx.stats else None
        ctx.save_for_backward(*inputs[:3], output[_STATE], output[_TOTAL], entropy)
        ctx.save_for_forward(*inputs[:3], output[_STATE], output[_TOTAL], entropy)
        ctx.mark_non_differentiable(output[_STATE], output[_TOTAL], *output[_PREDICTION : _PREDICTION + 1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        stats = grads[_LSE : _ENTROPY + 1] if ctx.stats else (None, None, None)
        return *_gradients(ctx, grads[_LOSS], *stats), *[None] * 10

    @staticmethod
    @_nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        input, target, weight, _, total, _ = saved
        if tangents[2] is not None:
            raise RuntimeError("cross_entropy: weight has no forward-mode derivative here. Use weight.detach().")
        rows = Rows(input, target, weight, Options(*ctx.options))
        along = rows.derivative(tangents[0], tangents[1])
        loss_dtype, stats_dtype = ctx.dtypes
        loss = rows.reduce_slope(along.loss, total).to(loss_dtype)
        if not ctx.stats:
            return loss, None, None
        return (loss, None, None, *(t.to(stats_dtype) for t in along[1:]), None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        input, target, weight = args[:3]
        options, (dtype, stats) = Options(*args[3:10]), args[10:]
        if in_dims[2] is not None:
            return _one_by_one(CrossEntropy, size, in_dims, args)
        x, y = _to_front(input, in_dims[0], size), _to_front(target, in_dims[1], size)
        loss_dtype = dtype or x.dtype
        wide = torch.float64 if torch.float64 in (loss_dtype, x.dtype) else torch.float32
        row_options = options._replace(dim=options.dim + 1, reduction=NONE)
        loss, state, _, *rest = CrossEntropy.apply(x, y, weight, *row_options, wide, stats)
        total = _per_sample_weight(y, weight, options.dim, options.ignore_index)
        if options.reduction != NONE:
            loss = _per_sample(loss)
        if options.reduction == MEAN:
            loss = loss / total.to(loss.dtype)
        return (loss.to(loss_dtype), state, total, *rest), (0, 1, 0, *[0] * len(rest))


class EagerCrossEntropy(Function):
    """CrossEntropy where no transform is at work: (input, target, weight, (options, dtype, stats)) -> loss or a tuple.

    A call on a small input costs what surrounds the kernels, which is why there is this second form: its ``forward``
    sees ``ctx`` and returns only what the caller gets, nothing is kept for forward mode, and the arguments are few.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, call: tuple[Any, ...]) -> Any:
        ctx.options, dtype, stats = call
        ctx.set_materialize_grads(False)
        loss, state, total, *rest = ops.cross_entropy(input, target, weight, *ctx.options, dtype, stats, False)
        if not stats:
            ctx.save_for_backward(input, target, weight, state, total, None)
            return loss
        lse, nll, entropy, prediction = rest
        ctx.save_for_backward(input, target, weight, state, total, entropy)
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
        grad_input, grad_target = _gradients(ctx, loss, lse, nll, entropy)
        return grad_input, grad_target, None, None


def _may_have_written(error: Exception, input: Tensor) -> bool:
    """Whether an operator that raised may have begun to write: not on the CPU, where it has all memory before.

    On CUDA it may have queued the kernel that writes, and failed to queue another.
    """
    return input.is_cuda and not isinstance(error, IndexError)


class OverwritingCrossEntropy(Function):
    """EagerCrossEntropy with ``precompute_grad``, ``inplace`` or both: two flags more in the last argument.

    The first backward consumes a precomputed gradient: it is scaled in place where the upstream gradient is not 1, and
    handed over. While the logits are intact a further backward computes it again; once overwritten it is refused.

    A gradient over the logits is a saved tensor of the graph like any other, so that autograd notices if somebody
    writes there before it is used. Saved-tensor hooks would move it elsewhere: functional.py keeps away from them.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, call: tuple[Any, ...]) -> Any:
        ctx.options, dtype, stats, precompute_grad, inplace = call
        ctx.precomputed, ctx.inplace, ctx.overwritten = precompute_grad, inplace, precompute_grad and inplace
        ctx.set_materialize_grads(False)
        operands = (input, target, weight, *ctx.options, dtype, stats)
        if ctx.overwritten:
            written = True
            try:
                results = ops.cross_entropy_(*operands)
            except Exception as error:
                written = _may_have_written(error, input)
                raise
            finally:  # also where Ctrl-C, which has waited for the operator, comes before the next line
                if written:
                    torch.autograd.graph.increment_version(input)
            input = input.detach()  # saved by another name: it stands for the gradient, not for a value of the graph
        else:
            results = ops.cross_entropy(*operands, precompute_grad)
        # Nobody sees this one, so it is no saved tensor: backward must hold the only reference, to hand it on. In a
        # list, since compiled autograd calls backward with another ctx, which shares what this one refers to.
        ctx.gradient = [results[-1]] if precompute_grad and not inplace else []
        loss, state, total = results[:_LSE]
        if not stats:
            ctx.save_for_backward(input, target, weight, state, total, None)
            return loss
        lse, nll, entropy, prediction = results[_LSE : _PREDICTION + 1]
        ctx.save_for_backward(input, target, weight, state, total, entropy)
        ctx.mark_non_differentiable(prediction)
        return loss, lse, nll, entropy, prediction

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        stats = grads[:3] or (None, None, None)
        given = [g for g in (grad_loss, *stats) if g is not None]
        if not given:
            return (None,) * 4
        plain = _plain_backward() and not _is_batched(given)
        if ctx.inplace:
            return OverwritingCrossEntropy._backward_inplace(ctx, plain, grad_loss, stats), None, None, None
        gradient = ctx.gradient.pop() if ctx.gradient else None
        if plain and gradient is not None and len(given) == 1 and grad_loss is not None:
            OverwritingCrossEntropy._scale(ctx, gradient, grad_loss)
            return gradient, None, None, None
        return *_gradients(ctx, grad_loss, *stats), None, None

    @staticmethod
    def _backward_inplace(ctx: Any, plain: bool, grad_loss: Tensor | None, stats: tuple[Tensor | None, ...]) -> Tensor:
        refused = None
        if not plain:
            refused = "it can't be differentiated again (create_graph=True) or batched"
        elif ctx.overwritten and not ctx.precomputed:
            refused = "a second backward through it is not possible"
        elif ctx.precomputed and any(g is not None for g in stats):
            refused = "its statistics can't be differentiated"
        if refused:
            writes = "has written" if ctx.overwritten else "writes"
            raise RuntimeError(
                f"cross_entropy: inplace=True {writes} the gradient over the logits, so {refused}. Use inplace=False."
            )
        input, target, weight, state, total, entropy = ctx.saved_tensors
        gradient: Tensor = input.detach()
        written = True
        try:
            if ctx.precomputed:
                OverwritingCrossEntropy._scale(ctx, gradient, grad_loss)
            else:
                upstream = (grad_loss, *stats)
                ops.cross_entropy_backward_(*upstream, gradient, target, weight, state, total, entropy, *ctx.options)
        except Exception as error:
            written = _may_have_written(error, input)
            raise
        finally:
            if written:
                torch.autograd.graph.increment_version(input)
                ctx.overwritten, ctx.precomputed = True, False
        return gradient

    @staticmethod
    def _scale(ctx: Any, gradient: Tensor, grad_loss: Any) -> None:
        dim, reduction, *_ = ctx.options
        if gradient.dtype == torch.float16 and reduction == MEAN:  # written without the mean's divisor
            total = ctx.saved_tensors[4]
            grad_loss = grad_loss.to(total.dtype) / total
        ops.scale_rows_(gradient, grad_loss, dim)


def _softmax_gradient(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """What SoftmaxBackward computes, by torch's operations, as in ``_formula_gradients``."""
    wide = torch.promote_types(output.dtype, torch.float32)
    g, y = grad_output.to(wide), output.to(wide)
    if log:
        return (g - y.exp() * g.sum(dim, keepdim=True)).to(dtype)
    return (y * (g - (g * y).sum(dim, keepdim=True))).to(dtype)


class SoftmaxBackward(Function):
    """(grad_output, output, dim, log, dtype) -> grad_input of softmax or log_softmax, of ``dtype``."""

    @staticmethod
    def forward(grad_output: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Any:
        return ops.softmax_backward(grad_output, output, dim, log, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dim, ctx.log, ctx.dtype = inputs[2:]
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

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
    @_nested_forward_mode
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
        g, y = (_to_front(t, d, info.batch_size) for t, d in ((g, in_dims[0]), (y, in_dims[1])))
        return SoftmaxBackward.apply(g, y, dim + 1, log, dtype), 0


class Softmax(Function):
    """(input, dim, log, dtype) -> softmax or log_softmax over dim (counted from the front)."""

    @staticmethod
    def forward(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Any:
        return ops.softmax(input, dim, log, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dim, ctx.log, ctx.dtype = inputs[1], inputs[2], inputs[0].dtype
        ctx.save_for_backward(output)
        ctx.save_for_forward(inputs[0])
        ctx.output_dtype = output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient: Any = ops.softmax_backward
        if traced.is_backward_traced():
            gradient = traced.softmax_backward
        elif not _plain_backward():
            gradient = _softmax_gradient if _is_batched((grad,)) else SoftmaxBackward.apply
        return gradient(grad, *ctx.saved_tensors, ctx.dim, ctx.log, ctx.dtype), None, None, None

    @staticmethod
    @_nested_forward_mode
    def jvp(ctx: Any, saved: list[Any], tangent: Tensor, *_: None) -> Any:
        (x,) = saved  # not the output, whose own tangent a nested forward mode would miss
        t = tangent.to(ctx.output_dtype)
        p = x.softmax(ctx.dim, dtype=ctx.output_dtype)
        centred = t - (t * p).sum(ctx.dim, keepdim=True)
        return centred if ctx.log else p * centred

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, dim: int, log: bool, dtype: Any) -> Any:
        return Softmax.apply(_to_front(input, in_dims[0], info.batch_size), dim + 1, log, dtype), 0


# torch binds the arguments of ``forward`` to its signature at every call. Kept here, the signature need not be found
# out each time, which took a quarter of a call on a small input.
_forward: Any
for _forward in (f.forward for f in (CrossEntropyBackward, CrossEntropy, SoftmaxBackward, Softmax)):
    _forward.__signature__ = inspect.signature(_forward)


# ---- eager calls ----


_apply_cross_entropy = internals.eager_apply(EagerCrossEntropy)
_apply_overwriting = internals.eager_apply(OverwritingCrossEntropy)
_apply_softmax = internals.eager_apply(Softmax)


def eager_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    """EagerCrossEntropy of (options, dtype, stats): the loss, and the statistics if asked for."""
    weight = None if weight is None else internals.alive(weight)
    results = _apply_cross_entropy(internals.alive(input), internals.alive(target), weight, call)
    return results if type(results) is tuple else (results,)


def overwriting_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    """OverwritingCrossEntropy of (options, dtype, stats, precompute_grad, inplace), likewise."""
    weight = None if weight is None else internals.alive(weight)
    results = _apply_overwriting(internals.alive(input), internals.alive(target), weight, call)
    return results if type(results) is tuple else (results,)


def eager_softmax(input: Tensor, dim: int, log: bool, dtype: torch.dtype | None) -> Tensor:
    """Softmax where no transform is at work."""
    return _apply_softmax(internals.alive(input), dim, log, dtype)  # type: ignore[no-any-return]


# ---- torch.compile and torch.export ----


def _trace_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    CrossEntropy.setup_context(ctx, inputs[:12], output)


def _traced_cross_entropy_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*CrossEntropy.backward(ctx, *grads)[:2], *[None] * 12)


def _trace_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    Softmax.setup_context(ctx, inputs[:4], output)


def _traced_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *Softmax.backward(ctx, grad), None


if ops.load_error is None:
    torch.library.register_autograd(
        "softmax_ext::cross_entropy_traced", _traced_cross_entropy_backward, setup_context=_trace_cross_entropy
    )
    torch.library.register_autograd(
        "softmax_ext::softmax_traced", _traced_softmax_backward, setup_context=_trace_softmax
    )
