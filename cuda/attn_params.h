// The one struct that crosses from the caller into the attention kernels, and the functions that
// take it. Plain C: a Rust `#[repr(C)]` mirror or ctypes can build it field by field.
//
// Shapes. Dense: q, k, v, o and their gradients are [batch, seqlen, num_heads, head_dim] and lse is
// [batch, num_heads, seqlen]. Variable length (cu_seqlens set): the tensors are
// [total_tokens, num_heads, head_dim], batch_stride is ignored, and lse is
// [num_heads, total_tokens]. The head_dim axis is contiguous; every other axis has a stride, so
// views into a packed qkv tensor need no copy.
#ifndef ATTN_PARAMS_H
#define ATTN_PARAMS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define ATTN_STATIC_ASSERT static_assert
#else
#define ATTN_STATIC_ASSERT _Static_assert
#endif

// A tensor in device memory. Strides count elements.
typedef struct AttnTensor {
  void* ptr;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
} AttnTensor;

enum AttnDtype { ATTN_BF16 = 0, ATTN_F16 = 1, ATTN_F32 = 2 };

// Error codes of our own. Positive codes are cudaError_t values.
enum AttnError {
  ATTN_OK = 0,
  ATTN_ERR_NULL = -1,       // a required pointer is null
  ATTN_ERR_HEAD_DIM = -2,   // head_dim outside 1..=256
  ATTN_ERR_DTYPE = -3,      // dtype is no AttnDtype
  ATTN_ERR_ROPE = -4,       // RoPE with an odd head_dim, or with only one of the two tables
  ATTN_ERR_SEQUENCES = -5,  // more than one of cu_seqlens, key_lens and key_mask
  ATTN_ERR_SIZE = -6,       // a size is negative, seqlen above 2^30, or too many blocks for a grid
  ATTN_ERR_SHARED_MEMORY = -7,  // the device lacks the shared memory (f32 backward, head_dim > 128)
  ATTN_ERR_BIAS = -8,     // d_bias without bias or bias_buckets, or num_buckets outside 1..=1024
  ATTN_ERR_DROPOUT = -9,  // dropout_p outside [0, 1)
  ATTN_ERR_SUMS = -10,    // d_qkv_sums where attn_bwd_sums_columns says 0
};

typedef struct AttnParams {
  // Dtype `dtype`. The forward reads q, k, v and writes o; the backward reads those four and
  // d_o, and writes dq, dk, dv.
  AttnTensor q, k, v, o, d_o, dq, dk, dv;
  // f32, written by the forward and read by the backward: ln sum_k exp(score) of each query, where
  // score = softmax_scale * q.k + bias; -inf where every key is masked.
  float* lse;
  // At most one of the next three is set; none means every key of every sequence takes part.
  const int32_t* cu_seqlens;  // [batch + 1]: sequence i is tokens cu_seqlens[i]..[i + 1]
  const int32_t* key_lens;    // [batch]: only keys below it take part
  const uint8_t* key_mask;    // [batch, seqlen], nonzero = the key takes part
  // RoPE tables [at least seqlen, head_dim / 2], f32; both null = no RoPE.
  const float* rope_cos;
  const float* rope_sin;
  // Bias of scores [num_heads, 2 * seqlen - 1], f32, or null: [h][d + seqlen - 1] is added where
  // key - query = d, both counted within their sequence.
  const float* bias;
  // For the backward, both or neither: the gradient d_bias [num_buckets, num_heads], f32, sums over
  // the distances d with bias_buckets[d + seqlen - 1] = bucket.
  const int32_t* bias_buckets;
  float* d_bias;
  // For the backward, null, or set only where attn_bwd_sums_columns says 1: sums over all tokens of dq,
  // dk and dv before they are rounded, f32 [3, num_heads, head_dim]. They are the gradient of the bias
  // of a layer that makes q, k and v.
  float* d_qkv_sums;
  // attn_fwd_workspace_bytes or attn_bwd_workspace_bytes bytes, 16-byte aligned; its contents need
  // not survive between calls.
  void* workspace;
  // With RoPE, null or attn_rotated_bytes bytes, 16-byte aligned: q and k rotated, which the forward
  // leaves there for the backward. Without, the backward rotates them again.
  void* rotated;
  void* stream;           // cudaStream_t
  int64_t total_tokens;   // rows of all sequences; batch * seqlen when dense
  uint64_t dropout_seed;  // the same in both directions
  int32_t batch;          // number of sequences
  int32_t seqlen;         // rows of a sequence; of the longest one when cu_seqlens is set
  int32_t num_heads;
  int32_t head_dim;       // 1 to 256
  int32_t dtype;          // AttnDtype
  int32_t causal;         // a query sees keys at its own position and before
  int32_t window_left;    // sees at most this many keys before its position; -1 = all
  int32_t window_right;   // ... and after; -1 = all (causal acts as 0)
  int32_t rope_interleaved;  // 1: pairs (2i, 2i+1); 0: pairs (i, i + head_dim/2)
  int32_t num_buckets;    // of bias_buckets; 0 without
  int32_t qk_rotated;     // 1: q and k come rotated (by these tables); dq, dk are of them before
  float softmax_scale;
  // Probabilities are dropped with dropout_p, the kept ones divided by 1 - dropout_p: element
  // (sequence b, head h, query i, key j) is dropped when word j % 4 of Philox4x32-10 with counter
  // (j / 4, i, h, b) and key (low, high word of dropout_seed) is below dropout_p * 2^32.
  float dropout_p;
} AttnParams;

ATTN_STATIC_ASSERT(sizeof(AttnTensor) == 32, "AttnTensor layout");
ATTN_STATIC_ASSERT(offsetof(AttnParams, lse) == 256, "AttnParams layout");
ATTN_STATIC_ASSERT(offsetof(AttnParams, workspace) == 336, "AttnParams layout");
ATTN_STATIC_ASSERT(offsetof(AttnParams, total_tokens) == 360, "AttnParams layout");
ATTN_STATIC_ASSERT(offsetof(AttnParams, dropout_p) == 424, "AttnParams layout");
ATTN_STATIC_ASSERT(sizeof(AttnParams) == 432, "AttnParams layout");

// Bytes of workspace that a call with these parameters needs (no device access; pointers are only
// compared with null). 0 means workspace may be null.
size_t attn_fwd_workspace_bytes(const AttnParams* params);
size_t attn_bwd_workspace_bytes(const AttnParams* params);

// Bytes that AttnParams::rotated needs.
size_t attn_rotated_bytes(const AttnParams* params);

// Whether attn_bwd with these parameters, whose tensors are set, can write AttnParams::d_qkv_sums on
// the current device: 1 or 0.
int attn_bwd_sums_columns(const AttnParams* params);

// Enqueue on params->stream of the current device. Return ATTN_OK, an AttnError, or a cudaError_t;
// nothing was enqueued after an AttnError.
int attn_fwd(const AttnParams* params);
int attn_bwd(const AttnParams* params);

// table[h][d + seqlen - 1] = weight[buckets[d + seqlen - 1]][h], which makes AttnParams::bias of a
// weight [num_buckets, num_heads]. Enqueued like the above.
int attn_bias_table(const float* weight, const int32_t* buckets, float* table, int32_t num_heads,
                    int32_t seqlen, void* stream);

// What a code means, in a static string.
const char* attn_error_string(int code);

#ifdef __cplusplus
}
#endif
#endif
