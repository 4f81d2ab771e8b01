#!/usr/bin/env bash
# Check dmt on this machine's GPU: parity with the CPU, precision, speed, waits, a default run.
#
#   scripts/gpu_check.sh [OUTPUT.json] [--dry-run]
#
# Takes less than eight minutes. Prints one table and writes it as JSON, by default to
# gpu_check.json. Exit codes: 0 all passed, 1 a check failed, 2 there is no GPU. With `--dry-run`
# everything runs in seconds on tests/second_device.py, which shows that the script works and
# nothing about a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
exec timeout 470 "${PYTHON:-python}" -W ignore -m benchmarks.gpu_check "$@"
