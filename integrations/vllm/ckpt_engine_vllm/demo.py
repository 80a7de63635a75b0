"""`ckpt-engine demo --engine vllm`: vLLM's own server, restarted with a checkpoint and then updated to it.

The restart is the yardstick: an engine that starts with dummy weights and is updated must have the checksums
(vLLM's own, of every parameter and buffer) and give the tokens and log-probabilities of one that loaded the
checkpoint itself. Both ways' seconds are told side by side.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any, cast

import httpx

from ckpt_engine.cli.demo import (
    CHECKPOINT_SEED,
    MAX_TOKENS,
    PROMPT,
    Demo,
    DemoFailed,
    Steps,
    compare_digests,
    two_free_ports,
)
from ckpt_engine.embedded_engine.processes import Child
from ckpt_engine.server.engine_client import call_engine

STEPS = 6
_PROBE_SECONDS = 5.0
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmDemo(Demo):
    """One engine after the other: two at a time would not fit a small machine."""

    def run(self) -> dict[str, Any]:
        if self._size == "tiny":
            raise DemoFailed("vLLM has no CPU kernel for heads of 16, which the tiny model has: use small")
        with Steps(self._console, STEPS) as steps:
            steps.begin("Making a checkpoint")
            from ckpt_engine.embedded_engine import model as models

            models.make_checkpoint(
                self._checkpoint, seed=CHECKPOINT_SEED, size=cast("models.Size", self._size)
            )
            self._make_tokenizer()
            tensors, nbytes = models.file_digests(self._checkpoint)
            steps.done(f"{len(tensors)} tensors, {nbytes / 1e6:.1f} MB")

            steps.begin("Starting vLLM with the checkpoint, as a restart does")
            began = time.monotonic()
            endpoint = self._start("restarted", "auto")
            restart_seconds = time.monotonic() - began
            checksums, answer = self._checksums(endpoint), self._answer(endpoint)
            self._end(self._engines.pop())
            steps.done(f"{restart_seconds:.1f} s")

            steps.begin("Starting vLLM with dummy weights")
            endpoint = self._start("updated", "dummy")
            if self._checksums(endpoint) == checksums or self._answer(endpoint) == answer:
                raise DemoFailed(f"{endpoint} has the checkpoint's weights before it was updated")
            steps.done("its checksums and its answer differ")

            steps.begin("Updating it")
            began = time.monotonic()
            report = self._update([endpoint], "--engine", "vllm", "--pause", "keep")
            command_seconds = time.monotonic() - began
            (status,) = call_engine(f"{endpoint}/collective_rpc", "ckpt_engine_status")
            seconds = float(report["update_seconds"])
            steps.done(f"{seconds:.2f} s")

            steps.begin("Comparing vLLM's checksums with the restarted engine's")
            compare_digests(endpoint, checksums, self._checksums(endpoint))
            steps.done(f"{len(checksums)} of {len(checksums)} equal")

            steps.begin("Generating with the new weights")
            if self._answer(endpoint) != answer:
                raise DemoFailed(f"{endpoint} does not answer as the restarted engine does")
            steps.done("tokens and log-probabilities equal to the restarted engine's")
        self._console.print(
            f"update {seconds:.2f} s ({command_seconds:.1f} s with the start of the parameter server), "
            f"restart {restart_seconds:.1f} s"
        )
        import vllm

        return {
            "engine": f"vllm {vllm.__version__}",
            "tensors": len(tensors),
            "bytes": nbytes,
            "update_seconds": seconds,
            "update_command_seconds": round(command_seconds, 3),
            "kept_bytes": status["last"]["kept_bytes"],
            "restart_seconds": round(restart_seconds, 3),
            "engines": 1,
            "generated_tokens": MAX_TOKENS,
            "size": self._size,
        }

    def _make_tokenizer(self) -> None:
        """One word for each token: vLLM's server wants a tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        config = json.loads((self._checkpoint / "config.json").read_bytes())
        words = {f"w{index}": index for index in range(config["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106 - a word
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(self._checkpoint)  # type: ignore[no-untyped-call]  # noqa: S106 - a token of text

    def _start(self, name: str, load_format: str) -> str:
        """An engine that answers; its endpoint."""
        port = two_free_ports()
        # The wheel for CPUs has no `vllm serve`.
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(self._checkpoint)]
        command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--load-format", load_format, "--max-model-len", "1024", "--max-num-seqs", "4"]
        command += ["--enforce-eager", "--seed", "0"]
        command += ["--worker-extension-cls", "ckpt_engine_vllm.VllmColocateWorkerExtension"]
        self._engines.append(self._children.start(name, command, **_ENVIRONMENT))
        endpoint = f"http://127.0.0.1:{port}"
        self._wait(f"{endpoint} to be healthy", lambda: _healthy(endpoint) or None)
        return endpoint

    def _end(self, engine: Child) -> None:
        engine.process.terminate()
        self._wait(f"engine {engine.name} to end", engine.process.poll)

    def _checksums(self, endpoint: str) -> dict[str, str]:
        answer = self._post(f"{endpoint}/weight_checker", {"action": "checksum"})
        return cast("dict[str, str]", answer["checksums"])

    def _answer(self, endpoint: str) -> Any:  # noqa: ANN401 - JSON
        """Greedy tokens, and the log-probabilities of the likeliest ones."""
        request = {"model": "demo", "prompt": list(PROMPT), "max_tokens": MAX_TOKENS, "temperature": 0}
        request |= {"logprobs": 3, "ignore_eos": True, "return_tokens_as_token_ids": True}
        logprobs = self._post(f"{endpoint}/v1/completions", request)["choices"][0]["logprobs"]
        return [logprobs["tokens"], logprobs["top_logprobs"]]

    def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        with httpx.Client(timeout=self._left(url), trust_env=False) as client:
            response = client.post(url, json=body)
        if not response.is_success:
            raise DemoFailed(f"{url} answered HTTP {response.status_code}: {response.text[:1000]}")
        return cast("dict[str, Any]", response.json())


def _healthy(endpoint: str) -> bool:
    with suppress(httpx.HTTPError), httpx.Client(timeout=_PROBE_SECONDS, trust_env=False) as client:
        return client.get(f"{endpoint}/health").is_success
    return False
