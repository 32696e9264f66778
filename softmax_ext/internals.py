"""All names of torch's inside that this package uses, which torch does not promise. No other module uses one.

Each entry says what it is for, and what replaces it in a torch that lacks it: something public, something slower, or an
exception with a reason, but never an AttributeError at a user's first call. ``missing()`` lists the entries that this
torch lacks; ``python -m softmax_ext`` prints them. Names that only the build uses (torch's headers) are not here. torch
2.10.0, 2.11.0, 2.12.1, 2.13.0 and 2.14.1 have all entries, unless ``since`` says otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import platform
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.autograd import Function


class Internal(NamedTuple):
    """One name of torch's inside.

    Attributes:
        name: the path by which Python reaches it; ``symbol X`` for the symbol X of libtorch_cpu; ``frame M:F`` for a
            function F of module M that is searched among the callers; ``source P:F`` for a function F in the file P of
            torch, which is not imported for it.
        purpose: what this package uses it for.
        without: what happens in a torch that lacks it.
        since: the first torch that has it.
    """

    name: str
    purpose: str
    without: str
    since: str = "2.10"


TABLE: list[Internal] = []


_MISSING = object()


def _look_up(name: str) -> Any:
    try:
        return reduce(getattr, name.split(".")[1:], torch)
    except (AttributeError, RuntimeError):
        return _MISSING


def _take(name: str, purpose: str, without: str, instead: Any = None) -> Any:
    """The object with this name, or ``instead`` if there is none. Adds the entry to the table."""
    TABLE.append(Internal(name, purpose, without))
    value = _look_up(name)
    return instead if value is _MISSING else value


def _exists(name: str) -> bool:
    kind, _, rest = name.rpartition(" ")
    if kind == "symbol":
        try:
            return hasattr(ctypes.CDLL("libtorch_cpu.so"), rest)  # its name is enough, because torch has loaded it
        except OSError:
            return False
    if kind == "source":
        file, function = rest.split(":")
        source = Path(torch.__file__).parent / file
        return source.exists() and f"def {function}(" in source.read_text()
    if kind == "frame":
        module, function = rest.split(":")
        try:
            spec = find_spec(module)
        except ImportError:  # a package around the module is missing
            return False
        return spec is not None and spec.origin is not None and f"def {function}(" in Path(spec.origin).read_text()
    return _look_up(name) is not _MISSING


def missing() -> list[Internal]:
    """The entries that this torch lacks although it is new enough for them."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return [i for i in TABLE if tuple(map(int, i.since.split("."))) <= version and not _exists(i.name)]


# ---- what is active around a call ----

transforms_active: Callable[[], bool] = _take(
    "torch._C._are_functorch_transforms_active",
    "whether a transform of torch.func is at work, which only the Functions with all derivatives serve",
    "every call takes those, which cost more on small inputs",
    lambda: True,
)

_take(
    "torch.autograd.forward_ad._current_level",
    "whether forward-mode AD is at work, as above",
    "as above",
)


def forward_mode_level() -> int:
    """The innermost open level of forward mode; -1 if none is open."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0)


_top_hooks = _take(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "whether saved-tensor hooks are at work, which a gradient over the logits must keep away from",
    "precompute_grad and inplace give way to the default strategy, and linear_cross_entropy computes the logits twice",
)


def saved_tensor_hooks_active() -> bool:
    """Whether tensors saved for a backward may be moved to other memory."""
    return _top_hooks is None or _top_hooks(True) is not None


is_batched_gradient: Callable[[torch.Tensor], bool] = _take(
    "torch._C._functorch.is_legacy_batchedtensor",
    "whether autograd batches a gradient (is_grads_batched): a Function's result would lose its graph in silence",
    "every gradient that is differentiated takes the plain formulas, and one that overwrites the logits is refused",
    lambda tensor: True,
)

# ---- tensors within torch.func ----

_is_wrapped = _take(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "whether a tensor within vmap hides that what it wraps requires grad",
    "class weights with class indices are refused within torch.func",
)
_unwrapped = _take("torch._C._functorch.get_unwrapped", "what such a tensor wraps", "as above")


def requires_grad(tensor: torch.Tensor) -> bool:
    """Whether a tensor requires grad, or wraps one that does: within torch.vmap the wrapper hides it."""
    if torch.compiler.is_compiling():
        return tensor.requires_grad
    if _is_wrapped is None or _unwrapped is None:
        return tensor.requires_grad or transforms_active()
    while not tensor.requires_grad and _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
    return tensor.requires_grad


_unwrap_if_dead = _take(
    "torch._C._functorch.unwrap_if_dead",
    "takes the wrapper off a tensor that has outlived its transform, as Function.apply does",
    "Function.apply itself, which costs a small call twice the time",
)
_plain_apply = _take("torch._C._FunctionBase.apply", "what Function.apply calls in the end", "as above")


def eager_apply(function: type[Function]) -> Callable[..., Any]:
    """A faster ``function.apply`` for eager calls: the one that torch's own calls if no functorch transform is active.

    torch's own first binds the arguments to a signature and unwraps dead wrappers (tensors that have outlived their
    transform). That takes as much time as the call itself on a small input. A caller of this one must unwrap its
    arguments with :func:`alive`.
    """
    if _unwrap_if_dead is None or _plain_apply is None:
        return function.apply
    base: Any = super(Function, function)
    return base.apply  # type: ignore[no-any-return]


alive: Callable[[torch.Tensor], torch.Tensor] = _unwrap_if_dead or (lambda tensor: tensor)

_take(
    "torch.Tensor._base",
    "the tensor that a view is of: writing over a view of a leaf is refused as over the leaf",
    "inplace=True is refused",
)


def view_base(tensor: torch.Tensor) -> torch.Tensor:
    """The base of a view; the tensor itself if it is no view."""
    if not hasattr(tensor, "_base"):
        raise RuntimeError(f"softmax_ext: torch {torch.__version__} does not tell a view of a leaf. Use inplace=False.")
    return tensor if tensor._base is None else tensor._base


_set_versions = _take(
    "torch._C._autograd._unsafe_set_version_counter",
    "logits that inplace=True has overwritten become a result of a Function, which refuses later uses, while their "
    "version stays the one at which the gradient in them was saved",
    "a differentiable use of overwritten logits is not refused",
)


def replace_history(apply: Callable[[torch.Tensor], object], tensor: torch.Tensor) -> None:
    """Makes ``tensor`` itself the result of a Function, whose forward marks it dirty, without a new version."""
    if _set_versions is None:
        return
    version = tensor._version
    with torch.enable_grad():
        try:
            apply(tensor)
        except RuntimeError as error:  # a view of chunk, split and the like; they refuse later uses of their base
            if "view" not in str(error):
                raise
            apply(view_base(tensor))
    _set_versions((tensor,), (version,))


# ---- Functions ----

disable_dynamo: Callable[..., Any] = (
    _take(
        "torch._compile._disable_dynamo",
        "a function that torch.compile runs as it is; Dynamo is imported when it is called first",
        "torch.compiler.disable, for which importing this package imports Dynamo",
    )
    or torch.compiler.disable
)

_set_forward_mode = _take(
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "forward mode within a Function's jvp, for a level around it, whose tangent would be lost in silence",
    "forward mode within forward mode is refused",
)


def forward_mode_enabled() -> contextlib.AbstractContextManager[Any]:
    """A context with forward mode switched on; RuntimeError if that is impossible and an outer level needs it."""
    if _set_forward_mode is not None:
        return _set_forward_mode(True)  # type: ignore[no-any-return]
    if forward_mode_level() > 0:
        raise RuntimeError(f"softmax_ext: torch {torch.__version__} has no way to forward mode within forward mode.")
    return contextlib.nullcontext()


# ---- compiled code ----

_get_dispatch_mode = _take(
    "torch._C._get_dispatch_mode",
    "whether a backward is being traced, of which torch.compiler.is_compiling() knows from torch 2.13 on",
    "second derivatives of compiled code are what torch makes of them",
)
_FAKE = _take("torch._C._TorchDispatchModeKey.FAKE", "the mode in which it is traced", "as above")


def is_tracing() -> bool:
    """Whether code is being traced by torch.compile (forward or backward) or torch.export, or runs on fake tensors."""
    if torch.compiler.is_compiling() or _get_dispatch_mode is None or _FAKE is None:
        return torch.compiler.is_compiling()
    return _get_dispatch_mode(_FAKE) is not None


TABLE.append(
    Internal(
        "source fx/experimental/symbolic_shapes.py:guard_or_true",
        "checks of shapes in traced code where a size has no value yet, as behind a boolean mask",
        "such a size cannot be compared, and torch raises",
    )
)
_assume = _take("torch._check", "what such a check found, for the code that is traced after it", "as above")


def equal_sizes(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Whether two shapes are equal. In traced code a size without a value is, from here on, what it is compared with.

    When the code runs, torch raises if it is not.
    """
    if not torch.compiler.is_compiling() or _assume is None:
        return tuple(sizes) == tuple(others)
    if len(sizes) != len(others):
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true  # which tracing has imported

    for size, other in zip(sizes, others, strict=True):
        if not guard_or_true(size == other):
            return False
    for size, other in zip(sizes, others, strict=True):
        if not guard_or_false(size == other):
            _assume(size == other)
    return True


_take(
    "torch.compiler._is_exporting_flag",
    "whether torch.export traces: before 2.12 torch.compiler.is_exporting() is true under torch.compile too",
    "torch.compiler.is_exporting()",
)


def is_exporting() -> bool:
    """Whether code is being traced by torch.export."""
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


graph_task: Callable[[], int] = _take(
    "torch._C._current_graph_task_id",
    "whether autograd runs a backward, -1 if not: a gradient that was traced into other code may run outside of one",
    "a traced gradient that runs with grad mode on is refused",
    lambda: 0,
)


_DOUBLE_BACKWARD, _ENGINE = "_double_backward", "_engine_run_backward"
TABLE.append(
    Internal(
        f"frame torch.autograd.graph:{_ENGINE}",
        "where the search for the next one ends",
        "it goes on to the callers of the backward, which takes longer",
    )
)
TABLE.append(
    Internal(
        f"frame torch._functorch._aot_autograd.runtime_wrappers:{_DOUBLE_BACKWARD}",
        "whether the gradient that compiled code computes is to be differentiated: it runs without grad mode then too",
        "torch's own exception comes instead, if the tensor is reached in which a derivative is asked for",
    )
)


def in_double_backward() -> bool:
    """Whether the running backward of compiled code was called with create_graph=True.

    torch then calls it within a Function, which switches grad mode off. Only the frames of the callers show it.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != _ENGINE:
        if frame.f_code.co_name == _DOUBLE_BACKWARD:
            return True
        frame = frame.f_back
    return False


# ---- products ----

onednn_linear: Callable[..., torch.Tensor] | None = _take(
    "torch.ops.mkldnn._linear_pointwise",
    "X W^T in float32 on AMD processors, where it is faster than torch.mm",
    "torch.mm",
)
product_of_halves: Callable[..., torch.Tensor] | None = _take(
    "torch.ops.aten.addmm.dtype_out",
    "a product of half types on CUDA whose result is float32",
    "the factors are converted to float32, a slice at a time",
)

# ---- torch's functions replaced (patch.py) ----

with contextlib.suppress(ImportError):
    import torch.utils._device  # torch imports it late

_function_modes = _take(
    "torch.overrides._get_current_function_mode_stack",
    "whether the only modes are those of torch.device and torch.set_default_device",
    "under a default device patched functions are torch's own",
)
_DeviceContext = _take("torch.utils._device.DeviceContext", "such a mode", "as above")


def only_default_device() -> bool:
    """Whether no TorchFunctionMode is active but for those that choose a device for new tensors."""
    if _function_modes is None or _DeviceContext is None:
        return False
    return all(type(mode) is _DeviceContext for mode in _function_modes())


DYNAMO = "torch._dynamo"
"""The module that lists torch's functions when it is imported. One that is replaced then is none of torch's to it."""
TABLE.append(
    Internal(
        "source _dynamo/trace_rules.py:get_tensor_method",
        "lists the methods of Tensor, as above, before they are replaced",
        "torch.compile may refuse Tensor.softmax under softmax_ext.patch()",
    )
)


def list_tensor_methods() -> None:
    """Has Dynamo, which is imported, list the methods of Tensor: it does so once."""
    rules = sys.modules.get(f"{DYNAMO}.trace_rules")
    getattr(rules, "get_tensor_method", lambda: None)()


# ---- formulas ----

softmax: Callable[..., torch.Tensor] = _take(
    "torch.ops.aten.softmax.int",
    "softmax in the formulas: softmax_ext.patch() would bring torch's own names back to this package",
    "torch.softmax, as it was when this package was imported",
    torch.softmax,
)
log_softmax: Callable[..., torch.Tensor] = _take(
    "torch.ops.aten.log_softmax.int", "log_softmax in the formulas, as above", "as above", torch.log_softmax
)

# ---- other ----

register_namedtuple: Callable[..., None] = _take(
    "torch.utils._pytree._register_namedtuple",
    "lets an exported program that returns statistics be saved",
    "it can't be saved",
    lambda *args, **kwargs: None,
)


# A weak symbol in csrc/ops/cpu/allocation.cpp, which works without it if it is null.
TABLE.append(
    Internal(
        "symbol torch_from_blob",
        "results of more than 32 MiB on the CPU lie in memory that is kept for the next",
        "each is allocated anew, which takes longer than computing it",
        since="2.11",
    )
)

# The kernels are compiled with at::vec's headers, which call these functions of libtorch_cpu on x86-64.
if platform.machine() == "x86_64":
    TABLE += [
        Internal(f"symbol Sleef_{name}_u10", "vectors of that function", "the CPU library does not load, and says so")
        for name in ("expd4", "expd8", "log1pd4", "log1pd8", "tanhd4", "tanhd8", "tanhf8", "tanhf16")
    ]
