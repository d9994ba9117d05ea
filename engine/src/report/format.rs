//! Numbers as a person reads them.

/// A number with three significant digits, plain between 0.001 and 100,000, in powers of ten beyond.
pub fn significant(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let magnitude = value.abs();
    if magnitude == 0.0 {
        return "0".into();
    }
    if !(1e-3..99_950.0).contains(&magnitude) {
        return format!("{value:.2e}");
    }
    // Rounding may carry into the next power of ten: 9.996 has two decimals, not three.
    let exponent = format!("{magnitude:.2e}").split_once('e').and_then(|(_, e)| e.parse::<i32>().ok()).unwrap_or(0);
    let decimals = (2 - exponent).max(0) as usize;
    format!("{value:.decimals$}")
}

/// A count with a decimal prefix: 1.23 M.
pub fn count(value: f64) -> String {
    const PREFIXES: [(f64, &str); 5] = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match PREFIXES.iter().find(|(unit, _)| value.abs() >= 0.9995 * unit) {
        Some((unit, prefix)) => format!("{} {prefix}", significant(value / unit)),
        None => significant(value),
    }
}

/// A change in percent with its sign: −12.3 %; one decimal below a hundred, none above.
pub fn change(before: f64, after: f64) -> String {
    let percent = 100.0 * (after / before - 1.0);
    if !percent.is_finite() {
        return "–".into();
    }
    let digits = if percent.abs() < 99.95 { format!("{:.1}", percent.abs()) } else { format!("{:.0}", percent.abs()) };
    let sign = match percent {
        _ if digits == "0.0" => "±",
        p if p < 0.0 => "−",
        _ => "+",
    };
    format!("{sign}{digits} %")
}

/// A fraction in percent: 91.2 %.
pub fn percent(fraction: f64) -> String {
    format!("{:.1} %", 100.0 * fraction)
}

/// A duration: 950 µs, 4.2 ms, 12.3 s, 3 min 20 s, 2 h 5 min.
pub fn seconds(value: f64) -> String {
    match value {
        v if !v.is_finite() => v.to_string(),
        v if v < 1e-3 => format!("{} µs", significant(1e6 * v)),
        v if v < 1.0 => format!("{} ms", significant(1e3 * v)),
        v if v < 60.0 => format!("{} s", significant(v)),
        v if v < 3600.0 => format!("{:.0} min {:.0} s", (v / 60.0).floor(), (v % 60.0).floor()),
        v => format!("{:.0} h {:.0} min", (v / 3600.0).floor(), (v % 3600.0 / 60.0).floor()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_whatever_the_size() {
        let rows = [
            (0.0, "0"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (-123.456, "-123"),
            (0.001_234, "0.00123"),
            (0.000_123_4, "1.23e-4"),
            (12_345.0, "12345"),
            (123_456.0, "1.23e5"),
            (f64::NAN, "NaN"),
        ];
        for (value, want) in rows {
            assert_eq!(significant(value), want);
        }
    }

    #[test]
    fn counts_and_changes() {
        assert_eq!([count(674_834_720.0), count(999.7), count(12.0)], ["675 M", "1.00 k", "12.0"]);
        assert_eq!([change(4.0, 3.0), change(4.0, 4.0), change(1.0, 4.5)], ["−25.0 %", "±0.0 %", "+350 %"]);
        assert_eq!(change(0.0, 0.0), "–");
        assert_eq!(percent(0.9125), "91.2 %");
    }

    #[test]
    fn durations() {
        let values = [2.5e-5, 0.0042, 12.34, 200.0, 7500.0];
        assert_eq!(values.map(seconds), ["25.0 µs", "4.20 ms", "12.3 s", "3 min 20 s", "2 h 5 min"]);
    }
}
