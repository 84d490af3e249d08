//! Metrics and probes of a real agent, over real HTTP, compared with the output of commands.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use affinity_tests::apiserver::ApiServer;
use affinity_tests::bench::sync::Cluster;
use affinity_tests::lab::{Lab, eventually, raise_file_limit};
use affinity_tests::patience::patience;
use affinity_tests::story::{Hook, Route, report, tell_in, web};
use anyhow::{Context, Result, ensure};

const ADDRESS: &str = "127.0.0.1:9464";
const PATIENCE: Duration = Duration::from_secs(20);

/// The `Accept` header of a current scraper.
const OPENMETRICS: &str = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

/// An answer to GET.
struct Answer {
    status: u16,
    /// In lower case.
    head: String,
    body: String,
}

/// Sends a request on the node that this thread is on; the answer is still to be read.
fn ask(path: &str, accept: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(ADDRESS)?;
    stream.set_read_timeout(Some(patience(PATIENCE)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {ADDRESS}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n")?;
    Ok(stream)
}

fn read(mut stream: TcpStream) -> Result<Answer> {
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("a header and a body")?;
    let status = head.split(' ').nth(1).context("a status")?.parse()?;
    Ok(Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
}

/// The status and the body of an answer to GET, on the lab's node.
fn get(lab: &Lab, path: &str) -> Result<(u16, String)> {
    let Answer { status, body, .. } = lab.node().run(|| read(ask(path, OPENMETRICS)?))??;
    Ok((status, body))
}

/// Samples of a text in OpenMetrics by series, after a check of it by the rules of the format.
fn samples(text: &str) -> Result<BTreeMap<String, f64>> {
    let text = text.strip_suffix("# EOF\n").context("it ends with # EOF")?;
    samples_of(text, |name, types| {
        let is_of = |suffixes: &[&str], kind| {
            suffixes.iter().any(|suffix| name.strip_suffix(suffix).and_then(|family| types.get(family)) == Some(&kind))
        };
        types.get(name) == Some(&"gauge")
            || is_of(&["_total"], "counter")
            || is_of(&["_info"], "info")
            || is_of(&["_bucket", "_sum", "_count"], "histogram")
    })
}

/// The same for a text in the classic format.
fn classic_samples(text: &str) -> Result<BTreeMap<String, f64>> {
    samples_of(text, |name, types| {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        types.get(name).is_some_and(|kind| ["counter", "gauge"].contains(kind))
            || family.and_then(|family| types.get(family)) == Some(&"histogram")
    })
}

/// Samples by series; `is_declared` says whether a sample's name belongs to one of the families declared so far.
fn samples_of(text: &str, is_declared: impl Fn(&str, &BTreeMap<&str, &str>) -> bool) -> Result<BTreeMap<String, f64>> {
    let mut types: BTreeMap<&str, &str> = BTreeMap::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
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
        ensure!(is_declared(name, &types), "{line:?} is of no declared family");
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
            // A service with affinity selects no pod without a pin.
            let counted = if reason == "selected" { metrics.get(&series).copied() } else { Some(of(series)?) };
            assert_eq!(counted.unwrap_or(0.0), count.as_f64().context("a number")?, "{reason}");
        }
        assert_eq!(service["connections"]["created"].as_f64(), Some(sessions));
        for backend in lab.affinity_json(&["get", "backends"])?.as_array().context("backends")? {
            // A pod has two addresses here, and one name: its series is their sum.
            let name = format!("default/{}", backend["name"].as_str().context("a name")?);
            ensure!(
                of(format!("affinity_backend_sessions{{service=\"default/web\",backend=\"{name}\"}}"))?
                    >= backend["sessions"].as_f64().unwrap_or(0.0)
            );
        }
        let by_backend = metrics.iter().filter(|(series, _)| series.starts_with("affinity_backend_sessions{"));
        assert_eq!(by_backend.map(|(_, count)| count).sum::<f64>(), sessions);
        for counter in lab.affinity_json(&["get", "counters"])?.as_array().context("counters")? {
            let reason = counter["reason"].as_str().context("a reason")?;
            if ["operator", "table-full"].contains(&reason) {
                // Reasons of events.
                continue;
            }
            let counted = of(format!("affinity_packets_total{{reason=\"{reason}\"}}"))?;
            ensure!(Some(counted) <= counter["packets"].as_f64(), "{reason}: {counted}, then {counter}");
        }
        assert_eq!(of("affinity_attachments{hook=\"xdp-native\"}".to_owned())?, 1.0);
        assert_eq!(of("affinity_map_entries{map=\"sessions_v4\"}".to_owned())?, sessions / 2.0);
        ensure!(of("affinity_sync_duration_seconds_count".to_owned())? >= 1.0);
        ensure!(of("affinity_view_age_seconds".to_owned())? < 60.0);

        let classic = lab.node().run(|| read(ask("/metrics", "*/*")?))??;
        ensure!(classic.head.contains("content-type: text/plain; version=0.0.4"), "{}", classic.head);
        let series: BTreeSet<_> = classic_samples(&classic.body)?.into_keys().collect();
        assert_eq!(series, metrics.keys().cloned().collect(), "the formats differ");
        let openmetrics = lab.node().run(|| read(ask("/metrics", OPENMETRICS)?))??;
        ensure!(openmetrics.head.contains("content-type: application/openmetrics-text"), "{}", openmetrics.head);

        let again: BTreeSet<_> = scrape(lab)?.into_keys().collect();
        assert_eq!(again, metrics.into_keys().collect(), "series come and go");
        Ok(())
    })
}

/// It reads the classic format; it checks nothing of OpenMetrics.
#[test]
#[ignore = "needs promtool"]
fn promtool_finds_no_fault_with_the_metrics() -> Result<()> {
    let web = web().client_ip();
    let args = [Hook::Tc.args().as_slice(), &["--metrics", ADDRESS]].concat();
    tell_in(&Default::default(), &args, &[&web], |lab, _| {
        eventually("the sweep has counted the pins", PATIENCE, || {
            Ok(get(lab, "/metrics")?.1.contains("affinity_backend_sessions{"))
        })?;
        let text = lab.node().run(|| read(ask("/metrics", "text/plain")?))??.body;
        let mut promtool = Command::new("promtool");
        promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut promtool = promtool.spawn().context("promtool")?;
        promtool.stdin.take().context("no standard input")?.write_all(text.as_bytes())?;
        let output = promtool.wait_with_output()?;
        let said = [output.stdout, output.stderr].concat();
        ensure!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
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

/// Additional memory that scrapes may take, compared with an idle agent.
const SCRAPE_MEMORY: u64 = 64 << 20;

/// Pods of a large cluster, many parallel scrapers, and clients that never finish their requests.
#[test]
fn scrapes_in_parallel_and_half_sent_requests_cost_little() -> Result<()> {
    const SCRAPES: usize = 40;
    const HALF_SENT: usize = 2_000;
    raise_file_limit()?;
    let lab = Lab::with_pods(0)?;
    let api = ApiServer::start_in(lab.node())?;
    Cluster::new(5_000, 10).fill(&api)?;
    let kubeconfig = api.kubeconfig(lab.scratch())?.display().to_string();
    let source = ["--source", "kubernetes", "--kubeconfig", &kubeconfig];
    let options = ["--device", "wire0", "--socket", "off", "--metrics", ADDRESS];
    let mut agent = lab.agent_unready(&[source.as_slice(), &options].concat())?;
    agent.until_ready()?;
    let idle = agent.memory()?.now;
    agent.forget_peak()?;

    for round in 0..3 {
        let began = Instant::now();
        let answers = lab.node().run(|| -> Result<Vec<Answer>> {
            let asked: Vec<_> = (0..SCRAPES).map(|_| ask("/metrics", OPENMETRICS)).collect::<Result<_>>()?;
            asked.into_iter().map(read).collect()
        })??;
        for Answer { status, body, .. } in &answers {
            ensure!((*status, body.ends_with("# EOF\n")) == (200, true), "{status}: {} bytes", body.len());
        }
        ensure!(
            samples(&answers[0].body)?
                .contains_key("affinity_service_connections_total{service=\"other\",reason=\"created\"}")
        );
        report(&format!(
            "round {round}: {SCRAPES} scrapes of {} KiB in {:.1} s, memory {:?} beyond {} MiB",
            answers[0].body.len() / 1024,
            began.elapsed().as_secs_f64(),
            agent.memory()?,
            idle >> 20
        ));
        // Beyond the time that an answer is kept for other requests.
        std::thread::sleep(Duration::from_millis(1_100));
    }
    let half_sent = lab.node().run(|| -> Result<Vec<TcpStream>> {
        (0..HALF_SENT)
            .map(|_| {
                let mut stream = TcpStream::connect(ADDRESS)?;
                stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")?;
                Ok(stream)
            })
            .collect()
    })??;
    for path in ["/healthz", "/readyz", "/healthz", "/readyz"] {
        let began = Instant::now();
        ensure!(get(&lab, path)?.0 == 200);
        ensure!(began.elapsed() < patience(Duration::from_secs(1)), "{path} took {:?}", began.elapsed());
    }
    ensure!(get(&lab, "/metrics")?.0 == 200);
    let peak = agent.memory()?.peak;
    ensure!(peak <= idle + SCRAPE_MEMORY, "{} MiB, and idle {} MiB", peak >> 20, idle >> 20);
    eventually("connections that say nothing more are closed", PATIENCE, || {
        Ok(open_connections(agent.id())? < HALF_SENT / 100)
    })?;
    drop(half_sent);
    agent.terminate()
}

/// TCP connections to the metrics' port that a process holds.
fn open_connections(process: u32) -> Result<usize> {
    let table = std::fs::read_to_string(format!("/proc/{process}/net/tcp"))?;
    let port = ADDRESS.rsplit(':').next().context("a port")?.parse::<u16>()?;
    let local = format!(":{port:04X}");
    let established = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    // The local address, and 01 for an established connection.
    Ok(established.filter(|fields| fields.len() > 3 && fields[1].ends_with(&local) && fields[3] == "01").count())
}
