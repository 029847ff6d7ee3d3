//! The curves of the report, as SVG and PNG.

use std::io::Cursor;
use std::ops::Range;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::stats::{self, MeanPoint};
use super::summary::Group;
use super::tables::objective_name;
use crate::record::Run;

/// One picture: a curve for every variant of one objective.
pub(super) struct Chart {
    /// File name without its ending.
    pub stem: String,
    pub title: String,
    /// How to read the lines.
    pub legend: String,
    y_title: &'static str,
    kind: Kind,
    series: Vec<Series>,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    TrainLoss,
    EvalLoss,
    LearningRate,
    GradientNorm,
    LossByLength,
}

/// One variant's curve.
struct Series {
    label: String,
    /// Mean before smoothing.
    raw: Vec<(f64, f64)>,
    seeds: Vec<Vec<(f64, f64)>>,
    mean: Vec<MeanPoint>,
}

type Canvas<'a, DB> = DrawingArea<DB, Shift>;
type Drawn<DB> = Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// Pixels, twice those on a usual page: backends round to whole pixels.
const SIZE: (u32, u32) = (2000, 900);
/// Lines of more points than this are thinned; a picture is not wider.
const MAX_POINTS: usize = 1000;

/// Okabe and Ito's palette for all kinds of colour vision, without its yellow, which is too
/// light for lines on white.
const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];

/// The charts that the runs have data for.
pub(super) fn charts(groups: &[Group], smoothing: f64) -> Vec<Chart> {
    let mut charts = Vec::new();
    for groups in groups.chunk_by(|a, b| a.objective == b.objective) {
        for kind in [
            Kind::TrainLoss,
            Kind::EvalLoss,
            Kind::LearningRate,
            Kind::GradientNorm,
            Kind::LossByLength,
        ] {
            let chart = Chart::new(kind, groups, smoothing);
            if !chart.series.is_empty() {
                charts.push(chart);
            }
        }
    }
    charts
}

fn points(kind: Kind, run: &Run) -> Vec<(f64, f64)> {
    let train = |value: fn(&crate::record::TrainRecord) -> f64| {
        run.train.iter().map(move |r| (r.step as f64, value(r)))
    };
    let points: Vec<_> = match kind {
        Kind::TrainLoss => train(|r| r.loss).collect(),
        Kind::LearningRate => train(|r| r.lr).collect(),
        Kind::GradientNorm => train(|r| r.grad_norm).collect(),
        Kind::EvalLoss => run.eval.iter().map(|r| (r.step as f64, r.loss)).collect(),
        Kind::LossByLength => {
            let lengths = run.lengths.iter();
            lengths.map(|r| (r.seq_len as f64, r.loss)).collect()
        }
    };
    points.into_iter().filter(|(_, y)| y.is_finite()).collect()
}

fn line(mean: &[MeanPoint]) -> Vec<(f64, f64)> {
    mean.iter().map(|p| (p.x, p.y.mean)).collect()
}

/// Keeps the lowest and highest of each stretch, so that spikes stay.
fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points;
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let extremes = |chunk: &[(f64, f64)]| {
        let by = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let low = *chunk.iter().min_by(by).unwrap_or(&chunk[0]);
        let high = *chunk.iter().max_by(by).unwrap_or(&chunk[0]);
        if low.0 < high.0 {
            [low, high]
        } else {
            [high, low]
        }
    };
    points.chunks(stretch).flat_map(extremes).collect()
}

impl Chart {
    fn new(kind: Kind, groups: &[Group], smoothing: f64) -> Self {
        let name = objective_name(groups[0].objective);
        let smooth = match kind {
            Kind::TrainLoss | Kind::GradientNorm => Some(smoothing).filter(|s| *s > 0.0),
            Kind::EvalLoss | Kind::LearningRate | Kind::LossByLength => None,
        };
        let series = groups.iter().filter_map(|group| {
            let raw: Vec<_> = group.runs.iter().map(|run| points(kind, run)).collect();
            let seeds: Vec<_> = match smooth {
                Some(weight) => raw
                    .iter()
                    .map(|points| stats::smooth(points, weight))
                    .collect(),
                None => raw.clone(),
            };
            let mean = stats::mean_curve(&seeds);
            let raw = smooth.map_or(Vec::new(), |_| thin(line(&stats::mean_curve(&raw))));
            let many = seeds.len() > 1 && kind != Kind::LearningRate;
            let label = match group.runs.len() {
                1 => group.variant.to_string(),
                n => format!("{} ({n} seeds)", group.variant),
            };
            let seeds = if many {
                seeds.into_iter().map(thin).collect()
            } else {
                Vec::new()
            };
            (!mean.is_empty()).then_some(Series {
                label,
                raw,
                seeds,
                mean,
            })
        });
        let series: Vec<Series> = series.collect();
        let (stem, title, y_title) = match kind {
            Kind::TrainLoss => (
                "train_loss",
                "Training loss",
                "Loss (nats per predicted token)",
            ),
            Kind::EvalLoss => (
                "eval_loss",
                "Evaluation loss",
                "Loss (nats per predicted token)",
            ),
            Kind::LearningRate => ("learning_rate", "Learning rate", "Learning rate"),
            Kind::GradientNorm => ("gradient_norm", "Gradient norm", "Global L2 norm"),
            Kind::LossByLength => (
                "loss_by_length",
                "Held-out loss by input length",
                "Loss (nats per predicted token)",
            ),
        };
        let mut legend = Vec::new();
        if series.iter().any(|s| s.seeds.len() > 1) {
            legend.push("mean ± sd over seeds, thin lines: single seeds".to_string());
        }
        if let Some(weight) = smooth {
            legend.push(format!("smoothed (EMA {weight}), faint: raw"));
        }
        Self {
            stem: format!("{}_{stem}", name.to_lowercase()),
            title: format!("{name}: {}", title.to_lowercase()),
            legend: legend.join("; "),
            y_title,
            kind,
            series,
        }
    }

    /// As a stand-alone SVG document.
    pub fn svg(&self) -> Result<String> {
        register()?;
        let mut svg = String::new();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        self.draw(&area)
            .map_err(|error| anyhow!("cannot draw {}: {error}", self.stem))?;
        drop(area);
        Ok(svg)
    }

    /// As a PNG file.
    pub fn png(&self) -> Result<Vec<u8>> {
        register()?;
        let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
        let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
        self.draw(&area)
            .map_err(|error| anyhow!("cannot draw {}: {error}", self.stem))?;
        drop(area);
        let image = image::RgbImage::from_raw(SIZE.0, SIZE.1, pixels).context("picture size")?;
        let mut png = Cursor::new(Vec::new());
        image.write_to(&mut png, image::ImageOutputFormat::Png)?;
        Ok(png.into_inner())
    }

    fn draw<DB: DrawingBackend>(&self, area: &Canvas<DB>) -> Drawn<DB> {
        area.fill(&WHITE)?;
        let below = self.draw_heading(area)?;
        let (_, area) = area.split_vertically(below);
        let last = self.series.iter().flat_map(|s| s.mean.last()).map(|p| p.x);
        let last = last.fold(1.0, f64::max);
        match self.kind {
            // Variants differ by little next to the fall from the initial loss.
            Kind::TrainLoss | Kind::EvalLoss => {
                let panels = area.split_evenly((1, 2));
                self.draw_panel(&panels[0], 0.0..last, "Optimizer step")?;
                self.draw_panel(&panels[1], last / 2.0..last, "Optimizer step (second half)")?;
            }
            Kind::LossByLength => self.draw_panel(&area, 0.0..last, "Tokens of an input")?,
            Kind::LearningRate | Kind::GradientNorm => {
                self.draw_panel(&area, 0.0..last, "Optimizer step")?;
            }
        }
        area.present()
    }

    /// Title and legend above the plot, where no curve runs; returns where they end.
    fn draw_heading<DB: DrawingBackend>(
        &self,
        area: &Canvas<DB>,
    ) -> Result<i32, DrawingAreaErrorKind<DB::ErrorType>> {
        let title = ("sans-serif", 36).into_text_style(area);
        let grey = BLACK.mix(0.65);
        let note = ("sans-serif", 26).into_text_style(area).color(&grey);
        let label = ("sans-serif", 28).into_text_style(area);
        area.draw_text(&self.title, &title, (30, 20))?;
        let (width, _) = area.estimate_text_size(&self.title, &title)?;
        area.draw_text(&self.legend, &note, (30 + width as i32 + 40, 28))?;
        let (mut x, mut y) = (30, 78);
        for (i, series) in self.series.iter().enumerate() {
            let (width, _) = area.estimate_text_size(&series.label, &label)?;
            let width = 70 + width as i32 + 50;
            if x > 30 && x + width > SIZE.0 as i32 {
                (x, y) = (30, y + 42);
            }
            let color = PALETTE[i % PALETTE.len()].stroke_width(8);
            area.draw(&PathElement::new([(x, y + 10), (x + 56, y + 10)], color))?;
            area.draw_text(&series.label, &label, (x + 70, y))?;
            x += width;
        }
        Ok(y + 48)
    }

    fn draw_panel<DB: DrawingBackend>(
        &self,
        area: &Canvas<DB>,
        x: Range<f64>,
        x_title: &str,
    ) -> Drawn<DB> {
        let whole = x.start == 0.0;
        let y = self.y_range(&x);
        if self.is_log(&y) {
            let low = 10f64.powf((y.start.log10() * 2.0).floor() / 2.0);
            let y = low..y.end * 1.3;
            self.draw_axes(area, x, x_title, y.clone().log_scale(), &y, whole)
        } else {
            let margin = 0.04 * (y.end - y.start).max(1e-9 * y.end.abs()).max(1e-12);
            let zero = matches!(self.kind, Kind::LearningRate | Kind::GradientNorm);
            let low = if zero { 0.0 } else { y.start - margin };
            let y = low..y.end + margin;
            self.draw_axes(area, x, x_title, y.clone(), &y, whole)
        }
    }

    /// Spikes would press the rest of a linear axis flat.
    fn is_log(&self, y: &Range<f64>) -> bool {
        self.kind == Kind::GradientNorm && y.start > 0.0 && y.end / y.start > 20.0
    }

    /// The values to show inside `x`.
    fn y_range(&self, x: &Range<f64>) -> Range<f64> {
        let whole = x.start == 0.0;
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for series in &self.series {
            let mean = series.mean.iter().map(|p| (p.x, p.y.mean));
            let raw = series.raw.iter().copied().filter(|_| whole);
            let seeds = series.seeds.iter().flatten().copied();
            for (_, y) in mean.chain(raw).chain(seeds).filter(|p| p.0 >= x.start) {
                low = low.min(y);
                high = high.max(y);
            }
        }
        if low > high { 0.0..1.0 } else { low..high }
    }

    fn draw_axes<DB: DrawingBackend, Y>(
        &self,
        area: &Canvas<DB>,
        x: Range<f64>,
        x_title: &str,
        axis: Y,
        y: &Range<f64>,
        whole: bool,
    ) -> Drawn<DB>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64> + Ranged<ValueType = f64>,
    {
        let mut chart = ChartBuilder::on(area)
            .margin(16)
            .margin_right(40)
            .x_label_area_size(90)
            .y_label_area_size(130)
            .build_cartesian_2d(x.clone(), axis)?;
        let range = y.clone();
        let log = self.is_log(y);
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .axis_style(BLACK.mix(0.6).stroke_width(2))
            .x_labels(7)
            .y_labels(if log { 20 } else { 8 })
            .x_label_formatter(&|step| short(*step))
            .y_label_formatter(&|value| match log {
                true => log_tick(*value),
                false => tick(*value, &range),
            })
            .label_style(("sans-serif", 26))
            .axis_desc_style(("sans-serif", 28))
            .x_desc(x_title)
            .y_desc(self.y_title)
            .draw()?;
        let inside = |p: &(f64, f64)| p.0 >= x.start;
        let clamp = |value: f64| value.clamp(y.start, y.end);
        for (i, series) in self.series.iter().enumerate().rev() {
            let color = PALETTE[i % PALETTE.len()];
            if whole && !series.raw.is_empty() {
                let raw = series.raw.iter().copied();
                chart.draw_series(LineSeries::new(raw, color.mix(0.25).stroke_width(2)))?;
            }
            let every = series.mean.len().div_ceil(MAX_POINTS / 2);
            let kept = |i: &usize| i.is_multiple_of(every) || i + 1 == series.mean.len();
            let band = (0..series.mean.len()).filter(kept).map(|i| series.mean[i]);
            let band: Vec<_> = band
                .filter(|p| p.x >= x.start)
                .filter_map(|p| Some((p.x, p.y.mean, p.y.sd?)))
                .collect();
            if self.kind != Kind::LearningRate && !band.is_empty() {
                let upper = band.iter().map(|(x, mean, sd)| (*x, clamp(mean + sd)));
                let lower = band
                    .iter()
                    .rev()
                    .map(|(x, mean, sd)| (*x, clamp(mean - sd)));
                let outline: Vec<_> = upper.chain(lower).collect();
                chart.draw_series(std::iter::once(Polygon::new(outline, color.mix(0.18))))?;
            }
            for seed in &series.seeds {
                let seed = seed.iter().copied().filter(inside);
                chart.draw_series(LineSeries::new(seed, color.mix(0.45).stroke_width(1)))?;
            }
        }
        for (i, series) in self.series.iter().enumerate() {
            let color = PALETTE[i % PALETTE.len()];
            let mean: Vec<_> = thin(line(&series.mean))
                .into_iter()
                .filter(inside)
                .collect();
            // Schedules usually coincide: each later line is drawn thinner, so that all show.
            let width = match self.kind {
                Kind::LearningRate => 4 + 4 * (self.series.len() - 1 - i) as u32,
                _ => 4,
            };
            let measured = matches!(self.kind, Kind::EvalLoss | Kind::LossByLength);
            if mean.len() == 1 || (measured && mean.len() <= 40) {
                let dot = |p: &(f64, f64)| Circle::new(*p, 6, color.filled());
                chart.draw_series(mean.iter().map(dot))?;
            }
            chart.draw_series(LineSeries::new(mean, color.stroke_width(width)))?;
        }
        Ok(())
    }
}

/// Makes the embedded font known to both backends: a fresh machine has no other.
fn register() -> Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let font = include_bytes!("../../assets/DejaVuSans-subset.ttf");
    let done = *REGISTERED
        .get_or_init(|| register_font("sans-serif", FontStyle::Normal, font.as_slice()).is_ok());
    done.then_some(()).context("the embedded font is damaged")
}

/// `1.5k` for 1500.
fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        1e6.. => (value / 1e6, "M"),
        1e3.. => (value / 1e3, "k"),
        _ => (value, ""),
    };
    format!("{}{unit}", (value * 1e3).round() / 1e3)
}

/// Of a logarithmic axis, 1, 2 and 5 in each decade: more would run into each other.
fn log_tick(value: f64) -> String {
    let text = format!("{value:.0e}");
    match text.as_bytes()[0] {
        b'1' | b'2' | b'5' if value.abs() < 1e-3 => text,
        b'1' | b'2' | b'5' => format!("{}", (value * 1e3).round() / 1e3),
        _ => String::new(),
    }
}

/// With as many digits as tell one tick from the next.
fn tick(value: f64, range: &Range<f64>) -> String {
    let size = range.end.abs().max(range.start.abs());
    if value == 0.0 {
        return "0".to_string();
    }
    if size < 0.01 {
        let text = format!("{value:.2e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!(
            "{}e{exponent}",
            mantissa.trim_end_matches('0').trim_end_matches('.')
        );
    }
    let digits = (-((range.end - range.start) / 8.0).log10())
        .ceil()
        .clamp(0.0, 6.0) as usize;
    let digits = if value.abs() < 1.0 {
        digits.max(1)
    } else {
        digits
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_short_and_distinct() {
        assert_eq!(short(1500.0), "1.5k");
        assert_eq!(short(2e6), "2M");
        assert_eq!(tick(2.5, &(2.0..3.0)), "2.5");
        assert_eq!(tick(1.5e-4, &(0.0..3e-4)), "1.5e-4");
        assert_eq!([0.2, 4.0, 10.0].map(log_tick), ["0.2", "", "10"]);
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<_> = (0..10_000).map(|i| (f64::from(i), 1.0)).collect();
        points[4321].1 = 50.0;
        let thinned = thin(points);
        assert!(thinned.len() <= MAX_POINTS && thinned.contains(&(4321.0, 50.0)));
        assert!(thinned.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }
}
