"""Reinforcement learning in one file: vLLM rolls out, torch trains, and each step updates the engine.

    python examples/rl_loop.py --steps 8

The policy, a tiny Qwen3 without a tokenizer, learns to say one token: REINFORCE, where a token's reward is 1
if it is the wanted one. `register_state_dict` takes it as well when it is sharded (fully_shard).
"""

from __future__ import annotations

import argparse
import os
import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ckpt_engine import ParameterServer

VOCABULARY, WANTED, PROMPT = 32, 7, [1, 2, 3]
ROLLOUTS, TOKENS = 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    os.environ |= {"HF_HUB_OFFLINE": "1"} | (
        {} if torch.cuda.is_available() else {"VLLM_CPU_KVCACHE_SPACE": "1"}
    )

    import ckpt_engine_vllm
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    policy = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, tie_word_embeddings=False, **heads, **size))
    optimizer = torch.optim.Adam(policy.parameters(), lr=6e-3)
    with tempfile.TemporaryDirectory() as model, ParameterServer() as ps:
        policy.save_pretrained(model)
        llm = LLM(
            model,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            worker_extension_cls="ckpt_engine_vllm.VllmColocateWorkerExtension",
        )
        for step in range(steps):
            name = f"step-{step}"
            ps.register_state_dict(name, policy.state_dict(), use_shared_memory_pool=True)
            ps.gather_metas(name)
            report = ckpt_engine_vllm.update(llm, ps, name)
            ps.unregister_checkpoint(name)  # its memory stays, for the next step

            sampling = SamplingParams(
                n=ROLLOUTS, temperature=1, max_tokens=TOKENS, ignore_eos=True, detokenize=False, seed=step
            )
            (request,) = llm.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
            answers = torch.tensor([list(output.token_ids) for output in request.outputs])
            rewards = (answers == WANTED).float()

            sequences = torch.cat([torch.tensor(PROMPT).expand(ROLLOUTS, -1), answers], dim=1)
            logits = policy(sequences).logits[:, len(PROMPT) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
            loss = -((rewards - rewards.mean()) * chosen).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step}: reward {rewards.mean():.3f}, updated in {report.seconds:.3f} s", flush=True)


if __name__ == "__main__":
    main()
