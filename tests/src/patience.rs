//! How long tests wait: as long as they say, times a factor for machines that are slow.
//!
//! What a test waits for must come within a time that its author knows from a machine of the usual speed. An emulated one takes
//! several times as long, so whoever runs tests there says by [`VARIABLE`] how many. A service's timeout that must not pass
//! while a test does something takes [`timeout_s`], and the test waits for its end by [`patience`] too.

use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable with the factor, a positive number; without it the factor is 1.
pub const VARIABLE: &str = "AFFINITY_TEST_PATIENCE";

/// The longest time to wait for what usually comes within `usual`.
///
/// # Panics
/// When the variable holds something else than a positive number: a test that guesses would prove nothing.
pub fn patience(usual: Duration) -> Duration {
    usual.mul_f64(factor())
}

/// A service's timeout, as `timeoutSeconds` has it: a test does within it what it usually does within `usual` seconds.
///
/// # Panics
/// As [`patience`].
pub fn timeout_s(usual: u32) -> u32 {
    // A float that is too large becomes the largest integer.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "seconds, and not negative")]
    let seconds = (f64::from(usual) * factor()).ceil() as u32;
    seconds.max(1)
}

fn factor() -> f64 {
    static FACTOR: OnceLock<f64> = OnceLock::new();
    *FACTOR.get_or_init(|| match std::env::var(VARIABLE) {
        Ok(text) => parse(&text).unwrap_or_else(|| panic!("{VARIABLE}={text}: it must be a positive number")),
        Err(_) => 1.0,
    })
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
