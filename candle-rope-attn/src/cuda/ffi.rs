//! The C interface of the attention kernels: a mirror of `cuda/attn_params.h`, whose comments say
//! what the fields mean.

use std::ffi::{c_char, c_int, c_void};
use std::mem::offset_of;

/// A tensor in device memory. Strides count elements.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AttnTensor {
    pub ptr: *mut c_void,
    pub batch_stride: i64,
    pub row_stride: i64,
    pub head_stride: i64,
}

pub(crate) const ATTN_BF16: i32 = 0;
pub(crate) const ATTN_F16: i32 = 1;
pub(crate) const ATTN_F32: i32 = 2;
/// None of them.
pub(crate) const NO_ATTN_DTYPE: i32 = -1;

/// The default has no tensors and no feature but a window of 0 keys.
#[repr(C)]
#[derive(Debug, Clone, Default)]
pub(crate) struct AttnParams {
    pub q: AttnTensor,
    pub k: AttnTensor,
    pub v: AttnTensor,
    pub o: AttnTensor,
    pub d_o: AttnTensor,
    pub dq: AttnTensor,
    pub dk: AttnTensor,
    pub dv: AttnTensor,
    pub lse: *mut f32,
    pub cu_seqlens: *const i32,
    pub key_lens: *const i32,
    pub key_mask: *const u8,
    pub rope_cos: *const f32,
    pub rope_sin: *const f32,
    pub bias: *const f32,
    pub bias_buckets: *const i32,
    pub d_bias: *mut f32,
    pub d_qkv_sums: *mut f32,
    pub workspace: *mut c_void,
    pub rotated: *mut c_void,
    pub stream: *mut c_void,
    pub total_tokens: i64,
    pub dropout_seed: u64,
    pub batch: i32,
    pub seqlen: i32,
    pub num_heads: i32,
    pub head_dim: i32,
    pub dtype: i32,
    pub causal: i32,
    pub window_left: i32,
    pub window_right: i32,
    pub rope_interleaved: i32,
    pub num_buckets: i32,
    pub qk_rotated: i32,
    pub softmax_scale: f32,
    pub dropout_p: f32,
}

// The same as in the header.
const _: () = assert!(size_of::<AttnTensor>() == 32);
const _: () = assert!(offset_of!(AttnParams, lse) == 256);
const _: () = assert!(offset_of!(AttnParams, workspace) == 336);
const _: () = assert!(offset_of!(AttnParams, total_tokens) == 360);
const _: () = assert!(offset_of!(AttnParams, dropout_p) == 424);
const _: () = assert!(size_of::<AttnParams>() == 432);

unsafe extern "C" {
    pub(crate) fn attn_fwd_workspace_bytes(params: *const AttnParams) -> usize;
    pub(crate) fn attn_bwd_workspace_bytes(params: *const AttnParams) -> usize;
    pub(crate) fn attn_rotated_bytes(params: *const AttnParams) -> usize;
    pub(crate) fn attn_bwd_sums_columns(params: *const AttnParams) -> c_int;
    pub(crate) fn attn_fwd(params: *const AttnParams) -> c_int;
    pub(crate) fn attn_bwd(params: *const AttnParams) -> c_int;
    pub(crate) fn attn_bias_table(
        weight: *const f32,
        buckets: *const i32,
        table: *mut f32,
        num_heads: i32,
        seqlen: i32,
        stream: *mut c_void,
    ) -> c_int;
    pub(crate) fn attn_error_string(code: c_int) -> *const c_char;
}
