#!/usr/bin/env bash
# llama-cpp-python's server with the GGUF file of `hf-quant convert CHECKPOINT OUT --to gguf`.
#   pip install "llama-cpp-python[server]"                        # compiles llama.cpp: a C++ compiler, minutes
#   bash scripts/servers/llama-cpp.sh OUT/MODEL-Q4_0.gguf [--port 8000] ...
# Chats are answered one after another; by default a new one would cut off the one before it.
# A request without "repeat_penalty": 1.0 gets one of 1.1: other answers than the model's, with temperature 0, too.
set -euo pipefail
model=$1
shift
fixed=(--interrupt_requests false --logits_all false --n_threads "${OMP_NUM_THREADS:-$(nproc)}")
exec "${PYTHON:-python}" -m llama_cpp.server --model "$model" "${fixed[@]}" "$@"
