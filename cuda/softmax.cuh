// Online softmax (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867) on accumulator
// fragments: rows {g, g + 8} of each 16-row tile belong to a thread and the 3 beside it.
#pragma once

#include "common.cuh"

namespace attn {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Running offset and sum of MT * 16 rows. The sum stays split over the 4 threads of a row until
// the end.
template <int MT>
struct OnlineSoftmax {
  float offset[MT][2], row_sum[MT][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      offset[m][0] = offset[m][1] = -INFINITY;
      row_sum[m][0] = row_sum[m][1] = 0.0f;
    }
  }

  // Turns scores into exp(scale * (score - offset)), where offset is the row's maximum or up to
  // kSlack (in log2) below it: then the output need not be rescaled to the new maximum, which is
  // rare after the first tiles. 2^kSlack is harmless in f32 sums and 16-bit probabilities.
  // scale_log2 = scale * log2(e) > 0.
  template <int NT, int DT>
  __device__ __forceinline__ void update(float (&s)[MT][NT][4], float (&out)[MT][DT][4],
                                         float scale_log2) {
    constexpr float kSlack = 8.0f;
    float best[MT][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = offset[m][h];
#pragma unroll
        for (int n = 0; n < NT; ++n) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        best[m][h] = quad_max(x);
        // False where both are -inf.
        grown |= (best[m][h] - offset[m][h]) * scale_log2 > kSlack;
      }
    }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float shrink = best[m][h] == -INFINITY
                                   ? 1.0f
                                   : exp2_approx((offset[m][h] - best[m][h]) * scale_log2);
          offset[m][h] = best[m][h];
          row_sum[m][h] *= shrink;
#pragma unroll
          for (int n = 0; n < DT; ++n) {
            out[m][n][2 * h] *= shrink;
            out[m][n][2 * h + 1] *= shrink;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // A row with no key so far: any finite value gives exp2(-inf) = 0.
        const float subtract = offset[m][h] == -INFINITY ? 0.0f : offset[m][h] * scale_log2;
        float sum = row_sum[m][h];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
          for (int i = 2 * h; i < 2 * h + 2; ++i) {
            s[m][n][i] = exp2_approx(s[m][n][i] * scale_log2 - subtract);
            sum += s[m][n][i];
          }
        }
        row_sum[m][h] = sum;
      }
    }
  }

  // Divides the output by the sums and gives ln sum exp(scale * score) of each row:
  // zeros and -inf for a row without keys.
  template <int DT>
  __device__ __forceinline__ void finish(float (&out)[MT][DT][4], float (&lse)[MT][2],
                                         float scale_log2) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(row_sum[m][h]);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        lse[m][h] = sum == 0.0f ? -INFINITY : offset[m][h] * scale_log2 * kLn2 + logf(sum);
#pragma unroll
        for (int n = 0; n < DT; ++n) {
          out[m][n][2 * h] *= inverse;
          out[m][n][2 * h + 1] *= inverse;
        }
      }
    }
  }
};

}  // namespace attn
