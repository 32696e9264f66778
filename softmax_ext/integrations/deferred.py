"""Logits that are not computed before somebody needs them.

A model's own forward calls its output layer, scales or caps the logits, and gives them to the loss. Here the output
layer returns a DeferredLogits instead. It records what the model does to it. The loss then takes the hidden states, the
layer and what was recorded, and makes the logits never or a chunk at a time. Whatever else the model does with them
makes them at once, so that the result is the model's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..replaced_class import original_class


class Transform(NamedTuple):
    """What the model does to its logits x: ``scale * x``, or with a cap ``softcap * tanh(scale * x / softcap)``."""

    scale: float
    softcap: float | None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class DeferredLogits:
    """The output of ``layer`` for ``hidden``, changed by ``steps``, not computed yet.

    Args:
        hidden: [..., in_features].
        layer: the output layer.
        compute: computes the layer's output.
        steps: functions of the logits, in their order.
        transform: what the steps amount to but for rounding.

    Attributes:
        made: the logits, once somebody has needed them. They stand for this object from then on.
        losses: those that were computed of it, or of what its steps led from or to.
    """

    def __init__(
        self,
        hidden: Tensor,
        layer: nn.Module,
        compute: Callable[[Tensor], Tensor],
        steps: tuple[Callable[[Any], Any], ...] = (),
        transform: Transform = Transform(1.0, None),  # noqa: B008  it is immutable
        losses: list[Tensor] | None = None,
    ) -> None:
        self.hidden, self.layer, self.transform = hidden, layer, transform
        self.made: Tensor | None = None
        self.losses: list[Tensor] = [] if losses is None else losses
        self._compute, self._steps = compute, steps

    def _then(self, step: Callable[[Any], Any], transform: Transform) -> Any:
        if self.made is not None:
            return step(self.made)
        steps = (*self._steps, step)
        return DeferredLogits(self.hidden, self.layer, self._compute, steps, transform, self.losses)

    def _times(self, factor: float, step: Callable[[Any], Any]) -> Any:
        scale, softcap = self.transform
        if softcap is None:
            return self._then(step, Transform(scale * factor, None))
        if factor <= 0:
            return step(self.materialize("a product"))
        return self._then(step, Transform(scale * factor, softcap * factor))

    def materialize(self, why: str) -> Tensor:
        """Computes the logits as the model does; ``why`` names what needs them, for a warning."""
        if self.made is None:
            name = original_class(self.layer).__name__
            warnings.warn(
                f"softmax_ext: the model uses its logits between the output layer ({name}) and the loss, in {why}. So "
                "they are all computed, and linear=True saves no memory here.",
                stacklevel=3,
            )
            self.made = self._compute(self.hidden)
            for step in self._steps:
                self.made = step(self.made)
        return self.made

    # ---- what is recorded ----

    def __mul__(self, other: Any) -> Any:
        if not _is_number(other):
            return self.materialize("mul") * other
        return self._times(float(other), lambda logits: logits * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not _is_number(other) or other == 0:
            return self.materialize("div") / other
        return self._times(1 / other, lambda logits: logits / other)

    def tanh(self) -> Any:
        """The beginning of a cap; a second one is computed."""
        scale, softcap = self.transform
        if softcap is not None:
            return self.materialize("tanh").tanh()
        return self._then(torch.tanh, Transform(scale, 1.0))

    def float(self) -> Any:
        """Recorded: the loss is computed in float32 anyway."""
        return self._then(lambda logits: logits.float(), self.transform)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Recorded, like ``float``: the loss takes the hidden states where they are."""
        return self._then(lambda logits: logits.to(*args, **kwargs), self.transform)

    def contiguous(self) -> Any:
        """Logits that do not exist have no layout."""
        return self._then(lambda logits: logits.contiguous(), self.transform)

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states."""
        return self.hidden.dtype

    # ---- what needs the logits: everything else ----

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch.tanh is recorded; every other function gets the logits."""
        kwargs = kwargs or {}
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        why = getattr(func, "__name__", "a function")
        return func(*_made(args, why), **_made(kwargs, why))

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(name), name)

    __hash__ = object.__hash__


def _made(value: Any, why: str) -> Any:
    """The arguments of a function with the logits that are among them, in lists, tuples and dicts too."""
    if isinstance(value, DeferredLogits):
        return value.materialize(why)
    if type(value) in (list, tuple):
        return type(value)(_made(one, why) for one in value)
    if type(value) is dict:
        return {key: _made(one, why) for key, one in value.items()}
    return value


def _operator(name: str) -> Callable[..., Any]:
    def of_the_logits(self: DeferredLogits, *others: Any) -> Any:
        return getattr(self.materialize(name), f"__{name}__")(*_made(others, name))

    return of_the_logits


# Python looks these up in the class.
for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "neg", "pow", "rpow", "matmul", "rmatmul"),
    *("mod", "rmod", "floordiv", "rfloordiv", "abs", "eq", "ne", "lt", "le", "gt", "ge", "invert"),
    *("and", "or", "xor", "getitem", "setitem", "len", "iter", "bool", "float", "int", "contains", "array"),
):
    setattr(DeferredLogits, f"__{_name}__", _operator(_name))
