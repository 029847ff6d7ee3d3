// Sums of columns on the way through a matrix: tiles of columns by blocks of rows.
#pragma once

#include "ops.cuh"

namespace attn {

// A block has 8 warps. A warp's lanes own W columns each of a tile of 32 * W, and its rows are
// every 8th of the block's.
constexpr int kRowWarps = kOpThreads / 32;

// Blocks of rows: enough blocks to fill a GPU, but not more partial sums than useful.
inline int64_t row_blocks(int64_t rows, int64_t columns) {
  const int64_t tiles = (columns + 255) / 256;
  const int64_t wanted = (1024 + tiles - 1) / (tiles > 0 ? tiles : 1);
  const int64_t most = (rows + 31) / 32;
  return wanted < most ? wanted : most;
}

template <int W>
struct RowTiles {
  int64_t tiles, blocks, rows_per_block;

  RowTiles(int64_t rows, int64_t columns)
      : tiles((columns + 32 * W - 1) / (32 * W)), blocks(row_blocks(rows, columns)),
        rows_per_block(blocks == 0 ? 0 : (rows + blocks - 1) / blocks) {}

  // The first column of a thread, and its rows.
  __device__ __forceinline__ int64_t column() const {
    return (blockIdx.x % tiles * 32 + lane_id()) * W;
  }
  __device__ __forceinline__ int64_t first_row() const {
    return blockIdx.x / tiles * rows_per_block + warp_id();
  }
  __device__ __forceinline__ int64_t end_row(int64_t rows) const {
    return min(static_cast<int64_t>(blockIdx.x) / tiles * rows_per_block + rows_per_block, rows);
  }

  // Adds the sums of the block's warps and stores them as its row of partial [blocks, columns].
  __device__ __forceinline__ void store_partial(const float (&sum)[W], float* partial,
                                                int64_t columns) const {
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
      partial[blockIdx.x / tiles * columns + to] = total;
    }
  }
};

}  // namespace attn
