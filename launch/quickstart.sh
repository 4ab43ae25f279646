#!/usr/bin/env bash
# From nothing to a pretrained encoder with its numbers and pictures: `bash launch/quickstart.sh [RUN_FOLDER]`.
# Interrupted, the same command goes on where it stopped.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run="${1:-runs/quickstart}"
set --
source launch/env.sh
"$PYTHON" -m maskwise train configs/pretrain/quickstart_shapes.yaml --out "$run"
if [ -e "$run/preempted" ]; then exit 0; fi
"$PYTHON" -m maskwise export "$run" --to "$run/exported"
"$PYTHON" -m maskwise report "$run"
