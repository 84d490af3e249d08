//! Network devices with programs on them.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Serialize;

use crate::attach::{Attachment, Finding, Hook, Note, Role, cgroup::CgroupAttachment};

/// A device that the programs are attached to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DeviceView {
    /// Its name, or a cgroup's directory; null if it is gone or is in another network namespace.
    pub device: Option<String>,
    /// Its index; zero for a cgroup, which translates connections at the socket.
    pub ifindex: u32,
    /// Where it leads: `external` out of the node, `internal` to pods; null: neither, so `--device` named it.
    pub role: Option<&'static str>,
    /// The hooks that translate packets from clients, in the packets' order.
    pub ingress: Vec<&'static str>,
    /// The hook that translates replies to clients; null: none.
    pub egress: Option<&'static str>,
    /// Ids of the programs, ingress first.
    pub programs: Vec<u32>,
    /// Why it has this role; null if it is gone.
    pub why: Option<String>,
    /// Why XDP is not attached where the policy asks for it, or what it cannot do there; null: no note.
    pub note: Option<String>,
}

impl DeviceView {
    /// Devices by index. `name` gives a device's name, `roles` where each leads, `notes` the notes about it.
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

    /// The cgroups to which the socket programs are attached; `directory` finds a cgroup by its id.
    #[must_use]
    pub fn cgroups(attachments: &[CgroupAttachment], directory: impl Fn(u64) -> Option<PathBuf>) -> Vec<Self> {
        let mut cgroups: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for attachment in attachments {
            cgroups.entry(attachment.cgroup).or_default().push(attachment.prog_id);
        }
        let view = |(cgroup, programs)| Self {
            device: match directory(cgroup) {
                Some(path) => Some(path.display().to_string()),
                // It exists, but no mount that is visible to this process contains it.
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
