"""A process that runs vLLM's LLM class, driven by JSON lines on stdin; it answers on a descriptor of its own.

Requests: {"start": {LLM's arguments}}, {"generate": [prompts of token ids]},
{"complete": prompt}, {"rpc": [method, args, kwargs]},
{"update": [a checkpoint's directory, options]}, {"join": {the arguments of one parameter server of several}},
{"executor": null}, {"sleep": level}, {"wake_up": tags}. An answer is {"result": ...} or {"error": traceback}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tests.engines.vllm.light import make_light

if TYPE_CHECKING:
    from ckpt_engine import ParameterServer

DEVICE = os.environ.get("TEST_DEVICE", "cpu")
MAX_TOKENS = 12


@contextmanager
def _collecting_once() -> Iterator[None]:
    """vLLM collects garbage eight times for each engine, most of a small one's time to start. Here once, at
    the end. (On a GPU vLLM measures what is free in between.)"""
    with patch.object(gc, "collect", lambda *_: 0) if DEVICE == "cpu" else nullcontext():
        yield
    gc.collect()


class Offline:
    def __init__(self) -> None:
        self.llm: Any = None
        self.ps: ParameterServer | None = None
        """One of several, which stay."""

    def start(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.distributed.parallel_state import destroy_model_parallel

        with _collecting_once():
            self.llm = None
        with _collecting_once():
            # vLLM 0.27 would use those of the engine before: none for experts if that one had no experts.
            destroy_model_parallel()
            self.llm = LLM(**arguments)

    def generate(self, prompts: list[list[int]]) -> list[Any]:
        """For each prompt alone: its tokens, and the log-probabilities of the likeliest ones."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=3, ignore_eos=True)
        answers = []
        for prompt in prompts:
            (output,) = self.llm.generate({"prompt_token_ids": prompt}, parameters, use_tqdm=False)
            completion = output.outputs[0]
            logprobs = [
                sorted([token, each.logprob] for token, each in step.items()) for step in completion.logprobs
            ]
            answers.append([list(completion.token_ids), logprobs])
        return answers

    def complete(self, prompt: str) -> str:
        """As the examples ask."""
        from vllm import SamplingParams

        (output,) = self.llm.generate(prompt, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        return output.outputs[0].text

    def rpc(self, call: list[Any]) -> list[Any]:
        method, args, kwargs = call
        return self.llm.collective_rpc(method, args=tuple(args), kwargs=kwargs)

    def update(self, call: list[Any]) -> str:
        """With this process's own parameter server, as a trainer that has the engine inside does it; the
        version."""
        import ckpt_engine_vllm

        from ckpt_engine import ParameterServer
        from ckpt_engine.checkpoint import split_checkpoint

        directory, options = call
        with ExitStack() as stack:
            ps = self.ps
            if ps is None:
                ps = stack.enter_context(ParameterServer(rank=0, world_size=1, device=DEVICE))
            ps.register_checkpoint(directory, files=split_checkpoint(directory, ps.rank, ps.world_size))
            stack.callback(ps.unregister_checkpoint, directory)
            ps.gather_metas(directory)
            return ckpt_engine_vllm.update(self.llm, ps, directory, timeout=100, **options).version

    def join(self, place: dict[str, Any]) -> None:
        """From now on updates are those of several parameter servers, of which this process's is one."""
        from ckpt_engine import ParameterServer

        self.ps = ParameterServer(**place, device=DEVICE)

    def executor(self, _: None) -> str:
        """Which of vLLM's has the workers."""
        return type(self.llm.llm_engine.model_executor).__name__

    def sleep(self, level: int) -> None:
        self.llm.sleep(level=level)

    def wake_up(self, tags: list[str]) -> None:
        self.llm.wake_up(tags=tags)

    def close(self) -> None:
        if self.ps is not None:
            self.ps.close()


def main() -> None:
    make_light()
    answers = os.fdopen(int(sys.argv[1]), "w")
    offline = Offline()
    for line in sys.stdin:
        ((operation, argument),) = json.loads(line).items()
        try:
            answer = {"result": getattr(offline, operation)(argument)}
        except Exception:  # noqa: BLE001 - the test sees it
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    offline.close()


if __name__ == "__main__":
    main()
