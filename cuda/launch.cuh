// What the launchers of both directions share: checks, and the choice of a kernel by dtype and
// head_dim.
#pragma once

#include "mask.cuh"
#include "position.cuh"

namespace attn {

// The caller's parameters with what the kernels derive from them on the host.
struct KernelParams : AttnParams {
  bool vec;       // rows of all tensors may be read and written in 16-byte chunks
  bool rope_vec;  // so may the runs of a rotation, and its tables
  int blocks;     // row blocks of a sequence

  explicit KernelParams(const AttnParams& p) : AttnParams(p), vec(), rope_vec(), blocks() {
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

  int64_t grid(int rows) {
    blocks = ceil_div(seqlen, rows);
    return static_cast<int64_t>(blocks) * num_heads * batch;
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

inline int check(const AttnParams* p, std::initializer_list<const void*> required) {
  for (const void* ptr : required) {
    if (ptr == nullptr) return ATTN_ERR_NULL;
  }
  if (p->head_dim < 1 || p->head_dim > kMaxHeadDim) return ATTN_ERR_HEAD_DIM;
  if (p->dtype < ATTN_BF16 || p->dtype > ATTN_F32) return ATTN_ERR_DTYPE;
  if ((p->rope_cos == nullptr) != (p->rope_sin == nullptr)) return ATTN_ERR_ROPE;
  if (p->rope_cos != nullptr && p->head_dim % 2 != 0) return ATTN_ERR_ROPE;
  if ((p->cu_seqlens != nullptr) + (p->key_lens != nullptr) + (p->key_mask != nullptr) > 1) {
    return ATTN_ERR_SEQUENCES;
  }
  if (p->batch < 0 || p->seqlen < 0 || p->num_heads < 0 || p->total_tokens < 0) {
    return ATTN_ERR_SIZE;
  }
  return ATTN_OK;
}

inline bool empty(const AttnParams& p) { return p.batch == 0 || p.seqlen == 0 || p.num_heads == 0; }

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
