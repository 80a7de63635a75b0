"""One update in one of vLLM's workers: what is asked before it, done in it, and remembered after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
import zmq

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.ipc.receiver import failed_status, refuse_update, serve_update
from ckpt_engine.loading.completeness import Rules, check_complete, check_names, check_shapes, parameters_in
from ckpt_engine.loading.loaded import LoadedModel, LoadedTensors
from ckpt_engine.loading.recording import Recording
from ckpt_engine.loading.rehearsal import named_parameters
from ckpt_engine.state import SERVING_INITIAL, WeightsState
from ckpt_engine_vllm import moe, quantisation
from ckpt_engine_vllm.device_identity import device_of
from ckpt_engine_vllm.layerwise import abandon_all
from ckpt_engine_vllm.parts import Part, parts_of, refuse_to_write_the_mains
from ckpt_engine_vllm.refusals import refuse_asleep, refuse_old_vllm, refuse_unsupported
from ckpt_engine_vllm.rehearsal import rehearse
from ckpt_engine_vllm.reload import Moved, Reload
from ckpt_engine_vllm.tying import Head, Tying, heads_of


class WorkerState:
    """What is known of a model between updates, whichever way they come."""

    def __init__(self) -> None:
        self.weights = WeightsState(SERVING_INITIAL)
        self.rehearsed: tuple[object, dict[str, Recording]] | None = None
        """The last update's tensors and rules, and what came of them: the next one's are mostly the same."""
        self.last: dict[str, Any] | None = None
        """The last update's status."""
        self.moved: str | None = None
        """What an earlier update moved, if it did."""


_STATES: WeakKeyDictionary[torch.nn.Module, WorkerState] = WeakKeyDictionary()


def refused(zmq_handles: Mapping[str, str] | Sequence[Sequence[str]], error: Exception) -> dict[str, Any]:
    """The status of a worker that cannot even begin; the parameter servers hear of it. Never raises."""
    with zmq.Context() as context:
        return refuse_update(context, zmq_handles, error)


def remember(model: torch.nn.Module, status: dict[str, Any]) -> dict[str, Any]:
    """Keeps the status of an update that did not begin as the model's last one, and returns it."""
    _STATES.setdefault(model, WorkerState()).last = status
    return status


class WorkerUpdate:
    """Args: `worker`: vLLM's worker, of any executor."""

    def __init__(
        self,
        worker: Any,  # noqa: ANN401
        *,
        partial: bool,
        ignored: tuple[str, ...],
        time_limit: float | None = None,
    ) -> None:
        self._worker = worker
        self._partial = partial
        self._ignored = ignored
        self._time_limit = time_limit
        self._state = _state_of(worker)
        self._parts: list[tuple[Part, Reload]] = []
        self._begun = False

    @staticmethod
    def status_of(worker: Any) -> dict[str, Any]:  # noqa: ANN401
        state = _state_of(worker)
        return {
            "rank": worker.rank,
            "weights": state.weights.now.state,
            "version": state.weights.now.version,
            "reason": state.weights.now.reason,
            "last": state.last,
            # vLLM's own, between /start_weight_update and /finish_weight_update.
            "session_open": bool(getattr(worker, "_weight_update_active", False)),
        }

    def serve(self, zmq_handles: Mapping[str, str] | Sequence[Sequence[str]]) -> dict[str, Any]:
        """Receives the update; never raises."""
        try:
            with zmq.Context() as context:
                status = self._serve(context, zmq_handles)
        except Exception as error:  # noqa: BLE001 - see the docstring
            status = failed_status(error, "", None)
            if self._begun:
                self._state.weights.fail(status["error"], touched=True)
        status["rank"] = getattr(self._worker, "rank", None)
        self._state.last = status
        return status

    def _serve(
        self, context: zmq.Context[Any], zmq_handles: Mapping[str, str] | Sequence[Sequence[str]]
    ) -> dict[str, Any]:
        try:
            from vllm.config import set_current_vllm_config

            device_uuid, device_id = self._device()
        except Exception as error:  # noqa: BLE001 - the parameter servers must hear of it
            return refuse_update(context, zmq_handles, error)
        with ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(self._worker.vllm_config))
            if device_id is not None:
                # An executor in the engine's own process may call us in another thread than its own.
                stack.enter_context(self._on_device(device_id))
            status = serve_update(
                context,
                zmq_handles,
                device_uuid,
                device_id,
                prepare=self._prepare,
                run=self._run,
                post_hook=self._finish,
                loaded=LoadedTensors(self._loaded_models),
                time_limit=self._time_limit,
            )
            self._remember(status)
        return status

    # What is another device's, an adapter for it says.

    def _device(self) -> tuple[str, int | None]:
        return device_of(self._worker)

    def _on_device(self, index: int) -> AbstractContextManager[object]:
        return torch.cuda.device(index)

    def _refuse(self, parts: Sequence[Part]) -> None:
        """Raises ConfigError for engines that cannot be updated in place."""
        refuse_old_vllm()

    def _rehearse(self, part: Part, tensors: Sequence[TensorLayout]) -> Recording:
        return rehearse(part.model, part.layouts(tensors))

    def _reload(self, part: Part, recording: Recording) -> Reload:
        return Reload(part.model, part.config, recording, partial=self._partial)

    def _prepare(self, tensors: Sequence[TensorLayout]) -> None:
        """Everything that can be known to fail, while nothing is touched."""
        config = self._worker.vllm_config
        parts = parts_of(self._worker)
        self._refuse(parts)
        refuse_unsupported(config)
        refuse_asleep()
        if self._state.moved is not None:
            raise ConfigError(f"an earlier update failed for good: {self._state.moved}")
        if self._partial and not self._state.weights.complete:
            raise ConfigError("the weights are incomplete since an update failed: send a full update first")
        model_config = config.model_config
        layers = getattr(model_config.hf_text_config, "num_hidden_layers", sys.maxsize)
        rules = Rules(
            partial=self._partial,
            ignored=self._ignored,
            parallel_size=config.parallel_config.tensor_parallel_size,
            shares=config.parallel_config.pipeline_parallel_size > 1
            or config.parallel_config.enable_expert_parallel,
            drafter_layers=range(layers, sys.maxsize),
            passed_over=quantisation.PASSED_OVER if "gptq" in (model_config.quantization or "") else None,
        )
        tensors = [tensor for tensor in tensors if not rules.ignores(tensor.name)]
        for part in parts:
            moe.refuse_unknown_packing(part.model)
            quantisation.refuse_unproven(part.model, part.config.quantization)
        heads = heads_of(parts)
        key = (rules, tuple(tensors))
        if self._state.rehearsed is None or self._state.rehearsed[0] != key:
            self._state.rehearsed = (key, _rehearse_all(parts, tensors, rules, heads, self._rehearse))
        recordings = self._state.rehearsed[1]
        for part in parts:
            quantisation.refuse_baked_scales(part.model, config, recordings[part.name].modules)
        self._parts = [(part, self._reload(part, recordings[part.name])) for part in parts]
        for part, reload in self._parts:
            if part.name in heads:
                reload.tying = Tying(heads[part.name], recordings[part.name], config)

    def _run(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        if not self._begun:
            # From here to the commit the weights are neither the old ones nor the new ones.
            self._state.weights.begin()
            self._begun = True
            for _, reload in self._parts:
                reload.begin()
        for part, reload in self._parts:
            reload.load(part.tensors(tensors))

    def _finish(self) -> None:
        try:
            for _, reload in self._parts:
                reload.finish()
        except Moved as error:
            self._state.moved = str(error)
            raise

    def _loaded_models(self) -> list[LoadedModel]:
        assert self._state.rehearsed is not None
        recordings = self._state.rehearsed[1]
        return [(part.model, recordings[part.name], part.own_name) for part, _ in self._parts]

    def _remember(self, status: dict[str, Any]) -> None:
        """Ends the reload, and keeps how it ended. Adds to the status what is this engine's."""
        status["kept_bytes"] = sum(reload.kept_nbytes for _, reload in self._parts)
        status["models"] = {part.name: reload.tensor_count for part, reload in self._parts}
        if status["outcome"] == "committed":
            self._state.weights.commit(status["version"])
            return
        self._state.weights.fail(status["error"], touched=status["touched"])
        abandon_all([reload for _, reload in self._parts], status)


def _rehearse_all(
    parts: Sequence[Part],
    tensors: Sequence[TensorLayout],
    rules: Rules,
    heads: Mapping[str, Head],
    rehearse_one: Callable[[Part, Sequence[TensorLayout]], Recording],
) -> dict[str, Recording]:
    """What each model would do. Raises WeightsMismatch unless together they take all, and get all."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    recordings = {part.name: rehearse_one(part, tensors) for part in parts}
    taken = {name: recording.taken for name, recording in recordings.items()}
    read = {
        tensor.name for part in parts for tensor in tensors if part.own_name(tensor.name) in taken[part.name]
    }
    check_names(tensors, read, rules)
    filled: set[int] = set()
    for part in parts:
        recording = recordings[part.name]
        refuse_to_write_the_mains(part, parts[0], recording)
        padded = parameters_in(part.model, VocabParallelEmbedding)
        check_shapes(part.layouts(tensors), recording, padded, rules)
        if part.name == "model" or taken[part.name]:
            packed = getattr(part.model, "packed_modules_mapping", {})
            optional = _filled_elsewhere(part.model, recording, filled)
            optional |= quantisation.cache_scales(part.model, recording.parameters)
            if part.name in heads:
                optional |= heads[part.name].check(recording, rules)
            check_complete(recording, rules, optional, packed)
        parameters = part.model.named_parameters(remove_duplicate=False)
        filled |= {id(parameter) for name, parameter in parameters if name in recording.parameters}
    return recordings


def _filled_elsewhere(model: torch.nn.Module, recording: Recording, filled: set[int]) -> set[str]:
    """Names of parameters that are filled under another name, or (`filled`: their ids) by another model."""
    parameters = named_parameters(model)
    here = {
        id(parameters[name])
        for name, written in recording.parameters.items()
        if written.complete and name in parameters
    }
    return {name for name, parameter in parameters.items() if id(parameter) in here | filled}


def _state_of(worker: Any) -> WorkerState:  # noqa: ANN401
    return _STATES.setdefault(worker.get_model(), WorkerState())
