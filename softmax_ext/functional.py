"""The public functions of logits: they check the arguments, bring them into the operators' form, choose the strategy.

A call goes functional -> autograd -> operator -> kernel. Where nothing can be differentiated, the function calls the
operator directly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import checks, internals, ops, reference
from .autograd import compiled, refusals
from .autograd.cross_entropy import CrossEntropy, eager_cross_entropy
from .autograd.softmax import Softmax, eager_softmax
from .autograd.transforms import in_transform, needs_plain_formulas
from .dtypes import default_loss_dtype
from .options import Keywords, Options
from .overrides import hand_over, has_torch_function_unary, has_torch_function_variadic, is_jit_tracing
from .scripting import not_scriptable

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CrossEntropyStats(NamedTuple):
    """Statistics of every position, computed in the same pass as the loss.

    Each has the shape of class indices: the input's without C. ``lse``, ``nll`` and ``entropy`` are differentiable, in
    nats, and float32 (float64 if the input, probabilities or the loss are). docs/math.md, section 6, has the formulas.
    :func:`softmax_ext.linear_cross_entropy` computes nothing for an ignored position: 0, and the prediction -1.

    Attributes:
        lse: log sum exp of the scaled and capped logits. NaN where the logits make no distribution: one of them is inf,
            or all of them are -inf.
        nll: lse - z_y, neither weighted nor smoothed; for probabilities sum q_c (lse - z_c). 0 for an ignored row.
        entropy: that of the predicted distribution.
        prediction: the class of the largest logit, the first if there are several; int64. Here an ignored position has
            one too: ``prediction.where(target != -100, -1)`` leaves it out.
    """

    lse: Tensor
    nll: Tensor
    entropy: Tensor
    prediction: Tensor


def _new_stats(cls: type[CrossEntropyStats], lse: Tensor | Iterable[Any], *others: Any, **named: Any) -> Any:
    """Of one iterable too: so does Tensor.__torch_function__ make it for a subclass, as it makes torch.return_types."""
    return _new(cls, lse, *others, **named) if others or named else _new(cls, *lse)


_new: Any = CrossEntropyStats.__new__
CrossEntropyStats.__new__ = _new_stats  # type: ignore[method-assign, assignment]

# An exported program that returns CrossEntropyStats can be saved only with this.
internals.register_namedtuple(CrossEntropyStats, serialized_type_name="softmax_ext.CrossEntropyStats")


# ---- softmax ----


def _default_dim(op: str, input: Tensor, stacklevel: int) -> int:
    """What torch takes where no ``dim`` is given, with torch's warning."""
    checks.check_dense(op, "input", input)
    if not torch.compiler.is_compiling():  # Dynamo does not trace warnings
        text = (
            f"Implicit dimension choice for {op} has been deprecated. Change the call to include dim=X as an argument."
        )
        warnings.warn(text, stacklevel=stacklevel)
    return 0 if input.dim() in (0, 1, 3) else 1


def _softmax(op: str, input: Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    checks.check_dense(op, "input", input)
    dim = checks.integer(op, "dim", dim)
    if dtype is not None:
        checks.check_dtype(op, dtype, "The third argument is dtype; torch has _stacklevel there.")
    rank = len(input.shape) or 1
    if not -rank <= dim < rank:
        checks.refuse(IndexError, op, "dim", f"lie in [{-rank}, {rank - 1}]", f"{dim}")
    if dtype is not None and not input.dtype.is_floating_point and not input.dtype.is_complex:
        input = input.to(dtype)
    checks.check_floating(op, "input", input)
    if dtype is None and input.is_cuda and input.dtype.itemsize == 2 and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    if not input.shape:
        return _softmax(op, input.unsqueeze(0), 0, dtype, log).squeeze(0)
    dim = dim % rank
    transformed, compiling = in_transform(), torch.compiler.is_compiling()
    result: Tensor
    if compiling and transformed:  # as in needs_plain_formulas
        result = (internals.log_softmax if log else internals.softmax)(input, dim, dtype)
    elif compiling or is_jit_tracing():
        result = compiled.softmax(input, dim, log, dtype, ops.VERSION)
    elif transformed:
        result = Softmax.apply(input, dim, log, dtype)
    elif input.requires_grad and torch.is_grad_enabled():
        result = eager_softmax(input, dim, log, dtype)
    else:
        result = ops.softmax(input, dim, log, dtype)
    return result


@not_scriptable("torch.nn.functional.softmax")
def softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Tensor:
    r"""Softmax over one dimension, :math:`p_c = e^{x_c - m} / \sum_k e^{x_k - m}` with :math:`m = \max x`.

    The counterpart of :func:`torch.nn.functional.softmax` as one fused kernel. It reads the input without a copy,
    whatever the strides. Half types are computed in float32 and rounded once. docs/math.md derives the formulas.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16. With ``dtype`` also integers and bool.
        dim: the dimension that sums to 1, from ``-input.dim()`` to ``input.dim() - 1``. None, which is deprecated: 0
            for 0, 1 and 3 dimensions, else 1, with a UserWarning.
        dtype: compute and return in this dtype, without a converted copy of a floating input. Default: the input's;
            float32 for half types on CUDA under autocast.
        _stacklevel: of the warning where ``dim`` is None; the third argument of torch's function.

    Returns:
        A tensor of the input's shape and of ``dtype``.

    Raises:
        TypeError: ``input`` is not a Tensor, ``dim`` not an int, or ``dtype`` not a torch.dtype.
        IndexError: ``dim`` is out of range.
        ValueError: ``dim`` does not fit 64 bits.
        NotImplementedError: a dtype or layout that is not supported.
    """
    if has_torch_function_unary(input) and not torch.compiler.is_compiling():
        keywords = {"dim": dim, "dtype": dtype, "_stacklevel": _stacklevel}
        return hand_over(softmax, (input,), input, **keywords)  # type: ignore[no-any-return]
    if dim is None:
        dim = _default_dim("softmax", input, _stacklevel)
    return _softmax("softmax", input, dim, dtype, False)


@not_scriptable("torch.nn.functional.log_softmax")
def log_softmax(
    input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, _stacklevel: int = 3
) -> Tensor:
    r"""Logarithm of the softmax over one dimension, :math:`x_c - m - \log \sum_k e^{x_k - m}`.

    The counterpart of :func:`torch.nn.functional.log_softmax`. Here :math:`m = \max x`. Arguments, result and errors
    are those of :func:`softmax`, but the exponentials of the result sum to 1 over ``dim``.
    """
    if has_torch_function_unary(input) and not torch.compiler.is_compiling():
        keywords = {"dim": dim, "dtype": dtype, "_stacklevel": _stacklevel}
        return hand_over(log_softmax, (input,), input, **keywords)  # type: ignore[no-any-return]
    if dim is None:
        dim = _default_dim("log_softmax", input, _stacklevel)
    return _softmax("log_softmax", input, dim, dtype, True)


# ---- cross entropy ----


class _Keywords(Keywords, total=False):
    row_weight: Tensor | Literal["probability"] | None
    precompute_grad: bool
    inplace: bool


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Keywords],
) -> Tensor: ...


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    return_stats: Literal[True],
    **options: Unpack[_Keywords],
) -> tuple[Tensor, CrossEntropyStats]: ...


@not_scriptable("torch.nn.functional.cross_entropy")
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    row_weight: Tensor | Literal["probability"] | None = None,
    precompute_grad: bool = False,
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""Softmax cross entropy of logits and class indices or class probabilities.

    The counterpart of :func:`torch.nn.functional.cross_entropy`, with the same positional arguments up to
    ``label_smoothing``, as one fused kernel forward and one backward.

    Let s be the ``softcap``, a the ``logit_scale``, w the class weights and :math:`\varepsilon` the label smoothing.
    The scaled and capped logits are :math:`z_c = s \tanh(a x_c / s)`, or :math:`z_c = a x_c` without a cap, and
    :math:`\mathrm{lse} = \log\sum_c e^{z_c}`. The loss of a row, in nats, is for a class index y

    .. math::
        (1-\varepsilon) w_y (\mathrm{lse} - z_y) + \tfrac{\varepsilon}{C} \sum_c w_c (\mathrm{lse} - z_c)
        + \text{z\_loss} \cdot \mathrm{lse}^2

    and for probabilities q

    .. math::
        \sum_c w_c ((1-\varepsilon) q_c + \varepsilon/C)(\mathrm{lse} - z_c) + \text{z\_loss} \cdot \mathrm{lse}^2 .

    A class without mass (:math:`q_c = 0` or :math:`w_c = 0`) contributes nothing even where its logit is -inf; torch
    gives NaN there. Half types are computed in float32 and rounded once. docs/math.md derives the formulas.

    ``precompute_grad`` and ``inplace`` choose the strategy. They are ignored in the cases below. The default strategy
    then computes the same gradient and leaves the input unchanged:

    - under torch.compile and torch.export;
    - under ``torch.func`` and forward-mode AD;
    - under saved-tensor hooks (checkpoint, save_on_cpu);
    - with class weights that require grad;
    - where the input gets no gradient, as without grad mode.

    Args:
        input: logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, bfloat16 or float16.
        target: class indices, int64 or uint8, of the input's shape without C; or probabilities, floating, of the
            input's shape. Probabilities get a gradient too if they require one.
        weight: ``(C)``, floating: a factor for each class.
        size_average: deprecated, see ``reduction``.
        ignore_index: a row with this class index has loss 0 and gradient 0 and does not count in the mean. Any int64;
            must be negative with probabilities.
        reduce: deprecated, see ``reduction``.
        reduction: "mean", "sum" or "none". The mean divides the sum by the sum of weight[target] over the rows that are
            not ignored; for probabilities, by the number of rows.
        label_smoothing: in [0, 1] (Inception-v3, arXiv:1512.00567, section 7).
        dtype: compute and return in this dtype without a converted copy. Default: the input's (promoted with the
            probabilities'); float32 for half types under autocast.
        z_loss: factor of the squared log-sum-exp (PaLM, arXiv:2204.02311, section 5). Class weights do not scale these
            terms. The mean of class indices divides them by the number of rows that count, or by the sum of their
            ``row_weight``; a ``denominator`` that is given divides everything.
        softcap: caps the logits smoothly to (-softcap, softcap) (Gemma 2, arXiv:2408.00118, section 2); None
            or 0: no cap.
        logit_scale: factor of the logits, an inverse temperature.
        denominator: what the sum of the losses is divided by, for "sum" and for "mean" alike: the number of tokens of
            all micro-batches, or of all ranks (divided by the number of ranks, where their gradients are averaged);
            with ``weight`` the sum of weight[target] over these. A number, or a tensor of one element, on the input's
            device or a 0-dimensional one on the CPU. It gets no gradient. The host does not wait for its value. 0 gives
            inf, or NaN where every row is ignored; ignored rows have a gradient of 0 even so.
        row_weight: a factor of each row's loss and gradient, z_loss and smoothing included. A floating tensor of the
            shape of class indices, the input's without C; it gets no gradient. The mean divides by the sum of
            row_weight over the rows that are not ignored, each times weight[target] where there are both. A row of
            factor 0 has loss 0 even where its loss is inf or NaN. Of an ignored row the factor does not matter. Or
            "probability": the probability of the row's target class, as a constant; for class indices only. The mean
            divides as it does without (dynamic fine-tuning, arXiv:2508.05629). The statistics are not multiplied.
        precompute_grad: the forward computes the gradient too, while the row is in cache. The backward then only
            multiplies it by the upstream gradient, if that is not 1. Ignored if probabilities require grad. In float16
            the gradient is rounded before a loss scale multiplies it, so that small probabilities give 0.
        inplace: write the gradient over the input's own storage: in the backward, or in the forward with
            ``precompute_grad``. The input's values are lost then. A graph that still needs them is refused, and so is a
            later use that is differentiated. A later use without a gradient, as of metrics, cannot be noticed and reads
            the gradient: ``return_stats`` has predictions and entropy. A gradient with respect to the logits
            themselves (``torch.autograd.grad``, ``backward(inputs=)``) needs their
            ``torch.autograd.graph.get_gradient_edge``, taken before.
        return_stats: also return :class:`CrossEntropyStats`.

    Returns:
        The loss, of ``dtype``: a scalar, or with reduction "none" one value for each position, in the input's shape
        without C. With ``return_stats`` the tuple (loss, stats).

    Raises:
        TypeError: an argument is not a Tensor, a number or an int where one is needed; a number, ``denominator`` or
            ``row_weight`` is a tensor that requires grad.
        ValueError: the batch sizes differ; an unknown reduction; an option out of range; a ``denominator`` of several
            elements or with reduction "none"; a ``row_weight`` of another text, or "probability" with a target of
            probabilities; ``inplace`` with a leaf that requires grad or with overlapping elements.
        IndexError: a class out of range; the text names the position and the value. On CUDA only where
            SOFTMAX_EXT_CHECK_TARGETS is set in the environment (to anything but 0), since the host must wait for the
            answer; the loss is NaN otherwise.
        RuntimeError: other shapes or dtypes of target, weight and row_weight, ``label_smoothing`` out of range,
            different devices; a second backward after ``inplace``.
        NotImplementedError: logits of another dtype or layout.
    """
    tensors = (input, target, weight, denominator, row_weight)
    if has_torch_function_variadic(*tensors) and not torch.compiler.is_compiling():
        return hand_over(  # type: ignore[no-any-return]
            cross_entropy,
            tensors,
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
            dtype=dtype,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            denominator=denominator,
            row_weight=row_weight,
            precompute_grad=precompute_grad,
            inplace=inplace,
            return_stats=return_stats,
        )
    op = "cross_entropy"
    checks.check_dense(op, "input", input)
    if size_average is not None or reduce is not None:
        reduction = checks.legacy_reduction(size_average, reduce)
    rank = input.dim()
    dim = 0 if rank < 2 else 1
    options = checks.check_options(op, dim, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if dtype is not None:
        checks.check_dtype(op, dtype)
    checks.check_logits(op, input, target)
    if rank == 0:
        checks.check_dense(op, "target", target)
        error = IndexError if target.is_floating_point() else RuntimeError
        checks.refuse(error, op, "input", "have at least one dimension, the classes", checks.describe(input))
    target = checks.check_target(op, input, target, ignore_index)
    probabilities = target.dtype.is_floating_point
    if weight is not None:
        checks.check_weight(op, input, weight, input.shape[dim], not probabilities)
    if inplace and not (torch.compiler.is_compiling() or in_transform()):
        checks.check_inplace(op, input, target)
    divisor = None
    if denominator is not None:
        divisor, options = checks.check_denominator(op, input, denominator, options)
    factors = None
    if row_weight is not None:
        rows = [size for d, size in enumerate(input.shape) if d != dim]
        factors, options = checks.check_row_weight(op, input, rows, target, row_weight, options)
    if dtype is None and (probabilities or input.dtype.itemsize == 2):
        dtype = default_loss_dtype(input, target, weight)
    results = run(input, target, weight, divisor, factors, options, dtype, return_stats, precompute_grad, inplace)
    return (results[0], CrossEntropyStats(*results[-4:])) if return_stats else results[0]


def _may_overwrite(input: Tensor, target: Tensor, precompute_grad: bool, inplace: bool) -> bool:
    """Whether a strategy that overwrites or hands over a gradient is wanted and safe.

    It is not safe under saved-tensor hooks, because they do not check version counters.
    """
    wanted = inplace or (precompute_grad and not target.requires_grad)
    return wanted and input.requires_grad and not internals.saved_tensor_hooks_active()


def run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    denominator: Tensor | None,
    row_weight: Tensor | None,
    options: Options,
    dtype: torch.dtype | None,
    stats: bool,
    precompute_grad: bool,
    inplace: bool,
) -> Sequence[Tensor]:
    """The loss first and, with ``stats``, the statistics last; chooses the way that the call and its context need."""
    transformed, compiling = in_transform(), torch.compiler.is_compiling()
    if (transformed or weight is not None) and needs_plain_formulas(target, weight, transformed, compiling):
        plain = reference.cross_entropy(input, target, weight, denominator, options, dtype, stats, row_weight)
        if transformed or not compiling:
            return plain
        return [refusals.refusing_backward(t, "cross_entropy") if t.is_floating_point() else t for t in plain]
    results: Sequence[Tensor]
    if transformed:
        results = CrossEntropy.apply(input, target, weight, denominator, options, dtype, stats, row_weight)
    elif compiling or is_jit_tracing():
        arguments = (*options, dtype, stats, False, denominator, row_weight, ops.VERSION)
        results = compiled.cross_entropy(input, target, weight, *arguments)
    elif not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
        results = ops.cross_entropy(input, target, weight, *options, dtype, stats, False, denominator, row_weight)
    else:
        if precompute_grad or inplace:
            may = _may_overwrite(input, target, precompute_grad, inplace)
            precompute_grad, inplace = precompute_grad and may, inplace and may
        call = (options, dtype, stats, precompute_grad, inplace, denominator, row_weight)
        results = eager_cross_entropy(input, target, weight, *call)
    return results
