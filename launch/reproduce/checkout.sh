#!/usr/bin/env bash
# Sourced by the scripts beside it: goes to the root of the checkout, makes `maskwise` importable, checks the packages.
#   PYTHON   the interpreter that has torch (default: python3)
#   WHEELS   a folder of wheels (default: .wheels), installed into a temporary folder
#   NEEDS    packages that the script needs beside those below
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}"
WHEELS="${WHEELS:-.wheels}"
export PYTHONPATH="$PWD/ssl:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "$WHEELS/*.whl" > /dev/null; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
    PYTHONPATH="$site:$PYTHONPATH"
fi
# shellcheck disable=SC2086
missing="$("$PYTHON" - ${NEEDS:-} <<'END'
import sys
from importlib.util import find_spec
names = ("torch", "torchvision", "timm", "numpy", "PIL", "matplotlib", "yaml", "safetensors", "huggingface_hub")
print(" ".join(name for name in (*names, *sys.argv[1:]) if find_spec(name) is None))
END
)"
if [ -n "$missing" ]; then
    echo "${0##*/}: $PYTHON lacks $missing: name another interpreter in PYTHON, or put wheels into $WHEELS" >&2
    exit 2
fi
