use std::time::Duration;

use affinity_common::{
    abi::{Frontend, Member, MemberKey, NameKey, NameKind, Port, Usage, UsageKey, UsageOf},
    names,
};
use bytemuck::Zeroable;
use serde_json::Value;

use super::*;
use crate::{store::Observed, view::fixture};

const DOCUMENTATION: &str = include_str!("../../../docs/metrics.md");
const OPERATIONS: &str = include_str!("../../../docs/operations.md");
const DASHBOARD: &str = include_str!("../../../deploy/grafana/affinity.json");

/// The text of a scrape of the fixture's tables, with this many series.
fn scrape(max_series: usize) -> String {
    let vitals = vitals();
    let census = Census {
        by_service: BTreeMap::from([(1, 40), (2, 2)]),
        by_backend: BTreeMap::from([(1, 42)]),
        entries: BTreeMap::from([(names::SESSIONS_V4, 42)]),
        evicted: BTreeMap::from([(1, 7)]),
    };
    vitals.swept(Totals { expired: 5, ..Totals::default() }, census);
    exposition(Arc::new(vitals), Some(tables()), &Mutex::new(Bounds::new(max_series))).unwrap()
}

/// The vitals of an agent before the end of the first sweep pass.
fn vitals() -> Vitals {
    let vitals = Vitals::default();
    vitals.published(9);
    vitals.sync.observe(0.003);
    vitals
}

/// The fixture's tables, as a scrape reads them.
fn tables() -> Tables {
    let catalog = fixture::catalog();
    let mut tables = Tables::new(
        (0..REASONS.len() as u64).collect(),
        vec![(names::SESSIONS_V4, 1000)],
        BTreeMap::from([("xdp-native", 1)]),
        Some(Duration::from_secs(3)),
    );
    let Observed { names, frontends_v4, frontends_v6, backends, members, .. } = catalog.observed();
    names.iter().for_each(|(key, name)| tables.add_name(*key, name));
    frontends_v4.values().chain(frontends_v6.values()).for_each(|frontend| tables.add_frontend(frontend));
    backends.iter().for_each(|(index, backend)| tables.add_backend(*index, backend));
    members.iter().for_each(|(key, member)| tables.add_member(key, member));
    catalog.usage.iter().for_each(|(key, usage)| tables.add_usage(*key, &[*usage]));
    tables
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

/// The labels of each family of an exposition, except for the buckets of a histogram.
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
        "affinity_backend_sessions{service=\"default/web\",backend=\"default/web-0\"} 42",
        "affinity_backend_connections_total{service=\"default/web\",backend=\"default/web-0\",reason=\"pinned\"} 15",
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
    // All these services pin their clients.
    let (all_but_selected, given) = (USAGES.len() - 1, USAGES.len() - 2);
    assert_eq!(of("affinity_service_connections_total{service=\"other\"").len(), all_but_selected);
    let backends = of("affinity_backend_connections_total{");
    assert_eq!(backends.len(), given);
    assert!(backends.iter().all(|line| line.contains("{service=\"other\",backend=\"other\",")), "{backends:?}");
}

#[test]
fn no_series_is_there_that_nothing_can_count() {
    let text = scrape(10);
    for (series, reason) in [
        // A rejected connection is counted for no backend.
        ("affinity_backend_connections_total", "no-endpoints"),
        // These services have affinity.
        ("affinity_service_connections_total", "selected"),
        // These are reasons of events.
        ("affinity_packets_total", "operator"),
        ("affinity_packets_total", "table-full"),
    ] {
        let reason = format!("reason=\"{reason}\"");
        assert!(!text.lines().any(|line| line.starts_with(series) && line.contains(&reason)), "{series} {reason}");
    }
    // A service that has lost its affinity keeps its counts.
    let mut tables = Tables::default();
    tables.add_frontend(&Frontend { service: 1, ..Frontend::zeroed() });
    tables.add_usage(UsageKey { of: UsageOf::Service as u32, id: 1 }, &[Usage { counts: [0, 3, 0, 0, 0, 0, 0, 0] }]);
    let text = exposition(Arc::default(), Some(tables), &Mutex::new(Bounds::new(1))).unwrap();
    let of_service = text.lines().filter(|line| line.starts_with("affinity_service_connections_total"));
    assert_eq!(
        of_service.collect::<Vec<_>>(),
        [
            "affinity_service_connections_total{service=\"#1\",reason=\"selected\"} 0",
            "affinity_service_connections_total{service=\"#1\",reason=\"created\"} 3",
            "affinity_service_connections_total{service=\"#1\",reason=\"no-endpoints\"} 0",
        ]
    );
}

#[test]
fn sessions_are_absent_until_they_are_counted() {
    let text = exposition(Arc::new(vitals()), Some(tables()), &Mutex::new(Bounds::new(10))).unwrap();
    for family in
        ["affinity_service_sessions", "affinity_backend_sessions", "affinity_map_entries{map=\"sessions_v4\"}"]
    {
        assert!(!text.contains(family), "{family} is there before the first sweep");
    }
    assert!(text.contains("affinity_service_evicted_sessions_total{service=\"default/web\"} 0\n"));
}

#[test]
fn a_backend_of_several_services_names_them() {
    let mut tables = tables();
    let name = |id| NameKey { kind: NameKind::Service as u32, id };
    for (service, services) in [
        (3, "default/also,default/web"),
        (4, "default/also,default/other,default/web"),
        (5, "default/also,default/more,default/other,default/web"),
        (6, SEVERAL),
    ] {
        let named = ["", "", "", "also", "other", "more", "most"][service as usize];
        tables.add_name(name(service), &format!("default/{named}"));
        tables.add_frontend(&Frontend { service, pool: 100 + service, ..Frontend::zeroed() });
        let member = Member { generation: 1, port: Port::new(80), state: 1, pad: 0 };
        tables.add_member(&MemberKey { pool: 100 + service, backend: 1 }, &member);
        assert_eq!(tables.services_label(1), services);
    }
}

#[test]
fn the_classic_format_has_the_same_samples() {
    let openmetrics = scrape(10);
    let classic = classic(&openmetrics);
    let samples =
        |text: &str| text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(samples(&openmetrics), samples(&classic));
    for line in classic.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (_, kind) = line.split_once(' ').unwrap();
        assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
    }
    assert!(!classic.contains("# EOF"));
}

#[test]
fn metrics_of_the_agent_need_no_dataplane() {
    let text = exposition(Arc::default(), None, &Mutex::new(Bounds::new(1))).unwrap();
    assert!(text.contains("affinity_build_info{version="), "{text}");
    assert!(!text.contains("affinity_packets"), "{text}");
}

#[test]
fn the_first_series_stay_and_the_rest_is_summed() {
    let mut admitted = Admitted::new(2);
    admitted.update(["b", "c", "d"]);
    let sums = admitted.sum([("b", [1, 10]), ("c", [2, 20]), ("d", [4, 40]), ("e", [8, 80])]);
    assert_eq!(sums, BTreeMap::from([("b", [1, 10]), ("c", [2, 20]), (OTHER, [12, 120])]));
    admitted.update(["a", "b", "c", "d"]);
    assert_eq!((admitted.label("a"), admitted.label("c")), (OTHER, "c"), "c keeps its series");
    admitted.update(["a", "b", "d"]);
    assert_eq!((admitted.label("a"), admitted.label("d")), ("a", OTHER), "a has the place of c");
}
