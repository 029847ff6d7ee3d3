// Layer normalisation. A row belongs to a group of threads, which keeps it in registers: a warp up
// to 1024 columns, a block up to 8192, and a block always where rows are not aligned. In the forward, few
// rows of up to 1024 columns are for a block each too, of which a thread has one vector: sums are added in
// the same order.
//
//   forward:  y = (x - mean) * rstd * weight + bias; mean and rstd are kept
//   backward, with n = (x - mean) * rstd and g = grad * weight:
//     dx = rstd * (g - mean(g) - n * mean(g * n))
//     dweight = sum over rows of grad * n, dbias = sum over rows of grad, and the sum of dx, which
//     is the gradient of a bias before: a thread adds up its columns over the rows of its group,
//     the groups of a block add theirs in order to one partial
//     sum, and a second kernel adds those in order.
#include "ops.cuh"

namespace attn {

constexpr int kRowElements = 32;  // of a row, at most, held by one thread
constexpr int kMaxPartials = 396;  // three blocks on each of 132 SMs: what registers allow

template <int kGroup>
constexpr int kNormThreads = kGroup > 128 ? kGroup : 128;

// Rows of a block at a time.
template <int kGroup>
constexpr int kNormRows = kNormThreads<kGroup> / kGroup;

// The columns of one thread: kVectors times W of them, kGroup * W apart. kElements is kRowElements, or
// less where the threads of a row need hold no more, so that registers suffice for more of them.
template <int W, int kGroup, int kElements>
struct Columns {
  static constexpr int kVectors = kElements / W;

  // The first column of vector i; the row ends before it or after all of it.
  __device__ __forceinline__ static int at(int i) {
    return (i * kGroup + threadIdx.x % kGroup) * W;
  }
};

template <class X, class Y, int W, int kGroup, int kElements>
__global__ void __launch_bounds__(kNormThreads<kGroup>)
    layer_norm_fwd_kernel(const X* __restrict__ x, const float* __restrict__ weight,
                          const float* __restrict__ bias, Y* __restrict__ y,
                          float* __restrict__ stats, int64_t rows, int width, float eps) {
  using C = Columns<W, kGroup, kElements>;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kNormRows<kGroup> + threadIdx.x / kGroup;
  if (row >= rows) return;  // whole groups
  x += row * width;
  y += row * width;

  float v[C::kVectors][W] = {};
#pragma unroll
  for (int i = 0; i < C::kVectors; ++i) {
    if (C::at(i) < width) load_vec<X, W>(v[i], x + C::at(i));
  }
  // Of one vector there are registers for these while the row is waited for.
  constexpr bool kAhead = C::kVectors == 1;
  float w[W], b[W];
  auto load_parameters = [&](int i) {
    load_f32<W>(w, weight + C::at(i));
    load_f32<W>(b, bias + C::at(i));
  };
  if (kAhead && C::at(0) < width) load_parameters(0);

  // Vector by vector, and so in the same order whoever holds them.
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kVectors; ++i) {
    float part = 0.0f;
#pragma unroll
    for (int j = 0; j < W; ++j) part += v[i][j];
    sum += part;
  }
  const float mean = group_sum<kGroup>(sum) / width;

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kVectors; ++i) {
    if (C::at(i) >= width) break;
    float part = 0.0f;
#pragma unroll
    for (int j = 0; j < W; ++j) part += (v[i][j] - mean) * (v[i][j] - mean);
    squares += part;
  }
  const float rstd = rsqrtf(group_sum<kGroup>(squares) / width + eps);

#pragma unroll
  for (int i = 0; i < C::kVectors; ++i) {
    if (C::at(i) >= width) break;
    if (!kAhead) load_parameters(i);
#pragma unroll
    for (int j = 0; j < W; ++j) v[i][j] = (v[i][j] - mean) * rstd * w[j] + b[j];
    store_vec<Y, W>(y + C::at(i), v[i]);
  }
  if (threadIdx.x % kGroup == 0) {
    stats[2 * row] = mean;
    stats[2 * row + 1] = rstd;
  }
}

template <class X, class Y, int W, int kGroup, int kElements>
__global__ void __launch_bounds__(kNormThreads<kGroup>)
    layer_norm_bwd_kernel(const X* __restrict__ x, const float* __restrict__ weight,
                          const Y* __restrict__ grad, const float* __restrict__ stats,
                          X* __restrict__ dx, float* __restrict__ partial, int64_t rows,
                          int width) {
  using C = Columns<W, kGroup, kElements>;
  constexpr int kRows = kNormRows<kGroup>;
  float d_weight[C::kVectors][W] = {}, d_bias[C::kVectors][W] = {}, sum_dx[C::kVectors][W] = {};

  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kGroup; row < rows;
       row += static_cast<int64_t>(gridDim.x) * kRows) {
    const X* x_row = x + row * width;
    const Y* grad_row = grad + row * width;
    const float mean = stats[2 * row], rstd = stats[2 * row + 1];
    float n[C::kVectors][W], g[C::kVectors][W];
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i) {
      if (C::at(i) >= width) break;
      load_vec<X, W>(n[i], x_row + C::at(i));
      load_vec<Y, W>(g[i], grad_row + C::at(i));
    }
    float sum_g = 0.0f, sum_gn = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i) {
      if (C::at(i) >= width) break;
      float w[W];
      load_f32<W>(w, weight + C::at(i));
#pragma unroll
      for (int j = 0; j < W; ++j) {
        n[i][j] = (n[i][j] - mean) * rstd;
        d_weight[i][j] += g[i][j] * n[i][j];
        d_bias[i][j] += g[i][j];
        g[i][j] *= w[j];
        sum_g += g[i][j];
        sum_gn += g[i][j] * n[i][j];
      }
    }
    const float mean_g = group_sum<kGroup>(sum_g) / width;
    const float mean_gn = group_sum<kGroup>(sum_gn) / width;
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i) {
      if (C::at(i) >= width) break;
#pragma unroll
      for (int j = 0; j < W; ++j) {
        n[i][j] = rstd * (g[i][j] - mean_g - n[i][j] * mean_gn);
        sum_dx[i][j] += n[i][j];
      }
      store_vec<X, W>(dx + row * width + C::at(i), n[i]);
    }
  }

  // Group after group adds its sums to those of the block.
  extern __shared__ __align__(16) float block_sums[];  // [3][width]
  float* sums = kRows == 1 ? partial + static_cast<int64_t>(blockIdx.x) * 3 * width : block_sums;
  for (int group = 0; group < kRows; ++group) {
    if (threadIdx.x / kGroup == group) {
#pragma unroll
      for (int i = 0; i < C::kVectors; ++i) {
        if (C::at(i) >= width) break;
        auto add = [&](float* to, const float (&x)[W]) {
          float before[W] = {};
          if (group > 0) load_f32<W>(before, to);
#pragma unroll
          for (int j = 0; j < W; ++j) before[j] += x[j];
          store_f32<W>(to, before);
        };
        add(sums + C::at(i), d_weight[i]);
        add(sums + width + C::at(i), d_bias[i]);
        add(sums + 2 * width + C::at(i), sum_dx[i]);
      }
    }
    __syncthreads();
  }
  if constexpr (kRows > 1) {
    float* to = partial + static_cast<int64_t>(blockIdx.x) * 3 * width;
    for (int i = threadIdx.x; i < 3 * width; i += kNormThreads<kGroup>) to[i] = block_sums[i];
  }
}

// Calls f.template operator()<X, Y>() for the element types of x and y: the same, or f32 and a narrow one.
template <class F>
int for_elements(int32_t x_dtype, int32_t y_dtype, F&& f) {
  return for_element(x_dtype, [&]<class X>() -> int {
    if (y_dtype == x_dtype) return f.template operator()<X, X>();
    if constexpr (std::is_same_v<X, float>) {
      if (y_dtype == ATTN_BF16) return f.template operator()<X, bf16>();
      if (y_dtype == ATTN_F16) return f.template operator()<X, f16>();
    }
    return ATTN_ERR_DTYPE;
  });
}

// Calls f.template operator()<kGroup, kElements>() for the threads of a row and what each holds.
template <int W, class F>
int for_width(int64_t width, F&& f) {
  if (width < 1 || width > OP_LAYER_NORM_MAX_WIDTH) return ATTN_ERR_SIZE;
  static_assert(256 * kRowElements == OP_LAYER_NORM_MAX_WIDTH, "the widest group");
  constexpr int kQuarter = kRowElements / 4;
  if constexpr (W == 1) {
    // One by one, elements take most code: fewer for each of more threads.
    if (width <= 32 * kRowElements) return f.template operator()<32 * 4, kQuarter>();
    return f.template operator()<256 * 4, kQuarter>();
  } else {
    if (width <= 32 * kQuarter) return f.template operator()<32, kQuarter>();
    if (width <= 32 * kQuarter * 2) return f.template operator()<32, kQuarter * 2>();
    if (width <= 32 * kQuarter * 3) return f.template operator()<32, kQuarter * 3>();
    if (width <= 32 * kRowElements) return f.template operator()<32, kRowElements>();
    if (width <= 256 * kQuarter) return f.template operator()<256, kQuarter>();
    if (width <= 256 * kQuarter * 2) return f.template operator()<256, kQuarter * 2>();
    return f.template operator()<256, kRowElements>();
  }
}

// Blocks of the backward.
inline int64_t norm_partials(int64_t rows, int64_t width) {
  const int64_t rows_of_block = width <= 32 * kRowElements ? kNormRows<32> : kNormRows<256>;
  const int64_t blocks = (rows + rows_of_block - 1) / rows_of_block;
  return blocks < kMaxPartials ? blocks : kMaxPartials;
}

}  // namespace attn

int64_t op_layer_norm_partials(int64_t rows, int64_t width) {
  return attn::norm_partials(rows, width);
}

int op_layer_norm_fwd(int32_t x_dtype, const void* x, const float* weight, const float* bias,
                      int32_t y_dtype, void* y, float* stats, int64_t rows, int64_t width, float eps,
                      void* stream) {
  using namespace attn;
  if (rows == 0) return ATTN_OK;
  return for_elements(x_dtype, y_dtype, [&]<class X, class Y>() {
    const bool aligned = aligned_to_16({x, weight, bias, y}) && width % kChunk<X> == 0;
    return for_vector<X>(aligned, [&]<int W>() {
      auto norm = [&]<int kGroup, int kElements>() {
        const int64_t blocks = (rows + kNormRows<kGroup> - 1) / kNormRows<kGroup>;
        return launch(layer_norm_fwd_kernel<X, Y, W, kGroup, kElements>, blocks,
                      kNormThreads<kGroup>, 0, stream,
                      static_cast<const X*>(x), weight, bias, static_cast<Y*>(y),
                      stats, rows, static_cast<int>(width), eps);
      };
      if constexpr (W > 1) {
        constexpr int kGroup = 32 * kRowElements / W;
        if (few_rows(rows) && width > 32 * W && width <= kGroup * W) {
          return norm.template operator()<kGroup, W>();
        }
      }
      return for_width<W>(width, norm);
    });
  });
}

int op_layer_norm_bwd(int32_t x_dtype, const void* x, const float* weight, int32_t grad_dtype,
                      const void* grad, const float* stats, void* dx, float* sums, float* partial,
                      int64_t rows, int64_t width, void* stream) {
  using namespace attn;
  const int64_t partials = norm_partials(rows, width);
  if (rows > 0) {
    ATTN_RETURN_IF(for_elements(x_dtype, grad_dtype, [&]<class X, class Y>() {
      const bool aligned = aligned_to_16({x, weight, grad, dx, partial}) && width % kChunk<X> == 0;
      return for_vector<X>(aligned, [&]<int W>() {
        return for_width<W>(width, [&]<int kGroup, int kElements>() {
          const size_t smem = kNormRows<kGroup> > 1 ? 3 * width * sizeof(float) : 0;
          return launch(layer_norm_bwd_kernel<X, Y, W, kGroup, kElements>, partials,
                        kNormThreads<kGroup>, smem,
                        stream, static_cast<const X*>(x), weight, static_cast<const Y*>(grad),
                        stats, static_cast<X*>(dx), partial, rows,
                        static_cast<int>(width));
        });
      });
    }));
  }
  return sum_partials(partial, sums, partials, 3 * width, stream);
}
