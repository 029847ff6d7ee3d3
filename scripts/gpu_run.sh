#!/usr/bin/env bash
# Runs parts of a bundle made by scripts/gpu_bundle.sh:
#
#   run.sh PART...          some of
#     tests                 the Rust tests, which fail if they find no GPU; those of operations once more
#                           with products by our own kernels also where others are faster
#     kernels               check_kernels.py: the kernels against PyTorch (needs PyTorch), on Hopper
#                           also the portable ones
#     sanitizer             compute-sanitizer's four tools over a short table of the same
#     speed                 check_kernels.py --bench
#     benches               the Rust benchmarks
#   run.sh PROGRAM ARGS...  a program of bin/, such as pretrain
#
# CUDA's libraries are taken from $CUDA_HOME or /usr/local/cuda. Exit code 1 if anything fails.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export LD_LIBRARY_PATH=${CUDA_HOME:-/usr/local/cuda}/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
failed=0

# run NAME COMMAND...
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

check() {
  run "$1" "${@:2}" python3 "$here/check_kernels.py" "$here/libattn.so"
}

sanitizer() {
  # Without PyTorch's cache of memory, reads of what was freed or never written are seen.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck synccheck; do
    local only=(--kernel-name kernel_substring=attn)
    # It must see PyTorch's kernels write the inputs.
    if [ "$tool" = initcheck ]; then only=(); fi
    local command=(compute-sanitizer --tool "$tool" --error-exitcode 1 "${only[@]}"
      python3 "$here/check_kernels.py" "$here/libattn.so" --sanitize)
    run "$tool" "${command[@]}"
    run "$tool of the portable kernels" env ATTN_PORTABLE=1 "${command[@]}"
  done
}

if [ $# -eq 0 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 2
fi
if [ -x "$here/bin/$1" ]; then
  exec "$here/bin/$1" "${@:2}"
fi
for part in "$@"; do
  case $part in
    tests)
      for test in "$here"/tests/*; do
        run "$(basename "$test")" env REQUIRE_CUDA=1 "$test" --nocapture
      done
      run "ops at every size" env REQUIRE_CUDA=1 ATTN_EVERY_SIZE=1 "$here/tests/ops" --nocapture cuda
      ;;
    kernels)
      check kernels env
      check "portable kernels" env ATTN_PORTABLE=1
      ;;
    sanitizer) sanitizer ;;
    speed) run speed python3 "$here/check_kernels.py" "$here/libattn.so" --bench ;;
    benches)
      for bench in "$here"/bench/*; do run "$(basename "$bench")" "$bench" --bench; done
      ;;
    *)
      echo "run.sh: no part or program named $part" >&2
      exit 2
      ;;
  esac
done
exit "$failed"
