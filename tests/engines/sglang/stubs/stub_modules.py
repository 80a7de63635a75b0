"""Packages that can be imported, and whose every name is something made up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Finder(MetaPathFinder, Loader):
    """Finds every submodule of `package`; `make` makes the value of a dotted name in it."""

    def __init__(self, package: str, make: Callable[[str], object]) -> None:
        self._package = package
        self._make = make

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self._package}."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = []
        vars(module)["__getattr__"] = names_of(spec.name, self._make)
        return module

    def exec_module(self, module: ModuleType) -> None: ...


def names_of(module: str, make: Callable[[str], object]) -> Callable[[str], object]:
    """A module's `__getattr__`."""

    def get(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return make(f"{module}.{name}")

    return get


def install(package: str, make: Callable[[str], object]) -> Callable[[str], object]:
    """Makes `package`'s submodules importable; returns the `__getattr__` of the package itself."""
    sys.meta_path.append(_Finder(package, make))
    return names_of(package, make)


class Missing:
    """What stands for something that is imported, and must not be called."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *_: object, **__: object) -> object:
        raise NotImplementedError(f"a stub in place of {self.__name__} was called")

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")
