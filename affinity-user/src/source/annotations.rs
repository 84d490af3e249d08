//! Annotations of a Service: settings for which the Kubernetes API has no field.
//!
//! | annotation | values | default |
//! |---|---|---|
//! | `affinity.dev/timer` | `connection`, `packet`, `absolute`, `alive` | `connection` |
//! | `affinity.dev/select` | `random`, `consistent`, `least` | `random` |
//! | `affinity.dev/client-prefix-v4` | 0 to 32 | 32 |
//! | `affinity.dev/client-prefix-v6` | 0 to 128 | 128 |
//! | `affinity.dev/group` | a DNS label; a group within the namespace | none |
//! | `affinity.dev/timeout` | a duration such as `90s`, `48h`, `7d`, `1d12h`, or `unlimited` | `timeoutSeconds` |

use std::collections::BTreeMap;

use affinity_common::abi::{SECOND_NS, Selection, TIMEOUT_UNLIMITED, Timer};

/// The prefix of all our annotations.
pub const PREFIX: &str = "affinity.dev/";

const KEYS: [&str; 6] = ["timer", "select", "client-prefix-v4", "client-prefix-v6", "group", "timeout"];

/// The annotations of a service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Annotations {
    /// What restarts a pin's timeout.
    pub timer: Timer,
    /// How a member is chosen.
    pub select: Selection,
    /// Prefix length of an IPv4 client key.
    pub prefix_v4: Option<u8>,
    /// Prefix length of an IPv6 client key.
    pub prefix_v6: Option<u8>,
    /// The group that shares pins, within the namespace.
    pub group: Option<String>,
    /// The timeout in nanoseconds, or [`TIMEOUT_UNLIMITED`]; `None`: the service's own field applies.
    pub timeout_ns: Option<u64>,
}

/// An annotation that was not understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unknown {
    /// The whole key.
    pub key: String,
    /// What is wrong and what would be correct.
    pub message: String,
}

/// Reads the annotations with [`PREFIX`]. Values that are not understood keep their default and are returned.
#[must_use]
pub fn parse(annotations: &BTreeMap<String, String>) -> (Annotations, Vec<Unknown>) {
    let mut parsed = Annotations::default();
    let mut unknown = Vec::new();
    for (key, value) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else { continue };
        if let Err(message) = parsed.set(name, value) {
            unknown.push(Unknown { key: key.clone(), message });
        }
    }
    (parsed, unknown)
}

impl Annotations {
    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            "timer" => self.timer = timer(value)?,
            "select" => self.select = selection(value)?,
            "client-prefix-v4" => self.prefix_v4 = Some(prefix(value, 32)?),
            "client-prefix-v6" => self.prefix_v6 = Some(prefix(value, 128)?),
            "group" => self.group = Some(label(value)?),
            "timeout" => self.timeout_ns = Some(timeout_ns(value)?),
            _ => {
                return Err(format!(
                    "unknown annotation; known annotations are {}{}",
                    PREFIX,
                    KEYS.join(&format!(", {PREFIX}"))
                ));
            }
        }
        Ok(())
    }
}

fn timer(value: &str) -> Result<Timer, String> {
    match value {
        "connection" => Ok(Timer::Connection),
        "packet" => Ok(Timer::Packet),
        "absolute" => Ok(Timer::Absolute),
        "alive" => Ok(Timer::Alive),
        _ => Err(format!("{value:?} is not one of connection, packet, absolute, alive; connection is used")),
    }
}

fn selection(value: &str) -> Result<Selection, String> {
    match value {
        "random" => Ok(Selection::Random),
        "consistent" => Ok(Selection::Consistent),
        "least" => Ok(Selection::Least),
        _ => Err(format!("{value:?} is not one of random, consistent, least; random is used")),
    }
}

fn prefix(value: &str, bits: u8) -> Result<u8, String> {
    let number = value.strip_prefix('/').unwrap_or(value).parse().ok().filter(|number| *number <= bits);
    number.ok_or_else(|| format!("{value:?} is not a prefix length from 0 to {bits}; {bits} is used"))
}

fn label(value: &str) -> Result<String, String> {
    if is_dns_label(value) {
        return Ok(value.to_owned());
    }
    Err(format!("{value:?} is not a DNS label (a-z, 0-9, '-', at most 63); the service is in no group"))
}

/// Whether a name is a DNS label (RFC 1123).
#[must_use]
pub fn is_dns_label(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(known) && !name.starts_with('-') && !name.ends_with('-')
}

fn timeout_ns(value: &str) -> Result<u64, String> {
    if value == "unlimited" {
        return Ok(TIMEOUT_UNLIMITED);
    }
    duration_s(value).and_then(|seconds| seconds.checked_mul(SECOND_NS)).filter(|ns| *ns > 0).ok_or_else(|| {
        format!("{value:?} is not a duration such as 90s, 30m, 48h, 7d, and not unlimited; timeoutSeconds is used")
    })
}

/// The seconds of a duration such as `90s` or `1d12h`; `None` if it is invalid or too long to count.
fn duration_s(value: &str) -> Option<u64> {
    let mut rest = value;
    let mut total_s = 0u64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        let unit_s = match rest.as_bytes()[digits] {
            b's' => 1,
            b'm' => 60,
            b'h' => 3_600,
            b'd' => 86_400,
            _ => return None,
        };
        total_s = total_s.checked_add(number.checked_mul(unit_s)?)?;
        rest = &rest[digits + 1..];
    }
    Some(total_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, value: &str) -> Result<Annotations, String> {
        let (annotations, unknown) = parse(&BTreeMap::from([(format!("{PREFIX}{name}"), value.to_owned())]));
        match unknown.into_iter().next() {
            Some(unknown) => Err(unknown.message),
            None => Ok(annotations),
        }
    }

    #[test]
    fn durations() {
        let cases = [
            ("90s", Some(90)),
            ("48h", Some(172_800)),
            ("7d", Some(604_800)),
            ("1d12h", Some(129_600)),
            ("", None),
            ("0s", None),
            ("90", None),
            ("s", None),
            ("-1s", None),
            ("1.5h", None),
            ("7 d", None),
            ("7w", None),
            ("7ü", None),
            ("99999999999999999999d", None),
            ("999999999999d", None),
        ];
        for (value, seconds) in cases {
            let timeout_ns = one("timeout", value).ok().and_then(|annotations| annotations.timeout_ns);
            assert_eq!(timeout_ns, seconds.map(|s| s * SECOND_NS), "{value:?}");
        }
        assert_eq!(one("timeout", "unlimited").map(|a| a.timeout_ns), Ok(Some(TIMEOUT_UNLIMITED)));
    }

    #[test]
    fn values() {
        assert_eq!(one("timer", "alive").map(|a| a.timer), Ok(Timer::Alive));
        assert_eq!(one("select", "least").map(|a| a.select), Ok(Selection::Least));
        assert_eq!(one("client-prefix-v4", "24").map(|a| a.prefix_v4), Ok(Some(24)));
        assert_eq!(one("client-prefix-v4", "0").map(|a| a.prefix_v4), Ok(Some(0)));
        assert_eq!(one("client-prefix-v6", "/64").map(|a| a.prefix_v6), Ok(Some(64)));
        assert_eq!(one("group", "shop").map(|a| a.group), Ok(Some("shop".to_owned())));
    }

    #[test]
    fn invalid_annotations_name_the_valid_values() {
        insta::assert_snapshot!(
            [
                one("timer", "conection"),
                one("select", ""),
                one("client-prefix-v4", "33"),
                one("client-prefix-v6", "129"),
                one("group", "Shop"),
                one("timeout", "soon"),
                one("tiemout", "1s"),
            ]
            .map(|result| result.expect_err("not valid"))
            .join("\n"),
            @r#"
        "conection" is not one of connection, packet, absolute, alive; connection is used
        "" is not one of random, consistent, least; random is used
        "33" is not a prefix length from 0 to 32; 32 is used
        "129" is not a prefix length from 0 to 128; 128 is used
        "Shop" is not a DNS label (a-z, 0-9, '-', at most 63); the service is in no group
        "soon" is not a duration such as 90s, 30m, 48h, 7d, and not unlimited; timeoutSeconds is used
        unknown annotation; known annotations are affinity.dev/timer, affinity.dev/select, affinity.dev/client-prefix-v4, affinity.dev/client-prefix-v6, affinity.dev/group, affinity.dev/timeout
        "#
        );
    }

    #[test]
    fn annotations_of_other_prefixes_are_ignored() {
        let others = BTreeMap::from([("affinity.example/timer".to_owned(), "never".to_owned())]);
        assert_eq!(parse(&others), (Annotations::default(), Vec::new()));
    }
}
