// Biases of scores that depend on the head and on distance = key - query alone: ALiBi (Press et al.
// 2021, https://arxiv.org/abs/2108.12409) and T5's relative bias (Raffel et al. 2019,
// https://arxiv.org/abs/1910.10683). Both come as a table over distances; the gradient is summed
// over the distances of a bucket, as T5's weights are one for each bucket.
//
// Elements of a score tile are accumulator fragments: with g = lane / 4 and t = lane % 4, [m][n][2 *
// h + e] is row 16 m + 8 h + g, column 8 n + 2 t + e. So col - row is 8 (n - 2 m - h) + e + 2 t - g:
// a thread's elements with equal n - 2 m - h and e share a distance.
#pragma once

#include "launch.cuh"

namespace attn {

struct ScoreBias {
  const float* table;  // where distance 0 is; null: no bias
  int longest;         // distances are -longest .. longest

  __device__ __forceinline__ ScoreBias(const AttnParams& p, int head)
      : table(p.bias == nullptr ? nullptr
                                : p.bias + head * (2ll * p.seqlen - 1) + p.seqlen - 1),
        longest(p.seqlen - 1) {}

  // Scores q.k become scale_log2 * q.k + log2(e) * bias. Tiles may reach beyond the sequence, where
  // any bias will do. Rows are queries and columns keys, or the reverse when kTransposed.
  template <bool kTransposed, int MT, int NT>
  __device__ __forceinline__ void apply(float (&s)[MT][NT][4], float scale_log2, int row0,
                                        int col0) const {
    if (table == nullptr) {
#pragma unroll
      for (int i = 0; i < MT * NT * 4; ++i) (&s[0][0][0])[i] *= scale_log2;
      return;
    }
    if (max(row0 + 16 * MT, col0 + 8 * NT) <= longest + 1) {
      add<kTransposed, true>(s, scale_log2, row0, col0);
    } else {
      add<kTransposed, false>(s, scale_log2, row0, col0);
    }
  }

 private:
  // kInside: every distance of the tile is in the table.
  template <bool kTransposed, bool kInside, int MT, int NT>
  __device__ __forceinline__ void add(float (&s)[MT][NT][4], float scale_log2, int row0,
                                      int col0) const {
    const int lane = lane_id();
    const int ahead = col0 - row0 + lane % 4 * 2 - lane / 4;
    const int first = kTransposed ? -ahead : ahead;
    const float* at_first = table + first;
#pragma unroll
    for (int diagonal = 1 - 2 * MT; diagonal < NT; ++diagonal) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int step = (kTransposed ? -1 : 1) * (8 * diagonal + e);
        const float* at =
            kInside ? at_first + step : table + max(-longest, min(first + step, longest));
        const float bias = __ldg(at) * kLog2e;
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          const int n = diagonal + i;
          if (n < 0 || n >= NT) continue;
          float& x = s[i / 2][n][i % 2 * 2 + e];
          x = fmaf(x, scale_log2, bias);
        }
      }
    }
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The bias gradient of a block's queries, as its warps walk over the keys NT * 8 at a time, each with
// MT * 16 rows of its own: the sum of score gradients of each bucket. No atomics: the order of every
// sum is fixed.
template <int MT, int NT>
struct BiasGrad {
  static constexpr int kStep = 8 * NT;             // new distances a tile
  static constexpr int kWindow = 16 * MT + kStep;  // distances of a tile, and one more
  static_assert(kStep <= 32 && 16 * MT <= 32, "a lane for each distance that leaves or stays");

  // Floats of shared memory of one warp.
  __host__ __device__ static int smem_floats(const AttnParams& p) {
    return kWindow + p.num_buckets;
  }

  float* block;    // smem_floats of each warp
  float* window;   // sums over distances, from the smallest of the tile on
  float* buckets;  // sums over the distances that no later tile meets
  const int32_t* bucket_of;  // where distance 0 is
  int longest, row0;
  int next_col;  // the next tile's first key

  // For rows row0 on of this warp.
  __device__ __forceinline__ BiasGrad(const AttnParams& p, float* smem, int row0)
      : block(smem), window(smem + warp_id() * smem_floats(p)), buckets(window + kWindow),
        bucket_of(p.bias_buckets + p.seqlen - 1), longest(p.seqlen - 1), row0(row0), next_col(0) {
  }

  __device__ __forceinline__ void start(const AttnParams& p) {
    for (int i = lane_id(); i < smem_floats(p); i += 32) window[i] = 0.0f;
    __syncwarp();
  }

  // Adds the score gradients of keys col0 .. col0 + kStep, which follow those added before.
  __device__ __forceinline__ void add(const float (&ds)[MT][NT][4], int col0) {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
#pragma unroll
    for (int diagonal = 1 - 2 * MT; diagonal < NT; ++diagonal) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          const int n = diagonal + i;
          if (n >= 0 && n < NT) sum += ds[i / 2][n][i % 2 * 2 + e];
        }
        // Lanes (g + 2, t + 1), ... have the same distance. The sum ends in the first of them.
        float next = __shfl_down_sync(0xffffffffu, sum, 9);
        if (g < 6 && t < 3) sum += next;
        next = __shfl_down_sync(0xffffffffu, sum, 18);
        if (g < 4 && t < 2) sum += next;
        if (g < 2 || t == 0) window[8 * diagonal + e + 2 * t - g + 16 * MT - 1] += sum;
        __syncwarp();
      }
    }
    slide(col0);
  }

  // After the last tile.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < 16 * MT; i += kStep) slide(next_col);
  }

  // Writes the sums over all warps. After a barrier that follows finish.
  __device__ __forceinline__ void store(const AttnParams& p, float* out) const {
    for (int bucket = threadIdx.x; bucket < p.num_buckets; bucket += blockDim.x) {
      float sum = 0.0f;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
        sum += block[warp * smem_floats(p) + kWindow + bucket];
      }
      out[bucket] = sum;
    }
  }

 private:
  // Moves the smallest kStep distances of the tile at col0 into their buckets.
  __device__ __forceinline__ void slide(int col0) {
    next_col = col0 + kStep;
    const int lane = lane_id();
    const int distance = col0 - row0 - (16 * MT - 1) + lane;
    const float value = lane < kStep ? window[lane] : 0.0f;
    const int bucket = bucket_of[max(-longest, min(distance, longest))];
    uint32_t rest = __ballot_sync(0xffffffffu, value != 0.0f);
    while (rest != 0) {
      const int current = __shfl_sync(0xffffffffu, bucket, __ffs(rest) - 1);
      const float sum = warp_sum(bucket == current ? value : 0.0f);
      if (lane == 0) buckets[current] += sum;
      rest &= ~__ballot_sync(0xffffffffu, bucket == current);
    }
    __syncwarp();
    const float kept = lane < 16 * MT ? window[kStep + lane] : 0.0f;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWindow; i += 32) {
      if (i + lane < kWindow) window[i + lane] = i == 0 ? kept : 0.0f;
    }
    __syncwarp();
  }
};

}  // namespace attn
