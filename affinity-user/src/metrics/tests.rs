use std::collections::BTreeSet;

use serde_json::Value;

use super::*;
use crate::view::fixture;

const DOCUMENTATION: &str = include_str!("../../../docs/metrics.md");
const OPERATIONS: &str = include_str!("../../../docs/operations.md");
const DASHBOARD: &str = include_str!("../../../deploy/grafana/affinity.json");

/// What a scrape gives of the fixture's tables, with so many series.
fn scrape(max_series: usize) -> String {
    let catalog = fixture::catalog();
    let backend = *catalog.observed().backends.keys().next().unwrap();
    let status = affinity_common::abi::Status {
        started_ns: fixture::SECOND,
        current_ns: (fixture::NOW_S - 3) * fixture::SECOND,
        source: 1,
        ..Default::default()
    };
    let tables = Tables {
        catalog: catalog.with_status(&status),
        packets: (0..REASONS.len() as u64).collect(),
        capacities: vec![(names::SESSIONS_V4, 1000)],
        attachments: BTreeMap::from([("xdp-native", 1)]),
    };
    let census = Census {
        by_service: BTreeMap::from([(1, 40), (2, 2)]),
        by_backend: BTreeMap::from([(backend, 42)]),
        entries: BTreeMap::from([(names::SESSIONS_V4, 42)]),
        evicted: BTreeMap::from([(1, 7)]),
    };
    let vitals = Vitals::default();
    vitals.swept(Totals { expired: 5, ..Totals::default() }, census);
    vitals.published(9);
    vitals.sync.observe(0.003);
    exposition(Arc::new(vitals), Some(tables), &Mutex::new(Bounds::new(max_series))).unwrap()
}

/// The families as they are sampled: counters with `_total`, information with `_info`.
fn exported(text: &str) -> BTreeSet<String> {
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let suffix = |kind| match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    };
    families.map(|(name, kind)| format!("{name}{}", suffix(kind))).collect()
}

/// The words of a text that are names of metrics.
fn names_in(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("affinity_")).map(str::to_owned).collect()
}

/// The labels of each family of an exposition, but for the buckets of a histogram.
fn labels(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut labels: BTreeMap<String, BTreeSet<String>> =
        exported(text).into_iter().map(|name| (name, BTreeSet::new())).collect();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, list)) = line.split_once('{') else { continue };
        let names = list.split("=\"").filter_map(|part| part.rsplit(['"', ',']).next());
        if let Some(found) = labels.get_mut(name) {
            found.extend(names.filter(|name| name.starts_with(char::is_alphabetic)).map(str::to_owned));
        }
    }
    labels
}

/// The labels of each metric in the table of docs/metrics.md.
fn documented_labels() -> BTreeMap<String, BTreeSet<String>> {
    let (_, table) = DOCUMENTATION.split_once("| metric | type | labels | meaning |").expect("the table of metrics");
    let rows = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    let rows = rows.filter(|row| row.starts_with("| `")).map(|row| row.split('|').map(str::trim).collect::<Vec<_>>());
    rows.map(|cells| {
        let labels = cells[3].split(", ").filter(|label| !label.is_empty()).map(str::to_owned);
        (cells[1].trim_matches('`').to_owned(), labels.collect())
    })
    .collect()
}

#[test]
fn documented_metrics_are_those_that_are_exported() {
    let text = scrape(10);
    let (exported, documented) = (labels(&text), documented_labels());
    let mut faults = Vec::new();
    for (name, labels) in &exported {
        let list = labels.iter().cloned().collect::<Vec<_>>().join(", ");
        match documented.get(name) {
            None => faults.push(format!(
                "docs/metrics.md: {name} is not documented: add a row under \"## Metrics\": | `{name}` | TYPE | {list} | \
                 meaning |"
            )),
            Some(said) if said != labels => {
                faults.push(format!("docs/metrics.md: {name}: the column \"labels\" says {said:?}; it has to say: {list}"));
            }
            Some(_) => {}
        }
    }
    let unknown = documented.keys().filter(|name| !exported.contains_key(*name));
    faults.extend(unknown.map(|name| format!("docs/metrics.md: {name} is not exported: remove its row")));
    let asked = names_in(OPERATIONS).into_iter().filter(|name| !exported.contains_key(name));
    faults.extend(asked.map(|name| format!("docs/operations.md: {name} is no metric: correct the query")));
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn the_dashboard_asks_only_for_what_is_exported() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let queries = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let expressions: Vec<_> = queries.map(|query| query["expr"].as_str().unwrap()).collect();
    let variables = dashboard["templating"].to_string();
    let exported = exported(&scrape(10));
    let asked: BTreeSet<_> = expressions.iter().copied().chain([variables.as_str()]).flat_map(names_in).collect();
    assert!(asked.len() > 10, "{asked:?}");
    for name in asked {
        assert!(exported.contains(name.trim_end_matches("_bucket")), "{name}");
    }
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn values_are_those_of_the_tables() {
    let text = scrape(10);
    for line in [
        "affinity_service_sessions{service=\"default/web\"} 40",
        "affinity_service_evicted_sessions_total{service=\"default/web\"} 7",
        "affinity_packets_total{reason=\"established\"} 7",
        "affinity_map_entries{map=\"sessions_v4\"} 42",
        "affinity_map_capacity{map=\"sessions_v4\"} 1000",
        "affinity_attachments{hook=\"xdp-native\"} 1",
        "affinity_view_age_seconds 3.0",
        "affinity_sync_steps_total 9",
        "affinity_sync_duration_seconds_bucket{le=\"0.005\"} 1",
        "affinity_sweep_expired_sessions_total 5",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn beyond_the_bound_all_are_summed() {
    let text = scrape(0);
    let of = |name: &str| text.lines().filter(|line| line.starts_with(name)).collect::<Vec<_>>();
    assert_eq!(of("affinity_service_sessions{"), ["affinity_service_sessions{service=\"other\"} 42"]);
    assert_eq!(of("affinity_backend_connections_total{").len(), USAGES.len());
}

#[test]
fn before_the_dataplane_is_there_the_agent_tells_of_itself() {
    let text = exposition(Arc::default(), None, &Mutex::new(Bounds::new(1))).unwrap();
    assert!(text.contains("affinity_build_info{version="), "{text}");
    assert!(!text.contains("affinity_packets"), "{text}");
}
