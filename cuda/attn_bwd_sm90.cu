// Attention on Hopper, backward: dq, dk, dv from q, k, v, o, lse and d_o. Deterministic: no two threads
// add to the same place.
//
//   one kernel, launched twice: for dq it owns blocks of queries and walks over keys, for dk and dv
//   it owns blocks of keys and walks over queries. One thread block a multiprocessor; for each
//   block of rows in its share of the work:
//     one producer thread: load the block's a0, a1 (q, d_o, and o; or k, v), then the tiles b0, b1
//       (k, v; or q, d_o and their statistics) into a ring of stages (TMA), and there, if RoPE, the
//       angles of the block's rows
//     each consumer warpgroup, for its 64 rows:
//       dq: statistics (lse, delta = dot(d_o, o)) of its queries, kept and written for dk and dv
//       for each tile:
//         start s = a0 b0^T, start ds = a1 b1^T
//         await s; p = exp(s - lse), 0 where masked
//         await ds; ds = p * (ds - delta)
//         start dv += p b1 (dk, dv only), start dq or dk += ds b0
//       if RoPE, await the angles and rotate dq or dk back in registers
//       dq, dk *= scale
//       if asked for, add the sums of their columns, and of dv's, to the warp's own partial sums
//   if asked for: d_qkv_sums = the sums of all partial sums
//
// In both launches p and ds come out of the products as the A operands of the next, so they never
// leave registers. The price is 7 products instead of 5; what it saves is the trip of ds through
// shared memory, atomic sums of dq in f32 in device memory, and the kernels before and after
// (dot(d_o, o); dq to 16 bits), which take 26% of cuDNN's time at S = 512.
//
// What made it fast; TFLOP/s on one H100, bf16, head_dim 64, counting 5 products:
//   1. Two launches without atomics: 398 (S = 512), 486 (2048), 474 (8192). The tensor pipe is busy
//      77% of the time for dk and dv, 69% for dq.
//   2. p and ds rounded together, after both products are done: room for 128 queries a tile, else
//      registers run out and the compiler serialises the products.
//   3. head_dim 128: turns at the tensor cores: 366 -> 388 (512), 489 -> 533 (2048). head_dim 64 is
//      1% faster without, as its products outlast its exponentials anyway.
//   4. d_qkv_sums from registers, instead of by a kernel that reads dq, dk and dv again.
//   5. RoPE's angles through the ring. What RoPE adds at S = 128, 512, 2048 with 12 heads (one H200,
//      several runs, us of 183, 390, 1220, each +-5): angles read from device memory after the last
//      product, by each lane those it needs, 64, 62, 65; in longer pieces before its end, exchanged
//      between lanes, 46, 31, 34; through the ring 10, 11, 4; not read at all, 8, 13, 6.
#include "ops.cuh"
#include "sm90_common.cuh"

namespace attn {

using namespace hopper;

// kKeys: dk and dv; else dq. A block owns kM rows, 64 a warpgroup, and meets kN rows at a time.
// kTurns: warpgroups take turns at the tensor cores.
template <int D, bool kKeys>
struct BwdSm90 {
  static constexpr bool kTurns = D == 128;
  static constexpr int kGroups = 2, kM = 64 * kGroups, kN = D == 64 ? 128 : 64, kStages = 4;
  static constexpr int kBuffers = D == 64 ? 2 : 1;
  static constexpr int kResident = kKeys ? 2 : 3;  // k, v; or q, d_o, o
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 128;
};

// Blocks are persistent, one a multiprocessor, and take units of work in turn. Without causality a
// unit is one block of rows of one head; with it, a block of one head and the block as far from the
// other end of the next head (the unit's second part), so that all units take equally long.
struct BwdWork : KernelParams {
  int parts, units;

  BwdWork(const KernelParams& p, int rows) : KernelParams(p), parts(p.causal ? 2 : 1), units() {
    blocks = ceil_div(seqlen, rows);
    const int64_t count = (int64_t{num_heads} * batch + parts - 1) / parts * blocks;
    units = count <= INT32_MAX / 2 ? static_cast<int>(count) : -1;
  }
};

// The block, head and sequence that a thread block works on.
struct Place {
  int unit, part, block, head, batch;
  bool valid;

  __device__ __forceinline__ explicit Place(const BwdWork& p) : unit(blockIdx.x), part(-1) {
    next(p);
  }

  __device__ __forceinline__ void next(const BwdWork& p) {
    int any_head;
    do {
      if (++part == p.parts) {
        part = 0;
        unit += gridDim.x;
      }
      any_head = unit / p.blocks * p.parts + part;
    } while (unit < p.units && any_head >= p.num_heads * p.batch);
    valid = unit < p.units;
    block = part == 0 ? p.blocks - 1 - unit % p.blocks : unit % p.blocks;
    head = any_head % p.num_heads;
    batch = any_head / p.num_heads;
  }
};

// One block of rows, as the producer announces it to the consumers.
struct BwdItem {
  int row0;  // -1: no more work
  int head, batch;
  int begin, end;  // rows it meets; begin is a multiple of kN
  int len, key_end;
  int64_t first_row;
  int64_t stats;  // entry of the sequence's first query in the statistics
};

template <class T, int D, bool kKeys>
struct BwdShared {
  using S = BwdSm90<D, kKeys>;
  T a[S::kBuffers][S::kResident][S::kM * D];
  T b[S::kStages][2][S::kN * D];  // k, v; or q, d_o; after a block's last, the angles of its rows
  float stats[kKeys ? S::kStages : 1][2][kKeys ? S::kN : S::kM];  // lse_log2, delta
  BwdItem item[S::kBuffers];
  Barrier a_full[S::kBuffers], a_empty[S::kBuffers], b_full[S::kStages], b_empty[S::kStages];

  __device__ __forceinline__ static BwdShared& get() {
    extern __shared__ __align__(1024) char smem[];
    return *reinterpret_cast<BwdShared*>(smem);
  }
};

// Statistics: lse * log2(e) (+inf where every key is masked, or beyond the sequence), then
// delta = dot(d_o, o), each [num_heads][stats_rows]. A sequence's rows are padded to whole tiles
// and begin on 16-byte boundaries.
constexpr int kPadding = 131;

inline int64_t stats_rows(const AttnParams& p) {
  return (p.total_tokens + int64_t{kPadding} * p.batch + 3) / 4 * 4;
}

// Partial sums of columns: of each warp that consumes a row [3, num_heads, head_dim], for dq, dk and dv.
// As blocks get their work in a fixed order, so do the sums.
inline int64_t sums_columns(const AttnParams& p) {
  return int64_t{3} * p.num_heads * p.head_dim;
}

struct BwdSm90Params : BwdWork {
  CUtensorMap a_maps[3], b_maps[2], angle_maps[2];
  float* lse_log2;
  float* delta;
  float* sums;
  int64_t stats_rows;

  BwdSm90Params(const KernelParams& p, int rows, float* sums)
      : BwdWork(p, rows),
        lse_log2(static_cast<float*>(p.workspace)),
        sums(sums),
        stats_rows(attn::stats_rows(p)) {
    delta = lse_log2 + stats_rows * num_heads;
  }
};

template <int kM, int kN, bool kKeys>
__device__ __forceinline__ BwdItem make_item(const BwdSm90Params& p, const Place& place) {
  const Sequence seq = sequence(p, place.batch);
  const Window window(p);
  BwdItem item;
  item.row0 = place.block * kM;
  item.head = place.head;
  item.batch = place.batch;
  if (kKeys) {
    item.begin = window.first_query(item.row0) / kN * kN;
    item.end = item.row0 < seq.key_end ? min(seq.len, window.end_query(item.row0, kM)) : 0;
  } else {
    item.begin = window.first_key(item.row0) / kN * kN;
    item.end = min(seq.key_end, window.end_key(item.row0, kM));
  }
  item.len = seq.len;
  item.key_end = seq.key_end;
  item.first_row = seq.first_row;
  const int64_t first = p.cu_seqlens != nullptr ? seq.first_row : int64_t{item.batch} * p.seqlen;
  item.stats = item.head * p.stats_rows + (first + int64_t{kPadding} * item.batch + 3) / 4 * 4;
  return item;
}

template <class T, int D, bool kKeys>
__device__ __forceinline__ void produce(const BwdSm90Params& p) {
  using S = BwdSm90<D, kKeys>;
  auto& shared = BwdShared<T, D, kKeys>::get();
  Ring<S::kStages> ring;
  Ring<S::kBuffers> buffer;
  for (Place place(p); place.valid; place.next(p)) {
    const BwdItem item = make_item<S::kM, S::kN, kKeys>(p, place);
    if (item.row0 >= item.len) continue;
    const int row0 = static_cast<int>(item.first_row);
    const int batch = p.cu_seqlens != nullptr ? 0 : item.batch;
    auto load = [&](T* tile, int rows, const CUtensorMap& map, Barrier* full, int row) {
#pragma unroll
      for (int c = 0; c < D / 64; ++c) {
        tma_load(tile + c * rows * 64, map, full, c * 64, item.head, row0 + row, batch);
      }
    };
    wait(shared.a_empty + buffer.stage, buffer.parity ^ 1);
    shared.item[buffer.stage] = item;
    Barrier* const a_full = shared.a_full + buffer.stage;
    arrive_expect(a_full, S::kResident * S::kM * D * 2);
#pragma unroll
    for (int i = 0; i < S::kResident; ++i) {
      load(shared.a[buffer.stage][i], S::kM, p.a_maps[i], a_full, item.row0);
    }
    buffer.next();
    for (int row = item.begin; row < item.end; row += S::kN) {
      wait(shared.b_empty + ring.stage, ring.parity ^ 1);
      Barrier* const b_full = shared.b_full + ring.stage;
      arrive_expect(b_full, 2 * S::kN * (D * 2 + (kKeys ? 4 : 0)));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load(shared.b[ring.stage][i], S::kN, p.b_maps[i], b_full, row);
      }
      if constexpr (kKeys) {
        bulk_load(shared.stats[ring.stage][0], p.lse_log2 + item.stats + row, S::kN * 4, b_full);
        bulk_load(shared.stats[ring.stage][1], p.delta + item.stats + row, S::kN * 4, b_full);
      }
      ring.next();
    }
    if (p.rope_cos == nullptr) continue;
    // A stage holds the angles of as many rows as a tile has.
    for (int row = 0; row < S::kM; row += S::kN) {
      wait(shared.b_empty + ring.stage, ring.parity ^ 1);
      Barrier* const b_full = shared.b_full + ring.stage;
      arrive_expect(b_full, 2 * S::kN * D * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int c = 0; c < D / 64; ++c) {
          tma_load(shared.b[ring.stage][i] + c * S::kN * 64, p.angle_maps[i], b_full, c * 64,
                   item.row0 + row);
        }
      }
      ring.next();
    }
  }
  wait(shared.a_empty + buffer.stage, buffer.parity ^ 1);
  shared.item[buffer.stage].row0 = -1;
  arrive(shared.a_full + buffer.stage);
}

// Statistics of a warpgroup's 64 queries, two threads a query: to shared and to device memory.
template <class T, int D, int kM>
__device__ __forceinline__ void query_stats(const BwdSm90Params& p, const BwdItem& item,
                                            const T* d_o, const T* o, int group_row,
                                            float (&stats)[2][kM]) {
  const int row = group_row + threadIdx.x % 128 / 2, query = item.row0 + row;
  const bool valid = query < item.len;
  const bool packed = p.cu_seqlens != nullptr;
  const float* const lse_src =
      packed ? p.lse + item.head * p.total_tokens + item.first_row
             : p.lse + (int64_t{item.batch} * p.num_heads + item.head) * p.seqlen;
  const float lse = valid ? lse_src[query] : -INFINITY;
  float delta = 0.0f;
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    const int col = threadIdx.x % 2 * (D / 2) + i * 8;
    float x[8], y[8];
    load_vec<T, 8>(x, d_o + swizzled<kM>(row, col));
    load_vec<T, 8>(y, o + swizzled<kM>(row, col));
#pragma unroll
    for (int j = 0; j < 8; ++j) delta += x[j] * y[j];
  }
  delta += __shfl_xor_sync(~0u, delta, 1);
  if (threadIdx.x % 2 != 0) return;
  stats[0][row] = lse == -INFINITY ? INFINITY : lse * kLog2e;
  stats[1][row] = valid ? delta : 0.0f;
  p.lse_log2[item.stats + query] = stats[0][row];
  p.delta[item.stats + query] = stats[1][row];
}

template <class T, int D, bool kKeys>
__device__ __forceinline__ void consume(const BwdSm90Params& p) {
  using S = BwdSm90<D, kKeys>;
  constexpr int kM = S::kM, kN = S::kN, NT = kN / 8;
  auto& shared = BwdShared<T, D, kKeys>::get();
  // Known to be the same for all lanes.
  const int warp = __shfl_sync(~0u, warp_id(), 0), group = warp / 4, group_row = group * 64;
  const int warp_row = warp * 16, lane = lane_id(), t = lane % 4;
  const Window window(p);
  const Rope rope(p);
  const float scale_log2 = p.softmax_scale * kLog2e;
  Ring<S::kStages> ring;
  Ring<S::kBuffers> buffer;
  auto release = [&](Barrier* b) {
    if (lane == 0) arrive(b);
  };

  auto begin_turn = [&] {
    if constexpr (S::kTurns) sync_group(1 + S::kGroups + group, 256);
  };
  auto end_turn = [&] {
    if constexpr (S::kTurns) arrive_group(1 + S::kGroups + (group + 1) % S::kGroups, 256);
  };
  if (group == S::kGroups - 1) end_turn();

  for (;;) {
    wait(shared.a_full + buffer.stage, buffer.parity);
    const BwdItem& item = shared.item[buffer.stage];
    if (item.row0 < 0) break;
    auto& a = shared.a[buffer.stage];
    const int len = item.len, key_end = item.key_end, end = item.end;
    const int warp_row0 = item.row0 + warp_row, row = warp_row0 + lane / 4;
    const uint8_t* const key_mask =
        p.key_mask != nullptr ? p.key_mask + int64_t{item.batch} * p.seqlen : nullptr;
    const int clean_end = key_mask != nullptr ? 0 : key_end;
    // What the thread's two rows see, and the range that all rows of the warp see.
    int lo[2], hi[2], all_begin, all_end;
    float row_lse[2], row_delta[2];
    if constexpr (kKeys) {
      const bool clean = warp_row0 + 16 <= clean_end;
      all_begin = warp_row0 + 15 - window.right;
      all_end = clean ? warp_row0 + window.left + 1 : 0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = row + 8 * h;
        const bool valid = key < key_end && (key_mask == nullptr || key_mask[key] != 0);
        lo[h] = key - window.right;
        hi[h] = valid ? key + window.left + 1 : 0;
      }
      if (item.row0 + group_row + 64 > clean_end) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          zero_padding<T, D, kM>(a[i], group_row, 64, key_mask, key_end, item.row0 + group_row);
        }
        fence_async();
        sync_group(1 + group, 128);
      }
    } else {
      all_begin = warp_row0 + 15 - window.left;
      all_end = min(clean_end, warp_row0 + window.right + 1);
      query_stats<T, D, kM>(p, item, a[1], a[2], group_row, shared.stats[0]);
      sync_group(1 + group, 128);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        lo[h] = row + 8 * h - window.left;
        hi[h] = min(row + 8 * h + window.right + 1, key_end);
        row_lse[h] = shared.stats[0][0][warp_row + lane / 4 + 8 * h];
        row_delta[h] = shared.stats[0][1][warp_row + lane / 4 + 8 * h];
      }
    }

    float d0[D / 8][4] = {};                    // dk or dq
    float dv[kKeys ? D / 8 : 1][4] = {};
    // x = a[i] b[i]^T, the warpgroup's rows.
    auto multiply = [&](float (&x)[NT][4], int i) {
      const uint32_t a_desc = descriptor(a[i] + group_row * 64);
      const uint32_t b_desc = descriptor(shared.b[ring.stage][i]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const int column = k / 4, step = k % 4 * 32;
        wgmma<T, false, false>(flat(x), advance(a_desc, column * kM * 128 + step),
                               advance(b_desc, column * kN * 128 + step), k != 0);
      }
      wgmma_commit();
    };
    // sum += x b[i].
    auto accumulate = [&](float (&sum)[D / 8][4], const uint32_t (&x)[kN / 16][4], int i) {
      const uint32_t b_desc = descriptor(shared.b[ring.stage][i], kN * 128);
      pin(flat(sum));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kN / 16; ++k) {
        wgmma<T, true>(flat(sum), x[k], advance(b_desc, k * 16 * 128), true);
      }
      wgmma_commit();
    };
    begin_turn();
    int previous = -1;  // stage that the products in flight read
    for (int other = item.begin; other < end; other += kN) {
      wait(shared.b_full + ring.stage, ring.parity);
      if (!kKeys && other + kN > clean_end) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          zero_padding<T, D, kN>(shared.b[ring.stage][i], 0, kN, key_mask, key_end, other);
        }
        fence_async();
        sync_group(1 + group, 128);
      }
      float s[NT][4], ds[NT][4];
      multiply(s, 0);
      if constexpr (kKeys) {
        // The products of the tile before are done; their operands make room for ds.
        wgmma_wait<1>();
        pin(flat(d0));
        pin(flat(dv));
      }
      multiply(ds, 1);
      end_turn();
      wgmma_wait<1>();
      pin(flat(d0));
      pin(flat(s));
      if (previous >= 0) release(shared.b_empty + previous);
      previous = ring.stage;
      auto& stats = shared.stats[kKeys ? ring.stage : 0];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float lse[2];
        if constexpr (kKeys) {
          *reinterpret_cast<float2*>(lse) =
              *reinterpret_cast<const float2*>(stats[0] + 8 * n + 2 * t);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = exp2_approx(fmaf(s[n][i], scale_log2, -(kKeys ? lse[i % 2] : row_lse[i / 2])));
        }
      }
      if (other < all_begin || other + kN > all_end) {
        mask_tile(s, lo, hi, kKeys ? nullptr : key_mask, other, 0.0f);
      }
      wgmma_wait<0>();
      pin(flat(ds));
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        float delta[2];
        if constexpr (kKeys) {
          *reinterpret_cast<float2*>(delta) =
              *reinterpret_cast<const float2*>(stats[1] + 8 * n + 2 * t);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[n][i] = s[n][i] * (ds[n][i] - (kKeys ? delta[i % 2] : row_delta[i / 2]));
        }
      }
      uint32_t probs[kN / 16][4], ds_operand[kN / 16][4];
      if constexpr (kKeys) to_operand<T>(probs, s);
      to_operand<T>(ds_operand, ds);
      begin_turn();
      if constexpr (kKeys) accumulate(dv, probs, 1);
      accumulate(d0, ds_operand, 0);
      ring.next();
    }
    end_turn();
    wgmma_wait<0>();
    pin(flat(d0));
    if constexpr (kKeys) pin(flat(dv));
    if (previous >= 0) release(shared.b_empty + previous);

    // All warps of the group are done with their rows of a: stage the results there.
    sync_group(1 + group, 128);
    if (rope.cos != nullptr) {
#pragma unroll
      for (int first = 0; first < kM; first += kN) {
        wait(shared.b_full + ring.stage, ring.parity);
        if (kM == kN || group_row / kN * kN == first) {
          const auto& angles = shared.b[ring.stage];
          rotate_back<D, kN>(d0, angles[0], angles[1], warp_row % kN + lane / 4, rope.interleaved);
        }
        __syncwarp();
        release(shared.b_empty + ring.stage);
        ring.next();
      }
    }
    if (p.d_qkv_sums != nullptr) {
      const int64_t sums_row = int64_t{blockIdx.x} * (S::kConsumers / 32) + warp;
      float* const sums = p.sums + sums_row * 3 * p.num_heads * D;
      const auto of = [&](int which) { return sums + (which * p.num_heads + item.head) * D; };
      add_column_sums<D>(d0, warp_row0, len, p.softmax_scale, of(kKeys ? 1 : 0));
      if constexpr (kKeys) add_column_sums<D>(dv, warp_row0, len, 1.0f, of(2));
    }
    const float scale[2] = {p.softmax_scale, p.softmax_scale};
    const AttnTensor& d = kKeys ? p.dk : p.dq;
    store_rows<T, D, kM>(a[0], warp_row, d0, scale,
                         head_ptr<T>(d, item.batch, item.head, item.first_row), d.row_stride,
                         warp_row0, len);
    if constexpr (kKeys) {
      const float one[2] = {1.0f, 1.0f};
      store_rows<T, D, kM>(a[1], warp_row, dv, one,
                           head_ptr<T>(p.dv, item.batch, item.head, item.first_row),
                           p.dv.row_stride, warp_row0, len);
    }
    fence_async();
    __syncwarp();
    release(shared.a_empty + buffer.stage);
    buffer.next();
  }
}

template <class T, int D, bool kKeys>
__global__ void __launch_bounds__(BwdSm90<D, kKeys>::kThreads, 1)
    bwd_sm90_kernel(const __grid_constant__ BwdSm90Params p) {
  using S = BwdSm90<D, kKeys>;
  auto& shared = BwdShared<T, D, kKeys>::get();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kBuffers; ++i) {
      init_barrier(shared.a_full + i, 1);
      init_barrier(shared.a_empty + i, 4 * S::kGroups);
    }
    for (int i = 0; i < S::kStages; ++i) {
      init_barrier(shared.b_full + i, 1);
      init_barrier(shared.b_empty + i, 4 * S::kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    give_registers<24>();
    if (threadIdx.x == S::kConsumers) produce<T, D, kKeys>(p);
  } else {
    take_registers<240>();
    consume<T, D, kKeys>(p);
  }
}

template <class T, int D, bool kKeys>
int bwd(const KernelParams& params, float* sums) {
  using S = BwdSm90<D, kKeys>;
  BwdSm90Params p(params, S::kM, sums);
  const AttnTensor* const a[] = {kKeys ? &p.k : &p.q, kKeys ? &p.v : &p.d_o, &p.o};
  const AttnTensor* const b[] = {kKeys ? &p.q : &p.k, kKeys ? &p.d_o : &p.v};
  for (int i = 0; i < S::kResident; ++i) ATTN_RETURN_IF(tile_map(p, *a[i], S::kM, p.a_maps[i]));
  for (int i = 0; i < 2; ++i) ATTN_RETURN_IF(tile_map(p, *b[i], S::kN, p.b_maps[i]));
  if (p.rope_cos != nullptr) {
    // Two 16-bit elements for each of a row's head_dim / 2 numbers.
    ATTN_RETURN_IF(matrix_map(p.angle_maps[0], p.rope_cos, p.seqlen, D, S::kN));
    ATTN_RETURN_IF(matrix_map(p.angle_maps[1], p.rope_sin, p.seqlen, D, S::kN));
  }
  return launch_persistent(bwd_sm90_kernel<T, D, kKeys>, p.units, S::kThreads,
                           sizeof(BwdShared<T, D, kKeys>), p);
}

size_t bwd_sm90_stats_bytes(const AttnParams& p) {
  return (2 * sizeof(float) * p.num_heads * stats_rows(p) + 255) / 256 * 256;
}

// Rows of partial sums: one for every warp of every thread block.
inline int64_t sums_rows(const AttnParams& p) {
  return for_sm90(p, [&]<class T, int D>() {
    using S = BwdSm90<D, true>;
    static_assert(S::kM == BwdSm90<D, false>::kM, "both launches have the same thread blocks");
    const int units = BwdWork(KernelParams(p), S::kM).units;
    return std::clamp(units, 0, kMostMultiprocessors) * (S::kConsumers / 32);
  });
}

size_t bwd_sm90_sums_bytes(const AttnParams& p) {
  return p.d_qkv_sums == nullptr ? 0 : sizeof(float) * sums_rows(p) * sums_columns(p);
}

int bwd_sm90(const KernelParams& p, float* sums) {
  if (p.d_qkv_sums != nullptr) {
    ATTN_RETURN_IF(cudaMemsetAsync(sums, 0, bwd_sm90_sums_bytes(p),
                                   static_cast<cudaStream_t>(p.stream)));
  }
  ATTN_RETURN_IF(for_sm90(p, [&]<class T, int D>() -> int {
    ATTN_RETURN_IF((bwd<T, D, false>(p, sums)));  // makes the statistics that the other launch reads
    return bwd<T, D, true>(p, sums);
  }));
  if (p.d_qkv_sums == nullptr) return ATTN_OK;
  return sum_partials(sums, p.d_qkv_sums, sums_rows(p), sums_columns(p), p.stream);
}

}  // namespace attn
