"""The engine: a model, the lock around it, and the methods that a request may name."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_engine.embedded_engine import model as models
from ckpt_engine.errors import CkptEngineError, ConfigError
from ckpt_engine.settings import Settings, load_settings
from ckpt_engine.state import SERVING_INITIAL, WeightsState

if TYPE_CHECKING:
    import torch


class UnknownMethod(CkptEngineError):
    """A request named a method that workers do not offer, or gave it the wrong arguments."""


class EmbeddedEngine:
    """One model, one worker.

    Updates and generation exclude each other: a forward pass never sees half of an update. All
    methods block; callers with an event loop run them in threads.
    """

    METHODS = frozenset({"parameter_digests", "update_weights_from_ipc"})
    """What `/collective_rpc` may call. A list, not getattr alone: requests come from outside."""

    def __init__(
        self, directory: Path | str, *, seed: int, device_index: int = 0, settings: Settings | None = None
    ) -> None:
        """
        Args:
            directory: holds config.json; its weights are not read (as with `--load-format dummy`).
            seed: of the dummy weights.
            device_index: the engine's own number of its CPU device (CKPT_ENGINE_CPU_DEVICES maps it).
        """
        self._model = models.load_dummy(directory, seed)
        self._settings = settings or load_settings()
        self._device_index = device_index
        self._lock = threading.Lock()
        self._weights = WeightsState(SERVING_INITIAL)

    @cached_property
    def device_uuid(self) -> str:
        from ckpt_engine.devices.cpu import cpu_uuid

        return cpu_uuid(self._settings, self._device_index)

    @property
    def busy(self) -> bool:
        """Whether an update or a generation is at work."""
        return self._lock.locked()

    def health(self) -> dict[str, Any]:
        """Never waits. `weights`: the state (`ckpt_engine.state`); `status`: ok, or not_ready where they are
        incomplete."""
        now = self._weights.now
        return {
            "status": "not_ready" if now.state == "incomplete" else "ok",
            "device": self.device_uuid,
            "weights": now.state,
            "version": now.version,
            "reason": now.reason,
            "busy": self.busy,
        }

    def call(
        self, method: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Runs a method of the allow-list; the results of all (one) workers.

        Raises:
            UnknownMethod: not in the list, or arguments that do not fit.
        """
        if method not in self.METHODS:
            raise UnknownMethod(f"no method {method!r}; workers offer {', '.join(sorted(self.METHODS))}")
        function = getattr(self, method)
        keywords = dict(kwargs or {})
        try:
            inspect.signature(function).bind(*args, **keywords)
        except TypeError as error:
            raise UnknownMethod(f"{method}: {error}") from None
        return [function(*args, **keywords)]

    def update_weights_from_ipc(self, zmq_handles: Any) -> dict[str, Any]:  # noqa: ANN401 - checked by the receiver
        """Receives one update.

        Args:
            zmq_handles: `[[device_uuid, zmq_handle], ...]` of all ranks, as the request had them.

        Returns:
            The worker's status (ipc.receiver).
        """
        import zmq

        from ckpt_engine.ipc import receiver

        with self._lock, zmq.Context() as context:
            self._weights.begin()
            try:
                status = receiver.serve_update(
                    context, zmq_handles, self.device_uuid, None, run=self._reload, loaded=self._loaded
                )
            except BaseException as error:
                self._weights.fail(str(error), touched=True)
                raise
            if status["outcome"] == "committed":
                self._weights.commit(status["version"])
            else:
                self._weights.fail(str(status["error"]), touched=status["touched"])
            return status

    def parameter_digests(self) -> dict[str, str]:
        """name -> SHA-256 in hex of each parameter's bytes (tied ones once)."""
        with self._lock:
            return models.parameter_digests(self._model)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy continuation of `max_tokens` tokens.

        Raises:
            ConfigError: the prompt or the length does not fit the model.
        """
        vocabulary = int(self._model.config.vocab_size)
        longest = int(self._model.config.max_position_embeddings)
        if not prompt_token_ids:
            raise ConfigError("prompt_token_ids is empty: give at least one token")
        if any(not 0 <= token < vocabulary for token in prompt_token_ids):
            raise ConfigError(f"prompt_token_ids must lie between 0 and {vocabulary - 1}")
        if max_tokens < 1 or len(prompt_token_ids) + max_tokens > longest:
            raise ConfigError(
                f"max_tokens={max_tokens}: the model takes prompt and answer of {longest} tokens"
            )
        with self._lock:
            return models.generate_greedily(self._model, prompt_token_ids, max_tokens)

    def _loaded(self, name: str) -> torch.Tensor | None:
        try:
            return self._model.get_parameter(name)
        except AttributeError:
            return None

    def _reload(self, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
        models.load_weights(self._model, named_tensors)
