// The training operations besides attention, as C functions. candle-rope-attn/src/ops says what
// each computes. Tensors are contiguous except where strides are given; `dtype` is an AttnDtype and
// that of every `void*`; sums and arithmetic are in f32.
//
// All enqueue on `stream` of the current device and return ATTN_OK, an AttnError, or a
// cudaError_t. Results are the same bits on every call. Pointers need the alignment of their
// elements only, where nothing else is said; 16 bytes make it fast.
#ifndef OPS_H
#define OPS_H

#include "attn_params.h"

#ifdef __cplusplus
extern "C" {
#endif

// x, y, grad, dx: [len].
int op_gelu_fwd(int32_t dtype, const void* x, void* y, int64_t len, void* stream);
int op_gelu_bwd(int32_t dtype, const void* x, const void* grad, void* dx, int64_t len,
                void* stream);

// y = gelu(x), and the gradient dx of x: [rows, columns]. sums: f32 [columns], of dx. partial: f32
// [op_column_sum_partials(..), columns].
int op_gelu_both(int32_t dtype, const void* x, const void* grad, void* y, void* dx, float* sums,
                 float* partial, int64_t rows, int64_t columns, void* stream);

// Products with what comes after them, where op_gemm_suits or op_gemm_rope_suits: on Hopper (unless
// ATTN_PORTABLE is set in the environment; ATTN_EVERY_SIZE lifts the last limit), of 16-bit matrices whose inner and columns are multiples
// of 64, all on 16-byte boundaries, with enough rows and columns to be faster than separate kernels.
//   op_gemm_gelu: pre = x weight^T + bias, which may be null for not kept, y = gelu(pre);
//     x: [rows, inner], weight: [columns, inner], bias: [columns], pre, y: [rows, columns].
//   op_gemm_gelu_bwd: y = gelu(pre), and the gradient dx of pre from that of y, which is dy weight;
//     dy: [rows, inner], weight: [inner, columns]. sums: f32 [columns], of dx. partial: f32
//     [op_gemm_gelu_partials(..), columns].
//   op_gemm_rope: params->q.ptr, contiguous [total_tokens, 3, num_heads, head_dim], is
//     x weight^T + bias (which may be null) with q and k rotated by their positions; params tells
//     the sizes, dtype, sequences, tables and stream. head_dim is a power of 2, 16 to 256.
int op_gemm_suits(int32_t dtype, int64_t rows, int64_t inner, int64_t columns);
int op_gemm_gelu(int32_t dtype, const void* x, const void* weight, const void* bias, void* pre,
                 void* y, int64_t rows, int64_t inner, int64_t columns, void* stream);
int64_t op_gemm_gelu_partials(int64_t rows);
int op_gemm_gelu_bwd(int32_t dtype, const void* dy, const void* weight, const void* pre, void* dx,
                     void* y, float* sums, float* partial, int64_t rows, int64_t inner,
                     int64_t columns, void* stream);
int op_gemm_rope_suits(const AttnParams* params, int64_t inner);
int op_gemm_rope(const AttnParams* params, const void* x, const void* weight, const void* bias,
                 int64_t inner);

// to [len] = from [len], in another dtype.
int op_cast(int32_t from_dtype, const void* from, int32_t to_dtype, void* to, int64_t len,
            void* stream);

// x, y: [len]. Word i % 4 of Philox4x32-10 with counter (i / 4, 0, 0) and key (low, high word of
// seed) below p * 2^32 drops element i; kept ones are divided by 1 - p. residual [len], unless null,
// is added.
int op_dropout(int32_t dtype, const void* x, const void* residual, void* y, int64_t len, float p,
               uint64_t seed, void* stream);

// sums: f32 [columns], of x [rows, columns]. partial: f32 [op_column_sum_partials(..), columns].
int64_t op_column_sum_partials(int64_t rows, int64_t columns);
int op_column_sum(int32_t dtype, const void* x, float* sums, float* partial, int64_t rows,
                  int64_t columns, void* stream);

// x, y, grad, dx: [rows, width], width 1 to OP_LAYER_NORM_MAX_WIDTH; y and grad are of x_dtype, as dx is,
// or if that is f32 of any dtype; weight, bias: f32 [width]; stats: f32 [rows, 2], mean and reciprocal
// deviation, written by the forward; sums: f32 [3, width], gradients of weight and bias, and the sum of
// dx. partial: f32 [op_layer_norm_partials(..), 3, width].
enum { OP_LAYER_NORM_MAX_WIDTH = 8192 };
int64_t op_layer_norm_partials(int64_t rows, int64_t width);
int op_layer_norm_fwd(int32_t x_dtype, const void* x, const float* weight, const float* bias,
                      int32_t y_dtype, void* y, float* stats, int64_t rows, int64_t width, float eps,
                      void* stream);
int op_layer_norm_bwd(int32_t x_dtype, const void* x, const float* weight, int32_t grad_dtype,
                      const void* grad, const float* stats, void* dx, float* sums, float* partial,
                      int64_t rows, int64_t width, void* stream);

// table: [count, width]; rows: [len]; y, grad: [len, width]. A row number from `count` on gives
// NaN, and no gradient. d_table: [count, width], added to with `add`, else written in full.
// op_scatter_rows_workspace stores the bytes of workspace that op_scatter_rows needs.
int op_gather_rows(int32_t dtype, const void* table, const uint32_t* rows, void* y, int64_t len,
                   int64_t count, int64_t width, void* stream);
int op_scatter_rows_workspace(int64_t len, int64_t count, int64_t width, size_t* bytes);
int op_scatter_rows(int32_t dtype, const void* grad, const uint32_t* rows, void* d_table,
                    int32_t add, void* workspace, int64_t len, int64_t count, int64_t width,
                    void* stream);

enum { OP_MAX_TABLES = 4 };
typedef struct OpTable {
  const float* table;    // [count, width]
  const uint32_t* rows;  // [len]; a number from `count` on gives NaN
  int64_t count;
} OpTable;

// y: f32 [len, width], the sum of one row of each of `count` tables, 1 to OP_MAX_TABLES.
int op_sum_rows(const OpTable* tables, int64_t count, float* y, int64_t len, int64_t width,
                void* stream);

// logits, d_logits: [rows, vocab]; labels: [rows]; lse, losses: f32 [rows]; loss, its mean, and
// grad, the gradient of that: one f32. A row labelled OP_IGNORED has no loss and no gradient; another label
// from `vocab` on makes the loss NaN.
#define OP_IGNORED UINT32_MAX
int op_cross_entropy_fwd(int32_t dtype, const void* logits, const uint32_t* labels, float* lse,
                         float* losses, float* loss, int64_t rows, int64_t vocab, void* stream);
int op_cross_entropy_bwd(int32_t dtype, const void* logits, const uint32_t* labels,
                         const float* lse, const float* grad, void* d_logits, int64_t rows,
                         int64_t vocab, void* stream);

// losses: f32 [rows]. The logits become the gradient of their sum.
int op_cross_entropy_in_place(int32_t dtype, void* logits, const uint32_t* labels, float* losses,
                              int64_t rows, int64_t vocab, void* stream);

// params->o is params->q with every row turned by its position in its sequence, or turned back if
// `inverse`. Reads the RoPE tables, sizes, strides and cu_seqlens of params; the rest may be zero.
int op_rope(const AttnParams* params, int32_t inverse);

typedef struct OpTensor {
  const void* ptr;
  int64_t len;
  int32_t dtype;
} OpTensor;

// norm: one f32, the norm of all elements of `count` tensors.
// partial: f32 [op_global_norm_partials(..)].
int64_t op_global_norm_partials(const OpTensor* tensors, int64_t count);
int op_global_norm(const OpTensor* tensors, int64_t count, float* partial, float* norm,
                   void* stream);

typedef struct OpAdamWTensor {
  float* parameter;  // [grad.len]
  float* moments;    // [2, grad.len]
  OpTensor grad;
  OpTensor rounded;  // [grad.len], the parameter in another dtype; or ptr is null
  double weight_decay;
} OpAdamWTensor;

typedef struct OpAdamW {
  const float* grad_norm;  // one f32; where it is not finite nothing changes
  uint32_t* steps;         // updates made so far; counted up
  float* scalars;          // [4], workspace
  const double* lr;        // one number
  double max_norm;  // gradients are scaled by min(1, max_norm / (grad_norm + 1e-6)); may be inf
  double beta1;
  double beta2;
  double eps;
} OpAdamW;

ATTN_STATIC_ASSERT(offsetof(OpTensor, dtype) == 16, "OpTensor layout");
ATTN_STATIC_ASSERT(sizeof(OpTensor) == 24, "OpTensor layout");
ATTN_STATIC_ASSERT(offsetof(OpTable, count) == 16, "OpTable layout");
ATTN_STATIC_ASSERT(sizeof(OpTable) == 24, "OpTable layout");
ATTN_STATIC_ASSERT(offsetof(OpAdamWTensor, grad) == 16, "OpAdamWTensor layout");
ATTN_STATIC_ASSERT(offsetof(OpAdamWTensor, weight_decay) == 64, "OpAdamWTensor layout");
ATTN_STATIC_ASSERT(sizeof(OpAdamWTensor) == 72, "OpAdamWTensor layout");
ATTN_STATIC_ASSERT(offsetof(OpAdamW, lr) == 24, "OpAdamW layout");
ATTN_STATIC_ASSERT(offsetof(OpAdamW, eps) == 56, "OpAdamW layout");
ATTN_STATIC_ASSERT(sizeof(OpAdamW) == 64, "OpAdamW layout");

// One step for `count` tensors.
int op_adamw(const OpAdamW* params, const OpAdamWTensor* tensors, int64_t count, void* stream);

#ifdef __cplusplus
}
#endif
#endif
