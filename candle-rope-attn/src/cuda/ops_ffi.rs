//! The C interface of the training operations: `cuda/ops.h`, whose comments say what the arguments
//! mean.

use std::ffi::{c_int, c_void};
use std::mem::offset_of;

use super::ffi::AttnParams;

/// A tensor in device memory.
#[repr(C)]
pub(crate) struct OpTensor {
    pub ptr: *const c_void,
    pub len: i64,
    pub dtype: i32,
}

/// A table of `count` rows and the numbers of those to take.
#[repr(C)]
pub(crate) struct OpTable {
    pub table: *const f32,
    pub rows: *const u32,
    pub count: i64,
}

#[repr(C)]
pub(crate) struct OpAdamWTensor {
    pub parameter: *mut f32,
    pub moments: *mut f32,
    pub grad: OpTensor,
    pub rounded: OpTensor,
    pub weight_decay: f64,
}

#[repr(C)]
pub(crate) struct OpAdamW {
    pub grad_norm: *const f32,
    pub steps: *mut u32,
    pub scalars: *mut f32,
    pub lr: *const f64,
    pub max_norm: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
}

// The same as in the header.
const _: () = assert!(offset_of!(OpTensor, dtype) == 16);
const _: () = assert!(size_of::<OpTensor>() == 24);
const _: () = assert!(offset_of!(OpTable, count) == 16);
const _: () = assert!(size_of::<OpTable>() == 24);
const _: () = assert!(offset_of!(OpAdamWTensor, grad) == 16);
const _: () = assert!(offset_of!(OpAdamWTensor, weight_decay) == 64);
const _: () = assert!(size_of::<OpAdamWTensor>() == 72);
const _: () = assert!(offset_of!(OpAdamW, lr) == 24);
const _: () = assert!(offset_of!(OpAdamW, eps) == 56);
const _: () = assert!(size_of::<OpAdamW>() == 64);

pub(crate) const OP_LAYER_NORM_MAX_WIDTH: usize = 8192;

unsafe extern "C" {
    pub(crate) fn op_gelu_fwd(
        dtype: i32,
        x: *const c_void,
        y: *mut c_void,
        len: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_gelu_bwd(
        dtype: i32,
        x: *const c_void,
        grad: *const c_void,
        dx: *mut c_void,
        len: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_gelu_both(
        dtype: i32,
        x: *const c_void,
        grad: *const c_void,
        y: *mut c_void,
        dx: *mut c_void,
        sums: *mut f32,
        partial: *mut f32,
        rows: i64,
        columns: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_gemm_suits(dtype: i32, rows: i64, inner: i64, columns: i64) -> c_int;
    pub(crate) fn op_gemm_gelu(
        dtype: i32,
        x: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        pre: *mut c_void,
        y: *mut c_void,
        rows: i64,
        inner: i64,
        columns: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_gemm_gelu_partials(rows: i64) -> i64;
    pub(crate) fn op_gemm_gelu_bwd(
        dtype: i32,
        dy: *const c_void,
        weight: *const c_void,
        pre: *const c_void,
        dx: *mut c_void,
        y: *mut c_void,
        sums: *mut f32,
        partial: *mut f32,
        rows: i64,
        inner: i64,
        columns: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_cast(
        from_dtype: i32,
        from: *const c_void,
        to_dtype: i32,
        to: *mut c_void,
        len: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_sum_rows(
        tables: *const OpTable,
        count: i64,
        y: *mut f32,
        len: i64,
        width: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_dropout(
        dtype: i32,
        x: *const c_void,
        residual: *const c_void,
        y: *mut c_void,
        len: i64,
        p: f32,
        seed: u64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_column_sum_partials(rows: i64, columns: i64) -> i64;
    pub(crate) fn op_column_sum(
        dtype: i32,
        x: *const c_void,
        sums: *mut f32,
        partial: *mut f32,
        rows: i64,
        columns: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_layer_norm_partials(rows: i64, width: i64) -> i64;
    pub(crate) fn op_layer_norm_fwd(
        x_dtype: i32,
        x: *const c_void,
        weight: *const f32,
        bias: *const f32,
        y_dtype: i32,
        y: *mut c_void,
        stats: *mut f32,
        rows: i64,
        width: i64,
        eps: f32,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_layer_norm_bwd(
        x_dtype: i32,
        x: *const c_void,
        weight: *const f32,
        grad_dtype: i32,
        grad: *const c_void,
        stats: *const f32,
        dx: *mut c_void,
        sums: *mut f32,
        partial: *mut f32,
        rows: i64,
        width: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_gather_rows(
        dtype: i32,
        table: *const c_void,
        rows: *const u32,
        y: *mut c_void,
        len: i64,
        count: i64,
        width: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_scatter_rows_workspace(
        len: i64,
        count: i64,
        width: i64,
        bytes: *mut usize,
    ) -> c_int;
    pub(crate) fn op_scatter_rows(
        dtype: i32,
        grad: *const c_void,
        rows: *const u32,
        d_table: *mut c_void,
        add: i32,
        workspace: *mut c_void,
        len: i64,
        count: i64,
        width: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_cross_entropy_fwd(
        dtype: i32,
        logits: *const c_void,
        labels: *const u32,
        lse: *mut f32,
        losses: *mut f32,
        loss: *mut f32,
        rows: i64,
        vocab: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_cross_entropy_bwd(
        dtype: i32,
        logits: *const c_void,
        labels: *const u32,
        lse: *const f32,
        grad: *const f32,
        d_logits: *mut c_void,
        rows: i64,
        vocab: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_cross_entropy_in_place(
        dtype: i32,
        logits: *mut c_void,
        labels: *const u32,
        losses: *mut f32,
        rows: i64,
        vocab: i64,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_gemm_rope_suits(params: *const AttnParams, inner: i64) -> c_int;
    pub(crate) fn op_gemm_rope(
        params: *const AttnParams,
        x: *const c_void,
        weight: *const c_void,
        bias: *const c_void,
        inner: i64,
    ) -> c_int;
    pub(crate) fn op_rope(params: *const AttnParams, inverse: i32) -> c_int;
    pub(crate) fn op_global_norm_partials(tensors: *const OpTensor, count: i64) -> i64;
    pub(crate) fn op_global_norm(
        tensors: *const OpTensor,
        count: i64,
        partial: *mut f32,
        norm: *mut f32,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn op_adamw(
        params: *const OpAdamW,
        tensors: *const OpAdamWTensor,
        count: i64,
        stream: *mut c_void,
    ) -> c_int;
}
