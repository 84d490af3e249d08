//! Addresses as Kubernetes objects hold them.

use std::net::IpAddr;

/// Reads an address as kube-proxy does: numbers may begin with zeros, and are still decimal in IPv4. API servers up to 1.35
/// stored such addresses.
pub(crate) fn parse_address(text: &str) -> Option<IpAddr> {
    let zeros_off = |number: &str| match number.trim_start_matches('0') {
        "" if !number.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let groups = text.split(':').map(|group| group.split('.').map(zeros_off).collect::<Vec<_>>().join("."));
    text.parse().ok().or_else(|| groups.collect::<Vec<_>>().join(":").parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_may_begin_with_zeros() {
        for (text, address) in [
            ("10.96.0.10", "10.96.0.10"),
            ("010.096.000.010", "10.96.0.10"),
            ("192.0.02.08", "192.0.2.8"),
            ("0.0.0.00", "0.0.0.0"),
            ("fd00::00a", "fd00::a"),
            ("fd00:0000:00001::0", "fd00:0:1::"),
            ("::ffff:010.0.0.01", "::ffff:10.0.0.1"),
            ("::", "::"),
        ] {
            assert_eq!(parse_address(text).map(|address| address.to_string()).as_deref(), Some(address), "{text}");
        }
        for bad in
            ["", "10.96.0", "10.96.0.256", "010.96.0.0300", "0x10.0.0.1", "10..0.1", "fd00", "web", "10.0.0.1/8", " "]
        {
            assert_eq!(parse_address(bad), None, "{bad}");
        }
    }
}
