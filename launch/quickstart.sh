#!/usr/bin/env bash
# Install, pretrain on embedded images, evaluate, draw and export: `bash launch/quickstart.sh [RUN_FOLDER]`.
# After an interruption the same command continues.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run="${1:-runs/quickstart}"
set --
source launch/env.sh
"$PYTHON" -m maskwise train configs/pretrain/quickstart_shapes.yaml --out "$run"
if [ -e "$run/preempted" ]; then exit 0; fi
"$PYTHON" -m maskwise export "$run" --to "$run/exported"
"$PYTHON" -m maskwise report "$run" --measure
