#!/usr/bin/env bash
# The README's picture: TensorBoard in a real browser. usage: docs/screenshot.sh RUN_FOLDER OUT.png [TAB]
# Needs Debian's chromium. TensorBoard listens on loopback only and is stopped at the end.
set -euo pipefail
run=$1 out=$2 tab=${3:-custom_scalars}
profile=$(mktemp -d)
tensorboard --logdir "$run" --host 127.0.0.1 --port 6123 >"$profile/log" 2>&1 &
server=$!
trap 'kill $server; rm -rf "$profile"' EXIT
for _ in $(seq 60); do curl -sf http://127.0.0.1:6123/ >/dev/null && break; sleep 1; done
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
  --disable-component-update --disable-sync --user-data-dir="$profile/chromium" --hide-scrollbars \
  --window-size=1500,860 --virtual-time-budget=20000 --screenshot="$out" "http://127.0.0.1:6123/#$tab" 2>/dev/null
