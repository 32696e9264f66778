"""What is to be done when another module is imported, if it ever is: importing it for that takes too long."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds the module as Python does without it, and has its code run within a context; goes after that."""

    def __init__(self, name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
        self.name, self.context = name, context

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with self.context():
                    execute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def around_import(name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
    """Has the code of the module ``name``, which is not imported yet, run within ``context()`` when it is imported."""
    sys.meta_path.insert(0, _Finder(name, context))
