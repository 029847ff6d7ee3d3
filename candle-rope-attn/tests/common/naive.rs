//! Attention by Candle's own operations, every one of them rounding to the inputs' dtype: matmul,
//! softmax and so on over the whole matrix of scores.

use candle_core::{D, DType, Result, Tensor};
use candle_rope_attn::{PositionEncoding, RopePairing, reference};

use super::Case;

/// Of packed q, k and v and the relative bias weight; differentiable.
pub fn attention(case: &Case, qkv: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
    let &[num_heads, head_dim] = &[case.spec.num_heads, case.spec.head_dim];
    let tokens = case.tokens.iter().product::<usize>();
    let qkv = qkv.reshape((tokens, 3, num_heads, head_dim))?;
    let mut outs = Vec::new();
    for (sequence, (first, len)) in case.spans().into_iter().enumerate() {
        if len > 0 {
            let qkv = qkv.narrow(0, first, len)?;
            outs.push(sequence_attention(case, sequence, &qkv, weight)?);
        }
    }
    Tensor::cat(&outs, 0)?.reshape(case.shape())
}

/// Of `[len, 3, num_heads, head_dim]`.
fn sequence_attention(
    case: &Case,
    sequence: usize,
    qkv: &Tensor,
    weight: Option<&Tensor>,
) -> Result<Tensor> {
    let len = qkv.dim(0)?;
    let part = |i| {
        qkv.narrow(1, i, 1)?
            .squeeze(1)?
            .transpose(0, 1)?
            .contiguous()
    };
    let (q, k, v) = (
        rotated(case, &part(0)?)?,
        rotated(case, &part(1)?)?,
        part(2)?,
    );
    let scale = f64::from(case.spec.softmax_scale);
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
    if let Some(bias) = bias(case, len, weight)? {
        scores = (scores + bias.to_dtype(q.dtype())?)?;
    }

    let sees = |query, key| case.sees(sequence, query, key);
    let seeing: Vec<bool> = (0..len)
        .map(|query| (0..len).any(|key| sees(query, key)))
        .collect();
    // Rows that see nothing are left unmasked, and zeroed in the end.
    let mask = table(len, |query, key| {
        if sees(query, key) || !seeing[query] {
            0.0
        } else {
            f64::NEG_INFINITY
        }
    });
    let mask = Tensor::from_vec(mask, (1, len, len), q.device())?.to_dtype(q.dtype())?;
    scores = scores.broadcast_add(&mask)?;
    let exp = scores
        .broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?
        .exp()?;
    let mut probabilities = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;

    if let Some(dropout) = case.spec.dropout {
        let scale = 1.0 / (1.0 - f64::from(dropout.p));
        let factors = (0..case.spec.num_heads).flat_map(|head| {
            table(len, |query, key| {
                f64::from(reference::keeps(dropout, sequence, head, query, key)) * scale
            })
        });
        let factors = Tensor::from_iter(factors, q.device())?.reshape(probabilities.shape())?;
        probabilities = (probabilities * factors.to_dtype(q.dtype())?)?;
    }
    let rows = seeing.into_iter().map(f64::from);
    let rows = Tensor::from_iter(rows, q.device())?.reshape((1, len, 1))?;
    probabilities = probabilities.broadcast_mul(&rows.to_dtype(q.dtype())?)?;
    probabilities.matmul(&v)?.transpose(0, 1)
}

/// A function of query and key, `[len, len]`.
fn table(len: usize, f: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..len * len).map(|i| f(i / len, i % len)).collect()
}

/// `[num_heads, len, len]`, f32.
fn bias(case: &Case, len: usize, weight: Option<&Tensor>) -> Result<Option<Tensor>> {
    match &case.spec.position {
        PositionEncoding::Alibi(alibi) => {
            let bias = (alibi.slopes.iter()).flat_map(|&slope| {
                table(len, |query, key| {
                    -f64::from(slope) * query.abs_diff(key) as f64
                })
            });
            let device = candle_core::Device::Cpu;
            let bias = Tensor::from_iter(bias, &device)?.reshape((alibi.slopes.len(), len, len))?;
            Ok(Some(bias.to_dtype(DType::F32)?))
        }
        PositionEncoding::RelativeBias(bias) => {
            let Some(weight) = weight else {
                return Ok(None);
            };
            let buckets =
                (0..len * len).map(|i| bias.bucket((i % len) as i64 - (i / len) as i64) as u32);
            let rows = weight.index_select(&Tensor::from_iter(buckets, weight.device())?, 0)?;
            Ok(Some(
                rows.reshape((len, len, ()))?
                    .permute((2, 0, 1))?
                    .contiguous()?,
            ))
        }
        _ => Ok(None),
    }
}

/// `[num_heads, len, head_dim]` rotated in f32.
fn rotated(case: &Case, x: &Tensor) -> Result<Tensor> {
    let PositionEncoding::Rope(rope) = &case.spec.position else {
        return Ok(x.clone());
    };
    let (num_heads, len, head_dim) = x.dims3()?;
    let angles = (0..len).flat_map(|p| rope.inv_freq.iter().map(move |&f| p as f64 * f64::from(f)));
    let (sin, cos): (Vec<f32>, Vec<f32>) = angles
        .map(|angle| (angle.sin() as f32, angle.cos() as f32))
        .unzip();
    let (pairs, axis) = match rope.pairing {
        RopePairing::HalfSplit => ([num_heads, len, 2, head_dim / 2], 2),
        RopePairing::Interleaved => ([num_heads, len, head_dim / 2, 2], 3),
    };
    let angles = |values| Tensor::from_vec(values, (1, len, head_dim / 2), x.device());
    let (sin, cos) = (angles(sin)?, angles(cos)?);
    let pairs = x.to_dtype(DType::F32)?.reshape(&pairs)?;
    let member = |i| pairs.narrow(axis, i, 1)?.squeeze(axis);
    let (x0, x1) = (member(0)?, member(1)?);
    let turned = [
        (x0.broadcast_mul(&cos)? - x1.broadcast_mul(&sin)?)?,
        (x0.broadcast_mul(&sin)? + x1.broadcast_mul(&cos)?)?,
    ];
    Tensor::stack(&turned, axis)?
        .reshape(x.shape())?
        .to_dtype(x.dtype())
}
