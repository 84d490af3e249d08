//! Which kernel this is.

use rustix::system::uname;

/// The running kernel's release, such as `6.18.44-generic`.
pub(crate) fn release() -> String {
    uname().release().to_string_lossy().into_owned()
}

/// Major and minor version of a release such as `6.18.44-generic`.
pub(crate) fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_releases() {
        for (release, expected) in
            [("6.18.44-fc-v669", (6, 18)), ("5.10.0-28-amd64", (5, 10)), ("6.6-rc1", (6, 6)), ("garbage", (0, 0))]
        {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
