// Dropout of attention probabilities. What is dropped depends on the seed and the element's place
// alone, so the backward finds the same again: element (sequence b, head h, query i, key j) is
// dropped when word j % 4 of Philox with counter (j / 4, i, h, b) is below p * 2^32.
#pragma once

#include "launch.cuh"
#include "philox.cuh"

namespace attn {

struct Dropout {
  const PhiloxKey& key;
  uint32_t drop_below;  // 0: keep everything
  uint32_t head, batch;

  __device__ __forceinline__ Dropout(const KernelParams& p, const BlockIndex& index)
      : key(p.dropout_key), drop_below(p.drop_below), head(index.head), batch(index.batch) {}

  // Bits 0 .. 3: keep keys key0 .. key0 + 4 of this query; key0 is a multiple of 4.
  __device__ __forceinline__ uint32_t keep4(uint32_t query, uint32_t key0) const {
    const uint4 word = philox4x32({key0 / 4, query, head, batch}, key);
    return (word.x >= drop_below) | (word.y >= drop_below) << 1 | (word.z >= drop_below) << 2 |
           (word.w >= drop_below) << 3;
  }
};

// One bit for each of a thread's elements of a score tile [MT * 16][NT * 8]: set when it is kept.
// Rows are queries and columns keys, or the reverse when kTransposed; row0 and col0 are multiples
// of 8. A 16 x 8 tile has 32 groups of 4 keys, so that each lane draws one of them and the lanes
// trade bits. Without kPossible, there is no dropout and no code.
template <bool kPossible, bool kTransposed, int MT, int NT>
struct KeepMask {
  static constexpr int kWords = ceil_div(NT, 8);
  bool on;
  uint32_t bits[MT][kWords];  // bit n % 8 * 4 + i of word n / 8 belongs to element [m][n][i]

  __device__ __forceinline__ KeepMask(const Dropout& dropout, int row0, int col0)
      : on(kPossible && dropout.drop_below != 0) {
    if (!on) return;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t drawn = 0;
#pragma unroll
        for (int n = 8 * w; n < min(8 * w + 8, NT); ++n) {
          drawn |= draw(dropout, row0 + 16 * m, col0 + 8 * n) << (n % 8 * 4);
        }
        bits[m][w] = trade(drawn);
      }
    }
  }

  // x = instead(m, n, i) where dropped.
  template <class F>
  __device__ __forceinline__ void replace_dropped(float (&x)[MT][NT][4], F&& instead) const {
    if (!on) return;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool kept = bits[m][n / 8] >> (n % 8 * 4 + i) & 1;
          x[m][n][i] = kept ? x[m][n][i] : instead(m, n, i);
        }
      }
    }
  }

  __device__ __forceinline__ void zero_dropped(float (&x)[MT][NT][4]) const {
    replace_dropped(x, [](int, int, int) { return 0.0f; });
  }

 private:
  __device__ __forceinline__ static uint32_t draw(const Dropout& dropout, int row0, int col0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    if constexpr (kTransposed) {
      // Element i needs key g + i / 2 * 8 and query 2t + i % 2: lane g draws for i = g % 4.
      return dropout.keep4(col0 + 2 * t + g % 2, row0 + g % 4 / 2 * 8 + g / 4 * 4);
    } else {
      // Keys 2t, 2t + 1 share a group with those of lane t ^ 1: one draws for row g, one for g + 8.
      return dropout.keep4(row0 + g + t % 2 * 8, col0 + t / 2 * 4);
    }
  }

  // From the bits that lanes drew, 4 a tile, to those of their own elements.
  __device__ __forceinline__ static uint32_t trade(uint32_t drawn) {
    constexpr uint32_t kAll = 0xffffffffu, kFirst = 0x11111111u;
    const int lane = lane_id();
    uint32_t own = 0;
    if constexpr (kTransposed) {
      const int g = lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t from = __shfl_sync(kAll, drawn, (g / 4 * 4 + i) * 4 + lane % 4);
        own |= (from >> (g % 4) & kFirst) << i;
      }
    } else {
      const uint32_t other = __shfl_xor_sync(kAll, drawn, 1);
      constexpr uint32_t kLow = 0x33333333u;
      own = lane % 2 == 0 ? (drawn & kLow) | (other & kLow) << 2
                          : (other >> 2 & kLow) | (drawn & ~kLow);
    }
    return own;
  }
};

}  // namespace attn
