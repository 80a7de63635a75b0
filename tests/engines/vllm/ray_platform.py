"""vLLM's CPU platform, which says that it is none for Ray: here each of its devices is one of Ray's "GPU"s, a
number that Ray counts and gives out. Named by an entry point that `test_ray.py` writes."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"


def name() -> str:
    return f"{__name__}.{RayCpuPlatform.__name__}"
