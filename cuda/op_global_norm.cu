// The norm of many tensors together: blocks sum the squares of pieces, and one block adds these up
// in order.
#include "tensors.cuh"

namespace attn {

constexpr int kNormPiece = 16384;
using NormList = TensorList<OpTensor, 128, kNormPiece>;
static_assert(sizeof(NormList) + 16 <= 4096, "fits the parameters of a launch");

template <class T, int W>
__device__ __forceinline__ float sum_of_squares(const T* __restrict__ x, int64_t len) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t i = threadIdx.x * W; i < len; i += kOpThreads * W) {
    float v[W];
    load_vec<T, W>(v, x + i);
#pragma unroll
    for (int j = 0; j < W; ++j) sum += v[j] * v[j];
  }
  return sum;
}

__global__ void __launch_bounds__(kOpThreads)
    sum_of_squares_kernel(const __grid_constant__ NormList list, float* __restrict__ partial) {
  int64_t begin;
  const OpTensor& tensor = list.find(begin);
  const int64_t len = min(tensor.len - begin, static_cast<int64_t>(kNormPiece));
  float sum = 0.0f;
  for_element_on_device(tensor.dtype, [&]<class T>() {
    const T* x = static_cast<const T*>(tensor.ptr) + begin;
    if (reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      const int64_t chunked = len / kChunk<T> * kChunk<T>;
      sum = sum_of_squares<T, kChunk<T>>(x, chunked) +
            sum_of_squares<T, 1>(x + chunked, len - chunked);
    } else {
      sum = sum_of_squares<T, 1>(x, len);
    }
  });
  sum = group_sum<kOpThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kOpThreads)
    root_of_sum_kernel(const float* __restrict__ partial, float* __restrict__ norm, int64_t len) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < len; i += kOpThreads) sum += partial[i];
  __shared__ double sums[kOpThreads];
  sums[threadIdx.x] = sum;
  for (int half = kOpThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sums[0]));
}

}  // namespace attn

int64_t op_global_norm_partials(const OpTensor* tensors, int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) blocks += attn::NormList::blocks(tensors[i].len);
  return blocks;
}

int op_global_norm(const OpTensor* tensors, int64_t count, float* partial, float* norm,
                   void* stream) {
  using namespace attn;
  for (int64_t i = 0; i < count; ++i) {
    if (!is_dtype(tensors[i].dtype)) return ATTN_ERR_DTYPE;
  }
  float* next = partial;
  ATTN_RETURN_IF(NormList::for_lists(
      tensors, count, [](const OpTensor& tensor) { return tensor.len; },
      [&](const NormList& list, int64_t blocks) {
        float* to = next;
        next += blocks;
        return launch(sum_of_squares_kernel, blocks, kOpThreads, 0, stream, list, to);
      }));
  return launch(root_of_sum_kernel, 1, kOpThreads, 0, stream, partial, norm,
                static_cast<int64_t>(next - partial));
}
