// What the training operations share: choice of the element type, vectors of f32, sums over the
// threads of a block, elementwise kernels, and sums of partial results.
//
// These kernels move bytes: each element is read and written once, 16 bytes a thread, with enough
// threads in flight to keep memory busy.
#pragma once

#include "common.cuh"
#include "ops.h"

namespace attn {

constexpr int kOpThreads = 256;

// ---- Dispatch ----------------------------------------------------------------------------------

// Calls f.template operator()<T>() for the element type.
template <class F>
int for_element(int32_t dtype, F&& f) {
  switch (dtype) {
    case ATTN_BF16: return f.template operator()<bf16>();
    case ATTN_F16: return f.template operator()<f16>();
    case ATTN_F32: return f.template operator()<float>();
    default: return ATTN_ERR_DTYPE;
  }
}

// Whether rows are so few that a row is for several warps: with one each, they would leave most of the
// device idle. Results are the same bits either way.
inline bool few_rows(int64_t rows) { return rows <= 512; }

inline bool aligned_to_16(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

// Calls f.template operator()<W>() for the elements of one access: a chunk, or one.
template <class T, class F>
int for_vector(bool aligned, F&& f) {
  return aligned ? f.template operator()<kChunk<T>>() : f.template operator()<1>();
}

// ---- f32 vectors of any width ------------------------------------------------------------------

// W consecutive f32, of which W - 1 or 0 follow a 16-byte boundary.
template <int W>
__device__ __forceinline__ void load_f32(float (&out)[W], const float* src) {
  if constexpr (W == 1) {
    out[0] = *src;
  } else {
    static_assert(W % 4 == 0, "whole 16-byte accesses");
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(src + i);
      out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
    }
  }
}

template <int W>
__device__ __forceinline__ void store_f32(float* dst, const float (&in)[W]) {
  if constexpr (W == 1) {
    *dst = in[0];
  } else {
    static_assert(W % 4 == 0, "whole 16-byte accesses");
#pragma unroll
    for (int i = 0; i < W; i += 4) {
      *reinterpret_cast<float4*>(dst + i) = {in[i], in[i + 1], in[i + 2], in[i + 3]};
    }
  }
}

// ---- Sums over threads -------------------------------------------------------------------------

// The sum over a warp, in all its lanes.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The sum over groups of kGroup threads, in all of them: a warp each, or the block. Those of a lane are
// added in the order of their warps, then lanes: as if a warp alone had the numbers of all.
template <int kGroup>
__device__ __forceinline__ float group_sum(float x) {
  if constexpr (kGroup > 32) {
    constexpr int kWarps = kGroup / 32;
    __shared__ float sums[kWarps][32];
    __syncthreads();  // all have read the last sums
    sums[warp_id()][lane_id()] = x;
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) x += sums[i][lane_id()];
  }
  return warp_sum(x);
}

// ---- Elementwise kernels -----------------------------------------------------------------------

// y = f(i, a, b) for W elements from i on, each an array that f may change; b is absent if null.
template <class T, int W, bool kBinary, class F>
__global__ void __launch_bounds__(kOpThreads)
    map_kernel(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ y, int64_t len,
               F f) {
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kOpThreads + threadIdx.x) * W;
  if (i + W <= len) {
    float x[W], other[W] = {};
    load_vec<T, W>(x, a + i);
    if constexpr (kBinary) load_vec<T, W>(other, b + i);
    f(i, x, other);
    store_vec<T, W>(y + i, x);
    return;
  }
  for (; i < len; ++i) {
    float x[1], other[1] = {};
    load_vec<T, 1>(x, a + i);
    if constexpr (kBinary) load_vec<T, 1>(other, b + i);
    f(i, x, other);
    store_vec<T, 1>(y + i, x);
  }
}

template <bool kBinary, class F>
int map(int32_t dtype, const void* a, const void* b, void* y, int64_t len, void* stream, F f) {
  if (len == 0) return ATTN_OK;
  return for_element(dtype, [&]<class T>() {
    return for_vector<T>(aligned_to_16({a, b, y}), [&]<int W>() {
      const int64_t blocks = (len + kOpThreads * W - 1) / (kOpThreads * W);
      return launch(map_kernel<T, W, kBinary, F>, blocks, kOpThreads, 0, stream,
                    static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(y), len, f);
    });
  });
}

// ---- Sums of partial results -------------------------------------------------------------------

// sums[c] = partial[0][c] + partial[1][c] + ..., a warp for every 32nd row and then in order.
template <class T>
__global__ void __launch_bounds__(1024)
    sum_partials_kernel(const float* __restrict__ partial, T* __restrict__ sums, int64_t rows,
                        int64_t columns) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane_id();
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = warp_id(); row < rows; row += 32) sum += partial[row * columns + column];
  }
  __shared__ float sums_of_warps[32][32];
  sums_of_warps[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() == 0 && column < columns) {
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) sum += sums_of_warps[i][lane_id()];
    sums[column] = from_float<T>(sum);
  }
}

template <class T>
int sum_partials(const float* partial, T* sums, int64_t rows, int64_t columns, void* stream) {
  if (columns == 0) return ATTN_OK;
  return launch(sum_partials_kernel<T>, (columns + 31) / 32, 1024, 0, stream, partial, sums, rows,
                columns);
}

}  // namespace attn
