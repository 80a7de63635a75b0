"""What vllm-ascend's workers gain by `--worker-extension-cls ckpt_engine_ascend.NpuColocateWorkerExtension`.

No exception leaves these methods: with several workers, vLLM's executor would raise the first worker's and
leave the other replies queued, so that every later call gets the answers of the call before.

An update is that of vLLM's other devices (`ckpt_engine_vllm.worker_update`), with its checks before a byte
moves; what an NPU has of its own is in this package. `ckpt_engine_vllm`'s extension comes here on an NPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from ckpt_engine_vllm.parts import Part
from ckpt_engine_vllm.rehearsal import rehearse
from ckpt_engine_vllm.reload import Reload
from ckpt_engine_vllm.worker_update import WorkerUpdate, refused

from ckpt_engine.devices.npu import load as load_npu
from ckpt_engine.errors import ConfigError, ErrorRecord
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import buckets_of
from ckpt_engine.loading.rehearsal import rehearse as rehearse_in_place
from ckpt_engine_ascend import reload
from ckpt_engine_ascend.identity import device_uuid
from ckpt_engine_ascend.refusals import refuse_asleep, refuse_unsupported

Handles = Mapping[str, str] | Sequence[Sequence[str]]
"""`{device_uuid: handle}` or `[(device_uuid, handle), ...]` of all ranks."""


class NpuColocateWorkerExtension:
    """Mixed into NPUWorker. Its names must not be those of any worker's, its signatures those of
    `ckpt_engine_vllm.VllmColocateWorkerExtension`."""

    def update_weights_from_ipc(
        self,
        zmq_handles: Handles = (),
        partial: bool = False,
        ignored: Sequence[str] = (),
        *unexpected: object,
        time_limit: float | None = None,
        **unknown: object,
    ) -> dict[str, Any]:
        """Receives one update; arguments and status are those of the extension for vLLM's other devices."""
        if unexpected or unknown:
            error = ConfigError(f"update_weights_from_ipc takes no arguments {[*unexpected, *unknown]}")
            return _refused(self, zmq_handles, error)
        return update_worker(self, zmq_handles, partial=partial, ignored=ignored, time_limit=time_limit)

    def ckpt_engine_status(self, *_: object, **__: object) -> dict[str, Any]:
        """`rank`, `weights` (serving, updating, or incomplete: neither old nor new, and the `reason`), their
        `version` (None: what the engine began with), and `last`: the status of the last update."""
        return worker_status(self)


def worker_status(worker: Any) -> dict[str, Any]:  # noqa: ANN401 - vllm-ascend's NPUWorker
    """What the worker holds, as the last update left it; never raises."""
    try:
        return WorkerUpdate.status_of(worker)
    except Exception as error:  # noqa: BLE001 - see the module's docstring
        return {"weights": "unknown", "error": ErrorRecord.from_exception(error).describe()}


def update_worker(
    worker: Any,  # noqa: ANN401
    zmq_handles: Handles,
    *,
    partial: bool = False,
    ignored: Sequence[str] = (),
    time_limit: float | None = None,
) -> dict[str, Any]:
    """Receives one update into the models of an NPUWorker; never raises."""
    try:
        update = NpuWorkerUpdate(worker, partial=partial, ignored=tuple(ignored), time_limit=time_limit)
        return update.serve(zmq_handles)
    except Exception as error:  # noqa: BLE001 - see the module's docstring
        return _refused(worker, zmq_handles, error)


def _refused(worker: Any, zmq_handles: Handles, error: Exception) -> dict[str, Any]:  # noqa: ANN401
    return refused(zmq_handles, error) | {"rank": getattr(worker, "rank", None)}


def device_index(worker: Any) -> int:  # noqa: ANN401
    """torch's index of the worker's NPU.

    vllm-ascend up to 0.11 leaves `device` None; there it is the local rank. Later ones change their local
    rank, but tell the device.

    Raises:
        ConfigError: neither is known, or it is no NPU.
    """
    device = getattr(worker, "device", None)
    if device is not None and device.type != "npu":
        raise ConfigError(f"this worker runs on {device}: use ckpt_engine_vllm.VllmColocateWorkerExtension")
    index = device.index if device is not None else None
    index = getattr(worker, "local_rank", None) if index is None else index
    if index is None:
        raise ConfigError("the worker knows neither its device nor its local rank: is it initialised?")
    return int(index)


class NpuWorkerUpdate(WorkerUpdate):
    """One update in one NPUWorker."""

    def _device(self) -> tuple[str, int | None]:
        index = device_index(self._worker)
        return device_uuid(index), index

    def _on_device(self, index: int) -> AbstractContextManager[object]:
        return cast(AbstractContextManager[object], load_npu().device(index))

    def _refuse(self, parts: Sequence[Part]) -> None:
        refuse_asleep(self._worker)
        for part in parts:
            refuse_unsupported(part.model, self._worker.vllm_config)

    def _rehearse(self, part: Part, tensors: Sequence[TensorLayout]) -> Recording:
        if reload.has_layerwise_reload():
            return rehearse(part.model, part.layouts(tensors))
        return rehearse_in_place(part.model, buckets_of(part.layouts(tensors)))

    def _reload(self, part: Part, recording: Recording) -> Reload:
        kind = reload.LayerwiseReload if reload.has_layerwise_reload() else reload.PlainReload
        device = torch.device("npu", device_index(self._worker))
        return kind(part.model, part.config, recording, device, partial=self._partial)
