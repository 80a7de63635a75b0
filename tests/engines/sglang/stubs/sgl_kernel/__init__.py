"""In place of sglang-kernel, of which there is no build for every CPU.

SGLang imports it; the models of the tests, with the attention backend torch_native, call nothing of it.
"""

from __future__ import annotations

from stub_modules import install

__version__ = "0.0.0+stub"


class _Missing:
    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *_: object, **__: object) -> object:
        raise NotImplementedError(f"a stub in place of {self.__name__} was called")

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")


__getattr__ = install("sgl_kernel", _Missing)
