"""vLLM's stateless group: where a communicator's members exchange its id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass
class StatelessProcessGroup:
    rank: int
    world_size: int
    store: dist.Store

    def broadcast_obj(self, obj: Any | None, src: int) -> Any:
        raise AssertionError("this one pickles")
