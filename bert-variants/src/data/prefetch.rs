//! Items made ahead of time in a background thread.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};

/// An iterator whose items a background thread makes, a bounded number ahead.
///
/// Ends after the first error, which may be that the thread panicked. Dropping it ends the
/// thread.
pub struct Prefetch<T> {
    receiver: Receiver<Result<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Runs `items` in a thread of its own, at most `ahead` items ahead of the consumer.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new(
        items: impl Iterator<Item = Result<T>> + Send + 'static,
        ahead: usize,
    ) -> Result<Self> {
        let (sender, receiver) = sync_channel(ahead);
        let produce = move || {
            for item in items {
                let failed = item.is_err();
                // The consumer left when sending fails.
                if sender.send(item).is_err() || failed {
                    break;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("prefetch".into())
            .spawn(produce);
        Ok(Self {
            receiver,
            thread: Some(thread.context("cannot start the thread that prepares batches")?),
        })
    }
}

impl<T> Iterator for Prefetch<T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Ok(item) = self.receiver.recv() {
            return Some(item);
        }
        let panic = self.thread.take()?.join().err()?;
        let message = panic.downcast_ref::<String>().cloned().or_else(|| {
            panic
                .downcast_ref::<&str>()
                .map(|message| message.to_string())
        });
        Some(Err(anyhow!(
            "the thread that prepares batches panicked: {}",
            message.unwrap_or_default()
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn keeps_the_order_and_ends() {
        let items: Vec<u32> = Prefetch::new((0..50).map(Ok), 3)
            .unwrap()
            .collect::<Result<_>>()
            .unwrap();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn passes_on_an_error_and_stops() {
        let items = (0..).map(|i| {
            if i == 2 {
                Err(anyhow!("disk gone"))
            } else {
                Ok(i)
            }
        });
        let mut items = Prefetch::new(items, 2).unwrap();
        assert_eq!(items.next().unwrap().unwrap(), 0);
        assert_eq!(items.next().unwrap().unwrap(), 1);
        assert_eq!(items.next().unwrap().unwrap_err().to_string(), "disk gone");
        assert!(items.next().is_none());
    }

    #[test]
    fn reports_a_panic() {
        let items = (0..).map(|i| if i == 1 { panic!("lost at {i}") } else { Ok(i) });
        let mut items = Prefetch::new(items, 2).unwrap();
        assert!(items.next().unwrap().is_ok());
        let error = items.next().unwrap().unwrap_err().to_string();
        assert!(error.contains("panicked: lost at 1"), "{error}");
        assert!(items.next().is_none());
    }

    #[test]
    fn runs_no_further_ahead_than_asked_and_ends_when_dropped() {
        let made = Arc::new(AtomicUsize::new(0));
        let count = made.clone();
        let items = (0..).map(move |_| Ok(count.fetch_add(1, Ordering::SeqCst)));
        let mut items = Prefetch::new(items, 2).unwrap();
        items.next();
        thread::sleep(Duration::from_millis(50));
        // One taken, two queued, one waiting to be queued.
        assert!(made.load(Ordering::SeqCst) <= 4);
        drop(items);
        let weak = Arc::downgrade(&made);
        for _ in 0..100 {
            if weak.strong_count() == 1 {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the thread still runs");
    }
}
