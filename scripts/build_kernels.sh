#!/usr/bin/env bash
# Compiles cuda/*.cu into target/cuda/libattn.so, for scripts/check_kernels.py and profilers.
# Needs nvcc: on PATH, in CUDA_HOME, or from scripts/cuda-toolkit.sh.
#
#   scripts/build_kernels.sh              sm_80 and sm_90 code, and PTX for what comes later
#   ATTN_ARCHS=90 scripts/build_kernels.sh   sm_90 code only
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${ATTN_OUT:-$root/target/cuda}
nvcc=$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
if [ ! -x "$nvcc" ]; then
  echo "build_kernels.sh: found no nvcc on PATH or in CUDA_HOME; install the CUDA toolkit, or run scripts/cuda-toolkit.sh and then: source target/cuda/env.sh" >&2
  exit 1
fi
archs=()
for arch in ${ATTN_ARCHS:-80 90}; do
  archs+=(-gencode "arch=compute_$arch,code=sm_$arch")
done
if [ -z "${ATTN_ARCHS:-}" ]; then
  archs+=(-gencode arch=compute_90,code=compute_90)
fi
mkdir -p "$out"
pids=()
for name in attn_fwd attn_bwd; do
  "$nvcc" -std=c++20 -O3 --threads 2 ${NVCC_FLAGS:-} "${archs[@]}" -Xcompiler -fPIC \
    -c "$root/cuda/$name.cu" -o "$out/$name.o" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"$nvcc" -shared -cudart static -o "$out/libattn.so" "$out/attn_fwd.o" "$out/attn_bwd.o"
echo "$out/libattn.so"
