"""What is to be done when another module is imported, if it ever is: importing it for that takes too long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds the module as Python does without it, and has its code run within a context; goes when it has run.

    Not when the module is found: whoever only asks whether it is there does that too.
    """

    def __init__(self, name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
        self.name, self.context = name, context
        self.searching = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or getattr(self.searching, "here", False):
            return None
        self.searching.here = True
        try:
            spec = find_spec(fullname)
        finally:
            self.searching.here = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with self.context():
                    execute(module)
                with suppress(ValueError):
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def around_import(name: str, context: Callable[[], AbstractContextManager[object]]) -> None:
    """Has the code of the module ``name``, which is not imported yet, run within ``context()`` when it is imported."""
    sys.meta_path.insert(0, _Finder(name, context))
