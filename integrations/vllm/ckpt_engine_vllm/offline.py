"""Updates of an engine that lives in this process: vLLM's `LLM` class.

    llm = LLM(MODEL, load_format="dummy", worker_extension_cls="ckpt_engine_vllm.VllmColocateWorkerExtension")
    with ParameterServer() as ps:
        ps.register_checkpoint("step-1", files=FILES)
        ps.gather_metas("step-1")
        ckpt_engine_vllm.update(llm, ps, "step-1")

There is a parameter server for each worker. With several workers the others are in processes of their own,
and call `ps.update("step-1", lambda paths: None)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_engine.errors import EngineRequestError

if TYPE_CHECKING:
    from ckpt_engine import ParameterServer
    from ckpt_engine.update.session import UpdateReport


def update(
    llm: Any,  # noqa: ANN401 - vLLM's LLM
    ps: ParameterServer,
    checkpoint_name: str,
    *,
    timeout: float = 600.0,
    partial: bool = False,
    ignored: Sequence[str] = (),
) -> UpdateReport:
    """Puts a gathered checkpoint into the workers of `llm`, all of them or none.

    Args:
        timeout: seconds for the whole update.
        partial, ignored: as of `VllmColocateWorkerExtension.update_weights_from_ipc`.

    Raises:
        UpdateError: it did not commit; the record has the worker's traceback.
        EngineRequestError: it did, but the prefix cache still holds what the old weights computed.
    """
    from ckpt_engine.server.engine_client import check_statuses, request_timeout, worker_time_limit

    seconds = request_timeout(timeout)
    options = {"partial": partial, "ignored": list(ignored), "time_limit": worker_time_limit(seconds)}

    def ask(socket_paths: Sequence[tuple[str, str]]) -> None:
        statuses = llm.collective_rpc(
            "update_weights_from_ipc",
            timeout=seconds,
            args=([list(pair) for pair in socket_paths],),
            kwargs=options,
        )
        check_statuses(statuses, socket_paths, "vLLM's LLM")

    report = ps.update(checkpoint_name, ask, timeout=timeout)
    if not llm.reset_prefix_cache():
        raise EngineRequestError(
            "the weights are in place, but vLLM could not reset its prefix cache: call "
            "llm.reset_prefix_cache() when no request is being answered"
        )
    return report
