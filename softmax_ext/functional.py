"""The public functions: they check what they are given, bring it to the operators' terms and choose the strategy.

A call goes functional -> autograd -> operator -> kernel. Where nothing can be differentiated the operator is called directly.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction

from . import ops
from .autograd import (
    CompiledCrossEntropy,
    CompiledSoftmax,
    CrossEntropy,
    OverwritingCrossEntropy,
    Softmax,
)
from .reference import Options
from .reference import cross_entropy as reference_cross_entropy

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REDUCTIONS = {"none": ops.NONE, "mean": ops.MEAN, "sum": ops.SUM}


class CrossEntropyStats(NamedTuple):
    """What one pass over the logits tells about every position; each of the target's (index) shape.

    ``lse``, ``nll`` and ``entropy`` are differentiable, of dtype float32 (float64 if any operand is).

    Attributes:
        lse: log sum exp of the (scaled, capped) logits.
        nll: lse - z_y, neither weighted nor smoothed; for probabilities sum q_c (lse - z_c). 0 where ignored.
        entropy: of the predicted distribution, in nats.
        prediction: the first class of largest logit, int64.
    """

    lse: Tensor
    nll: Tensor
    entropy: Tensor
    prediction: Tensor


# ---- messages ------------------------------------------------------------------------------------------------------


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def _refuse(error: type[Exception], op: str, argument: str, need: str, got: object, way_out: str = "") -> NoReturn:
    text = got if isinstance(got, str) else _describe(got)
    raise error(f"{op}: {argument} must {need}; got {text}.{' ' + way_out if way_out else ''}")


def _check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        _refuse(TypeError, op, argument, "be a Tensor", f"{type(value).__name__}")


def _check_strided(op: str, argument: str, value: Tensor) -> None:
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        _refuse(NotImplementedError, op, argument, "be a dense (strided) tensor", kind, "Use to_dense() or pad it.")


def _check_floating(op: str, argument: str, value: Tensor) -> None:
    if value.dtype not in _FLOATING:
        need = "be float64, float32, bfloat16 or float16"
        _refuse(NotImplementedError, op, argument, need, value, f"Use {argument}.float().")


def _check_dtype(op: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _FLOATING:
        _refuse(NotImplementedError, op, "dtype", "be float64, float32, bfloat16, float16 or None", f"{dtype}")


def _check_device(op: str, argument: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        need = f"be on the input's device, {input.device}"
        _refuse(RuntimeError, op, argument, need, f"{value.device}", f"Use {argument}.to(input.device).")


def _check_real(op: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(TypeError, op, argument, "be a number", value)


# ---- what runs underneath --------------------------------------------------------------------------------------------


def _in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work, which only the full Functions understand."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _only_values_wanted(*tensors: Tensor) -> bool:
    """Whether nothing can ask for a derivative or batch the call, so that the operator can be called directly."""
    return not _in_transform() and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


# ---- softmax -----------------------------------------------------------------------------------------------------------


def _softmax(op: str, input: Tensor, dim: int, dtype: torch.dtype | None, log: bool) -> Tensor:
    _check_tensor(op, "input", input)
    if isinstance(dim, bool) or not isinstance(dim, int):
        _refuse(TypeError, op, "dim", "be an int", dim)
    _check_strided(op, "input", input)
    _check_dtype(op, dtype)
    rank = max(input.dim(), 1)
    if not -rank <= dim < rank:
        _refuse(IndexError, op, "dim", f"lie in [{-rank}, {rank - 1}]", f"{dim}")
    if dtype is not None and not input.dtype.is_floating_point and not input.dtype.is_complex:
        input = input.to(dtype)
    _check_floating(op, "input", input)
    if dtype is None and input.device.type == "cuda" and input.dtype.itemsize == 2 and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32
    if input.dim() == 0:
        return _softmax(op, input.unsqueeze(0), 0, dtype, log).squeeze(0)
    dim = dim % rank
    if torch.compiler.is_compiling():
        return CompiledSoftmax.apply(input, dim, log, dtype)  # type: ignore[no-any-return]
    if _only_values_wanted(input):
        return ops.softmax(input, dim, log, dtype)  # type: ignore[no-any-return]
    return Softmax.apply(input, dim, log, dtype)  # type: ignore[no-any-return]


def softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    r"""Softmax over one dimension, :math:`p_c = e^{x_c - m} / \sum_k e^{x_k - m}` with :math:`m = \max x`.

    The counterpart of :func:`torch.nn.functional.softmax`, fused: the input is read where it lies, whatever its strides.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16 (any real dtype if ``dtype`` is given).
        dim: the dimension that sums to 1, from ``-input.dim()`` to ``input.dim() - 1``.
        dtype: compute and return in this dtype, without a converted copy of a floating input.

    Returns:
        A tensor of the input's shape, of ``dtype`` or the input's.

    Raises:
        TypeError: ``input`` is not a Tensor or ``dim`` not an int.
        IndexError: ``dim`` is out of range.
        NotImplementedError: a dtype or layout that is not supported.
    """
    return _softmax("softmax", input, dim, dtype, False)


def log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    r"""Logarithm of the softmax over one dimension, :math:`x_c - m - \log \sum_k e^{x_k - m}`.

    The counterpart of :func:`torch.nn.functional.log_softmax`; arguments, result and errors as :func:`softmax`.
    """
    return _softmax("log_softmax", input, dim, dtype, True)


# ---- cross entropy -------------------------------------------------------------------------------------------------------


def _check_target(op: str, input: Tensor, target: Tensor, ignore_index: int) -> tuple[int, Tensor]:
    """The class dimension, and the target in the shape the operator takes."""
    _check_tensor(op, "target", target)
    _check_strided(op, "target", target)
    _check_device(op, "target", target, input)
    dim = 0 if input.dim() == 1 else 1
    if input.shape == target.shape:
        if not target.is_floating_point():
            need = "be floating (class probabilities) if it has the input's shape"
            way_out = "Class indices have the input's shape without the dimension of the classes."
            _refuse(RuntimeError, op, "target", need, target, way_out)
        _check_floating(op, "target", target)
        if ignore_index >= 0:
            _refuse(RuntimeError, op, "ignore_index", "be negative with a target of probabilities", f"{ignore_index}")
        return dim, target
    batch = [*input.shape[:dim], *input.shape[dim + 1 :]]
    if input.dim() == 1 and list(target.shape) == [1]:
        target = target.squeeze(0)  # as torch allows
    if target.dtype not in (torch.int64, torch.uint8) or list(target.shape) != batch:
        # The types are torch's: a wrong batch size is a ValueError, everything else a RuntimeError.
        same_rank = target.dim() == len(batch) > 0
        error = ValueError if same_rank and target.shape[0] != input.shape[0] else RuntimeError
        need = f"be int64 or uint8 of shape {batch}, or floating of the input's shape {list(input.shape)}"
        way_out = "" if list(target.shape) != batch else "Use target.long()."
        _refuse(error, op, "target", need, target, way_out)
    return dim, target


def _check_weight(op: str, input: Tensor, weight: Tensor | None, classes: int, indices: bool) -> None:
    if weight is None:
        return
    _check_tensor(op, "weight", weight)
    _check_strided(op, "weight", weight)
    if list(weight.shape) != [classes]:
        _refuse(RuntimeError, op, "weight", f"have shape [{classes}], one value for each class", weight)
    if weight.dtype not in _FLOATING:
        _refuse(RuntimeError, op, "weight", "be floating", weight, "Use weight.to(input.dtype).")
    _check_device(op, "weight", weight, input)
    if indices and weight.requires_grad and torch.is_grad_enabled():
        _refuse(RuntimeError, op, "weight", "not require grad with class indices", "requires_grad=True", "Use weight.detach().")


def _check_options(
    op: str, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float, ignore_index: int
) -> None:
    for argument, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("logit_scale", logit_scale)):
        _check_real(op, argument, value)
    if not 0 <= label_smoothing <= 1:
        _refuse(RuntimeError, op, "label_smoothing", "lie in [0, 1]", f"{label_smoothing}")
    if not 0 <= z_loss < float("inf"):
        _refuse(ValueError, op, "z_loss", "be finite and not negative", f"{z_loss}")
    if not -float("inf") < logit_scale < float("inf"):
        _refuse(ValueError, op, "logit_scale", "be finite", f"{logit_scale}")
    if softcap is not None:
        _check_real(op, "softcap", softcap)
        if not 0 < softcap < float("inf"):
            _refuse(ValueError, op, "softcap", "be finite and positive, or None", f"{softcap}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        _refuse(TypeError, op, "ignore_index", "be an int", ignore_index)


def _check_inplace(op: str, input: Tensor, target: Tensor) -> None:
    if input.is_leaf and input.requires_grad and torch.is_grad_enabled():
        way_out = "Its values would be lost to the gradient. Use inplace=False."
        _refuse(ValueError, op, "input", "not be a leaf that requires grad if inplace=True", "such a leaf", way_out)
    if _overlaps_itself(input):
        way_out = "Use inplace=False or input.contiguous()."
        _refuse(ValueError, op, "input", "not have overlapping elements (expanded) if inplace=True", _strides(input), way_out)
    if target.requires_grad and torch.is_grad_enabled():
        _refuse(ValueError, op, "target", "not require grad if inplace=True", "requires_grad=True", "Use target.detach().")


def _strides(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} with strides {list(tensor.stride())}"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory: some dimension does not step over all that the smaller ones span."""
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size == 1:
            continue
        if stride < span:
            return True
        span = stride * (size - 1) + span
    return False


def _loss_dtype(input: Tensor, target: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None:
        return dtype
    own = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype
    if own.itemsize == 2 and torch.is_autocast_enabled(input.device.type):
        return torch.float32  # cross entropy is on autocast's float32 list
    return None if own == input.dtype else own


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
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    precompute_grad: bool = False,
    inplace: bool = False,
    return_stats: Literal[False] = False,
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
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    precompute_grad: bool = False,
    inplace: bool = False,
    return_stats: Literal[True],
) -> tuple[Tensor, CrossEntropyStats]: ...


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
    dtype: torch.dtype | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    precompute_grad: bool = False,
    inplace: bool = False,
    return_stats: bool,
) -> Tensor | tuple[Tensor, CrossEntropyStats]: ...


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
    precompute_grad: bool = False,
    inplace: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    r"""Softmax cross entropy of logits and class indices or class probabilities.

    The counterpart of :func:`torch.nn.functional.cross_entropy`, position by position up to ``label_smoothing``, as one
    fused kernel forward and one backward. With :math:`z_c = s \tanh(a x_c / s)` (``softcap`` s, ``logit_scale`` a; without a
    cap :math:`z = a x`), :math:`\mathrm{lse} = \log\sum_c e^{z_c}`, weights w and smoothing :math:`\varepsilon`, a row's loss is

    .. math::
        (1-\varepsilon) w_y (\mathrm{lse} - z_y) + \tfrac{\varepsilon}{C} \sum_c w_c (\mathrm{lse} - z_c)
        + \text{z\_loss} \cdot \mathrm{lse}^2

    for a class index y, and :math:`\sum_c w_c ((1-\varepsilon) q_c + \varepsilon/C)(\mathrm{lse} - z_c) + \text{z\_loss} \cdot
    \mathrm{lse}^2` for probabilities q. A class without mass (:math:`q_c = 0` or :math:`w_c = 0`) contributes nothing even where
    its logit is -inf; torch gives NaN there. Half types are computed in float32 and rounded once.

    Args:
        input: logits, ``(C)``, ``(N, C)`` or ``(N, C, d1, ...)``, any strides; float64, float32, bfloat16 or float16.
        target: classes, int64 or uint8 of the input's shape without C; or probabilities, floating, of the input's
            shape. Probabilities get a gradient too if they require one.
        weight: ``(C)``, floating: a factor for each class.
        size_average: deprecated, see ``reduction``.
        ignore_index: rows of this class have loss 0 and gradient 0 and do not count in the mean. Any int.
        reduce: deprecated, see ``reduction``.
        reduction: "mean" (divides by the sum of weight[target] over the rows not ignored; by the number of rows for
            probabilities), "sum" or "none".
        label_smoothing: in [0, 1].
        dtype: compute and return in this dtype without a converted copy. Default: the input's (promoted with the
            probabilities'); float32 for half types under autocast.
        z_loss: factor of the squared log-sum-exp (PaLM, arXiv:2204.02311, section 5).
        softcap: caps the logits smoothly to (-softcap, softcap) (Gemma 2, arXiv:2408.00118, section 2); None: no cap.
        logit_scale: factor of the logits, an inverse temperature.
        precompute_grad: the forward writes the gradient while the row is in cache; the backward multiplies only if the
            upstream gradient is not 1.
        inplace: the gradient is written over the input's own storage, in the backward, or in the forward with
            ``precompute_grad``. The input's values are then lost, and its version counter is raised, so that
            autograd refuses a graph that still needs them. Both strategies are plain under torch.compile, ``torch.func``
            and forward-mode AD, where they have no effect but memory.
        return_stats: also return :class:`CrossEntropyStats`.

    Returns:
        The loss: a scalar, or of the target's (index) shape for reduction "none"; with ``return_stats`` the tuple
        (loss, stats).

    Raises:
        TypeError: an argument is not a Tensor, a number or an int where one is needed.
        ValueError: the batch sizes differ; an unknown reduction; an option out of range; ``inplace`` with a leaf that
            requires grad or with overlapping elements.
        IndexError: a class out of range (CPU); the text names the position and the value.
        RuntimeError: other shapes or dtypes of target and weight, ``label_smoothing`` out of range, different devices; a
            second backward after ``inplace``.
        NotImplementedError: logits of another dtype or layout.
    """
    op = "cross_entropy"
    _check_tensor(op, "input", input)
    _check_options(op, label_smoothing, z_loss, softcap, logit_scale, ignore_index)
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction not in _REDUCTIONS:
        _refuse(ValueError, op, "reduction", 'be "mean", "sum" or "none"', f"{reduction!r}")
    _check_dtype(op, dtype)
    _check_strided(op, "input", input)
    _check_floating(op, "input", input)
    if input.dim() == 0:
        _refuse(RuntimeError, op, "input", "have at least one dimension, the classes", input)
    dim, target = _check_target(op, input, target, ignore_index)
    indices = not target.is_floating_point()
    _check_weight(op, input, weight, input.shape[dim], indices)
    if inplace:
        _check_inplace(op, input, target)

    options = Options(dim, _REDUCTIONS[reduction], ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    dtype = _loss_dtype(input, target, dtype)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        if return_stats:
            _refuse(RuntimeError, op, "weight", "not require grad with return_stats", "requires_grad=True", "Use weight.detach().")
        return reference_cross_entropy(input, target, weight, options).to(dtype or input.dtype)
    results = _run(input, target, weight, options, dtype, precompute_grad, inplace, return_stats)
    return (results[0], CrossEntropyStats(*results[3:7])) if return_stats else results[0]


def _run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    dtype: torch.dtype | None,
    precompute_grad: bool,
    inplace: bool,
    stats: bool,
) -> Any:
    """The operator's results by the Function that the strategy and the surroundings call for."""
    if torch.compiler.is_compiling():
        return CompiledCrossEntropy.apply(input, target, weight, *options, dtype, stats)
    if _only_values_wanted(input, target):
        dim, reduction, ignore, smoothing, z_loss, softcap, scale = options
        return ops.cross_entropy(
            input, target, weight, dim, reduction, ignore, smoothing, dtype, z_loss, softcap, scale, stats, False
        )
    overwriting = (precompute_grad and not target.requires_grad) or inplace
    if overwriting and not _in_transform() and input.requires_grad:
        return OverwritingCrossEntropy.apply(input, target, weight, *options, dtype, stats, precompute_grad, inplace)
    return CrossEntropy.apply(input, target, weight, *options, dtype, stats)
