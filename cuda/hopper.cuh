// Hopper's own instructions (sm_90a): mbarriers, the tensor memory accelerator (TMA), wgmma and
// register reallocation, each as a thin function over its PTX.
//
// A tile here is [columns / 64][rows][64 columns] of 16-bit elements: rows of 128 bytes whose
// 16-byte chunks are permuted by an exclusive or with row % 8, as TMA's and wgmma's 128-byte
// swizzle wants it. A tile starts on a 1024-byte boundary.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace attn::hopper {

// ---- mbarriers ---------------------------------------------------------------------------------

using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(arrivals));
}

// Makes initialised barriers visible to the TMA; the threads must be synchronised after it.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(smem_address(b)) : "memory");
}

// `count` arrivals at once.
__device__ __forceinline__ void arrive_many(Barrier* b, int count) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(count)
               : "memory");
}

// One arrival that also announces how many bytes the TMA will bring.
__device__ __forceinline__ void arrive_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(smem_address(b)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is over. A fresh barrier is in phase 0, and its phase
// "before", of parity 1, counts as over.
__device__ __forceinline__ void wait(Barrier* b, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(smem_address(b)),
      "r"(parity)
      : "memory");
}

// Whether that phase is over already.
__device__ __forceinline__ bool is_over(Barrier* b, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(b)), "r"(parity)
      : "memory");
  return done != 0;
}

// One arrival at the same barrier of block `rank` of the cluster. Orders nothing but what this
// thread's wgmma have read: a release for the whole cluster would be a fence of global memory.
__device__ __forceinline__ void arrive(Barrier* b, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(smem_address(b)),
      "r"(rank)
      : "memory");
}

// All threads of a cluster's blocks wait for each other.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Position in a ring of kStages buffers, with the parity of its present round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // By at most kStages.
  __device__ __forceinline__ void advance(int count) {
    stage += count;
    if (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

// Barrier `id` (1 to 15) of a group of `threads` threads.
__device__ __forceinline__ void sync_group(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts towards such a barrier without waiting at it.
__device__ __forceinline__ void arrive_group(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of the TMA and wgmma (by
// any thread, once a barrier was passed).
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- TMA ---------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map));
}

// Loads the box at (column, head, row, batch); out-of-range rows become zeros, and count as bytes.
__device__ __forceinline__ void tma_load(void* dst, const CUtensorMap& map, Barrier* b, int column,
                                         int head, int row, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address(dst)),
      "l"(&map), "r"(smem_address(b)), "r"(column), "r"(head), "r"(row), "r"(batch)
      : "memory");
}

// The same of a matrix, at (column, row).
__device__ __forceinline__ void tma_load(void* dst, const CUtensorMap& map, Barrier* b, int column,
                                         int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(smem_address(dst)),
      "l"(&map), "r"(smem_address(b)), "r"(column), "r"(row)
      : "memory");
}

// The same into the shared memory of all blocks of the cluster whose bit of `blocks` is set; their
// barriers in the place of `b` get the bytes.
__device__ __forceinline__ void tma_multicast(void* dst, const CUtensorMap& map, Barrier* b,
                                              int column, int row, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_address(dst)),
      "l"(&map), "r"(smem_address(b)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// Copies contiguous bytes, a multiple of 16 from and to 16-byte boundaries.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, int bytes, Barrier* b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];" ::"r"(smem_address(dst)),
      "l"(src), "r"(bytes), "r"(smem_address(b))
      : "memory");
}

// ---- wgmma -------------------------------------------------------------------------------------

// Element (row, col) of a tile of kRows rows.
template <int kRows>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned col) {
  return col / 64 * kRows * 64 + row * 64 + ((col / 8 % 8) ^ (row % 8)) * 8 + col % 8;
}

// The low half of the descriptor of an operand to wgmma; the high half is kDescriptorHigh. K-major
// (the summed dimension runs along the rows): groups of 8 rows are 1024 bytes apart. MN-major
// (summed over rows): likewise, and blocks of 64 columns are `column_block` bytes apart. In a
// cluster the upper bits of an address number the block.
__device__ __forceinline__ uint32_t descriptor(const void* tile, int column_block = 16) {
  return (smem_address(tile) & 0x3ffff) >> 4 | uint32_t(column_block >> 4) << 16;
}

// The same operand `bytes` further on.
__device__ __forceinline__ uint32_t advance(uint32_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the committed groups still run.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators across this point.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define ATTN_REGS8(d, i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ATTN_REGS32(d, i) \
  ATTN_REGS8(d, i), ATTN_REGS8(d, i + 8), ATTN_REGS8(d, i + 16), ATTN_REGS8(d, i + 24)
#define ATTN_REGS64(d) ATTN_REGS32(d, 0), ATTN_REGS32(d, 32)
#define ATTN_LIST32                                                                       \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define ATTN_LIST64                                                                         \
  ATTN_LIST32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50," \
              "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ATTN_WGMMA_SS(N, TYPE, LIST, REGS, A, B, ACC, TA, TB)                                  \
  asm volatile("{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.ne.b32 p, %" #ACC ", 0;\n"             \
               "mov.b64 a, {%" #A ", 0x40000040};\nmov.b64 b, {%" #B ", 0x40000040};\n"         \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST          \
               "}, a, b, p, 1, 1, %" #TA ", %" #TB ";\n}\n"                                     \
               : REGS                                                                          \
               : "r"(a), "r"(b), "r"(int(accumulate)), "n"(int(kTransA)), "n"(int(kTransB)))
#define ATTN_WGMMA_RS(N, TYPE, LIST, REGS, A0, A1, A2, A3, B, ACC, TB)                          \
  asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %" #ACC ", 0;\n"                \
               "mov.b64 b, {%" #B ", 0x40000040};\n"                                            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST         \
               "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, b, p, 1, 1, %" #TB ";\n}\n"            \
               : REGS                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(int(accumulate)),      \
                 "n"(int(kTransB)))

// d [64 x N] (+)= A [64 x 16] B [16 x N], run in the background by a whole warpgroup: between a
// wgmma_fence and a wgmma_commit. Warp w holds rows 16w to 16w + 15 in the layout of
// common.cuh's fragments: d[4 * n + i] is c[i] of columns 8n to 8n + 7. kTrans: MN-major operand.
template <class T, bool kTransA, bool kTransB, int N2>
__device__ __forceinline__ void wgmma(float (&d)[N2], uint32_t a, uint32_t b, bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(N2 == 32 || N2 == 64, "64 or 128 columns");
  if constexpr (N2 == 32) {
    if constexpr (kBf16) {
      ATTN_WGMMA_SS(64, "bf16", ATTN_LIST32, ATTN_REGS32(d, 0), 32, 33, 34, 35, 36);
    } else {
      ATTN_WGMMA_SS(64, "f16", ATTN_LIST32, ATTN_REGS32(d, 0), 32, 33, 34, 35, 36);
    }
  } else if constexpr (kBf16) {
    ATTN_WGMMA_SS(128, "bf16", ATTN_LIST64, ATTN_REGS64(d), 64, 65, 66, 67,
                  68);
  } else {
    ATTN_WGMMA_SS(128, "f16", ATTN_LIST64, ATTN_REGS64(d), 64, 65, 66, 67,
                  68);
  }
}

// The same with A in registers, as the layout of common.cuh's A fragments.
template <class T, bool kTransB, int N2>
__device__ __forceinline__ void wgmma(float (&d)[N2], const uint32_t (&a)[4], uint32_t b,
                                      bool accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  static_assert(N2 == 32 || N2 == 64, "64 or 128 columns");
  if constexpr (N2 == 32) {
    if constexpr (kBf16) {
      ATTN_WGMMA_RS(64, "bf16", ATTN_LIST32, ATTN_REGS32(d, 0), 32, 33, 34, 35, 36, 37, 38);
    } else {
      ATTN_WGMMA_RS(64, "f16", ATTN_LIST32, ATTN_REGS32(d, 0), 32, 33, 34, 35, 36, 37, 38);
    }
  } else if constexpr (kBf16) {
    ATTN_WGMMA_RS(128, "bf16", ATTN_LIST64, ATTN_REGS64(d), 64, 65, 66, 67,
                  68, 69, 70);
  } else {
    ATTN_WGMMA_RS(128, "f16", ATTN_LIST64, ATTN_REGS64(d), 64, 65, 66, 67,
                  68, 69, 70);
  }
}

// ---- Registers ---------------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Writes four 8 x 8 blocks of 16-bit elements; lane l gives the address of row l % 8 of block l /
// 8.
__device__ __forceinline__ void stmatrix(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                         uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// to[0] += a, to[1] += b in device memory, on an 8-byte boundary; nothing waits for it. Additions of
// one thread to one place happen in order.
__device__ __forceinline__ void add_to_global(float* to, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b)
               : "memory");
}

// Two elements in one register, lo first.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t x;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
  }
  return x;
}

}  // namespace attn::hopper
