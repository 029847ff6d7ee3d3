#!/usr/bin/env bash
# Runs parts of a bundle made by scripts/gpu_bundle.sh, from its folder:
#
#   run.sh tests [FILTER]   the Rust tests, of that name
#   run.sh kernels          check_kernels.py: the kernels against PyTorch (needs PyTorch), on Hopper
#                           also the portable ones
#   run.sh sanitizer        compute-sanitizer's four tools over the short tables
#   run.sh speed            check_kernels.py --bench
#   run.sh bench [FILTER]   the Rust benchmarks
#   run.sh PROGRAM ARGS...  a program of bin/, such as pretrain
#
# CUDA names another folder with CUDA's libraries than /usr/local/cuda. Exit code 1 if anything fails.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH=${CUDA:-/usr/local/cuda}/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export REQUIRE_CUDA=1  # a test that finds no GPU fails
failed=0

# run NAME COMMAND...: prints what failed at once, and the times.
run() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  if ! "$@"; then
    failed=1
    echo "== $name FAILED"
  fi
  echo "== $name took $((SECONDS - start)) s"
}

part=${1:-}
if [ -z "$part" ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 2
fi
shift
case $part in
  tests)
    for test in "$here"/tests/*; do
      run "$(basename "$test")" "$test" --nocapture "$@"
    done
    ;;
  kernels)
    run kernels python3 "$here/check_kernels.py" "$here/libattn.so"
    run "portable kernels" env ATTN_PORTABLE=1 python3 "$here/check_kernels.py" "$here/libattn.so"
    ;;
  speed)
    run speed python3 "$here/check_kernels.py" "$here/libattn.so" --bench "$@"
    ;;
  sanitizer)
    # Without PyTorch's cache of memory, reads of what was freed or never written are seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck initcheck synccheck; do
      only=(--kernel-name kernel_substring=attn)
      # It must see PyTorch's kernels write the inputs.
      if [ "$tool" = initcheck ]; then only=(); fi
      check=(compute-sanitizer --tool "$tool" --error-exitcode 1 "${only[@]}"
        python3 "$here/check_kernels.py" "$here/libattn.so" --sanitize)
      run "$tool" "${check[@]}"
      run "$tool of the portable kernels" env ATTN_PORTABLE=1 "${check[@]}"
    done
    ;;
  bench)
    for bench in "$here"/bench/*; do
      run "$(basename "$bench")" "$bench" --bench "$@"
    done
    ;;
  *)
    exec "$here/bin/$part" "$@"
    ;;
esac
exit "$failed"
