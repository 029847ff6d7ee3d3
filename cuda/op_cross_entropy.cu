// Cross-entropy of a softmax with labels: loss = mean(lse - logits[label]) over the rows, where lse
// is the log of the sum of exp(logits), and d_logits = (exp(logits - lse) - onehot) * grad / rows.
//
// A block takes a row and reads it once. Rows of an odd vocabulary begin anywhere, so what lies
// before and after the 16-byte boundaries of a row is read one by one.
#include "ops.cuh"

namespace attn {

// The part of a row that can be accessed in chunks: from `head` on, `chunks` of them.
template <class T>
struct RowParts {
  int64_t head, chunks, tail;  // first element of each part, but the number of chunks

  __device__ __forceinline__ RowParts(const T* row, int64_t len) {
    const int64_t before = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
    head = min(before, len);
    chunks = (len - head) / kChunk<T>;
    tail = head + chunks * kChunk<T>;
  }
};

// A running sum of exp(x - max).
struct MaxSum {
  float max = -INFINITY, sum = 0.0f;

  // Factor on sums when their maximum becomes a larger one; also when both are -inf.
  __device__ __forceinline__ static float rescale(float from, float to) {
    return from == to ? 1.0f : exp2_approx((from - to) * kLog2e);
  }

  template <int W>
  __device__ __forceinline__ void add(const float (&x)[W]) {
    float larger = max;
#pragma unroll
    for (int i = 0; i < W; ++i) larger = fmaxf(larger, x[i]);
    sum *= rescale(max, larger);
    max = larger;
    const float base = max == -INFINITY ? 0.0f : max;
#pragma unroll
    for (int i = 0; i < W; ++i) sum += exp2_approx((x[i] - base) * kLog2e);
  }

  __device__ __forceinline__ void merge(const MaxSum& other) {
    const float larger = fmaxf(max, other.max);
    sum = sum * rescale(max, larger) + other.sum * rescale(other.max, larger);
    max = larger;
  }
};

template <class T>
__global__ void __launch_bounds__(kOpThreads)
    cross_entropy_fwd_kernel(const T* __restrict__ logits, const uint32_t* __restrict__ labels,
                             float* __restrict__ lse, float* __restrict__ losses, int64_t vocab) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * vocab;
  const RowParts<T> parts(x, vocab);
  MaxSum total;
  auto add_one = [&](int64_t i) {
    const float v[1] = {to_float(x[i])};
    total.add(v);
  };
  for (int64_t i = threadIdx.x; i < parts.head; i += kOpThreads) add_one(i);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < parts.chunks; i += kOpThreads) {
    float v[kChunk<T>];
    load_vec<T, kChunk<T>>(v, x + parts.head + i * kChunk<T>);
    total.add(v);
  }
  for (int64_t i = parts.tail + threadIdx.x; i < vocab; i += kOpThreads) add_one(i);

#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    MaxSum other;
    other.max = __shfl_down_sync(0xffffffffu, total.max, lanes);
    other.sum = __shfl_down_sync(0xffffffffu, total.sum, lanes);
    total.merge(other);
  }
  __shared__ float maxima[kOpThreads / 32], sums[kOpThreads / 32];
  if (lane_id() == 0) {
    maxima[warp_id()] = total.max;
    sums[warp_id()] = total.sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kOpThreads / 32; ++i) {
    MaxSum other;
    other.max = maxima[i];
    other.sum = sums[i];
    total.merge(other);
  }
  const float result = total.max + logf(total.sum);
  const uint32_t label = labels[row];
  lse[row] = result;
  losses[row] = label < vocab ? result - to_float(x[label]) : NAN;
}

__global__ void __launch_bounds__(kOpThreads)
    mean_kernel(const float* __restrict__ x, float* __restrict__ mean, int64_t len) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < len; i += kOpThreads) sum += x[i];
  __shared__ double sums[kOpThreads];
  sums[threadIdx.x] = sum;
  for (int half = kOpThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *mean = static_cast<float>(sums[0] / len);
}

// kChunks: d_logits has the alignment of logits.
template <class T, bool kChunks>
__global__ void __launch_bounds__(kOpThreads)
    cross_entropy_bwd_kernel(const T* __restrict__ logits, const uint32_t* __restrict__ labels,
                             const float* __restrict__ lse, const float* __restrict__ grad,
                             T* __restrict__ d_logits, int64_t rows, int64_t vocab) {
  const int64_t row = blockIdx.x, label = labels[row];
  const T* x = logits + row * vocab;
  T* d = d_logits + row * vocab;
  const float row_lse = lse[row], scale = *grad / rows;
  auto derivative = [&](int64_t i, float logit) {
    const float p = exp2_approx((logit - row_lse) * kLog2e);
    return (i == label ? p - 1.0f : p) * scale;
  };
  auto write_one = [&](int64_t i) { d[i] = from_float<T>(derivative(i, to_float(x[i]))); };
  if constexpr (kChunks) {
    const RowParts<T> parts(x, vocab);
    for (int64_t i = threadIdx.x; i < parts.head; i += kOpThreads) write_one(i);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < parts.chunks; i += kOpThreads) {
      const int64_t first = parts.head + i * kChunk<T>;
      float v[kChunk<T>];
      load_vec<T, kChunk<T>>(v, x + first);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) v[j] = derivative(first + j, v[j]);
      store_vec<T, kChunk<T>>(d + first, v);
    }
    for (int64_t i = parts.tail + threadIdx.x; i < vocab; i += kOpThreads) write_one(i);
  } else {
    for (int64_t i = threadIdx.x; i < vocab; i += kOpThreads) write_one(i);
  }
}

}  // namespace attn

int op_cross_entropy_fwd(int32_t dtype, const void* logits, const uint32_t* labels, float* lse,
                         float* losses, float* loss, int64_t rows, int64_t vocab, void* stream) {
  using namespace attn;
  if (rows < 1 || vocab < 1) return ATTN_ERR_SIZE;
  ATTN_RETURN_IF(for_element(dtype, [&]<class T>() {
    return launch(cross_entropy_fwd_kernel<T>, rows, kOpThreads, 0, stream,
                  static_cast<const T*>(logits), labels, lse, losses, vocab);
  }));
  return launch(mean_kernel, 1, kOpThreads, 0, stream, losses, loss, rows);
}

int op_cross_entropy_bwd(int32_t dtype, const void* logits, const uint32_t* labels,
                         const float* lse, const float* grad, void* d_logits, int64_t rows,
                         int64_t vocab, void* stream) {
  using namespace attn;
  if (rows < 1 || vocab < 1) return ATTN_ERR_SIZE;
  const bool chunks = reinterpret_cast<uintptr_t>(logits) % 16 ==
                      reinterpret_cast<uintptr_t>(d_logits) % 16;
  return for_element(dtype, [&]<class T>() {
    return launch(chunks ? cross_entropy_bwd_kernel<T, true> : cross_entropy_bwd_kernel<T, false>,
                  rows, kOpThreads, 0, stream, static_cast<const T*>(logits), labels, lse, grad,
                  static_cast<T*>(d_logits), rows, vocab);
  });
}
