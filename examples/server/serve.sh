#!/usr/bin/env bash
# `make serve`: the bundled pair behind an OpenAI-compatible server, in the foreground until Ctrl-C.
# Environment: PYTHON (an interpreter with vLLM and this package), HOST, PORT, K (draft tokens).
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
host=${HOST:-127.0.0.1}
port=${PORT:-8000}
target=examples/models/python-target
head=examples/models/python-specformer
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

# vLLM's CPU build asks for Intel's OpenMP, which its wheel brings, when it speculates.
openmp=$("$python" -c 'import sys; print(sys.prefix)')/lib/libiomp5.so
if [[ -f $openmp && -z ${LD_PRELOAD:-} ]]; then
    export LD_PRELOAD=$openmp
fi

cat <<EOF
When the server says "Application startup complete.", ask it from another terminal:

    curl -s http://$host:$port/v1/completions -H 'Content-Type: application/json' -d '{
      "model": "$target", "temperature": 0, "max_tokens": 128,
      "prompt": "def get_pairs(word):\n    \"\"\"Return the set of symbol pairs in a word.\"\"\""
    }'
    curl -s http://$host:$port/metrics | grep spec_decode

EOF

exec "$python" -m vllm_specformer.cli.main serve "$target" \
    --speculative-config "{\"method\":\"specformer\",\"model\":\"$head\",\"num_speculative_tokens\":${K:-4}}" \
    --dtype float32 --max-model-len 512 --max-num-seqs 16 --kv-cache-memory-bytes 256M \
    --enforce-eager --host "$host" --port "$port"
