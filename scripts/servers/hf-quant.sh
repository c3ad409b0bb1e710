#!/usr/bin/env bash
# transformers' server with checkpoints on hf-quant's kernels.
#   pip install "hf-quant[serving]"
#   bash scripts/servers/hf-quant.sh CHECKPOINT [--port 8000] [--continuous-batching --cb-num-blocks 64] ...
# One chat at a time is fastest without --continuous-batching, many at once with it. All options: hf-quant serve --help.
set -euo pipefail
exec "${PYTHON:-python}" -m hf_quant.cli serve "$@"
