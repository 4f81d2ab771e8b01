#!/usr/bin/env bash
# The README's pictures, in a real browser. usage: docs/screenshot.sh RUN_FOLDER OUT.png [TAB]: TensorBoard, or
# docs/screenshot.sh PAGE.html OUT.png [light|dark] [WIDTH] [HEIGHT]: a page such as report.html.
# Needs Debian's chromium. TensorBoard listens on loopback only and is stopped at the end.
set -euo pipefail
what=$1 out=$2
profile=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$profile"' EXIT
browse() {  # options and an address
  chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
    --disable-component-update --disable-sync --user-data-dir="$profile/chromium" --hide-scrollbars --screenshot="$out" \
    "$@" 2>/dev/null
}
if [ -f "$what" ]; then
  scheme=1  # light
  [ "${3:-light}" = light ] || scheme=0
  browse --blink-settings=preferredColorScheme=$scheme --window-size="${4:-1000},${5:-1500}" "file://$(realpath "$what")"
  exit
fi
tensorboard --logdir "$what" --host 127.0.0.1 --port 6123 >"$profile/log" 2>&1 &
server=$!
for _ in $(seq 60); do curl -sf http://127.0.0.1:6123/ >/dev/null && break; sleep 1; done
browse --window-size=1500,860 --virtual-time-budget=20000 "http://127.0.0.1:6123/#${3:-custom_scalars}"
