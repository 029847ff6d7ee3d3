// What a dense layer needs besides its matrix products: the column sums that are the bias' gradient.
#include "ops.cuh"

namespace attn {

// A block has 8 warps. A warp's lanes own W columns each of a tile of 32 * W, and its rows are
// every 8th of the block's.
constexpr int kRowWarps = kOpThreads / 32;

template <class T, int W>
__global__ void __launch_bounds__(kOpThreads)
    column_sum_kernel(const T* __restrict__ x, float* __restrict__ partial, int64_t rows,
                      int64_t columns, int64_t tiles, int64_t rows_per_block) {
  const int64_t column = (blockIdx.x % tiles * 32 + lane_id()) * W;
  const int64_t block = blockIdx.x / tiles, first = block * rows_per_block;
  const int64_t end = min(first + rows_per_block, rows);
  float sum[W] = {};
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = first + warp_id(); row < end; row += kRowWarps) {
      float v[W];
      load_vec<T, W>(v, x + row * columns + column);
#pragma unroll
      for (int i = 0; i < W; ++i) sum[i] += v[i];
    }
  }
  __shared__ float sums[kRowWarps][32 * W];
#pragma unroll
  for (int i = 0; i < W; ++i) sums[warp_id()][lane_id() * W + i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * W; i += kOpThreads) {
    const int64_t to = blockIdx.x % tiles * 32 * W + i;
    if (to >= columns) break;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kRowWarps; ++warp) total += sums[warp][i];
    partial[block * columns + to] = total;
  }
}

// Blocks of rows: enough blocks to fill a GPU, but not more partial sums than useful.
inline int64_t row_blocks(int64_t rows, int64_t columns) {
  const int64_t tiles = (columns + 255) / 256;
  const int64_t wanted = (1024 + tiles - 1) / (tiles > 0 ? tiles : 1);
  const int64_t most = (rows + 31) / 32;
  return wanted < most ? wanted : most;
}

template <class T, int W>
struct RowTiles {
  int64_t tiles, blocks, rows_per_block;

  RowTiles(int64_t rows, int64_t columns)
      : tiles((columns + 32 * W - 1) / (32 * W)), blocks(row_blocks(rows, columns)),
        rows_per_block(blocks == 0 ? 0 : (rows + blocks - 1) / blocks) {}
};

}  // namespace attn

int64_t op_column_sum_partials(int64_t rows, int64_t columns) {
  return attn::row_blocks(rows, columns);
}

int op_column_sum(int32_t dtype, const void* x, void* sums, float* partial, int64_t rows,
                  int64_t columns, void* stream) {
  using namespace attn;
  if (columns == 0) return ATTN_OK;
  return for_element(dtype, [&]<class T>() {
    const bool aligned = aligned_to_16({x}) && columns % kChunk<T> == 0;
    if (rows > 0) {
      ATTN_RETURN_IF(for_vector<T>(aligned, [&]<int W>() {
        const RowTiles<T, W> grid(rows, columns);
        return launch(column_sum_kernel<T, W>, grid.tiles * grid.blocks, kOpThreads, 0, stream,
                      static_cast<const T*>(x), partial, rows, columns, grid.tiles,
                      grid.rows_per_block);
      }));
    }
    return sum_partials(partial, static_cast<T*>(sums), row_blocks(rows, columns), columns, stream);
  });
}
