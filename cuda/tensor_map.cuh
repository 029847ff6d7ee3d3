// On the host: whether the device is Hopper, and descriptions of tensors to its TMA.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace attn {

// Whether the current device is of compute capability 9.0.
inline bool on_sm90() {
  int device, major, minor;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

// Describes a tensor of 16-bit elements, read in boxes whose rows of 128 bytes are swizzled.
// Dimensions go from the contiguous one outwards; strides, in bytes, leave that out.
template <int kDims>
int encode_tiles(CUtensorMap& map, void* tensor, const cuuint64_t (&dims)[kDims],
                 const cuuint64_t (&strides)[kDims - 1], const cuuint32_t (&box)[kDims]) {
  static const auto encode = [] {
    void* f = nullptr;
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault,
                                     &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  if (encode == nullptr) return cudaErrorSymbolNotFound;
  cuuint32_t steps[kDims];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult code =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kDims, tensor, dims, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? ATTN_OK : static_cast<int>(cudaErrorInvalidValue);
}

// Describes a 16-bit matrix [rows, columns] to the TMA, in boxes of `box_rows` rows, 64 columns.
inline int matrix_map(CUtensorMap& map, const void* matrix, int64_t rows, int64_t columns,
                      int box_rows) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  return encode_tiles<2>(map, const_cast<void*>(matrix), {size(columns), size(rows)},
                         {size(columns * 2)}, {64, static_cast<cuuint32_t>(box_rows)});
}

}  // namespace attn
