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

cargo build --release --package bert-variants --features cuda --bins
for program in bert-variants/src/bin/*.rs; do
  name=$(basename "$program" .rs)
  strip -o "$bundle/bin/$name" "target/release/$name"
done

# Other tests of bert-variants read files of the repository and need no GPU: they stay here.
{
  cargo test --release --package candle-rope-attn --features cuda --no-run --lib --tests --benches \
    --message-format json-render-diagnostics
  cargo test --release --package bert-variants --features cuda --no-run --test simple_step --test graphs \
    --message-format json-render-diagnostics
} | python3 -c '
import json, sys
for message in map(json.loads, sys.stdin):
    if message["reason"] == "compiler-artifact" and message["executable"] and message["target"]["kind"] != ["bin"]:
        kind, name = message["target"]["kind"][0], message["target"]["name"]
        folder = "bench" if kind == "bench" else "tests"
        print(message["executable"], folder + "/" + (name if kind != "lib" else "unit"), sep="\t")' |
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
