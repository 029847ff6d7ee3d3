//! Where the time of a training step goes.

use std::cell::RefCell;
use std::time::Instant;

use candle_core::{Device, Result};

/// A direction of the step, and the operation in it.
type Name = (&'static str, &'static str);

/// A point in time: on a GPU when it gets there, not when it was told to.
enum Moment {
    Host(Instant),
    #[cfg(feature = "cuda")]
    Gpu(crate::cuda::device::Event),
}

impl Moment {
    fn now(device: &Device) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => crate::cuda::device::Event::record(device).map(Self::Gpu),
            _ => Ok(Self::Host(Instant::now())),
        }
    }

    fn seconds_to(&self, later: &Self) -> Result<f64> {
        match (self, later) {
            (Self::Host(start), Self::Host(end)) => Ok((*end - *start).as_secs_f64()),
            #[cfg(feature = "cuda")]
            (Self::Gpu(start), Self::Gpu(end)) => start.seconds_to(end),
            #[cfg(feature = "cuda")]
            _ => candle_core::bail!("a profile is of one device"),
        }
    }
}

struct Marks {
    device: Device,
    start: Moment,
    marks: Vec<(Name, Result<Moment>)>,
}

thread_local! {
    static MARKS: RefCell<Option<Marks>> = const { RefCell::new(None) };
}

/// Attributes time to the operations that a [`Tape`](crate::ops::Tape) records on this thread, from
/// [`Profile::start`] to [`Profile::finish`].
pub struct Profile(());

/// The share of one operation.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// `forward`, `backward` or what [`Profile::mark`] was told.
    pub pass: &'static str,
    /// The operation.
    pub name: &'static str,
    /// Seconds in all.
    pub seconds: f64,
    /// How often it ran.
    pub calls: usize,
}

impl Profile {
    /// Begins, for work on `device`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn start(device: &Device) -> Result<Self> {
        let start = Moment::now(device)?;
        MARKS.set(Some(Marks {
            device: device.clone(),
            start,
            marks: Vec::new(),
        }));
        Ok(Self(()))
    }

    /// Whether one began on this thread and did not finish: work that a [`Graph`](crate::Graph) replays has
    /// no parts.
    pub fn is_running() -> bool {
        MARKS.with_borrow(Option::is_some)
    }

    /// Says that what ran since the last mark was `name` of `pass`.
    pub fn mark(&self, pass: &'static str, name: &'static str) {
        mark(pass, name);
    }

    /// The parts, the longest first. Waits for the device.
    ///
    /// # Errors
    /// When the device failed.
    pub fn finish(self) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        let Some(marks) = MARKS.take() else {
            return Ok(parts);
        };
        let mut before = marks.start;
        for ((pass, name), moment) in marks.marks {
            let moment = moment?;
            let seconds = before.seconds_to(&moment)?;
            before = moment;
            let is_it = |part: &&mut Part| (part.pass, part.name) == (pass, name);
            match parts.iter_mut().find(is_it) {
                Some(part) => {
                    part.seconds += seconds;
                    part.calls += 1;
                }
                None => parts.push(Part {
                    pass,
                    name,
                    seconds,
                    calls: 1,
                }),
            }
        }
        parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(parts)
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        MARKS.take();
    }
}

/// See [`Profile::mark`]; does nothing without a profile.
pub(crate) fn mark(pass: &'static str, name: &'static str) {
    MARKS.with_borrow_mut(|marks| {
        if let Some(marks) = marks {
            let moment = Moment::now(&marks.device);
            marks.marks.push(((pass, name), moment));
        }
    });
}
