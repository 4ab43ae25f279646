#!/usr/bin/env bash
# Measure the GPU of this machine: `bash launch/reproduce/gpu.sh --out FOLDER [--minutes 9]` from a checkout.
# Nothing is downloaded. Needs torch 2.9, torchvision, timm and the other packages of setup.cfg; what is missing can be
# brought along as wheels in the folder WHEELS (default: .wheels in the checkout), installed into a temporary folder.
# The same command continues with the parts that are missing: see `--help`.
#   PYTHON   the interpreter that has torch (default: python3)
#   WHEELS   a folder of wheels (default: .wheels)
set -euo pipefail
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
missing="$("$PYTHON" - <<'END'
from importlib.util import find_spec
names = ("torch", "torchvision", "timm", "numpy", "PIL", "matplotlib", "yaml", "safetensors", "huggingface_hub")
print(" ".join(name for name in names if find_spec(name) is None))
END
)"
if [ -n "$missing" ]; then
    echo "gpu.sh: $PYTHON lacks $missing: name another interpreter in PYTHON, or put wheels into $WHEELS" >&2
    exit 2
fi
"$PYTHON" -m launch.reproduce.gpu "$@"
