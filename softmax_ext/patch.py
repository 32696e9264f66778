"""softmax_ext in the place of torch's own functions, so that a script need not be changed: patch() and unpatch().

Each replacement looks at the call. It goes to softmax_ext where that computes the same, else to what was there before.
It never tries one and then the other. The rules stand in :func:`patch`, and in the functions ``_unsupported*`` below.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, cuda, functional, internals
from .autograd.transforms import has_tangent
from .imports import around_import
from .options import REDUCTIONS
from .overrides import hand_over, has_torch_function_variadic, is_jit_tracing

_DEVICES = ("cpu", "meta") if cuda.library is None else ("cpu", "meta", "cuda")
_HAS_NAMED_TENSORS = hasattr(Tensor, "names")  # before 2.13
_Reason = str | None
"""Why a call goes to torch; None if it goes to softmax_ext."""


# ---- which calls go to softmax_ext ----


def _unsupported_here(*tensors: Any) -> _Reason:
    """What is active around the call."""
    if internals.is_exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if is_jit_tracing():
        return "torch.jit.trace"
    if has_torch_function_variadic(*tensors) and not internals.only_default_device():
        return "a TorchFunctionMode"
    return None


def _unsupported_tensor(argument: str, tensor: Any) -> _Reason:
    """What a tensor is: its class, layout, device."""
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return f"{argument}: {kind.__name__}"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"{argument}: sparse or nested"
    if tensor.device.type not in _DEVICES:
        return f"{argument}: on {tensor.device.type}"
    if not torch.compiler.is_compiling():
        if _HAS_NAMED_TENSORS and any(tensor.names):
            return f"{argument}: named dimensions"
        if internals.is_batched_gradient(tensor):
            return f"{argument}: a batched gradient"
    return None


def _unsupported_logits(input: Any) -> _Reason:
    reason = _unsupported_tensor("input", input)
    if reason is None and not checks.is_computed(input.dtype):
        reason = f"input: {_name(input.dtype)}"
    return reason


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _unsupported_softmax(input: Any, dim: Any, dtype: Any) -> _Reason:
    reason = _unsupported_here(input) or _unsupported_logits(input)
    if reason is not None:
        return reason
    if dtype is not None and not checks.is_computed(dtype):
        return f"dtype: {_name(dtype)}"
    rank = input.dim() or 1
    if dim is not None and not (type(dim) is int and -rank <= dim < rank):
        return "dim: no int, or out of range"
    return None


def _unsupported_cross_entropy(
    input: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> _Reason:
    reason = _unsupported_here(input) or _unsupported_logits(input) or _unsupported_tensor("target", target)
    if reason is None and weight is not None:
        reason = _unsupported_weight(input, target, weight)
    if reason is not None:
        return reason
    if not _is_target(input, target):
        return f"target: {_name(target.dtype)} in {target.dim()} dimensions, or in another shape, for the input"
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return "ignore_index: no int of 64 bits"
    if ignore_index >= 0 and target.is_floating_point():
        return "ignore_index: not negative, with probabilities"
    if reduction not in REDUCTIONS and reduction != "elementwise_mean":
        return "reduction: unknown"
    if type(label_smoothing) not in (float, int) or not 0 <= label_smoothing <= 1:
        return "label_smoothing: no number from 0 to 1"
    return None


def _is_target(input: Tensor, target: Tensor) -> bool:
    """Whether dtype, device and shape are those of class indices or of probabilities."""
    rank = input.dim()
    probabilities = checks.is_computed(target.dtype)
    if target.device != input.device or not rank or not (probabilities or checks.is_of_classes(target.dtype)):
        return False
    if torch.compiler.is_compiling():  # a comparison of sizes would be a guard
        return target.dim() == (rank if probabilities else rank - 1)
    shape = input.shape
    return target.shape == (shape if probabilities else shape[:1] + shape[2:] if rank > 1 else ())


def _unsupported_weight(input: Tensor, target: Tensor, weight: Any) -> _Reason:
    reason = _unsupported_tensor("weight", weight)
    if reason is not None:
        return reason
    if not checks.is_computed(weight.dtype):
        return f"weight: {_name(weight.dtype)}"
    if weight.device != input.device or weight.dim() != 1:
        return "weight: another device or shape"
    if not target.is_floating_point():
        if torch.is_grad_enabled() and internals.requires_grad(weight):
            return "weight: requires grad, with class indices"
        if not torch.compiler.is_compiling() and has_tangent(weight):
            return "weight: has a tangent, with class indices"
    return None


# ---- the report ----


class PatchReport:
    """Which calls went where, under ``patch(report=True)``; ``str()`` is a readable text.

    Calls in compiled code are not counted, neither when it is traced nor when it runs. A call that torch's function
    makes of another one is not counted either, as ``F.softmax`` makes one of ``Tensor.softmax``.

    Attributes:
        softmax_ext: by function, how many calls went to softmax_ext.
        torch: by function, how many calls went to torch for each reason.
    """

    def __init__(self) -> None:
        self.softmax_ext: Counter[str] = Counter()
        self.torch: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def _count(self, function: str, reason: _Reason) -> None:
        if reason is None:
            self.softmax_ext[function] += 1
        else:
            self.torch[function][reason] += 1

    def __str__(self) -> str:
        lines = []
        for name in sorted({*self.softmax_ext, *self.torch}):
            reasons = self.torch.get(name, Counter())
            lines.append(f"{name}: {self.softmax_ext[name]} to softmax_ext, {reasons.total()} to torch")
            lines += [f"    {count} for {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines) or "no calls"


_thread = threading.local()


@contextmanager
def _uncounted() -> Iterator[None]:
    before = getattr(_thread, "inside_torch", False)
    _thread.inside_torch = True
    try:
        yield
    finally:
        _thread.inside_torch = before


# ---- the replacements ----


class _Installation:
    """The replacements that are in place, and what was there before. A name that was imported stays tied to its own.

    Attributes:
        active: whether calls may go to softmax_ext. Not after the end: the replacements then call what was there.
        reports: those that count.
        patches: the patches that hold it.
    """

    def __init__(self) -> None:
        self.active = False
        self.reports: list[PatchReport] = []
        self.patches: list[Patch] = []
        self.replaced = [_Replaced(self, *target) for target in _TARGETS]

    def count(self, function: str, reason: _Reason) -> None:
        """Counts a call; none in what torch.compile traces."""
        if self.reports and not internals.is_tracing() and not getattr(_thread, "inside_torch", False):
            for report in self.reports:
                report._count(function, reason)

    def call_torch(
        self, name: str, reason: str, original: Callable[..., Any], tensors: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Calls ``original``, or the __torch_function__ of the tensors' classes or of a mode, which are given it."""
        self.count(name, reason)
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        if has_torch_function_variadic(*tensors):
            original = functools.partial(hand_over, original, tensors)
        if not self.reports:
            return original(*args, **kwargs)
        with _uncounted():
            return original(*args, **kwargs)

    def put(self) -> None:
        """Puts the replacements in place."""
        for replaced in self.replaced:
            setattr(replaced.owner, replaced.name, replaced.replacement)

    def take_back(self) -> list[str]:
        """Puts back what was there before; returns the names of what somebody else has replaced since."""
        return [replaced.label for replaced in self.replaced if not replaced.take_back()]


class _Replaced:
    """One attribute of torch's, with its replacement."""

    def __init__(
        self, installation: _Installation, owner: Any, name: str, make: Callable[..., Callable[..., Any]]
    ) -> None:
        self.owner, self.name = owner, name
        self.label = f"{'torch.Tensor' if owner is Tensor else owner.__name__}.{name}"
        self.is_inherited = name not in vars(owner)
        self.original = getattr(owner, name)
        log = name == "log_softmax"
        self.replacement = make(installation, self.label, self.original, log)
        functools.update_wrapper(self.replacement, self.original)
        # Where pickle finds it.
        self.replacement.__module__ = F.__name__ if owner is F else torch.__name__
        self.replacement.__qualname__ = f"Tensor.{name}" if owner is Tensor else name
        self.replacement.__prepare_scriptable__ = self._scriptable  # type: ignore[attr-defined]

    def _scriptable(self) -> Callable[..., Any]:
        """What torch.jit.script compiles in the replacement's place."""
        if self.owner is F:
            return self.original  # type: ignore[no-any-return]
        return _log_softmax_in_script if self.name == "log_softmax" else _softmax_in_script

    def take_back(self) -> bool:
        """Puts the original back, if the replacement is still there."""
        if vars(self.owner).get(self.name) is not self.replacement:
            return False
        if self.is_inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)
        return True


# TorchScript compiles Python functions only, and torch.softmax is none.
def _softmax_in_script(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return input.softmax(dim, dtype)


def _log_softmax_in_script(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return input.log_softmax(dim, dtype)


def _make_cross_entropy(
    installation: _Installation, label: str, original: Callable[..., Tensor], log: bool
) -> Callable[..., Tensor]:
    def cross_entropy(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        keywords: dict[str, Any] = {
            "weight": weight,
            "size_average": size_average,
            "ignore_index": ignore_index,
            "reduce": reduce,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if not installation.active:
            return original(input, target, **keywords)
        given = "mean" if size_average is not None or reduce is not None else reduction  # they override it
        reason = _unsupported_cross_entropy(input, target, weight, ignore_index, given, label_smoothing)
        if reason is not None:
            tensors = (input, target, weight)
            return installation.call_torch(label, reason, original, tensors, input, target, **keywords)  # type: ignore[no-any-return]
        installation.count(label, None)
        return functional.cross_entropy(input, target, **keywords)  # type: ignore[no-any-return]

    return cross_entropy


def _make_functional_softmax(
    installation: _Installation, label: str, original: Callable[..., Tensor], log: bool
) -> Callable[..., Tensor]:
    ours = functional.log_softmax if log else functional.softmax

    def softmax(
        input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        # The warning where there is no dim is to show the caller's line.
        if not installation.active:
            return original(input, dim=dim, _stacklevel=_stacklevel + 1, dtype=dtype)
        reason = _unsupported_softmax(input, dim, dtype)
        if reason is not None:
            keywords = {"dim": dim, "_stacklevel": _stacklevel + 2, "dtype": dtype}
            return installation.call_torch(label, reason, original, (input,), input, **keywords)  # type: ignore[no-any-return]
        installation.count(label, None)
        return ours(input, dim, dtype, _stacklevel + 1)

    return softmax


def _make_softmax(
    installation: _Installation, label: str, original: Callable[..., Tensor], log: bool
) -> Callable[..., Tensor]:
    """torch.softmax, or the method of Tensor."""
    ours = functional.log_softmax if log else functional.softmax

    def softmax(*args: Any, **kwargs: Any) -> Tensor:
        if not installation.active:
            return original(*args, **kwargs)
        call = _Call.of(*args, **kwargs)
        reason = _unsupported_softmax(*call)
        if reason is None and call.dim is None:
            reason = "other arguments than input, dim and dtype"
        if reason is not None:
            return installation.call_torch(label, reason, original, (call.input,), *args, **kwargs)  # type: ignore[no-any-return]
        installation.count(label, None)
        return ours(*call)

    return softmax


class _Call(NamedTuple):
    input: Any
    dim: Any
    dtype: Any

    @staticmethod
    def of(input: Any = None, dim: Any = None, dtype: Any = None, *others: Any, **named: Any) -> _Call:
        """The arguments by their usual names. torch has more names, as ``axis`` and ``out``; then ``dim`` is None."""
        return _Call(input, None if others or named else dim, dtype)


_TARGETS: list[tuple[Any, str, Callable[..., Callable[..., Any]]]] = [
    (F, "cross_entropy", _make_cross_entropy),
    (F, "softmax", _make_functional_softmax),
    (F, "log_softmax", _make_functional_softmax),
    (torch, "softmax", _make_softmax),
    (torch, "log_softmax", _make_softmax),
    (Tensor, "softmax", _make_softmax),
    (Tensor, "log_softmax", _make_softmax),
]


# ---- patch and unpatch ----

_installation: _Installation | None = None
_waits_for_dynamo = False
_lock = threading.RLock()
"""Held where the names of torch are replaced; a context around the import of Dynamo does that in any thread."""


@contextmanager
def _originals() -> Iterator[None]:
    """torch as it was, while Dynamo is imported: it lists torch's functions then, and takes no others for torch's."""
    with _lock:
        current = _installation
        taken = [] if current is None else [replaced for replaced in current.replaced if replaced.take_back()]
        try:
            yield
            internals.list_tensor_methods()
        finally:
            for replaced in taken:
                setattr(replaced.owner, replaced.name, replaced.replacement)


def _prepare_dynamo() -> None:
    global _waits_for_dynamo
    if internals.DYNAMO in sys.modules:
        internals.list_tensor_methods()
    elif not _waits_for_dynamo:
        _waits_for_dynamo = True
        around_import(internals.DYNAMO, _originals)


def _add(added: Patch) -> None:
    global _installation
    with _lock:
        if _installation is None:
            _prepare_dynamo()
            _installation = _Installation()
            _installation.put()
            _installation.active = True
        if added not in _installation.patches:
            _installation.patches.append(added)
            if added.report is not None:
                _installation.reports.append(added.report)


def _remove(removed: Sequence[Patch] | None, stacklevel: int) -> None:
    """Removes some patches; None: all."""
    global _installation
    with _lock:
        if _installation is None:
            return
        current = _installation
        current.patches = [] if removed is None else [p for p in current.patches if p not in removed]
        current.reports = [p.report for p in current.patches if p.report is not None]
        if current.patches:
            return
        _installation = None
        current.active = False
        others = current.take_back()
    if others:
        left = "it is left alone" if len(others) == 1 else "they are left alone"
        text = f"softmax_ext.unpatch: somebody else has replaced {', '.join(others)} since softmax_ext.patch; {left}."
        warnings.warn(text, stacklevel=stacklevel)


class Patch:
    """What :func:`patch` returns: a context manager that removes this patch when it is left.

    Attributes:
        report: a :class:`PatchReport`, or None.
    """

    def __init__(self, report: bool) -> None:
        self.report = PatchReport() if report else None
        self._entered = 0

    def __enter__(self) -> Patch:
        self._entered += 1
        _add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            _remove([self], 3)


def patch(report: bool = False) -> Patch:
    """Has torch's own functions computed by softmax_ext, in the whole process, until :func:`unpatch`.

    It replaces ``cross_entropy``, ``softmax`` and ``log_softmax`` of torch.nn.functional, and ``softmax`` and
    ``log_softmax`` of torch and of torch.Tensor. So torch.nn.CrossEntropyLoss, Softmax and LogSoftmax follow, and all
    modules of torch that call these functions. Signatures, names and docstrings are torch's.

        softmax_ext.patch()         # until unpatch()
        with softmax_ext.patch():   # until the end of the block

    Patches nest: the functions are torch's own again when the last one is removed. A name that was imported from torch
    under a patch behaves as torch's own after it. A name that was imported before is not replaced.

    A call goes to softmax_ext if all of this is so, and to what was there before if not:

    - Each tensor is a torch.Tensor or Parameter itself, no other class: strided, neither nested nor with named
      dimensions, on the CPU, on meta, or on CUDA where this package has its CUDA kernels; and no gradient that autograd
      batches (``is_grads_batched``).
    - No TorchFunctionMode is active, but for that of ``torch.device`` and ``torch.set_default_device``.
    - It is not traced by torch.jit.trace or torch.export, and so not exported to ONNX: what these make is to run
      without this package. What torch.jit.script compiles is torch's own too.
    - The logits are float64, float32, bfloat16 or float16, and so is ``dtype`` if it is given.
    - softmax and log_softmax: ``dim`` is an int in range, or is left out in torch.nn.functional. No ``out``, and no
      other names of arguments.
    - cross_entropy: the target has class indices of int64 or uint8 in the shape of the logits without C, or
      probabilities of a dtype that logits may have, in the logits' shape and with a negative ``ignore_index``. It and
      the class weights are on the logits' device.
    - The class weights are floating, of one dimension, and with class indices they are not differentiated.
    - ``label_smoothing`` is a float or an int in [0, 1], ``ignore_index`` an int.

    Values are torch's within rounding. README.md says under "What differs" where they are not, and that a class out of
    range is a NaN on CUDA, unless SOFTMAX_EXT_CHECK_TARGETS is set. A call that torch refuses may get either's error.

    Under torch.compile the rules are the same, but methods of Tensor are torch's own, and so is what torch's functions
    call inside. Code that was compiled before patch() or unpatch() is compiled anew where it calls one of the other
    functions.

    Args:
        report: whether to count the calls, in the ``report`` of the result.

    Returns:
        A :class:`Patch`, with which this patch can be removed.
    """
    patched = Patch(report)
    _add(patched)
    return patched


def unpatch() -> None:
    """Removes all patches of :func:`patch`; does nothing if there are none.

    A function that somebody else has replaced meanwhile is left alone, with a UserWarning.
    """
    _remove(None, 3)
