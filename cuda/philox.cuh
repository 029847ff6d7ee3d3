// Philox4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405): random words that
// depend on a counter and a key alone, the same here and in candle-rope-attn/src/philox.rs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// The keys of all rounds. In a kernel's parameters they cost neither instructions nor registers.
struct PhiloxKey {
  uint2 round[10];

  // Key (low, high word of the seed).
  explicit PhiloxKey(uint64_t seed) {
    uint2 key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (uint2& k : round) {
      k = key;
      key.x += 0x9E3779B9u;
      key.y += 0xBB67AE85u;
    }
  }
};

__device__ __forceinline__ uint4 philox4x32(uint4 counter, const PhiloxKey& key) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
#pragma unroll
  for (int i = 0; i < 10; ++i) {
    const uint64_t p0 = static_cast<uint64_t>(kMul0) * counter.x;
    const uint64_t p1 = static_cast<uint64_t>(kMul1) * counter.z;
    const uint2 k = key.round[i];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ k.x, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ k.y, static_cast<uint32_t>(p0)};
  }
  return counter;
}

// A word below this drops its element: ceil(p * 2^32), for p in [0, 1).
inline uint32_t dropout_threshold(float p) {
  const double words = p * 4294967296.0;
  const uint64_t below = static_cast<uint64_t>(words);
  return static_cast<uint32_t>(below + (below < words));
}
