//! What tests of attention and of the other operations share.
#![allow(dead_code)] // each test binary uses its part

use candle_core::{DType, Device, Result, Tensor};

/// A GPU, where there is one. With the environment variable `REQUIRE_CUDA` there must be.
pub fn gpu() -> Option<Device> {
    match candle_rope_attn::cuda_device(0) {
        Ok(device) => Some(device),
        Err(error) if std::env::var_os("REQUIRE_CUDA").is_some() => panic!("{error}"),
        Err(error) => {
            println!("CUDA: skipped, {error}");
            None
        }
    }
}

pub fn to_f64(x: &Tensor) -> Result<Vec<f64>> {
    x.to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

pub fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

pub fn f32s(shape: &[usize]) -> Tensor {
    zeros(shape, DType::F32)
}

/// The message must hold every one of the words.
pub fn assert_error<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else {
        panic!("no error, expected one about {words:?}")
    };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}
