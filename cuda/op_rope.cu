// Rotary position embedding as an operation of its own: attention's rotation of q and k ahead of its
// kernels, in both directions.
#include "launch.cuh"
#include "ops.h"

namespace attn {

template <class T>
int op_rope(const AttnParams& params, bool inverse) {
  KernelParams p(params);
  p.check_alignment<T>({&p.q, &p.o});
  return inverse ? rotate<T, true>(p, p.q, p.o) : rotate<T, false>(p, p.q, p.o);
}

}  // namespace attn

int op_rope(const AttnParams* params, int32_t inverse) {
  if (params == nullptr) return ATTN_ERR_NULL;
  if (attn::empty(*params)) return ATTN_OK;
  ATTN_RETURN_IF(attn::check(
      params, {params->q.ptr, params->o.ptr, params->rope_cos, params->rope_sin}));
  return attn::for_dtype(*params,
                         [&]<class T>() { return attn::op_rope<T>(*params, inverse != 0); });
}
