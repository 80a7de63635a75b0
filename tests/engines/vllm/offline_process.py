"""A process that runs vLLM's LLM class, driven by JSON lines on stdin; it answers on a descriptor of its own.

Requests: {"start": {LLM's arguments}}, {"generate": [prompts of token ids]},
{"complete": prompt}, {"rpc": [method, args, kwargs]},
{"update": [a checkpoint's directory, options]}. An answer is {"result": ...} or {"error": traceback}.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

MAX_TOKENS = 12


class Offline:
    def __init__(self) -> None:
        self.llm: Any = None

    def start(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.distributed.parallel_state import destroy_model_parallel

        self.llm = None
        gc.collect()
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

        directory, options = call
        device = os.environ.get("TEST_DEVICE", "cpu")
        with ParameterServer(rank=0, world_size=1, device=device) as ps:
            ps.register_checkpoint("new", files=[f"{directory}/model.safetensors"])
            ps.gather_metas("new")
            return ckpt_engine_vllm.update(self.llm, ps, "new", timeout=100, **options).version


def main() -> None:
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


if __name__ == "__main__":
    main()
