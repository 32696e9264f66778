"""An instance's class replaced by a subclass of it, so that one instance behaves otherwise and can be restored.

In contrast to a function stored on the instance, it survives deepcopy, pickle and the replicas of nn.DataParallel.
"""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _subclass(mixin: type, original: type) -> type:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), {**names, "_mixin": mixin, "_original": original})


def _empty(mixin: type, original: type) -> Any:
    return object.__new__(_subclass(mixin, original))


class Replaced:
    """The base of every mixin: pickles the original class, since the subclass is made at run time."""

    _mixin: type
    _original: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of the original class, of which ``type(instance)`` is to be another name."""
        return cls._original(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (self._mixin, self._original), self.__dict__


def original_class(instance: object) -> type:
    """The class of an instance, before it was replaced."""
    return instance._original if isinstance(instance, Replaced) else type(instance)


def replace(instance: Any, mixin: type) -> None:
    """Puts ``mixin``, a subclass of Replaced, in front of the instance's class. Twice is the same as once."""
    if not isinstance(instance, mixin):
        instance.__class__ = _subclass(mixin, original_class(instance))


def restore(instance: Any) -> None:
    """Gives the instance its class back."""
    if isinstance(instance, Replaced):
        instance.__class__ = instance._original
