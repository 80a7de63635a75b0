"""vLLM's layer-wise reload, as vLLM's own workers and vllm-ascend's end it when an update fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ckpt_engine.errors import ErrorRecord


class Abandonable(Protocol):
    def abandon(self) -> None: ...


def abandon_layerwise_reload(model: torch.nn.Module, model_config: Any) -> None:  # noqa: ANN401 - vLLM's
    """Puts the layers that are not complete back as they were: the model can run, with some old weights and
    some new."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for module in model.modules():
        info = get_layerwise_info(module)
        # A layer that nothing was loaded into gets its old tensors back.
        info.loaded_weights.clear()
        info.load_numel = 0
    with torch.no_grad():
        finalize_layerwise_reload(model, model_config)


def abandon_all(reloads: Sequence[Abandonable], status: dict[str, Any]) -> None:
    """After a failed update: each of them, whatever the others raise, which is added to the status' error."""
    for reload in reloads:
        _abandon(reload, status)


def _abandon(reload: Abandonable, status: dict[str, Any]) -> None:
    try:
        reload.abandon()
    except Exception as error:  # noqa: BLE001 - the update's own error must not be lost
        status["error"] += (
            "; and then the model could not be put back together, restart the engine: "
            + ErrorRecord.from_exception(error).message
        )


@contextmanager
def some_of_a_drafter() -> Iterator[None]:
    """MTP drafters complain when a call of load_weights has not all of their tensors. Whether the update has,
    is found out from all of its calls together."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        # A version without that check.
        yield
    else:
        with disable_mtp_completeness_check():
            yield
