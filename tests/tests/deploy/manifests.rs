//! The plain manifests.

use std::collections::{BTreeMap, BTreeSet};

use affinity_user::load::{mib as mib_of, sizes::DEFAULT_AT_MOST};
use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{Probe, VolumeMount};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::objects::{Kustomization, Objects, deploy, text};

const NAME_LABEL: &str = "app.kubernetes.io/name";

fn installed() -> Result<Objects> {
    Objects::of_file(&deploy().join("affinity.yaml"))
}

/// The value of an option of the agent, given as `--option=value`.
fn option<'a>(objects: &'a Objects, name: &str) -> Option<&'a str> {
    let args = objects.container().args.as_ref()?;
    args.iter().find_map(|arg| arg.strip_prefix(name)?.strip_prefix('='))
}

#[test]
fn the_single_file_is_the_base_in_one() -> Result<()> {
    let base = Kustomization::of("base")?;
    let parts: Vec<_> = base.resources.iter().map(|file| deploy().join("base").join(file)).collect();
    let joined = parts.iter().map(|part| text(part)).collect::<Result<String>>()?;
    let command = format!("cd deploy/base && cat {} > ../affinity.yaml", base.resources.join(" "));
    ensure!(text(&deploy().join("affinity.yaml"))? == joined, "to make them agree: {command}");
    assert_eq!(Kustomization::of("")?.resources, ["base"]);
    Ok(())
}

#[test]
fn names_labels_and_accounts_agree() -> Result<()> {
    let objects = installed()?;
    let namespace = objects.namespace.metadata.name.as_deref();
    assert_eq!(namespace, Some("affinity-system"));
    let Objects { namespace: _, quota, account, role, binding, daemonset } = &objects;
    for (metadata, scope) in [
        (&quota.metadata, namespace),
        (&account.metadata, namespace),
        (&daemonset.metadata, namespace),
        (&role.metadata, None),
        (&binding.metadata, None),
    ] {
        assert_eq!(metadata.namespace.as_deref(), scope, "{:?}", metadata.name);
        let labels = metadata.labels.as_ref().context("no labels")?;
        assert_eq!(labels.get(NAME_LABEL).map(String::as_str), Some("affinity"), "{:?}", metadata.name);
    }

    assert_eq!(objects.pod().service_account_name, account.metadata.name);
    assert_eq!(Some(&binding.role_ref.name), role.metadata.name.as_ref());
    let [subject] = binding.subjects.as_deref().unwrap_or_default() else { panic!("one subject") };
    assert_eq!((subject.kind.as_str(), Some(&subject.name)), ("ServiceAccount", account.metadata.name.as_ref()));
    assert_eq!(subject.namespace.as_deref(), namespace);

    let spec = &daemonset.spec;
    let labels = spec.template.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
    assert_eq!(spec.selector.match_labels.as_ref(), labels);
    assert_eq!(spec.selector.match_expressions, None);
    Ok(())
}

#[test]
fn rights_are_those_of_what_is_watched_and_reported() -> Result<()> {
    let role = installed()?.role;
    assert_eq!(role.aggregation_rule, None);
    let mut rights = BTreeSet::new();
    for rule in role.rules.unwrap_or_default() {
        assert_eq!((rule.non_resource_urls, rule.resource_names), (None, None));
        for (group, resource) in rule.api_groups.iter().flatten().zip(std::iter::repeat(rule.resources.as_deref())) {
            for resource in resource.unwrap_or_default() {
                rights.insert(format!("{group}/{resource}: {}", rule.verbs.join(" ")));
            }
        }
    }
    let expected = [
        "/nodes: get list watch",
        "/services: get list watch",
        "discovery.k8s.io/endpointslices: get list watch",
        "events.k8s.io/events: create",
    ];
    assert_eq!(rights.iter().map(String::as_str).collect::<Vec<_>>(), expected);
    Ok(())
}

#[test]
fn every_volume_is_the_nodes_and_is_mounted_where_the_agent_looks() -> Result<()> {
    let objects = installed()?;
    let mut on_node = BTreeMap::new();
    for volume in objects.pod().volumes.iter().flatten() {
        let host_path = volume.host_path.as_ref().with_context(|| format!("{}: not the node's", volume.name))?;
        on_node.insert(volume.name.as_str(), host_path.path.as_str());
    }
    let mounts = objects.container().volume_mounts.as_deref().unwrap_or_default();
    let places: BTreeMap<_, _> = mounts.iter().map(|mount| (mount.mount_path.as_str(), mount)).collect();
    let mounted: BTreeMap<_, _> =
        places.iter().filter_map(|(place, mount)| Some((*place, *on_node.get(mount.name.as_str())?))).collect();
    assert_eq!(mounted.len(), mounts.len(), "a mount without a volume");
    let names: BTreeSet<_> = mounts.iter().map(|mount| mount.name.as_str()).collect();
    assert!(on_node.keys().all(|name| names.contains(name)), "a volume without a mount");

    let cgroup = option(&objects, "--cgroup").context("no --cgroup")?;
    assert_eq!(mounted.get(cgroup), Some(&"/sys/fs/cgroup"));
    assert_eq!(mounted.get("/run/netns"), Some(&"/run/netns"));
    // The default paths of pins and locks.
    assert_eq!(mounted.get("/sys/fs/bpf"), Some(&"/sys/fs/bpf"));
    assert_eq!(mounted.get("/run/affinity"), Some(&"/run/affinity"));
    assert_eq!(option(&objects, "--pin-dir"), None);
    let propagation = |mount: &VolumeMount| mount.mount_propagation.clone().unwrap_or_default();
    // A mount that the agent makes must reach the node.
    assert_eq!(propagation(places["/sys/fs/bpf"]), "Bidirectional");
    Ok(())
}

#[test]
fn probes_and_scrapes_meet_the_port_that_the_agent_listens_on() -> Result<()> {
    let objects = installed()?;
    let listens = option(&objects, "--metrics").and_then(|address| address.rsplit(':').next());
    let port: i32 = listens.context("no --metrics")?.parse()?;
    let container = objects.container();
    let [named] = container.ports.as_deref().unwrap_or_default() else { panic!("one port") };
    assert_eq!((named.name.as_deref(), named.container_port), (Some("metrics"), port));
    // In the node's network the two are equal, and the API server sets the second.
    assert_eq!(named.host_port, None);

    let path = |probe: &Option<Probe>| -> Result<String> {
        let request = probe.as_ref().and_then(|probe| probe.http_get.as_ref()).context("no HTTP probe")?;
        assert_eq!(request.port, IntOrString::String("metrics".to_owned()));
        request.path.clone().context("no path")
    };
    assert_eq!(path(&container.startup_probe)?, "/healthz");
    assert_eq!(path(&container.liveness_probe)?, "/healthz");
    assert_eq!(path(&container.readiness_probe)?, "/readyz");

    let spec = &objects.daemonset.spec;
    let annotations = spec.template.metadata.as_ref().and_then(|metadata| metadata.annotations.as_ref());
    let annotations = annotations.context("no annotations")?;
    assert_eq!(annotations.get("prometheus.io/port"), Some(&port.to_string()));
    assert_eq!(annotations.get("prometheus.io/scrape").map(String::as_str), Some("true"));
    Ok(())
}

/// The kernel counts the tables as the container's memory.
#[test]
fn the_memory_that_is_asked_for_holds_the_default_tables_and_an_agent() -> Result<()> {
    const AGENT_MIB: u64 = 128;
    let objects = installed()?;
    let resources = objects.container().resources.as_ref().context("no resources")?;
    assert_eq!(resources.limits, None, "a limit would have to allow for what thousands of services take");
    let memory = resources.requests.as_ref().and_then(|requests| requests.get("memory")).context("no request")?;
    let mib: u64 = memory.0.strip_suffix("Mi").context("in Mi")?.parse()?;
    assert_eq!(mib, mib_of(DEFAULT_AT_MOST) + AGENT_MIB);
    Ok(())
}

#[test]
fn it_runs_on_every_node_in_its_network_and_is_replaced_one_node_at_a_time() -> Result<()> {
    let objects = installed()?;
    let pod = objects.pod();
    assert_eq!(pod.host_network, Some(true));
    // Name resolution must not depend on a service.
    assert_eq!(pod.dns_policy.as_deref(), Some("Default"));
    assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
    let [toleration] = pod.tolerations.as_deref().unwrap_or_default() else { panic!("one toleration") };
    assert_eq!((toleration.operator.as_deref(), &toleration.key, &toleration.effect), (Some("Exists"), &None, &None));

    let spec = &objects.daemonset.spec;
    let strategy = spec.update_strategy.as_ref().context("no strategy")?;
    assert_eq!(strategy.type_.as_deref(), Some("RollingUpdate"));
    let rolling = strategy.rolling_update.as_ref().context("no strategy")?;
    // A second agent on a node would find the lock taken, and the port.
    assert_eq!(rolling.max_surge, Some(IntOrString::Int(0)));
    assert_eq!(rolling.max_unavailable, Some(IntOrString::Int(1)));
    Ok(())
}

#[test]
fn the_image_is_of_this_version_and_the_agent_knows_its_node() -> Result<()> {
    let objects = installed()?;
    let container = objects.container();
    assert_eq!(container.image.as_deref(), Some(concat!("affinity:", env!("CARGO_PKG_VERSION"))));
    assert_eq!(container.command, None, "the image's own");
    let [node] = container.env.as_deref().unwrap_or_default() else { panic!("one variable") };
    let field = node.value_from.as_ref().and_then(|from| from.field_ref.as_ref());
    assert_eq!(
        (node.name.as_str(), field.map(|field| field.field_path.as_str())),
        ("NODE_NAME", Some("spec.nodeName"))
    );
    Ok(())
}
