//! Keeps devices attached: those that the user named by patterns, or, without patterns, those through which packets for
//! frontends can enter.
//!
//! Each round compares all devices with all attachments, so it does not matter what happened in between: devices came, went,
//! were renamed, or came back under their old name. A discovered device stays attached while it exists: a default route that is
//! missing for a moment must not break connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, TryRecvError},
    },
};

use glob::Pattern;
use tracing::{error, info, warn};

use super::Options;
use crate::{
    attach::{
        self, AttachError, Attached, Device, Devices, Finding, Framing, Hook, Note, OtherEnd, Why, XdpPolicy,
        device_flags::AttachedDevice, device_name, roles,
    },
    desired::Services,
    pins::PinDir,
    threads::Worker,
};

/// A pattern of `--device` or `--xdp-device` is invalid.
#[derive(Debug, thiserror::Error)]
#[error("{option} {pattern}: {source}")]
pub struct PatternError {
    option: &'static str,
    pattern: String,
    source: glob::PatternError,
}

/// The devices of this namespace, as they were at one moment.
pub(super) struct DeviceSnapshot {
    devices: Vec<Device>,
    /// By index; empty if they are not needed.
    roles: BTreeMap<u32, Finding>,
}

impl DeviceSnapshot {
    /// Lists all devices, and determines their roles if an attacher `needs_roles`.
    ///
    /// # Errors
    /// The system's error.
    pub(super) async fn at(devices: &mut Devices, needs_roles: bool) -> io::Result<Self> {
        let list = devices.list().await?;
        let roles = if needs_roles { roles(&list, &devices.network().await?) } else { BTreeMap::new() };
        Ok(Self { devices: list, roles })
    }
}

/// The progress of a reconciliation.
pub(super) struct Progress {
    /// Whether all devices were handled.
    pub(super) is_complete: bool,
    /// The first failure of a device that the user named.
    pub(super) failure: Option<AttachError>,
}

impl Default for Progress {
    fn default() -> Self {
        Self { is_complete: true, failure: None }
    }
}

/// How many devices are attached before newer snapshots are taken into account. The kernel waits for a grace period at each
/// hook, so this many take about half a second.
const AT_ONCE: usize = 32;

/// The devices that are attached, and those that should be.
#[derive(Debug)]
pub(super) struct Attacher {
    pins: PinDir,
    /// Empty: devices are discovered.
    patterns: Vec<Pattern>,
    /// The devices that get XDP. Empty: [`attach::Options`] decide.
    for_xdp: Vec<Pattern>,
    options: attach::Options,
    /// By index; what this process attached or found attached.
    attached: BTreeMap<u32, AttachedState>,
    /// Devices that could not be attached, by index, and the reason that was logged.
    failed: BTreeMap<u32, String>,
    /// Attachments that were removed, until they are restored.
    lost: BTreeSet<u32>,
}

/// A device that is attached.
#[derive(Debug)]
struct AttachedState {
    name: String,
    hooks: Vec<Hook>,
    /// Why there is no XDP on it.
    note: Option<Note>,
    /// The same, if the device's surroundings rule it out: these may change.
    ruled_out: Option<Note>,
}

impl Attacher {
    pub(super) fn new(pins: PinDir, options: &Options) -> Result<Self, PatternError> {
        let compile = |option, patterns: &[String]| {
            let compile = |pattern: &String| {
                Pattern::new(pattern).map_err(|source| PatternError { option, pattern: pattern.clone(), source })
            };
            patterns.iter().map(compile).collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            pins,
            patterns: compile("--device", &options.devices)?,
            for_xdp: compile("--xdp-device", &options.xdp_devices)?,
            options: options.attach,
            attached: BTreeMap::new(),
            failed: BTreeMap::new(),
            lost: BTreeSet::new(),
        })
    }

    /// The options for a device.
    fn options(&self, device: &Device) -> attach::Options {
        if self.for_xdp.is_empty() {
            self.options
        } else if self.for_xdp.iter().any(|pattern| pattern.matches(&device.name)) {
            attach::Options { any_kind: true, ..self.options }
        } else {
            attach::Options { xdp: XdpPolicy::Off, ..self.options }
        }
    }

    /// Whether devices are discovered rather than named.
    pub(super) const fn finds(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Whether the roles of devices are needed.
    pub(super) const fn needs_roles(&self) -> bool {
        self.finds() || self.options.redirect
    }

    /// Whether devices should be discovered, and none was.
    pub(super) fn finds_none(&self, snapshot: &DeviceSnapshot) -> bool {
        self.finds() && snapshot.roles.values().all(|finding| finding.role.is_none())
    }

    /// The patterns that no device matches.
    pub(super) fn without_device(&self, snapshot: &DeviceSnapshot) -> Vec<String> {
        let unmatched = |pattern: &&Pattern| !snapshot.devices.iter().any(|device| pattern.matches(&device.name));
        self.patterns.iter().filter(unmatched).map(|pattern| pattern.as_str().to_owned()).collect()
    }

    /// Whether a pattern is exactly the device's name.
    fn is_named(&self, device: &Device) -> bool {
        self.patterns.iter().any(|pattern| pattern.as_str() == device.name)
    }

    fn is_meant(&self, device: &Device, snapshot: &DeviceSnapshot) -> bool {
        if self.finds() {
            let has_role = snapshot.roles.get(&device.index).is_some_and(|finding| finding.role.is_some());
            return has_role || self.attached.contains_key(&device.index) || self.lost.contains(&device.index);
        }
        // A pattern covers only devices that can be attached. An exact name always counts.
        let possible = device.framing != Framing::Other || self.is_named(device);
        possible && self.patterns.iter().any(|pattern| pattern.matches(&device.name))
    }

    /// Brings the attachments in step with the devices, and logs changes. Devices that lead out of the node are first. The
    /// number of new attachments is bounded, because each one takes the kernel a while.
    ///
    /// # Errors
    /// [`AttachError`] if the attachments cannot be listed or cleaned up.
    pub(super) fn reconcile(&mut self, snapshot: &DeviceSnapshot) -> Result<Progress, AttachError> {
        self.forget(&snapshot.devices.iter().map(|device| device.index).collect())?;
        self.notice_losses()?;
        let mut progress = Progress::default();
        let mut attempts = 0;
        let order = |device: &&Device| snapshot.roles.get(&device.index).and_then(|finding| finding.role);
        let mut devices: Vec<_> = snapshot.devices.iter().collect();
        devices.sort_by_key(|device| (order(device).is_none(), order(device)));
        for device in devices {
            if self.is_meant(device, snapshot) {
                if self.is_held(device) {
                    continue;
                }
                if attempts == AT_ONCE {
                    progress.is_complete = false;
                    break;
                }
                attempts += usize::from(!self.failed.contains_key(&device.index));
                let failure = self.attach(device, snapshot.roles.get(&device.index));
                progress.failure = progress.failure.or(failure.filter(|_| self.is_named(device)));
            } else if self.attached.remove(&device.index).is_some() {
                info!("{}: renamed, and no longer selected: detaching", device.name);
                attach::detach(&self.pins, Some(device.index))?;
            }
        }
        for loser in attach::device_flags::publish(&self.pins, &self.attached_devices(snapshot))? {
            if let Some(held) = self.attached.get(&loser) {
                warn!("{}: {}", held.name, Note::AnswersLost);
            }
        }
        Ok(progress)
    }

    /// Whether a device is attached as it should be. It no longer is if a VLAN device on it has come or gone.
    fn is_held(&mut self, device: &Device) -> bool {
        let ruled_out = attach::rules_out_xdp(device, self.options(device));
        let Some(held) = self.attached.get_mut(&device.index) else { return false };
        held.name.clone_from(&device.name);
        held.ruled_out == ruled_out
    }

    fn attached_devices(&self, snapshot: &DeviceSnapshot) -> Vec<AttachedDevice<'_>> {
        let attached = |device: &Device| {
            let AttachedState { hooks, note, .. } = self.attached.get(&device.index)?;
            let leads_to_pod = snapshot.roles.get(&device.index).is_some_and(|finding| finding.why == Why::PodSide);
            let controller = device.controller;
            let mac_of = |index| snapshot.devices.iter().find(|device| device.index == index)?.mac;
            let macs = device.mac.map(|own| [own, controller.and_then(mac_of).unwrap_or(own)]);
            let is_pair = device.kind.as_deref() == Some("veth");
            let below = match device.other_end {
                OtherEnd::Here(index) if device.kind.as_deref() == Some("vlan") => Some(index),
                OtherEnd::None | OtherEnd::Here(_) | OtherEnd::Elsewhere => None,
            };
            Some(AttachedDevice {
                ifindex: device.index,
                hooks,
                leads_to_pod,
                controller,
                below,
                macs,
                is_pair,
                note: *note,
            })
        };
        snapshot.devices.iter().filter_map(attached).collect()
    }

    /// As [`Attacher::reconcile`], until all devices were handled. Returns the first failure of a device that the user named.
    ///
    /// # Errors
    /// As [`Attacher::reconcile`].
    pub(super) fn reconcile_all(&mut self, snapshot: &DeviceSnapshot) -> Result<Option<AttachError>, AttachError> {
        loop {
            let Progress { is_complete, failure } = self.reconcile(snapshot)?;
            if is_complete || failure.is_some() {
                return Ok(failure);
            }
        }
    }

    /// Forgets attachments with a removed pin or link, so that they are restored.
    fn notice_losses(&mut self) -> Result<(), AttachError> {
        for (index, AttachedState { name, hooks, .. }) in &self.attached {
            let there = attach::hooks_of(&self.pins, *index)?;
            if let Some(missing) = hooks.iter().find(|hook| !there.contains(hook)) {
                warn!("{name}: {missing} had been detached; attaching it again");
                self.lost.insert(*index);
            }
        }
        self.attached.retain(|index, _| !self.lost.contains(index));
        Ok(())
    }

    /// Forgets devices that have gone, and removes their pins.
    fn forget(&mut self, present: &BTreeSet<u32>) -> Result<(), AttachError> {
        self.failed.retain(|index, _| present.contains(index));
        self.lost.retain(|index| present.contains(index));
        let gone = self.attached.extract_if(.., |index, _| !present.contains(index));
        for (_, AttachedState { name, .. }) in gone {
            info!("{name}: device removed");
        }
        attach::prune(&self.pins, present)?;
        Ok(())
    }

    fn attach(&mut self, device: &Device, found: Option<&Finding>) -> Option<AttachError> {
        match attach::attach(&self.pins, device, self.options(device)) {
            Ok(Attached { hooks, refused, note }) => {
                for error in &refused {
                    info!("{error}");
                }
                let role = found.and_then(|found| found.role.map(|role| format!(" ({}: {})", role.name(), found.why)));
                let role = role.unwrap_or_default();
                match note {
                    None => info!("{}: attached: {}{role}", device.name, ways(&hooks)),
                    Some(note) => warn!("{}: attached: {}{role}: {note}", device.name, ways(&hooks)),
                }
                self.failed.remove(&device.index);
                self.lost.remove(&device.index);
                let ruled_out = attach::rules_out_xdp(device, self.options(device));
                self.attached.insert(device.index, AttachedState { name: device.name.clone(), hooks, note, ruled_out });
                None
            }
            // The device was removed meanwhile; the next snapshot will not contain it.
            Err(_) if device_name(device.index).is_none() => None,
            Err(error) => {
                let text = error.to_string();
                if self.failed.insert(device.index, text.clone()).as_ref() != Some(&text) {
                    error!("{text}");
                }
                Some(error)
            }
        }
    }

    /// Logs other programs that handle packets on the attached devices, and kube-proxy's rules in this network namespace.
    pub(super) fn tell_of_others(&self, services: Services) {
        let devices = self.attached.iter().map(|(index, held)| (*index, held.name.clone())).collect();
        let lines = attach::others::programs(&self.pins, &devices);
        for line in lines.iter().take(NAMED) {
            warn!("{line}");
        }
        if lines.len() > NAMED {
            warn!("and {} more programs", lines.len() - NAMED);
        }
        let Some(way) = attach::others::kube_proxy() else { return };
        if services == Services::All {
            warn!(
                "kube-proxy's rules ({way}) are present, although affinity handles all services: remove them once no connection \
                 needs them (`kube-proxy --cleanup`)"
            );
        } else {
            info!("kube-proxy's rules ({way}) are present: they handle the services that affinity does not handle");
        }
    }

    /// The devices that are attached now.
    pub(super) fn summary(&self) -> Summary {
        let first = self.attached.values().take(NAMED);
        let mut names: Vec<_> = first.map(|held| format!("{}: {}", held.name, ways(&held.hooks))).collect();
        names.extend((self.attached.len() > NAMED).then(|| "...".to_owned()));
        let lost = self.lost.first().map(|index| {
            let why = self.failed.get(index).map_or("attaching them again", String::as_str);
            let name = device_name(*index).unwrap_or_else(|| format!("device {index}"));
            format!("{name}: its programs were detached: {why}")
        });
        Summary { number: self.attached.len(), names: names.join(", "), lost }
    }
}

/// The attached devices, as text.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary {
    /// How many.
    pub(super) number: usize,
    /// The first of them: "eth0: xdp native, cni0: tc".
    pub(super) names: String,
    /// Removed attachments that could not be restored, in one line.
    pub(super) lost: Option<String>,
}

/// How many devices a summary names.
const NAMED: usize = 8;

/// An attacher on its own thread, so that nothing else waits for the kernel.
pub(super) struct Attaching {
    /// A request without a snapshot: check the attachments again, with the last snapshot.
    worker: Worker<Option<DeviceSnapshot>>,
    needs_roles: bool,
    summary: Arc<Mutex<Summary>>,
}

impl Attaching {
    /// Moves `attacher` to its own thread.
    ///
    /// # Errors
    /// The system's error if no thread can be started.
    pub(super) fn start(mut attacher: Attacher) -> io::Result<Self> {
        let needs_roles = attacher.needs_roles();
        let summary = Arc::new(Mutex::new(attacher.summary()));
        let shared = Arc::clone(&summary);
        let worker = Worker::start("attacher", move |snapshots| attacher.follow(snapshots, &shared))?;
        Ok(Self { worker, needs_roles, summary })
    }

    /// The devices that are attached, as of the last change.
    pub(super) fn summary(&self) -> Summary {
        self.summary.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes the thread reconcile the attachments with the current devices.
    ///
    /// # Errors
    /// The system's error if they cannot be listed.
    pub(super) async fn keep_up(&self, devices: &mut Devices) -> io::Result<()> {
        let snapshot = DeviceSnapshot::at(devices, self.needs_roles).await?;
        self.worker.send(Some(snapshot))
    }

    /// Makes the thread restore removed attachments. It uses the last snapshot, because listing devices with their routes may
    /// take long.
    ///
    /// # Errors
    /// If the thread has ended.
    pub(super) fn repair(&self) -> io::Result<()> {
        self.worker.send(None)
    }

    /// Ends the thread, after its current round.
    pub(super) fn stop(&mut self) {
        self.worker.stop();
    }
}

impl Attacher {
    /// Reconciles with the newest snapshot until the channel closes.
    fn follow(&mut self, snapshots: &Receiver<Option<DeviceSnapshot>>, summary: &Mutex<Summary>) {
        let mut last = None;
        while let Ok(next) = snapshots.recv() {
            last = next.or(last);
            while newest(snapshots, &mut last) {
                let Some(snapshot) = &last else { break };
                let progress = self.reconcile(snapshot);
                *summary.lock().unwrap_or_else(PoisonError::into_inner) = self.summary();
                match progress {
                    Ok(Progress { is_complete: false, .. }) => {}
                    Ok(_) => break,
                    Err(error) => {
                        error!("{error}");
                        break;
                    }
                }
            }
        }
    }
}

/// Takes the newest waiting snapshot. False if the agent ends.
fn newest(snapshots: &Receiver<Option<DeviceSnapshot>>, last: &mut Option<DeviceSnapshot>) -> bool {
    loop {
        match snapshots.try_recv() {
            Ok(newer) => *last = newer.or(last.take()),
            Err(TryRecvError::Empty) => return true,
            Err(TryRecvError::Disconnected) => return false,
        }
    }
}

/// How packets from clients enter. Replies always leave through TC.
fn ways(hooks: &[Hook]) -> &'static str {
    match hooks.iter().find(|hook| hook.is_ingress()) {
        Some(Hook::XdpNative) => "xdp native",
        Some(Hook::XdpGeneric) => "xdp generic",
        Some(Hook::TcxIngress) => "tc",
        Some(Hook::ClsactIngress) => "tc by clsact",
        Some(Hook::TcxEgress | Hook::ClsactEgress) | None => "replies only",
    }
}
