//! Formats of counts, shares, sizes and times, shared by the whole workspace.

/// A whole number with its digits grouped in threes: `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A count with its noun: `1 row`, `2,000 rows`.
pub fn count(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", thousands(n), if n == 1 { "" } else { "s" })
}

/// A share of 1 as a percentage with one decimal. A share that is not exactly 0 or 1 is never shown as 0 or 100 %.
pub fn percent(share: f64) -> String {
    if share > 0.0 && share < 0.0005 {
        "<0.1 %".into()
    } else if share < 1.0 && share > 0.9995 {
        ">99.9 %".into()
    } else {
        format!("{:.1} %", share * 100.0)
    }
}

/// Bytes in decimal units, with at most three digits: `12 B`, `1.5 MB`, `163 MB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Seconds as `45s`, `3m20s`, `2h05m`; `?` if not finite.
pub fn duration(seconds: f64) -> String {
    let total = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { return "?".into() };
    match total {
        0..60 => format!("{total}s"),
        60..3600 => format!("{}m{:02}s", total / 60, total % 60),
        _ => format!("{}h{:02}m", total / 3600, total % 3600 / 60),
    }
}

/// A loss in nats with four decimals; `–` if there is none.
pub fn loss(nats: impl Into<Option<f64>>) -> String {
    nats.into().map_or("–".into(), |nats| short(nats, 4))
}

/// A perplexity; `inf` if it overflows (JSON has the largest number instead).
pub fn perplexity(value: f64) -> String {
    short(if value >= f64::MAX { f64::INFINITY } else { value }, 2)
}

/// A number with this many decimals; long numbers as a power of ten.
fn short(value: f64, decimals: usize) -> String {
    if value.is_finite() && value.abs() >= 1e6 {
        format!("{value:.2e}")
    } else {
        format!("{value:.decimals$}")
    }
}

/// A difference of losses, with its sign: `+0.0123`.
pub fn loss_difference(nats: f64) -> String {
    format!("{nats:+.4}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_losses_are_short() {
        assert_eq!(loss(12.3456789), "12.3457");
        assert_eq!(loss(f64::from(f32::MAX)), "3.40e38");
        assert_eq!(loss(f64::INFINITY), "inf");
        assert_eq!(perplexity(7.389), "7.39");
        assert_eq!(perplexity(700f64.exp()), "1.01e304");
        assert_eq!(perplexity(f64::MAX), "inf");
        assert_eq!(perplexity(f64::INFINITY), "inf");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(["0", "999", "1,000", "1,234,567"], [0, 999, 1000, 1_234_567].map(thousands)[..]);
        assert_eq!([count(1, "row"), count(2000, "row")], ["1 row", "2,000 rows"]);
        assert_eq!([bytes(12), bytes(1_500_000), bytes(999_999)], ["12 B", "1.5 MB", "1.0 MB"]);
        assert_eq!([duration(59.4), duration(200.0), duration(7500.0)], ["59s", "3m20s", "2h05m"]);
        assert_eq!([loss(2.0), loss(None), loss_difference(0.01234)], ["2.0000", "–", "+0.0123"]);
        assert_eq!(
            [0.0, 0.0001, 0.333, 0.9999, 1.0].map(percent),
            ["0.0 %", "<0.1 %", "33.3 %", ">99.9 %", "100.0 %"]
        );
    }
}
