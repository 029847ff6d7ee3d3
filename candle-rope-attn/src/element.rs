//! The element types of the CPU kernels, which compute in f32.

use candle_core::{DType, Result, WithDType, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A tensor's element type.
pub(crate) trait Element: WithDType {
    /// Widens one element.
    fn to_f32(self) -> f32;
    /// Rounds to one element.
    fn from_f32(x: f32) -> Self;
    /// Widens a row. Both slices have one length.
    fn load(row: &[Self], out: &mut [f32]);
    /// Rounds a row. Both slices have one length.
    fn store(row: &[f32], out: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }

    fn load(row: &[Self], out: &mut [f32]) {
        out.copy_from_slice(row);
    }

    fn store(row: &[f32], out: &mut [Self]) {
        out.copy_from_slice(row);
    }
}

macro_rules! half_element {
    ($half:ty) => {
        impl Element for $half {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                <$half>::to_f32(self)
            }

            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                <$half>::from_f32(x)
            }

            fn load(row: &[Self], out: &mut [f32]) {
                row.convert_to_f32_slice(out);
            }

            fn store(row: &[f32], out: &mut [Self]) {
                out.convert_from_f32_slice(row);
            }
        }
    };
}

half_element!(bf16);
half_element!(f16);

/// Checks that an operation has kernels for a dtype.
pub(crate) fn check_dtype(op: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::BF16 | DType::F16 => Ok(()),
        _ => bail!("{op}: got dtype {dtype:?}, expected F32, BF16 or F16; convert with to_dtype"),
    }
}
