//! BERT variants that differ in position encoding only: pretraining, comparison and
//! Hugging Face checkpoints, on Candle.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod finetune;
pub mod hub;
pub mod lines;
pub mod memory;
pub mod model;
mod names;
pub mod parameters;
pub mod predict;
pub mod pretrain;
pub mod record;
pub mod report;
pub mod schedule;
pub mod settings;
pub mod text;
pub mod tokenizer;
pub mod train;

/// Prints log messages to standard error: those of level info, or as the variable `RUST_LOG` says.
pub fn init_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .without_time()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// Signals that come as fast after the first are taken for the same one: `timeout` and schedulers send
/// it to the program and to its process group.
const SAME_SIGNAL: Duration = Duration::from_millis(300);

/// Set by the first SIGINT or SIGTERM; a later one that is not the same ends the program at once.
///
/// # Errors
/// When there is a handler of these signals already.
pub fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let mut first = None;
    ctrlc::set_handler(move || match first {
        None => {
            first = Some(Instant::now());
            flag.store(true, Ordering::Relaxed);
            eprintln!("\nstopping after this step; once more to quit at once");
        }
        Some(first) if first.elapsed() < SAME_SIGNAL => {}
        // SAFETY: it does not return. What runs at a usual exit would race with the other threads.
        Some(_) => unsafe { libc::_exit(130) },
    })
    .context("cannot listen for signals")?;
    Ok(stop)
}
