//! The official metrics of GLUE (Wang et al. 2018, <https://arxiv.org/abs/1804.07461>, table 1).

use serde::{Deserialize, Serialize};

use super::data::Label;

/// How predictions are judged; 1 is best in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Share of right classes.
    Accuracy,
    /// Harmonic mean of precision and recall of class 1.
    F1,
    /// Matthews' correlation of classes, for any number of them.
    Matthews,
    /// Pearson's correlation of values.
    Pearson,
    /// Spearman's correlation of ranks.
    Spearman,
}

impl Metric {
    /// As in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::F1 => "f1",
            Self::Matthews => "matthews",
            Self::Pearson => "pearson",
            Self::Spearman => "spearman",
        }
    }

    /// Of predictions and truth in the same order; 0 where a correlation is not defined because
    /// all predictions are equal, as scikit-learn says of Matthews'.
    pub fn of(self, predicted: &[Label], truth: &[Label]) -> f64 {
        let values = |labels: &[Label]| labels.iter().map(Label::value).collect::<Vec<f64>>();
        match self {
            Self::Accuracy => {
                let right = predicted.iter().zip(truth).filter(|(a, b)| a == b).count();
                right as f64 / truth.len() as f64
            }
            Self::F1 => f1(&values(predicted), &values(truth)),
            Self::Matthews => matthews(&values(predicted), &values(truth)),
            Self::Pearson => pearson(&values(predicted), &values(truth)),
            Self::Spearman => pearson(&ranks(&values(predicted)), &ranks(&values(truth))),
        }
    }
}

fn f1(predicted: &[f64], truth: &[f64]) -> f64 {
    let count = |wanted: (bool, bool)| {
        let pairs = predicted.iter().zip(truth);
        pairs
            .filter(|(p, t)| (**p == 1.0, **t == 1.0) == wanted)
            .count() as f64
    };
    let (hits, wrong, missed) = (
        count((true, true)),
        count((true, false)),
        count((false, true)),
    );
    if hits == 0.0 {
        return 0.0;
    }
    2.0 * hits / (2.0 * hits + wrong + missed)
}

/// Gorodkin's form for several classes: the correlation of their indicators.
fn matthews(predicted: &[f64], truth: &[f64]) -> f64 {
    let classes = predicted
        .iter()
        .chain(truth)
        .fold(0.0, |a: f64, b| a.max(*b)) as usize
        + 1;
    let total = truth.len() as f64;
    let count = |labels: &[f64], class: usize| {
        labels
            .iter()
            .filter(|label| **label == class as f64)
            .count() as f64
    };
    let right = predicted.iter().zip(truth).filter(|(p, t)| p == t).count() as f64;
    let (mut both, mut squares, mut true_squares) = (0.0, 0.0, 0.0);
    for class in 0..classes {
        let (p, t) = (count(predicted, class), count(truth, class));
        both += p * t;
        squares += p * p;
        true_squares += t * t;
    }
    let spread = ((total * total - squares) * (total * total - true_squares)).sqrt();
    if spread == 0.0 {
        0.0
    } else {
        (right * total - both) / spread
    }
}

fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut both, mut square_a, mut square_b) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let (a, b) = (a - mean_a, b - mean_b);
        both += a * b;
        square_a += a * a;
        square_b += b * b;
    }
    let spread = (square_a * square_b).sqrt();
    if spread == 0.0 { 0.0 } else { both / spread }
}

/// Ranks from 1; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut done = 0;
    for equal in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = done as f64 + (equal.len() + 1) as f64 / 2.0;
        equal.iter().for_each(|&at| ranks[at] = rank);
        done += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(metric: Metric, predicted: &[f32], truth: &[f32], expected: f64) {
        let labels = |values: &[f32]| -> Vec<Label> {
            values.iter().map(|value| Label::Value(*value)).collect()
        };
        let found = metric.of(&labels(predicted), &labels(truth));
        assert!(
            (found - expected).abs() < 1e-6,
            "{metric:?}: {found}, expected {expected}"
        );
    }

    /// Expected values are those of scikit-learn 1.9 and SciPy 1.17.
    #[test]
    fn metrics_equal_those_of_scikit_learn_and_scipy() {
        let (predicted, truth) = (
            [1.0, 0.0, 1.0, 1.0, 0.0, 1.0],
            [1.0, 0.0, 0.0, 1.0, 1.0, 1.0],
        );
        close(Metric::Accuracy, &predicted, &truth, 4.0 / 6.0);
        close(Metric::F1, &predicted, &truth, 0.75);
        close(Metric::Matthews, &predicted, &truth, 0.25);
        close(
            Metric::Matthews,
            &[0.0, 1.0, 2.0, 2.0],
            &[0.0, 2.0, 2.0, 1.0],
            0.2,
        );
        close(Metric::Matthews, &[1.0, 1.0], &[0.0, 1.0], 0.0);
        close(Metric::F1, &[0.0, 0.0], &[0.0, 1.0], 0.0);
        let (a, b) = ([1.0, 2.0, 3.0, 4.5, 2.0], [1.5, 1.0, 3.5, 9.0, 2.0]);
        close(Metric::Pearson, &a, &b, 0.9254587);
        close(Metric::Spearman, &a, &b, 0.8207827);
        close(Metric::Spearman, &[1.0, 1.0], &[1.0, 2.0], 0.0);
    }
}
