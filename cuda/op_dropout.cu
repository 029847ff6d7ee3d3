// Dropout whose mask is a function of the seed and the element's number alone: nothing is stored,
// and the backward pass is the same call on the gradient.
#include "ops.cuh"
#include "philox.cuh"

namespace attn {

struct DropElements {
  PhiloxKey key;
  uint32_t drop_below;
  float scale;

  template <int W>
  __device__ __forceinline__ void operator()(int64_t first, float (&x)[W],
                                             const float (&residual)[W]) const {
    if constexpr (W == 1) {
      const uint4 words = draw(first / 4);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      apply(x[0], word[first % 4], residual[0]);
    } else {
      static_assert(W % 4 == 0, "whole groups of four");
#pragma unroll
      for (int i = 0; i < W; i += 4) {
        const uint4 words = draw((first + i) / 4);
        apply(x[i], words.x, residual[i]);
        apply(x[i + 1], words.y, residual[i + 1]);
        apply(x[i + 2], words.z, residual[i + 2]);
        apply(x[i + 3], words.w, residual[i + 3]);
      }
    }
  }

 private:
  __device__ __forceinline__ uint4 draw(int64_t group) const {
    return philox4x32(
        {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), 0u, 0u}, key);
  }

  __device__ __forceinline__ void apply(float& x, uint32_t word, float residual) const {
    x = x * (word < drop_below ? 0.0f : scale) + residual;
  }
};

}  // namespace attn

int op_dropout(int32_t dtype, const void* x, const void* residual, void* y, int64_t len, float p,
               uint64_t seed, void* stream) {
  if (!(p >= 0.0f && p < 1.0f)) return ATTN_ERR_DROPOUT;
  const attn::DropElements drop{PhiloxKey(seed), dropout_threshold(p), 1.0f / (1.0f - p)};
  if (residual == nullptr) return attn::map<false>(dtype, x, nullptr, y, len, stream, drop);
  return attn::map<true>(dtype, x, residual, y, len, stream, drop);
}
