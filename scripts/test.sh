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
# files of tests side by side: a worker has about 1.5 GB
exec "$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
