//! The two text formats, and which one a client requests.
//!
//! Both are made from one text, as in Prometheus' own libraries: OpenMetrics names a family of counters without its `_total`,
//! and has types that the classic format does not know.
//!
//! * OpenMetrics 1.0: <https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md>
//! * classic 0.0.4: <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>

/// A text format of metrics.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Format {
    /// The classic format of Prometheus, which every scraper reads: sent unless OpenMetrics is requested.
    Classic,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The format that an `Accept` header prefers: OpenMetrics if both are preferred equally, the classic format if it names
    /// none.
    #[must_use]
    pub fn accepted(accept: &str) -> Self {
        let ranges = accept.split(',').filter_map(|range| {
            let (format, quality) = Self::of_range(range)?;
            (quality > 0.0).then_some((quality, format))
        });
        let best = ranges.max_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
        best.map_or(Self::Classic, |(_, format)| format)
    }

    /// The format that one media range of `Accept` names, and its weight, from 0 to 1; none for another type or version.
    fn of_range(range: &str) -> Option<(Self, f32)> {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next()?;
        let (mut version, mut quality) = (None, 1.0);
        for (name, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
            let value = value.trim().trim_matches('"');
            match name.trim().to_ascii_lowercase().as_str() {
                "version" => version = Some(value),
                "q" => quality = value.parse().ok()?,
                _ => {}
            }
        }
        let format = match (media.to_ascii_lowercase().as_str(), version) {
            ("application/openmetrics-text", None | Some("0.0.1" | "1.0.0")) => Self::OpenMetrics,
            ("text/plain", None | Some("0.0.4")) | ("text/*" | "*/*", _) => Self::Classic,
            _ => return None,
        };
        Some((format, quality))
    }

    /// Its media type.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The classic form of a text in OpenMetrics.
#[must_use]
pub fn classic(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len() + 1024);
    let mut push = |parts: &[&str]| parts.iter().for_each(|part| text.push_str(part));
    let mut help = "";
    for line in openmetrics.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            // The help precedes the type, which decides the name.
            help = described.split_once(' ').map_or("", |(_, help)| help);
        } else if let Some((family, kind)) = line.strip_prefix("# TYPE ").and_then(|family| family.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                same => ("", same),
            };
            push(&["# HELP ", family, suffix, " ", help, "\n# TYPE ", family, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            push(&[line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_header_decides() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                          application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        for (accept, format) in [
            ("", Format::Classic),
            ("*/*", Format::Classic),
            ("text/html, text/*;q=0.5", Format::Classic),
            ("text/plain", Format::Classic),
            ("text/plain;version=0.0.4;q=0.9, application/openmetrics-text; version=1.0.0; q=0.5", Format::Classic),
            ("application/openmetrics-text;q=0, */*", Format::Classic),
            ("application/openmetrics-text; version=\"2.0.0\"", Format::Classic),
            ("application/openmetrics-text", Format::OpenMetrics),
            ("Application/OpenMetrics-Text; Version=\"0.0.1\", */*;q=0.1", Format::OpenMetrics),
            ("text/plain, application/openmetrics-text", Format::OpenMetrics),
            (prometheus, Format::OpenMetrics),
            ("application/json, nonsense;;q=x", Format::Classic),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept:?}");
        }
    }

    #[test]
    fn the_classic_format_names_counters_in_full_and_knows_four_types() {
        let openmetrics = "# HELP a_packets Packets.\n# TYPE a_packets counter\na_packets_total{reason=\"x\"} 1\n\
                           # HELP a_build What.\n# TYPE a_build info\na_build_info{version=\"1\"} 1\n\
                           # HELP a_size_bytes Size.\n# TYPE a_size_bytes gauge\n# UNIT a_size_bytes bytes\n\
                           a_size_bytes 2\n# HELP a_what What.\n# TYPE a_what unknown\na_what 3\n# EOF\n";
        let expected = "# HELP a_packets_total Packets.\n# TYPE a_packets_total counter\n\
                        a_packets_total{reason=\"x\"} 1\n\
                        # HELP a_build_info What.\n# TYPE a_build_info gauge\na_build_info{version=\"1\"} 1\n\
                        # HELP a_size_bytes Size.\n# TYPE a_size_bytes gauge\na_size_bytes 2\n\
                        # HELP a_what What.\n# TYPE a_what untyped\na_what 3\n";
        assert_eq!(classic(openmetrics), expected);
    }
}
