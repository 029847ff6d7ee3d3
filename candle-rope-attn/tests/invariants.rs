//! What must hold between calls: nothing depends on how sequences are put together.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_rope_attn::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling,
    Sequences, Window, attention_qkvpacked,
};
use common::{Case, check_case, devices, fused, max_error, randn, to_f64};
use proptest::prelude::*;

const HEADS: usize = 2;
const DIM: usize = 16;

fn encodings() -> Result<Vec<PositionEncoding>> {
    let rope = |pairing| Rope::new(DIM, 10_000.0, pairing, RopeScaling::None);
    Ok(vec![
        PositionEncoding::None,
        PositionEncoding::Rope(rope(RopePairing::HalfSplit)?),
        PositionEncoding::Rope(rope(RopePairing::Interleaved)?),
        PositionEncoding::Alibi(Alibi::new(HEADS)),
    ])
}

#[test]
fn padded_is_unpadded_is_a_batch_of_one() -> Result<()> {
    let lens = [5, 140, 33, 1];
    let longest = 140;
    let sequences: Vec<Tensor> = (lens.iter().zip(0..))
        .map(|(&len, seed)| randn(&[len, 3, HEADS, DIM], seed))
        .collect::<Result<_>>()?;
    let packed = Tensor::cat(&sequences, 0)?;
    let padded: Vec<Tensor> = (sequences.iter())
        .map(|x| x.pad_with_zeros(0, 0, longest - x.dim(0)?))
        .collect::<Result<_>>()?;
    let padded = Tensor::stack(&padded, 0)?;
    let mask = (lens.iter())
        .flat_map(|&len| (0..longest).map(move |i| i < len))
        .collect();
    let mask = Sequences::KeyMask(mask);
    for position in encodings()? {
        let spec = AttentionSpec::new(HEADS, DIM).with_position(position);
        let bounds = vec![0, 5, 145, 178, 179];
        let unpadded = attention_qkvpacked(&packed, &spec, &Sequences::CuSeqlens(bounds.clone()))?;
        let by_lens = Sequences::KeyLens(lens.to_vec());
        let by_lens = attention_qkvpacked(&padded, &spec, &by_lens)?;
        let by_mask = attention_qkvpacked(&padded, &spec, &mask)?;
        for (i, sequence) in sequences.iter().enumerate() {
            let alone = attention_qkvpacked(&sequence.unsqueeze(0)?, &spec, &Sequences::Dense)?;
            let alone = to_f64(&alone)?;
            let rows = to_f64(&unpadded.narrow(0, bounds[i], lens[i])?)?;
            assert!(max_error(&rows, &alone) < 1e-6);
            for padded in [&by_lens, &by_mask] {
                let rows = to_f64(&padded.get(i)?.narrow(0, 0, lens[i])?)?;
                assert!(max_error(&rows, &alone) < 1e-6);
            }
        }
    }
    Ok(())
}

#[test]
fn only_relative_positions_count() -> Result<()> {
    // The same tokens further back in the sequence, after keys that are masked.
    let (len, shift) = (37, 1000);
    let qkv = randn(&[1, len, 3, HEADS, DIM], 1)?;
    let shifted = qkv.pad_with_zeros(1, shift, 0)?;
    let mask = Sequences::KeyMask((0..shift + len).map(|i| i >= shift).collect());
    for position in encodings()? {
        let spec = AttentionSpec::new(HEADS, DIM)
            .with_position(position)
            .with_causal(true);
        let out = attention_qkvpacked(&qkv, &spec, &Sequences::Dense)?;
        let moved = attention_qkvpacked(&shifted, &spec, &mask)?.narrow(1, shift, len)?;
        // f32 tables at position 1000 are exact to 6e-8.
        assert!(max_error(&to_f64(&out)?, &to_f64(&moved)?) < 1e-5);
    }
    Ok(())
}

#[test]
fn empty_inputs_give_empty_outputs() -> Result<()> {
    let bias = PositionEncoding::RelativeBias(RelativeBias {
        num_buckets: 8,
        max_distance: 20,
        bidirectional: true,
    });
    for position in encodings()?.into_iter().chain([bias]) {
        let spec = AttentionSpec::new(HEADS, DIM).with_position(position);
        let with = |mut case: Case, sequences| {
            case.sequences = sequences;
            case
        };
        let dense = |batch, seqlen| Case::dense(spec.clone(), batch, seqlen);
        for case in [
            Case::packed(spec.clone(), &[]),
            Case::packed(spec.clone(), &[0, 0]),
            dense(0, 7),
            dense(2, 0),
            with(dense(2, 0), Sequences::KeyLens(vec![0, 0])),
            with(dense(0, 7), Sequences::KeyLens(vec![])),
            with(dense(0, 7), Sequences::KeyMask(vec![])),
        ] {
            for device in devices() {
                check_empty(&case, &device)?;
            }
        }
    }
    Ok(())
}

fn check_empty(case: &Case, device: &Device) -> Result<()> {
    // CUDA has no empty memory, but an empty part of some.
    let shape = case.packed_shape();
    let some: Vec<usize> = shape.iter().map(|&n| n.max(1)).collect();
    let some = Var::zeros(some, DType::F32, device)?;
    let mut qkv = some.as_tensor().clone();
    for (axis, &n) in shape.iter().enumerate() {
        qkv = qkv.narrow(axis, 0, n)?;
    }
    let weight = match case.weight_shape() {
        Some(shape) => Some(Var::ones(&shape, DType::F32, device)?),
        None => None,
    };
    let out = fused(case, &qkv, weight.as_ref().map(Var::as_tensor))?;
    assert_eq!(out.dims(), case.shape());
    // Candle makes no empty gradients on a GPU.
    if device.is_cpu() {
        let gradients = out.sum_all()?.backward()?;
        if let Some(gradient) = weight.and_then(|weight| gradients.get(&weight).cloned()) {
            assert_eq!(to_f64(&gradient)?, vec![0.0; gradient.elem_count()]);
        }
    }
    Ok(())
}

/// A random call: any shape and any combination of features.
fn any_case() -> impl Strategy<Value = Case> {
    let window = prop::option::of((prop::option::of(0..40usize), prop::option::of(0..40usize)));
    let shape = (
        1..4usize,
        1..70usize,
        prop::collection::vec(0..150usize, 1..5),
    );
    (
        shape,
        any::<bool>(),
        window,
        0..4u8,
        prop::option::of(0.0..0.9f32),
        0..4u8,
        any::<u64>(),
    )
        .prop_map(
            |((heads, dim, lens), causal, window, encoding, p, kind, seed)| {
                let rope = |dim: usize| {
                    let inv_freq = (0..dim / 2).map(|i| (-0.3 * i as f32).exp()).collect();
                    PositionEncoding::Rope(Rope::from_inv_freq(inv_freq, RopePairing::HalfSplit))
                };
                let dim = if encoding == 1 {
                    2 * dim.div_ceil(2)
                } else {
                    dim
                };
                let spec = AttentionSpec::new(heads, dim)
                    .with_causal(causal)
                    .with_window(window.map(|(left, right)| Window { left, right }))
                    .with_dropout(p.map(|p| Dropout { p, seed }))
                    .with_position(match encoding {
                        1 => rope(dim),
                        2 => PositionEncoding::Alibi(Alibi::new(heads)),
                        _ => PositionEncoding::None,
                    });
                let longest = lens.iter().copied().max().unwrap_or(0).max(1);
                let mut case = match kind {
                    0 => Case::packed(spec, &[&lens[..], &[1]].concat()),
                    _ => Case::dense(spec, lens.len(), longest),
                };
                case.poisoned = true;
                match kind {
                    1 => case.sequences = Sequences::KeyLens(lens),
                    2 => {
                        let mask = (0..lens.len() * longest).map(|i| seed >> (i % 61) & 1 == 0);
                        case.sequences = Sequences::KeyMask(mask.collect());
                    }
                    _ => {}
                }
                case.name = format!("{case:?}");
                case
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_call_agrees_with_the_reference(case in any_case(), seed in any::<u64>()) {
        check_case(&case, DType::F32, &Device::Cpu, seed)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}
