// What a dense layer needs besides its matrix products: the column sums that are the bias' gradient.
#include "row_tiles.cuh"

namespace attn {

template <class T, int W>
__global__ void __launch_bounds__(kOpThreads)
    column_sum_kernel(const T* __restrict__ x, float* __restrict__ partial, int64_t rows,
                      int64_t columns, const RowTiles<W> grid) {
  float sum[W] = {};
  const int64_t column = grid.column();
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = grid.first_row(); row < grid.end_row(rows); row += kRowWarps) {
      float v[W];
      load_vec<T, W>(v, x + row * columns + column);
#pragma unroll
      for (int i = 0; i < W; ++i) sum[i] += v[i];
    }
  }
  grid.store_partial(sum, partial, columns);
}

}  // namespace attn

int64_t op_column_sum_partials(int64_t rows, int64_t columns) {
  return attn::row_blocks(rows, columns);
}

int op_column_sum(int32_t dtype, const void* x, float* sums, float* partial, int64_t rows,
                  int64_t columns, void* stream) {
  using namespace attn;
  if (columns == 0) return ATTN_OK;
  return for_element(dtype, [&]<class T>() {
    const bool aligned = aligned_to_16({x}) && columns % kChunk<T> == 0;
    if (rows > 0) {
      ATTN_RETURN_IF(for_vector<T>(aligned, [&]<int W>() {
        const RowTiles<W> grid(rows, columns);
        return launch(column_sum_kernel<T, W>, grid.tiles * grid.blocks, kOpThreads, 0, stream,
                      static_cast<const T*>(x), partial, rows, columns, grid);
      }));
    }
    return sum_partials(partial, sums, row_blocks(rows, columns), columns, stream);
  });
}
