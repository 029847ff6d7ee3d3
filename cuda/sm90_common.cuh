// What the Hopper kernels of both directions share: descriptions of tensors, the launch, and operations
// on tiles and accumulators.
#pragma once

#include <algorithm>

#include "hopper.cuh"
#include "sm90.cuh"

namespace attn {

// Calls f.template operator()<T, D>() for the element type and head_dim.
template <class F>
int for_sm90(const AttnParams& p, F&& f) {
  const auto for_width = [&]<class T>() {
    return p.head_dim == 64 ? f.template operator()<T, 64>() : f.template operator()<T, 128>();
  };
  return p.dtype == ATTN_BF16 ? for_width.template operator()<bf16>()
                              : for_width.template operator()<f16>();
}

// Describes a 16-bit tensor to the TMA, in boxes of `rows` rows and 64 columns of one head, with
// dimensions (column, head, row, batch).
inline int tile_map(const AttnParams& p, const AttnTensor& t, int rows, CUtensorMap& map) {
  const bool packed = p.cu_seqlens != nullptr;
  const auto dim = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t dims[] = {dim(p.head_dim), dim(p.num_heads),
                             dim(packed ? p.total_tokens : p.seqlen), dim(packed ? 1 : p.batch)};
  // An axis of one entry may come with any stride, 0 among them.
  const auto bytes = [&](int64_t stride, int axis) {
    return dim(dims[axis] == 1 ? 16 : stride * 2);
  };
  const cuuint64_t strides[] = {bytes(t.head_stride, 1), bytes(t.row_stride, 2),
                                bytes(t.batch_stride, 3)};
  const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(rows), 1};
  return encode_tiles(map, t.ptr, dims, strides, box);
}

// ---- Launch --------------------------------------------------------------------------------------

constexpr int kMostMultiprocessors = 144;  // of any device of compute capability 9.0

// At most `blocks` thread blocks; negative: too many to count.
template <class Kernel, class Params>
int launch_persistent(Kernel kernel, int blocks, int threads, size_t smem, const Params& p) {
  if (blocks < 0) return ATTN_ERR_SIZE;
  int device, count;
  ATTN_RETURN_IF(cudaGetDevice(&device));
  ATTN_RETURN_IF(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  blocks = std::min({count, kMostMultiprocessors, blocks});
  return launch(kernel, blocks, threads, smem, p.stream, p);
}

// ---- Tiles and accumulators --------------------------------------------------------------------

namespace hopper {

// Flattens accumulators for wgmma.
template <int NT>
__device__ __forceinline__ float (&flat(float (&s)[NT][4]))[NT * 4] {
  return reinterpret_cast<float(&)[NT * 4]>(s);
}

// The angles of a warpgroup's 64 rows of a tile, read before the tile is there.
template <class T, int D, int kRows>
struct TileAngles {
  static constexpr int W = 8, kUnits = D / 2 / W, kSteps = 64 * kUnits / 128;
  Rope::Turn<W> turns[kSteps];

  // The first row is at position pos0. Rows from `end` on, which is above 0, get any angles.
  __device__ __forceinline__ void load(const Rope& rope, int pos0, int end) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int index = threadIdx.x % 128 + 128 * i;
      const int pos = min(pos0 + index / kUnits, end - 1);
      turns[i] = Rope::Turn<W>(rope, pos, index % kUnits * W, false);
    }
  }

  // Rotates the rows from row0 on in place, and writes the first `count` of them also to the rows
  // of `out` (a [*, D] matrix) unless that is null.
  __device__ __forceinline__ void rotate(T* tile, const Rope& rope, int row0, T* out,
                                         int64_t row_stride, int count) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int index = threadIdx.x % 128 + 128 * i;
      const int row = index / kUnits, pair0 = index % kUnits * W;
      const int column[] = {rope.column(pair0, 0, W), rope.column(pair0, 1, W)};
      float x[2][W];
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        load_vec<T, W>(x[run], tile + swizzled<kRows>(row0 + row, column[run]));
      }
      turns[i].apply(x);
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        store_vec<T, W>(tile + swizzled<kRows>(row0 + row, column[run]), x[run]);
        if (out != nullptr && row < count) {
          store_vec<T, W>(out + row * row_stride + column[run], x[run]);
        }
      }
    }
  }
};

// Zeroes those of a tile's rows row0 to row0 + count (keys k0 and on) that are padding and so may
// hold anything: 0 * NaN must not reach a result. A warpgroup together; mask is null or the
// sequence's.
template <class T, int D, int kRows>
__device__ __forceinline__ void zero_padding(T* tile, int row0, int count, const uint8_t* mask,
                                             int key_end, int k0) {
  for (int r = threadIdx.x % 128; r < count; r += 128) {
    if (k0 + r < key_end && (mask == nullptr || mask[k0 + r] != 0)) continue;
#pragma unroll
    for (int col = 0; col < D; col += 8) {
      *reinterpret_cast<uint4*>(tile + swizzled<kRows>(row0 + r, col)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Sets x to `value` outside columns lo[h] to hi[h] of a thread's row h, and in columns whose
// `valid` (may be null) is 0. Columns count from `column0`, which is that of x[0]; `valid` has all
// below every hi.
template <int NT>
__device__ __forceinline__ void mask_tile(float (&x)[NT][4], const int (&lo)[2], const int (&hi)[2],
                                          const uint8_t* valid, int column0, float value) {
  const int lane = lane_id();
#pragma unroll
  for (int w = 0; w < NT / 4; ++w) {
    const int base = column0 + 32 * w;
    uint32_t all = ~0u;
    if (valid != nullptr) {
      const int end = __reduce_max_sync(~0u, max(hi[0], hi[1]));
      all = __ballot_sync(~0u, base + lane < end && valid[base + lane] != 0);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int first = max(lo[h] - base, 0), end = min(hi[h] - base, 32);
      uint32_t bits = first < end ? all >> first << first : 0;
      bits = bits << (32 - max(end, 1)) >> (32 - max(end, 1)) >> lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!(bits >> (i / 2 * 8 + i % 2) & 1)) x[4 * w + i / 2][2 * h + i % 2] = value;
      }
    }
  }
}

// Rounds accumulators to the A operands of the next product.
template <class T, int K, int NT>
__device__ __forceinline__ void to_operand(uint32_t (&a)[K][4], const float (&s)[NT][4]) {
  static_assert(NT == 2 * K, "16 columns an operand");
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[k][i] = pack<T>(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]);
    }
  }
}

// Rotates accumulators back, in f32. A thread's first row is row `row` of the angles, tiles of kRows
// rows whose D / 2 numbers lie as D elements of 16 bits would.
template <int D, int kRows>
__device__ __forceinline__ void rotate_back(float (&x)[D / 8][4], const void* cos, const void* sin,
                                            int row, bool interleaved) {
  const int t = lane_id() % 4;
  asm volatile("" : "+r"(row));  // or addresses would be kept through the caller's loop
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    auto turn = [&](float& a, float& b, int pair) {
      const unsigned entry = swizzled<kRows>(row + 8 * h, 2 * pair) / 2;
      const float c = static_cast<const float*>(cos)[entry];
      const float s = static_cast<const float*>(sin)[entry];
      const float ra = a * c + b * s;
      b = b * c - a * s;
      a = ra;
    };
    if (interleaved) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) turn(x[n][2 * h], x[n][2 * h + 1], 4 * n + t);
    } else {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const int n = i / 2, e = i % 2;
        turn(x[n][2 * h + e], x[n + D / 16][2 * h + e], 8 * n + 2 * t + e);
      }
    }
  }
}

// Of lanes that hold parts of the same sums, 4, 8 and 16 apart, each gives another one half of its
// parts for that one's of the other half, and so on: in the end each lane has an eighth of the sums.
template <int kHalf, int kLanes, int N>
__device__ __forceinline__ void share_sums(float (&sum)[N][2], int lane) {
  const bool upper = (lane & kLanes) != 0;
#pragma unroll
  for (int n = 0; n < kHalf; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float give = upper ? sum[n][e] : sum[n + kHalf][e];
      const float keep = upper ? sum[n + kHalf][e] : sum[n][e];
      sum[n][e] = keep + __shfl_xor_sync(~0u, give, kLanes);
    }
  }
  if constexpr (kLanes > 4) share_sums<kHalf / 2, kLanes / 2>(sum, lane);
}

// Adds scale times the sums of the columns of a warp's 16 rows from row0 on, but not from `end` on,
// to `to`, which no other warp writes.
template <int D>
__device__ __forceinline__ void add_column_sums(const float (&x)[D / 8][4], int row0, int end,
                                                float scale, float* to) {
  const int lane = lane_id(), row = row0 + lane / 4;
  float sum[D / 8][2];
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      sum[n][e] = (row < end ? x[n][e] : 0.0f) + (row + 8 < end ? x[n][2 + e] : 0.0f);
    }
  }
  share_sums<D / 16, 16>(sum, lane);
#pragma unroll
  for (int n = 0; n < D / 64; ++n) {
    const int column = 8 * (lane / 4 * (D / 64) + n) + lane % 4 * 2;
    add_to_global(to + column, sum[n][0] * scale, sum[n][1] * scale);
  }
}

// Writes accumulators of 16 rows, row h of a thread's two times factor[h], to rows row0 .. of out
// (a [*, D] matrix), except rows from end on, by way of the warp's own rows of a tile in shared
// memory.
template <class T, int D, int kRows>
__device__ __forceinline__ void store_rows(T* tile, int tile_row, const float (&x)[D / 8][4],
                                           const float (&factor)[2], T* out, int64_t row_stride,
                                           int row0, int end) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    stmatrix(smem_address(tile + swizzled<kRows>(tile_row + lane % 16, n * 8 + lane / 16 * 8)),
             pack<T>(x[n][0] * factor[0], x[n][1] * factor[0]),
             pack<T>(x[n][2] * factor[1], x[n][3] * factor[1]),
             pack<T>(x[n + 1][0] * factor[0], x[n + 1][1] * factor[0]),
             pack<T>(x[n + 1][2] * factor[1], x[n + 1][3] * factor[1]));
  }
  __syncwarp();
  constexpr int kLanes = D / 8, kStep = 32 / kLanes;  // lanes of a row, rows of a pass
#pragma unroll
  for (int r = 0; r < 16; r += kStep) {
    const int row = r + lane / kLanes, col = lane % kLanes * 8;
    const uint4 chunk =
        *reinterpret_cast<const uint4*>(tile + swizzled<kRows>(tile_row + row, col));
    if (row0 + row < end) {
      *reinterpret_cast<uint4*>(out + (row0 + row) * row_stride + col) = chunk;
    }
  }
}

}  // namespace hopper
}  // namespace attn
