//! Metrics and probes of a real agent, over real HTTP, held against what the commands say.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use affinity_tests::lab::{Lab, eventually};
use affinity_tests::story::{Hook, Route, tell_in, web};
use anyhow::{Context, Result, ensure};

const ADDRESS: &str = "127.0.0.1:9464";
const PATIENCE: Duration = Duration::from_secs(20);

/// The status and the body of an answer to GET, on the lab's node.
fn get(lab: &Lab, path: &str) -> Result<(u16, String)> {
    lab.node().run(|| {
        let mut stream = TcpStream::connect(ADDRESS)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {ADDRESS}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("a header and a body")?;
        let status = head.split(' ').nth(1).context("a status")?.parse()?;
        Ok((status, body.to_owned()))
    })?
}

/// Samples of an exposition by series, after a check of it by the rules of the format.
fn samples(text: &str) -> Result<BTreeMap<String, f64>> {
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    let mut samples = BTreeMap::new();
    let lines = text.strip_suffix("# EOF\n").context("it ends with # EOF")?.lines();
    for line in lines {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').context("a name and a type")?;
            ensure!(types.insert(name, kind).is_none(), "{name} is declared twice");
            continue;
        }
        if line.starts_with("# HELP ") {
            continue;
        }
        let (series, value) = line.rsplit_once(' ').context("a series and a value")?;
        let name = series.split('{').next().unwrap_or_default();
        let is_of = |suffixes: &[&str], kind| {
            suffixes.iter().any(|suffix| name.strip_suffix(suffix).and_then(|family| types.get(family)) == Some(&kind))
        };
        let is_declared = types.get(name) == Some(&"gauge")
            || is_of(&["_total"], "counter")
            || is_of(&["_info"], "info")
            || is_of(&["_bucket", "_sum", "_count"], "histogram");
        ensure!(is_declared, "{line:?} is of no declared family");
        ensure!(series.contains('{') == series.ends_with('}'), "{line:?}");
        let value = value.parse().with_context(|| line.to_owned())?;
        ensure!(samples.insert(series.to_owned(), value).is_none(), "{series} is there twice");
    }
    Ok(samples)
}

fn scrape(lab: &Lab) -> Result<BTreeMap<String, f64>> {
    let (status, text) = get(lab, "/metrics")?;
    ensure!(status == 200, "{status}: {text}");
    samples(&text)
}

#[test]
fn metrics_say_what_the_commands_say() -> Result<()> {
    const CLIENTS: u32 = 60;
    let web = web().client_ip();
    let args = [Hook::XdpNative.args().as_slice(), &["--metrics", ADDRESS]].concat();
    tell_in(&Default::default(), &args, &[&web], |lab, _| {
        assert_eq!(get(lab, "/healthz")?, (200, "ok\n".to_owned()));
        assert_eq!(get(lab, "/readyz")?, (200, "ok\n".to_owned()));
        assert_eq!(get(lab, "/elsewhere")?.0, 404);
        for route in Route::all_to(&web) {
            route.dial_all(lab, 0..CLIENTS)?;
            route.dial_all(lab, 0..CLIENTS)?;
        }
        let sessions = f64::from(4 * CLIENTS);
        eventually("the sweep has counted the pins", PATIENCE, || {
            Ok(scrape(lab)?.get("affinity_service_sessions{service=\"default/web\"}") == Some(&sessions))
        })?;
        let metrics = scrape(lab)?;
        let of = |series: String| metrics.get(&series).copied().with_context(|| series);

        let service = &lab.affinity_json(&["get", "services"])?[0];
        assert_eq!(service["sessions"].as_f64(), Some(sessions));
        for (reason, count) in service["connections"].as_object().context("connections")? {
            let series = format!("affinity_service_connections_total{{service=\"default/web\",reason=\"{reason}\"}}");
            assert_eq!(Some(of(series)?), count.as_f64(), "{reason}");
        }
        assert_eq!(service["connections"]["created"].as_f64(), Some(sessions));
        for backend in lab.affinity_json(&["get", "backends"])?.as_array().context("backends")? {
            // A pod has two addresses here, and one name: its series is their sum.
            let name = format!("default/{}", backend["name"].as_str().context("a name")?);
            ensure!(
                of(format!("affinity_backend_sessions{{backend=\"{name}\"}}"))?
                    >= backend["sessions"].as_f64().unwrap_or(0.0)
            );
        }
        let by_backend = metrics.iter().filter(|(series, _)| series.starts_with("affinity_backend_sessions{"));
        assert_eq!(by_backend.map(|(_, count)| count).sum::<f64>(), sessions);
        for counter in lab.affinity_json(&["get", "counters"])?.as_array().context("counters")? {
            let reason = counter["reason"].as_str().context("a reason")?;
            let counted = of(format!("affinity_packets_total{{reason=\"{reason}\"}}"))?;
            ensure!(Some(counted) <= counter["packets"].as_f64(), "{reason}: {counted}, then {counter}");
        }
        assert_eq!(of("affinity_attachments{hook=\"xdp-native\"}".to_owned())?, 1.0);
        assert_eq!(of("affinity_map_entries{map=\"sessions_v4\"}".to_owned())?, sessions / 2.0);
        ensure!(of("affinity_sync_duration_seconds_count".to_owned())? >= 1.0);
        ensure!(of("affinity_view_age_seconds".to_owned())? < 60.0);

        let again: BTreeSet<_> = scrape(lab)?.into_keys().collect();
        assert_eq!(again, metrics.into_keys().collect(), "series come and go");
        Ok(())
    })
}

#[test]
fn not_ready_is_said_in_one_line() -> Result<()> {
    let web = web().client_ip();
    let args = ["--device", "later0", "--metrics", ADDRESS];
    tell_in(&Default::default(), &args, &[&web], |lab, _| {
        assert_eq!(get(lab, "/readyz")?, (503, "no device is attached\n".to_owned()));
        assert_eq!(get(lab, "/healthz")?.0, 200);
        let mut ip = lab.node().command("ip");
        ensure!(ip.args(["link", "add", "later0", "type", "bridge"]).status()?.success());
        eventually("it is ready", PATIENCE, || Ok(get(lab, "/readyz")?.0 == 200))
    })
}

#[test]
fn an_address_that_is_taken_is_an_error() -> Result<()> {
    let lab = Lab::with_pods(0)?;
    lab.publish(&web())?;
    let taken = lab.node().run(|| std::net::TcpListener::bind(ADDRESS))??;
    let error = format!("{:#}", lab.agent(&["--metrics", ADDRESS]).unwrap_err());
    ensure!(error.contains("--metrics 127.0.0.1:9464"), "{error}");
    drop(taken);
    Ok(())
}
