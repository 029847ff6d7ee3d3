// What the launchers of both directions share: checks, and the choice of a kernel by dtype and
// head_dim.
#pragma once

#include <initializer_list>

#include "mask.cuh"
#include "philox.cuh"
#include "position.cuh"

namespace attn {

// Elementwise kernels: a block of threads takes some rows of kGroupHeads heads of one sequence.
constexpr int kGroupHeads = 8, kGroupThreads = 256;
constexpr int kMaxBuckets = 1024;  // RelativeBias::MAX_CUDA_BUCKETS

// The caller's parameters with what the kernels derive from them on the host.
struct KernelParams : AttnParams {
  bool vec;       // rows of all tensors may be read and written in 16-byte chunks
  bool rope_vec;  // so may the runs of a rotation, and its tables
  int blocks;     // row blocks of a sequence
  PhiloxKey dropout_key;
  uint32_t drop_below;  // random words below it drop their element
  float dropout_scale;  // of kept elements

  explicit KernelParams(const AttnParams& p)
      : AttnParams(p), vec(), rope_vec(), blocks(), dropout_key(dropout_seed),
        drop_below(dropout_threshold(dropout_p)), dropout_scale(1.0f / (1.0f - dropout_p)) {
    if (cu_seqlens != nullptr) {
      for (AttnTensor* t : {&q, &k, &v, &o, &d_o, &dq, &dk, &dv}) t->batch_stride = 0;
    }
  }

  template <class T>
  void check_alignment(std::initializer_list<const AttnTensor*> tensors) {
    vec = head_dim % kChunk<T> == 0;
    for (const AttnTensor* t : tensors) vec = vec && aligned<T>(*t);
    rope_vec = vec && attn::rope_vec<T>(*this);
  }

  // Scores or probabilities change on their way, which kernels know at compile time.
  bool bias_or_dropout() const { return bias != nullptr || drop_below != 0; }

  // Blocks of a kernel whose blocks take `rows` rows of one head.
  int64_t grid(int rows) {
    blocks = ceil_div(seqlen, rows);
    return static_cast<int64_t>(blocks) * num_heads * batch;
  }

  // The same for kernels that take kGroupHeads heads at a time.
  int64_t group_grid(int rows) {
    blocks = ceil_div(seqlen, rows);
    return static_cast<int64_t>(blocks) * ceil_div(num_heads, kGroupHeads) * batch;
  }
};

// The row block, head and sequence of a thread block. Blocks of one head run side by side, so that
// they find its keys and values in L2.
struct BlockIndex {
  int block, head, batch;

  __device__ __forceinline__ explicit BlockIndex(const KernelParams& p) {
    block = blockIdx.x % p.blocks;
    head = blockIdx.x / p.blocks % p.num_heads;
    batch = blockIdx.x / p.blocks / p.num_heads;
  }
};

struct GroupIndex {
  int row_block, head0, end_head, batch;

  __device__ __forceinline__ explicit GroupIndex(const KernelParams& p) {
    const int groups = ceil_div(p.num_heads, kGroupHeads);
    row_block = blockIdx.x % p.blocks;
    head0 = blockIdx.x / p.blocks % groups * kGroupHeads;
    end_head = min(head0 + kGroupHeads, p.num_heads);
    batch = blockIdx.x / p.blocks / groups;
  }
};

// to = from rotated, or rotated back, for all rows and heads. A thread keeps the angles of its W
// pairs.
template <class T, int W, bool kInverse>
__global__ void __launch_bounds__(kGroupThreads)
    rotate_kernel(const __grid_constant__ KernelParams p, AttnTensor from, AttnTensor to) {
  constexpr int kBatch = 4;  // heads with loads in flight at a time
  const GroupIndex index(p);
  const Sequence seq = sequence(p, index.batch);
  const Rope rope(p);
  const int units = rope.half / W, rows = kGroupThreads / units;
  const int r = threadIdx.x / units, row = index.row_block * rows + r;
  if (r >= rows || row >= seq.len) return;
  const int pair0 = threadIdx.x % units * W;
  const Rope::Turn<W> turn(rope, row, pair0, kInverse);
  const T* src = head_ptr<T>(from, index.batch, 0, seq.first_row) + row * from.row_stride;
  T* dst = head_ptr<T>(to, index.batch, 0, seq.first_row) + row * to.row_stride;
  for (int head0 = index.head0; head0 < index.end_head; head0 += kBatch) {
    float x[kBatch][2][W];
#pragma unroll
    for (int i = 0; i < 2 * kBatch; ++i) {
      const int head = min(head0 + i / 2, index.end_head - 1);
      load_vec<T, W>(x[i / 2][i % 2], src + head * from.head_stride + rope.column(pair0, i % 2, W));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (head0 + i >= index.end_head) break;
      turn.apply(x[i]);
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        store_vec<T, W>(dst + (head0 + i) * to.head_stride + rope.column(pair0, run, W), x[i][run]);
      }
    }
  }
}

template <class T, bool kInverse = false>
int rotate(KernelParams p, const AttnTensor& from, const AttnTensor& to) {
  const int width = p.rope_vec ? kChunk<T> : 1;
  const int64_t blocks = p.group_grid(kGroupThreads / (p.head_dim / 2 / width));
  return launch(p.rope_vec ? rotate_kernel<T, kChunk<T>, kInverse> : rotate_kernel<T, 1, kInverse>,
                blocks, kGroupThreads, 0, p.stream, p, from, to);
}

// Whether a call puts what it rotates into its workspace.
inline bool rotates_in_workspace(const AttnParams& p) {
  return p.rope_cos != nullptr && p.rotated == nullptr && !p.qk_rotated;
}

// The two tensors of AttnParams::rotated.
inline AttnTensor rotated_tensor(const AttnParams& p, void* rotated, int which) {
  return workspace_tensor(p, static_cast<char*>(rotated) + which * workspace_tensor_bytes(p));
}

// Replaces q and k by their rotations at `rotated`.
template <class T>
int rotate_qk(KernelParams& p, void* rotated) {
  int which = 0;
  for (AttnTensor* t : {&p.q, &p.k}) {
    const AttnTensor to = rotated_tensor(p, rotated, which++);
    ATTN_RETURN_IF(rotate<T>(p, *t, to));
    *t = to;
  }
  return ATTN_OK;
}

inline int check(const AttnParams* p, std::initializer_list<const void*> required) {
  for (const void* ptr : required) {
    if (ptr == nullptr) return ATTN_ERR_NULL;
  }
  if (p->head_dim < 1 || p->head_dim > kMaxHeadDim) return ATTN_ERR_HEAD_DIM;
  if (p->dtype < ATTN_BF16 || p->dtype > ATTN_F32) return ATTN_ERR_DTYPE;
  if ((p->rope_cos == nullptr) != (p->rope_sin == nullptr)) return ATTN_ERR_ROPE;
  if (p->rope_cos != nullptr && p->head_dim % 2 != 0) return ATTN_ERR_ROPE;
  if (p->qk_rotated && p->rope_cos == nullptr) return ATTN_ERR_ROPE;
  if ((p->cu_seqlens != nullptr) + (p->key_lens != nullptr) + (p->key_mask != nullptr) > 1) {
    return ATTN_ERR_SEQUENCES;
  }
  if (p->d_bias != nullptr && (p->bias == nullptr || p->bias_buckets == nullptr ||
                               p->num_buckets < 1 || p->num_buckets > kMaxBuckets)) {
    return ATTN_ERR_BIAS;
  }
  if (!(p->dropout_p >= 0.0f && p->dropout_p < 1.0f)) return ATTN_ERR_DROPOUT;
  if (p->batch < 0 || p->seqlen < 0 || p->num_heads < 0 || p->total_tokens < 0 ||
      p->seqlen > 1 << 30) {
    return ATTN_ERR_SIZE;
  }
  return ATTN_OK;
}

inline bool empty(const AttnParams& p) {
  return p.batch == 0 || p.seqlen == 0 || p.num_heads == 0;
}

// Calls f.template operator()<T>() for the element type.
template <class F>
int for_dtype(const AttnParams& p, F&& f) {
  switch (p.dtype) {
    case ATTN_BF16: return f.template operator()<bf16>();
    case ATTN_F16: return f.template operator()<f16>();
    default: return f.template operator()<float>();
  }
}

// Calls f.template operator()<D>() for the tile width that holds head_dim.
template <class F>
int for_head_dim(const AttnParams& p, F&& f) {
  if (p.head_dim <= 32) return f.template operator()<32>();
  if (p.head_dim <= 64) return f.template operator()<64>();
  if (p.head_dim <= 96) return f.template operator()<96>();
  if (p.head_dim <= 128) return f.template operator()<128>();
  return f.template operator()<256>();
}

}  // namespace attn
