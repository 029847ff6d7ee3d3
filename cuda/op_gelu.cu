// GELU with the error function: y = x * Phi(x), dx = grad * (Phi(x) + x * phi(x)).
#include "ops.cuh"

namespace attn {

struct Normal {
  float cdf, pdf;

  // cdf(-x) = exp(-x^2 / 2) * t * q(t) with t = 1 / (1 + s * x) for x >= 0, as ops/gelu.rs: half
  // the instructions of erfcf, and memory is the limit.
  __device__ __forceinline__ explicit Normal(float x) {
    const float t = __fdividef(1.0f, fmaf(0.28284273f, fabsf(x), 1.0f));
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
};

struct GeluForward {
  template <int W>
  __device__ __forceinline__ void operator()(int64_t, float (&x)[W], const float (&)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) x[i] *= Normal(x[i]).cdf;
  }
};

struct GeluBackward {
  template <int W>
  __device__ __forceinline__ void operator()(int64_t, float (&x)[W],
                                             const float (&grad)[W]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const Normal normal(x[i]);
      x[i] = grad[i] * fmaf(x[i], normal.pdf, normal.cdf);
    }
  }
};

}  // namespace attn

int op_gelu_fwd(int32_t dtype, const void* x, void* y, int64_t len, void* stream) {
  return attn::map<false>(dtype, x, nullptr, y, len, stream, attn::GeluForward{});
}

int op_gelu_bwd(int32_t dtype, const void* x, const void* grad, void* dx, int64_t len,
                void* stream) {
  return attn::map<true>(dtype, x, grad, dx, len, stream, attn::GeluBackward{});
}
