// Kernels over many tensors in few launches: the descriptions of some tensors travel in the
// parameters of a launch, and a block finds its tensor among them.
#pragma once

#include <algorithm>

#include "ops.cuh"

namespace attn {

// Up to kMax tensors, cut into pieces of kPiece elements, a block each.
template <class Tensor, int kMax, int kPiece>
struct TensorList {
  Tensor tensors[kMax];
  uint32_t first_block[kMax + 1];  // of each tensor; the last entry ends them all
  int count;

  // The tensor of this block, and where its piece begins.
  __device__ __forceinline__ const Tensor& find(int64_t& begin) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_block[middle] <= blockIdx.x) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    begin = static_cast<int64_t>(blockIdx.x - first_block[low]) * kPiece;
    return tensors[low];
  }

  static int64_t blocks(int64_t len) { return (len + kPiece - 1) / kPiece; }

  // Calls run(list, blocks) for the tensors, kMax at a time; len(tensor) is its number of elements.
  // Tensors without elements are left out.
  template <class Len, class Run>
  static int for_lists(const Tensor* all, int64_t count, Len&& len, Run&& run) {
    TensorList list;
    list.count = 0;
    list.first_block[0] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t end = list.first_block[list.count] + blocks(len(all[i]));
      if (end > INT32_MAX) return ATTN_ERR_SIZE;
      if (len(all[i]) > 0) {
        list.tensors[list.count] = all[i];
        list.first_block[++list.count] = static_cast<uint32_t>(end);
      }
      if (list.count > 0 && (list.count == kMax || i + 1 == count)) {
        ATTN_RETURN_IF(run(list, static_cast<int64_t>(list.first_block[list.count])));
        list.count = 0;
      }
    }
    return ATTN_OK;
  }
};

// Calls f.template operator()<T>() on the device for the element type.
template <class F>
__device__ __forceinline__ void for_element_on_device(int32_t dtype, F&& f) {
  if (dtype == ATTN_F32) {
    f.template operator()<float>();
  } else if (dtype == ATTN_BF16) {
    f.template operator()<bf16>();
  } else {
    f.template operator()<f16>();
  }
}

inline bool is_dtype(int32_t dtype) { return dtype >= ATTN_BF16 && dtype <= ATTN_F32; }

}  // namespace attn
