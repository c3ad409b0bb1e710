#!/usr/bin/env bash
# transformers' own server without hf-quant: it expands the weights to the model's dtype.
#   pip install "transformers[serving]" compressed-tensors
#   bash scripts/servers/transformers.sh CHECKPOINT [--port 8000] ...
set -euo pipefail
exec "${PYTHON:-python}" -m transformers.cli.transformers serve "$@"
