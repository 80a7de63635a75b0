"""In place of flashinfer, which SGLang imports on CUDA.

The tests choose attention and sampling backends that call nothing of it.
"""

from __future__ import annotations

from stub_modules import Missing, install

__version__ = "0.0.0+stub"
__getattr__ = install("flashinfer", Missing)
