// The attention kernels for Hopper (attn_fwd_sm90.cu, attn_bwd_sm90.cu) as the portable ones see
// them.
#pragma once

#include <cstdlib>

#include "launch.cuh"
#include "tensor_map.cuh"

namespace attn {

// Whether the TMA can read this tensor: strides are positive and below 2^40 bytes.
inline bool suits_tma(const AttnParams& p, const AttnTensor& t) {
  const auto fits = [](int64_t stride, int64_t entries) {
    return entries == 1 || (stride > 0 && stride < int64_t{1} << 39);
  };
  const bool packed = p.cu_seqlens != nullptr;
  return fits(t.head_stride, p.num_heads) &&
         fits(t.row_stride, packed ? p.total_tokens : p.seqlen) &&
         fits(t.batch_stride, packed ? 1 : p.batch);
}

// Whether the current device and these parameters, with these tensors to read, suit the Hopper
// kernels: a device of compute capability 9.0, 16-bit elements, head_dim 64 or 128, rows on 16-byte
// boundaries, neither bias nor dropout and, as the softmax takes maxima of unscaled scores, a
// positive scale. The environment variable ATTN_PORTABLE rules them out, for tests of the others.
inline bool suits_sm90(const KernelParams& p, std::initializer_list<const AttnTensor*> tensors) {
  if (std::getenv("ATTN_PORTABLE") != nullptr) return false;
  if (p.dtype == ATTN_F32 || (p.head_dim != 64 && p.head_dim != 128)) return false;
  if (!p.vec || (p.rope_cos != nullptr && !p.rope_vec)) return false;
  if (p.bias_or_dropout() || !(p.softmax_scale > 0.0f) || p.total_tokens > INT32_MAX) return false;
  for (const AttnTensor* t : tensors) {
    if (!suits_tma(p, *t)) return false;
  }
  return on_sm90();
}

// attn_fwd with k rotated already, and attn_bwd with q and k rotated already, for parameters that
// suits_sm90 accepts. fwd_sm90 leaves rotated queries at rotated_q unless its ptr is null. bwd_sm90
// takes bwd_sm90_stats_bytes at p.workspace, and at `sums`, where p.d_qkv_sums is set,
// bwd_sm90_sums_bytes.
int fwd_sm90(const KernelParams& p, const AttnTensor& rotated_q);
int bwd_sm90(const KernelParams& p, float* sums);
size_t bwd_sm90_stats_bytes(const AttnParams& p);
size_t bwd_sm90_sums_bytes(const AttnParams& p);

}  // namespace attn
