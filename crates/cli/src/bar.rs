//! Parts of a progress line: a bar, a curve, and fields that are dropped, never cut, where the line is narrow.

use unicode_width::UnicodeWidthStr as _;

/// Between two fields of a line.
const GAP: &str = "  ";

/// The fields that fit into `columns`, in order, with the ones after the first that does not fit left out.
pub fn fitted<'a>(fields: impl IntoIterator<Item = &'a str>, columns: usize) -> String {
    let mut line = String::new();
    for field in fields.into_iter().filter(|field| !field.is_empty()) {
        let gap = if line.is_empty() { "" } else { GAP };
        if line.width() + gap.len() + field.width() > columns {
            break;
        }
        line += gap;
        line += field;
    }
    line
}

/// A bar and its percentage: `██████▌       42 %`; without the bar where the line is narrow.
pub fn bar(share: f64, columns: usize) -> String {
    let share = share.clamp(0.0, 1.0);
    let width = match columns {
        0..60 => 0,
        60..100 => 12,
        _ => 24,
    };
    // Not 100 before the end.
    let percent = format!("{:>3} %", (share * 100.0).floor());
    if width == 0 {
        return percent.trim_start().to_string();
    }
    let eighths = (share * (width * 8) as f64).floor() as usize;
    let mut bar = "█".repeat(eighths / 8);
    if !eighths.is_multiple_of(8) {
        bar.push(['▏', '▎', '▍', '▌', '▋', '▊', '▉'][eighths % 8 - 1]);
    }
    bar += &"░".repeat(width - eighths.div_ceil(8));
    format!("{bar} {percent}")
}

/// A curve of values in `columns` characters, the lowest value at the bottom.
pub fn sparkline(values: &[f64], columns: usize) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let columns = columns.min(values.len());
    let mean = |column: usize| {
        let part = &values[column * values.len() / columns..(column + 1) * values.len() / columns];
        part.iter().sum::<f64>() / part.len() as f64
    };
    let means: Vec<f64> = (0..columns).map(mean).collect();
    let (low, high) = means.iter().fold((f64::MAX, f64::MIN), |(low, high), m| (low.min(*m), high.max(*m)));
    let level = |value: f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.5 };
        LEVELS[(share * 7.0).round() as usize]
    };
    means.into_iter().map(level).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_dropped_and_never_cut() {
        let fields = ["42 %", "ETA 3m12s", "", "step 131/312", "loss 4.3892"];
        assert_eq!(fitted(fields, 80), "42 %  ETA 3m12s  step 131/312  loss 4.3892");
        assert_eq!(fitted(fields, 41), "42 %  ETA 3m12s  step 131/312");
        assert_eq!(fitted(fields, 42), fitted(fields, 80));
        assert_eq!(fitted(fields, 28), "42 %  ETA 3m12s");
        assert_eq!(fitted(fields, 3), "");
        assert_eq!(fitted(["電車", "a"], 4), "電車");
    }

    #[test]
    fn bars_have_their_width_and_are_full_at_the_end_only() {
        assert_eq!(bar(0.0, 80), "░░░░░░░░░░░░   0 %");
        assert_eq!(bar(0.5, 80), "██████░░░░░░  50 %");
        assert_eq!(bar(0.999, 80), "███████████▉  99 %");
        assert_eq!(bar(1.0, 80), "████████████ 100 %");
        assert_eq!(bar(0.42, 40), "42 %");
        for share in 0..=1000 {
            assert_eq!(bar(f64::from(share) / 1000.0, 120).width(), 30);
        }
    }

    #[test]
    fn curves_fall_with_their_values() {
        assert_eq!(sparkline(&[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8), "█▇▆▅▄▃▂▁");
        assert_eq!(sparkline(&[4.0, 4.0, 2.0, 2.0, 0.0, 0.0], 3), "█▅▁");
        assert_eq!(sparkline(&[1.0, 1.0], 8), "▅▅");
        assert_eq!(sparkline(&[], 8), "");
        assert_eq!(sparkline(&[1.0; 1000], 10).chars().count(), 10);
    }
}
