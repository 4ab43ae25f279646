#!/usr/bin/env bash
# Tests with another Python and torch, in their own environment:
# `bash launch/versions.sh python3.12 2.11.0 [arguments of test.sh]`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ]; then
    echo "maskwise: usage: bash launch/versions.sh INTERPRETER TORCH, such as python3.12 2.11.0" >&2
    exit 2
fi
place="$PWD/.venv-$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-torch$2"
[ -x "$place/bin/python" ] || "$1" -m venv "$place"
MASKWISE_VENV="$place" MASKWISE_TORCH="torch==$2" exec bash launch/test.sh "${@:3}"
