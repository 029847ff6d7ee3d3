// Attention, backward: dq, dk, dv and d_bias from q, k, v, o, lse and d_o. Deterministic: no atomics.
//
//   stats = (lse, delta = keep * dot(d_o, o)) of each query; if RoPE and the forward kept none:
//   workspace <- rotated q and k
//   for each block of keys of each head (one thread block):                    dkv_kernel
//     for each tile of queries that see some key of the block:
//       start loading the next q, d_o, stats
//       p^T = exp(scale k q^T + bias - lse), 0 where masked
//       dv += p^T d_o, without the dropped p
//       ds^T = p^T * (v d_o^T - delta), or p^T * -delta where dropped;  dk += ds^T q
//     dv /= keep; dk *= scale / keep; if RoPE, rotate dk back in f32
//   for each block of queries of each head (one thread block):                 dq_kernel
//     for each tile of keys that some query of the block sees:
//       p = exp(scale q k^T + bias - lse), 0 where masked
//       ds = p * (d_o v^T - delta), or p * -delta where dropped;  dq += ds k
//       if d_bias: sum ds over the distances of each bucket
//     dq *= scale / keep; if RoPE, rotate dq back in f32
//   if d_bias: d_bias = sum of the blocks' buckets / keep                      d_bias_kernel
//
// keep = 1 - dropout_p. The true score gradient is ds / keep.
//
// (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2, with dq in a pass of
// its own: 7 products instead of 5, but every accumulator stays in registers.)
//
// What made it fast; figures from one H200, bf16, time without it / time with it at sequence
// lengths 512 and 4096 (README.md has the absolute ones):
//   1. Swizzled tiles, so that ldmatrix has no bank conflicts: head_dim 64 dkv 3.0 and 3.3, dq 3.3
//      and 3.4; 128 5.7 and 6.3, 4.9 and 5.5.
//   2. Lane addresses computed once and pointer-stepping loads, together with 4.: 64 dkv 1.10 and
//      1.10, dq 1.16 and 1.16; 128 1.16 and 1.15, 1.26 and 1.27.
//   3. Masks only in tiles that a limit crosses: 64 dkv 1.36 and 1.43, dq 1.28 and 1.30; 128 1.03
//      and 1.03, 1.56 and 1.65.
//   4. The product that makes dp starts at -delta instead of 0: 64 dkv 1.13 and 1.15, dq none; 128
//      1.15 and 1.15, 1.02 and 1.03.
//   5. Two stages of tiles, filled by cp.async during the products: 64 dkv 1.08 and 1.04, dq 1.13
//      and 1.04; 128 1.05 and 1.02, 1.11 and 1.08.
//   6. At head_dim 64, 32 keys a warp instead of 16 (half the reads of q and d_o): dkv 1.09 and
//      1.07; then k and v fragments in registers: 1.05 and 1.06; then 128 queries a tile: 1.02 and
//      1.04.
//   7. A minimum of 1 block per multiprocessor in __launch_bounds__: without it the compiler
//      spills in dq at head_dim 64, 1.11 and 1.10.
#include <algorithm>

#include "bias.cuh"
#include "dropout.cuh"
#include "sm90.cuh"

namespace attn {

// Tile shapes for elements of kSize bytes and tile width D.
//
// dk, dv: a block owns 16 * MT * kWarps keys and walks over the queries kM at a time, of which
// kSub enter one matrix product. kKeep: key and value fragments stay in registers.
// kSplit: dv and dk are computed by two launches, as registers hold only one accumulator.
template <int kSize, int D>
struct DkvConfig {
  static constexpr int MT = D <= 64 ? 2 : 1, kWarps = 4;
  static constexpr int kM = D <= 64 ? 128 : D <= 128 ? 64 : 16;
  static constexpr int kSub = D <= 64 ? 16 : kM;
  static constexpr bool kKeep = D <= 64, kSplit = D > 128;
};
template <int D>
struct DkvConfig<4, D> {
  static constexpr int MT = 1, kWarps = D <= 128 ? 4 : 2, kM = D <= 64 ? 32 : 16, kSub = kM;
  static constexpr bool kKeep = false, kSplit = D > 128;
};

// dq: a block owns 16 * MT * kWarps queries and walks over the keys kN at a time, of which kSub
// enter one matrix product. kKeep: query and d_o fragments stay in registers.
template <int kSize, int D>
struct DqConfig {
  static constexpr int MT = D <= 128 ? 2 : 1, kWarps = 4;
  static constexpr int kN = D <= 64 ? 64 : D <= 128 ? 32 : 16, kSub = D <= 128 ? 32 : 16;
  static constexpr bool kKeep = D <= 64;
};
template <int D>
struct DqConfig<4, D> {
  static constexpr int MT = 1, kWarps = D <= 128 ? 4 : 2, kN = D <= 64 ? 32 : 16, kSub = kN;
  static constexpr bool kKeep = false;
};

// What the backward needs of one query besides its rows.
struct RowStats {
  float lse_log2;  // log2 sum_k exp(score); +inf where every key is masked, so that exp2 gives 0
  float delta;     // (1 - dropout_p) * dot(d_o, o) = sum_k (p without the dropped) * dp
};

// Shared by the kernels: q and k in p are rotated already.
struct BwdParams : KernelParams {
  RowStats* stats;        // of lse's shape
  float* block_buckets;   // [blocks of dq_kernel, num_buckets]: d_bias before the sum over blocks
  explicit BwdParams(const AttnParams& p) : KernelParams(p), stats(), block_buckets() {}
};

template <int MT, int NT>
__device__ __forceinline__ void copy(float (&to)[MT][NT][4], const float (&from)[MT][NT][4]) {
#pragma unroll
  for (int i = 0; i < MT * NT * 4; ++i) (&to[0][0][0])[i] = (&from[0][0][0])[i];
}

// x *= y, element by element.
template <int MT, int NT>
__device__ __forceinline__ void multiply(float (&x)[MT][NT][4], const float (&y)[MT][NT][4]) {
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m][n][i] *= y[m][n][i];
    }
  }
}

// ---- dk and dv ---------------------------------------------------------------------------------

template <class T, int D>
struct DkvShape : DkvConfig<sizeof(T), D> {
  using C = DkvConfig<sizeof(T), D>;
  static constexpr int kN = 16 * C::MT * C::kWarps, kThreads = 32 * C::kWarps;
  static constexpr int kKeys = kN * D, kTile = C::kM * D;  // elements
  static constexpr size_t kSmem =
      (2 * kKeys + 4 * kTile) * sizeof(T) + 2 * C::kM * sizeof(RowStats);
  static_assert(C::kWarps * kStageFloats<D> * 4 <= kSmem, "the store stages in the same memory");
};

// Without kBiasDropout, there is neither.
template <class T, int D, bool kDv, bool kDk, bool kBiasDropout>
__global__ void __launch_bounds__(DkvShape<T, D>::kThreads, 1)
    dkv_kernel(const __grid_constant__ BwdParams p) {
  using S = DkvShape<T, D>;
  constexpr int MT = S::MT, kM = S::kM, kN = S::kN, NT = S::kSub / 8;
  extern __shared__ __align__(128) char smem[];
  T* k_tile = reinterpret_cast<T*>(smem);
  T* v_tile = k_tile + S::kKeys;
  T* q_tile = v_tile + S::kKeys;  // two stages of q, then of d_o, then of their statistics
  T* do_tile = q_tile + 2 * S::kTile;
  RowStats* stats_tile = reinterpret_cast<RowStats*>(do_tile + 2 * S::kTile);

  const BlockIndex index(p);
  const Sequence seq = sequence(p, index.batch);
  const Window window(p);
  const int k0 = index.block * kN;
  if (k0 >= seq.len) return;
  const int warp_k0 = k0 + warp_id() * 16 * MT;
  const int q_begin = window.first_query(k0) / kM * kM;
  const int q_end = k0 < seq.key_end ? min(seq.len, window.end_query(k0, kN)) : 0;

  using QueryLoader = TileLoader<T, D, kM, S::kThreads>;
  const QueryLoader q_loader(head_ptr<T>(p.q, index.batch, index.head, seq.first_row),
                             p.q.row_stride, seq.len, p.head_dim, p.vec);
  const QueryLoader do_loader(head_ptr<T>(p.d_o, index.batch, index.head, seq.first_row),
                              p.d_o.row_stride, seq.len, p.head_dim, p.vec);
  const RowStats* stats_src = p.stats + seq.lse_row + index.head * seq.lse_head_stride;
  auto load_queries = [&](int q0, int stage) {
    q_loader.load(q_tile + stage * S::kTile, q0);
    do_loader.load(do_tile + stage * S::kTile, q0);
    // Zeros beyond the sequence give p = 1, but d_o and q are zero there.
    for (int r = threadIdx.x; r < kM; r += S::kThreads) {
      const bool valid = q0 + r < seq.len;
      cp_async<8>(stats_tile + stage * kM + r, valid ? stats_src + q0 + r : stats_src, valid);
    }
  };
  using KeyLoader = TileLoader<T, D, kN, S::kThreads>;
  KeyLoader(head_ptr<T>(p.k, index.batch, index.head, seq.first_row), p.k.row_stride, seq.key_end,
            p.head_dim, p.vec, seq.key_mask)
      .load(k_tile, k0);
  KeyLoader(head_ptr<T>(p.v, index.batch, index.head, seq.first_row), p.v.row_stride, seq.key_end,
            p.head_dim, p.vec, seq.key_mask)
      .load(v_tile, k0);
  load_queries(q_begin, 0);
  cp_async_wait();
  __syncthreads();
  constexpr bool kKeep = S::kKeep && !kBiasDropout;  // else registers run out
  const RowOperand<T, D, MT, kKeep> k(k_tile, warp_id() * 16 * MT);
  const RowOperand<T, D, MT, kKeep && kDk> v(v_tile, warp_id() * 16 * MT);

  const int g = lane_id() / 4, t = lane_id() % 4;
  const bool whole = all_keys(seq, k0, kN);
  bool key_valid[MT][2];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    const int key = warp_k0 + 8 * i + g;
    key_valid[i / 2][i % 2] =
        key < seq.key_end && (seq.key_mask == nullptr || seq.key_mask[key] != 0);
  }
  const ScoreBias bias(p, index.head);
  const Dropout dropout(p, index);
  // Scores with a bias are scaled already.
  const float scale_log2 = kBiasDropout ? 1.0f : p.softmax_scale * kLog2e;
  const float dropout_scale = kBiasDropout ? p.dropout_scale : 1.0f;
  float dv[MT][D / 8][4] = {}, dk[MT][D / 8][4] = {};
  int stage = 0;
  for (int q0 = q_begin; q0 < q_end; q0 += kM) {
    if (q0 + kM < q_end) load_queries(q0 + kM, stage ^ 1);
#pragma unroll
    for (int sub = 0; sub < kM; sub += S::kSub) {
      // Scores transposed, [keys][queries]: probabilities and score gradients come out as A
      // operands of the products that sum over queries.
      float s[MT][NT][4] = {};
      gemm_abt<T, D>(s, k, q_tile + stage * S::kTile, sub);
      if constexpr (kBiasDropout) {
        bias.apply<true>(s, p.softmax_scale * kLog2e, warp_k0, q0 + sub);
      }
      const RowStats* stats = stats_tile + stage * kM + sub;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float lse_log2 = stats[8 * n + 2 * t + e].lse_log2;
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            s[m][n][e] = exp2_approx(s[m][n][e] * scale_log2 - lse_log2);
            s[m][n][2 + e] = exp2_approx(s[m][n][2 + e] * scale_log2 - lse_log2);
          }
        }
      }
      if (!whole || !window.covers(q0 + sub, S::kSub, warp_k0, 16 * MT)) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
          for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int query = q0 + sub + 8 * n + 2 * t + i % 2;
              const int key = warp_k0 + 16 * m + 8 * (i / 2) + g;
              if (!(key_valid[m][i / 2] && window.sees(query, key))) s[m][n][i] = 0.0f;
            }
          }
        }
      }
      const KeepMask<kBiasDropout, true, MT, NT> keep(dropout, warp_k0, q0 + sub);
      if constexpr (kDv) {
        float kept[MT][NT][4];
        copy(kept, s);
        keep.zero_dropped(kept);
        Fragment<T> probs[MT][S::kSub / Fragment<T>::kK];
#pragma unroll
        for (int m = 0; m < MT; ++m) to_a<T>(probs[m], kept[m]);
        gemm_ab<T, D, MT, NT>(dv, probs, do_tile + stage * S::kTile, sub);
      }
      if constexpr (kDk) {
        // d_s = p * (dp - delta); the product that makes dp starts at -delta.
        float ds[MT][NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float delta = stats[8 * n + 2 * t + e].delta;
#pragma unroll
            for (int m = 0; m < MT; ++m) ds[m][n][e] = ds[m][n][2 + e] = -delta;
          }
        }
        gemm_abt<T, D>(ds, v, do_tile + stage * S::kTile, sub);
        keep.replace_dropped(
            ds, [&](int, int n, int i) { return -stats[8 * n + 2 * t + i % 2].delta; });
        multiply(ds, s);
        Fragment<T> ds_a[MT][S::kSub / Fragment<T>::kK];
#pragma unroll
        for (int m = 0; m < MT; ++m) to_a<T>(ds_a[m], ds[m]);
        gemm_ab<T, D, MT, NT>(dk, ds_a, q_tile + stage * S::kTile, sub);
      }
    }
    // The next tile is visible to all, and all are done with this one.
    cp_async_wait();
    __syncthreads();
    stage ^= 1;
  }
  // Also when there was no tile: every warp is done with the shared memory that is staged in now.
  __syncthreads();

  float* staging = reinterpret_cast<float*>(smem) + warp_id() * kStageFloats<D>;
  if constexpr (kDv) {
    store_rows<T, D, MT>(dv, staging, head_ptr<T>(p.dv, index.batch, index.head, seq.first_row),
                         p.dv.row_stride, warp_k0, seq.len, p.head_dim, dropout_scale,
                         Rope::none(), p.vec);
  }
  if constexpr (kDk) {
    store_rows<T, D, MT>(dk, staging, head_ptr<T>(p.dk, index.batch, index.head, seq.first_row),
                         p.dk.row_stride, warp_k0, seq.len, p.head_dim,
                         p.softmax_scale * dropout_scale, Rope(p),
                         p.rope_cos != nullptr ? p.rope_vec : p.vec);
  }
}

// ---- dq ----------------------------------------------------------------------------------------

template <class T, int D>
struct DqShape : DqConfig<sizeof(T), D> {
  using C = DqConfig<sizeof(T), D>;
  static constexpr int kM = 16 * C::MT * C::kWarps, kThreads = 32 * C::kWarps;
  static constexpr int kQueries = kM * D, kTile = C::kN * D;  // elements
  static constexpr size_t kSmem = (2 * kQueries + 4 * kTile) * sizeof(T);
  static_assert(C::kWarps * kStageFloats<D> * 4 <= kSmem, "the store stages in the same memory");
};

// Without kBiasDropout, there is neither.
template <class T, int D, bool kBiasDropout>
__global__ void __launch_bounds__(DqShape<T, D>::kThreads, 1)
    dq_kernel(const __grid_constant__ BwdParams p) {
  using S = DqShape<T, D>;
  constexpr int MT = S::MT, kN = S::kN, NT = S::kSub / 8;
  extern __shared__ __align__(128) char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* do_tile = q_tile + S::kQueries;
  T* k_tile = do_tile + S::kQueries;  // two stages of K, then two of V
  T* v_tile = k_tile + 2 * S::kTile;

  const BlockIndex index(p);
  const Sequence seq = sequence(p, index.batch);
  const Window window(p);
  // A causal block's work grows with its position: start the longest first.
  const int q0 = (p.causal ? p.blocks - 1 - index.block : index.block) * S::kM;
  if (q0 >= seq.len) return;
  const int warp_q0 = q0 + warp_id() * 16 * MT;
  const int k_begin = window.first_key(q0) / kN * kN;
  const int k_end = min(seq.key_end, window.end_key(q0, S::kM));

  using KeyLoader = TileLoader<T, D, kN, S::kThreads>;
  const KeyLoader k_loader(head_ptr<T>(p.k, index.batch, index.head, seq.first_row),
                           p.k.row_stride, seq.key_end, p.head_dim, p.vec, seq.key_mask);
  const KeyLoader v_loader(head_ptr<T>(p.v, index.batch, index.head, seq.first_row),
                           p.v.row_stride, seq.key_end, p.head_dim, p.vec, seq.key_mask);
  auto load_keys = [&](int k0, int stage) {
    k_loader.load(k_tile + stage * S::kTile, k0);
    v_loader.load(v_tile + stage * S::kTile, k0);
  };
  using QueryLoader = TileLoader<T, D, S::kM, S::kThreads>;
  QueryLoader(head_ptr<T>(p.q, index.batch, index.head, seq.first_row), p.q.row_stride, seq.len,
              p.head_dim, p.vec)
      .load(q_tile, q0);
  QueryLoader(head_ptr<T>(p.d_o, index.batch, index.head, seq.first_row), p.d_o.row_stride,
              seq.len, p.head_dim, p.vec)
      .load(do_tile, q0);
  load_keys(k_begin, 0);
  RowStats stats[MT][2];
  const RowStats* stats_src = p.stats + seq.lse_row + index.head * seq.lse_head_stride;
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    const int row = warp_q0 + 8 * i + lane_id() / 4;
    stats[i / 2][i % 2] = row < seq.len ? stats_src[row] : RowStats{INFINITY, 0.0f};
  }
  cp_async_wait();
  __syncthreads();
  const RowOperand<T, D, MT, S::kKeep> q(q_tile, warp_id() * 16 * MT);
  const RowOperand<T, D, MT, S::kKeep> d_o(do_tile, warp_id() * 16 * MT);

  const ScoreBias bias(p, index.head);
  const Dropout dropout(p, index);
  const bool has_d_bias = kBiasDropout && p.d_bias != nullptr;
  BiasGrad<MT, NT> bias_grad(p, reinterpret_cast<float*>(smem + S::kSmem), warp_q0);
  if (has_d_bias) bias_grad.start(p);
  // Scores with a bias are scaled already.
  const float scale_log2 = kBiasDropout ? 1.0f : p.softmax_scale * kLog2e;
  const float dropout_scale = kBiasDropout ? p.dropout_scale : 1.0f;
  float dq[MT][D / 8][4] = {};
  int stage = 0;
  for (int k0 = k_begin; k0 < k_end; k0 += kN) {
    if (k0 + kN < k_end) load_keys(k0 + kN, stage ^ 1);
#pragma unroll
    for (int sub = 0; sub < kN; sub += S::kSub) {
      float s[MT][NT][4] = {};
      gemm_abt<T, D>(s, q, k_tile + stage * S::kTile, sub);
      if constexpr (kBiasDropout) {
        bias.apply<false>(s, p.softmax_scale * kLog2e, warp_q0, k0 + sub);
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[m][n][i] = exp2_approx(s[m][n][i] * scale_log2 - stats[m][i / 2].lse_log2);
          }
        }
      }
      if (!all_keys(seq, k0 + sub, S::kSub) ||
          !window.covers(warp_q0, 16 * MT, k0 + sub, S::kSub)) {
        mask_scores(s, seq, window, warp_q0, k0 + sub, 0.0f);
      }
      // d_s = p * (dp - delta); the product that makes dp starts at -delta.
      float ds[MT][NT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[m][n][i] = -stats[m][i / 2].delta;
        }
      }
      gemm_abt<T, D>(ds, d_o, v_tile + stage * S::kTile, sub);
      KeepMask<kBiasDropout, false, MT, NT>(dropout, warp_q0, k0 + sub)
          .replace_dropped(ds, [&](int m, int, int i) { return -stats[m][i / 2].delta; });
      multiply(ds, s);
      if (has_d_bias) bias_grad.add(ds, k0 + sub);
      Fragment<T> ds_a[MT][S::kSub / Fragment<T>::kK];
#pragma unroll
      for (int m = 0; m < MT; ++m) to_a<T>(ds_a[m], ds[m]);
      gemm_ab<T, D, MT, NT>(dq, ds_a, k_tile + stage * S::kTile, sub);
    }
    // The next tile is visible to all, and all are done with this one.
    cp_async_wait();
    __syncthreads();
    stage ^= 1;
  }
  // Also when there was no tile: every warp is done with the shared memory that is staged in now.
  if (has_d_bias) bias_grad.finish();
  __syncthreads();
  if (has_d_bias) {
    bias_grad.store(p, p.block_buckets + static_cast<int64_t>(blockIdx.x) * p.num_buckets);
  }
  store_rows<T, D, MT>(dq, reinterpret_cast<float*>(smem) + warp_id() * kStageFloats<D>,
                       head_ptr<T>(p.dq, index.batch, index.head, seq.first_row), p.dq.row_stride,
                       warp_q0, seq.len, p.head_dim, p.softmax_scale * dropout_scale, Rope(p),
                       p.rope_cos != nullptr ? p.rope_vec : p.vec);
}

// One warp a bucket of a head, after dq_kernel.
__global__ void __launch_bounds__(32) d_bias_kernel(const __grid_constant__ BwdParams p) {
  const int bucket = blockIdx.x % p.num_buckets, head = blockIdx.x / p.num_buckets;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < p.batch * p.blocks; i += 32) {
    const int64_t block =
        (static_cast<int64_t>(i / p.blocks) * p.num_heads + head) * p.blocks + i % p.blocks;
    sum += p.block_buckets[block * p.num_buckets + bucket];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) p.d_bias[bucket * p.num_heads + head] = p.dropout_scale * sum;
}

// ---- Row statistics ----------------------------------------------------------------------------

constexpr int kLanesPerRow = 8, kStatsRows = kGroupThreads / kLanesPerRow;

template <class T, int W>
__global__ void __launch_bounds__(kGroupThreads)
    stats_kernel(const __grid_constant__ BwdParams p) {
  constexpr int kBatch = 4;  // heads with loads in flight at a time
  const GroupIndex index(p);
  const Sequence seq = sequence(p, index.batch);
  const int part = threadIdx.x % kLanesPerRow;
  const int row = index.row_block * kStatsRows + threadIdx.x / kLanesPerRow;
  const bool valid = row < seq.len;
  const T* o = head_ptr<T>(p.o, index.batch, 0, seq.first_row) + row * p.o.row_stride;
  const T* d_o = head_ptr<T>(p.d_o, index.batch, 0, seq.first_row) + row * p.d_o.row_stride;
  for (int head0 = index.head0; head0 < index.end_head; head0 += kBatch) {
    float delta[kBatch] = {};
    for (int col = part * W; valid && col < p.head_dim; col += kLanesPerRow * W) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int head = min(head0 + i, index.end_head - 1);
        float x[W], y[W];
        load_vec<T, W>(x, o + head * p.o.head_stride + col);
        load_vec<T, W>(y, d_o + head * p.d_o.head_stride + col);
#pragma unroll
        for (int j = 0; j < W; ++j) delta[i] += x[j] * y[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int lanes = 1; lanes < kLanesPerRow; lanes *= 2) {
        delta[i] += __shfl_xor_sync(0xffffffffu, delta[i], lanes);
      }
      if (valid && part == i && head0 + i < index.end_head) {
        const int64_t entry = seq.lse_row + (head0 + i) * seq.lse_head_stride + row;
        const float lse = p.lse[entry];
        p.stats[entry] = {lse == -INFINITY ? INFINITY : lse * kLog2e,
                          (1.0f - p.dropout_p) * delta[i]};
      }
    }
  }
}

// Room for the statistics of this path or of the Hopper kernels.
inline size_t stats_bytes(const AttnParams& p) {
  const size_t bytes = static_cast<size_t>(p.total_tokens) * p.num_heads * sizeof(RowStats);
  return std::max((bytes + 255) / 256 * 256, bwd_sm90_stats_bytes(p));
}

inline size_t block_buckets_bytes(const AttnParams& p) {
  if (p.d_bias == nullptr) return 0;
  const int rows = for_dtype(p, [&]<class T>() {
    return for_head_dim(p, [&]<int D>() { return DqShape<T, D>::kM; });
  });
  return static_cast<size_t>(ceil_div(p.seqlen, rows)) * p.num_heads * p.batch * p.num_buckets *
         sizeof(float);
}

template <class T, int D, bool kBiasDropout>
int dkv(BwdParams& p) {
  using S = DkvShape<T, D>;
  const int64_t blocks = p.grid(S::kN);
  auto run = [&](auto kernel) {
    return launch(kernel, blocks, S::kThreads, S::kSmem, p.stream, p);
  };
  if constexpr (S::kSplit) {
    ATTN_RETURN_IF(run(dkv_kernel<T, D, true, false, kBiasDropout>));
    return run(dkv_kernel<T, D, false, true, kBiasDropout>);
  } else {
    return run(dkv_kernel<T, D, true, true, kBiasDropout>);
  }
}

template <class T, int D, bool kBiasDropout>
int dq(BwdParams& p) {
  using S = DqShape<T, D>;
  const int64_t blocks = p.grid(S::kM);
  size_t smem = S::kSmem;
  if (p.d_bias != nullptr) {
    smem += S::kWarps * BiasGrad<S::MT, S::kSub / 8>::smem_floats(p) * sizeof(float);
    // Blocks beyond the end of their sequence write nothing.
    ATTN_RETURN_IF(cudaMemsetAsync(p.block_buckets, 0, block_buckets_bytes(p),
                                   static_cast<cudaStream_t>(p.stream)));
  }
  ATTN_RETURN_IF(launch(dq_kernel<T, D, kBiasDropout>, blocks, S::kThreads, smem, p.stream, p));
  if (p.d_bias == nullptr) return ATTN_OK;
  return launch(d_bias_kernel, static_cast<int64_t>(p.num_heads) * p.num_buckets, 32, 0, p.stream,
                p);
}

template <class T>
bool takes_sm90(KernelParams& p) {
  p.check_alignment<T>({&p.q, &p.k, &p.v, &p.o, &p.d_o, &p.dq, &p.dk, &p.dv});
  return suits_sm90(p, {&p.q, &p.k, &p.v, &p.o, &p.d_o});
}

template <class T>
int bwd(const AttnParams& params) {
  BwdParams p(params);
  const bool hopper = takes_sm90<T>(p);
  if (p.d_qkv_sums != nullptr && !hopper) return ATTN_ERR_SUMS;
  char* workspace = static_cast<char*>(p.workspace);
  if (!hopper) {
    p.stats = reinterpret_cast<RowStats*>(workspace);
    const int64_t blocks = p.group_grid(kStatsRows);
    ATTN_RETURN_IF(launch(p.vec ? stats_kernel<T, kChunk<T>> : stats_kernel<T, 1>, blocks,
                          kGroupThreads, 0, p.stream, p));
  }
  workspace += stats_bytes(p);
  if (p.rope_cos != nullptr && !p.qk_rotated) {
    if (p.rotated != nullptr) {
      p.q = rotated_tensor(p, p.rotated, 0);
      p.k = rotated_tensor(p, p.rotated, 1);
    } else {
      ATTN_RETURN_IF(rotate_qk<T>(p, workspace));
      workspace += attn_rotated_bytes(&p);
    }
  }
  if (hopper) return bwd_sm90(p, reinterpret_cast<float*>(workspace));
  p.block_buckets = reinterpret_cast<float*>(workspace);
  return for_head_dim(p, [&]<int D>() -> int {
    if (p.bias_or_dropout()) {
      ATTN_RETURN_IF((dkv<T, D, true>(p)));
      return dq<T, D, true>(p);
    }
    ATTN_RETURN_IF((dkv<T, D, false>(p)));
    return dq<T, D, false>(p);
  });
}

}  // namespace attn

extern "C" {

size_t attn_bwd_workspace_bytes(const AttnParams* p) {
  const size_t rotated = attn::rotates_in_workspace(*p) ? attn_rotated_bytes(p) : 0;
  return attn::stats_bytes(*p) + rotated +
         std::max(attn::block_buckets_bytes(*p), attn::bwd_sm90_sums_bytes(*p));
}

int attn_bwd_sums_columns(const AttnParams* params) {
  return attn::for_dtype(*params, [&]<class T>() {
    attn::KernelParams p(*params);
    return attn::takes_sm90<T>(p) ? 1 : 0;
  });
}

int attn_bwd(const AttnParams* p) {
  if (p == nullptr) return ATTN_ERR_NULL;
  if (attn::empty(*p)) {
    const auto zero = [&](float* sums, int64_t count) -> int {
      if (sums == nullptr) return ATTN_OK;
      return cudaMemsetAsync(sums, 0, sizeof(float) * count, static_cast<cudaStream_t>(p->stream));
    };
    ATTN_RETURN_IF(zero(p->d_qkv_sums, int64_t{3} * p->num_heads * p->head_dim));
    return zero(p->d_bias, int64_t{p->num_buckets} * p->num_heads);
  }
  ATTN_RETURN_IF(attn::check(p, {p->q.ptr, p->k.ptr, p->v.ptr, p->o.ptr, p->d_o.ptr, p->dq.ptr,
                                 p->dk.ptr, p->dv.ptr, p->lse, p->workspace}));
  return attn::for_dtype(*p, [&]<class T>() { return attn::bwd<T>(*p); });
}

}  // extern "C"
