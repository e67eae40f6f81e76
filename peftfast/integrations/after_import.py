"""Running a function once a module has been imported, without importing it for that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action` on the module `name`: now if it is imported already, else when it is."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module as Python does, and once, but so that the action follows its execution."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == self.name else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            if self in sys.meta_path:  # only now: many ask for a spec to know whether a library is installed
                sys.meta_path.remove(self)
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_then_act
        return spec
