//! The Helm chart: its values are documented, checked by their schema and used. If `helm` is installed: it renders the same
//! objects as the plain manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;

use affinity_tests::lab::CAPABILITIES;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::objects::{Objects, deploy, text};

fn chart() -> PathBuf {
    deploy().join("chart/affinity")
}

fn yaml(file: &str) -> Result<Value> {
    serde_saphyr::from_str(&text(&chart().join(file))?).with_context(|| file.to_owned())
}

/// All templates, one after another.
fn templates() -> Result<String> {
    let mut all = String::new();
    for entry in std::fs::read_dir(chart().join("templates"))? {
        all += &text(&entry?.path())?;
    }
    Ok(all)
}

/// A value that users may set: the text of its comment in `values.yaml`, and its default.
#[derive(Debug)]
struct Documented {
    description: String,
    default: Value,
}

/// Every commented key of `values.yaml`, by its path.
fn documented() -> Result<BTreeMap<String, Documented>> {
    let values = yaml("values.yaml")?;
    let mut found = BTreeMap::new();
    let (mut comment, mut section) = (Vec::new(), String::new());
    for line in text(&chart().join("values.yaml"))?.lines() {
        let trimmed = line.trim_start();
        if let Some(text) = trimmed.strip_prefix("# ") {
            comment.push(text.to_owned());
            continue;
        }
        let Some((key, _)) = trimmed.split_once(':') else { continue };
        let path = if line.starts_with(' ') { format!("{section}/{key}") } else { format!("/{key}") };
        if comment.is_empty() {
            section = path;
            continue;
        }
        let default = values.pointer(&path).with_context(|| path.clone())?.clone();
        found.insert(path, Documented { description: std::mem::take(&mut comment).join(" "), default });
    }
    Ok(found)
}

/// The paths of all values that are no objects, or of objects that are documented as a whole.
fn paths(value: &Value, path: &str, whole: &BTreeSet<String>, found: &mut BTreeSet<String>) {
    match value.as_object() {
        Some(map) if !whole.contains(path) => {
            map.iter().for_each(|(key, value)| paths(value, &format!("{path}/{key}"), whole, found));
        }
        Some(_) | None => {
            found.insert(path.to_owned());
        }
    }
}

#[test]
fn every_value_is_documented_in_the_readme_as_in_the_values() -> Result<()> {
    let documented = documented()?;
    let mut all = BTreeSet::new();
    paths(&yaml("values.yaml")?, "", &documented.keys().cloned().collect(), &mut all);
    assert_eq!(all, documented.keys().cloned().collect(), "a value without a comment");

    let mut table = String::from("| value | default | |\n|---|---|---|\n");
    for (path, Documented { description, default }) in &documented {
        let path = path[1..].replace('/', ".");
        writeln!(table, "| `{path}` | `{default}` | {description} |")?;
    }
    let readme = text(&chart().join("README.md"))?;
    ensure!(readme.contains(&table), "the table of the chart's README.md is to be:\n{table}");
    Ok(())
}

#[test]
fn the_schema_knows_every_value_and_its_default() -> Result<()> {
    let schema: Value = serde_json::from_str(&text(&chart().join("values.schema.json"))?)?;
    let mut in_schema = BTreeSet::new();
    schema_paths(&schema, "", &mut in_schema);
    // Helm adds this itself.
    assert!(in_schema.remove("/global"));
    let documented = documented()?;
    assert_eq!(in_schema, documented.keys().cloned().collect());
    for (path, Documented { default, .. }) in documented {
        let of = schema.pointer(&path.replace('/', "/properties/")).with_context(|| path.clone())?;
        if let Some(choices) = of["enum"].as_array() {
            assert!(choices.contains(&default), "{path}: {default} is not of {choices:?}");
        } else {
            let kinds = of["type"].as_array().cloned().unwrap_or_else(|| vec![of["type"].clone()]);
            assert!(kinds.contains(&json!(kind(&default))), "{path}: {default} is not {kinds:?}");
        }
    }
    Ok(())
}

fn schema_paths(schema: &Value, path: &str, found: &mut BTreeSet<String>) {
    match schema["properties"].as_object() {
        Some(properties) => {
            assert_eq!(schema["additionalProperties"], json!(false), "{path}: a mistyped name would go unnoticed");
            properties.iter().for_each(|(key, value)| schema_paths(value, &format!("{path}/{key}"), found));
        }
        None => {
            found.insert(path.to_owned());
        }
    }
}

/// JSON Schema's name for a value's type.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[test]
fn the_templates_use_every_value_and_no_other() -> Result<()> {
    let templates = templates()?;
    let mut used = BTreeSet::new();
    for rest in templates.split(".Values.").skip(1) {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.').unwrap_or(rest.len());
        used.insert(format!("/{}", rest[..end].replace('.', "/")));
    }
    assert_eq!(used, documented()?.into_keys().collect());
    Ok(())
}

/// In the node's network the kubelet reaches loopback too, but uses the node's address unless the probe sets another.
#[test]
fn every_probe_asks_where_the_agent_listens() -> Result<()> {
    let templates = templates()?;
    let probes: Vec<_> = templates.split("httpGet:\n").skip(1).collect();
    assert_eq!(probes.len(), 3);
    for probe in probes {
        let asks = "{{- with include \"affinity.probedHost\" . }}\n              host: {{ . | quote }}\n";
        assert!(probe.trim_start().starts_with(asks), "{probe}");
    }
    Ok(())
}

#[test]
#[ignore = "needs helm"]
fn helm_lets_probes_follow_the_address_of_metrics() -> Result<()> {
    for (address, host) in [("[::]", None), ("0.0.0.0", None), ("127.0.0.1", Some("127.0.0.1")), ("[::1]", Some("::1"))]
    {
        let chart = rendered(&[&format!("metricsAddress={address}")])?;
        let container = chart.container();
        for probe in [&container.startup_probe, &container.liveness_probe, &container.readiness_probe] {
            let request = probe.as_ref().and_then(|probe| probe.http_get.as_ref()).context("no HTTP probe")?;
            assert_eq!(request.host.as_deref(), host, "{address}");
        }
    }
    Ok(())
}

#[test]
fn the_chart_is_of_this_version_and_grants_the_same_capabilities() -> Result<()> {
    let chart = yaml("Chart.yaml")?;
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!(env!("CARGO_PKG_VERSION")), &chart["version"]));
    let templates = templates()?;
    let granted =
        templates.split_once("add:\n").and_then(|(_, rest)| rest.split_once("seccompProfile")).context("add")?;
    let granted: Vec<_> = granted.0.lines().filter_map(|line| line.trim().strip_prefix("- ")).collect();
    assert_eq!(granted, CAPABILITIES);
    Ok(())
}

/// The output of `helm template` for the chart with these settings.
fn rendered(settings: &[&str]) -> Result<Objects> {
    let mut helm = Command::new("helm");
    helm.args(["template", "affinity"]).arg(chart()).args(["--namespace", "affinity-system"]);
    settings.iter().for_each(|setting| {
        helm.args(["--set", setting]);
    });
    let output = helm.output().context("helm")?;
    ensure!(output.status.success(), "helm template: {}", String::from_utf8_lossy(&output.stderr));
    // The user creates the namespace.
    let namespace = "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: affinity-system\n";
    Objects::of(&format!("{}\n{namespace}", str::from_utf8(&output.stdout)?))
}

#[test]
#[ignore = "needs helm"]
fn helm_renders_what_the_plain_manifests_say() -> Result<()> {
    let (plain, chart) = (Objects::of_file(&deploy().join("affinity.yaml"))?, rendered(&[])?);
    assert_eq!(chart.role.rules, plain.role.rules);
    assert_eq!((&chart.binding.role_ref, &chart.binding.subjects), (&plain.binding.role_ref, &plain.binding.subjects));
    assert_eq!(chart.quota.spec, plain.quota.spec);

    let (mut chart, mut plain) = (chart.daemonset.spec, plain.daemonset.spec);
    let args: [BTreeSet<String>; 2] = [&mut chart, &mut plain].map(|spec| {
        let container = spec.template.spec.as_mut().and_then(|pod| pod.containers.first_mut());
        container.and_then(|container| container.args.take()).into_iter().flatten().collect()
    });
    // The chart sets some defaults explicitly.
    assert!(args[0].is_superset(&args[1]), "{args:?}");
    assert_eq!(chart, plain);
    Ok(())
}

#[test]
#[ignore = "needs helm"]
fn helm_passes_values_on() -> Result<()> {
    let settings = ["shadow=true", "devices={eth*}", "sizes.sessions=3000000", "metricsPort=9000", "services=all"];
    let chart = rendered(&[settings.as_slice(), &["apiServer.host=192.0.2.1", "extraArgs={--no-tcx}"]].concat())?;
    let container = chart.container();
    let args = container.args.clone().unwrap_or_default();
    for arg in
        ["--shadow", "--device=eth*", "--max-sessions=3000000", "--metrics=[::]:9000", "--services=all", "--no-tcx"]
    {
        assert!(args.iter().any(|given| given == arg), "{arg}: {args:?}");
    }
    let port = container.ports.as_ref().and_then(|ports| ports.first()).map(|port| port.container_port);
    assert_eq!(port, Some(9000));
    let host = container.env.iter().flatten().find(|variable| variable.name == "KUBERNETES_SERVICE_HOST");
    assert_eq!(host.and_then(|host| host.value.as_deref()), Some("192.0.2.1"));

    let tight = rendered(&["security=tight"])?;
    let context = tight.container().security_context.as_ref().context("no security context")?;
    assert_eq!(context.privileged, Some(false));
    let added = context.capabilities.as_ref().and_then(|capabilities| capabilities.add.as_deref());
    assert_eq!(added.unwrap_or_default(), CAPABILITIES);
    assert!(rendered(&["security=none"]).is_err(), "the schema refuses it");
    Ok(())
}
