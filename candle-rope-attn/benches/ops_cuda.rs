//! Time and memory traffic of the training operations on a GPU, at the sizes of BERT-base with
//! 32768 tokens in bf16: every kernel but the matrix products should run at the speed of memory. Then
//! attention, through its operation and a tape, at the sizes that `scripts/check_kernels.py --bench` times
//! the kernels at.
//!
//! Other backward times include what Candle adds around an operation: the gradient's zeros and their sum.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_rope_attn::ops::{
    AdamW, Gradients, Parameter, Tape, cross_entropy, dropout, embedding, gelu, global_norm,
    layer_norm, linear, linear_cross_entropy,
};
use candle_rope_attn::{
    AttentionSpec, PositionEncoding, Rope, RopePairing, RopeScaling, Sequences, attention,
};

const TOKENS: usize = 32_768;
const WIDTH: usize = 768;
const MLP: usize = 4 * WIDTH;
const LABELS: usize = 4915;
const VOCAB: usize = 30_522;

struct Bench {
    device: Device,
}

impl Bench {
    fn var(&self, shape: &[usize], dtype: DType) -> Result<Var> {
        Var::from_tensor(&Tensor::randn(0f32, 1f32, shape, &self.device)?.to_dtype(dtype)?)
    }

    fn indices(&self, len: usize, end: usize) -> Result<Tensor> {
        let values: Vec<u32> = (0..len).map(|i| (i * i * 7919 % end) as u32).collect();
        Tensor::from_vec(values, len, &self.device)
    }

    /// Milliseconds of one call.
    fn time<T>(&self, mut call: impl FnMut() -> Result<T>) -> Result<f64> {
        const CALLS: u32 = 20;
        for _ in 0..3 {
            call()?;
        }
        self.device.synchronize()?;
        let start = Instant::now();
        for _ in 0..CALLS {
            call()?;
        }
        self.device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() * 1e3 / f64::from(CALLS))
    }

    /// Prints the forward time, with the rate for `bytes` of memory traffic, and the time of
    /// forward and backward together.
    fn report(
        &self,
        name: &str,
        inputs: &[&Var],
        bytes: usize,
        op: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<()> {
        let detached: Vec<_> = inputs.iter().map(|var| var.as_detached_tensor()).collect();
        let forward = self.time(|| op(&detached))?;
        let tracked: Vec<_> = inputs.iter().map(|var| var.as_tensor().clone()).collect();
        let both = self.time(|| op(&tracked)?.backward())?;
        let rate = bytes as f64 / forward / 1e9;
        println!("{name:16} {forward:9.3} ms {rate:6.2} TB/s {both:9.3} ms with backward");
        Ok(())
    }

    fn differentiable(&self) -> Result<()> {
        let bf16 = DType::BF16;
        let x = self.var(&[TOKENS, WIDTH], bf16)?;
        let wide = self.var(&[TOKENS, MLP], bf16)?;
        let size = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        self.report("gelu", &[&wide], 2 * size(&wide), |x| gelu(&x[0]))?;
        self.report("dropout", &[&x], 2 * size(&x), |x| dropout(&x[0], 0.1, 1))?;

        let [scale, shift] = [
            self.var(&[WIDTH], DType::F32)?,
            self.var(&[WIDTH], DType::F32)?,
        ];
        self.report("layer_norm", &[&x, &scale, &shift], 2 * size(&x), |x| {
            layer_norm(&x[0], &x[1], &x[2], 1e-5)
        })?;

        let [weight, bias] = [self.var(&[MLP, WIDTH], bf16)?, self.var(&[MLP], bf16)?];
        let bytes = size(&x) + 2 * size(&wide);
        self.report("linear", &[&x, &weight, &bias], bytes, |x| {
            linear(&x[0], &x[1], Some(&x[2]))
        })?;

        let (table, ids) = (
            self.var(&[VOCAB, WIDTH], bf16)?,
            self.indices(TOKENS, VOCAB)?,
        );
        self.report("embedding", &[&table], 2 * size(&x), |x| {
            embedding(&ids, &x[0])
        })?;

        let (logits, labels) = (
            self.var(&[LABELS, VOCAB], bf16)?,
            self.indices(LABELS, VOCAB)?,
        );
        self.report("cross_entropy", &[&logits], size(&logits), |x| {
            cross_entropy(&x[0], &labels)
        })
    }

    /// A tied decoder and its loss on a tape, as two operations and as one.
    fn decoder(&self) -> Result<()> {
        let vocab = VOCAB.next_multiple_of(64);
        let x = self.var(&[LABELS, WIDTH], DType::BF16)?;
        let (weight, bias) = (
            self.var(&[vocab, WIDTH], DType::BF16)?,
            self.var(&[vocab], DType::BF16)?,
        );
        let labels = self.indices(LABELS, vocab)?;
        let train = |loss: &dyn Fn() -> Result<Tensor>| {
            self.time(|| {
                let (loss, tape) = Tape::record(loss)?;
                let mut gradients = Gradients::default();
                tape.backward(&loss, 1.0, &mut gradients)?;
                Ok(gradients)
            })
        };
        let two = train(&|| cross_entropy(&linear(&x, &weight, Some(&bias))?, &labels))?;
        let one = train(&|| linear_cross_entropy(&x, &weight, Some(&bias), &labels))?;
        println!("decoder and loss {two:9.3} ms, fused {one:9.3} ms with backward");
        Ok(())
    }

    /// 16,384 tokens of width 2048, bidirectional and causal, without positions and with RoPE.
    fn attention(&self) -> Result<()> {
        for (head_dim, causal, rope) in [
            (64, false, false),
            (64, false, true),
            (64, true, false),
            (128, false, false),
        ] {
            for seqlen in [512, 2048, 8192, 16_384] {
                let (batch, num_heads) = (16_384 / seqlen, 2048 / head_dim);
                let shape = [batch, seqlen, num_heads, head_dim];
                let mut spec = AttentionSpec::new(num_heads, head_dim).with_causal(causal);
                if rope {
                    let table =
                        Rope::new(head_dim, 1e4, RopePairing::HalfSplit, RopeScaling::None)?;
                    spec = spec.with_position(PositionEncoding::Rope(table));
                }
                let [q, k, v, grad] = [(); 4].map(|()| self.var(&shape, DType::BF16));
                let [q, k, v, grad] = [q?, k?, v?, grad?];
                let run = |[q, k, v]: [&Tensor; 3]| attention(q, k, v, &spec, &Sequences::Dense);
                let detached = [&q, &k, &v].map(|x| x.as_detached_tensor());
                let forward = self.time(|| run(detached.each_ref()))?;
                let both = self.time(|| {
                    let (out, tape) = Tape::record(|| run([&q, &k, &v]))?;
                    let mut gradients = Gradients::default();
                    tape.backward_from(&out, &grad, &mut gradients)?;
                    Ok(gradients)
                })?;
                let share = if causal { 0.5 } else { 1.0 };
                let flop = share * (4 * batch * num_heads * seqlen * seqlen * head_dim) as f64;
                let name = format!(
                    "attention d{head_dim} {}{}",
                    if causal { "causal" } else { "full" },
                    if rope { " RoPE" } else { "" }
                );
                println!(
                    "{name:24} {seqlen:6} {forward:7.3} ms {:4.0} TFLOP/s {both:7.3} ms {:4.0} TFLOP/s with backward",
                    flop / forward / 1e9,
                    3.5 * flop / both / 1e9
                );
            }
        }
        Ok(())
    }

    /// 110M parameters in 200 tensors.
    fn optimizer(&self) -> Result<()> {
        let mut parameters = Vec::new();
        for i in 0..200 {
            let rows = if i % 2 == 0 { 1 } else { 1432 };
            let var = self.var(&[rows, WIDTH], DType::F32)?;
            let weight_decay = 0.01;
            parameters.push(Parameter {
                var,
                weight_decay,
                rounded: None,
            });
        }
        let grads = parameters
            .iter()
            .map(|p| p.var.ones_like())
            .collect::<Result<Vec<_>>>()?;
        let elements: usize = grads.iter().map(Tensor::elem_count).sum();
        let optimizer = AdamW::new(parameters, (0.9, 0.999), 1e-8)?;

        let time = self.time(|| global_norm(&grads))?;
        println!(
            "global_norm      {time:9.3} ms {:6.2} TB/s",
            4e-9 * elements as f64 / time
        );
        let norm = global_norm(&grads)?;
        let time = self.time(|| optimizer.step(&grads, 1e-4, &norm, Some(1.0)))?;
        println!(
            "adamw            {time:9.3} ms {:6.2} TB/s",
            28e-9 * elements as f64 / time
        );
        Ok(())
    }
}

fn main() -> Result<()> {
    match candle_rope_attn::cuda_device(0) {
        Ok(device) => {
            let bench = Bench { device };
            bench.differentiable()?;
            bench.decoder()?;
            bench.optimizer()?;
            bench.attention()
        }
        Err(error) => {
            println!("skipped: {error}");
            Ok(())
        }
    }
}
