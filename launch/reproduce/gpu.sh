#!/usr/bin/env bash
# Measure the GPU of this machine: `bash launch/reproduce/gpu.sh --out FOLDER [--minutes 9]` from a checkout.
# Nothing is downloaded. Needs torch 2.9, torchvision, timm and the other packages of setup.cfg; what is missing can be
# brought along as wheels in the folder WHEELS (default: .wheels in the checkout), installed into a temporary folder.
# The same command continues with the parts that are missing: see `--help`.
#   PYTHON   the interpreter that has torch (default: python3)
#   WHEELS   a folder of wheels (default: .wheels)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/checkout.sh"
"$PYTHON" -m launch.reproduce.gpu "$@"
