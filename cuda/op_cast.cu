// Conversion of the dtype.
#include "ops.cuh"

namespace attn {

template <class From, class To>
__global__ void __launch_bounds__(kOpThreads)
    cast_kernel(const From* __restrict__ from, To* __restrict__ to, int64_t len, bool aligned) {
  constexpr int W = 8;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kOpThreads + threadIdx.x) * W;
  if (aligned && i + W <= len) {
    constexpr int kFrom = kChunk<From>, kTo = kChunk<To>;
    float x[W];
#pragma unroll
    for (int j = 0; j < W; j += kFrom) {
      float part[kFrom];
      load_vec<From, kFrom>(part, from + i + j);
#pragma unroll
      for (int k = 0; k < kFrom; ++k) x[j + k] = part[k];
    }
#pragma unroll
    for (int j = 0; j < W; j += kTo) {
      float part[kTo];
#pragma unroll
      for (int k = 0; k < kTo; ++k) part[k] = x[j + k];
      store_vec<To, kTo>(to + i + j, part);
    }
    return;
  }
  for (int64_t at = i; at < min(i + W, len); ++at) to[at] = from_float<To>(to_float(from[at]));
}

}  // namespace attn

int op_cast(int32_t from_dtype, const void* from, int32_t to_dtype, void* to, int64_t len,
            void* stream) {
  using namespace attn;
  if (len == 0) return ATTN_OK;
  return for_element(from_dtype, [&]<class From>() {
    return for_element(to_dtype, [&]<class To>() {
      const int64_t blocks = (len + kOpThreads * 8 - 1) / (kOpThreads * 8);
      return launch(cast_kernel<From, To>, blocks, kOpThreads, 0, stream,
                    static_cast<const From*>(from), static_cast<To*>(to), len,
                    aligned_to_16({from, to}));
    });
  });
}
