"""In place of sglang-kernel, of which there is no build for every CPU.

SGLang imports it; the models of the tests, with the attention backend torch_native, call nothing of it.
"""

from __future__ import annotations

from stub_modules import Missing, install

__version__ = "0.0.0+stub"
__getattr__ = install("sgl_kernel", Missing)
