//! The attention op beside plain Candle operations, forward and with the backward pass.
//!
//! `cargo bench -p candle-rope-attn --bench attention` prints criterion's timings, then one table
//! with the ratios and the peak memory of each.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{D, Device, Result, Tensor, Var};
use candle_rope_attn::{AttentionSpec, Sequences, attention};
use criterion::{BenchmarkId, Criterion};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

#[derive(Clone, Copy)]
struct Size {
    batch: usize,
    seqlen: usize,
    num_heads: usize,
    head_dim: usize,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            batch,
            seqlen,
            num_heads,
            head_dim,
        } = self;
        write!(
            f,
            "batch {batch} seqlen {seqlen} heads {num_heads} width {head_dim}"
        )
    }
}

const SIZES: [Size; 5] = [
    Size {
        batch: 32,
        seqlen: 128,
        num_heads: 4,
        head_dim: 32,
    },
    Size {
        batch: 16,
        seqlen: 128,
        num_heads: 8,
        head_dim: 64,
    },
    Size {
        batch: 8,
        seqlen: 512,
        num_heads: 4,
        head_dim: 64,
    },
    Size {
        batch: 1,
        seqlen: 4096,
        num_heads: 2,
        head_dim: 64,
    },
    Size {
        batch: 1,
        seqlen: 4096,
        num_heads: 1,
        head_dim: 64,
    },
];

/// q, k and v, as `[batch, seqlen, num_heads, head_dim]` for ours and `[batch, num_heads, seqlen,
/// head_dim]` for plain Candle, which would copy otherwise.
struct Inputs {
    ours: [Var; 3],
    plain: [Var; 3],
    spec: AttentionSpec,
}

impl Inputs {
    fn new(size: Size) -> Result<Self> {
        let Size {
            batch,
            seqlen,
            num_heads,
            head_dim,
        } = size;
        let draw = |shape| Var::randn(0f32, 1f32, shape, &Device::Cpu);
        let ours = (batch, seqlen, num_heads, head_dim);
        let plain = (batch, num_heads, seqlen, head_dim);
        Ok(Self {
            ours: [draw(ours)?, draw(ours)?, draw(ours)?],
            plain: [draw(plain)?, draw(plain)?, draw(plain)?],
            spec: AttentionSpec::new(num_heads, head_dim),
        })
    }

    fn ours_forward(&self) -> Result<Tensor> {
        let [q, k, v] = self.ours.each_ref().map(|x| x.as_detached_tensor());
        attention(&q, &k, &v, &self.spec, &Sequences::Dense)
    }

    fn ours_both(&self) -> Result<Tensor> {
        let [q, k, v] = &self.ours;
        let out = attention(q, k, v, &self.spec, &Sequences::Dense)?;
        gradient(&out, q)
    }

    fn plain_forward(&self) -> Result<Tensor> {
        let [q, k, v] = self.plain.each_ref().map(|x| x.as_detached_tensor());
        let scores = (q.matmul(&k.t()?)? * f64::from(self.spec.softmax_scale))?;
        candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)
    }

    fn plain_both(&self) -> Result<Tensor> {
        let [q, k, v] = &self.plain;
        let scores = (q.matmul(&k.t()?)? * f64::from(self.spec.softmax_scale))?;
        // `softmax_last_dim` has no backward pass.
        let out = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)?;
        gradient(&out, q)
    }
}

fn gradient(out: &Tensor, x: &Tensor) -> Result<Tensor> {
    let gradients = out.sum_all()?.backward()?;
    match gradients.get(x) {
        Some(gradient) => Ok(gradient.clone()),
        None => candle_core::bail!("no gradient"),
    }
}

type Run = fn(&Inputs) -> Result<Tensor>;

const PASSES: [(&str, Run, Run); 2] = [
    ("forward", Inputs::ours_forward, Inputs::plain_forward),
    (
        "forward and backward",
        Inputs::ours_both,
        Inputs::plain_both,
    ),
];

/// Median seconds, and peak MB above what the inputs take.
fn measure(run: Run, inputs: &Inputs) -> Result<(f64, f32)> {
    let before = MEMORY.current_usage_as_mb();
    MEMORY.reset_peak_usage();
    run(inputs)?;
    let memory = MEMORY.peak_usage_as_mb() - before;
    let mut seconds = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        black_box(run(inputs)?);
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok((seconds[seconds.len() / 2], memory))
}

fn print_ratios() -> Result<()> {
    for size in SIZES {
        let inputs = Inputs::new(size)?;
        for (pass, ours, plain) in PASSES {
            let (our_time, our_memory) = measure(ours, &inputs)?;
            let (plain_time, plain_memory) = measure(plain, &inputs)?;
            println!(
                "{size}, {pass}: {:.2} ms, plain Candle {:.2} ms ({:.2}x); memory {our_memory:.1} MB, plain Candle {plain_memory:.1} MB",
                1e3 * our_time,
                1e3 * plain_time,
                plain_time / our_time,
            );
        }
    }
    Ok(())
}

fn bench(criterion: &mut Criterion) -> Result<()> {
    for (pass, ours, plain) in PASSES {
        let mut group = criterion.benchmark_group(pass);
        group.sample_size(10);
        for size in SIZES {
            let inputs = Inputs::new(size)?;
            for (name, run) in [("ours", ours), ("plain Candle", plain)] {
                group.bench_with_input(BenchmarkId::new(name, size), &inputs, |b, inputs| {
                    b.iter(|| run(inputs))
                });
            }
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let mut criterion = Criterion::default().configure_from_args();
    bench(&mut criterion)?;
    criterion.final_summary();
    print_ratios()
}
