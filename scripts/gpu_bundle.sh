#!/usr/bin/env bash
# Builds the tests, benchmarks and programs with CUDA into target/gpu-bundle, for a machine with a
# GPU and CUDA's libraries but without Rust, and packs that folder. Copy target/gpu-bundle.tar.xz
# there, then:
#
#   tar xf gpu-bundle.tar.xz && gpu-bundle/run.sh tests kernels sanitizer
#
# run.sh lists its parts. Building needs nvcc (see candle-rope-attn/build.rs).
set -euo pipefail
cd "$(dirname "$0")/.."
bundle=target/gpu-bundle
rm -rf "$bundle"
mkdir -p "$bundle"/{tests,bench,bin}

# Test targets are named package-target. A benchmark is compiled like a test, without a harness.
cargo build --release --workspace --features cuda --bins
cargo test --release --workspace --features cuda --no-run --lib --tests --benches \
  --message-format json-render-diagnostics | python3 -c '
import json, os, sys
for message in map(json.loads, sys.stdin):
    if message["reason"] != "compiler-artifact" or not message["executable"]:
        continue
    target, package = message["target"], os.path.basename(os.path.dirname(message["manifest_path"]))
    kind = target["kind"][0]
    if kind == "bin":
        # Its unit tests, or the program itself, which integration tests run.
        folder, name = ("tests", f"{package}-bin-" + target["name"]) if message["profile"]["test"] else ("bin", target["name"])
    elif kind == "bench":
        folder, name = "bench", target["name"]
    else:
        folder, name = "tests", package + "-" + (target["name"] if kind == "test" else "unit")
    print(message["executable"], f"{folder}/{name}", sep="\t")' |
  while IFS=$'\t' read -r executable name; do
    strip -o "$bundle/$name" "$executable"
  done
scripts/build_kernels.sh > /dev/null
strip -o "$bundle/libattn.so" target/cuda/libattn.so
cp scripts/check_kernels.py "$bundle/"
cp scripts/gpu_run.sh "$bundle/run.sh"

# Binaries have much in common: a dictionary larger than several of them keeps the archive small.
tar -C target -cf - gpu-bundle | xz -T2 --lzma2=preset=1,dict=256MiB > target/gpu-bundle.tar.xz
du -h "$bundle" target/gpu-bundle.tar.xz
