// GELU with the error function at one point: y = x * Phi(x), dy/dx = Phi(x) + x * phi(x).
#pragma once

#include "common.cuh"

namespace attn {

// 1 / x for a normal x, in one instruction.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The standard normal distribution at x: Phi(x) and phi(x).
struct Normal {
  float cdf, pdf;

  // cdf(-x) = exp(-x^2 / 2) * t * q(t) with t = 1 / (1 + s * x) for x >= 0, as ops/gelu.rs: half
  // the instructions of erfcf.
  __device__ __forceinline__ explicit Normal(float x) {
    const float t = reciprocal(fmaf(0.28284273f, fabsf(x), 1.0f));
    float q = 0.02567324f;
    q = fmaf(q, t, -0.09366275f);
    q = fmaf(q, t, 0.088213965f);
    q = fmaf(q, t, -0.0059807864f);
    q = fmaf(q, t, 0.072240666f);
    q = fmaf(q, t, 0.083873145f);
    q = fmaf(q, t, 0.10397233f);
    q = fmaf(q, t, 0.112832315f);
    q = fmaf(q, t, 0.11283795f);
    const float exp = exp2_approx(-0.5f * kLog2e * x * x);
    const float tail = exp * t * q;
    cdf = x < 0.0f ? tail : 1.0f - tail;
    pdf = exp * 0.3989423f;
  }

  // Of gelu at x.
  __device__ __forceinline__ float derivative(float x) const { return fmaf(x, pdf, cdf); }
};

}  // namespace attn
