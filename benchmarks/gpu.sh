#!/usr/bin/env bash
# What clipx does on one GPU, in at most eight minutes: is it right, and how fast beside open_clip?
#
#   benchmarks/gpu.sh [--size=tiny]
#
# Writes benchmarks/gpu.md. --size=tiny tries the script itself, on a CPU too. Needs '.[cuda,peers]'.

set -euo pipefail
export XLA_PYTHON_CLIENT_PREALLOCATE=false # two libraries share the GPU
cd "$(dirname "$0")/.."
exec timeout --signal=INT "${SECONDS_AT_MOST:-480}" "${PYTHON:-python}" benchmarks/gpu.py "$@"
