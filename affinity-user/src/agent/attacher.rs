//! Keeps the devices attached that the user named by patterns.
//!
//! Each round compares all devices with all attachments, so that it does not matter what happened in between: devices
//! came, went, were renamed, or came back under their old name.

use std::collections::{BTreeMap, BTreeSet};

use glob::Pattern;
use tracing::{error, info, warn};

use crate::{
    attach::{self, AttachError, Attached, Device, Framing, Hook},
    load::PinDir,
};

/// A pattern of `--device` makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("--device {pattern}: {source}")]
pub struct PatternError {
    pattern: String,
    source: glob::PatternError,
}

/// The devices that are attached, and those that should be.
#[derive(Debug)]
pub(super) struct Attacher {
    pins: PinDir,
    patterns: Vec<Pattern>,
    options: attach::Options,
    /// By index; what this process attached or found attached.
    attached: BTreeMap<u32, (String, Vec<Hook>)>,
    /// What could not be attached, and the reason that was logged.
    failed: BTreeMap<u32, String>,
}

impl Attacher {
    pub(super) fn new(pins: PinDir, patterns: &[String], options: attach::Options) -> Result<Self, PatternError> {
        let compile = |pattern: &String| {
            Pattern::new(pattern).map_err(|source| PatternError { pattern: pattern.clone(), source })
        };
        let patterns = patterns.iter().map(compile).collect::<Result<_, _>>()?;
        Ok(Self { pins, patterns, options, attached: BTreeMap::new(), failed: BTreeMap::new() })
    }

    /// The patterns that no device matches.
    pub(super) fn without_device(&self, devices: &[Device]) -> Vec<String> {
        let unmatched = |pattern: &&Pattern| !devices.iter().any(|device| pattern.matches(&device.name));
        self.patterns.iter().filter(unmatched).map(|pattern| pattern.as_str().to_owned()).collect()
    }

    /// Whether a device is meant by its very name.
    fn is_named(&self, device: &Device) -> bool {
        self.patterns.iter().any(|pattern| pattern.as_str() == device.name)
    }

    fn is_meant(&self, device: &Device) -> bool {
        // A pattern means what can be attached; only a name insists.
        let possible = device.framing != Framing::Other || self.is_named(device);
        possible && self.patterns.iter().any(|pattern| pattern.matches(&device.name))
    }

    /// Brings the attachments in step with the devices, and logs what changes. Returns the first failure of a device that
    /// the user named.
    ///
    /// # Errors
    /// [`AttachError`] where the attachments cannot be listed or cleaned up.
    pub(super) fn reconcile(&mut self, devices: &[Device]) -> Result<Option<AttachError>, AttachError> {
        let present: BTreeSet<u32> = devices.iter().map(|device| device.index).collect();
        self.failed.retain(|index, _| present.contains(index));
        let gone: Vec<u32> = self.attached.keys().filter(|index| !present.contains(index)).copied().collect();
        for index in gone {
            if let Some((name, _)) = self.attached.remove(&index) {
                info!("{name}: has gone");
            }
        }
        attach::prune(&self.pins)?;
        let mut failure = None;
        for device in devices {
            if self.is_meant(device) {
                let failed = self.attach(device);
                failure = failure.or(failed.filter(|_| self.is_named(device)));
            } else if self.attached.remove(&device.index).is_some() {
                info!("{}: renamed, and no longer meant: detaching", device.name);
                attach::detach(&self.pins, Some(device.index))?;
            }
        }
        Ok(failure)
    }

    fn attach(&mut self, device: &Device) -> Option<AttachError> {
        if let Some((name, _)) = self.attached.get_mut(&device.index) {
            name.clone_from(&device.name);
            return None;
        }
        match attach::attach(&self.pins, device, self.options) {
            Ok(Attached { hooks, refused }) => {
                for error in &refused {
                    info!("{error}");
                }
                if refused.is_empty() {
                    info!("{}: attached: {}", device.name, ways(&hooks));
                } else {
                    warn!("{}: attached: {}, for want of better", device.name, ways(&hooks));
                }
                self.failed.remove(&device.index);
                self.attached.insert(device.index, (device.name.clone(), hooks));
                None
            }
            Err(error) => {
                let text = error.to_string();
                if self.failed.insert(device.index, text.clone()).as_ref() != Some(&text) {
                    error!("{text}");
                }
                Some(error)
            }
        }
    }

    /// The attached devices, for people: "eth0: xdp native, cni0: tc".
    pub(super) fn summary(&self) -> (usize, String) {
        let devices: Vec<_> = self.attached.values().map(|(name, hooks)| format!("{name}: {}", ways(hooks))).collect();
        (devices.len(), devices.join(", "))
    }
}

/// How packets of clients come in; how replies leave is always TC.
fn ways(hooks: &[Hook]) -> &'static str {
    match hooks.iter().find(|hook| hook.is_ingress()) {
        Some(Hook::XdpNative) => "xdp native",
        Some(Hook::XdpGeneric) => "xdp generic",
        Some(Hook::TcxIngress) => "tc",
        Some(Hook::ClsactIngress) => "tc by clsact",
        Some(Hook::TcxEgress | Hook::ClsactEgress) | None => "replies only",
    }
}
