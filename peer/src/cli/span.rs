//! A length of time as people type it: `250ms`, `30s`, `5m`, `1h30m`.

use std::{fmt, str::FromStr, time::Duration};

/// A length of time of more than nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

/// A text is not a length of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("write a time as in 250ms, 30s, 5m or 1h30m")]
pub(super) struct InvalidSpan;

impl FromStr for Span {
    type Err = InvalidSpan;

    fn from_str(text: &str) -> Result<Self, InvalidSpan> {
        let mut rest = text;
        let mut total = Duration::ZERO;
        while !rest.is_empty() {
            let digits = rest.find(|char: char| !char.is_ascii_digit()).ok_or(InvalidSpan)?;
            let (number, behind) = rest.split_at(digits);
            let unit = behind.find(|char: char| char.is_ascii_digit()).unwrap_or(behind.len());
            let (unit, behind) = behind.split_at(unit);
            let number: u64 = number.parse().map_err(|_| InvalidSpan)?;
            let part = match unit {
                "ms" => Some(Duration::from_millis(number)),
                "s" => Some(Duration::from_secs(number)),
                "m" | "min" => number.checked_mul(60).map(Duration::from_secs),
                "h" => number.checked_mul(3600).map(Duration::from_secs),
                "d" => number.checked_mul(86_400).map(Duration::from_secs),
                _ => None,
            };
            total = part.and_then(|part| total.checked_add(part)).ok_or(InvalidSpan)?;
            rest = behind;
        }
        if total.is_zero() { Err(InvalidSpan) } else { Ok(Self(total)) }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        if !millis.is_multiple_of(1000) {
            write!(f, "{millis}ms")
        } else if self.0.as_secs().is_multiple_of(60) {
            write!(f, "{}m", self.0.as_secs() / 60)
        } else {
            write!(f, "{}s", self.0.as_secs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up() {
        let seconds = |text: &str| text.parse::<Span>().map(|span| span.0.as_secs_f64());
        assert_eq!(seconds("250ms"), Ok(0.25));
        assert_eq!(seconds("1h30m"), Ok(5400.0));
        assert_eq!(seconds("2d"), Ok(172_800.0));
    }

    #[test]
    fn nothing_a_bare_number_and_too_much_are_refused() {
        for text in ["", "30", "0s", "s", "-1s", "1y", "99999999999999999999s", "18446744073709551615h"] {
            assert_eq!(text.parse::<Span>(), Err(InvalidSpan), "{text}");
        }
    }
}
