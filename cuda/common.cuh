// What both directions share: element types, shared-memory tiles, asynchronous loads, tensor-core
// fragments, and the two matrix products that attention is made of.
//
// Everything here exists on sm_80 and later: mma.sync, ldmatrix, cp.async.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "attn_params.h"

namespace attn {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMaxHeadDim = 256;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// 2^x; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Elements ----------------------------------------------------------------------------------

// Elements of one 16-byte access.
template <class T>
constexpr int kChunk = 16 / sizeof(T);

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }

// W elements of one access: a chunk, or half of one.
template <class T, int W>
using Packed = std::conditional_t<W == kChunk<T>, uint4, uint2>;

// W consecutive elements, in one access.
template <class T, int W>
__device__ __forceinline__ void load_vec(float (&out)[W], const T* src) {
  if constexpr (W == 1) {
    out[0] = to_float(*src);
  } else {
    static_assert(sizeof(Packed<T, W>) == W * sizeof(T), "one element, a chunk, or half of one");
    const auto raw = *reinterpret_cast<const Packed<T, W>*>(src);
    const T* x = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < W; ++i) out[i] = to_float(x[i]);
  }
}

template <class T, int W>
__device__ __forceinline__ void store_vec(T* dst, const float (&in)[W]) {
  if constexpr (W == 1) {
    *dst = from_float<T>(in[0]);
  } else {
    Packed<T, W> raw;
    static_assert(sizeof(raw) == W * sizeof(T), "one element, a chunk, or half of one");
    T* x = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] = from_float<T>(in[i]);
    *reinterpret_cast<Packed<T, W>*>(dst) = raw;
  }
}

// ---- Tensors in device memory ------------------------------------------------------------------

// Element (row 0, column 0) of one head of one sequence that begins at token `first_row`
// (0 unless the batch is packed by cu_seqlens).
template <class T>
__device__ __forceinline__ T* head_ptr(const AttnTensor& t, int batch, int head,
                                       int64_t first_row) {
  return static_cast<T*>(t.ptr) + batch * t.batch_stride + first_row * t.row_stride +
         head * t.head_stride;
}

// Every row of every head starts on a 16-byte boundary.
template <class T>
inline bool aligned(const AttnTensor& t) {
  return reinterpret_cast<uintptr_t>(t.ptr) % 16 == 0 && t.batch_stride % kChunk<T> == 0 &&
         t.row_stride % kChunk<T> == 0 && t.head_stride % kChunk<T> == 0;
}

// ---- Shared-memory tiles -----------------------------------------------------------------------

// A row-major tile [rows][D]. The 16-byte chunks of a row are permuted by an exclusive or with the
// row number, so that the 8 rows of one ldmatrix fall into 8 different groups of banks.
template <class T, int D>
__device__ __forceinline__ unsigned swizzle_key(unsigned row) {
  constexpr int kChunks = D / kChunk<T>;
  static_assert(kChunks % 4 == 0, "the permutation stays inside groups of 4 or 8 chunks");
  return kChunks % 8 == 0 ? row % 8 : row / 2 % 4;
}

template <class T, int D>
__device__ __forceinline__ unsigned tile_offset(unsigned row, unsigned col) {
  const unsigned chunk = (col / kChunk<T>) ^ swizzle_key<T, D>(row);
  return row * D + chunk * kChunk<T> + col % kChunk<T>;
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies kBytes in the background, or writes zeros when !valid (src is then not read).
template <int kBytes>
__device__ __forceinline__ void cp_async(void* dst, const void* src, bool valid) {
  const int size = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_address(dst)), "l"(src),
                 "r"(size));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem_address(dst)), "l"(src),
                 "n"(kBytes), "r"(size));
  }
}

// Waits until this thread's copies have landed; a barrier must follow before others read them.
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads tiles [kRows][D] of a [*, head_dim] matrix, all threads of a block together. Rows from
// row_end on, rows whose key_mask byte is 0, and columns from head_dim on become zero without being
// read: 0 * NaN must not reach a result.
template <class T, int D, int kRows, int kThreads>
struct TileLoader {
  // A thread owns one chunk column and every kStep-th row.
  static constexpr int kChunks = D / kChunk<T>;
  static constexpr int kLanes = kChunks <= 4    ? 4
                                : kChunks <= 8  ? 8
                                : kChunks <= 16 ? 16
                                : kChunks <= 32 ? 32
                                                : 64;
  static constexpr int kStep = kThreads / kLanes;
  static_assert(kThreads % kLanes == 0 && kRows % kStep == 0, "whole passes");

  const T* src;
  const uint8_t* key_mask;
  int64_t stride;
  int row_end, head_dim;
  bool vec;
  int first;  // this thread's first row of a tile; beyond all tiles if its column is outside

  __device__ __forceinline__ TileLoader(const T* src, int64_t stride, int row_end, int head_dim,
                                        bool vec, const uint8_t* key_mask = nullptr)
      : src(src), key_mask(key_mask), stride(stride), row_end(row_end), head_dim(head_dim),
        vec(vec) {
    first = column() < min(head_dim, D) ? threadIdx.x / kLanes : 1 << 30;
  }

  // Starts loading rows row0 .. row0 + kRows.
  __device__ __forceinline__ void load(T* tile, int row0) const {
    if (vec && key_mask == nullptr) {
      const unsigned r0 = threadIdx.x / kLanes;
      const T* row = src + (row0 + static_cast<int>(r0)) * stride + column();
      const int rows = row_end - row0;
      if (kLanes != kChunks && column() >= D) return;
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        cp_async<16>(tile + tile_offset<T, D>(r0 + i * kStep, column()), row,
                     first + i * kStep < rows);
        row += kStep * stride;
      }
    } else {
      load_slowly(tile, row0);
    }
  }

 private:
  __device__ __forceinline__ static unsigned column() {
    return threadIdx.x % kLanes * kChunk<T>;
  }

  // Chunks one by one because of the mask, or elements one by one because rows are unaligned.
  __device__ __forceinline__ void load_slowly(T* tile, int row0) const {
    const unsigned width = vec ? kChunk<T> : 1, columns = D / width;
#pragma unroll 1
    for (unsigned index = threadIdx.x; index < kRows * columns; index += kThreads) {
      const unsigned r = index / columns, col = index % columns * width;
      const int row = row0 + static_cast<int>(r);
      bool valid = row < row_end && col < head_dim;
      if (key_mask != nullptr && valid) valid = key_mask[row] != 0;
      const T* from = src + row * stride + col;
      T* to = tile + tile_offset<T, D>(r, col);
      if (vec) {
        cp_async<16>(to, valid ? from : src, valid);
      } else {
        *to = valid ? *from : from_float<T>(0.0f);
      }
    }
  }
};

// ---- Tensor-core fragments ---------------------------------------------------------------------

// One warp multiplies A [16 x K] by B [K x 8] into f32 C [16 x 8], K = 16 for 16-bit elements.
// With g = lane / 4 and t = lane % 4, a thread holds C at rows {g, g + 8}, columns {2t, 2t + 1}:
// c[0], c[1] in row g and c[2], c[3] in row g + 8.
//
// f32 elements use tf32 instructions with K = 8. Their A and B want k indices {t, t + 4}; as the
// order of a sum is free, we let these mean k = {2t, 2t + 1}, which makes A's layout C's layout.
template <class T>
struct Fragment {
  static constexpr int kK = sizeof(T) == 2 ? 16 : 8;
  uint32_t x[4];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

// The address of row row0 + lane_row, chunk chunk0 + lane_chunk, for row0 a multiple of 8, chunk0
// even and lane_chunk 0 or 1. Written so that what depends on the lane stays in a few registers and
// the rest becomes immediate offsets.
template <class T, int D>
__device__ __forceinline__ uint32_t lane_address(const T* tile, int row0, int chunk0,
                                                 unsigned lane_row, unsigned lane_chunk) {
  const unsigned chunk = lane_chunk ^ swizzle_key<T, D>(lane_row) ^ chunk0;
  return smem_address(tile) + lane_row * D * sizeof(T) + chunk * 16 + row0 * D * sizeof(T);
}

__device__ __forceinline__ void ldmatrix(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row));
}

__device__ __forceinline__ void ldmatrix_trans(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row));
}

// A = tile[row0 .. +16][col0 .. +kK].
template <class T, int D>
__device__ __forceinline__ void load_a(Fragment<T>& f, const T* tile, int row0, int col0) {
  const unsigned lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    ldmatrix(f.x, lane_address<T, D>(tile, row0, col0 / 8, lane % 16, lane / 16));
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint2 v = *reinterpret_cast<const uint2*>(
          tile + tile_offset<T, D>(row0 + lane / 4 + 8 * h, col0 + lane % 4 * 2));
      f.x[h] = v.x;
      f.x[2 + h] = v.y;
    }
  }
}

// Two B operands, each [kK x 8], from a tile that holds B transposed:
// B = tile[n0 .. +16][k0 .. +kK]^T; x[0..2] for the first 8 columns, x[2..4] for the next.
template <class T, int D>
__device__ __forceinline__ void load_b_trans(Fragment<T>& f, const T* tile, int n0, int k0) {
  const unsigned lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    ldmatrix(f.x,
             lane_address<T, D>(tile, n0, k0 / 8, lane % 8 + lane / 16 * 8, lane / 8 % 2));
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint2 v = *reinterpret_cast<const uint2*>(
          tile + tile_offset<T, D>(n0 + lane / 4 + 8 * h, k0 + lane % 4 * 2));
      f.x[2 * h] = v.x;
      f.x[2 * h + 1] = v.y;
    }
  }
}

// Two B operands from a tile that holds B as it is: B = tile[k0 .. +kK][n0 .. +16].
template <class T, int D>
__device__ __forceinline__ void load_b(Fragment<T>& f, const T* tile, int k0, int n0) {
  const unsigned lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    ldmatrix_trans(f.x, lane_address<T, D>(tile, k0, n0 / 8, lane % 16, lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.x[i] = __float_as_uint(
          tile[tile_offset<T, D>(k0 + lane % 4 * 2 + i % 2, n0 + lane / 4 + i / 2 * 8)]);
    }
  }
}

// The 16 x 8*NT accumulators of one product as the A operands of the next.
template <class T, int NT>
__device__ __forceinline__ void to_a(Fragment<T> (&f)[NT * 8 / Fragment<T>::kK],
                                     const float (&c)[NT][4]) {
#pragma unroll
  for (int k = 0; k < NT * 8 / Fragment<T>::kK; ++k) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float lo = c[2 * k + i / 2][i % 2 * 2], hi = c[2 * k + i / 2][i % 2 * 2 + 1];
        if constexpr (std::is_same_v<T, bf16>) {
          asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(f[k].x[i]) : "f"(hi), "f"(lo));
        } else {
          asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(f[k].x[i]) : "f"(hi), "f"(lo));
        }
      }
    } else {
      f[k].x[0] = __float_as_uint(c[k][0]);
      f[k].x[1] = __float_as_uint(c[k][2]);
      f[k].x[2] = __float_as_uint(c[k][1]);
      f[k].x[3] = __float_as_uint(c[k][3]);
    }
  }
}

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x = hi + lo with both in tf32, to 21 bits or more.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& hi, uint32_t& lo) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(hi) : "f"(__uint_as_float(x)));
  const float rest = __uint_as_float(x) - __uint_as_float(hi);
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(lo) : "f"(rest));
}

// C += A * B for half (0 or 1) of a pair of B operands.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const Fragment<T>& a, const Fragment<T>& b,
                                    int half) {
  const uint32_t b0 = b.x[2 * half], b1 = b.x[2 * half + 1];
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<T, f16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
  } else {
    // 3xTF32: the products of the high halves and the two mixed ones; the rest is below f32.
    uint32_t a_hi[4], a_lo[4], b_hi[2], b_lo[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(a.x[i], a_hi[i], a_lo[i]);
    split_tf32(b0, b_hi[0], b_lo[0]);
    split_tf32(b1, b_hi[1], b_lo[1]);
    mma_tf32(c, a_lo, b_hi[0], b_hi[1]);
    mma_tf32(c, a_hi, b_lo[0], b_lo[1]);
    mma_tf32(c, a_hi, b_hi[0], b_hi[1]);
  }
}

// MT * 16 rows of a tile [*][D] as A operands: kept in registers if kKeep, else read again from
// shared memory by every product.
template <class T, int D, int MT, bool kKeep>
struct RowOperand {
  static constexpr int kSteps = D / Fragment<T>::kK;
  Fragment<T> kept[kKeep ? kSteps : 1][MT];
  const T* tile;
  int row0;

  // The tile must have landed.
  __device__ __forceinline__ RowOperand(const T* tile, int row0) : tile(tile), row0(row0) {
    if constexpr (kKeep) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) load(kept[k], k);
    }
  }

  // Columns k * kK .. + kK.
  __device__ __forceinline__ void get(Fragment<T> (&f)[MT], int k) const {
    if constexpr (kKeep) {
#pragma unroll
      for (int m = 0; m < MT; ++m) f[m] = kept[k][m];
    } else {
      load(f, k);
    }
  }

 private:
  __device__ __forceinline__ void load(Fragment<T> (&f)[MT], int k) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) load_a<T, D>(f[m], tile, row0 + 16 * m, k * Fragment<T>::kK);
  }
};

// acc[MT * 16 rows][NT * 8 columns] += A * tile[b_row0 ..]^T, summed over the D columns of both.
template <class T, int D, int MT, int NT, bool kKeep>
__device__ __forceinline__ void gemm_abt(float (&acc)[MT][NT][4],
                                         const RowOperand<T, D, MT, kKeep>& a, const T* tile,
                                         int b_row0) {
#pragma unroll
  for (int k = 0; k < D / Fragment<T>::kK; ++k) {
    Fragment<T> fa[MT];
    a.get(fa, k);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      Fragment<T> fb;
      load_b_trans<T, D>(fb, tile, b_row0 + n * 8, k * Fragment<T>::kK);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma(acc[m][n], fa[m], fb, 0);
        mma(acc[m][n + 1], fa[m], fb, 1);
      }
    }
  }
}

// acc[MT * 16 rows][D columns] += A * tile[b_row0 .. + NT * 8], A the packed accumulators.
template <class T, int D, int MT, int NT>
__device__ __forceinline__ void gemm_ab(float (&acc)[MT][D / 8][4],
                                        const Fragment<T> (&a)[MT][NT * 8 / Fragment<T>::kK],
                                        const T* tile, int b_row0) {
#pragma unroll
  for (int k = 0; k < NT * 8 / Fragment<T>::kK; ++k) {
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      Fragment<T> fb;
      load_b<T, D>(fb, tile, b_row0 + k * Fragment<T>::kK, n * 8);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma(acc[m][n], a[m][k], fb, 0);
        mma(acc[m][n + 1], a[m][k], fb, 1);
      }
    }
  }
}

// ---- Launching ---------------------------------------------------------------------------------

#define ATTN_RETURN_IF(code)                 \
  do {                                       \
    const int attn_code = (int)(code);       \
    if (attn_code != 0) return attn_code;    \
  } while (0)

// A one-dimensional grid of blocks * heads * batch blocks.
template <class Kernel, class... Args>
int launch(Kernel kernel, int64_t blocks, int threads, size_t smem, void* stream,
           const Args&... args) {
  if (blocks > INT32_MAX) return ATTN_ERR_SIZE;
  if (smem > 48 * 1024) {
    const cudaError_t code = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (code == cudaErrorInvalidValue) {
      cudaGetLastError();  // not sticky: forget it
      return ATTN_ERR_SHARED_MEMORY;
    }
    ATTN_RETURN_IF(code);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, smem, static_cast<cudaStream_t>(stream)>>>(
      args...);
  return cudaGetLastError();
}

}  // namespace attn
