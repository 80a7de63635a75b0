"""Our receive loop as one of vLLM's own weight-transfer backends.

    vllm serve MODEL --load-format dummy --weight-transfer-config '{"backend": "ckpt_engine"}'

Its routes then drive an update: /init_weight_transfer_engine, /start_weight_update, /update_weights with
`{"update_info": {"zmq_handles": [...]}}`, which is the update, and /finish_weight_update. The parameter
servers decide whether it commits. These methods raise nothing: with several workers, vLLM's executor would
lose the order of all later replies. So the routes say that the call was made, no more; how it ended is the
parameter servers' verdict, and each worker's `ckpt_engine_status` where the worker extension is there too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ckpt_engine.errors import ConfigError
from ckpt_engine_vllm.parts import speculates_with_weights
from ckpt_engine_vllm.worker_update import WorkerUpdate, refused, remember

logger = logging.getLogger(__name__)


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]  # vLLM has no types here
    """Nothing: the parameter servers tell all there is to know at each update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """As of `VllmColocateWorkerExtension.update_weights_from_ipc`."""

    zmq_handles: Mapping[str, str] | Sequence[Sequence[str]]
    partial: bool = False
    ignored: Sequence[str] = field(default_factory=tuple)
    time_limit: float | None = None


class CkptEngineWeightTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One worker's end."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def parse_init_info(self, init_dict: object) -> InitInfo:
        """What is asked for in vain is told as a failed update, in `ckpt_engine_status`: vLLM's own method
        raises."""
        if init_dict:
            error = ConfigError(f"init_info={init_dict!r}: this backend takes none, send {{}}")
            self._tell(remember(self._default_model, refused((), error)))
        return InitInfo()

    def init_transfer_engine(self, init_info: InitInfo) -> None: ...

    def start_weight_update(self) -> None: ...

    def finish_weight_update(self) -> None: ...

    def shutdown(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One whole update. vLLM's own method would synchronise an accelerator, which a CPU has not."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            handles = update_info.get("zmq_handles", ()) if isinstance(update_info, dict) else ()
            self._tell(remember(self._default_model, refused(handles, error)))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        update = WorkerUpdate(
            self._worker(),
            partial=update_info.partial,
            ignored=tuple(update_info.ignored),
            time_limit=update_info.time_limit,
        )
        self._tell(update.serve(update_info.zmq_handles))

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:  # noqa: ANN401 - vLLM's
        """The trainer's end, which vLLM up to 0.26 has here: parameter servers are ours."""
        raise ConfigError("trainers send weights by ckpt_engine.ParameterServer, not by vLLM's engine")

    def _tell(self, status: dict[str, Any]) -> None:
        if status["outcome"] != "committed":
            logger.error("ckpt-engine: the update failed: %s\n%s", status["error"], status["traceback"])

    def _worker(self) -> Any:  # noqa: ANN401
        """What an update needs of vLLM's worker, which a backend does not get to see."""
        from vllm.distributed import get_world_group

        group = get_world_group()
        return self._worker_of(group.rank, group.local_rank)

    def _worker_of(self, rank: int, local_rank: int) -> Any:  # noqa: ANN401
        return SimpleNamespace(
            rank=rank,
            local_rank=local_rank,
            device=self.device,
            vllm_config=self.vllm_config,
            get_model=lambda: self._default_model,
            model_runner=SimpleNamespace(get_draft_model=self._refuse_drafter),
        )

    def _refuse_drafter(self) -> None:
        """A backend is not shown the drafter's model, which must not be left behind in silence."""
        if speculates_with_weights(self.vllm_config.speculative_config):
            raise ConfigError(
                "the weight-transfer backend does not update drafters: use the worker extension instead"
            )
