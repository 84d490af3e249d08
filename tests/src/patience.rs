//! How long tests wait: as long as they say, times a factor for machines that are slow.
//!
//! What a test waits for must come within a time that its author knows from a machine of the usual speed. An emulated one takes
//! several times as long, so whoever runs tests there says by [`VARIABLE`] how many. Times that are no patience, such as a
//! service's timeout, do not pass here.

use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable with the factor, a positive number; without it the factor is 1.
pub const VARIABLE: &str = "AFFINITY_TEST_PATIENCE";

/// The longest time to wait for what usually comes within `usual`.
///
/// # Panics
/// When the variable holds something else than a positive number: a test that guesses would prove nothing.
pub fn patience(usual: Duration) -> Duration {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    usual.mul_f64(*FACTOR.get_or_init(|| match std::env::var(VARIABLE) {
        Ok(text) => parse(&text).unwrap_or_else(|| panic!("{VARIABLE}={text}: it must be a positive number")),
        Err(_) => 1.0,
    }))
}

fn parse(text: &str) -> Option<f64> {
    text.parse().ok().filter(|factor: &f64| factor.is_finite() && *factor > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_is_a_positive_number() {
        assert_eq!(parse("6"), Some(6.0));
        assert_eq!(parse("1.5"), Some(1.5));
        for text in ["0", "-1", "", "many", "inf", "NaN"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
