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

// Both in one pass, for a layer that keeps x alone.
template <class T, int W>
__global__ void __launch_bounds__(kOpThreads)
    gelu_both_kernel(const T* __restrict__ x, const T* __restrict__ grad, T* __restrict__ y,
                     T* __restrict__ dx, int64_t len) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kOpThreads + threadIdx.x) * W;
  if (i >= len) return;
  auto both = [&]<int N>(int64_t at) {
    float v[N], g[N];
    load_vec<T, N>(v, x + at);
    load_vec<T, N>(g, grad + at);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Normal normal(v[j]);
      g[j] *= fmaf(v[j], normal.pdf, normal.cdf);
      v[j] *= normal.cdf;
    }
    store_vec<T, N>(y + at, v);
    store_vec<T, N>(dx + at, g);
  };
  if (i + W <= len) {
    both.template operator()<W>(i);
  } else {
    for (int64_t at = i; at < len; ++at) both.template operator()<1>(at);
  }
}

}  // namespace attn

int op_gelu_both(int32_t dtype, const void* x, const void* grad, void* y, void* dx, int64_t len,
                 void* stream) {
  using namespace attn;
  if (len == 0) return ATTN_OK;
  return for_element(dtype, [&]<class T>() {
    return for_vector<T>(aligned_to_16({x, grad, y, dx}), [&]<int W>() {
      return launch(gelu_both_kernel<T, W>, (len + kOpThreads * W - 1) / (kOpThreads * W),
                    kOpThreads, 0, stream, static_cast<const T*>(x), static_cast<const T*>(grad),
                    static_cast<T*>(y), static_cast<T*>(dx), len);
    });
  });
}

int op_gelu_fwd(int32_t dtype, const void* x, void* y, int64_t len, void* stream) {
  return attn::map<false>(dtype, x, nullptr, y, len, stream, attn::GeluForward{});
}

int op_gelu_bwd(int32_t dtype, const void* x, const void* grad, void* dx, int64_t len,
                void* stream) {
  return attn::map<true>(dtype, x, grad, dx, len, stream, attn::GeluBackward{});
}
