#!/usr/bin/env bash
# One command from a fresh clone to a tested checkout: sets everything up in .venv, then ruff, mypy and the tests.
# Arguments go to pytest:   bash scripts/test.sh tests/cli -k plan
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup dev
say "ruff"
"$PYTHON" -m ruff check .
say "mypy"
"$PYTHON" -m mypy
say "pytest"
exec "$PYTHON" -m pytest "$@"
