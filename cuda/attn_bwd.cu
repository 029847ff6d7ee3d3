#include "launch.cuh"

namespace attn {

// Tile shapes for elements of kSize bytes and tile width D.
//
// dk, dv: a block owns 16 * MT * kWarps keys and walks over the queries kM at a time, of which
// kSub enter one matrix product. kKeep: key and value fragments stay in registers.
// kSplit: dv and dk are computed by two launches, as registers hold only one accumulator.
template <int kSize, int D>
struct DkvConfig {
  static constexpr int MT = D <= 64 ? 2 : 1, kWarps = 4, kM = D <= 128 ? 64 : 32;
  static constexpr int kSub = D <= 64 ? 16 : kM, kBlocks = 1;
  static constexpr bool kKeep = false, kSplit = D > 128;
};
template <int D>
struct DkvConfig<4, D> {
  static constexpr int MT = 1, kWarps = D <= 128 ? 4 : 2, kM = D <= 64 ? 32 : 16, kSub = kM;
  static constexpr int kBlocks = 1;
  static constexpr bool kKeep = false, kSplit = D > 128;
};

// dq: a block owns 16 * MT * kWarps queries and walks over the keys kN at a time, of which kSub
// enter one matrix product. kKeep: query and d_o fragments stay in registers.
template <int kSize, int D>
struct DqConfig {
  static constexpr int MT = D <= 128 ? 2 : 1, kWarps = 4, kN = D <= 64 ? 64 : 32, kSub = 32;
  static constexpr int kBlocks = 1;
  static constexpr bool kKeep = D <= 64;
};
template <int D>
struct DqConfig<4, D> {
  static constexpr int MT = 1, kWarps = D <= 128 ? 4 : 2, kN = D <= 64 ? 32 : 16, kSub = kN;
  static constexpr int kBlocks = 1;
  static constexpr bool kKeep = false;
};

// What the backward needs of one query besides its rows.
struct RowStats {
  float lse_log2;  // log2 sum_k exp(score); +inf where every key is masked, so that exp2 gives 0
  float delta;     // dot(d_o, o) = sum_k p * dp
};

// Shared by the kernels: q and k in p are rotated already, stats has lse's shape.
struct BwdParams : KernelParams {
  RowStats* stats;
  explicit BwdParams(const AttnParams& p) : KernelParams(p), stats() {}
};

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

template <class T, int D, bool kDv, bool kDk>
__global__ void __launch_bounds__(DkvShape<T, D>::kThreads, DkvShape<T, D>::kBlocks)
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
  const RowOperand<T, D, MT, S::kKeep> k(k_tile, warp_id() * 16 * MT);
  const RowOperand<T, D, MT, S::kKeep && kDk> v(v_tile, warp_id() * 16 * MT);

  const int g = lane_id() / 4, t = lane_id() % 4;
  const bool whole = all_keys(seq, k0, kN);
  bool key_valid[MT][2];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    const int key = warp_k0 + 8 * i + g;
    key_valid[i / 2][i % 2] =
        key < seq.key_end && (seq.key_mask == nullptr || seq.key_mask[key] != 0);
  }
  const float scale_log2 = p.softmax_scale * kLog2e;
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
      if constexpr (kDv) {
        Fragment<T> probs[MT][S::kSub / Fragment<T>::kK];
#pragma unroll
        for (int m = 0; m < MT; ++m) to_a<T>(probs[m], s[m]);
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
                         p.dv.row_stride, warp_k0, seq.len, p.head_dim, 1.0f, Rope::none(), p.vec);
  }
  if constexpr (kDk) {
    store_rows<T, D, MT>(dk, staging, head_ptr<T>(p.dk, index.batch, index.head, seq.first_row),
                         p.dk.row_stride, warp_k0, seq.len, p.head_dim, p.softmax_scale, Rope(p),
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

template <class T, int D>
__global__ void __launch_bounds__(DqShape<T, D>::kThreads, DqShape<T, D>::kBlocks)
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

  const float scale_log2 = p.softmax_scale * kLog2e;
  float dq[MT][D / 8][4] = {};
  int stage = 0;
  for (int k0 = k_begin; k0 < k_end; k0 += kN) {
    if (k0 + kN < k_end) load_keys(k0 + kN, stage ^ 1);
#pragma unroll
    for (int sub = 0; sub < kN; sub += S::kSub) {
      float s[MT][NT][4] = {};
      gemm_abt<T, D>(s, q, k_tile + stage * S::kTile, sub);
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
      multiply(ds, s);
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
  __syncthreads();
  store_rows<T, D, MT>(dq, reinterpret_cast<float*>(smem) + warp_id() * kStageFloats<D>,
                       head_ptr<T>(p.dq, index.batch, index.head, seq.first_row), p.dq.row_stride,
                       warp_q0, seq.len, p.head_dim, p.softmax_scale, Rope(p),
                       p.rope_cos != nullptr ? p.rope_vec : p.vec);
}

// ---- Preprocess --------------------------------------------------------------------------------

constexpr int kPrepareRows = 8, kPrepareThreads = 256, kLanesPerRow = 8;

// Row statistics, and with RoPE the rotated q and k. W: vector width of the sums; R: of rotations.
template <class T, int W, int R>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ BwdParams p, AttnTensor rotated_q,
                   AttnTensor rotated_k) {
  const int batch = blockIdx.x / p.blocks, row0 = blockIdx.x % p.blocks * kPrepareRows;
  const Sequence seq = sequence(p, batch);
  const int rows = min(kPrepareRows, seq.len - row0);
  if (rows <= 0) return;
  // All lanes of a warp take part in the shuffles, so the bound is rounded up to whole warps.
  const int total = ceil_div(rows * p.num_heads * kLanesPerRow, 32) * 32;
  for (int index = threadIdx.x; index < total; index += kPrepareThreads) {
    const int part = index % kLanesPerRow, head = index / kLanesPerRow % p.num_heads;
    const int r = index / kLanesPerRow / p.num_heads, row = row0 + r;
    float delta = 0.0f;
    if (r < rows) {
      const T* o = head_ptr<T>(p.o, batch, head, seq.first_row) + row * p.o.row_stride;
      const T* d_o = head_ptr<T>(p.d_o, batch, head, seq.first_row) + row * p.d_o.row_stride;
      for (int col = part * W; col < p.head_dim; col += kLanesPerRow * W) {
        float x[W], y[W];
        load_vec<T, W>(x, o + col);
        load_vec<T, W>(y, d_o + col);
#pragma unroll
        for (int i = 0; i < W; ++i) delta += x[i] * y[i];
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanesPerRow; lanes *= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
    }
    if (part == 0 && r < rows) {
      const int64_t entry = seq.lse_row + head * seq.lse_head_stride + row;
      const float lse = p.lse[entry];
      p.stats[entry] = {lse == -INFINITY ? INFINITY : lse * kLog2e, delta};
    }
  }
  if (p.rope_cos != nullptr) {
    const Rope rope(p);
    rotate_rows<T, R>(p.q, rotated_q, rope, batch, p.num_heads, seq.first_row, row0, rows);
    rotate_rows<T, R>(p.k, rotated_k, rope, batch, p.num_heads, seq.first_row, row0, rows);
  }
}

inline size_t stats_bytes(const AttnParams& p) {
  return (static_cast<size_t>(p.total_tokens) * p.num_heads * sizeof(RowStats) + 255) / 256 * 256;
}

template <class T>
int bwd(const AttnParams& params) {
  BwdParams p(params);
  p.check_alignment<T>({&p.q, &p.k, &p.v, &p.o, &p.d_o, &p.dq, &p.dk, &p.dv});
  char* workspace = static_cast<char*>(p.workspace);
  p.stats = reinterpret_cast<RowStats*>(workspace);
  const AttnTensor rotated_q = workspace_tensor(p, workspace + stats_bytes(p));
  const AttnTensor rotated_k =
      workspace_tensor(p, workspace + stats_bytes(p) + workspace_tensor_bytes(p));
  p.blocks = ceil_div(p.seqlen, kPrepareRows);
  const auto prepare = !p.vec        ? prepare_kernel<T, 1, 1>
                       : !p.rope_vec ? prepare_kernel<T, kChunk<T>, 1>
                                     : prepare_kernel<T, kChunk<T>, kChunk<T>>;
  ATTN_RETURN_IF(launch(prepare, static_cast<int64_t>(p.blocks) * p.batch, kPrepareThreads, 0,
                        p.stream, p, rotated_q, rotated_k));
  if (p.rope_cos != nullptr) {
    p.q = rotated_q;
    p.k = rotated_k;
  }
  return for_head_dim(p, [&]<int D>() -> int {
    using S = DkvShape<T, D>;
    int64_t blocks = p.grid(S::kN);
    if constexpr (S::kSplit) {
      ATTN_RETURN_IF(launch(dkv_kernel<T, D, true, false>, blocks, S::kThreads, S::kSmem, p.stream,
                            p));
      ATTN_RETURN_IF(launch(dkv_kernel<T, D, false, true>, blocks, S::kThreads, S::kSmem, p.stream,
                            p));
    } else {
      ATTN_RETURN_IF(launch(dkv_kernel<T, D, true, true>, blocks, S::kThreads, S::kSmem, p.stream,
                            p));
    }
    using Q = DqShape<T, D>;
    blocks = p.grid(Q::kM);
    return launch(dq_kernel<T, D>, blocks, Q::kThreads, Q::kSmem, p.stream, p);
  });
}

}  // namespace attn

extern "C" {

size_t attn_bwd_workspace_bytes(const AttnParams* p) {
  const size_t rotated = p->rope_cos != nullptr ? 2 * attn::workspace_tensor_bytes(*p) : 0;
  return attn::stats_bytes(*p) + rotated;
}

int attn_bwd(const AttnParams* p) {
  if (p == nullptr) return ATTN_ERR_NULL;
  if (attn::empty(*p)) return ATTN_OK;
  ATTN_RETURN_IF(attn::check(p, {p->q.ptr, p->k.ptr, p->v.ptr, p->o.ptr, p->d_o.ptr, p->dq.ptr,
                                 p->dk.ptr, p->dv.ptr, p->lse, p->workspace}));
  return attn::for_dtype(*p, [&]<class T>() { return attn::bwd<T>(*p); });
}

}  // extern "C"
