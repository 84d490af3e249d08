//! How long tests wait: the time in the test, times a factor for slow machines.
//!
//! The time in a test is what its author knows from a machine of the usual speed. An emulated one takes several times as long,
//! so [`VARIABLE`] sets a factor there. A service's timeout that must not pass while a test does something takes [`timeout_s`],
//! and the test waits for its end with [`patience`] too.

use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable with the factor, a positive number; without it the factor is 1.
pub const VARIABLE: &str = "AFFINITY_TEST_PATIENCE";

/// The longest time to wait for something that usually takes at most `usual`.
///
/// # Panics
/// When the variable is not a positive number: a test that guesses would prove nothing.
pub fn patience(usual: Duration) -> Duration {
    usual.mul_f64(factor())
}

/// A service's timeout, for `timeoutSeconds`: within it, a test can do what usually takes `usual` seconds.
///
/// # Panics
/// As [`patience`].
pub fn timeout_s(usual: u32) -> u32 {
    whole(f64::from(usual) * factor()).max(1)
}

/// A number of things that usually take a known time: fewer on a slow machine.
///
/// # Panics
/// As [`patience`].
pub fn fewer(usual: u32) -> u32 {
    whole(f64::from(usual) / factor())
}

/// Rounded up. A float that is too large becomes the largest integer.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number, and not negative")]
fn whole(number: f64) -> u32 {
    number.ceil() as u32
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
