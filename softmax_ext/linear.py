"""The public function of a linear layer and the softmax cross entropy of its output: checks, shapes, autocast.

A call goes linear -> autograd.linear -> linear_ops -> chunks or class_chunks -> ops -> kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from . import checks, functional, internals, linear_ops, plans
from .autograd.linear import NOTHING, EagerLinearCrossEntropy, LinearCrossEntropy, logits_of, without_ignored
from .autograd.transforms import in_transform, needs_plain_formulas
from .dtypes import autocast, default_loss_dtype
from .functional import CrossEntropyStats
from .internals import equal_sizes
from .linear_ops import Call
from .operands import Operands, check_classes
from .options import NONE, Keywords
from .overrides import hand_over, has_torch_function_variadic, is_jit_tracing
from .scripting import not_scriptable

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OP = "linear_cross_entropy"


def _check_operands(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    given = [("input", input), ("linear_weight", linear_weight)]
    given += [] if linear_bias is None else [("linear_bias", linear_bias)]
    for argument, value in given:
        checks.check_dense(_OP, argument, value)
        checks.check_floating(_OP, argument, value)
        checks.check_device(_OP, argument, value, input)
    if not input.dim():
        checks.refuse(RuntimeError, _OP, "input", "have shape (..., in_features)", checks.describe(input))
    if linear_weight.dim() < 2:
        need = "have shape (num_classes, in_features) or (num_classes, d1, ..., in_features)"
        checks.refuse(RuntimeError, _OP, "linear_weight", need, checks.describe(linear_weight))
    if not equal_sizes(input.shape[-1:], linear_weight.shape[-1:]):
        need = f"have the input's last size, {input.shape[-1]}, as its last"
        checks.refuse(RuntimeError, _OP, "linear_weight", need, checks.describe(linear_weight))
    if linear_weight.dim() > 2 and input.dim() != 2:
        need = f"have shape (N, {input.shape[-1]}) with a linear_weight of {linear_weight.dim()} dimensions"
        checks.refuse(RuntimeError, _OP, "input", need, checks.describe(input))
    if linear_bias is not None and not equal_sizes(linear_bias.shape, linear_weight.shape[:-1]):
        need = f"have shape {list(linear_weight.shape[:-1])}, that of linear_weight without in_features"
        checks.refuse(RuntimeError, _OP, "linear_bias", need, checks.describe(linear_bias))


def _check_dtypes(input: Tensor, *parameters: tuple[str, Tensor | None]) -> None:
    for argument, value in parameters:
        if value is not None and value.dtype != input.dtype:
            need = f"have the input's dtype, {str(input.dtype).removeprefix('torch.')}"
            way_out = f"Use {argument}.to(input.dtype), or torch.autocast."
            checks.refuse(RuntimeError, _OP, argument, need, checks.describe(value), way_out)


def _check_target(input: Tensor, linear_weight: Tensor, target: Tensor, ignore_index: int | None) -> Tensor:
    """The target as [N, *K] (class indices) or [N, C, *K] (probabilities), or an exception of torch's type."""
    checks.check_dense(_OP, "target", target)
    given, batch, classes = target, input.shape[:-1], linear_weight.shape[0]
    if input.dim() > 2:
        if equal_sizes(target.shape, batch):
            target = target.flatten()
        elif equal_sizes(target.shape, (*batch, classes)):
            target = target.flatten(0, -2)
        else:
            need = f"have shape {list(batch)} (class indices) or {[*batch, classes]} (probabilities)"
            error = RuntimeError if target.is_floating_point() else ValueError
            checks.refuse(error, _OP, "target", need, checks.describe(target))
        batch = target.shape[:1]
    logits_shape = (*batch, *linear_weight.shape[:-1])
    if equal_sizes(target.shape, logits_shape):
        if not target.is_floating_point():
            checks.refuse_integer_probabilities(_OP, "the logits", given, 1 if linear_weight.dim() > 2 else -1)
        if ignore_index is not None:
            need = "be None with a target of probabilities"
            checks.refuse(RuntimeError, _OP, "ignore_index", need, f"{ignore_index}")
    logits = input.detach().new_empty(()).expand(logits_shape)
    target = checks.check_target(_OP, logits, target, -100)
    return target.unsqueeze(0) if input.dim() == 1 else target


class _Keywords(Keywords, total=False):
    linear_bias: Tensor | None
    weight: Tensor | None
    reduction: str
    ignore_index: int | None
    label_smoothing: float
    options: object
    chunk_rows: int | None
    memory: int | None
    logits_dtype: torch.dtype | None
    row_weight: Tensor | Literal["probability"] | None
    live_rows: int | None


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **keywords: Unpack[_Keywords],
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True, "detached"],
    **keywords: Unpack[_Keywords],
) -> tuple[Tensor, CrossEntropyStats]: ...


@not_scriptable("torch.nn.functional.linear and torch.nn.functional.cross_entropy")
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    row_weight: Tensor | Literal["probability"] | None = None,
    return_stats: bool | Literal["detached"] = False,
    chunk_rows: int | None = None,
    memory: int | None = None,
    logits_dtype: torch.dtype | None = None,
    live_rows: int | None = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""Softmax cross entropy of the output of a linear layer, in the memory that it is given.

    It equals :func:`softmax_ext.cross_entropy` of ``F.linear(input, linear_weight, linear_bias)``, and is the
    counterpart of :func:`torch.nn.functional.linear_cross_entropy`.

    One matrix product gives the logits Z. The kernel replaces them by their gradient dZ. Two more products give the
    gradients of the operands, :math:`dX = dZ\,W` and :math:`dW = dZ^\top X`. With "mean" and "sum" the forward pass
    computes all three. docs/math.md, section 10, has the formulas.

    Shapes, dtypes and the budget decide by which plan (:func:`softmax_ext.linear_plan` tells which):

    - whole: the logits of all rows at once. It is the fastest.
    - rows: the logits of a chunk of rows at a time. In bfloat16 and float16 the chunks add up dW in float32, which
      takes time, and 4 bytes for each element of the weight.
    - classes: the logits of a chunk of classes at a time, once for the sums of the rows and once for the gradients. As
      many chunks as fit are kept from the first time to the second. It takes the least memory, and up to four products.

    Without a budget it is whole if that takes no more memory than rows. In bfloat16 that is so up to about
    ``2 * in_features`` rows, in other dtypes if all rows are one chunk. With a budget it is whole if it fits; else rows
    with the largest chunk that fits, if that has 128 rows or more (1024 on a GPU); else rows or classes, whichever can
    have the larger chunk.

    The logits are computed twice, in the forward and in the backward:

    - where the upstream gradients differ from row to row (reduction "none", ``return_stats=True``);
    - for a target that requires grad;
    - for a second backward;
    - under ``torch.func`` and under saved-tensor hooks (checkpoint, save_on_cpu);
    - in what torch.jit.trace makes.

    All logits exist at once:

    - for second derivatives, forward mode and batched gradients (``is_grads_batched``);
    - for ``torch.func`` within torch.compile;
    - for class weights with probabilities, where either is differentiated or transformed.

    A row is live unless all its positions are ignored. The others cost nothing on the CPU, and on a GPU where
    ``live_rows`` says how many are live. The live rows of the input, and their gradient, are copied then: with rows a
    chunk at a time, within ``memory`` if it is given; with whole and classes all of them, on top of the plan's memory.
    On a GPU without ``live_rows`` the products are of all rows, so that the host need not wait, and an input of NaN or
    inf in an ignored row reaches the weight's gradient.

    Args:
        input: hidden states, ``(in_features)``, ``(N, in_features)`` or ``(..., in_features)``; float64, float32,
            bfloat16 or float16.
        linear_weight: ``(C, in_features)``, of the input's dtype; or ``(C, d1, ..., in_features)`` for the logits
            ``(N, C, d1, ...)`` of an ``(N, in_features)`` input.
        target: class indices, int64 or uint8, of the input's shape without in_features, with ``d1, ...`` appended; or
            probabilities, floating, of the logits' shape, which is ``(..., C)`` for an input ``(..., in_features)``.
        linear_bias: ``(C)``, or ``(C, d1, ...)``, or None; of the input's dtype.
        weight: ``(C)``, floating: a factor for each class.
        reduction: "mean", "sum" or "none", as in :func:`softmax_ext.cross_entropy`.
        ignore_index: a position with this class index has loss 0 and gradient 0 and does not count in the mean. It has
            no statistics: lse, nll and entropy are 0, and the prediction is -1. None: -100 for class indices, nothing
            for probabilities.
        label_smoothing: in [0, 1].
        options: torch's chunking options, accepted so that a call of torch's function needs no change, and ignored.
            Use ``chunk_rows``.
        dtype: the dtype of the loss and of the arithmetic on each logit. Default: the operands'; float32 for half types
            under autocast. The matrix products are in the operands' dtype. In float16 the gradient of the logits is
            rounded for them before a loss scale multiplies it.
        z_loss: factor of the squared log-sum-exp, which class weights do not scale, as in
            :func:`softmax_ext.cross_entropy`.
        softcap: caps the logits smoothly to (-softcap, softcap); None or 0: no cap.
        logit_scale: factor of the logits, an inverse temperature.
        denominator: what the sum of the losses is divided by, for "sum" and for "mean" alike; a number or a tensor of
            one element, as in :func:`softmax_ext.cross_entropy`.
        row_weight: a factor of the loss and the gradient of each position, as in :func:`softmax_ext.cross_entropy`: a
            tensor of the shape of class indices, or "probability". The products are as many as without.
        return_stats: also return :class:`softmax_ext.CrossEntropyStats`. "detached": without derivatives, as
            metrics are used, so that nothing is computed twice.
        chunk_rows: the number of rows whose logits exist at once; the plan is then rows. None: the plan is chosen.
            The default chunk of rows is a ninth of the rows, or as many as fit into 32 MiB if those are more; at least
            128 and at most 512 on the CPU, at least 1024 and at most 4096 on a GPU; and more where the float32 sum of
            dW leaves room for them.
        memory: the most bytes that forward and backward may take beyond the gradients. None: as many as rows takes with
            its default chunk. What comes on top: copies of live rows (above), all logits at once (above), what compiled
            code adds, and some numbers for each row, such as the statistics.
        logits_dtype: torch.float32: the logits of half-typed operands are not rounded to their dtype, and take twice
            the memory. Log-sum-exp, loss and statistics then lose nothing to that rounding. The logits' gradient is
            rounded once, for its products. On a CPU the product is computed in float32, which takes longer. None: the
            operands' dtype.
        live_rows: how many of the N rows are live, where the caller knows: a GPU then leaves the others out, as the CPU
            does by itself. The host need not wait for the targets. A wrong number makes the loss NaN, and the weight's
            gradient too if it is below N; on the CPU it raises. It does not change the plan, and has no effect where
            all logits exist at once (above).

    Returns:
        The loss: a scalar, or with reduction "none" one value for each position, in the shape of class indices. With
        ``return_stats`` the tuple (loss, stats).

    Raises:
        TypeError, ValueError, IndexError, RuntimeError, NotImplementedError: as :func:`softmax_ext.cross_entropy`.
            Also RuntimeError where the shapes or dtypes of the operands do not match, and for an ``ignore_index`` with
            probabilities; ValueError for ``chunk_rows`` below 1, for ``memory`` together with ``chunk_rows``, and for
            a ``memory`` that no plan fits into, where the text names the least; for another ``logits_dtype``; and on
            the CPU, or with probabilities, for a wrong ``live_rows``.
    """
    tensors = (input, linear_weight, target, linear_bias, weight, denominator, row_weight)
    if has_torch_function_variadic(*tensors) and not torch.compiler.is_compiling():
        return hand_over(  # type: ignore[no-any-return]
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            dtype=dtype,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            denominator=denominator,
            row_weight=row_weight,
            return_stats=return_stats,
            chunk_rows=chunk_rows,
            memory=memory,
            logits_dtype=logits_dtype,
            live_rows=live_rows,
        )
    _check_operands(input, linear_weight, linear_bias)
    detached = return_stats == "detached"
    if not isinstance(return_stats, bool) and not detached:
        checks.refuse(ValueError, _OP, "return_stats", 'be True, False or "detached"', repr(return_stats))
    ignored = -100 if ignore_index is None else ignore_index
    options_of_loss = checks.check_options(_OP, 1, reduction, ignored, label_smoothing, z_loss, softcap, logit_scale)
    options_of_loss = options_of_loss._replace(skips_ignored=True)  # of the paths through all logits, too
    if dtype is not None:
        checks.check_dtype(_OP, dtype)
    batch = input.shape[:-1]
    given_target, target = target, _check_target(input, linear_weight, target, ignore_index)
    if weight is not None:
        checks.check_weight(_OP, input, weight, linear_weight.shape[0], not target.dtype.is_floating_point)

    divisor = None
    if denominator is not None:
        divisor, options_of_loss = checks.check_denominator(_OP, input, denominator, options_of_loss)
    shape = (*batch, *linear_weight.shape[1:-1])
    factors = None
    if row_weight is not None:
        factors, options_of_loss = checks.check_row_weight(_OP, input, shape, target, row_weight, options_of_loss)
        if factors is not None:
            factors = factors.reshape(math.prod(batch), *linear_weight.shape[1:-1])

    x, matrix = autocast(input), autocast(linear_weight)
    bias = None if linear_bias is None else autocast(linear_bias)
    _check_dtypes(x, ("linear_weight", matrix), ("linear_bias", bias))
    if dtype is None:
        dtype = default_loss_dtype(x, target, weight)
    limits = plans.check_limits(_OP, x.dtype, chunk_rows, memory, logits_dtype)
    if live_rows is not None:
        limits = limits._replace(live_rows=checks.integer(_OP, "live_rows", live_rows))
    call = Call(options_of_loss, dtype, bool(return_stats), limits, (False,) * 4)
    x = x.reshape(math.prod(batch), x.shape[-1])
    try:
        results = _run(Operands(x, matrix, bias, target, weight, factors), divisor, call, detached)
    except IndexError:
        if not in_transform():  # raises the same error with the position in the caller's shape
            check_classes(given_target, linear_weight.shape[0], call.options.ignore_index)
        raise
    loss, *stats = (t.reshape(shape) if t.dim() else t for t in results)
    if detached:
        stats = [t.detach() for t in stats]
    return (loss, CrossEntropyStats(*stats)) if return_stats else loss


def _run(operands: Operands, denominator: Tensor | None, call: Call, detached: bool) -> Sequence[Tensor]:
    """The loss and, if asked for, the statistics; chooses the way that the call and its context need.

    With ``detached`` the statistics get no upstream gradient.
    """
    input, linear_weight, linear_bias, target, weight, _ = operands
    transformed, compiling = in_transform(), torch.compiler.is_compiling()
    jit_tracing = not compiling and is_jit_tracing()  # what it makes is one graph, whatever will be differentiated
    if needs_plain_formulas(target, weight, transformed, compiling or jit_tracing):
        return _through_logits(operands, denominator, call)
    differentiable = (input, linear_weight, linear_bias, target)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in differentiable]
    # Forward can compute the gradients if the upstream gradient, not known yet, is one factor for all of them.
    has_one_factor = call.options.reduction != NONE and (detached or not call.stats)
    precomputes = any(needs) and has_one_factor and not (target.requires_grad or jit_tracing)
    # Where a transform or a traced graph is differentiated, nobody knows in what.
    unknown = transformed or jit_tracing
    may_need = (True, True, linear_bias is not None, target.is_floating_point()) if unknown else needs
    call = call._replace(later=(may_need[0], may_need[1], may_need[2], may_need[3]))
    if compiling or jit_tracing or not (any(needs) or transformed):
        needed = needs[:3] if precomputes else NOTHING
        results = linear_ops.forward(*operands, *call.arguments(needed, True, denominator))
    elif precomputes and not transformed and not internals.saved_tensor_hooks_active():
        return EagerLinearCrossEntropy.apply(*operands, denominator, call)  # type: ignore[no-any-return]
    else:
        results = LinearCrossEntropy.apply(*operands, denominator, call)
    loss, _, _, *statistics = results
    return [loss, *statistics[: 4 if call.stats else 0]]


def _through_logits(operands: Operands, denominator: Tensor | None, call: Call) -> Sequence[Tensor]:
    """The same results from all logits at once, for derivatives that no Function has."""
    operands = without_ignored(operands, call.options.ignore_index)
    input, linear_weight, linear_bias, target, weight, row_weight = operands
    logits = logits_of(input, linear_weight, linear_bias, call.limits.logits_dtype)
    arguments = (target, weight, denominator, row_weight, call.options, call.dtype or input.dtype)
    results = functional.run(logits, *arguments, call.stats, False, False)
    return [results[0], *results[-4:]] if call.stats else results[:1]
