"""Logits that are not computed before somebody needs them.

A model's own forward calls its output layer, scales or caps the logits, and gives them to the loss. Here the output
layer returns a DeferredLogits instead. It records what the model does to it. The loss then takes the hidden states, the
layer and what was recorded, and makes the logits never or a chunk at a time. Whatever else the model does with them
makes them at once, so that the result is the model's own.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


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
    """

    def __init__(
        self,
        hidden: Tensor,
        layer: nn.Module,
        compute: Callable[[Tensor], Tensor],
        steps: tuple[Callable[[Any], Any], ...] = (),
        transform: Transform = Transform(1.0, None),  # noqa: B008  it is immutable
    ) -> None:
        self.hidden, self.layer, self.transform = hidden, layer, transform
        self._compute, self._steps = compute, steps

    def _then(self, step: Callable[[Any], Any], transform: Transform) -> DeferredLogits:
        return DeferredLogits(self.hidden, self.layer, self._compute, (*self._steps, step), transform)

    def _times(self, factor: float, step: Callable[[Any], Any]) -> DeferredLogits:
        scale, softcap = self.transform
        if softcap is None:
            return self._then(step, Transform(scale * factor, None))
        return self._then(step, Transform(scale * factor, softcap * factor))

    def materialize(self, why: str) -> Tensor:
        """Computes the logits as the model does; ``why`` names what needs them, for a warning."""
        name = type(self.layer).__name__
        warnings.warn(
            f"softmax_ext: the model uses its logits between the output layer ({name}) and the loss, in {why}. So they "
            "are all computed, and linear=True saves no memory here.",
            stacklevel=3,
        )
        logits = self._compute(self.hidden)
        for step in self._steps:
            logits = step(logits)
        return logits

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

    def float(self) -> DeferredLogits:
        """Recorded: the loss is computed in float32 anyway."""
        return self._then(lambda logits: logits.float(), self.transform)

    def to(self, *args: Any, **kwargs: Any) -> DeferredLogits:
        """Recorded, like ``float``: the loss takes the hidden states where they are."""
        return self._then(lambda logits: logits.to(*args, **kwargs), self.transform)

    def contiguous(self) -> DeferredLogits:
        """Logits that do not exist have no layout."""
        return self

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states."""
        return self.hidden.dtype

    # ---- what needs the logits ----

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch.tanh is recorded; every other function gets the logits."""
        kwargs = kwargs or {}
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        why = getattr(func, "__name__", "a function")

        def made(value: Any) -> Any:
            return value.materialize(why) if isinstance(value, DeferredLogits) else value

        return func(*map(made, args), **{name: made(value) for name, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(name), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize("indexing")[index]

    def __add__(self, other: Any) -> Any:
        return operator.add(self.materialize("add"), other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return operator.sub(self.materialize("sub"), other)

    def __rsub__(self, other: Any) -> Any:
        return operator.sub(other, self.materialize("sub"))

    def __neg__(self) -> Any:
        return operator.neg(self.materialize("neg"))
