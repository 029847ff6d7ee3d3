#!/usr/bin/env bash
# Compiles cuda/*.cu as the crate does (candle-rope-attn/build.rs, which says what the environment
# can change) and copies them to target/cuda/libattn.so, for scripts/check_kernels.py and profilers.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(cargo build --release --package candle-rope-attn --features cuda \
  --message-format json-render-diagnostics | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message["reason"] == "build-script-executed" and "candle-rope-attn" in message["package_id"]:
        print(message["out_dir"])')
mkdir -p target/cuda
cp "$folder/libattn.so" target/cuda/libattn.so
echo "$PWD/target/cuda/libattn.so"
