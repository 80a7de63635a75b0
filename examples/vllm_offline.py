"""vLLM's LLM class, started with dummy weights and updated in place.

    python examples/vllm_offline.py MODEL [--update-from OTHER] [--tensor-parallel-size 2]

Each of the engine's workers has a parameter server: the first in this process, the others in their own. On
CPU set VLLM_CPU_OMP_THREADS_BIND (to nobind, say) for more than one worker.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
from pathlib import Path

from ckpt_engine import ParameterServer
from ckpt_engine.checkpoint import split_checkpoint

NAME = "step-1"


def free_port() -> int:
    """The control store takes the port after it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def prepared(rank: int, size: int, port: int, checkpoint: Path) -> ParameterServer:
    """A parameter server that holds its share, and knows who holds the rest."""
    ps = ParameterServer(rank=rank, world_size=size, master_addr="127.0.0.1", master_port=port)
    ps.register_checkpoint(NAME, files=split_checkpoint(checkpoint, rank, size))
    ps.gather_metas(NAME)
    return ps


def follow(rank: int, size: int, port: int, checkpoint: Path) -> None:
    """A parameter server whose worker the first one's process asks."""
    with prepared(rank, size, port, checkpoint) as ps:
        ps.update(NAME, lambda socket_paths: None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a directory with config, tokenizer and .safetensors files")
    parser.add_argument("--update-from", type=Path, help="where the new weights are (default: MODEL)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--prompt", default="The weights are")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--llm-options", type=json.loads, default={}, help="more arguments of LLM, as JSON")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    size, port = options.tensor_parallel_size, free_port()
    checkpoint = options.update_from or options.model

    import ckpt_engine_vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(options.model),
        load_format="dummy",
        tensor_parallel_size=size,
        max_model_len=options.max_model_len,
        worker_extension_cls="ckpt_engine_vllm.VllmColocateWorkerExtension",
        **options.llm_options,
    )
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=follow, args=(rank, size, port, checkpoint)) for rank in range(1, size)]
    for process in others:
        process.start()
    with prepared(0, size, port, checkpoint) as ps:
        report = ckpt_engine_vllm.update(llm, ps, NAME)
        for process in others:
            process.join()
    print(f"{report.tensors} tensors, {report.nbytes} bytes in {report.seconds:.2f} s")
    (output,) = llm.generate(options.prompt, SamplingParams(temperature=0, max_tokens=16))
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
