// Attention, forward: o = dropout(softmax(scale * rope(q) rope(k)^T + bias + mask)) v, and lse for
// the backward.
//
//   if RoPE: workspace <- rotated k                    (one pass, 16-byte accesses), or q and k,
//            kept for the backward (on Hopper q by the kernel there)
//   for each block of queries of each head (one thread block):
//     load q; if RoPE, rotate it in shared memory
//     for each tile of keys that some query of the block sees:
//       start loading the next k, v tiles
//       s = q k^T; if bias: s = scale s + bias; where a limit crosses the tile, masked s = -inf
//       m' = max(m, rowmax s); if m' grew: o, l *= exp(m - m')
//       p = exp(s - m'); l += rowsum p; if dropout: p = keep ? p : 0; o += p v
//     o /= l; lse = m + ln l; a row that saw no key gets o = 0, lse = -inf
//
// (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1.)
//
// What made it fast; figures from one H200, bf16, time without it / time with it at sequence
// lengths 512 and 4096 (README.md has the absolute ones):
//   1. Swizzled tiles, so that ldmatrix has no bank conflicts: head_dim 64 3.0 and 3.4, 128 3.4 and
//      4.0.
//   2. Tile addresses that depend on the lane computed once, and tile loads that step a pointer
//      instead of dividing indices (at head_dim 64 the loop fell from 2012 instructions to 1277,
//      128 of them mma); timed together with 5.: 64 1.22 and 1.26, 128 1.48 and 1.41.
//   3. Masks only in tiles that a limit crosses: 64 1.24 and 1.25, 128 1.14 and 1.16.
//   4. Two stages of k and v, filled by cp.async during the products: 64 1.09 and 1.03, 128 1.08
//      and 1.05.
//   5. Rescaling o only when a maximum grew by more than 2^8: 64 1.01 and 1.02, 128 1.03 and 1.05.
//   6. 128 keys a tile at head_dim 64, with q read again from shared memory, instead of 64 keys
//      with q in registers: 1.06 and 1.05.
// With RoPE, rotating k ahead costs 0.034 ms for 64 MiB of keys, which is the speed of memory, and
// rotating q in its block 0.025 ms.
#include "bias.cuh"
#include "dropout.cuh"
#include "sm90.cuh"
#include "softmax.cuh"

namespace attn {

// Tile shape for elements of kSize bytes and tile width D: a block owns 16 * MT * kWarps queries
// and walks over the keys kN at a time. kKeepQ: query fragments stay in registers. Without
// kBiasDropout, there is neither.
template <int kSize, int D, bool kBiasDropout>
struct FwdConfig {
  static constexpr int MT = D <= 128 ? 2 : 1, kWarps = 4;
  static constexpr int kN = D <= 64 && !kBiasDropout ? 128 : D <= 128 ? 64 : 32;
  static constexpr bool kKeepQ = false;
};
template <int D, bool kBiasDropout>
struct FwdConfig<4, D, kBiasDropout> {
  static constexpr int MT = 1, kWarps = D <= 128 ? 4 : 2, kN = D <= 128 ? 32 : 16;
  static constexpr bool kKeepQ = false;
};

template <class T, int D, bool kBiasDropout>
struct FwdShape : FwdConfig<sizeof(T), D, kBiasDropout> {
  using C = FwdConfig<sizeof(T), D, kBiasDropout>;
  static constexpr int kM = 16 * C::MT * C::kWarps, kThreads = 32 * C::kWarps;
  static constexpr int kQ = kM * D, kTile = C::kN * D;  // elements
  static constexpr size_t kSmem = (kQ + 4 * kTile) * sizeof(T);
  static_assert(C::kWarps * kStageFloats<D> * 4 <= kSmem, "the store stages in the same memory");
};

template <class T, int D, bool kBiasDropout>
__global__ void __launch_bounds__(FwdShape<T, D, kBiasDropout>::kThreads, 1)
    fwd_kernel(const __grid_constant__ KernelParams p) {
  using S = FwdShape<T, D, kBiasDropout>;
  constexpr int MT = S::MT, kN = S::kN, NT = kN / 8;
  extern __shared__ __align__(128) char smem[];
  T* q_tile = reinterpret_cast<T*>(smem);
  T* k_tile = q_tile + S::kQ;  // two stages of K, then two of V
  T* v_tile = k_tile + 2 * S::kTile;

  BlockIndex index(p);
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
  TileLoader<T, D, S::kM, S::kThreads>(head_ptr<T>(p.q, index.batch, index.head, seq.first_row),
                                       p.q.row_stride, seq.len, p.head_dim, p.vec)
      .load(q_tile, q0);
  load_keys(k_begin, 0);
  cp_async_wait();
  __syncthreads();
  const Rope rope(p);
  if (rope.cos != nullptr) {
    if (p.rope_vec) {
      rotate_tile<T, D, S::kM, S::kThreads, kChunk<T>>(q_tile, rope, q0, seq.len);
    } else {
      rotate_tile<T, D, S::kM, S::kThreads, 1>(q_tile, rope, q0, seq.len);
    }
    __syncthreads();
  }
  const RowOperand<T, D, MT, S::kKeepQ> q(q_tile, warp_id() * 16 * MT);

  // The softmax takes maxima of scores, so a negative scale moves its sign into them. Scores with a
  // bias are scaled already.
  const bool negate = p.softmax_scale < 0.0f;
  const float scale_log2 =
      kBiasDropout ? 1.0f : fmaxf(fabsf(p.softmax_scale) * kLog2e, 1e-30f);
  const ScoreBias bias(p, index.head);
  const Dropout dropout(p, index);
  float out[MT][D / 8][4] = {};
  OnlineSoftmax<MT> softmax;
  int stage = 0;
  for (int k0 = k_begin; k0 < k_end; k0 += kN) {
    if (k0 + kN < k_end) load_keys(k0 + kN, stage ^ 1);
    float s[MT][NT][4] = {};
    gemm_abt<T, D>(s, q, k_tile + stage * S::kTile, 0);
    if constexpr (kBiasDropout) {
      bias.template apply<false>(s, p.softmax_scale * kLog2e, warp_q0, k0);
    } else if (negate) {
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) (&s[0][0][0])[i] *= -1.0f;
    }
    if (!all_keys(seq, k0, kN) || !window.covers(warp_q0, 16 * MT, k0, kN)) {
      mask_scores(s, seq, window, warp_q0, k0, -INFINITY);
    }
    softmax.update(s, out, scale_log2);
    KeepMask<kBiasDropout, false, MT, NT>(dropout, warp_q0, k0).zero_dropped(s);
    Fragment<T> probs[MT][kN / Fragment<T>::kK];
#pragma unroll
    for (int m = 0; m < MT; ++m) to_a<T>(probs[m], s[m]);
    gemm_ab<T, D, MT, NT>(out, probs, v_tile + stage * S::kTile, 0);
    // The next tile is visible to all, and all are done with this one.
    cp_async_wait();
    __syncthreads();
    stage ^= 1;
  }
  // Also when there was no tile: every warp is done with the shared memory that is staged in now.
  __syncthreads();

  float lse[MT][2];
  softmax.finish(out, lse, scale_log2);
  float* lse_row = p.lse + seq.lse_row + index.head * seq.lse_head_stride;
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) {
    const int row = warp_q0 + i * 8 + lane_id() / 4;
    if (lane_id() % 4 == 0 && row < seq.len) lse_row[row] = lse[i / 2][i % 2];
  }
  store_rows<T, D, MT>(out, reinterpret_cast<float*>(smem) + warp_id() * kStageFloats<D>,
                       head_ptr<T>(p.o, index.batch, index.head, seq.first_row), p.o.row_stride,
                       warp_q0, seq.len, p.head_dim, kBiasDropout ? p.dropout_scale : 1.0f,
                       Rope::none(), p.vec);
}

template <class T, int D, bool kBiasDropout>
int fwd_portable(KernelParams& p) {
  using S = FwdShape<T, D, kBiasDropout>;
  const int64_t blocks = p.grid(S::kM);
  return launch(fwd_kernel<T, D, kBiasDropout>, blocks, S::kThreads, S::kSmem, p.stream, p);
}

template <class T>
int fwd(const AttnParams& params) {
  KernelParams p(params);
  p.check_alignment<T>({&p.q, &p.k, &p.v, &p.o});
  if (p.qk_rotated) p.rope_cos = p.rope_sin = nullptr;
  AttnTensor rotated_q = {};  // where to keep them
  if (p.rope_cos != nullptr) {
    AttnTensor rotated_k = workspace_tensor(p, p.workspace);
    if (p.rotated != nullptr) {
      rotated_q = rotated_tensor(p, p.rotated, 0);
      rotated_k = rotated_tensor(p, p.rotated, 1);
    }
    ATTN_RETURN_IF(rotate<T>(p, p.k, rotated_k));
    p.k = rotated_k;
  }
  if (suits_sm90(p, {&p.q, &p.k, &p.v})) return fwd_sm90(p, rotated_q);
  if (rotated_q.ptr != nullptr) {
    ATTN_RETURN_IF(rotate<T>(p, p.q, rotated_q));
    p.q = rotated_q;
    p.rope_cos = p.rope_sin = nullptr;
  }
  return for_head_dim(p, [&]<int D>() {
    return p.bias_or_dropout() ? fwd_portable<T, D, true>(p) : fwd_portable<T, D, false>(p);
  });
}

}  // namespace attn

extern "C" {

size_t attn_fwd_workspace_bytes(const AttnParams* p) {
  return attn::rotates_in_workspace(*p) ? attn::workspace_tensor_bytes(*p) : 0;
}

size_t attn_rotated_bytes(const AttnParams* p) { return 2 * attn::workspace_tensor_bytes(*p); }

int attn_fwd(const AttnParams* p) {
  if (p == nullptr) return ATTN_ERR_NULL;
  if (attn::empty(*p)) return ATTN_OK;
  ATTN_RETURN_IF(attn::check(p, {p->q.ptr, p->k.ptr, p->v.ptr, p->o.ptr, p->lse}));
  if (p->workspace == nullptr && attn_fwd_workspace_bytes(p) != 0) return ATTN_ERR_NULL;
  return attn::for_dtype(*p, [&]<class T>() { return attn::fwd<T>(*p); });
}

const char* attn_error_string(int code) {
  switch (code) {
    case ATTN_ERR_NULL: return "a required pointer (tensor, lse or workspace) is null";
    case ATTN_ERR_HEAD_DIM: return "head_dim must be 1 to 256";
    case ATTN_ERR_DTYPE: return "dtype must be bf16, f16 or f32";
    case ATTN_ERR_ROPE: return "RoPE needs both tables and an even head_dim";
    case ATTN_ERR_SEQUENCES: return "at most one of cu_seqlens, key_lens and key_mask may be set";
    case ATTN_ERR_SIZE: return "a size is negative, seqlen is above 2^30, or the grid is too large";
    case ATTN_ERR_SHARED_MEMORY:
      return "this device has too little shared memory per block for this dtype and head_dim; use "
             "bf16 or f16, or a smaller head_dim";
    case ATTN_ERR_BIAS:
      return "d_bias needs bias and bias_buckets, and 1 to 1024 buckets";
    case ATTN_ERR_DROPOUT: return "dropout_p must be in [0, 1)";
    case ATTN_ERR_SUMS: return "d_qkv_sums needs a call for which attn_bwd_sums_columns says 1";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}

}  // extern "C"
