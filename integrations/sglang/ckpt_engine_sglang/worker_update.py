"""One update in one of SGLang's schedulers: what is asked before it, done in it, remembered after it.

Each tensor parallel rank has its scheduler process, and all of them get the request. They agree through the
parameter servers' verdict alone: a collective of the engine would wait for ever for a rank that is gone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zmq

from ckpt_engine.errors import ConfigError
from ckpt_engine.ipc.messages import TensorLayout
from ckpt_engine.ipc.receiver import refuse_update, serve_update
from ckpt_engine.loading.completeness import Rules, check_names, check_shapes
from ckpt_engine.loading.loaded import LoadedModel, LoadedTensors
from ckpt_engine.loading.recording import Recording
from ckpt_engine_sglang import versions
from ckpt_engine_sglang.device_identity import device_of
from ckpt_engine_sglang.leniency import passed_over
from ckpt_engine_sglang.models import Model, NamedTensors
from ckpt_engine_sglang.options import parse_options, split_options

logger = logging.getLogger(__name__)

INCOMPLETE = "incomplete"
"""The weight version while an update that failed may have left some new weights among the old ones."""
INCOMPLETE_NOTE = f"The weights may be {INCOMPLETE}: neither the old nor the new, until an update succeeds."


class WorkerUpdate:
    """Args: `manager`: SGLang's SchedulerWeightUpdaterManager."""

    def __init__(self, manager: Any, request: Any) -> None:  # noqa: ANN401 - UpdateWeightsFromIPCReqInput
        self._manager = manager
        self._request = request
        given = {uuid: split_options(handle) for uuid, handle in dict(request.zmq_handles).items()}
        self._handles = {uuid: handle for uuid, (handle, _) in given.items()}
        self._options = next((options for _, options in given.values() if options), "")
        self._rules = Rules()
        self._models: list[Model] = []
        self._company: dict[str, frozenset[str]] = {}
        self._held: dict[str, torch.Tensor] = {}
        self._refused = False

    def serve(self) -> tuple[bool, str]:
        """Receives the update; SGLang's `(success, message)`. Never raises."""
        with zmq.Context() as context:
            status = self._receive(context)
        committed = status["outcome"] == "committed"
        message = (
            f"{status['tensors']} tensors ({status['bytes']} bytes) are in place on all ranks, as version "
            f"{status['version']} of the parameter servers.{_verified(status)}"
            if committed
            else f"{status['error']}"
        )
        if not committed:
            for model in self._models:
                _log_failure(f"after the failed update, {model.role} model", model.give_up)
            if self._may_be_incomplete(status):
                message = f"{message} {INCOMPLETE_NOTE}"
            logger.error("update failed: %s\n%s", message, status["traceback"] or "")
        return committed, self._settle(committed, message)

    def _receive(self, context: zmq.Context[Any]) -> Mapping[str, Any]:
        try:
            runners = versions.model_runners(self._manager)
            device_uuid, device_id = device_of(runners[0][1])
            target = Model(*runners[0])
            drafts = [Model(role, runner) for role, runner in runners[1:]]
            self._models = [target, *(draft for draft in drafts if draft.path == target.path)]
            for draft in drafts:
                if draft.path != target.path:
                    logger.info(
                        "the %s model has a checkpoint of its own, %s: left as it is", draft.role, draft.path
                    )
        except Exception as error:  # noqa: BLE001 - the parameter servers must hear of it
            self._refused = True
            return refuse_update(context, self._handles, error)
        return serve_update(
            context,
            self._handles,
            device_uuid,
            device_id,
            prepare=self._prepare,
            run=self._run,
            post_hook=self._finish,
            loaded=LoadedTensors(self._loaded_models),
        )

    # The receiver's calls

    def _prepare(self, tensors: Sequence[TensorLayout]) -> None:
        """Everything that can be known to fail, while nothing is touched."""
        self._refused = True
        self._rules = self._make_rules()
        problem = versions.state_problem(self._manager)
        if problem is not None:
            raise ConfigError(problem)
        self._refuse_busy()
        for model in self._models:
            model.refuse_unsupported()
            model.rehearse(tensors)
        known = [model.recording for model in self._models if model.recording is not None]
        if len(known) == len(self._models):
            self._check_names(tensors, known)
        for model in self._models:
            if model.recording is not None:
                check_shapes(tensors, model.recording, model.padded_parameters(), self._rules)
                model.check_complete(self._rules)
                for names in model.recording.together:
                    self._keep_together(names)
        self._layouts = tensors
        self._refused = False

    def _run(self, tensors: NamedTensors) -> None:
        loadable: NamedTensors = []
        for name, tensor in tensors:
            company = self._company.get(name)
            if company is None:
                loadable.append((name, tensor))
                continue
            self._held[name] = tensor
            if company <= self._held.keys():
                loadable += [(each, self._held.pop(each)) for each in sorted(company)]
        for model in self._models:
            model.load(loadable)
        # The ring's bytes are this bucket's only until it is given back.
        arrived = {name for name, _ in tensors}
        self._held = {name: t.clone() if name in arrived else t for name, t in self._held.items()}

    def _finish(self) -> None:
        for model in self._models:
            model.finish(self._rules)
        self._check_names(self._layouts, [model.recording for model in self._models if model.recording])

    def _loaded_models(self) -> list[LoadedModel]:
        return [model.loaded() for model in self._models if model.recording is not None]

    # Before

    def _make_rules(self) -> Rules:
        partial, ignored = parse_options(self._options)
        parallel = versions.parallel()
        config = self._manager.tp_worker.model_runner.model_config
        text = getattr(config, "hf_text_config", config.hf_config)
        layers = getattr(text, "num_hidden_layers", 0)
        shares = parallel.pp > 1 or parallel.ep > 1
        return Rules(
            partial=partial,
            ignored=ignored,
            parallel_size=parallel.tp,
            shares=shares,
            layer_count=layers or None,
            drafter_layers=range(layers, layers + (getattr(text, "num_nextn_predict_layers", 0) or 0)),
            passed_over=passed_over(tied=bool(getattr(text, "tie_word_embeddings", False)), shares=shares),
        )

    def _refuse_busy(self) -> None:
        """The caches cannot be flushed under a request: SGLang would say so only when the weights are new."""
        if self._request.flush_cache and not versions.is_idle(self._manager.scheduler):
            raise ConfigError(
                "requests are running or queued, so that SGLang cannot flush its caches: finish or retract "
                "them (pause_generation with mode abort or retract), or update with flush_cache false"
            )

    def _check_names(self, tensors: Sequence[TensorLayout], recordings: Sequence[Recording]) -> None:
        taken = set[str]().union(*(recording.taken for recording in recordings))
        check_names(tensors, taken, self._rules)

    def _keep_together(self, names: frozenset[str]) -> None:
        for other in [self._company[name] for name in names if name in self._company]:
            names |= other
        for name in names:
            self._company[name] = names

    # After

    def _may_be_incomplete(self, status: Mapping[str, Any]) -> bool:
        """Another rank may have begun when this one had not; but what this one refuses, all of them do."""
        parallel = versions.parallel()
        return bool(status["touched"]) or (parallel.tp * parallel.pp > 1 and not self._refused)

    def _settle(self, committed: bool, message: str) -> str:
        """The weight version, and the caches: flushed after any outcome. All ranks must have the same ones,
        and a rank that could not learn the verdict cannot do what depends on it."""
        version = self._request.weight_version if committed else None
        if INCOMPLETE_NOTE in message:
            version = INCOMPLETE
        _log_failure("the weight version", lambda: versions.record_weight_version(self._manager, version))
        try:
            return versions.flush_caches(self._manager, self._request, committed, message)
        except Exception:
            logger.exception("the caches: failed")
            return message


def _verified(status: Mapping[str, Any]) -> str:
    """What this rank compared, where anything was; SGLang's answer has no other place for it."""
    counts = status["verified"]
    if not counts:
        return ""
    left_out = status["not_compared"]
    told = f" Verified: {counts['arrived']} as they arrived, {counts['loaded']} as they were loaded"
    return f"{told}; not as loaded: {', '.join(left_out)} ..." if left_out else f"{told}."


def _log_failure(what: str, work: Any) -> None:  # noqa: ANN401 - a function without arguments
    try:
        work()
    except Exception:
        logger.exception("%s: failed", what)
