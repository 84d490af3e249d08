//! Network devices with programs on them.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::attach::{Attachment, Hook};

/// A device that the programs are attached to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct DeviceView {
    /// Its name; null where it has gone or is in another network namespace.
    pub device: Option<String>,
    /// Its index.
    pub ifindex: u32,
    /// Where packets from clients are translated; null: nowhere.
    pub ingress: Option<&'static str>,
    /// Where replies to clients are translated; null: nowhere.
    pub egress: Option<&'static str>,
    /// Ids of the programs, ingress first.
    pub programs: Vec<u32>,
}

impl DeviceView {
    /// Devices by index; `name` gives a device's name.
    #[must_use]
    pub fn all(attachments: &[Attachment], name: impl Fn(u32) -> Option<String>) -> Vec<Self> {
        let mut devices: BTreeMap<u32, Vec<&Attachment>> = BTreeMap::new();
        for attachment in attachments {
            devices.entry(attachment.ifindex).or_default().push(attachment);
        }
        let views = devices.into_iter().map(|(ifindex, mut attachments)| {
            attachments.sort_by_key(|attachment| !attachment.hook.is_ingress());
            let hook = |ingress| {
                let mut hooks = attachments.iter().map(|attachment| attachment.hook);
                hooks.find(|hook| hook.is_ingress() == ingress).map(Hook::name)
            };
            Self {
                device: name(ifindex),
                ifindex,
                ingress: hook(true),
                egress: hook(false),
                programs: attachments.iter().map(|attachment| attachment.prog_id).collect(),
            }
        });
        views.collect()
    }
}
