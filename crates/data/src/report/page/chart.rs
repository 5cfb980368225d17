//! Charts as inline SVG: lines over steps, histograms, intervals.
//!
//! The drawing is stretched to the width of the page, but its text is not: axes are separate drawings, with
//! positions as shares of the width. A chart is readable at any width, and nothing is computed in the browser.

use super::Html;
use super::html::short;
use crate::report::format::{count, thousands};
use std::collections::BTreeMap;

/// The maximal number of points drawn for a line; longer lines are averaged over runs of equal length.
const POINTS: usize = 600;
/// The width of a drawing in its own units.
const WIDTH: f64 = 1000.0;

/// A line of a [`LineChart`].
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Its points, in ascending order of x.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub stroke: Stroke,
}

/// The style of a line: no two styles differ in colour alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stroke {
    /// The line that matters: solid, in the accent colour.
    Main,
    /// Thin and pale: single steps behind their mean.
    Faint,
    /// Dashed, with a dot at each point: few values.
    Dots,
}

impl Stroke {
    fn class(self) -> &'static str {
        match self {
            Stroke::Main => "main",
            Stroke::Faint => "faint",
            Stroke::Dots => "dots",
        }
    }
}

/// Lines over a common axis.
#[derive(Clone, Debug, PartialEq)]
pub struct LineChart {
    /// Its title.
    pub title: String,
    /// The meaning of x: `step`.
    pub x: String,
    /// The unit of y: `nats per token`; may be empty.
    pub y: String,
    /// The lines.
    pub lines: Vec<Line>,
    /// True for one of several charts in a row: lower, without a legend.
    pub small: bool,
    /// True if y starts at 0.
    pub from_zero: bool,
}

impl LineChart {
    /// Its markup; empty if no line has a point.
    pub fn html(&self) -> Html {
        let finite = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
            points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
        };
        let lines: Vec<(&Line, Vec<(f64, f64)>)> =
            self.lines.iter().map(|line| (line, thinned(&finite(&line.points)))).collect();
        let points = || lines.iter().flat_map(|(_, points)| points);
        let mut html = Html::new();
        if points().next().is_none() {
            return html;
        }
        let (x0, x1) = range(points().map(|p| p.0));
        let (low, high) = range(points().map(|p| p.1));
        let low = if self.from_zero { low.min(0.0) } else { low };
        let y_ticks = covering(low, high, if self.small { 2.0 } else { 4.0 });
        let (y0, y1) = (y_ticks[0], y_ticks[y_ticks.len() - 1]);
        let height = if self.small { 90.0 } else { 220.0 };
        let x = |value: f64| if x1 > x0 { (value - x0) / (x1 - x0) * WIDTH } else { WIDTH / 2.0 };
        let y = |value: f64| height - (value - y0) / (y1 - y0) * height;

        open(&mut html, &self.title, self.small, &self.describe());
        if !self.small {
            html.raw("<ul class=\"legend\">");
            for line in &self.lines {
                html.raw("<li><svg width=\"28\" height=\"10\" aria-hidden=\"true\"><path d=\"M1 5H27\"");
                html.attr("class", line.stroke.class()).raw("/></svg> ").text(&line.name).raw("</li>");
            }
            html.raw("</ul>\n");
        }
        let x_ticks = match x1 > x0 {
            true => ticks(x0, x1, if self.small { 2.0 } else { 5.0 }),
            false => vec![x0],
        };
        let labels: Vec<(f64, String)> =
            x_ticks.iter().map(|tick| (x(*tick) / WIDTH, number(*tick, step_of(&x_ticks)))).collect();
        frame(&mut html, height, &y_ticks, &y, &self.y, |html| {
            for (line, points) in &lines {
                let path: Vec<String> =
                    points.iter().map(|p| format!("{} {}", short(x(p.0)), short(y(p.1)))).collect();
                html.raw("<path").attr("class", line.stroke.class());
                html.attr("d", &format!("M{}", path.join("L"))).raw("/>");
                // A line of length 0 with round ends is a dot that stretching does not deform.
                if line.stroke == Stroke::Dots || points.len() == 1 {
                    let dots: String = path.iter().map(|p| format!("M{p}h0")).collect();
                    html.raw("<path class=\"dot\"").attr("d", &dots).raw("/>");
                }
            }
        });
        x_axis(&mut html, &labels, &self.x);
        html.raw("</figure>\n");
        html
    }

    /// A description in words: where each line begins and ends.
    fn describe(&self) -> String {
        let at = |point: &(f64, f64)| format!("{} at {} {}", value(point.1), self.x, value(point.0));
        let ends = |line: &Line| {
            let (first, last) = (line.points.first()?, line.points.last()?);
            let name = if self.small { String::new() } else { format!("{}: ", line.name) };
            let text = match line.points.len() {
                1 => format!("{name}{}.", at(first)),
                _ => format!("{name}{}, {}.", at(first), at(last)),
            };
            let mut letters = text.chars();
            letters.next().map(|c| c.to_uppercase().chain(letters).collect::<String>())
        };
        self.lines
            .iter()
            .filter(|line| line.stroke != Stroke::Faint)
            .filter_map(ends)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

/// The number of values in each of several ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Its title.
    pub title: String,
    /// What is counted, in singular: `row`.
    pub noun: String,
    /// The unit of the ranges: `tokens`; `%`.
    pub unit: String,
    /// Lower bound, upper bound (excluded), number.
    pub bins: Vec<(f64, f64, u64)>,
    /// True for ranges of whole numbers: 10 to 20 is 10 to 19.
    pub whole: bool,
    /// The smallest and the largest value, if known.
    pub span: Option<(f64, f64)>,
}

impl Histogram {
    /// The histogram of whole numbers, given with their counts, in about 24 ranges with round bounds.
    pub fn of_counts(title: &str, noun: &str, unit: &str, counts: &BTreeMap<u64, u64>) -> Histogram {
        let (low, high) = match (counts.first_key_value(), counts.last_key_value()) {
            (Some((low, _)), Some((high, _))) => (*low, *high),
            _ => (0, 0),
        };
        let width = round_step((high + 1 - low) as f64 / 24.0).max(1.0) as u64;
        let first = low / width * width;
        let number = (high - first) / width + 1;
        let mut bins: Vec<(f64, f64, u64)> =
            (0..number).map(|i| ((first + i * width) as f64, (first + (i + 1) * width) as f64, 0)).collect();
        for (value, n) in counts {
            bins[((value - first) / width) as usize].2 += n;
        }
        Histogram {
            title: title.into(),
            noun: noun.into(),
            unit: unit.into(),
            bins,
            whole: true,
            span: Some((low as f64, high as f64)),
        }
    }

    /// The histogram of some numbers, in about 20 ranges with round bounds.
    pub fn of_values(title: &str, noun: &str, unit: &str, values: &[f64]) -> Histogram {
        let values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
        let (low, high) = match values.is_empty() {
            true => (0.0, 0.0),
            false => range(values.iter().copied()),
        };
        let width = round_step((high - low) / 20.0);
        let first = (low / width).floor();
        let number = ((high / width).floor() - first) as usize + 1;
        let mut bins: Vec<(f64, f64, u64)> =
            (0..number).map(|i| ((first + i as f64) * width, (first + i as f64 + 1.0) * width, 0)).collect();
        for value in &values {
            let at = ((value / width).floor() - first) as usize;
            bins[at.min(number - 1)].2 += 1;
        }
        Histogram {
            title: title.into(),
            noun: noun.into(),
            unit: unit.into(),
            bins,
            whole: false,
            span: Some((low, high)),
        }
    }

    /// Its markup; empty without values.
    pub fn html(&self) -> Html {
        let mut html = Html::new();
        let most = self.bins.iter().map(|bin| bin.2).max().unwrap_or(0);
        let (Some(first), Some(last)) = (self.bins.first(), self.bins.last()) else { return html };
        if most == 0 {
            return html;
        }
        let (x0, x1, height) = (first.0, last.1, 130.0);
        let mut y_ticks = covering(0.0, most as f64, 3.0);
        y_ticks.retain(|tick| tick.fract() == 0.0);
        let y1 = y_ticks[y_ticks.len() - 1];
        let x = |value: f64| (value - x0) / (x1 - x0) * WIDTH;
        let y = |value: f64| height - value / y1 * height;
        open(&mut html, &self.title, false, &self.describe());
        frame(&mut html, height, &y_ticks, &y, &format!("{}s", self.noun), |html| {
            for (from, to, n) in self.bins.iter().filter(|bin| bin.2 > 0) {
                // A range with one row in a million must still be visible.
                let tall = (height - y(*n as f64)).max(1.5);
                let gap = if self.bins.len() > 1 { 2.0 } else { 0.0 };
                let wide = if self.bins.len() > 1 { x(*to) - x(*from) - gap } else { 60.0 };
                let at = if self.bins.len() > 1 { x(*from) + gap / 2.0 } else { WIDTH / 2.0 - 30.0 };
                html.raw("<rect class=\"accent\"").attr_number("x", at).attr_number("y", height - tall);
                html.attr_number("width", wide).attr_number("height", tall).raw("><title>");
                html.text(&format!("{}: {}", self.name(*from, *to), count(*n, &self.noun)))
                    .raw("</title></rect>");
            }
        });
        let labels = match self.bins.len() {
            1 => vec![(0.5, self.name(first.0, first.1))],
            _ => {
                let x_ticks = ticks(x0, x1, 5.0);
                x_ticks.iter().map(|tick| (x(*tick) / WIDTH, number(*tick, step_of(&x_ticks)))).collect()
            }
        };
        x_axis(&mut html, &labels, if self.bins.len() == 1 { "" } else { &self.unit });
        html.raw("</figure>\n");
        html
    }

    /// The name of a range.
    fn name(&self, from: f64, to: f64) -> String {
        let unit = if self.unit.is_empty() { String::new() } else { format!(" {}", self.unit) };
        match (self.whole, to - from) {
            (true, width) if width <= 1.0 => format!("{}{unit}", value(from)),
            (true, _) => format!("{} to {}{unit}", value(from), value(to - 1.0)),
            (false, width) => format!("{} to {}{unit}", number(from, width), number(to, width)),
        }
    }

    /// A description in words.
    fn describe(&self) -> String {
        let total: u64 = self.bins.iter().map(|bin| bin.2).sum();
        let Some(mode) = self.bins.iter().max_by_key(|bin| bin.2) else { return String::new() };
        let filled = || self.bins.iter().filter(|bin| bin.2 > 0);
        let (Some(first), Some(last)) = (filled().next(), filled().next_back()) else { return String::new() };
        if first == last {
            return format!("{}: {}.", count(total, &self.noun), self.name(first.0, first.1));
        }
        let span = self.span.unwrap_or((first.0, last.1));
        format!(
            "{} between {} and {}{}; most ({}) have {}.",
            count(total, &self.noun),
            value(span.0),
            value(span.1),
            if self.unit == "%" { "\u{a0}%" } else { "" },
            thousands(mode.2),
            self.name(mode.0, mode.1)
        )
    }
}

/// A value with its interval.
#[derive(Clone, Debug, PartialEq)]
pub struct Interval {
    /// The name of the measured quantity.
    pub name: String,
    /// The lower bound, the value, the upper bound.
    pub bounds: (f64, f64, f64),
    /// The value as text: `−0.12 nats (−0.20 to −0.04)`.
    pub text: String,
}

/// Intervals below each other over one axis, with a line at 0 if 0 is in its range.
pub fn intervals(title: &str, unit: &str, rows: &[Interval]) -> Html {
    let mut html = Html::new();
    let bounds =
        || rows.iter().flat_map(|row| [row.bounds.0, row.bounds.1, row.bounds.2]).filter(|v| v.is_finite());
    if bounds().next().is_none() {
        return html;
    }
    let (low, high) = range(bounds());
    let x_ticks = covering(low, high, 4.0);
    let (x0, x1) = (x_ticks[0], x_ticks[x_ticks.len() - 1]);
    let at = |value: f64| format!("{}%", short(100.0 * (value.clamp(x0, x1) - x0) / (x1 - x0)));
    html.raw("<figure class=\"chart intervals\"><figcaption>").text(title).raw("</figcaption>\n<dl>");
    for row in rows {
        let (from, middle, to) = row.bounds;
        html.raw("<dt>").text(&row.name).raw("</dt><dd><span>").text(&row.text);
        html.raw("</span><svg height=\"18\" aria-hidden=\"true\">");
        if (x0..=x1).contains(&0.0) {
            html.raw("<line class=\"zero\" y1=\"0\" y2=\"18\"")
                .attr("x1", &at(0.0))
                .attr("x2", &at(0.0))
                .raw("/>");
        }
        html.raw("<line class=\"range\" y1=\"9\" y2=\"9\"")
            .attr("x1", &at(from))
            .attr("x2", &at(to))
            .raw("/>");
        html.raw("<circle r=\"4.5\" cy=\"9\"").attr("cx", &at(middle)).raw("/></svg></dd>\n");
    }
    html.raw("</dl>\n");
    let labels: Vec<(f64, String)> =
        x_ticks.iter().map(|tick| ((tick - x0) / (x1 - x0), number(*tick, step_of(&x_ticks)))).collect();
    x_axis(&mut html, &labels, unit);
    html.raw("</figure>\n");
    html
}

fn open(html: &mut Html, title: &str, small: bool, description: &str) {
    html.raw("<figure").attr("class", if small { "chart small" } else { "chart" }).raw("><figcaption>");
    html.element("b", title).raw(" ").classed("span", "soft", description).raw("</figcaption>\n");
}

/// The y axis with its labels, the lines of the grid, and the drawing itself.
fn frame(
    html: &mut Html,
    height: f64,
    y_ticks: &[f64],
    y: &dyn Fn(f64) -> f64,
    unit: &str,
    draw: impl FnOnce(&mut Html),
) {
    if !unit.is_empty() {
        html.classed("p", "unit", unit);
    }
    html.raw("<div class=\"plot\"><svg class=\"y\" aria-hidden=\"true\" width=\"52\"")
        .attr_number("height", height + 12.0);
    html.raw(">");
    let step = step_of(y_ticks);
    for tick in y_ticks {
        html.raw("<text x=\"46\" text-anchor=\"end\"").attr_number("y", y(*tick) + 10.0).raw(">");
        html.text(&number(*tick, step)).raw("</text>");
    }
    html.raw("</svg><svg class=\"drawing\" aria-hidden=\"true\" preserveAspectRatio=\"none\"");
    html.attr_number("height", height + 12.0)
        .attr("viewBox", &format!("0 -6 1000 {}", short(height + 12.0)))
        .raw(">");
    for tick in y_ticks {
        html.raw("<path class=\"grid\"").attr("d", &format!("M0 {}H1000", short(y(*tick)))).raw("/>");
    }
    draw(html);
    html.raw("</svg></div>\n");
}

/// The labels of the x axis, at shares of its width.
fn x_axis(html: &mut Html, labels: &[(f64, String)], unit: &str) {
    html.raw("<svg class=\"x\" aria-hidden=\"true\" height=\"18\">");
    for (at, label) in labels {
        let anchor = match *at {
            at if at < 0.03 => "start",
            at if at > 0.97 => "end",
            _ => "middle",
        };
        html.raw("<text y=\"13\"")
            .attr("x", &format!("{}%", short(at * 100.0)))
            .attr("text-anchor", anchor)
            .raw(">");
        html.text(label).raw("</text>");
    }
    html.raw("</svg>\n");
    if !unit.is_empty() {
        html.classed("p", "unit x-unit", unit);
    }
}

/// A line in at most [`POINTS`] points.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |run: &[(f64, f64)]| {
        let n = run.len() as f64;
        (run.iter().map(|p| p.0).sum::<f64>() / n, run.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(size).map(mean).collect()
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

/// The smallest of 1, 2, 5, 10 times a power of ten that is not below `rough`.
fn round_step(rough: f64) -> f64 {
    let rough = if rough.is_finite() && rough > 0.0 { rough.max(1e-12) } else { 1.0 };
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|step| *step >= rough * (1.0 - 1e-9))
        .unwrap_or(rough)
}

/// Round values inside `low..=high`, which divide it into about `parts`.
pub(super) fn ticks(low: f64, high: f64, parts: f64) -> Vec<f64> {
    let step = round_step((high - low) / parts);
    let (first, last) = ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor());
    (0..=(last - first).clamp(0.0, 40.0) as u32).map(|i| (first + f64::from(i)) * step).collect()
}

/// Round values from below `low` to above `high`.
pub(super) fn covering(low: f64, high: f64, parts: f64) -> Vec<f64> {
    // A flat line still needs a height.
    let high = if high - low > high.abs() * 1e-9 { high } else { low + (low.abs() * 0.1).max(1e-6) };
    let step = round_step((high - low) / parts);
    let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
    (0..=(last - first).clamp(1.0, 40.0) as u32).map(|i| (first + f64::from(i)) * step).collect()
}

fn step_of(ticks: &[f64]) -> f64 {
    match ticks {
        [a, b, ..] => b - a,
        [a] => round_step(a.abs() / 10.0),
        [] => 1.0,
    }
}

/// A value of an axis whose values are `step` apart: with as many decimals as needed, thousands as `20k`.
pub(super) fn number(value: f64, step: f64) -> String {
    let value = if value.abs() < step.abs() * 1e-6 { 0.0 } else { value };
    let magnitude = value.abs().max(step.abs());
    let minus = if value < 0.0 { "−" } else { "" };
    let scaled = |by: f64, unit: &str| format!("{minus}{}{unit}", short((value / by).abs()));
    match magnitude {
        _ if value == 0.0 => "0".into(),
        m if m >= 1e9 => scaled(1e9, "G"),
        m if m >= 1e6 => scaled(1e6, "M"),
        m if m >= 1e4 || step.abs() >= 1e3 => scaled(1e3, "k"),
        m if m < 1e-3 => format!("{minus}{:.0e}", value.abs()),
        _ => {
            let decimals = (-(step.abs().log10() + 1e-9).floor()).clamp(0.0, 6.0) as usize;
            let text = format!("{:.decimals$}", value.abs());
            let whole = decimals == 0 && value.abs() >= 1000.0;
            format!("{minus}{}", if whole { thousands(value.abs() as u64) } else { text })
        }
    }
}

/// A value in a sentence, with at most four significant digits.
fn value(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        let minus = if value < 0.0 { "−" } else { "" };
        return format!("{minus}{}", thousands(value.abs() as u64));
    }
    match value.abs() {
        v if v >= 1000.0 => thousands(value.round() as u64),
        v if v >= 1.0 => format!("{value:.2}"),
        v if v >= 1e-3 => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(covering(0.0, 17.0, 4.0), [0.0, 5.0, 10.0, 15.0, 20.0]);
        assert_eq!(covering(2.31, 2.39, 4.0).len(), 6);
        assert_eq!(ticks(1.0, 300.0, 5.0), [100.0, 200.0, 300.0]);
        assert_eq!(ticks(0.0, 1.0, 5.0).len(), 6);
        // The axis of a constant extends around it.
        for constant in [0.0, 3.5, -2.0, 1e-9, 1e12] {
            let axis = covering(constant, constant, 4.0);
            assert!(axis.len() > 1 && axis[0] <= constant && axis[axis.len() - 1] >= constant, "{axis:?}");
        }
        let shown =
            |values: &[f64]| -> Vec<String> { values.iter().map(|v| number(*v, step_of(values))).collect() };
        assert_eq!(shown(&[0.0, 0.05, 0.1]), ["0", "0.05", "0.10"]);
        assert_eq!(shown(&[0.0, 20_000.0, 40_000.0]), ["0", "20k", "40k"]);
        assert_eq!(shown(&[0.0, 1e6, 2e6]), ["0", "1M", "2M"]);
        assert_eq!(shown(&[-1.0, 0.0, 1.0]), ["−1", "0", "1"]);
        assert_eq!(shown(&[1e-4, 2e-4]), ["1e-4", "2e-4"]);
        assert_eq!(shown(&[0.0, 5000.0, 10_000.0]), ["0", "5k", "10k"]);
        assert_eq!(shown(&[1000.0, 1500.0]), ["1,000", "1,500"]);
    }

    #[test]
    fn every_value_is_counted_once() {
        let counts: BTreeMap<u64, u64> = (0..5000u64).map(|i| (i * i % 4099, 1 + i % 3)).collect();
        let total: u64 = counts.values().sum();
        let histogram = Histogram::of_counts("", "row", "tokens", &counts);
        assert_eq!(histogram.bins.iter().map(|bin| bin.2).sum::<u64>(), total);
        assert!((10..=30).contains(&histogram.bins.len()));
        for (from, to, n) in &histogram.bins {
            let inside = counts.iter().filter(|(v, _)| (*from..*to).contains(&(**v as f64)));
            assert_eq!(inside.map(|(_, n)| n).sum::<u64>(), *n);
        }
        let values: Vec<f64> = (0..777).map(|i| f64::from(i) * 0.013 - 3.0).collect();
        let histogram = Histogram::of_values("", "row", "nats", &values);
        assert_eq!(histogram.bins.iter().map(|bin| bin.2).sum::<u64>(), 777);
        for one in [Histogram::of_values("", "row", "", &[2.5; 4]), Histogram::of_values("", "row", "", &[])]
        {
            let _ = one.html();
        }
    }
}
