//! Measures training steps and inference.

use std::io::{Write, stdout};

use anyhow::Result;
use bert_variants::bench::{BenchConfig, Pass, Row, bench};
use clap::{CommandFactory, FromArgMatches, Parser};
use peak_alloc::PeakAlloc;

#[global_allocator]
static PEAK_ALLOC: PeakAlloc = PeakAlloc;

/// Measure speed and memory of training steps and inference, by default of BERT-base.
///
/// A training step is that of `pretrain`: forward, backward, clipping and AdamW. Inference computes
/// the scores of the masked tokens without gradients. "tokens" and "tokens/s" do not count padding;
/// "ms" is the time of a batch among others, "latency ms" that of a batch waited for by itself;
/// "peak GiB" is all that was in use at once: weights, optimizer, gradients and activations.
///
/// MFU is the share of --peak-tflops that a training step uses for
///
///   6 * (tokens * W_layers + predicted tokens * W_head)
///     + 12 * num_hidden_layers * hidden_size * (sum of seqlen^2 over sequences)
///
/// operations, where W are weights of matrix products: those of a layer 4 * hidden_size^2 + 2 (with
/// a gate 3) * hidden_size * intermediate_size, those of the head hidden_size^2 (the dense layer)
/// and vocab_size * hidden_size. What the last layer does after its attention is for predicted tokens
/// alone, so that all its weights but the 3 * hidden_size^2 of q, k and v count in W_head. The second
/// line is halved for causal attention, and has the pairs inside of the window in local layers.
/// Inference needs a third. What padding and --gradient-checkpointing add does not count.
#[derive(Parser)]
#[command(version, args_override_self = true, verbatim_doc_comment)]
struct Cli {
    /// Print a line of JSON for each measurement instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: BenchConfig,
}

/// Sizes of BERT-base, where `pretrain` has a small model.
const BERT_BASE: [(&str, &str); 3] = [
    ("num_hidden_layers", "12"),
    ("hidden_size", "768"),
    ("num_attention_heads", "12"),
];

fn main() -> Result<()> {
    bert_variants::init_logging();
    bert_variants::memory::keep_freed_memory();
    let mut command = Cli::command();
    for (name, size) in BERT_BASE {
        command = command.mut_arg(name, |arg| arg.default_value(size));
    }
    let cli = Cli::from_arg_matches(&command.get_matches())?;
    let mut header = (!cli.json).then(|| line(COLUMNS));
    bench(&cli.config, |row| {
        if let Some(header) = header.take() {
            writeln!(stdout(), "{header}")?;
        }
        match cli.json {
            true => writeln!(stdout(), "{}", serde_json::to_string(row)?)?,
            false => writeln!(stdout(), "{}", table_row(row))?,
        }
        Ok(stdout().flush()?)
    })
}

const COLUMNS: [&str; 12] = [
    "pass",
    "variant",
    "shape",
    "padding",
    "tokens",
    "tokens/s",
    "ms",
    "latency ms",
    "TFLOP/s",
    "MFU",
    "peak GiB",
    "speed-up",
];

fn table_row(row: &Row) -> String {
    let optional = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    let cells = [
        match row.pass {
            Pass::Train => "train".into(),
            Pass::Infer => "infer".into(),
        },
        row.variant.into(),
        format!("{}x{}", row.batch, row.seqlen),
        if row.padded { "padded" } else { "none" }.into(),
        format!("{:.0}", row.tokens),
        format!("{:.0}", row.tokens_per_second),
        format!("{:.3}", row.ms),
        optional(row.latency_ms.map(|ms| format!("{ms:.3}"))),
        format!("{:.3}", row.tflops_per_second),
        optional(row.mfu.map(|mfu| format!("{:.1} %", 100.0 * mfu))),
        format!("{:.2}", row.peak_bytes as f64 / f64::from(1 << 30)),
        optional(row.speedup.map(|speedup| format!("{speedup:.2}"))),
    ];
    line(cells.each_ref().map(String::as_str))
}

/// Cells in columns, the first ones flush left.
fn line(cells: [&str; 12]) -> String {
    let aligned = cells.iter().enumerate().map(|(i, cell)| match i {
        0..4 => format!("{cell:<10}"),
        _ => format!("{cell:>10}"),
    });
    aligned.collect::<Vec<_>>().join(" ")
}
