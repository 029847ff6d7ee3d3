//! What attention does on a GPU alone: errors, and inputs that lie apart.
#![cfg(feature = "cuda")]

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_rope_attn::{
    AttentionSpec, PositionEncoding, RelativeBias, Sequences, attention,
    attention_qkvpacked_with_bias, cuda_device, cuda_device_name,
};
use common::{devices, to_f64};

fn gpu() -> Option<Device> {
    devices().into_iter().find(Device::is_cuda)
}

#[test]
fn a_missing_gpu_is_named() {
    let error = match cuda_device(99) {
        Ok(_) => panic!("a hundred GPUs"),
        Err(error) => error.to_string(),
    };
    let expected = match gpu() {
        Some(_) => "GPU 99 does not exist",
        None => "cannot start the NVIDIA driver",
    };
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_gpu_has_a_name() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let name = cuda_device_name(&device)?;
    assert!(name.is_some_and(|name| !name.trim().is_empty()));
    assert_eq!(cuda_device_name(&Device::Cpu)?, None);
    Ok(())
}

#[test]
fn too_many_buckets_are_refused_before_the_forward_pass() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let qkv = Tensor::zeros((1, 4, 3, 2, 8), DType::F32, &device)?;
    let attend = |num_buckets| {
        let bias = RelativeBias {
            num_buckets,
            max_distance: 1000,
            bidirectional: true,
        };
        let weight = Tensor::zeros((num_buckets, 2), DType::F32, &device)?;
        let spec = AttentionSpec::new(2, 8).with_position(PositionEncoding::RelativeBias(bias));
        attention_qkvpacked_with_bias(&qkv, &weight, &spec, &Sequences::Dense)
    };
    attend(RelativeBias::MAX_CUDA_BUCKETS)?;
    let error = match attend(RelativeBias::MAX_CUDA_BUCKETS + 1) {
        Ok(_) => panic!("the kernels take more buckets than they say"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("1025 buckets"), "{error}");
    assert!(error.contains("at most 1024"), "{error}");
    Ok(())
}

#[test]
fn running_out_of_memory_says_what_to_do() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    // 2^44 bytes of output; the input is one row, seen again and again.
    let row = Tensor::zeros((1, 1, 1, 64), DType::BF16, &device)?;
    let x = row.expand((1 << 10, 1 << 17, 1 << 10, 64))?;
    let spec = AttentionSpec::new(1 << 10, 64);
    let error = match attention(&x, &x, &x, &spec, &Sequences::Dense) {
        Ok(_) => panic!("the GPU has 16 TiB"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("out of GPU memory"), "{error}");
    // The device goes on working.
    let x = row.expand((1, 3, 2, 64))?;
    let out = attention(&x, &x, &x, &AttentionSpec::new(2, 64), &Sequences::Dense)?;
    assert_eq!(to_f64(&out)?, vec![0.0; 3 * 2 * 64]);
    Ok(())
}

#[test]
fn strides_do_not_matter() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let (batch, seqlen, heads, width) = (2, 70, 3, 40);
    let spec = AttentionSpec::new(heads, width);
    for dtype in [DType::F32, DType::BF16] {
        // Heads before tokens, as after a transpose; and rows that begin at odd places.
        let qkv = Tensor::randn(0f32, 1.0, (3, batch, heads, seqlen, width + 3), &device)?;
        let qkv = qkv.to_dtype(dtype)?.narrow(4, 1, width)?.transpose(2, 3)?;
        let parts = [qkv.get(0)?, qkv.get(1)?, qkv.get(2)?];
        let strided = attention(&parts[0], &parts[1], &parts[2], &spec, &Sequences::Dense)?;
        let parts = [
            parts[0].contiguous()?,
            parts[1].contiguous()?,
            parts[2].contiguous()?,
        ];
        let contiguous = attention(&parts[0], &parts[1], &parts[2], &spec, &Sequences::Dense)?;
        assert_eq!(to_f64(&strided)?, to_f64(&contiguous)?);
    }
    Ok(())
}
