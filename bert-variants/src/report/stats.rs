//! The statistics of the report.

use serde::Serialize;

/// Mean and spread over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stat {
    /// Mean; NaN (`null` in JSON) where a run diverged.
    pub mean: f64,
    /// Sample standard deviation (divisor n - 1), absent for one value.
    pub sd: Option<f64>,
    /// How many values.
    pub n: usize,
}

impl Stat {
    /// `None` where there are no values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let sd = (n > 1).then(|| (squares / (n - 1) as f64).sqrt());
        Some(Self { mean, sd, n })
    }

    /// Two standard errors of the mean, absent for one value.
    pub fn two_standard_errors(&self) -> Option<f64> {
        self.sd.map(|sd| 2.0 * sd / (self.n as f64).sqrt())
    }
}

/// Quantile by linear interpolation between order statistics, as NumPy's default.
///
/// `sorted` is not empty.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

/// Values above three times the median of up to [`SPIKE_WINDOW`] values before them; the first
/// [`SPIKE_WARMUP`] values have too few before them to be judged.
pub fn count_spikes(values: &[f64]) -> usize {
    (SPIKE_WARMUP..values.len())
        .filter(|&i| {
            let mut window = values[i.saturating_sub(SPIKE_WINDOW)..i].to_vec();
            window.sort_by(f64::total_cmp);
            values[i] > 3.0 * quantile(&window, 0.5)
        })
        .count()
}

/// Values a spike is judged by.
pub const SPIKE_WINDOW: usize = 50;
/// Values before the first that may be called a spike.
pub const SPIKE_WARMUP: usize = 10;

/// Exponential moving average without the bias to its start, as TensorBoard smooths.
///
/// `weight` in `[0, 1)` is that of the past.
pub fn smooth(points: &[(f64, f64)], weight: f64) -> Vec<(f64, f64)> {
    let (mut average, mut total) = (0.0, 0.0);
    points
        .iter()
        .map(|&(x, y)| {
            average = weight * average + (1.0 - weight) * y;
            total = weight * total + (1.0 - weight);
            (x, average / total)
        })
        .collect()
}

/// One point of a mean over seeds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MeanPoint {
    /// Where.
    pub x: f64,
    /// Over the curves that cover `x`.
    pub y: Stat,
}

/// Mean over curves, at every x that any of them has; a curve counts between its first and
/// last point, interpolated linearly.
pub fn mean_curve(curves: &[Vec<(f64, f64)>]) -> Vec<MeanPoint> {
    let mut grid: Vec<f64> = curves.iter().flatten().map(|p| p.0).collect();
    grid.sort_by(f64::total_cmp);
    grid.dedup();
    let mut values = vec![Vec::new(); grid.len()];
    for curve in curves {
        let mut next = 0;
        for (x, values) in grid.iter().zip(&mut values) {
            while next < curve.len() && curve[next].0 < *x {
                next += 1;
            }
            match curve.get(next) {
                Some(&(at, y)) if at == *x => values.push(y),
                Some(&after) if next > 0 => {
                    values.push(interpolate(curve[next - 1], after, *x));
                }
                _ => {}
            }
        }
    }
    let points = grid.iter().zip(&values);
    points
        .filter_map(|(x, values)| {
            Some(MeanPoint {
                x: *x,
                y: Stat::of(values)?,
            })
        })
        .collect()
}

/// The line through two points, at `x`.
pub fn interpolate(before: (f64, f64), after: (f64, f64), x: f64) -> f64 {
    before.1 + (after.1 - before.1) * (x - before.0) / (after.0 - before.0)
}

/// Losses whose first crossing the report times, falling.
///
/// The lowest is what the best variant reached with every seed, then what every run reached
/// (both rounded up to 0.001), then up to three round values above.
pub fn thresholds(initial: f64, every_run: f64, best_variant: f64) -> Vec<f64> {
    let up = |loss: f64| (loss * 1000.0).ceil() / 1000.0;
    let mut losses = vec![up(best_variant), up(every_run)];
    // Close to the initial loss every run is as fast as any other.
    let top = every_run + 0.75 * (initial - every_run);
    let round = [1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01].map(|unit: f64| {
        let first = (up(every_run) / unit).floor() as u64 + 1;
        let values = (first..)
            .map(move |i| i as f64 * unit)
            .take_while(|loss| *loss <= top);
        values.take(3).collect::<Vec<_>>()
    });
    losses.extend(
        round
            .into_iter()
            .find(|values| values.len() == 3)
            .unwrap_or_default(),
    );
    losses.sort_by(|a, b| b.total_cmp(a));
    losses.dedup_by(|a, b| (*a - *b).abs() < 1e-9);
    losses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_sample_standard_deviation() {
        let stat = Stat::of(&[2.0, 4.0, 9.0]).unwrap();
        assert_eq!((stat.mean, stat.n), (5.0, 3));
        assert!((stat.sd.unwrap() - 13f64.sqrt()).abs() < 1e-12);
        assert_eq!(
            Stat::of(&[3.0]),
            Some(Stat {
                mean: 3.0,
                sd: None,
                n: 1
            })
        );
        assert_eq!(Stat::of(&[]), None);
    }

    #[test]
    fn quantiles_interpolate() {
        let sorted = [1.0, 2.0, 3.0, 10.0];
        assert_eq!(quantile(&sorted, 0.0), 1.0);
        assert_eq!(quantile(&sorted, 0.5), 2.5);
        assert!((quantile(&sorted, 0.9) - 7.9).abs() < 1e-12);
        assert_eq!(quantile(&sorted, 1.0), 10.0);
    }

    #[test]
    fn spikes_are_judged_by_what_came_before() {
        let mut norms = vec![1.0; 60];
        norms[5] = 10.0; // too early to judge
        norms[30] = 3.5;
        norms[40] = 3.0; // not above
        assert_eq!(count_spikes(&norms), 1);
        // A lasting rise ends to be a spike once it fills half the window.
        let step: Vec<f64> = (0..200).map(|i| if i < 100 { 1.0 } else { 4.0 }).collect();
        assert_eq!(count_spikes(&step), 25);
    }

    #[test]
    fn smoothing_starts_unbiased() {
        let smoothed = smooth(&[(0.0, 8.0), (1.0, 2.0)], 0.5);
        assert_eq!(smoothed, [(0.0, 8.0), (1.0, 4.0)]);
    }

    #[test]
    fn mean_curve_interpolates_inside_and_never_extends() {
        let curve = mean_curve(&[vec![(0.0, 0.0), (2.0, 4.0)], vec![(0.0, 2.0), (1.0, 6.0)]]);
        let means: Vec<_> = curve.iter().map(|p| (p.x, p.y.mean, p.y.n)).collect();
        assert_eq!(means, [(0.0, 1.0, 2), (1.0, 4.0, 2), (2.0, 4.0, 1)]);
    }

    #[test]
    fn thresholds_follow_the_data() {
        assert_eq!(thresholds(10.0, 2.4123, 2.2), [5.0, 4.0, 3.0, 2.413, 2.2]);
        assert_eq!(thresholds(2.5, 2.4, 2.4).last(), Some(&2.4));
        assert_eq!(thresholds(2.4, 2.4, 2.4), [2.4]);
    }
}
