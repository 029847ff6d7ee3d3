use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::global_norm;

use crate::common::{Input, device_tests, values};

device_tests!(matches_reference, not_finite);

fn matches_reference(device: &Device) -> Result<()> {
    let shapes: [(&[usize], DType); 5] = [
        (&[3], DType::F32),
        (&[70_000], DType::F32),
        (&[7, 9], DType::BF16),
        (&[1000, 131], DType::F16),
        (&[], DType::F32),
    ];
    let mut tensors = Vec::new();
    for (seed, (shape, dtype)) in shapes.iter().enumerate() {
        tensors.push(
            Input::random(shape, *dtype, seed as u64)
                .var(device)?
                .as_detached_tensor(),
        );
    }
    tensors.push(tensors[3].t()?.narrow(0, 3, 50)?);
    let mut squares = 0.0;
    for tensor in &tensors {
        squares += values(tensor)?.iter().map(|x| x * x).sum::<f64>();
    }
    let norm = f64::from(global_norm(&tensors)?.to_scalar::<f32>()?);
    assert!(
        (norm / squares.sqrt() - 1.0).abs() < 2e-7,
        "{norm}, not {}",
        squares.sqrt()
    );
    Ok(())
}

/// More tensors than one launch takes.
fn not_finite(device: &Device) -> Result<()> {
    let mut tensors = vec![Tensor::ones(5, DType::F32, device)?; 500];
    assert_eq!(global_norm(&tensors)?.to_scalar::<f32>()?, 50.0);
    for bad in [f32::NAN, f32::INFINITY] {
        tensors[321] = Tensor::new(&[1.0, bad], device)?;
        assert!(!global_norm(&tensors)?.to_scalar::<f32>()?.is_finite());
    }
    Ok(())
}
