"""What vllm-ascend's workers gain by `--worker-extension-cls ckpt_engine_ascend.NpuColocateWorkerExtension`.

No exception leaves these methods: with several workers, vLLM's executor would raise the first worker's and
leave the other replies queued, so that every later call gets the answers of the call before.

`update_worker` is all of it, for extensions that serve other devices too: on an NPU they call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zmq
from ckpt_engine_vllm.layerwise import abandon_all

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.ipc.receiver import failed_status, refuse_update, serve_update
from ckpt_engine_ascend.identity import device_uuid
from ckpt_engine_ascend.refusals import refuse_unsupported
from ckpt_engine_ascend.reload import Reload, models_of

_STATE = "_ckpt_engine_npu_state"

Handles = Mapping[str, str] | Sequence[Sequence[str]]
"""`{device_uuid: handle}` or `[(device_uuid, handle), ...]` of all ranks."""


class NpuColocateWorkerExtension:
    """Mixed into NPUWorker. Its names must not be those of any worker's."""

    def update_weights_from_ipc(self, zmq_handles: Handles) -> dict[str, Any]:
        """Receives one update; the worker's status (`ipc.receiver.serve_update`), with its `rank`."""
        return update_worker(self, zmq_handles)

    def ckpt_engine_status(self) -> dict[str, Any]:
        """`rank`, `weights` (initial, committed, or incomplete: neither old nor new) and `version`."""
        return worker_status(self)


def worker_status(worker: Any) -> dict[str, Any]:  # noqa: ANN401 - vllm-ascend's NPUWorker
    """What the worker holds, as the last update left it; never raises."""
    weights, version = getattr(worker, _STATE, ("initial", None))
    return {"rank": getattr(worker, "rank", None), "weights": weights, "version": version}


def update_worker(worker: Any, zmq_handles: Handles) -> dict[str, Any]:  # noqa: ANN401
    """Receives one update into the models of an NPUWorker; never raises."""
    try:
        with zmq.Context() as context:
            status = _Update(worker).serve(context, zmq_handles)
    except Exception as error:  # noqa: BLE001 - see the module's docstring
        status = failed_status(error, "", None)
    return status | {"rank": getattr(worker, "rank", None)}


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


class _Update:
    def __init__(self, worker: Any) -> None:  # noqa: ANN401
        self._worker = worker
        self._reloads: list[Reload] = []
        self._begun = False

    def serve(self, context: zmq.Context[Any], zmq_handles: Handles) -> dict[str, Any]:
        worker = self._worker
        try:
            from vllm.config import set_current_vllm_config

            index = device_index(worker)
            uuid = device_uuid(index)
        except Exception as error:  # noqa: BLE001 - the parameter servers must hear of it
            return refuse_update(context, zmq_handles, error, "unknown")
        with set_current_vllm_config(worker.vllm_config):
            status = serve_update(
                context,
                zmq_handles,
                uuid,
                index,
                prepare=self._prepare,
                run=self._run,
                post_hook=self._finish,
            )
            self._remember(status)
        return status

    def _prepare(self, tensors: Sequence[TensorLayout]) -> None:
        """Everything that can be known to fail, while nothing is touched."""
        models = models_of(self._worker)
        for model, _ in models:
            refuse_unsupported(model, self._worker.vllm_config)
        device = torch.device("npu", device_index(self._worker))
        self._reloads = [Reload(model, config, device) for model, config in models]

    def _run(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        if not self._begun:
            self._begun = True
            setattr(self._worker, _STATE, ("incomplete", None))
            for reload in self._reloads:
                reload.begin()
        for reload in self._reloads:
            reload.load(tensors)

    def _finish(self) -> None:
        for reload in self._reloads:
            reload.finish()

    def _remember(self, status: dict[str, Any]) -> None:
        if status["outcome"] == "committed":
            setattr(self._worker, _STATE, ("committed", status["version"]))
            return
        abandon_all(self._reloads, status)
