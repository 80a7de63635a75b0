"""In place of torchvision, whose wheels on PyPI are CUDA builds that the CPU build of torch cannot load."""

from __future__ import annotations

from stub_modules import install

__version__ = "0.0.0+stub"


class _AnyName(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def _class_of(name: str) -> type:
    return _AnyName(name.rpartition(".")[2], (), {})


__getattr__ = install("torchvision", _class_of)
