//! The f64 reference against finite differences, and what must hold of gradients exactly.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_rope_attn::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, Sequences,
    Window, attention, attention_qkvpacked, attention_qkvpacked_with_bias, attention_with_bias,
    reference,
};
use common::{Case, Inputs, Results, fused, to_f64};

const BIAS: RelativeBias = RelativeBias {
    num_buckets: 8,
    max_distance: 20,
    bidirectional: true,
};

/// Small calls that together use every feature.
fn small_cases() -> Vec<Case> {
    let spec = AttentionSpec::new(2, 4).with_softmax_scale(0.7);
    let rope = |pairing| PositionEncoding::Rope(Rope::from_inv_freq(vec![1.0, 0.3], pairing));
    let bias = PositionEncoding::RelativeBias(RelativeBias {
        num_buckets: 8,
        max_distance: 5,
        bidirectional: true,
    });
    let mut masked = Case::dense(
        spec.clone()
            .with_position(rope(RopePairing::Interleaved))
            .with_causal(true),
        2,
        5,
    );
    masked.sequences = Sequences::KeyMask((0..10).map(|i| i % 5 != 0 && i != 7).collect());
    let mut padded = Case::dense(spec.clone().with_position(bias.clone()), 2, 6);
    padded.sequences = Sequences::KeyLens(vec![4, 0]);
    vec![
        Case::dense(
            spec.clone().with_position(rope(RopePairing::HalfSplit)),
            2,
            5,
        ),
        masked,
        padded,
        Case::packed(
            spec.clone()
                .with_position(PositionEncoding::Alibi(Alibi::new(2)))
                .with_window(Some(Window {
                    left: Some(2),
                    right: Some(1),
                })),
            &[3, 0, 6, 1],
        ),
        Case::packed(
            spec.with_position(bias)
                .with_dropout(Some(Dropout { p: 0.3, seed: 5 })),
            &[7, 4],
        ),
    ]
}

#[test]
fn reference_agrees_with_finite_differences() -> Result<()> {
    for (seed, case) in small_cases().iter().enumerate() {
        let inputs = Inputs::random(case, DType::F64, seed as u64)?;
        let exact = Results::exact(case, &inputs);
        let loss = |parts: &[Vec<f64>; 4]| -> f64 {
            let [q, k, v, weight] = parts;
            let batch = case.tokens[0];
            let inputs_at = reference::Inputs { q, k, v, weight };
            let out = reference::forward(&case.spec, &case.sequences, batch, inputs_at).out;
            out.iter().zip(&inputs.d_out).map(|(x, y)| x * y).sum()
        };
        let parts = [&inputs.q, &inputs.k, &inputs.v, &inputs.weight].map(Clone::clone);
        let gradients = [&exact.dq, &exact.dk, &exact.dv, &exact.dweight];
        for (part, gradient) in gradients.into_iter().enumerate() {
            assert_eq!(gradient.len(), parts[part].len());
            for (i, gradient) in gradient.iter().enumerate() {
                let at = |step: f64| {
                    let mut parts = parts.clone();
                    parts[part][i] += step;
                    loss(&parts)
                };
                let difference = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (difference - gradient).abs() < 1e-8,
                    "case {seed}, input {part}, element {i}: {difference} beside {gradient}"
                );
            }
        }
    }
    Ok(())
}

/// The gradients of q, k and v (and a weight) of `(out * d_out).sum()`.
fn gradients(out: &Tensor, d_out: &Tensor, inputs: &[&Var]) -> Result<Vec<Vec<f64>>> {
    let gradients = (out * d_out)?.sum_all()?.backward()?;
    let gradient = |x: &&Var| match gradients.get(x) {
        Some(gradient) => to_f64(gradient),
        None => candle_core::bail!("no gradient"),
    };
    inputs.iter().map(gradient).collect()
}

fn randn(shape: &[usize], seed: u64) -> Result<Var> {
    Var::from_tensor(&common::randn(shape, seed)?)
}

#[test]
fn all_forms_of_the_op_agree_to_the_bit() -> Result<()> {
    let bias = PositionEncoding::RelativeBias(BIAS);
    let [q, k, v] = [1, 2, 3].map(|seed| randn(&[2, 33, 2, 8], seed));
    let (q, k, v, d_out) = (q?, k?, v?, randn(&[2, 33, 2, 8], 4)?);
    let weight = randn(&[8, 2], 5)?;
    let qkv = Var::from_tensor(&Tensor::stack(&[&*q, &*k, &*v], 2)?)?;
    for position in [PositionEncoding::None, bias] {
        let spec = AttentionSpec::new(2, 8).with_position(position);
        let dense = &Sequences::Dense;
        let (apart, packed, vars) = match spec.position {
            PositionEncoding::None => (
                attention(&q, &k, &v, &spec, dense)?,
                attention_qkvpacked(&qkv, &spec, dense)?,
                vec![&qkv],
            ),
            _ => (
                attention_with_bias(&q, &k, &v, &weight, &spec, dense)?,
                attention_qkvpacked_with_bias(&qkv, &weight, &spec, dense)?,
                vec![&qkv, &weight],
            ),
        };
        assert_eq!(to_f64(&apart)?, to_f64(&packed)?);
        let apart = gradients(&apart, &d_out, &[&[&q, &k, &v], &vars[1..]].concat())?;
        let packed = gradients(&packed, &d_out, &vars)?;
        let d_qkv = Tensor::from_slice(&packed[0], qkv.shape(), &Device::Cpu)?;
        for (i, apart) in apart[..3].iter().enumerate() {
            assert_eq!(*apart, to_f64(&d_qkv.narrow(2, i, 1)?)?);
        }
        assert_eq!(apart[3..], packed[1..]);
    }
    Ok(())
}

#[test]
fn strided_inputs_need_no_copy_and_others_get_one() -> Result<()> {
    let spec = AttentionSpec::new(3, 8);
    let x = randn(&[3, 2, 20, 8], 1)?; // [heads, batch, seqlen, dim]
    let wide = randn(&[2, 40, 3, 8], 2)?;
    let columns = randn(&[2, 20, 8, 3], 3)?; // [.., dim, heads]
    let views = || -> Result<[Tensor; 3]> {
        Ok([
            x.permute((1, 2, 0, 3))?,
            wide.narrow(1, 7, 20)?,
            columns.transpose(2, 3)?,
        ])
    };
    let d_out = randn(&[3, 2, 20, 8], 4)?.permute((1, 2, 0, 3))?;
    let run = |[q, k, v]: [Tensor; 3]| -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
        let out = attention(&q, &k, &v, &spec, &Sequences::Dense)?;
        Ok((
            to_f64(&out)?,
            gradients(&out, &d_out, &[&x, &wide, &columns])?,
        ))
    };
    let [q, k, v] = views()?;
    let contiguous = run([q.contiguous()?, k.contiguous()?, v.contiguous()?])?;
    assert_eq!(run([q, k, v])?, contiguous);
    Ok(())
}

#[test]
fn the_weight_may_be_part_of_a_tensor_and_of_another_dtype() -> Result<()> {
    let spec = AttentionSpec::new(2, 8).with_position(PositionEncoding::RelativeBias(BIAS));
    let (qkv, d_out) = (randn(&[1, 9, 3, 2, 8], 1)?, randn(&[1, 9, 2, 8], 2)?);
    let weights = Var::from_tensor(&randn(&[20, 2], 3)?.to_dtype(DType::BF16)?)?;
    let run = |weight: &Tensor| -> Result<(Vec<f64>, Vec<f64>)> {
        let out = attention_qkvpacked_with_bias(&qkv, weight, &spec, &Sequences::Dense)?;
        let gradient = gradients(&out, &d_out, &[&weights])?.remove(0);
        Ok((to_f64(&out)?, gradient))
    };
    let (out, gradient) = run(&weights.narrow(0, 5, 8)?)?;
    let whole = weights.to_dtype(DType::F32)?.pad_with_zeros(0, 0, 1)?;
    assert_eq!(run(&whole.narrow(0, 5, 8)?)?, (out, gradient.clone()));
    assert!(
        gradient[..10]
            .iter()
            .chain(&gradient[26..])
            .all(|&x| x == 0.0)
    );
    assert!(gradient[10..26].iter().any(|&x| x != 0.0));
    Ok(())
}

#[test]
fn one_tensor_may_be_q_k_and_v() -> Result<()> {
    let spec = AttentionSpec::new(1, 8);
    let (x, d_out) = (randn(&[1, 9, 1, 8], 1)?, randn(&[1, 9, 1, 8], 2)?);
    let copy = || Var::from_tensor(&x.as_detached_tensor());
    let [q, k, v] = &[copy()?, copy()?, copy()?];
    let out = attention(&x, &x, &x, &spec, &Sequences::Dense)?;
    let together = gradients(&out, &d_out, &[&x])?;
    let out = attention(q, k, v, &spec, &Sequences::Dense)?;
    let apart = gradients(&out, &d_out, &[q, k, v])?;
    for (i, together) in together[0].iter().enumerate() {
        let sum = apart[0][i] + apart[1][i] + apart[2][i];
        assert!((sum - together).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn results_have_the_same_bits_for_any_number_of_threads() -> Result<()> {
    let bias = PositionEncoding::RelativeBias(RelativeBias {
        num_buckets: 32,
        max_distance: 500,
        bidirectional: true,
    });
    let spec = AttentionSpec::new(2, 16).with_position(bias);
    let case = Case::packed(spec, &[2500, 300, 40]);
    let inputs = Inputs::random(&case, DType::F32, 1)?;
    let run = |threads| -> Result<[Vec<f64>; 5]> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let Ok(pool) = pool else {
            candle_core::bail!("no thread pool")
        };
        pool.install(|| {
            let results = Results::of(&case, &inputs, DType::F32, &Device::Cpu, fused)?;
            let Results {
                out,
                dq,
                dk,
                dv,
                dweight,
                ..
            } = results;
            Ok([out, dq, dk, dv, dweight])
        })
    };
    let one = run(1)?;
    for threads in [2, 3, 7] {
        assert!(run(threads)? == one, "{threads} threads");
    }
    Ok(())
}

#[test]
fn rows_that_see_no_key_are_zero_and_have_no_gradient() -> Result<()> {
    let spec = AttentionSpec::new(2, 8);
    let mut case = Case::dense(spec, 2, 6);
    case.sequences = Sequences::KeyLens(vec![0, 6]);
    case.poisoned = true;
    let mut inputs = Inputs::random(&case, DType::F32, 1)?;
    common::poison(&case, &mut inputs);
    let results = Results::of(&case, &inputs, DType::F32, &Device::Cpu, fused)?;
    for x in [results.out, results.dq, results.dk, results.dv] {
        let (masked, seen) = x.split_at(x.len() / 2);
        assert!(masked.iter().all(|&x| x == 0.0));
        assert!(seen.iter().all(|x| x.is_finite() && *x != 0.0));
    }
    Ok(())
}

#[test]
fn nan_that_takes_part_is_not_swallowed() -> Result<()> {
    let case = Case::dense(AttentionSpec::new(1, 8), 1, 40);
    let parts: [fn(&mut Inputs) -> &mut Vec<f64>; 3] = [|x| &mut x.q, |x| &mut x.k, |x| &mut x.v];
    for part in parts {
        let mut inputs = Inputs::random(&case, DType::F32, 1)?;
        part(&mut inputs)[100] = f64::NAN;
        let results = Results::of(&case, &inputs, DType::F32, &Device::Cpu, fused)?;
        for x in [results.out, results.dq, results.dk] {
            assert!(x.iter().any(|x| x.is_nan()));
        }
    }
    Ok(())
}

#[test]
fn dropout_drops_at_its_rate_and_by_its_seed() -> Result<()> {
    // With v all ones, a row's sum is the kept share of its probability, scaled.
    let spec = AttentionSpec::new(4, 4).with_softmax_scale(0.0);
    let ones = Tensor::ones((2, 200, 4, 4), DType::F32, &Device::Cpu)?;
    let run = |seed| -> Result<Vec<f64>> {
        let spec = spec.clone().with_dropout(Some(Dropout { p: 0.3, seed }));
        to_f64(&attention(&ones, &ones, &ones, &spec, &Sequences::Dense)?)
    };
    let (first, second) = (run(1)?, run(1 << 40)?);
    assert_eq!(first, run(1)?);
    assert_ne!(first, second);
    // 320,000 draws: one standard deviation of the mean is 1e-3.
    let mean = first.iter().sum::<f64>() / first.len() as f64;
    assert!((mean - 1.0).abs() < 5e-3, "{mean}");
    Ok(())
}
