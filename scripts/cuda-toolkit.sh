#!/usr/bin/env bash
# Sets up a CUDA 13.0 compiler and what linking needs, from Python wheels, on a machine without a
# CUDA toolkit, GPU or driver. Everything goes to target/cuda/toolkit; then
#
#   source target/cuda/env.sh
#
# lets cargo find it. A machine with a CUDA toolkit needs none of this.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$root/target/cuda
home=$out/toolkit/nvidia/cu13

if ! python3 -m pip --version >/dev/null 2>&1; then
  echo "cuda-toolkit.sh: found no python3 with pip; install both (Debian: apt install python3-pip)" >&2
  exit 1
fi
mkdir -p "$out"
if [ ! -x "$home/bin/nvcc" ]; then
  partial=$out/toolkit.partial
  rm -rf "$partial" "$out/toolkit"
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --target "$partial" \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' \
    'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' \
    'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.0.*'
  mv "$partial" "$out/toolkit"
fi

# The wheels hold libX.so.N; linkers look for libX.so, and nvcc for lib64.
cd "$home"
ln -sfn lib lib64
for lib in lib/lib*.so.*; do
  ln -sf "$(basename "$lib")" "${lib%%.so.*}.so"
done

# libcuda.so comes with a driver. A stub with the names that cuda.h and cudarc know satisfies the
# linker, and lets programs start on a machine without a driver: every function of it returns
# CUDA_ERROR_STUB_LIBRARY.
mkdir -p lib/stubs
sources=(include/cuda.h)
for file in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-*/src/driver/sys/mod.rs; do
  if [ -f "$file" ]; then sources+=("$file"); fi
done
grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "${sources[@]}" | sort -u | sed 's/.*/int &(void) { return 34; }/' > "$out/libcuda.c"
gcc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o lib/stubs/libcuda.so "$out/libcuda.c"
ln -sf libcuda.so lib/stubs/libcuda.so.1
libraries=$home/lib
if ! grep -q 'libcuda\.so\.1' <<<"$(PATH=$PATH:/sbin ldconfig -p)"; then
  libraries=$libraries:$home/lib/stubs
fi

cat > "$out/env.sh" <<END
export CUDA_HOME="$home" CUDA_PATH="$home"
export PATH="$home/bin:\$PATH"
export LD_LIBRARY_PATH="$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000
END
"$home/bin/nvcc" --version | grep release
echo "now run: source $out/env.sh"
