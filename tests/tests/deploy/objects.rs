//! The documents of `deploy/`, decoded as an API server would decode them.

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, Namespace, PodSpec, ResourceQuota, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The directory `deploy/`.
pub(crate) fn deploy() -> PathBuf {
    root().join("deploy")
}

/// The repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this package is a directory of the repository").to_owned()
}

/// A file's text.
pub(crate) fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// All installed objects: one of each kind.
#[derive(Debug, PartialEq)]
pub(crate) struct Objects {
    pub namespace: Namespace,
    pub quota: ResourceQuota,
    pub account: ServiceAccount,
    pub role: ClusterRole,
    pub binding: ClusterRoleBinding,
    pub daemonset: DaemonSet,
}

impl Objects {
    /// The objects in a file.
    pub(crate) fn of_file(path: &Path) -> Result<Self> {
        Self::of(&text(path)?).with_context(|| path.display().to_string())
    }

    /// The objects in a stream of YAML: each of the kinds once, and no other.
    pub(crate) fn of(stream: &str) -> Result<Self> {
        let mut found = Found::default();
        let documents: Vec<Value> = serde_saphyr::from_multiple(stream)?;
        documents.into_iter().filter(|document| !document.is_null()).try_for_each(|document| found.take(document))?;
        found.all()
    }

    /// The pods that the DaemonSet creates.
    pub(crate) fn pod(&self) -> &PodSpec {
        pod(&self.daemonset)
    }

    /// Their only container.
    pub(crate) fn container(&self) -> &Container {
        container(&self.daemonset)
    }
}

pub(crate) fn pod(daemonset: &DaemonSet) -> &PodSpec {
    daemonset.spec.template.spec.as_ref().expect("a pod")
}

pub(crate) fn container(daemonset: &DaemonSet) -> &Container {
    let [container] = pod(daemonset).containers.as_slice() else { panic!("one container") };
    container
}

#[derive(Default)]
struct Found {
    namespace: Option<Namespace>,
    quota: Option<ResourceQuota>,
    account: Option<ServiceAccount>,
    role: Option<ClusterRole>,
    binding: Option<ClusterRoleBinding>,
    daemonset: Option<DaemonSet>,
}

impl Found {
    fn take(&mut self, document: Value) -> Result<()> {
        match (document["apiVersion"].as_str(), document["kind"].as_str()) {
            (Some("v1"), Some("Namespace")) => once(&mut self.namespace, document),
            (Some("v1"), Some("ResourceQuota")) => once(&mut self.quota, document),
            (Some("v1"), Some("ServiceAccount")) => once(&mut self.account, document),
            (Some("rbac.authorization.k8s.io/v1"), Some("ClusterRole")) => once(&mut self.role, document),
            (Some("rbac.authorization.k8s.io/v1"), Some("ClusterRoleBinding")) => once(&mut self.binding, document),
            (Some("apps/v1"), Some("DaemonSet")) => once(&mut self.daemonset, document),
            other => bail!("nothing of this kind is to be installed: {other:?}"),
        }
    }

    fn all(self) -> Result<Objects> {
        Ok(Objects {
            namespace: self.namespace.context("no Namespace")?,
            quota: self.quota.context("no ResourceQuota")?,
            account: self.account.context("no ServiceAccount")?,
            role: self.role.context("no ClusterRole")?,
            binding: self.binding.context("no ClusterRoleBinding")?,
            daemonset: self.daemonset.context("no DaemonSet")?,
        })
    }
}

fn once<T: DeserializeOwned>(slot: &mut Option<T>, document: Value) -> Result<()> {
    let name = format!("{} {}", document["kind"], document["metadata"]["name"]);
    let object = strict(document).with_context(|| name.clone())?;
    ensure!(slot.replace(object).is_none(), "{name}: one of its kind is there already");
    Ok(())
}

/// Decodes, and rejects fields that the type does not have: the API server would drop them silently.
pub(crate) fn strict<T: DeserializeOwned>(document: Value) -> Result<T> {
    let mut unknown = Vec::new();
    let object = serde_ignored::deserialize(document, |path| unknown.push(path.to_string()))?;
    ensure!(unknown.is_empty(), "unknown fields: {}", unknown.join(", "));
    Ok(object)
}

/// The fields of a kustomization that `deploy/` uses.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Kustomization {
    pub api_version: String,
    pub kind: String,
    pub resources: Vec<String>,
    #[serde(default)]
    pub patches: Vec<Patch>,
}

/// One change of an object, in a file or inline.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Patch {
    pub path: Option<String>,
    pub patch: Option<String>,
    pub target: Option<Target>,
}

/// The object that an inline patch changes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Target {
    pub kind: String,
    pub name: String,
}

impl Kustomization {
    /// The kustomization of a directory below `deploy/`.
    pub(crate) fn of(directory: &str) -> Result<Self> {
        let path = deploy().join(directory).join("kustomization.yaml");
        serde_saphyr::from_str(&text(&path)?).with_context(|| path.display().to_string())
    }
}
