#!/usr/bin/env bash
# Lint, types and tests. Further arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 --dist loadfile "$@"
