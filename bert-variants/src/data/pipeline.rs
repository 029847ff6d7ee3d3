//! Reads, maps and consumes documents side by side, with bounded memory.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use anyhow::{Result, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use super::readers::Passage;
use super::sources::Sources;

/// Text mapped at once, in bytes for each core.
const BATCH_BYTES: usize = 256 << 10;
/// Batches read ahead.
const READ_AHEAD: usize = 2;

/// Reads `sources` in a thread, runs `map` on all cores, and hands passages and results to
/// `consume` in order.
///
/// # Errors
/// The first error of reader, `map` or `consume`.
pub(crate) fn run<T: Send>(
    sources: &Sources,
    what: &'static str,
    map: impl Fn(&str) -> Result<T> + Sync,
    mut consume: impl FnMut(&Passage, T) -> Result<()>,
) -> Result<()> {
    let progress = progress_bar(sources.progress_len(), what);
    let (sender, receiver) = sync_channel(READ_AHEAD);
    thread::scope(|scope| {
        let progress = &progress;
        // The reader owns the sender, so that the loop ends with it.
        let reader = scope.spawn(move || read(sources, progress, &sender));
        for batch in receiver {
            let results = batch.par_iter().map(|passage| map(&passage.text));
            let results = results.collect::<Result<Vec<_>>>()?;
            for (passage, result) in batch.iter().zip(results) {
                consume(passage, result)?;
            }
        }
        reader
            .join()
            .map_err(|_| anyhow!("the reader of {sources} panicked"))?
    })?;
    progress.finish_and_clear();
    Ok(())
}

/// Sends all passages in batches.
fn read(
    sources: &Sources,
    progress: &ProgressBar,
    sender: &SyncSender<Vec<Passage>>,
) -> Result<()> {
    let batch_bytes = BATCH_BYTES * rayon::current_num_threads();
    let mut batch = Vec::new();
    let mut bytes = 0;
    sources.read(progress, &mut |passage| {
        bytes += passage.text.len();
        batch.push(passage);
        if bytes >= batch_bytes {
            bytes = 0;
            sender.send(std::mem::take(&mut batch))?;
        }
        Ok(())
    })?;
    Ok(sender.send(batch)?)
}

/// Drawn on the terminal, and not at all without one.
fn progress_bar(length: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {elapsed} eta {eta}");
    let bar = ProgressBar::new(length).with_message(what);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
