"""What the tests of vLLM on CUDA share: how its engines are started, and when two of them answer alike."""

from __future__ import annotations

import json
from typing import Any

from tests.engines.vllm.engines import Answers

# vLLM's default has Inductor write the kernels, runs pieces of a prompt and whole decodes in graphs. Without
# Inductor its own kernels run, prompts too in whole graphs.
WHOLE_GRAPHS: dict[str, Any] = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}}
SMALL = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**28}
"""Several engines share the device."""
SLOT_NBYTES = 100_000
"""So that an update of a tiny model takes several buckets."""
TOLERANCE = 0.02
"""Of log-probabilities: another order of the sums in a kernel, which tuning may choose, changes logits of
about 4 by a unit in bfloat16's last place, 2 ** -6. With code from vLLM's cache there should be none."""
APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "TEST_DEVICE": "cuda"}
"""As vLLM is by default: its worker in another process than the LLM class."""
DECODES = 30
"""Of the steps of an engine's answers, at least."""


def same(received: Answers, expected: Answers, tolerance: float = TOLERANCE) -> float:
    """Fails unless these are of the same weights; the largest difference of a log-probability."""
    assert received.digests == expected.digests
    difference = 0.0
    for (tokens, steps), (right_tokens, right_steps) in zip(
        received.generated, expected.generated, strict=True
    ):
        assert tokens == right_tokens
        for token, step, right_step in zip(tokens, steps, right_steps, strict=True):
            found, right = dict(step), dict(right_step)
            assert token in found.keys() & right.keys()
            difference = max(
                difference, *(abs(found[each] - right[each]) for each in found.keys() & right.keys())
            )
    assert difference < tolerance
    return difference


def tell(**what: Any) -> None:  # noqa: ANN401 - JSON
    print(json.dumps(what))  # noqa: T201 - a measurement
