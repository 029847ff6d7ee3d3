// AdamW for all parameters in few launches. Whether the step happens, and by which factors, is
// decided on the device, so that the host never waits for the gradients' norm.
#include "tensors.cuh"

namespace attn {

constexpr int kStepPiece = 4096;
using StepList = TensorList<OpAdamWTensor, 48, kStepPiece>;

// What the elements of all tensors share; lies in OpAdamW::scalars.
struct StepScalars {
  float clip;          // factor on the gradients; NaN: no step
  float step_size;     // lr / bias correction of the first moment
  float second_scale;  // 1 / root of the bias correction of the second
};

struct StepConstants {
  const double* lr;
  float beta2, eps;
  float gain1, gain2;  // 1 - beta1 and 1 - beta2
};
static_assert(sizeof(StepList) + sizeof(StepConstants) + 16 <= 4096,
              "fits the parameters of a launch");

__global__ void begin_step_kernel(const OpAdamW p, StepScalars* scalars) {
  const float norm = *p.grad_norm;
  if (!isfinite(norm)) {
    scalars->clip = NAN;
    return;
  }
  const uint32_t step = ++*p.steps;
  scalars->clip = static_cast<float>(fmin(1.0, p.max_norm / (norm + 1e-6)));
  scalars->step_size = static_cast<float>(*p.lr / (1.0 - pow(p.beta1, step)));
  scalars->second_scale = static_cast<float>(1.0 / sqrt(1.0 - pow(p.beta2, step)));
}

// W elements, which begin on a boundary of 2 * W bytes.
template <class R, int W>
__device__ __forceinline__ void store_rounded(R* to, const float (&x)[W]) {
  __align__(16) R rounded[W];
#pragma unroll
  for (int i = 0; i < W; ++i) rounded[i] = from_float<R>(x[i]);
  if constexpr (W == 4) {
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(rounded);
  } else if constexpr (W == 8) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(rounded);
  } else {
    *to = rounded[0];
  }
}

// The same arithmetic as ops/adamw.rs. R: the dtype of the rounded parameter, f32 if there is none.
template <class T, class R, int W>
__device__ __forceinline__ void update(const OpAdamWTensor& tensor, int64_t begin, int64_t end,
                                       const StepScalars& scalars, const StepConstants& constants) {
  const T* grad = static_cast<const T*>(tensor.grad.ptr);
  float* first = tensor.moments;
  float* second = tensor.moments + tensor.grad.len;
  R* rounded = static_cast<R*>(const_cast<void*>(tensor.rounded.ptr));
  const float keep = static_cast<float>(1.0 - *constants.lr * tensor.weight_decay);
#pragma unroll 2
  for (int64_t i = begin + threadIdx.x * W; i < end; i += kOpThreads * W) {
    float g[W], p[W], m[W], v[W];
    load_vec<T, W>(g, grad + i);
    load_f32<W>(p, tensor.parameter + i);
    load_f32<W>(m, first + i);
    load_f32<W>(v, second + i);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      g[j] *= scalars.clip;
      m[j] += constants.gain1 * (g[j] - m[j]);
      v[j] = constants.beta2 * v[j] + constants.gain2 * (g[j] * g[j]);
      p[j] = keep * p[j] -
             scalars.step_size * m[j] / (sqrtf(v[j]) * scalars.second_scale + constants.eps);
    }
    store_f32<W>(tensor.parameter + i, p);
    if constexpr (sizeof(R) == 2) {
      store_rounded<R, W>(rounded + i, p);
    }
    store_f32<W>(first + i, m);
    store_f32<W>(second + i, v);
  }
}

__global__ void __launch_bounds__(kOpThreads)
    step_kernel(const __grid_constant__ StepList list, const StepScalars* __restrict__ scalars,
                const StepConstants constants) {
  const StepScalars s = *scalars;
  if (isnan(s.clip)) return;
  int64_t begin;
  const OpAdamWTensor& tensor = list.find(begin);
  const int64_t len = tensor.grad.len, end = min(begin + kStepPiece, len);
  for_element_on_device(tensor.grad.dtype, [&]<class T>() {
    const auto step = [&]<class R>() {
      const uintptr_t pointers = reinterpret_cast<uintptr_t>(tensor.parameter) |
                                 reinterpret_cast<uintptr_t>(tensor.moments) |
                                 reinterpret_cast<uintptr_t>(tensor.grad.ptr) |
                                 reinterpret_cast<uintptr_t>(tensor.rounded.ptr);
      if (pointers % 16 == 0 && len % kChunk<T> == 0) {
        update<T, R, kChunk<T>>(tensor, begin, end, s, constants);
      } else {
        update<T, R, 1>(tensor, begin, end, s, constants);
      }
    };
    // Null is of f32.
    for_element_on_device(tensor.rounded.dtype, step);
  });
}

}  // namespace attn

int op_adamw(const OpAdamW* params, const OpAdamWTensor* tensors, int64_t count, void* stream) {
  using namespace attn;
  for (int64_t i = 0; i < count; ++i) {
    if (!is_dtype(tensors[i].grad.dtype) || !is_dtype(tensors[i].rounded.dtype)) {
      return ATTN_ERR_DTYPE;
    }
  }
  auto* scalars = reinterpret_cast<StepScalars*>(params->scalars);
  ATTN_RETURN_IF(launch(begin_step_kernel, 1, 1, 0, stream, *params, scalars));
  const StepConstants constants{
      params->lr, static_cast<float>(params->beta2), static_cast<float>(params->eps),
      static_cast<float>(1.0 - params->beta1), static_cast<float>(1.0 - params->beta2)};
  return StepList::for_lists(
      tensors, count, [](const OpAdamWTensor& tensor) { return tensor.grad.len; },
      [&](const StepList& list, int64_t blocks) {
        return launch(step_kernel, blocks, kOpThreads, 0, stream, list, scalars, constants);
      });
}
