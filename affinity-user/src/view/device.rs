//! Network devices with programs on them.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use crate::attach::{Attachment, Finding, Hook, Note, Role, cgroup::CgroupAttachment};

/// A device that the programs are attached to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DeviceView {
    /// Its name, or a cgroup's directory; null where it has gone or is in another network namespace.
    pub device: Option<String>,
    /// Its index; zero for a cgroup, where connections are translated at the socket.
    pub ifindex: u32,
    /// What it leads to: `external` out of the node, `internal` to pods; null: neither, so it was named.
    pub role: Option<&'static str>,
    /// Where packets from clients are translated, in the order that they get there.
    pub ingress: Vec<&'static str>,
    /// Where replies to clients are translated; null: nowhere.
    pub egress: Option<&'static str>,
    /// Ids of the programs, ingress first.
    pub programs: Vec<u32>,
    /// Why it has this role; null where it has gone.
    pub why: Option<String>,
    /// Why XDP is not where the policy has it, or what it cannot do there; null: nothing to say.
    pub note: Option<String>,
}

impl DeviceView {
    /// Devices by index; `name` gives a device's name, `roles` what each leads to, `notes` what was noted of it.
    #[must_use]
    pub fn all(
        attachments: &[Attachment],
        name: impl Fn(u32) -> Option<String>,
        roles: &BTreeMap<u32, Finding>,
        notes: &BTreeMap<u32, Note>,
    ) -> Vec<Self> {
        let mut devices: BTreeMap<u32, Vec<&Attachment>> = BTreeMap::new();
        for attachment in attachments {
            devices.entry(attachment.ifindex).or_default().push(attachment);
        }
        let views = devices.into_iter().map(|(ifindex, mut attachments)| {
            attachments.sort_by_key(|attachment| attachment.hook);
            let hooks = |ingress| {
                let hooks = attachments.iter().map(|attachment| attachment.hook);
                hooks.filter(move |hook| hook.is_ingress() == ingress).map(Hook::name)
            };
            let finding = roles.get(&ifindex);
            Self {
                device: name(ifindex),
                ifindex,
                role: finding.and_then(|finding| finding.role).map(Role::name),
                why: finding.map(|finding| finding.why.to_string()),
                ingress: hooks(true).collect(),
                egress: hooks(false).next(),
                programs: attachments.iter().map(|attachment| attachment.prog_id).collect(),
                note: notes.get(&ifindex).map(Note::to_string),
            }
        });
        views.collect()
    }

    /// The cgroups that the programs for sockets are on; `directory` finds a cgroup by its id.
    #[must_use]
    pub fn cgroups(attachments: &[CgroupAttachment], directory: impl Fn(u64) -> Option<PathBuf>) -> Vec<Self> {
        let mut cgroups: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for attachment in attachments {
            cgroups.entry(attachment.cgroup).or_default().push(attachment.prog_id);
        }
        let view = |(cgroup, programs)| Self {
            device: match directory(cgroup) {
                Some(path) => Some(path.display().to_string()),
                // It is there, but under no mount that this process sees.
                None if cgroup != 0 => Some(format!("cgroup {cgroup}")),
                None => None,
            },
            ifindex: 0,
            role: None,
            why: None,
            ingress: vec!["socket"],
            egress: Some("socket"),
            programs,
            note: None,
        };
        cgroups.into_iter().map(view).collect()
    }
}
