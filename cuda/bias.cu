// The bias table of a relative bias (T5): a gather of its weight by the bucket of each distance.
#include "launch.cuh"

namespace attn {

__global__ void __launch_bounds__(kGroupThreads)
    bias_table_kernel(const float* weight, const int32_t* buckets, float* table, int num_heads,
                      int distances) {
  const int i = blockIdx.x * kGroupThreads + threadIdx.x;
  if (i >= distances) return;
  const float* row = weight + static_cast<int64_t>(buckets[i]) * num_heads;
  for (int head = 0; head < num_heads; ++head) {
    table[static_cast<int64_t>(head) * distances + i] = row[head];
  }
}

}  // namespace attn

extern "C" int attn_bias_table(const float* weight, const int32_t* buckets, float* table,
                               int32_t num_heads, int32_t seqlen, void* stream) {
  if (weight == nullptr || buckets == nullptr || table == nullptr) return ATTN_ERR_NULL;
  if (seqlen < 1 || seqlen > 1 << 30) return ATTN_ERR_SIZE;
  const int distances = 2 * seqlen - 1;
  return attn::launch(attn::bias_table_kernel, attn::ceil_div(distances, attn::kGroupThreads),
                      attn::kGroupThreads, 0, stream, weight, buckets, table, num_heads, distances);
}
