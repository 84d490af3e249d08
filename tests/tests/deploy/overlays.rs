//! The variants of `deploy/overlays`: the contents of their patches and, if `kubectl` is installed, the result.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use serde_json::{Value, json};

use super::objects::{Kustomization, Objects, container, deploy, strict, text};

const OVERLAYS: [&str; 4] = ["labelled", "remove", "shadow", "tight"];

const DIRECTORIES: [&str; 6] =
    ["", "base", "overlays/labelled", "overlays/remove", "overlays/shadow", "overlays/tight"];

/// The objects that `kubectl apply -k` would send for a directory below `deploy/`.
fn rendered(directory: &str) -> Result<Objects> {
    let output = Command::new("kubectl").arg("kustomize").arg(deploy().join(directory)).output().context("kubectl")?;
    ensure!(output.status.success(), "kubectl kustomize: {}", String::from_utf8_lossy(&output.stderr));
    Objects::of(str::from_utf8(&output.stdout)?)
}

fn tight_patch() -> Result<DaemonSet> {
    let path = deploy().join("overlays/tight/daemonset.yaml");
    let mut patch = serde_saphyr::from_str(&text(&path)?)?;
    without_deletions(&mut patch);
    strict(patch).context("the patch of the tight variant")
}

/// Removes the list items that a patch deletes, because their marker is no field of the API.
fn without_deletions(patch: &mut Value) {
    match patch {
        Value::Array(items) => {
            items.retain(|item| item["$patch"] != "delete");
            items.iter_mut().for_each(without_deletions);
        }
        Value::Object(fields) => fields.values_mut().for_each(without_deletions),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn every_file_of_deploy_is_known_to_a_test() -> Result<()> {
    let mut files = BTreeSet::new();
    for directory in DIRECTORIES {
        for entry in std::fs::read_dir(deploy().join(directory))? {
            let path = entry?.path();
            if path.is_file() {
                files.insert(path.strip_prefix(deploy())?.display().to_string());
            }
        }
    }
    let known = [
        "Containerfile",
        "affinity.yaml",
        "base/daemonset.yaml",
        "base/kustomization.yaml",
        "base/namespace.yaml",
        "base/rbac.yaml",
        "kustomization.yaml",
        "overlays/labelled/kustomization.yaml",
        "overlays/remove/kustomization.yaml",
        "overlays/shadow/kustomization.yaml",
        "overlays/tight/daemonset.yaml",
        "overlays/tight/kustomization.yaml",
    ];
    assert_eq!(files.iter().map(String::as_str).collect::<Vec<_>>(), known);
    let overlays: BTreeSet<_> = std::fs::read_dir(deploy().join("overlays"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    assert_eq!(overlays, OVERLAYS.map(str::to_owned).into());
    Ok(())
}

#[test]
fn overlays_change_the_base_and_nothing_beside_it() -> Result<()> {
    for directory in DIRECTORIES {
        let kustomization = Kustomization::of(directory)?;
        assert_eq!(kustomization.api_version, "kustomize.config.k8s.io/v1beta1");
        assert_eq!(kustomization.kind, "Kustomization");
        for resource in &kustomization.resources {
            let path = deploy().join(directory).join(resource);
            ensure!(path.exists(), "{directory}: {}", path.display());
        }
    }
    let base = Objects::of_file(&deploy().join("affinity.yaml"))?.daemonset;
    for overlay in OVERLAYS {
        let kustomization = Kustomization::of(&format!("overlays/{overlay}"))?;
        let base_of = if overlay == "remove" { "../labelled" } else { "../../base" };
        assert_eq!(kustomization.resources, [base_of]);
        ensure!(!kustomization.patches.is_empty(), "{overlay}: no patch");
        for patch in &kustomization.patches {
            match (&patch.path, &patch.patch, &patch.target) {
                (Some(path), None, None) => assert_eq!((overlay, path.as_str()), ("tight", "daemonset.yaml")),
                (None, Some(_), Some(target)) => {
                    assert_eq!((target.kind.as_str(), Some(&target.name)), ("DaemonSet", base.metadata.name.as_ref()));
                }
                other => bail!("{overlay}: {other:?}"),
            }
        }
    }
    let tight = tight_patch()?;
    assert_eq!((&tight.metadata.name, &tight.metadata.namespace), (&base.metadata.name, &base.metadata.namespace));
    assert_eq!(container(&tight).name, container(&base).name);
    Ok(())
}

#[test]
fn overlays_that_change_an_argument_change_nothing_else() -> Result<()> {
    let args = "/spec/template/spec/containers/0/args";
    let add = |value: &str| json!([{"op": "add", "path": format!("{args}/-"), "value": value}]);
    let services = |op: &str, value: &str| json!({"op": op, "path": format!("{args}/2"), "value": value});
    let labelled = json!([services("test", "--services=affinity"), services("replace", "--services=labelled")]);
    for (overlay, expected) in
        [("labelled", labelled), ("remove", add("--detach-on-exit")), ("shadow", add("--shadow"))]
    {
        let kustomization = Kustomization::of(&format!("overlays/{overlay}"))?;
        let patch = kustomization.patches.first().and_then(|patch| patch.patch.as_deref()).context("no patch")?;
        assert_eq!(serde_saphyr::from_str::<Value>(patch)?, expected, "{overlay}");
    }
    Ok(())
}

#[test]
fn the_tight_variant_has_the_capabilities_that_are_needed_and_nothing_else() -> Result<()> {
    let patch = tight_patch()?;
    let context = container(&patch).security_context.as_ref().context("no security context")?;
    let capabilities = context.capabilities.as_ref().context("no capabilities")?;
    assert_eq!(capabilities.drop.as_deref(), Some(["ALL".to_owned()].as_slice()));
    // `lab_deploy` runs the agent with these, and with one fewer.
    assert_eq!(capabilities.add.as_deref().unwrap_or_default(), affinity_tests::lab::CAPABILITIES);
    assert_eq!(context.privileged, Some(false));
    assert_eq!(context.allow_privilege_escalation, Some(false));
    assert_eq!(context.read_only_root_filesystem, Some(true));
    let seccomp = context.seccomp_profile.as_ref().context("no seccomp profile")?;
    assert_eq!(seccomp.type_, "RuntimeDefault");
    // The API server rejects Bidirectional in a container that is not privileged.
    for mount in container(&patch).volume_mounts.iter().flatten() {
        assert_eq!(mount.mount_propagation.as_deref(), Some("HostToContainer"), "{}", mount.name);
    }
    Ok(())
}

#[test]
#[ignore = "needs kubectl"]
fn kubectl_renders_the_directory_as_the_single_file() -> Result<()> {
    let single = Objects::of_file(&deploy().join("affinity.yaml"))?;
    assert_eq!(rendered("")?, single);
    Ok(())
}

#[test]
#[ignore = "needs kubectl"]
fn kubectl_renders_the_overlays_as_their_patches_say() -> Result<()> {
    let single = Objects::of_file(&deploy().join("affinity.yaml"))?;
    let args = |objects: &Objects| objects.container().args.clone().unwrap_or_default();
    let plain = args(&single);
    let with = |arg: &str| [plain.clone(), vec![arg.to_owned()]].concat();
    assert_eq!(args(&rendered("overlays/shadow")?), with("--shadow"));
    let labelled: Vec<_> = plain.iter().map(|arg| arg.replace("--services=affinity", "--services=labelled")).collect();
    assert_eq!(args(&rendered("overlays/labelled")?), labelled);
    assert_eq!(args(&rendered("overlays/remove")?), [labelled, vec!["--detach-on-exit".to_owned()]].concat());

    let tight = rendered("overlays/tight")?;
    let without_sockets = plain.iter().filter(|arg| !arg.starts_with("--cgroup="));
    let without_sockets = without_sockets.map(|arg| arg.replace("--socket=auto", "--socket=off"));
    assert_eq!(args(&tight), without_sockets.collect::<Vec<_>>());
    assert_eq!(tight.container().security_context, container(&tight_patch()?).security_context);
    let mounts = |objects: &Objects| -> BTreeSet<(String, String)> {
        let mounts = objects.container().volume_mounts.clone().unwrap_or_default();
        mounts.into_iter().map(|mount| (mount.mount_path, mount.mount_propagation.unwrap_or_default())).collect()
    };
    let of_node = [("/run/affinity", ""), ("/sys/fs/bpf", "HostToContainer")];
    assert_eq!(mounts(&tight), of_node.map(|(path, how)| (path.to_owned(), how.to_owned())).into());
    let volumes = tight.pod().volumes.iter().flatten().map(|volume| volume.name.as_str());
    assert_eq!(volumes.collect::<BTreeSet<_>>(), ["bpf", "run"].into());
    Ok(())
}
