"""The checks of the public functions' arguments. Each raises torch's exception type with a better text than torch's.

A text names the operation, the argument, what the argument must be and what it was, and a remedy where there is one. It
contains the sentence of torch's that code may look for. No memory is allocated or written before all checks have
passed.
"""

from __future__ import annotations

import numbers
import operator
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import internals
from .autograd.transforms import has_tangent
from .internals import equal_sizes
from .options import MEAN, NONE, REDUCTIONS, Options

_LARGEST, _SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
_STRIDED = torch.strided
_CLASSES = (torch.int64, torch.uint8)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    """The value as a message shows it: dtype and shape of a Tensor, else the value and its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def refuse(error: type[Exception], op: str, argument: str, need: str, got: str, way_out: str = "") -> NoReturn:
    """Raises ``error``. All messages of this module have the form of this one."""
    raise error(f"{op}: {argument} must {need}; got {got}.{' ' + way_out if way_out else ''}")


def is_computed(dtype: torch.dtype) -> bool:
    """Whether the kernels compute the dtype."""
    return dtype in _FLOATING


def is_of_classes(dtype: torch.dtype) -> bool:
    """Whether class indices may have the dtype."""
    return dtype in _CLASSES


def check_dense(op: str, argument: str, value: Any) -> None:
    """TypeError unless ``value`` is a Tensor; NotImplementedError for sparse and nested Tensors."""
    if not isinstance(value, Tensor):
        refuse(TypeError, op, argument, "be a Tensor", f"{type(value).__name__}")
    if value.layout is not _STRIDED or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        refuse(NotImplementedError, op, argument, "be a dense (strided) tensor", kind, "Use to_dense() or pad it.")


def check_floating(op: str, argument: str, value: Tensor) -> None:
    """NotImplementedError unless the kernels compute the dtype of ``value``."""
    if value.dtype not in _FLOATING:
        need = "be float64, float32, bfloat16 or float16"
        refuse(NotImplementedError, op, argument, need, describe(value), f"Use {argument}.float().")


def check_dtype(op: str, dtype: torch.dtype | None, way_out: str = "") -> None:
    """TypeError unless ``dtype`` is a torch.dtype or None; NotImplementedError unless the kernels compute it."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        refuse(TypeError, op, "dtype", "be a torch.dtype or None", describe(dtype), way_out)
    if dtype is not None and dtype not in _FLOATING:
        refuse(NotImplementedError, op, "dtype", "be float64, float32, bfloat16, float16 or None", f"{dtype}")


def check_device(op: str, argument: str, value: Tensor, input: Tensor) -> None:
    """RuntimeError unless ``value`` is on the input's device."""
    if value.device != input.device:
        need = f"be on the input's device, {input.device}"
        refuse(RuntimeError, op, argument, need, f"{value.device}", f"Use {argument}.to(input.device).")


def number(op: str, argument: str, value: Any) -> float:
    """The value as a float; TypeError unless it is a real number, numpy's and 0-dim Tensors included, bool excluded."""
    if isinstance(value, bool):
        refuse(TypeError, op, argument, "be a number", describe(value))
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool:
        return _detached(op, argument, value)
    refuse(TypeError, op, argument, "be a number", describe(value))


def _detached(op: str, argument: str, value: Tensor) -> float:
    """The value of a 0-dim tensor; TypeError if it has no value, or a derivative that the call would lose."""
    way_out = f"An option has no derivative. Use {argument}.item(), or scale the logits by the tensor yourself."
    if internals.requires_grad(value) or has_tangent(value):
        refuse(TypeError, op, argument, "be a number", "a tensor that is differentiated", way_out)
    try:
        return float(value)
    except (RuntimeError, NotImplementedError):  # within vmap, on meta
        refuse(TypeError, op, argument, "be a number", f"a tensor without a value of its own, on {value.device}")


def integer(op: str, argument: str, value: Any) -> int:
    """The value as an int; TypeError unless it can be an index (no bool), ValueError unless it fits 64 bits."""
    if type(value) is int and (torch.compiler.is_compiling() or -(2**63) <= value < 2**63):
        return value  # one that is traced fits, and may have no value yet
    if isinstance(value, bool):
        refuse(TypeError, op, argument, "be an int", describe(value))
    if not isinstance(value, int):
        try:
            if isinstance(value, Tensor) and value.dtype == torch.bool:
                raise TypeError
            value = operator.index(value)
        except (TypeError, RuntimeError, NotImplementedError):
            refuse(TypeError, op, argument, "be an int", describe(value))
    if not -(2**63) <= value < 2**63:
        refuse(ValueError, op, argument, "fit 64 bits", describe(value))
    return value  # type: ignore[no-any-return]


def refuse_integer_probabilities(op: str, like: str, target: Tensor, class_dim: int) -> NoReturn:
    """The error for a target of the logits' shape that is not floating; ``like`` names what has that shape."""
    torchs = "Expected floating point type for target with class probabilities."
    way_out = f"If it is one-hot, use target.to(input.dtype), or target.argmax({class_dim}) as class indices."
    need = f"be floating (class probabilities) if it has the shape of {like}"
    refuse(RuntimeError, op, "target", need, describe(target), f"{way_out} {torchs}")


def check_target(op: str, input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The target in the shape that the operator takes. RuntimeError or ValueError for another shape or dtype."""
    check_dense(op, "target", target)
    if target.device != input.device:
        check_device(op, "target", target, input)
    shape = input.shape
    batch = shape[:1] + shape[2:] if len(shape) > 2 else shape[:-1]
    if target.dtype in _CLASSES and equal_sizes(target.shape, batch):
        return target
    if equal_sizes(target.shape, shape):
        if not target.is_floating_point():
            refuse_integer_probabilities(op, "the input", target, 0 if len(shape) == 1 else 1)
        check_floating(op, "target", target)
        if ignore_index >= 0:
            refuse(RuntimeError, op, "ignore_index", "be negative with a target of probabilities", f"{ignore_index}")
        return target
    if input.dim() == 1 and list(target.shape) == [1]:
        target = target.squeeze(0)  # as torch allows
    if target.dtype not in _CLASSES or not equal_sizes(target.shape, batch):
        # As in torch, another number of rows is a ValueError and everything else a RuntimeError.
        if input.dim() == 1:
            other_size = target.dim() == 1 and target.dtype in _CLASSES
        else:
            other_size = target.shape[:1] != input.shape[:1]
        error = ValueError if other_size else RuntimeError
        need = f"be int64 or uint8 of shape {list(batch)}, or floating of the input's shape {list(input.shape)}"
        way_out = "Use target.long()." if target.shape == batch else _classes_elsewhere(op, shape, target)
        refuse(error, op, "target", need, describe(target), way_out)
    return target


def _classes_elsewhere(op: str, shape: torch.Size, target: Tensor) -> str:
    """The remedy where the classes are the input's last dimension, as in a language model; "" otherwise."""
    if op == "cross_entropy" and len(shape) > 2 and target.shape == shape[:-1]:
        return "The classes are dimension 1 of the input, not the last one: use input.movedim(-1, 1)."
    return ""


def check_logits(op: str, input: Tensor, target: object) -> None:
    """The same as ``check_floating``, but the text tells when logits and target are probably swapped."""
    if input.dtype in _FLOATING:
        return
    if isinstance(target, Tensor) and target.is_floating_point():
        need = "be float64, float32, bfloat16 or float16"
        way_out = "The logits come first, the target second: are the two swapped?"
        refuse(NotImplementedError, op, "input", need, describe(input), way_out)
    check_floating(op, "input", input)


def check_weight(op: str, input: Tensor, weight: Tensor, classes: int, indices: bool) -> None:
    """RuntimeError unless ``weight`` is floating, of shape [classes] and on the input's device.

    With class indices it must not require grad either, because torch gives it no gradient there.
    """
    check_dense(op, "weight", weight)
    if not equal_sizes(weight.shape, [classes]):
        refuse(RuntimeError, op, "weight", f"have shape [{classes}], one value for each class", describe(weight))
    if weight.dtype not in _FLOATING:
        refuse(RuntimeError, op, "weight", "be floating", describe(weight), "Use weight.to(input.dtype).")
    check_device(op, "weight", weight, input)
    if indices and torch.is_grad_enabled() and internals.requires_grad(weight):
        refuse(
            RuntimeError,
            op,
            "weight",
            "not require grad with class indices",
            "requires_grad=True",
            "Use weight.detach().",
        )


def _warn(text: str) -> None:
    """A UserWarning that shows the line that called the public function. Dynamo does not trace warnings."""
    if not torch.compiler.is_compiling():
        warnings.warn(text, stacklevel=4)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that these deprecated arguments stand for, with torch's warning."""
    if reduce is not None and not reduce:
        reduction = "none"
    else:
        reduction = "mean" if size_average is None or size_average else "sum"
    _warn(f"size_average and reduce args will be deprecated, please use reduction='{reduction}' instead.")
    return reduction


def check_options(
    op: str,
    dim: int,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> Options:
    """The options as the operators take them: plain numbers within their ranges, and a code for the reduction.

    TypeError for an option that is not a number. ValueError for one out of range, but as in torch a RuntimeError for
    ``label_smoothing``.
    """
    if isinstance(reduction, str) and reduction == "elementwise_mean":
        _warn("reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.")
        reduction = "mean"
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        torchs = f"{reduction} is not a valid value for reduction."
        refuse(ValueError, op, "reduction", 'be "mean", "sum" or "none"', f"{reduction!r}", torchs)
    if not type(label_smoothing) is type(z_loss) is type(logit_scale) is float:
        label_smoothing = number(op, "label_smoothing", label_smoothing)
        z_loss = number(op, "z_loss", z_loss)
        logit_scale = number(op, "logit_scale", logit_scale)
    if not 0 <= label_smoothing <= 1:
        refuse(RuntimeError, op, "label_smoothing", "be between 0.0 and 1.0", f"{label_smoothing}")
    if not 0 <= z_loss <= _LARGEST:
        refuse(ValueError, op, "z_loss", "be finite and not negative", f"{z_loss}")
    if not -_LARGEST <= logit_scale <= _LARGEST:
        refuse(ValueError, op, "logit_scale", "be finite (in float32)", f"{logit_scale}")
    cap = softcap
    if cap is not None:
        cap = number(op, "softcap", cap) or None
    if cap is not None and (not _SMALLEST <= cap <= _LARGEST or abs(logit_scale / cap) > _LARGEST):
        need = "be finite and positive (and so logit_scale / softcap, in float32), or 0 or None for no cap"
        refuse(ValueError, op, "softcap", need, f"{cap}")
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = integer(op, "ignore_index", ignore_index)
    return Options(dim, REDUCTIONS[reduction], ignore_index, label_smoothing, z_loss, cap, logit_scale)


def _is_differentiated(tensor: Tensor) -> bool:
    return (torch.is_grad_enabled() and internals.requires_grad(tensor)) or has_tangent(tensor)


def check_row_weight(
    op: str,
    input: Tensor,
    rows: Sequence[int],
    target: Tensor,
    row_weight: Tensor | str,
    options: Options,
) -> tuple[Tensor | None, Options]:
    """The factors of the rows' losses as the operators take them, and the options to be used with them.

    The factors are a tensor of shape ``rows``, or of "probability" the option ``weighs_by_probability``.
    """
    need = 'be a Tensor, "probability" or None'
    if isinstance(row_weight, str):
        if row_weight != "probability":
            refuse(ValueError, op, "row_weight", need, repr(row_weight))
        if target.is_floating_point():
            refuse(ValueError, op, "row_weight", "be a Tensor or None with a target of probabilities", repr(row_weight))
        return None, options._replace(weighs_by_probability=True)
    if not isinstance(row_weight, Tensor):
        refuse(TypeError, op, "row_weight", need, describe(row_weight))
    check_dense(op, "row_weight", row_weight)
    if not equal_sizes(row_weight.shape, rows):
        refuse(RuntimeError, op, "row_weight", f"have shape {list(rows)}, one value for each row", describe(row_weight))
    if row_weight.dtype not in _FLOATING:
        way_out = "Use row_weight.to(input.dtype)."
        refuse(RuntimeError, op, "row_weight", "be floating", describe(row_weight), way_out)
    check_device(op, "row_weight", row_weight, input)
    if _is_differentiated(row_weight):
        way_out = 'It gets no gradient. Use row_weight.detach(), or multiply the losses of reduction="none" yourself.'
        refuse(TypeError, op, "row_weight", "have no derivative", "a tensor that is differentiated", way_out)
    return row_weight, options


# Numbers that are not known while a program is traced, like a size.
_SYMBOLIC: tuple[type, ...] = (torch.SymInt, torch.SymFloat)


def check_denominator(op: str, input: Tensor, denominator: float | Tensor, options: Options) -> tuple[Tensor, Options]:
    """The denominator as the operators take it, [] float64 on the input's device, and the options to be used with it.

    The operators have one reduction that divides, the mean, so "sum" becomes that. Nobody waits for a tensor's value.
    """
    if options.reduction == NONE:
        refuse(ValueError, op, "denominator", 'be None with reduction="none"', describe(denominator))
    options = options._replace(reduction=MEAN)
    need = "be a number or a tensor of one real number"
    if isinstance(denominator, _SYMBOLIC):
        return _scalar(torch.sym_float(denominator), input), options
    if not isinstance(denominator, Tensor):
        try:
            value = float(number(op, "denominator", denominator))
        except OverflowError:
            refuse(ValueError, op, "denominator", "be finite as a float", "an int of more than 300 digits")
        return _scalar(value, input), options
    check_dense(op, "denominator", denominator)
    if denominator.dtype == torch.bool or denominator.is_complex():
        refuse(TypeError, op, "denominator", need, describe(denominator))
    if denominator.numel() != 1:
        way_out = "Of values that are to be added: denominator.sum()."
        refuse(ValueError, op, "denominator", "have one element", describe(denominator), way_out)
    if _is_differentiated(denominator):
        way_out = "It gets no gradient. Use denominator.detach(), or divide the sum of the losses by it yourself."
        refuse(TypeError, op, "denominator", "have no derivative", "a tensor that is differentiated", way_out)
    if denominator.device != input.device and denominator.device.type == "cpu" and denominator.dim() == 0:
        return _scalar(denominator, input), options
    check_device(op, "denominator", denominator, input)
    scalar = denominator if denominator.dim() == 0 else denominator.reshape(())
    return scalar.to(torch.float64), options


def _scalar(value: float | Tensor, input: Tensor) -> Tensor:
    """The value, a number or a 0-dim tensor on the host, as [] float64 on the input's device.

    Of a tensor, and in traced code, it is a product: torch takes such a factor to any device with the kernel, without a
    copy that the host waits for, and torch.compile need not compile again for another number.
    """
    if type(value) is float and not torch.compiler.is_compiling():
        return torch.full((), value, dtype=torch.float64, device=input.device)
    return torch.ones((), dtype=torch.float64, device=input.device) * value


def check_inplace(op: str, input: Tensor, target: Tensor) -> None:
    """ValueError where a write over the input would lose a leaf's values or a gradient, or corrupt elements."""
    leaf = internals.view_base(input)
    if leaf.is_leaf and leaf.requires_grad and torch.is_grad_enabled():
        got = "such a leaf" if leaf is input else "a view of one"
        way_out = "Its values would be lost to the gradient. Use inplace=False."
        refuse(ValueError, op, "input", "not be a leaf that requires grad if inplace=True", got, way_out)
    if input.is_neg():
        refuse(
            ValueError, op, "input", "not be a lazily negated view if inplace=True", "one", "Use input.resolve_neg()."
        )
    if _overlaps_itself(input):
        way_out = "Use inplace=False or input.contiguous()."
        refuse(
            ValueError,
            op,
            "input",
            "not have overlapping elements (expanded) if inplace=True",
            _strides(input),
            way_out,
        )
    if target.requires_grad and torch.is_grad_enabled():
        refuse(
            ValueError, op, "target", "not require grad if inplace=True", "requires_grad=True", "Use target.detach()."
        )


def _strides(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} with strides {list(tensor.stride())}"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory.

    They may if the stride of some dimension is smaller than the span of all dimensions with smaller strides.
    """
    if tensor.is_contiguous():  # true without elements
        return False
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < span:
            return True
        span = stride * (size - 1) + span
    return False
