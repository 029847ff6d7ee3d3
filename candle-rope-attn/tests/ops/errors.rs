//! Wrong arguments give errors that name them.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_rope_attn::ops::{
    AdamW, AdamWState, Parameter, Tape, cross_entropy, dropout, embedding, gather_rows, gelu,
    global_norm, layer_norm, layer_norm_as, linear, linear_cross_entropy,
};

use crate::common::{assert_error, f32s, zeros};

#[test]
fn dtypes() {
    let f64s = zeros(&[2, 2], DType::F64);
    assert_error(gelu(&f64s), &["gelu", "F64", "to_dtype"]);
    assert_error(dropout(&f64s, 0.1, 0), &["dropout", "F64"]);
    assert_error(
        global_norm(std::slice::from_ref(&f64s)),
        &["global_norm", "F64"],
    );
    let half = zeros(&[2, 2], DType::BF16);
    assert_error(
        linear(&half, &f32s(&[2, 2]), None),
        &["linear", "weight", "F32", "BF16"],
    );
    assert_error(
        layer_norm(&half, &zeros(&[2], DType::BF16), &f32s(&[2]), 1e-5),
        &["layer_norm", "weight", "BF16", "F32"],
    );
    let norm = |dtype| layer_norm_as(&half, &f32s(&[2]), &f32s(&[2]), 1e-5, dtype);
    assert_error(norm(DType::F16), &["layer_norm", "BF16", "F16", "F32"]);
    assert_error(norm(DType::F32), &["layer_norm", "BF16", "F32"]);
    assert_error(norm(DType::F64), &["layer_norm", "F64"]);
    assert_error(
        embedding(&f32s(&[2]), &f32s(&[2, 2])),
        &["embedding", "ids", "F32", "U32"],
    );
    assert_error(
        cross_entropy(&half, &f32s(&[2])),
        &["cross_entropy", "labels", "U32"],
    );
}

#[test]
fn shapes() {
    assert_error(
        linear(&f32s(&[4, 3]), &f32s(&[5, 2]), None),
        &["linear", "weight", "[5, 2]", "[5, 3]"],
    );
    assert_error(
        linear(&f32s(&[4, 3]), &f32s(&[5, 3]), Some(&f32s(&[4]))),
        &["linear", "bias", "[4]", "[5]"],
    );
    assert_error(
        layer_norm(&f32s(&[4, 3]), &f32s(&[3]), &f32s(&[4]), 1e-5),
        &["layer_norm", "bias", "[4]", "[3]"],
    );
    assert_error(
        layer_norm(&f32s(&[4, 0]), &f32s(&[0]), &f32s(&[0]), 1e-5),
        &["[4, 0]"],
    );
    let ids = zeros(&[2, 2], DType::U32);
    assert_error(
        embedding(&ids, &f32s(&[2, 2])),
        &["embedding", "ids", "[2, 2]"],
    );
    let ids = zeros(&[2], DType::U32);
    assert_error(gather_rows(&f32s(&[2]), &ids), &["gather_rows", "x", "[2]"]);
    assert_error(
        cross_entropy(&f32s(&[0, 5]), &zeros(&[0], DType::U32)),
        &["[0, 5]"],
    );
    assert_error(
        cross_entropy(&f32s(&[3, 5]), &ids),
        &["labels", "[2]", "[3]"],
    );
}

#[test]
fn values() -> Result<()> {
    let ids = Tensor::new(&[1u32, 9], &Device::Cpu)?;
    assert_error(
        embedding(&ids, &f32s(&[9, 2])),
        &["embedding", "id 9", "position 1", "9 rows"],
    );
    assert_error(
        gather_rows(&f32s(&[9, 2]), &ids),
        &["gather_rows", "row 9", "9 rows"],
    );
    assert_error(
        cross_entropy(&f32s(&[2, 9]), &ids),
        &["label 9", "row 1", "9 columns"],
    );
    for p in [1.0, -0.1, f32::NAN] {
        assert_error(dropout(&f32s(&[2]), p, 0), &["dropout", "[0, 1)"]);
    }
    assert_error(global_norm(&[]), &["global_norm", "no tensors"]);
    Ok(())
}

/// On the tape; elsewhere it is made of two operations.
#[test]
fn linear_cross_entropy_on_a_tape() -> Result<()> {
    let on_tape = |x: &[usize], labels: &Tensor| {
        let x = Var::from_tensor(&f32s(x))?;
        Tape::record(|| linear_cross_entropy(&x, &f32s(&[9, 3]), None, labels))
    };
    let ids = Tensor::new(&[1u32, 9], &Device::Cpu)?;
    assert_error(on_tape(&[2, 3], &ids), &["label 9", "row 1", "9 columns"]);
    assert_error(on_tape(&[2, 4], &ids), &["weight", "[9, 3]", "[9, 4]"]);
    assert_error(
        on_tape(&[4, 3], &ids),
        &["linear_cross_entropy", "labels", "[2]", "[4]"],
    );
    assert_error(on_tape(&[0, 3], &ids), &["[0, 3]", "[n, in]"]);
    assert_error(on_tape(&[2, 1, 3], &ids), &["[2, 1, 3]", "[n, in]"]);
    assert_error(on_tape(&[2, 3], &f32s(&[2])), &["labels", "F32", "U32"]);
    Ok(())
}

#[test]
fn optimizer() -> Result<()> {
    let parameter = |shape: &[usize], dtype| Parameter {
        var: Var::zeros(shape, dtype, &Device::Cpu).unwrap(),
        weight_decay: 0.0,
        rounded: None,
    };
    let new = |parameters, beta| AdamW::new(parameters, (beta, 0.9), 1e-8);
    assert_error(new(vec![], 0.9), &["AdamW", "no parameters"]);
    assert_error(
        new(vec![parameter(&[2], DType::BF16)], 0.9),
        &["parameter", "BF16", "F32"],
    );
    assert_error(
        new(vec![parameter(&[2], DType::F32)], 1.0),
        &["beta 1", "[0, 1)"],
    );

    let optimizer = new(vec![parameter(&[2], DType::F32)], 0.9)?;
    let norm = Tensor::new(1f32, &Device::Cpu)?;
    assert_error(
        optimizer.step(&[], 0.1, &norm, None),
        &["0 gradients", "1 parameters"],
    );
    assert_error(
        optimizer.step(&[f32s(&[3])], 0.1, &norm, None),
        &["gradient", "[3]", "[2]"],
    );
    let state = |shape| AdamWState {
        steps: 1,
        moments: vec![(f32s(shape), f32s(shape))],
    };
    assert_error(
        optimizer.load_state(&state(&[3])),
        &["moment", "[3]", "[2]"],
    );
    let none = AdamWState {
        steps: 1,
        moments: vec![],
    };
    assert_error(optimizer.load_state(&none), &["0 parameters", "expected 1"]);
    assert_eq!(optimizer.steps()?, 0);
    Ok(())
}
