"""Updates of a server whose ranks share a model's layers (pipeline parallel).

One of SGLang's pipeline stages does what a request asks, and only then sends it on to the next stage. An
update ends when all ranks have it: the first stage would wait for the others, which have heard of nothing. So
a stage with others behind it puts an update off until SGLang has sent the request on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ckpt_engine_sglang.versions import PIPELINE

PASS_ON = f"{PIPELINE}._pp_send_pyobj_to_next_stage"
"""The hook's target; what it sends is a list of requests, or of what else stages tell each other."""

_put_off: dict[int, Any] = {}
"""Requests by their `id`, which holds while they are in here. A process has one scheduler, on one thread."""
_sent: set[int] = set()
"""Of those that are under way for the second time."""


def put_off(scheduler: Any, request: Any) -> bool:  # noqa: ANN401 - SGLang's Scheduler and request
    """Whether the request must be sent on before it is served: `after_sending` brings it again."""
    if scheduler.pp_group.is_last_rank or id(request) in _sent:
        return False
    _put_off[id(request)] = request
    return True


def after_sending(_result: object, scheduler: Any, sent: Iterable[Any], *_: Any, **__: Any) -> None:  # noqa: ANN401
    """After SGLang sent something to the next stage: serves the updates that were among it."""
    for key in [id(each) for each in sent or ()]:
        request = _put_off.pop(key, None)
        if request is None:
            continue
        _sent.add(key)
        try:
            scheduler.process_input_requests([request])  # which answers as this version does
        finally:
            _sent.discard(key)
