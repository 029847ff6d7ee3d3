//! How much memory a computation needs.

use peak_alloc::PeakAlloc;

/// Measures the highest memory in use from its start on, beyond what was in use then.
///
/// Counts the heap, for which the program must have installed [`PeakAlloc`] as its global
/// allocator; otherwise it measures 0.
pub struct PeakMeter {
    start: usize,
}

impl PeakMeter {
    /// Starts measuring; one meter at a time.
    pub fn start() -> Self {
        PeakAlloc.reset_peak_usage();
        Self {
            start: PeakAlloc.current_usage(),
        }
    }

    /// Bytes.
    pub fn peak_bytes(&self) -> u64 {
        PeakAlloc.peak_usage().saturating_sub(self.start) as u64
    }
}
