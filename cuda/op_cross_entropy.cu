// Cross-entropy of a softmax with labels: loss = mean(lse - logits[label]) over the rows, where lse
// is the log of the sum of exp(logits), and d_logits = (exp(logits - lse) - onehot) * grad / rows. Both are
// 0 in rows to be ignored.
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

  // Those of a warp together, in its first lane.
  __device__ __forceinline__ void merge_warp() {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      MaxSum other;
      other.max = __shfl_down_sync(0xffffffffu, max, lanes);
      other.sum = __shfl_down_sync(0xffffffffu, sum, lanes);
      merge(other);
    }
  }
};

// The log of the sum of exp(x) over a row, in all threads of the block.
template <class T, int kThreads>
__device__ __forceinline__ float row_lse(const T* x, int64_t vocab) {
  const RowParts<T> parts(x, vocab);
  MaxSum total;
  auto add_one = [&](int64_t i) {
    const float v[1] = {to_float(x[i])};
    total.add(v);
  };
  for (int64_t i = threadIdx.x; i < parts.head; i += kThreads) add_one(i);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < parts.chunks; i += kThreads) {
    float v[kChunk<T>];
    load_vec<T, kChunk<T>>(v, x + parts.head + i * kChunk<T>);
    total.add(v);
  }
  for (int64_t i = parts.tail + threadIdx.x; i < vocab; i += kThreads) add_one(i);

  constexpr int kWarps = kThreads / 32;
  __shared__ float maxima[kWarps], sums[kWarps], lse;
  total.merge_warp();
  if (lane_id() == 0) {
    maxima[warp_id()] = total.max;
    sums[warp_id()] = total.sum;
  }
  __syncthreads();
  if (warp_id() == 0) {
    MaxSum of_warp;
    if (lane_id() < kWarps) {
      of_warp.max = maxima[lane_id()];
      of_warp.sum = sums[lane_id()];
    }
    of_warp.merge_warp();
    if (lane_id() == 0) lse = of_warp.max + logf(of_warp.sum);
  }
  __syncthreads();
  return lse;
}

// d = (exp(x - lse) - onehot(label)) * scale over a row. d may be x; it has the alignment of x if
// kChunks.
template <class T, int kThreads, bool kChunks>
__device__ __forceinline__ void write_derivatives(const T* x, T* d, int64_t label, float lse,
                                                  float scale, int64_t vocab) {
  auto derivative = [&](int64_t i, float logit) {
    if (scale == 0.0f) return 0.0f;  // also where logits are not finite
    const float p = exp2_approx((logit - lse) * kLog2e);
    return (i == label ? p - 1.0f : p) * scale;
  };
  auto write_one = [&](int64_t i) { d[i] = from_float<T>(derivative(i, to_float(x[i]))); };
  if constexpr (kChunks) {
    const RowParts<T> parts(x, vocab);
    for (int64_t i = threadIdx.x; i < parts.head; i += kThreads) write_one(i);
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < parts.chunks; i += kThreads) {
      const int64_t first = parts.head + i * kChunk<T>;
      float v[kChunk<T>];
      load_vec<T, kChunk<T>>(v, x + first);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) v[j] = derivative(first + j, v[j]);
      store_vec<T, kChunk<T>>(d + first, v);
    }
    for (int64_t i = parts.tail + threadIdx.x; i < vocab; i += kThreads) write_one(i);
  } else {
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads) write_one(i);
  }
}

template <class T>
__global__ void __launch_bounds__(kOpThreads)
    cross_entropy_fwd_kernel(const T* __restrict__ logits, const uint32_t* __restrict__ labels,
                             float* __restrict__ lse, float* __restrict__ losses, int64_t vocab) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * vocab;
  const float result = row_lse<T, kOpThreads>(x, vocab);
  if (threadIdx.x != 0) return;
  const uint32_t label = labels[row];
  lse[row] = result;
  losses[row] = label == OP_IGNORED ? 0.0f : label < vocab ? result - to_float(x[label]) : NAN;
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
  const int64_t row = blockIdx.x;
  const float scale = labels[row] == OP_IGNORED ? 0.0f : *grad / rows;
  write_derivatives<T, kOpThreads, kChunks>(logits + row * vocab, d_logits + row * vocab,
                                            labels[row], lse[row], scale, vocab);
}

// So many that the few rows a multiprocessor works on stay in its L1 cache for the second pass.
constexpr int kInPlaceThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kInPlaceThreads)
    cross_entropy_in_place_kernel(T* logits, const uint32_t* __restrict__ labels,
                                  float* __restrict__ losses, int64_t vocab) {
  const int64_t row = blockIdx.x, label = labels[row];
  T* x = logits + row * vocab;
  // Read before the barrier in row_lse, after which threads begin to write.
  const float logit = label < vocab ? to_float(x[label]) : NAN;
  const float lse = row_lse<T, kInPlaceThreads>(x, vocab);
  const bool ignored = label == OP_IGNORED;
  if (threadIdx.x == 0) losses[row] = ignored ? 0.0f : lse - logit;
  write_derivatives<T, kInPlaceThreads, true>(x, x, label, lse, ignored ? 0.0f : 1.0f, vocab);
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

int op_cross_entropy_in_place(int32_t dtype, void* logits, const uint32_t* labels, float* losses,
                              int64_t rows, int64_t vocab, void* stream) {
  using namespace attn;
  if (rows < 1 || vocab < 1) return ATTN_ERR_SIZE;
  return for_element(dtype, [&]<class T>() {
    return launch(cross_entropy_in_place_kernel<T>, rows, kInPlaceThreads, 0, stream,
                  static_cast<T*>(logits), labels, losses, vocab);
  });
}
