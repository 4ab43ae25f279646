#!/usr/bin/env bash
# The table of SimPool against average pooling and the class token, from runs to page:
#   bash launch/reproduce/simpool_table.sh --out FOLDER [--budget cpu|gpu|full] [--seconds 520] [--packs FOLDER]
# The same command goes on after any end, and exits with 75 where something is left; see --help. PYTHON and WHEELS: see
# checkout.sh.
set -euo pipefail
NEEDS=scipy
source "$(dirname "${BASH_SOURCE[0]}")/checkout.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$PYTHON" -m launch.reproduce.tables simpool "$@"
