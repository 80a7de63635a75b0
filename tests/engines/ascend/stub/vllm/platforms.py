"""Which device vLLM runs on."""

from __future__ import annotations


class _Npu:
    def is_cpu(self) -> bool:
        return False


current_platform = _Npu()
