//! Learning-rate schedules.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// A straight line to the end (Devlin et al. 2018).
    Linear,
    /// Half a cosine (Loshchilov and Hutter 2016).
    Cosine,
    /// Warmup-stable-decay (Hu et al. 2024): constant, then a line over the last fifth.
    Wsd,
}

/// The share of all steps over which [`Decay::Wsd`] falls.
const WSD_DECAY: f64 = 0.2;

/// Learning rate by step: a line up to `peak`, then [`Decay`] down to `min_ratio * peak`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Steps until the peak.
    pub warmup_steps: u64,
    /// How it falls.
    pub decay: Decay,
    /// Last learning rate over the peak.
    pub min_ratio: f64,
}

impl Schedule {
    /// The learning rate of the step after `step` others.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let after_warmup = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let done = ((step - self.warmup_steps) as f64 / after_warmup as f64).min(1.0);
        let height = match self.decay {
            Decay::Linear => 1.0 - done,
            Decay::Cosine => 0.5 + 0.5 * (std::f64::consts::PI * done).cos(),
            Decay::Wsd => {
                let length = WSD_DECAY * self.total_steps as f64;
                (self.total_steps.saturating_sub(step) as f64 / length).min(1.0)
            }
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * height)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(decay: Decay) -> Schedule {
        Schedule {
            peak: 1.0,
            total_steps: 100,
            warmup_steps: 10,
            decay,
            min_ratio: 0.1,
        }
    }

    #[test]
    fn warmup_is_a_line_to_the_peak() {
        for decay in [Decay::Linear, Decay::Cosine, Decay::Wsd] {
            let schedule = schedule(decay);
            assert_eq!(schedule.lr(0), 0.1);
            assert_eq!(schedule.lr(4), 0.5);
            assert_eq!(schedule.lr(9), 1.0);
            assert_eq!(schedule.lr(10), 1.0);
        }
    }

    #[test]
    fn decays_end_at_the_minimum() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        for decay in [Decay::Linear, Decay::Cosine, Decay::Wsd] {
            close(schedule(decay).lr(100), 0.1);
            close(schedule(decay).lr(1000), 0.1);
        }
        close(schedule(Decay::Linear).lr(55), 0.55);
        close(schedule(Decay::Cosine).lr(55), 0.55);
        close(schedule(Decay::Wsd).lr(80), 1.0);
        close(schedule(Decay::Wsd).lr(90), 0.55);
    }

    #[test]
    fn no_warmup_starts_at_the_peak() {
        let schedule = Schedule {
            warmup_steps: 0,
            ..schedule(Decay::Linear)
        };
        assert_eq!(schedule.lr(0), 1.0);
    }
}
