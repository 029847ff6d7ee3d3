//! Every feature at every length in every dtype beside the f64 reference, outputs and gradients.

mod common;

use candle_core::{DType, Result};
use common::{cases, check_cases, devices, long_cases};

fn check(dtype: DType) -> Result<()> {
    for device in devices() {
        check_cases(&cases(), dtype, &device)?;
    }
    Ok(())
}

#[test]
fn f32_cases() -> Result<()> {
    check(DType::F32)
}

#[test]
fn bf16_cases() -> Result<()> {
    check(DType::BF16)
}

#[test]
fn f16_cases() -> Result<()> {
    check(DType::F16)
}

#[test]
fn long_sequences() -> Result<()> {
    for device in devices() {
        check_cases(&long_cases(), DType::F32, &device)?;
    }
    Ok(())
}
