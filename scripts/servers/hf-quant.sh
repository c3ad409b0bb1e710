#!/usr/bin/env bash
# transformers' server with checkpoints on hf-quant's kernels.
#   pip install "hf-quant[serving]"
#   bash scripts/servers/hf-quant.sh CHECKPOINT [--port 8000] [--continuous-batching --cb-num-blocks 64] ...
# Chats are answered one after another, each at full speed; with --continuous-batching they share every forward pass.
# All options: hf-quant serve --help.
set -euo pipefail
exec "${PYTHON:-python}" -m hf_quant.cli serve "$@"
