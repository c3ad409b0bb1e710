#!/usr/bin/env bash
# One command from a fresh clone to a result: sets everything up in .venv, then quantizes the real SmolLM2-135M-Instruct
# to int4, measures it against the float model, writes its card and lets it answer. Arguments go to `hf-quant demo`:
#   bash scripts/demo.sh                       # bash scripts/demo.sh --bits 8 --output-dir /tmp/smollm2-int8
set -euo pipefail
caller="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup demo
cd "$caller"
exec "$root/.venv/bin/hf-quant" demo "$@"
