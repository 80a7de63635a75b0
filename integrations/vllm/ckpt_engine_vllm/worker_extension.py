"""What vLLM's workers gain by `--worker-extension-cls ckpt_engine_vllm.VllmColocateWorkerExtension`.

No exception leaves these methods. With several workers, vLLM's executor would raise the first worker's and
leave the other replies queued: every later call would get the answers of the call before, for good, while
/health stays 200.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_engine.errors import ConfigError, ErrorRecord
from ckpt_engine_vllm.device_identity import on_npu
from ckpt_engine_vllm.worker_update import WorkerUpdate, refused

Handles = Mapping[str, str] | Sequence[Sequence[str]]
"""`{device_uuid: handle}` or `[(device_uuid, handle), ...]` of all ranks."""


class VllmColocateWorkerExtension:
    """Mixed into vLLM's worker class. Its names must not be those of any worker's."""

    def update_weights_from_ipc(
        self,
        zmq_handles: Handles = (),
        partial: bool = False,
        ignored: Sequence[str] = (),
        *unexpected: object,
        time_limit: float | None = None,
        **unknown: object,
    ) -> dict[str, Any]:
        """Receives one update.

        Args:
            zmq_handles: `{device_uuid: handle}` or `[(device_uuid, handle), ...]` of all ranks.
            partial: modules that no tensor is sent for keep their weights; else a parameter that would not
                be filled fails the update.
            ignored: patterns (fnmatch) of tensors that are not for the engine's models.
            time_limit: seconds in which this call is to end: before vLLM's RPC, for which a reply would come
                too late.
            unexpected, unknown: refused. (Python itself would raise.)

        Returns:
            This worker's status (`ipc.receiver.serve_update`), with its `rank`, and with `kept_bytes`: what
            it had to copy because a layer was not complete with its bucket.
        """
        try:
            if unexpected or unknown:
                raise ConfigError(f"update_weights_from_ipc takes no arguments {[*unexpected, *unknown]}")
            if on_npu(self):
                from ckpt_engine_ascend.worker_extension import update_worker

                return update_worker(
                    self, zmq_handles, partial=partial, ignored=ignored, time_limit=time_limit
                )
            update = WorkerUpdate(self, partial=partial, ignored=tuple(ignored), time_limit=time_limit)
            return update.serve(zmq_handles)
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            return refused(zmq_handles, error) | {"rank": getattr(self, "rank", None)}

    def ckpt_engine_status(self, *_: object, **__: object) -> dict[str, Any]:
        """`rank`, `weights` (serving, updating, or incomplete: neither old nor new, and the `reason`), their
        `version` (None: what the engine began with), the `last` update's status, and `session_open`:
        /start_weight_update was called, and not yet /finish_weight_update."""
        try:
            if on_npu(self):
                from ckpt_engine_ascend.worker_extension import worker_status

                return worker_status(self)
            return WorkerUpdate.status_of(self)
        except Exception as error:  # noqa: BLE001 - see the module's docstring
            return {"weights": "unknown", "error": ErrorRecord.from_exception(error).describe()}
