// Matrix products of a transformer with what comes after them in the epilogue, on Hopper.
//
//   gelu:          pre = x w^T + bias; y = gelu(pre)
//   gelu backward: d = dy w2; dx = d * gelu'(pre); y = gelu(pre); sums of dx over rows
//   rope:          y = x w^T + bias, of which the columns of q and k are rotated
//
//   two thread blocks make a cluster; clusters are persistent and take pairs of tiles in turn, all
//   columns of two row blocks first; of a pair [2 * 128 x 256], each block, for its tile:
//     one producer thread:
//       for each 64 columns of the summed dimension, into a ring of stages:
//         load its own 128 rows of the left operand, and half of the 256 columns of the right one,
//         for both blocks (TMA multicast)
//     two multiplying warpgroups, 64 rows each:
//       sum = left right (wgmma), plus the bias that the finishing warp left in shared memory
//       each warp leaves its 16 rows, rounded, in shared memory
//     eight finishing warps, one for each that multiplies:
//       leave the bias; gelu backward: read pre ahead; rope: find the rows' positions
//       for each row, 8 columns a lane: apply the epilogue, and write 512 contiguous bytes
//       gelu backward: add dx up over a warp's rows, then over warps, into partial
//
// Why so; us of gelu and its backward for 32768 rows, inner 768, columns 3072 in bf16 on one H100,
// where a product by cuBLAS takes 224, GELU of its own 136, and its backward with y and sums 311:
//   1. GELU runs beside the next tile's product, in warps of its own: they see a row-major matrix,
//      16 bytes at a time. What they get is rounded, which pre has to be anyway, and d is by a
//      product of its own too. Without any finishing: 223 forward, 211 backward.
//   2. The right operand shared in a cluster: a block takes 32 KB from L2 for 2 * 128 * 256 * 64
//      operations, 128 a byte. Of clusters of 4, an H100 holds fewer than 32.
//   3. What tells the cluster that a stage is free releases nothing to it: .release.cluster is a
//      fence of global memory. 422, 430 -> 333, 382.
//   4. Reading pre 4 rows ahead, not 2: 382 -> 370. Reciprocals that expect no denormals, and
//      stores that expect no reader: 333, 370 -> 307, 339.
//   5. Few rows go to cuBLAS, which splits them further: of 128 rows, gelu takes 17.5 here and 6.3 +
//      2.6 there, rope 21 and 6.2 + the rotation (ncu, one H200).
//   6. The bias by way of the finishing warps, not read from device memory between two tiles: rope
//      217 -> 200, gelu 322 -> 313 (one H200; cuBLAS' products 195 and 266).
// Of no use: pre or dx written by the TMA (320, 356 -> 323, 394), pre fetched to L2 a tile ahead
// (339 -> 366), one half of the columns after the other. m64n256 needs 154 registers a thread, more
// than a block of five warpgroups starts with, and the compiler then refuses it.
//
// What bounds it is power: repeated for a second at 700 W, the clock falls to 1600 MHz, and times
// are 351 and 389, where cuBLAS' products take 265 (at 1400 MHz), GELU 138 and its backward 314.
#include <algorithm>
#include <cstdlib>

#include "gelu.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "ops.cuh"
#include "tensor_map.cuh"

namespace attn {

using namespace hopper;

constexpr int kBlocks = 2;  // of a cluster
constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kStages = 3;
constexpr int kWarps = kTileM / 16;  // that multiply; as many finish
constexpr int kGemmThreads = 2 * kWarps * 32 + 128;
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
constexpr int kMultiplyRegisters = 160, kFinishRegisters = 64, kProduceRegisters = 24;

struct GemmParams {
  CUtensorMap left, right;
  const void* bias;  // [columns]; null in the backward, and maybe for rope
  void* pre;         // [rows, columns], as dx and y; gelu without a backward has none
  void* dx;
  void* y;
  float* partial;  // gelu backward: [row blocks, columns]
  // rope: the angles of columns below rotated_columns, in heads of head_dim; where sequences begin,
  // or null if each has seqlen rows.
  Rope rope = Rope::none();
  const int32_t* cu_seqlens;
  int sequences, seqlen, head_dim, rotated_columns;
  int rows, columns;
  int steps;         // of kTileK along the summed dimension
  int column_tiles;  // of kTileN
  int tiles;         // of kBlocks * kTileM rows each
};

template <class T>
struct GemmShared {
  T left[kStages][kTileM * kTileK], right[kStages][kTileN * kTileK];
  T staged[kWarps][16 * kTileN];  // a warp's rows on their way to the finishing warp
  float column_values[kWarps][kTileN];  // for a warp the bias, or of it the sums of its rows
  Barrier full[kStages], empty[kStages], staged_full[kWarps];
  Barrier staged_ready[kWarps];  // the rows before were read, and the tile's bias is there

  __device__ __forceinline__ static GemmShared& get() {
    extern __shared__ __align__(1024) char smem[];
    return *reinterpret_cast<GemmShared*>(smem);
  }
};

// The tile that a thread block works on.
struct GemmTile {
  int index, row0, column0;

  __device__ __forceinline__ explicit GemmTile(const GemmParams& p) : index(blockIdx.x / kBlocks) {
    locate(p);
  }
  __device__ __forceinline__ bool valid(const GemmParams& p) const { return index < p.tiles; }
  __device__ __forceinline__ void next(const GemmParams& p) {
    index += gridDim.x / kBlocks;
    locate(p);
  }

 private:
  __device__ __forceinline__ void locate(const GemmParams& p) {
    row0 = (index / p.column_tiles * kBlocks + blockIdx.x % kBlocks) * kTileM;
    column0 = index % p.column_tiles * kTileN;
  }
};

template <class T, class Epilogue>
__device__ __forceinline__ void produce(const GemmParams& p) {
  auto& shared = GemmShared<T>::get();
  constexpr int kHalf = kTileN / kBlocks;
  constexpr uint16_t kAllBlocks = (1 << kBlocks) - 1;
  const int first = blockIdx.x % kBlocks * kHalf;  // column of the tile that this block loads
  Ring<kStages> ring;
  for (GemmTile tile(p); tile.valid(p); tile.next(p)) {
    for (int step = 0; step < p.steps; ++step) {
      Barrier* const full = shared.full + ring.stage;
      T* const right = shared.right[ring.stage] + first * kTileK;
      wait(shared.empty + ring.stage, ring.parity ^ 1);
      arrive_expect(full, kStageBytes);
      tma_load(shared.left[ring.stage], p.left, full, step * kTileK, tile.row0);
      if constexpr (Epilogue::kSummedRows) {
#pragma unroll
        for (int c = 0; c < kHalf; c += 64) {
          tma_multicast(right + c * kTileK, p.right, full, tile.column0 + first + c, step * kTileK,
                        kAllBlocks);
        }
      } else {
        tma_multicast(right, p.right, full, step * kTileK, tile.column0 + first, kAllBlocks);
      }
      ring.next();
    }
  }
}

template <class T, class Epilogue>
__device__ __forceinline__ void multiply(const GemmParams& p) {
  auto& shared = GemmShared<T>::get();
  const int warp = __shfl_sync(~0u, warp_id(), 0), group = warp / 4, lane = lane_id();
  T* const staged = shared.staged[warp];
  Ring<kStages> ring;
  Ring<1> staged_ring;
  float sum[2][kTileN / 4];  // of each half of the columns
  // Tells all blocks of the cluster, as all write to this stage.
  auto release = [&](int stage) {
    if (lane < kBlocks) arrive(shared.empty + stage, lane);
  };

  for (GemmTile tile(p); tile.valid(p); tile.next(p)) {
    int last = 0;
    for (int step = 0; step < p.steps; ++step) {
      wait(shared.full + ring.stage, ring.parity);
      const uint32_t left = descriptor(shared.left[ring.stage] + group * 64 * kTileK);
      const uint32_t right =
          descriptor(shared.right[ring.stage], Epilogue::kSummedRows ? kTileK * 128 : 16);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTileK / 16; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int right_offset =
              half * kTileN / 2 * 128 + k * (Epilogue::kSummedRows ? 16 * 128 : 32);
          wgmma<T, false, Epilogue::kSummedRows>(sum[half], advance(left, k * 32),
                                                 advance(right, right_offset), step + k != 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(last);
      last = ring.stage;
      ring.next();
    }
    wgmma_wait<0>();
    pin(sum[0]);
    pin(sum[1]);
    release(last);

    wait(shared.staged_ready + warp, staged_ring.parity);
#pragma unroll
    for (int n = 0; n < kTileN / 8; n += 2) {
      float* const x = sum[n / (kTileN / 16)] + n % (kTileN / 16) * 4;
      if constexpr (Epilogue::kBias) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
          const float2 bias = *reinterpret_cast<const float2*>(
              shared.column_values[warp] + n * 8 + 2 * i + lane % 4 * 2);
          x[i] += bias.x;
          x[i + 1] += bias.y;
          x[i + 2] += bias.x;
          x[i + 3] += bias.y;
        }
      }
      stmatrix(smem_address(staged + swizzled<16>(lane % 16, n * 8 + lane / 16 * 8)),
               pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
               pack<T>(x[6], x[7]));
    }
    __syncwarp();
    if (lane == 0) arrive(shared.staged_full + warp);
    staged_ring.next();
  }
}

// Elements of one 16-byte access, and back.
template <class T>
__device__ __forceinline__ void unpack(float (&to)[8], const uint4& from) {
  const T* const x = reinterpret_cast<const T*>(&from);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = to_float(x[i]);
}
template <class T>
__device__ __forceinline__ uint4 packed(const float (&x)[8]) {
  return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]),
                    pack<T>(x[6], x[7]));
}
template <class T>
__device__ __forceinline__ void store(uint4* to, const float (&x)[8]) {
  __stcs(to, packed<T>(x));
}

// What a finishing warp has of a tile: 16 rows, 8 columns a lane.
template <class T>
struct FinishRows {
  int warp, lane;
  int row0, column;  // of the matrix
  int count;         // rows that exist
  int64_t first;     // element of the matrix
  const T* staged;

  __device__ __forceinline__ FinishRows(const GemmParams& p, const GemmTile& tile, int warp)
      : warp(warp), lane(lane_id()), row0(tile.row0 + warp * 16), column(tile.column0 + lane * 8),
        count(column < p.columns ? min(p.rows - row0, 16) : 0),
        first(int64_t{row0} * p.columns + column),
        staged(GemmShared<T>::get().staged[warp]) {}

  // Leaves the bias, or zeros, where the multiplying warp finds it at the end of the tile.
  __device__ __forceinline__ void stage_bias(const GemmParams& p) const {
    float x[8] = {};
    if (p.bias != nullptr && column < p.columns) {
      unpack<T>(x, __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(p.bias) + column)));
    }
    store_f32(GemmShared<T>::get().column_values[warp] + lane * 8, x);
  }

  // This lane's part of a row of one of the matrices [rows, columns].
  __device__ __forceinline__ uint4* at(const GemmParams& p, void* matrix, int row) const {
    return reinterpret_cast<uint4*>(static_cast<T*>(matrix) + first + int64_t{row} * p.columns);
  }
  // The sums of 8 columns from the lane's first on, or that many further.
  __device__ __forceinline__ uint4 sums(int row, int further = 0) const {
    return *reinterpret_cast<const uint4*>(staged + swizzled<16>(row, lane * 8 + further));
  }
};

// An epilogue is made before the sums of a tile are there, takes row after row of them, and ends
// the tile. With kSummedRows the right operand is [summed, columns], else [columns, summed].
// With kBias, p.bias (zeros if it is null) is added to the sums.
template <class T, bool kKeepPre>
struct GeluEpilogue {
  static constexpr bool kSummedRows = false;
  static constexpr bool kBias = true;
  static constexpr int kUnroll = 1;

  __device__ __forceinline__ GeluEpilogue(const GemmParams&, const FinishRows<T>&) {}

  __device__ __forceinline__ void row(const GemmParams& p, const FinishRows<T>& rows, int row) {
    const uint4 pre = rows.sums(row);
    float x[8];
    unpack<T>(x, pre);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= Normal(x[i]).cdf;
    if (row < rows.count) {
      if constexpr (kKeepPre) __stcs(rows.at(p, p.pre, row), pre);
      store<T>(rows.at(p, p.y, row), x);
    }
  }

  __device__ __forceinline__ void end(const GemmParams&, const GemmTile&, const FinishRows<T>&) {}
};

template <class T>
using GeluKeepEpilogue = GeluEpilogue<T, true>;
template <class T>
using GeluOnlyEpilogue = GeluEpilogue<T, false>;

template <class T>
struct GeluBackwardEpilogue {
  static constexpr bool kSummedRows = true;
  static constexpr bool kBias = false;
  static constexpr int kAhead = 4, kUnroll = kAhead;  // rows of pre that are on their way

  uint4 ahead[kAhead];
  float column_sums[8] = {};

  __device__ __forceinline__ GeluBackwardEpilogue(const GemmParams& p, const FinishRows<T>& rows) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = read(p, rows, i);
  }

  __device__ __forceinline__ static uint4 read(const GemmParams& p, const FinishRows<T>& rows,
                                               int row) {
    return row < rows.count ? __ldcs(rows.at(p, p.pre, row)) : uint4{};
  }

  __device__ __forceinline__ void row(const GemmParams& p, const FinishRows<T>& rows, int row) {
    float x[8], d[8];
    unpack<T>(x, ahead[row % kAhead]);
    unpack<T>(d, rows.sums(row));
    ahead[row % kAhead] = read(p, rows, row + kAhead);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Normal normal(x[i]);
      d[i] *= normal.derivative(x[i]);
      column_sums[i] += d[i];
      x[i] *= normal.cdf;
    }
    if (row < rows.count) {
      store<T>(rows.at(p, p.dx, row), d);
      store<T>(rows.at(p, p.y, row), x);
    }
  }

  // Rows from p.rows on are zeros in the left operand, so that their d and dx are too.
  __device__ __forceinline__ void end(const GemmParams& p, const GemmTile& tile,
                                      const FinishRows<T>& rows) {
    static_assert(kWarps * 32 == kTileN, "a finishing thread sums a column");
    auto& shared = GemmShared<T>::get();
    store_f32(shared.column_values[rows.warp] + rows.lane * 8, column_sums);
    sync_group(1, kWarps * 32);
    const int thread = rows.warp * 32 + rows.lane;
    if (tile.row0 < p.rows && tile.column0 + thread < p.columns) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += shared.column_values[w][thread];
      p.partial[int64_t{tile.row0 / kTileM} * p.columns + tile.column0 + thread] = total;
    }
    sync_group(1, kWarps * 32);
  }
};

// Columns of a head lie in one tile, and a lane's 8 in one half of it.
template <class T>
struct RotateEpilogue {
  static constexpr bool kSummedRows = false;
  static constexpr bool kBias = true;
  static constexpr int kUnroll = 2;

  int position;  // of row lane % 16
  bool rotates, second_half;
  int pair0;

  __device__ __forceinline__ RotateEpilogue(const GemmParams& p, const FinishRows<T>& rows)
      : position(find_position(p, min(rows.row0 + rows.lane % 16, p.rows - 1))),
        rotates(rows.column < p.rotated_columns) {
    const int column = rows.column % p.head_dim;
    second_half = column >= p.rope.half;
    pair0 = p.rope.interleaved ? column / 2 : column % p.rope.half;
  }

  // Of a row in its sequence: the last one that begins at the row or before.
  __device__ __forceinline__ static int find_position(const GemmParams& p, int row) {
    if (p.cu_seqlens == nullptr) return row % p.seqlen;
    int low = 0, high = p.sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (__ldg(p.cu_seqlens + middle) <= row ? low : high) = middle;
    }
    return row - __ldg(p.cu_seqlens + low);
  }

  __device__ __forceinline__ void row(const GemmParams& p, const FinishRows<T>& rows, int row) {
    const int pos = __shfl_sync(~0u, position, row);
    uint4 sums = rows.sums(row);
    if (rotates) {
      float x[8];
      unpack<T>(x, sums);
      if (p.rope.interleaved) {
        const Rope::Turn<4> turn(p.rope, pos, pair0, false);
        turn.apply(reinterpret_cast<float(&)[2][4]>(x));
      } else {
        const Rope::Turn<8> turn(p.rope, pos, pair0, !second_half);
        float other[8];
        unpack<T>(other, rows.sums(row, second_half ? -p.rope.half : p.rope.half));
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = x[i] * turn.cos[i] + other[i] * turn.sin[i];
      }
      sums = packed<T>(x);
    }
    if (row < rows.count) *rows.at(p, p.y, row) = sums;
  }

  __device__ __forceinline__ void end(const GemmParams&, const GemmTile&, const FinishRows<T>&) {}
};

template <class T, class Epilogue>
__device__ __forceinline__ void finish(const GemmParams& p) {
  auto& shared = GemmShared<T>::get();
  const int warp = __shfl_sync(~0u, warp_id(), 0) - kWarps;
  Ring<1> ring;
  for (GemmTile tile(p); tile.valid(p); tile.next(p)) {
    const FinishRows<T> rows(p, tile, warp);
    if constexpr (Epilogue::kBias) rows.stage_bias(p);
    __syncwarp();
    if (rows.lane == 0) arrive(shared.staged_ready + warp);
    Epilogue epilogue(p, rows);
    wait(shared.staged_full + warp, ring.parity);
#pragma unroll Epilogue::kUnroll
    for (int row = 0; row < 16; ++row) epilogue.row(p, rows, row);
    ring.next();
    epilogue.end(p, tile, rows);
  }
}

template <class T, template <class> class Epilogue>
__global__ void __cluster_dims__(kBlocks) __launch_bounds__(kGemmThreads, 1)
    gemm_kernel(const __grid_constant__ GemmParams p) {
  auto& shared = GemmShared<T>::get();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(shared.full + i, 1);
      init_barrier(shared.empty + i, kBlocks * kWarps);
    }
    for (int i = 0; i < kWarps; ++i) {
      init_barrier(shared.staged_full + i, 1);
      init_barrier(shared.staged_ready + i, 1);
    }
    fence_barrier_init();
  }
  sync_cluster();
  const int group = threadIdx.x / 128;
  if (group < 2) {
    take_registers<kMultiplyRegisters>();
    multiply<T, Epilogue<T>>(p);
  } else if (group < 4) {
    give_registers<kFinishRegisters>();
    finish<T, Epilogue<T>>(p);
  } else {
    give_registers<kProduceRegisters>();
    if (threadIdx.x % 128 == 0) produce<T, Epilogue<T>>(p);
  }
  __syncwarp();
  sync_cluster();  // no block may end while the other one signals to it
}

// Of kBlocks * kTileM rows each.
inline int64_t gemm_tiles(int rows, int columns) {
  return int64_t{ceil_div(rows, kBlocks * kTileM)} * ceil_div(columns, kTileN);
}

template <class T, template <class> class Epilogue>
int gemm(GemmParams& p, const void* left, const void* right, int64_t inner, void* stream) {
  if (!aligned_to_16({left, right, p.bias, p.pre, p.dx, p.y})) return cudaErrorMisalignedAddress;
  ATTN_RETURN_IF(matrix_map(p.left, left, p.rows, inner, kTileM));
  ATTN_RETURN_IF(Epilogue<T>::kSummedRows
                     ? matrix_map(p.right, right, inner, p.columns, kTileK)
                     : matrix_map(p.right, right, p.columns, inner, kTileN / kBlocks));
  p.steps = ceil_div(static_cast<int>(inner), kTileK);
  p.column_tiles = ceil_div(p.columns, kTileN);
  p.tiles = static_cast<int>(gemm_tiles(p.rows, p.columns));
  int device, processors;
  ATTN_RETURN_IF(cudaGetDevice(&device));
  ATTN_RETURN_IF(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return launch(gemm_kernel<T, Epilogue>, std::min(processors / kBlocks, p.tiles) * kBlocks,
                kGemmThreads, sizeof(GemmShared<T>), stream, p);
}

template <template <class> class Epilogue>
int gemm(int32_t dtype, GemmParams& p, const void* left, const void* right, int64_t inner,
         void* stream) {
  return dtype == ATTN_BF16 ? gemm<bf16, Epilogue>(p, left, right, inner, stream)
                            : gemm<f16, Epilogue>(p, left, right, inner, stream);
}

// Whether two thirds of the clusters or more get a tile: for fewer, separate kernels are estimated to take
// less than the time of a tile. The environment variable ATTN_EVERY_SIZE says yes, for tests.
inline bool fills_device(int rows, int columns) {
  int device, processors;
  return std::getenv("ATTN_EVERY_SIZE") != nullptr ||
         (cudaGetDevice(&device) == cudaSuccess &&
          cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) ==
              cudaSuccess &&
          gemm_tiles(rows, columns) * 3 >= processors / kBlocks * 2);
}

inline int64_t qkv_columns(const AttnParams& p) { return int64_t{3} * p.num_heads * p.head_dim; }

}  // namespace attn

int op_gemm_suits(int32_t dtype, int64_t rows, int64_t inner, int64_t columns) {
  constexpr int64_t kMost = 1 << 30;
  return (dtype == ATTN_BF16 || dtype == ATTN_F16) && rows > 0 && rows <= kMost && inner > 0 &&
         inner <= kMost && columns > 0 && columns <= kMost && inner % 64 == 0 &&
         columns % 64 == 0 && rows / 256 * (columns / 256) <= kMost && attn::on_sm90() &&
         std::getenv("ATTN_PORTABLE") == nullptr &&
         attn::fills_device(static_cast<int>(rows), static_cast<int>(columns));
}

int op_gemm_gelu(int32_t dtype, const void* x, const void* weight, const void* bias, void* pre,
                 void* y, int64_t rows, int64_t inner, int64_t columns, void* stream) {
  if (bias == nullptr) return ATTN_ERR_NULL;
  if (!op_gemm_suits(dtype, rows, inner, columns)) return ATTN_ERR_SIZE;
  attn::GemmParams p = {};
  p.bias = bias;
  p.pre = pre;
  p.y = y;
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  return pre == nullptr ? attn::gemm<attn::GeluOnlyEpilogue>(dtype, p, x, weight, inner, stream)
                        : attn::gemm<attn::GeluKeepEpilogue>(dtype, p, x, weight, inner, stream);
}

int64_t op_gemm_gelu_partials(int64_t rows) {
  return (rows + attn::kTileM - 1) / attn::kTileM;
}

int op_gemm_gelu_bwd(int32_t dtype, const void* dy, const void* weight, const void* pre, void* dx,
                     void* y, float* sums, float* partial, int64_t rows, int64_t inner,
                     int64_t columns, void* stream) {
  if (!op_gemm_suits(dtype, rows, inner, columns)) return ATTN_ERR_SIZE;
  attn::GemmParams p = {};
  p.pre = const_cast<void*>(pre);
  p.dx = dx;
  p.y = y;
  p.partial = partial;
  p.rows = static_cast<int>(rows);
  p.columns = static_cast<int>(columns);
  ATTN_RETURN_IF(attn::gemm<attn::GeluBackwardEpilogue>(dtype, p, dy, weight, inner, stream));
  return attn::sum_partials(partial, sums, op_gemm_gelu_partials(rows), columns, stream);
}

int op_gemm_rope_suits(const AttnParams* params, int64_t inner) {
  const int head_dim = params->head_dim;
  return head_dim >= 16 && attn::kTileN % head_dim == 0 && params->total_tokens <= 1 << 30 &&
         attn::rope_vec<attn::bf16>(*params) &&
         op_gemm_suits(params->dtype, params->total_tokens, inner, attn::qkv_columns(*params));
}

int op_gemm_rope(const AttnParams* params, const void* x, const void* weight, const void* bias,
                 int64_t inner) {
  ATTN_RETURN_IF(attn::check(params, {params->q.ptr, params->rope_cos, params->rope_sin}));
  if (attn::empty(*params)) return ATTN_OK;
  if (!op_gemm_rope_suits(params, inner)) return ATTN_ERR_SIZE;
  attn::GemmParams p = {};
  p.bias = bias;
  p.y = params->q.ptr;
  p.rope = attn::Rope(*params);
  p.cu_seqlens = params->cu_seqlens;
  p.sequences = params->batch;
  p.seqlen = params->seqlen;
  p.head_dim = params->head_dim;
  p.rows = static_cast<int>(params->total_tokens);
  p.columns = static_cast<int>(attn::qkv_columns(*params));
  p.rotated_columns = p.columns / 3 * 2;
  return attn::gemm<attn::RotateEpilogue>(params->dtype, p, x, weight, inner, params->stream);
}
