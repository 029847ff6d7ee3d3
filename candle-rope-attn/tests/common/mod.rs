//! Test cases, and how results are judged.
//!
//! A kernel is compared with the f64 reference beside what plain Candle operations of the same
//! dtype make of the same inputs: its largest error may be twice theirs, and twice the round-off of
//! the exact result, see [`Tolerance`].
#![allow(dead_code)] // each test binary uses its part

pub mod naive;
mod shared;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_rope_attn::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling,
    Sequences, Window, attention_qkvpacked, attention_qkvpacked_with_bias, reference,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
pub use shared::*;

/// A call of attention, without its tensors.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    pub spec: AttentionSpec,
    pub sequences: Sequences,
    /// `[batch, seqlen]`, or `[total_tokens]` with `CuSeqlens`.
    pub tokens: Vec<usize>,
    /// Keys that take no part hold NaN in k and v.
    pub poisoned: bool,
}

impl Case {
    pub fn dense(spec: AttentionSpec, batch: usize, seqlen: usize) -> Self {
        Self {
            name: String::new(),
            spec,
            sequences: Sequences::Dense,
            tokens: vec![batch, seqlen],
            poisoned: false,
        }
    }

    pub fn packed(spec: AttentionSpec, lens: &[usize]) -> Self {
        let mut bounds = vec![0];
        bounds.extend(lens.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        }));
        Self {
            name: String::new(),
            spec,
            tokens: vec![lens.iter().sum()],
            sequences: Sequences::CuSeqlens(bounds),
            poisoned: false,
        }
    }

    /// Shape of q: the tokens, heads and width.
    pub fn shape(&self) -> Vec<usize> {
        [&self.tokens[..], &[self.spec.num_heads, self.spec.head_dim]].concat()
    }

    /// Shape of the packed q, k and v.
    pub fn packed_shape(&self) -> Vec<usize> {
        let mut shape = self.shape();
        shape.insert(self.tokens.len(), 3);
        shape
    }

    pub fn weight_shape(&self) -> Option<[usize; 2]> {
        match &self.spec.position {
            PositionEncoding::RelativeBias(bias) => Some([bias.num_buckets, self.spec.num_heads]),
            _ => None,
        }
    }

    /// First token and length of each sequence.
    pub fn spans(&self) -> Vec<(usize, usize)> {
        match &self.sequences {
            Sequences::CuSeqlens(bounds) => {
                bounds.windows(2).map(|b| (b[0], b[1] - b[0])).collect()
            }
            _ => (0..self.tokens[0])
                .map(|b| (b * self.tokens[1], self.tokens[1]))
                .collect(),
        }
    }

    /// Whether a key of a sequence takes part.
    pub fn takes_part(&self, sequence: usize, key: usize) -> bool {
        match &self.sequences {
            Sequences::KeyLens(lens) => key < lens[sequence],
            Sequences::KeyMask(mask) => mask[sequence * self.tokens[1] + key],
            _ => true,
        }
    }

    /// Whether a query of a sequence sees a key.
    pub fn sees(&self, sequence: usize, query: usize, key: usize) -> bool {
        let Window { left, right } = self.spec.window.unwrap_or(Window {
            left: None,
            right: None,
        });
        self.takes_part(sequence, key)
            && !(self.spec.causal && key > query)
            && left.is_none_or(|left| key + left >= query)
            && right.is_none_or(|right| key <= query + right)
    }
}

/// The tensors of a call in f64, already rounded to the dtype under test.
pub struct Inputs {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    /// Empty without a relative bias.
    pub weight: Vec<f64>,
    pub d_out: Vec<f64>,
}

impl Inputs {
    pub fn random(case: &Case, dtype: DType, seed: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let len = case.shape().iter().product();
        let mut draw = |dtype| round(&normal(&mut rng, len), dtype);
        Ok(Self {
            q: draw(dtype)?,
            k: draw(dtype)?,
            v: draw(dtype)?,
            d_out: draw(dtype)?,
            weight: round(
                &normal(
                    &mut rng,
                    case.weight_shape().map_or(0, |s| s.iter().product()),
                ),
                DType::F32,
            )?,
        })
    }

    pub fn reference(&self) -> reference::Inputs<'_> {
        reference::Inputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            weight: &self.weight,
        }
    }
}

/// Standard normal numbers (Box-Muller).
pub fn normal(rng: &mut impl Rng, len: usize) -> Vec<f64> {
    let mut draw = || {
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()
    };
    (0..len).map(|_| draw()).collect()
}

/// The same as an f32 tensor on the CPU.
pub fn randn(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values = normal(&mut rng, shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)
}

/// The values that a dtype holds in their place.
pub fn round(values: &[f64], dtype: DType) -> Result<Vec<f64>> {
    to_f64(&Tensor::from_slice(values, values.len(), &Device::Cpu)?.to_dtype(dtype)?)
}

/// A call's output and gradients, flat.
pub struct Results {
    pub out: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
    pub dweight: Vec<f64>,
    /// Of the reference only.
    pub lse: Vec<f64>,
}

impl Results {
    pub fn exact(case: &Case, inputs: &Inputs) -> Self {
        let (spec, sequences, batch) = (&case.spec, &case.sequences, case.tokens[0]);
        let forward = reference::forward(spec, sequences, batch, inputs.reference());
        let gradients =
            reference::backward(spec, sequences, batch, inputs.reference(), &inputs.d_out);
        Self {
            out: forward.out,
            dq: gradients.dq,
            dk: gradients.dk,
            dv: gradients.dv,
            dweight: gradients.dweight,
            lse: forward.lse,
        }
    }

    /// By `attention`, a function of packed q, k and v and the relative bias weight, and Candle's
    /// backward pass through it.
    pub fn of(
        case: &Case,
        inputs: &Inputs,
        dtype: DType,
        device: &Device,
        attention: impl Fn(&Case, &Tensor, Option<&Tensor>) -> Result<Tensor>,
    ) -> Result<Self> {
        let tensor = |values: &[f64], shape: &[usize]| {
            Tensor::from_slice(values, shape, &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)
        };
        let shape = case.shape();
        let parts = [&inputs.q, &inputs.k, &inputs.v];
        let parts = parts.map(|x| tensor(x, &shape));
        let [q, k, v] = parts;
        let qkv = Var::from_tensor(&Tensor::stack(&[q?, k?, v?], case.tokens.len())?)?;
        let weight = match case.weight_shape() {
            Some(shape) => {
                let weight = Tensor::from_slice(&inputs.weight, &shape, &Device::Cpu)?;
                let weight = weight.to_dtype(DType::F32)?.to_device(device)?;
                Some(Var::from_tensor(&weight)?)
            }
            None => None,
        };
        let out = attention(case, &qkv, weight.as_ref().map(Var::as_tensor))?;
        assert_eq!(out.dims(), shape);
        assert_eq!(out.dtype(), dtype);
        let gradients = (&out * tensor(&inputs.d_out, &shape)?)?
            .sum_all()?
            .backward()?;
        let d_qkv = match gradients.get(&qkv) {
            Some(gradient) => gradient.clone(),
            None => panic!("{}: no gradient", case.name),
        };
        let part = |i| to_f64(&d_qkv.narrow(case.tokens.len(), i, 1)?);
        Ok(Self {
            out: to_f64(&out)?,
            dq: part(0)?,
            dk: part(1)?,
            dv: part(2)?,
            dweight: match weight.and_then(|weight| gradients.get(&weight).cloned()) {
                Some(gradient) => to_f64(&gradient)?,
                None => Vec::new(),
            },
            lse: Vec::new(),
        })
    }

    fn tensors(&self) -> [(&'static str, &[f64]); 5] {
        [
            ("out", &self.out),
            ("dq", &self.dq),
            ("dk", &self.dk),
            ("dv", &self.dv),
            ("dweight", &self.dweight),
        ]
    }
}

/// The crate's attention.
pub fn fused(case: &Case, qkv: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
    match weight {
        Some(weight) => attention_qkvpacked_with_bias(qkv, weight, &case.spec, &case.sequences),
        None => attention_qkvpacked(qkv, &case.spec, &case.sequences),
    }
}

/// The largest error over the allowed one, and where.
#[derive(Debug, Clone, Default)]
pub struct Worst {
    pub ratio: f64,
    pub place: String,
}

/// Runs every case in a dtype, fails if an error is above the allowed one, and returns the worst.
pub fn check_cases(cases: &[Case], dtype: DType, device: &Device) -> Result<Worst> {
    let mut worst = Worst::default();
    let mut failures = Vec::new();
    for (seed, case) in cases.iter().enumerate() {
        let found = judge(case, dtype, device, seed as u64)?;
        if found.ratio > 1.0 {
            failures.push(found.place.clone());
        }
        if found.ratio > worst.ratio {
            worst = found;
        }
    }
    assert!(failures.is_empty(), "failed:\n{}", failures.join("\n"));
    println!(
        "{dtype:?} on {:?}: {} cases, worst error {:.2} of the allowed one ({})",
        device.location(),
        cases.len(),
        worst.ratio,
        worst.place
    );
    Ok(worst)
}

/// Runs one case, see [`check_cases`].
pub fn check_case(case: &Case, dtype: DType, device: &Device, seed: u64) -> Result<Worst> {
    let worst = judge(case, dtype, device, seed)?;
    assert!(worst.ratio <= 1.0, "failed: {}", worst.place);
    Ok(worst)
}

fn judge(case: &Case, dtype: DType, device: &Device, seed: u64) -> Result<Worst> {
    let mut inputs = Inputs::random(case, dtype, seed)?;
    let exact = Results::exact(case, &inputs);
    let naive = Results::of(case, &inputs, dtype, &Device::Cpu, naive::attention)?;
    if case.poisoned {
        poison(case, &mut inputs);
    }
    let fused = Results::of(case, &inputs, dtype, device, fused)?;
    let floors = floors(case, &inputs, &exact, dtype, device);
    let mut worst = Worst::default();
    let tensors = exact
        .tensors()
        .into_iter()
        .zip(naive.tensors())
        .zip(fused.tensors());
    for ((((name, exact), (_, naive)), (_, fused)), floor) in tensors.zip(floors) {
        let rounded = round(exact, if name == "dweight" { DType::F32 } else { dtype })?;
        let allowed = 2.0 * max_error(naive, exact) + 2.0 * max_error(&rounded, exact) + floor;
        let error = max_error(fused, exact);
        if error > worst.ratio * allowed {
            worst = Worst {
                ratio: error / allowed,
                place: format!(
                    "{} {dtype:?} {name}: error {error:.1e}, allowed {allowed:.1e}; plain Candle {:.1e}, round-off {:.1e}, floor {floor:.1e}",
                    case.name,
                    max_error(naive, exact),
                    max_error(&rounded, exact),
                ),
            };
        }
    }
    Ok(worst)
}

/// What rounding alone may do to results that plain Candle happens to get exactly, such as the
/// zero gradients of a query with one key: one rounding of the output shifts the delta of the
/// backward pass, one rounding of the log-sum-exp, or of scores of its size, to f32 scales a row's
/// probabilities.
fn floors(
    case: &Case,
    inputs: &Inputs,
    exact: &Results,
    dtype: DType,
    device: &Device,
) -> [f64; 5] {
    // On a GPU an f32 product is three tf32 products on tensor cores, whose long sums truncate.
    let arithmetic = match dtype {
        DType::F32 if device.is_cuda() => 2f64.powi(-17),
        _ => 2f64.powi(-23),
    };
    let unit = match dtype {
        DType::BF16 => 2f64.powi(-8),
        DType::F16 => 2f64.powi(-11),
        _ => arithmetic,
    };
    let largest = |x: &[f64]| {
        let finite = x.iter().map(|x| x.abs()).filter(|x| x.is_finite());
        finite.fold(0.0, f64::max)
    };
    let (out, d_out) = (&exact.out, &inputs.d_out);
    let width = case.spec.head_dim;
    let deltas = out.chunks(width).zip(d_out.chunks(width));
    let deltas = deltas.map(|(out, d_out)| out.iter().zip(d_out).map(|(x, y)| (x * y).abs()).sum());
    let d_score = unit * deltas.fold(0.0, f64::max);
    let d_row = d_score * f64::from(case.spec.softmax_scale.abs());
    let probability = arithmetic * (1.0 + largest(&exact.lse));
    [
        (arithmetic + probability) * largest(&exact.out),
        probability * largest(&exact.dq) + d_row * largest(&inputs.k),
        probability * largest(&exact.dk) + d_row * largest(&inputs.q),
        probability * largest(&exact.dv),
        probability * largest(&exact.dweight)
            + d_score * (case.tokens.iter().product::<usize>() as f64).sqrt(),
    ]
}

/// Puts NaN into k and v of every key that takes no part.
pub fn poison(case: &Case, inputs: &mut Inputs) {
    let width = case.spec.num_heads * case.spec.head_dim;
    for (sequence, (first, len)) in case.spans().into_iter().enumerate() {
        for key in (0..len).filter(|&key| !case.takes_part(sequence, key)) {
            let row = (first + key) * width..(first + key + 1) * width;
            inputs.k[row.clone()].fill(f64::NAN);
            inputs.v[row].fill(f64::NAN);
        }
    }
}

/// The largest absolute difference; infinite where either is no number.
pub fn max_error(x: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(x.len(), exact.len());
    x.iter()
        .zip(exact)
        .map(|(x, exact)| (x - exact).abs())
        .map(|error| if error.is_nan() { f64::INFINITY } else { error })
        .fold(0.0, f64::max)
}

/// Every feature at every length.
pub fn cases() -> Vec<Case> {
    // One, an odd number, and around the blocks of the kernels.
    const LENGTHS: [usize; 7] = [1, 7, 63, 65, 127, 129, 260];
    const HEAD_DIMS: [usize; 6] = [64, 32, 128, 40, 16, 80];
    let mut cases = Vec::new();
    for (length_index, &seqlen) in LENGTHS.iter().enumerate() {
        for (feature_index, (name, feature)) in features().into_iter().enumerate() {
            let head_dim = HEAD_DIMS[(length_index + feature_index) % HEAD_DIMS.len()];
            let mut case = Case::dense(AttentionSpec::new(2, head_dim), 2, seqlen);
            feature(&mut case);
            case.name = format!("{name}, length {seqlen}, width {head_dim}");
            cases.push(case);
        }
    }
    for head_dim in [1, 2, 3, 5, 17, 256] {
        let mut case = Case::dense(AttentionSpec::new(3, head_dim), 1, 70);
        case.name = format!("width {head_dim}");
        cases.push(case);
    }
    cases
}

/// A few cases longer than any block.
pub fn long_cases() -> Vec<Case> {
    let named = |name: &str, mut case: Case| {
        case.name = name.into();
        case
    };
    let spec = AttentionSpec::new(1, 16);
    let window = Some(Window {
        left: Some(300),
        right: Some(20),
    });
    let rope = PositionEncoding::Rope(rope(16, RopePairing::HalfSplit));
    vec![
        named("long", Case::dense(spec.clone(), 1, 1100)),
        named("long rope window", {
            Case::dense(
                spec.clone().with_position(rope).with_window(window),
                1,
                1100,
            )
        }),
        named("long causal relative bias", {
            let spec = spec.with_position(relative_bias(false)).with_causal(true);
            Case::packed(spec, &[30, 1070, 1])
        }),
    ]
}

fn rope(head_dim: usize, pairing: RopePairing) -> Rope {
    match Rope::new(head_dim, 10_000.0, pairing, RopeScaling::None) {
        Ok(rope) => rope,
        Err(error) => panic!("{error}"),
    }
}

fn relative_bias(bidirectional: bool) -> PositionEncoding {
    PositionEncoding::RelativeBias(RelativeBias {
        num_buckets: 32,
        max_distance: 100,
        bidirectional,
    })
}

type Feature = fn(&mut Case);

fn features() -> Vec<(&'static str, Feature)> {
    vec![
        ("plain", |_| {}),
        ("scale", |case| case.spec.softmax_scale = -0.7),
        ("scale 0", |case| case.spec.softmax_scale = 0.0),
        ("causal", |case| case.spec.causal = true),
        ("window", |case| {
            case.spec.window = Some(Window {
                left: Some(5),
                right: Some(40),
            });
        }),
        ("causal window", |case| {
            case.spec.causal = true;
            case.spec.window = Some(Window {
                left: Some(20),
                right: Some(3),
            });
        }),
        ("half-split rope", |case| {
            case.spec.position =
                PositionEncoding::Rope(rope(case.spec.head_dim, RopePairing::HalfSplit));
        }),
        ("interleaved rope", |case| {
            case.spec.position =
                PositionEncoding::Rope(rope(case.spec.head_dim, RopePairing::Interleaved));
            case.spec.causal = true;
        }),
        ("alibi", |case| {
            case.spec.position = PositionEncoding::Alibi(Alibi::new(case.spec.num_heads));
        }),
        ("relative bias", |case| {
            case.spec.position = relative_bias(true)
        }),
        ("causal relative bias", |case| {
            case.spec.position = relative_bias(false);
            case.spec.causal = true;
        }),
        ("dropout", |case| {
            case.spec.dropout = Some(Dropout {
                p: 0.3,
                seed: 0x1234_5678_9abc,
            });
        }),
        ("key lengths", |case| {
            let seqlen = case.tokens[1];
            case.sequences = Sequences::KeyLens(vec![seqlen / 2, seqlen]);
            case.poisoned = true;
        }),
        ("no keys", |case| {
            case.sequences = Sequences::KeyLens(vec![0, case.tokens[1]]);
            case.poisoned = true;
        }),
        ("key mask", |case| {
            let mask = (0..2 * case.tokens[1])
                .map(|i| i % 3 != 0 && i % 7 != 2)
                .collect();
            case.sequences = Sequences::KeyMask(mask);
            case.poisoned = true;
        }),
        ("key mask, causal, dropout, rope", |case| {
            // The first queries see no key.
            let mask = (0..2 * case.tokens[1]).map(|i| i % case.tokens[1] > 3 && i % 5 != 2);
            case.sequences = Sequences::KeyMask(mask.collect());
            case.poisoned = true;
            case.spec.causal = true;
            case.spec.dropout = Some(Dropout { p: 0.1, seed: 7 });
            case.spec.position =
                PositionEncoding::Rope(rope(case.spec.head_dim, RopePairing::HalfSplit));
        }),
        ("cu_seqlens", |case| {
            let seqlen = case.tokens[1];
            *case = Case::packed(case.spec.clone(), &[0, seqlen, 0, seqlen / 3 + 1, 1, 0]);
        }),
        ("cu_seqlens, relative bias, dropout, window", |case| {
            case.spec.position = relative_bias(true);
            case.spec.dropout = Some(Dropout { p: 0.2, seed: 3 });
            case.spec.window = Some(Window {
                left: Some(17),
                right: None,
            });
            *case = Case::packed(case.spec.clone(), &[case.tokens[1], 2, case.tokens[1] / 2]);
        }),
    ]
}

/// The CPU, and a GPU where there is one.
pub fn devices() -> Vec<Device> {
    std::iter::once(Device::Cpu).chain(gpu()).collect()
}
