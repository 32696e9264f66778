"""TorchScript compiles neither this package's functions nor its modules, and says so in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

_Scripted = TypeVar("_Scripted", bound=Callable[..., object])


def not_scriptable(instead: str) -> Callable[[_Scripted], _Scripted]:
    """Decorates a function or a module: torch.jit.script refuses it with a sentence that names what to use ``instead``.

    torch.jit.script calls ``__prepare_scriptable__`` of what it is to compile, and of everything inside. A torch that
    did not would raise an error of its own.
    """

    def decorate(function_or_module: _Scripted) -> _Scripted:
        def refuse(*_: object) -> NoReturn:
            raise NotImplementedError(
                f"softmax_ext.{function_or_module.__name__} can't be compiled by torch.jit.script: use {instead}, or "
                "torch.jit.trace."
            )

        setattr(function_or_module, "__prepare_scriptable__", refuse)  # noqa: B010
        return function_or_module

    return decorate
