//! The arguments that `deploy/` gives the agent, read by the command line itself.

use affinity_user::cli;
use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::objects::{Kustomization, Objects, deploy, text};

const ARGS: &str = "/spec/template/spec/containers/0/args/";

fn accepts(args: &[String]) -> Result<()> {
    let command = cli::command();
    command.try_get_matches_from(std::iter::once("affinity".to_owned()).chain(args.iter().cloned()))?;
    Ok(())
}

fn plain() -> Result<Vec<String>> {
    let objects = Objects::of_file(&deploy().join("affinity.yaml"))?;
    objects.container().args.clone().context("no arguments")
}

/// The arguments after the inline patches of a directory's kustomization, and of those below it.
fn patched(directory: &str) -> Result<Vec<String>> {
    let kustomization = Kustomization::of(directory)?;
    let mut args = match kustomization.resources.as_slice() {
        [base] if base == "../../base" => plain()?,
        [other] => patched(&format!("overlays/{}", other.trim_start_matches("../")))?,
        resources => bail!("{directory}: {resources:?}"),
    };
    for patch in kustomization.patches.iter().filter_map(|patch| patch.patch.as_deref()) {
        let operations: Value = serde_saphyr::from_str(patch)?;
        for operation in operations.as_array().context("a list of operations")? {
            let field = |name: &str| operation[name].as_str().with_context(|| format!("{operation}: no {name}"));
            let place = field("path")?.strip_prefix(ARGS).with_context(|| format!("{operation}: no argument"))?;
            match (field("op")?, place) {
                ("add", "-") => args.push(field("value")?.to_owned()),
                ("remove", index) => drop(args.remove(index.parse::<usize>()?)),
                ("replace", index) => field("value")?.clone_into(&mut args[index.parse::<usize>()?]),
                ("test", index) => assert_eq!(args[index.parse::<usize>()?], field("value")?),
                other => bail!("{directory}: {other:?}"),
            }
        }
    }
    Ok(args)
}

#[test]
fn the_agent_understands_the_arguments_of_every_variant() -> Result<()> {
    accepts(&plain()?)?;
    for overlay in ["labelled", "remove", "shadow", "tight"] {
        accepts(&patched(&format!("overlays/{overlay}"))?).context(overlay)?;
    }
    assert!(accepts(&[plain()?, vec!["--no-such-option".to_owned()]].concat()).is_err());
    Ok(())
}

#[test]
fn the_agent_understands_what_the_chart_can_say() -> Result<()> {
    let chart = deploy().join("chart/affinity");
    let schema: Value = serde_json::from_str(&text(&chart.join("values.schema.json"))?)?;
    let template = text(&chart.join("templates/daemonset.yaml"))?;
    let mut count = 0;
    for option in template.lines().filter_map(|line| line.trim().strip_prefix("- --")) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let choices = match value.strip_prefix("{{ .Values.").and_then(|value| value.strip_suffix(" }}")) {
            // An address and a port, from two values.
            Some(_) | None if name == "metrics" => vec!["[::]:9977".to_owned(), "0.0.0.0:9977".to_owned()],
            // A number may be followed by its type.
            Some(path) if path.ends_with("| int64") => vec!["1000".to_owned()],
            Some(path) => choices(&schema, path),
            None if value == "{{ . }}" => vec!["eth*".to_owned()],
            None => vec![value.to_owned()],
        };
        for choice in choices {
            let option = if value.is_empty() { format!("--{name}") } else { format!("--{name}={choice}") };
            let mut args = plain()?;
            args.retain(|arg| !arg.starts_with(&format!("--{name}")));
            args.push(option.clone());
            accepts(&args).context(option)?;
            count += 1;
        }
    }
    assert!(count > 10, "the template names its options one a line");
    Ok(())
}

/// The values that the schema allows, or an example if it allows any.
fn choices(schema: &Value, path: &str) -> Vec<String> {
    let allowed = schema.pointer(&format!("/properties/{path}")).and_then(|of| of["enum"].as_array());
    let allowed = allowed.map(|all| all.iter().filter_map(Value::as_str).map(str::to_owned).collect());
    allowed.unwrap_or_else(|| vec!["example".to_owned()])
}
