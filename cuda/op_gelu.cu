// GELU with the error function: y = x * Phi(x), dx = grad * (Phi(x) + x * phi(x)).
#include "gelu.cuh"
#include "row_tiles.cuh"

namespace attn {

struct GeluForward {
  template <int W>
  __device__ __forceinline__ void operator()(int64_t, float (&x)[W], const float (&)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] *= Normal(x[i]).cdf;
  }
};

struct GeluBackward {
  template <int W>
  __device__ __forceinline__ void operator()(int64_t, float (&x)[W],
                                             const float (&grad)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      x[i] = grad[i] * Normal(x[i]).derivative(x[i]);
    }
  }
};

// Both in one pass, for a layer that keeps x alone, and the sums of dx, which are the gradient of the
// bias before.
template <class T, int W>
__global__ void __launch_bounds__(kOpThreads)
    gelu_both_kernel(const T* __restrict__ x, const T* __restrict__ grad, T* __restrict__ y,
                     T* __restrict__ dx, float* __restrict__ partial, int64_t rows,
                     int64_t columns, const RowTiles<W> grid) {
  float sum[W] = {};
  const int64_t column = grid.column();
  if (column < columns) {
#pragma unroll 2
    for (int64_t row = grid.first_row(); row < grid.end_row(rows); row += kRowWarps) {
      const int64_t at = row * columns + column;
      float v[W], g[W];
      load_vec<T, W>(v, x + at);
      load_vec<T, W>(g, grad + at);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const Normal normal(v[j]);
        g[j] *= normal.derivative(v[j]);
        sum[j] += g[j];
        v[j] *= normal.cdf;
      }
      store_vec<T, W>(y + at, v);
      store_vec<T, W>(dx + at, g);
    }
  }
  grid.store_partial(sum, partial, columns);
}

}  // namespace attn

int op_gelu_both(int32_t dtype, const void* x, const void* grad, void* y, void* dx, float* sums,
                 float* partial, int64_t rows, int64_t columns, void* stream) {
  using namespace attn;
  if (columns == 0) return ATTN_OK;
  return for_element(dtype, [&]<class T>() {
    const bool aligned = aligned_to_16({x, grad, y, dx}) && columns % kChunk<T> == 0;
    if (rows > 0) {
      ATTN_RETURN_IF(for_vector<T>(aligned, [&]<int W>() {
        const RowTiles<W> grid(rows, columns);
        return launch(gelu_both_kernel<T, W>, grid.tiles * grid.blocks, kOpThreads, 0, stream,
                      static_cast<const T*>(x), static_cast<const T*>(grad), static_cast<T*>(y),
                      static_cast<T*>(dx), partial, rows, columns, grid);
      }));
    }
    return sum_partials(partial, sums, row_blocks(rows, columns), columns, stream);
  });
}

int op_gelu_fwd(int32_t dtype, const void* x, void* y, int64_t len, void* stream) {
  return attn::map<false>(dtype, x, nullptr, y, len, stream, attn::GeluForward{});
}

int op_gelu_bwd(int32_t dtype, const void* x, const void* grad, void* dx, int64_t len,
                void* stream) {
  return attn::map<true>(dtype, x, grad, dx, len, stream, attn::GeluBackward{});
}
