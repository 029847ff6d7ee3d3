//! Attention of what a linear layer makes, where the product may rotate q and k, against the two
//! operations on the CPU in f32.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::linear;
use candle_rope_attn::{
    AttentionSpec, PositionEncoding, Rope, RopePairing, RopeScaling, Sequences,
    attention_projected, attention_qkvpacked,
};

use crate::common::{Input, assert_near, device_tests, on_tape, values};

device_tests!(
    half_split_pairs,
    interleaved_pairs,
    packed_sequences,
    padded_sequences,
    several_steps_and_few_rows,
    more_tiles_than_blocks,
    without_a_bias,
    widths_without_a_kernel,
    without_positions,
);

struct Case {
    /// Features of x.
    inner: usize,
    spec: AttentionSpec,
    sequences: Sequences,
    tokens: Vec<usize>,
    bias: bool,
}

impl Case {
    fn new(num_heads: usize, head_dim: usize) -> Self {
        // Scores of about 1.
        let spec = AttentionSpec::new(num_heads, head_dim).with_softmax_scale(0.001);
        Self {
            inner: 64,
            spec,
            sequences: Sequences::Dense,
            tokens: vec![2, 150],
            bias: true,
        }
    }

    fn with_rope(mut self, pairing: RopePairing) -> Result<Self> {
        let rope = Rope::new(self.spec.head_dim, 10_000.0, pairing, RopeScaling::None)?;
        self.spec = self.spec.with_position(PositionEncoding::Rope(rope));
        Ok(self)
    }

    /// In every dtype.
    fn check(&self, device: &Device) -> Result<()> {
        let roundings = [
            (DType::F32, 1e-5),
            (DType::BF16, 1.0 / 256.0),
            (DType::F16, 1.0 / 2048.0),
        ];
        for (dtype, rounding) in roundings {
            self.check_in(device, dtype, rounding)
                .with_context(|| format!("{dtype:?}"))?;
        }
        Ok(())
    }

    fn check_in(&self, device: &Device, dtype: DType, rounding: f64) -> Result<()> {
        let columns = 3 * self.spec.num_heads * self.spec.head_dim;
        let mut shapes = vec![
            [&self.tokens[..], &[self.inner]].concat(),
            vec![columns, self.inner],
        ];
        if self.bias {
            shapes.push(vec![columns]);
        }
        let inputs: Vec<_> = (shapes.iter().zip(0..))
            .map(|(shape, seed)| Input::random(shape, dtype, seed))
            .collect();
        let got = self.run(device, &inputs, attention_projected)?;
        let untracked = inputs.iter().map(|input| Ok(input.var(device)?.detach()));
        let untracked = untracked.collect::<Result<Vec<_>>>()?;
        let (spec, sequences) = (&self.spec, &self.sequences);
        let without = attention_projected(
            &untracked[0],
            &untracked[1],
            untracked.get(2),
            spec,
            sequences,
        )?;
        ensure!(
            values(&without)? == values(&got[0])?,
            "not the same without a tape"
        );

        let rounded = untracked.iter().zip(shapes).map(|(x, shape)| {
            let values = values(x)?;
            Ok(Input {
                values,
                shape,
                dtype: DType::F32,
            })
        });
        let rounded = rounded.collect::<Result<Vec<_>>>()?;
        let expected = self.run(
            &Device::Cpu,
            &rounded,
            |x, weight, bias, spec, sequences| {
                attention_qkvpacked(&linear(x, weight, bias)?, spec, sequences)
            },
        )?;
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            ensure!(got.dims() == expected.dims());
            let (name, expected) = (format!("result {i}"), values(expected)?);
            assert_near(&name, got, &expected, 4.0 * rounding)?;
        }
        Ok(())
    }

    /// The result, and the gradients of all inputs on a tape.
    fn run(
        &self,
        device: &Device,
        inputs: &[Input],
        attention: impl Fn(
            &Tensor,
            &Tensor,
            Option<&Tensor>,
            &AttentionSpec,
            &Sequences,
        ) -> candle_core::Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let vars = inputs
            .iter()
            .map(|input| Ok(input.var(device)?.as_tensor().clone()));
        let vars = vars.collect::<Result<Vec<_>>>()?;
        let width = self.spec.num_heads * self.spec.head_dim;
        let shape = [&self.tokens[..], &[width]].concat();
        let grad = Input::random(&shape, inputs[0].dtype, 7)
            .var(device)?
            .detach();
        on_tape(&vars, &grad, |x| {
            attention(&x[0], &x[1], x.get(2), &self.spec, &self.sequences)
        })
    }
}

fn half_split_pairs(device: &Device) -> Result<()> {
    for (num_heads, head_dim) in [(2, 64), (1, 128), (4, 32)] {
        Case::new(num_heads, head_dim)
            .with_rope(RopePairing::HalfSplit)?
            .check(device)?;
    }
    Ok(())
}

fn interleaved_pairs(device: &Device) -> Result<()> {
    for (num_heads, head_dim) in [(3, 64), (4, 16)] {
        Case::new(num_heads, head_dim)
            .with_rope(RopePairing::Interleaved)?
            .check(device)?;
    }
    Ok(())
}

fn packed_sequences(device: &Device) -> Result<()> {
    let mut case = Case::new(2, 64).with_rope(RopePairing::HalfSplit)?;
    case.tokens = vec![331];
    case.sequences = Sequences::CuSeqlens(vec![0, 1, 1, 130, 331, 331]);
    case.check(device)
}

fn padded_sequences(device: &Device) -> Result<()> {
    let mut case = Case::new(2, 64).with_rope(RopePairing::HalfSplit)?;
    case.sequences = Sequences::KeyLens(vec![150, 70]);
    case.check(device)
}

fn several_steps_and_few_rows(device: &Device) -> Result<()> {
    let mut case = Case::new(3, 64).with_rope(RopePairing::Interleaved)?;
    case.inner = 320;
    // Products of q and k grow with the width.
    case.spec = case.spec.with_softmax_scale(0.0002);
    case.tokens = vec![1, 100];
    case.check(device)
}

fn more_tiles_than_blocks(device: &Device) -> Result<()> {
    let mut case = Case::new(2, 64).with_rope(RopePairing::HalfSplit)?;
    case.inner = 128;
    case.tokens = vec![100, 90];
    case.check(device)
}

fn without_a_bias(device: &Device) -> Result<()> {
    let mut case = Case::new(2, 64).with_rope(RopePairing::HalfSplit)?;
    case.bias = false;
    case.check(device)
}

fn widths_without_a_kernel(device: &Device) -> Result<()> {
    Case::new(2, 48)
        .with_rope(RopePairing::HalfSplit)?
        .check(device)
}

fn without_positions(device: &Device) -> Result<()> {
    Case::new(2, 64).check(device)
}
