// Which keys a query sees: sequence bounds, key padding, causal and sliding-window limits.
// All of them are known per tile, so only tiles that a limit crosses test single elements.
#pragma once

#include "common.cuh"

namespace attn {

// One sequence of the batch.
struct Sequence {
  int64_t first_row;        // its first token in packed tensors, else 0
  int64_t lse_row;          // first entry of head 0 in lse-shaped arrays
  int64_t lse_head_stride;  // entries from one head to the next there
  int len;                  // its queries
  int key_end;              // keys from here on are padding
  const uint8_t* key_mask;  // null, or its row of the key mask
};

__device__ __forceinline__ Sequence sequence(const AttnParams& p, int batch) {
  Sequence s;
  s.first_row = 0;
  s.len = p.seqlen;
  s.lse_row = static_cast<int64_t>(batch) * p.num_heads * p.seqlen;
  s.lse_head_stride = p.seqlen;
  if (p.cu_seqlens != nullptr) {
    s.first_row = p.cu_seqlens[batch];
    s.len = p.cu_seqlens[batch + 1] - p.cu_seqlens[batch];
    s.lse_row = s.first_row;
    s.lse_head_stride = p.total_tokens;
  }
  s.key_end = p.key_lens != nullptr ? min(p.key_lens[batch], s.len) : s.len;
  s.key_mask = nullptr;
  if (p.key_mask != nullptr) s.key_mask = p.key_mask + static_cast<int64_t>(batch) * p.seqlen;
  return s;
}

// A query at position i sees keys i - left to i + right.
struct Window {
  int left, right;

  __device__ __forceinline__ explicit Window(const AttnParams& p) {
    constexpr int kUnlimited = 1 << 30;
    left = p.window_left >= 0 ? min(p.window_left, kUnlimited) : kUnlimited;
    right = p.causal ? 0 : p.window_right >= 0 ? min(p.window_right, kUnlimited) : kUnlimited;
  }

  // Keys that queries q0 .. q0 + n see, before the sequence's bounds.
  __device__ __forceinline__ int first_key(int q0) const { return max(q0 - left, 0); }
  __device__ __forceinline__ int end_key(int q0, int n) const { return q0 + n + right; }
  // Queries that see keys k0 .. k0 + n.
  __device__ __forceinline__ int first_query(int k0) const { return max(k0 - right, 0); }
  __device__ __forceinline__ int end_query(int k0, int n) const { return k0 + n + left; }
  // Every query of q0 .. q0 + nq sees every key of k0 .. k0 + nk.
  __device__ __forceinline__ bool covers(int q0, int nq, int k0, int nk) const {
    return k0 >= q0 + nq - 1 - left && k0 + nk - 1 <= q0 + right;
  }
  __device__ __forceinline__ bool sees(int q, int k) const {
    return k >= q - left && k <= q + right;
  }
};

// One bit for each of the N keys from k0 on: set when the key is no padding.
template <int N>
struct KeyBits {
  static constexpr int kWords = ceil_div(N, 32);
  uint32_t words[kWords];

  // All lanes of a warp together.
  __device__ __forceinline__ KeyBits(const Sequence& s, int k0) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int k = k0 + 32 * w + lane_id();
      words[w] = __ballot_sync(0xffffffffu,
                               k < s.key_end && (s.key_mask == nullptr || s.key_mask[k] != 0));
    }
  }

  __device__ __forceinline__ bool test(int i) const { return words[i / 32] >> (i % 32) & 1; }
};

// No key of k0 .. k0 + n is padding.
__device__ __forceinline__ bool all_keys(const Sequence& s, int k0, int n) {
  return k0 + n <= s.key_end && s.key_mask == nullptr;
}

// Sets `value` where the query must not see the key, in scores [MT * 16 queries from q0 on]
// [NT * 8 keys from k0 on].
template <int MT, int NT>
__device__ __forceinline__ void mask_scores(float (&s)[MT][NT][4], const Sequence& seq,
                                            const Window& window, int q0, int k0, float value) {
  const KeyBits<NT * 8> bits(seq, k0);
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int q = q0 + 16 * m + g + i / 2 * 8, c = 8 * n + 2 * t + i % 2;
        if (!(bits.test(c) && window.sees(q, k0 + c))) s[m][n][i] = value;
      }
    }
  }
}

}  // namespace attn
