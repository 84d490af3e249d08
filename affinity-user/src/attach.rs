//! Puts the pinned programs onto devices, and takes them off.
//!
//! An attachment is a link pinned as `links/IFINDEX-HOOK`: it lives without the agent, and says itself which device and
//! program it joins. Where the kernel has no tcx the pin holds the program instead, as a note of the clsact filter
//! that runs it. On each device there is one hook for packets from clients, and one for replies to
//! them; two for packets from clients where TC redirects what XDP has looked at.

pub mod card;
pub mod cgroup;
pub mod device_flags;
pub mod devices;
pub mod discover;
mod hook;
mod netdev;
pub mod others;

use std::{
    collections::BTreeSet,
    fmt, io, mem,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use affinity_common::names;
use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::Link,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
};

pub use self::{
    card::{Card, Note},
    devices::{Device, Devices, Framing, OtherEnd, survey},
    discover::{Finding, Network, Role, Why, roles, unserved, unserved_text},
    hook::{Hook, UnknownHook, UnknownPolicy, XdpPolicy},
    netdev::{XdpFeatures, xdp_features},
};
use crate::{
    load::{PinDir, PinError, Pinned, copy_older_flows},
    store::StoreError,
    sys::{self, SysError},
};

/// Kinds of devices that lead to pods or guests of this machine: their frames may carry partial checksums, which
/// programs at TC can handle and XDP cannot.
const INTERNAL_KINDS: [&str; 10] =
    ["veth", "bridge", "tun", "netkit", "dummy", "ifb", "macvlan", "macvtap", "ipvlan", "ipvtap"];

/// Where our clsact filters are: first.
const CLSACT_PRIORITY: u16 = 1;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 0xaff);

/// A device cannot be attached, or taken off.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Its frames are not what the programs read.
    #[error("{0}: its frames have no Ethernet header")]
    NotEthernet(String),
    /// The driver refused to run XDP programs.
    #[error("{device}: {hook}: {note} ({source}; {card})")]
    NoXdp {
        /// The device.
        device: String,
        /// Where.
        hook: Hook,
        /// Why, as far as it can be told.
        note: Note,
        /// What the card is like.
        card: Card,
        /// The kernel's answer.
        source: io::Error,
    },
    /// XDP was insisted on.
    #[error("{0}: use --xdp auto, which takes TC there")]
    NativeOnly(Box<Self>),
    /// The kernel refused.
    #[error("{device}: {hook}: {source}")]
    Refused {
        /// The device.
        device: String,
        /// Where.
        hook: Hook,
        /// Its answer.
        source: io::Error,
    },
    /// The clsact filter could not be changed.
    #[error("{device}: {hook}: {source}")]
    Clsact {
        /// The device.
        device: String,
        /// Where.
        hook: Hook,
        /// Why.
        source: Box<ProgramError>,
    },
    /// A cgroup's directory cannot be opened, or the kernel refused.
    #[error("cgroup {cgroup}: {source}")]
    Cgroup {
        /// Its directory.
        cgroup: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// A directory that is no cgroup of version 2, nor has one mounted in it.
    #[error(
        "{} is no cgroup of version 2, and {}/unified is none either: name one with --cgroup; where the node has version 1 \
         alone, use --socket off",
        .0.display(),
        .0.display()
    )]
    NotVersion2(PathBuf),
    /// There is no cgroup to attach to.
    #[error("the root of cgroup version 2 cannot be seen: mount it, or name a cgroup with --cgroup")]
    NoCgroup,
    /// A pin could not be made or read.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map could not be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
}

impl AttachError {
    /// Why there is no XDP, where that is what it says.
    const fn note(&self) -> Option<Note> {
        if let Self::NoXdp { note, .. } = self { Some(*note) } else { None }
    }

    /// Whether it says no more than that the kernel has no tcx, as `check` does, and each device that has clsact instead.
    fn says_no_tcx(&self) -> bool {
        let Self::Refused { hook: Hook::TcxIngress | Hook::TcxEgress, source, .. } = self else { return false };
        source.raw_os_error() == Some(libc::EINVAL)
    }
}

/// How to attach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// How XDP is to be used.
    pub xdp: XdpPolicy,
    /// Whether tcx may be used where the kernel has it; otherwise clsact.
    pub tcx: bool,
    /// Whether [`XdpPolicy::Auto`] means a device of any kind.
    pub any_kind: bool,
    /// Whether devices with XDP have TC too, so that it redirects what XDP has looked at.
    pub redirect: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { xdp: XdpPolicy::default(), tcx: true, any_kind: false, redirect: false }
    }
}

/// A program on a device.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Attachment {
    /// The device's index.
    pub ifindex: u32,
    /// Where on it.
    pub hook: Hook,
    /// The program's id.
    pub prog_id: u32,
    /// The pin.
    pub path: PathBuf,
}

impl Attachment {
    /// The device's name in this network namespace; none where it has gone.
    #[must_use]
    pub fn device(&self) -> Option<String> {
        device_name(self.ifindex)
    }
}

/// The name of a device in this network namespace.
#[must_use]
pub fn device_name(ifindex: u32) -> Option<String> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::index_to_name(socket, ifindex).ok()
}

/// What is attached to a device after [`attach`], and what was tried in vain before.
#[derive(Debug)]
pub struct Attached {
    /// Its hooks: ingress, the best first; then egress.
    pub hooks: Vec<Hook>,
    /// Why better hooks could not be had.
    pub refused: Vec<AttachError>,
    /// The cause of all that: why there is no XDP although the policy has it.
    pub note: Option<Note>,
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.hooks.iter().map(|hook| hook.name()).collect();
        f.write_str(&names.join(" and "))
    }
}

/// Attaches the forward and the reverse program to a device, at the best hooks that it has. What is attached already
/// stays; what another policy had attached is taken off once its successor is there.
///
/// # Errors
/// [`AttachError`], the last one where no hook can be had.
pub fn attach(pins: &PinDir, device: &Device, options: Options) -> Result<Attached, AttachError> {
    if device.framing == Framing::Other {
        return Err(AttachError::NotEthernet(device.name.clone()));
    }
    let mut refused = Vec::new();
    // Replies first: a client whose packets are translated must not meet replies that are not.
    let egress = attach_first(pins, device, &egress_hooks(options), &mut refused)?;
    let ruled_out = rules_out_xdp(device, options);
    let ingress_hooks = ingress_hooks(device, options, ruled_out);
    let insists = |error: AttachError| {
        if error.note().is_some() { AttachError::NativeOnly(Box::new(error)) } else { error }
    };
    let ingress = attach_first(pins, device, &ingress_hooks, &mut refused).map_err(insists)?;
    let mut hooks = vec![ingress];
    if options.redirect && ingress.is_xdp() {
        hooks.push(attach_first(pins, device, &tc_ingress_hooks(options), &mut refused)?);
    }
    hooks.push(egress);
    let note = ruled_out.or_else(|| refused.iter().find_map(AttachError::note));
    refused.retain(|refusal| !refusal.says_no_tcx());
    let attached = Attached { hooks, refused, note };
    for stale in attachments_of(pins, device.index)?.iter().filter(|old| !attached.hooks.contains(&old.hook)) {
        detach_one(pins, stale)?;
    }
    Ok(attached)
}

/// What is attached to one device. Its pins have names that can be told, so it does not matter how many others there are.
fn attachments_of(pins: &PinDir, ifindex: u32) -> Result<Vec<Attachment>, AttachError> {
    let mut attachments = Vec::new();
    for hook in Hook::ALL {
        if let Some(open) = open_pin(pins.links().join(pin_name(ifindex, hook)), ifindex, hook)? {
            attachments.extend(alive(open)?);
        }
    }
    Ok(attachments)
}

/// Where a device has programs now.
///
/// # Errors
/// [`AttachError`] where a pin cannot be read.
pub fn hooks_of(pins: &PinDir, ifindex: u32) -> Result<Vec<Hook>, AttachError> {
    Ok(attachments_of(pins, ifindex)?.into_iter().map(|attachment| attachment.hook).collect())
}

fn pin_name(ifindex: u32, hook: Hook) -> String {
    format!("{ifindex}-{hook}")
}

/// The device and hook that a pin's name tells; none where this module did not make it.
fn parse_pin_name(path: &Path) -> Option<(u32, Hook)> {
    let (ifindex, hook) = path.file_name()?.to_str()?.split_once('-')?;
    Some((ifindex.parse().ok()?, hook.parse().ok()?))
}

/// Whether XDP programs are attached, and whether programs for sockets are.
///
/// # Errors
/// [`AttachError`] where the pins cannot be listed.
pub fn hooks_in_use(pins: &PinDir) -> Result<(bool, bool), AttachError> {
    let links = pins.list_links()?;
    let is_xdp = |path: &PathBuf| parse_pin_name(path).is_some_and(|(_, hook)| hook.program() == names::XDP_FORWARD);
    Ok((links.iter().any(is_xdp), links.iter().any(|path| parse_pin_name(path).is_none())))
}

/// Whether the policy has XDP on a device: not on those that lead to pods, unless it insists.
fn wants_xdp(device: &Device, options: Options) -> bool {
    let is_internal_kind = device.kind.as_deref().is_some_and(|kind| INTERNAL_KINDS.contains(&kind));
    let internal = device.framing == Framing::Loopback || is_internal_kind && !options.any_kind;
    match options.xdp {
        XdpPolicy::Native | XdpPolicy::Generic => true,
        XdpPolicy::Auto => !internal,
        XdpPolicy::Off => false,
    }
}

/// Why TC does the work on a device on which the policy has XDP. It may change while the device is attached.
#[must_use]
pub fn rules_out_xdp(device: &Device, options: Options) -> Option<Note> {
    if !wants_xdp(device, options) {
        None
    } else if options.xdp == XdpPolicy::Generic {
        Some(Note::NotGeneric)
    } else {
        // XDP would send answers without the tag: into another network. On virtual devices a tag comes beside the data
        // whatever they say, because it is the sender that put it there.
        let strips_tags = device.kind.is_some() || card::strips_tags(&device.name);
        (device.has_vlans && strips_tags).then_some(Note::StripsTags)
    }
}

/// Hooks for packets from clients, best first.
fn ingress_hooks(device: &Device, options: Options, ruled_out: Option<Note>) -> Vec<Hook> {
    let has_xdp = wants_xdp(device, options) && ruled_out.is_none();
    if has_xdp && options.xdp == XdpPolicy::Native {
        return vec![Hook::XdpNative];
    }
    has_xdp.then_some(Hook::XdpNative).into_iter().chain(tc_ingress_hooks(options)).collect()
}

fn tc_ingress_hooks(options: Options) -> Vec<Hook> {
    options.tcx.then_some(Hook::TcxIngress).into_iter().chain([Hook::ClsactIngress]).collect()
}

/// Hooks for replies to clients, best first.
fn egress_hooks(options: Options) -> Vec<Hook> {
    options.tcx.then_some(Hook::TcxEgress).into_iter().chain([Hook::ClsactEgress]).collect()
}

fn attach_first(
    pins: &PinDir,
    device: &Device,
    candidates: &[Hook],
    refused: &mut Vec<AttachError>,
) -> Result<Hook, AttachError> {
    let mut last = None;
    for &hook in candidates {
        let old = attachments_of(pins, device.index)?;
        if old.iter().any(|old| old.hook == hook) {
            refused.extend(last);
            return Ok(hook);
        }
        if let Some(rival) = old.iter().find(|old| hook.is_xdp() && old.hook.is_xdp()) {
            make_way(pins, device, rival)?;
        }
        match attach_at(pins, device, hook) {
            Ok(()) => {
                refused.extend(last);
                return Ok(hook);
            }
            Err(error @ (AttachError::Pin(_) | AttachError::Sys(_))) => return Err(error),
            Err(error) => refused.extend(last.replace(error)),
        }
    }
    Err(last.unwrap_or_else(|| AttachError::NotEthernet(device.name.clone())))
}

/// A device runs XDP in one mode at a time: takes the other mode off. TC does its work meanwhile; once XDP is there
/// again it is taken off as any hook that is not wanted.
fn make_way(pins: &PinDir, device: &Device, rival: &Attachment) -> Result<(), AttachError> {
    attach_first(pins, device, &[Hook::TcxIngress, Hook::ClsactIngress], &mut Vec::new())?;
    detach_one(pins, rival)
}

fn attach_at(pins: &PinDir, device: &Device, hook: Hook) -> Result<(), AttachError> {
    let program = pins.prog(hook.program());
    let pin = pins.links().join(pin_name(device.index, hook));
    // A pin of the same name can only be that of a link whose device has gone.
    pins.unpin(&pin)?;
    let Some((attach_type, flags)) = hook.link() else {
        set_filter(pins, &device.name, hook, true)?;
        return Ok(sys::obj_pin(sys::obj_get(&program)?.as_fd(), &pin)?);
    };
    let link = sys::link_create(sys::obj_get(&program)?.as_fd(), device.index, attach_type, flags)
        .map_err(|error| refusal(device, hook, error.source))?;
    Ok(sys::obj_pin(link.as_fd(), &pin)?)
}

fn refusal(device: &Device, hook: Hook, source: io::Error) -> AttachError {
    let name = device.name.clone();
    if !hook.is_xdp() {
        return AttachError::Refused { device: name, hook, source };
    }
    let card = Card::of(device);
    let note = card.cause(source.raw_os_error().unwrap_or(0));
    AttachError::NoXdp { device: name, hook, note, card, source }
}

/// Everything that is attached, by device and hook. Pins of devices that have gone are left out.
///
/// # Errors
/// [`AttachError`] where a pin cannot be read.
pub fn attachments(pins: &PinDir) -> Result<Vec<Attachment>, AttachError> {
    let mut attachments = Vec::new();
    for open in open_pins(pins)? {
        attachments.extend(alive(open)?);
    }
    attachments.sort();
    Ok(attachments)
}

/// The attachment of a pin; none if its device has gone or it was removed.
fn alive((pin, fd): (Attachment, OwnedFd)) -> Result<Option<Attachment>, AttachError> {
    let (ifindex, prog_id) = if pin.hook.link().is_some() {
        let info = sys::link_info(fd.as_fd())?;
        (info.ifindex, info.prog_id)
    } else if others::has_filter(pin.ifindex, pin.hook) {
        (pin.ifindex, sys::prog_info(fd.as_fd())?.id)
    } else {
        return Ok(None);
    };
    Ok((ifindex == pin.ifindex).then_some(Attachment { prog_id, ..pin }))
}

/// The pins that follow the naming of this module, not yet asked what they are.
fn open_pins(pins: &PinDir) -> Result<Vec<(Attachment, OwnedFd)>, AttachError> {
    let mut open = Vec::new();
    for path in pins.list_links()? {
        let Some((ifindex, hook)) = parse_pin_name(&path) else { continue };
        open.extend(open_pin(path, ifindex, hook)?);
    }
    Ok(open)
}

/// None where it is not there, or no longer: another process may have taken it off meanwhile.
fn open_pin(path: PathBuf, ifindex: u32, hook: Hook) -> Result<Option<(Attachment, OwnedFd)>, AttachError> {
    match sys::obj_get(&path) {
        Err(error) if error.is_not_found() => Ok(None),
        fd => Ok(Some((Attachment { ifindex, hook, prog_id: 0, path }, fd?))),
    }
}

/// Puts the programs that are pinned now into every attachment; each packet meets the old one or the new one. Removes
/// the pins of devices that have gone. Returns the number of attachments.
///
/// # Errors
/// The first [`AttachError`]; all attachments but those that failed have the new program.
pub fn upgrade(pins: &PinDir) -> Result<usize, AttachError> {
    let mut upgraded = cgroup::upgrade(pins);
    for (pin, fd) in open_pins(pins)? {
        let outcome = match upgrade_one(pins, &pin, fd.as_fd()) {
            Ok(true) => Ok(1),
            Ok(false) => pins.unpin(&pin.path).map(|()| 0).map_err(AttachError::from),
            Err(error) => Err(error),
        };
        upgraded = upgraded.and_then(|before| outcome.map(|one| before + one));
    }
    upgraded
}

/// False where the device has gone.
fn upgrade_one(pins: &PinDir, pin: &Attachment, fd: BorrowedFd<'_>) -> Result<bool, AttachError> {
    if pin.hook.link().is_none() {
        return upgrade_filter(pins, pin);
    }
    let program = sys::obj_get(&pins.prog(pin.hook.program()))?;
    match sys::link_update(fd, program.as_fd()) {
        // A link whose device has gone cannot be updated.
        Err(_) if sys::link_info(fd)?.ifindex == 0 => Ok(false),
        updated => Ok(updated.map(|()| true)?),
    }
}

/// Removes the pins of devices that have gone, and returns how many there were. The pins of devices that are `present`,
/// by index, are not looked at.
///
/// # Errors
/// [`AttachError`].
pub fn prune(pins: &PinDir, present: &BTreeSet<u32>) -> Result<usize, AttachError> {
    let mut pruned = 0;
    for path in pins.list_links()? {
        let Some((ifindex, hook)) = parse_pin_name(&path) else { continue };
        if present.contains(&ifindex) {
            continue;
        }
        let Some(open) = open_pin(path, ifindex, hook)? else { continue };
        let path = open.0.path.clone();
        // A device that has moved to another namespace is not here, and lives.
        let gone = if hook.link().is_some() { alive(open)?.is_none() } else { device_name(ifindex).is_none() };
        if gone {
            pins.unpin(&path)?;
            pruned += 1;
        }
    }
    Ok(pruned)
}

/// Takes the programs off one device, or off all, and returns what was taken off.
///
/// # Errors
/// [`AttachError`].
pub fn detach(pins: &PinDir, ifindex: Option<u32>) -> Result<Vec<Attachment>, AttachError> {
    let attachments = match ifindex {
        Some(ifindex) => attachments_of(pins, ifindex)?,
        None => attachments(pins)?,
    };
    for attachment in &attachments {
        detach_one(pins, attachment)?;
    }
    Ok(attachments)
}

/// Takes the programs off devices that had none `before`, when a start has failed. A device that had some keeps what it has
/// now: the start may have put it in the place of what was there.
///
/// # Errors
/// The first [`AttachError`]; everything else is taken off nevertheless.
pub fn detach_new(pins: &PinDir, before: &Pinned) -> Result<(), AttachError> {
    let devices: BTreeSet<u32> = before.pins().filter_map(|pin| Some(parse_pin_name(pin)?.0)).collect();
    let mut outcome = cgroup::detach_new(pins, before);
    for attachment in attachments(pins)?.iter().filter(|new| !devices.contains(&new.ifindex)) {
        outcome = outcome.and(detach_one(pins, attachment));
    }
    outcome
}

/// What became of the dataplane of another layout.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replaced {
    /// Its name: `v1`.
    pub layout: String,
    /// Links and filters that met the programs of this version.
    pub adopted: usize,
    /// Those that were taken off instead.
    pub detached: usize,
    /// Whether this version has taken over its maps, and with them its pins and connections.
    pub keeps_maps: bool,
}

/// Replaces the programs that dataplanes of other layouts have attached by those of this version, so that each packet meets
/// one of them, and removes the rest of these dataplanes.
///
/// # Errors
/// [`AttachError`] where a pin cannot be moved or removed.
pub fn replace_other_layouts(pins: &PinDir) -> Result<Vec<Replaced>, AttachError> {
    let mut replaced = Vec::new();
    for other in pins.other_layouts()? {
        let (mut adopted, mut detached) = (0, 0);
        for path in other.list_links()? {
            if adopt(pins, &path)? {
                adopted += 1;
            } else {
                detached += usize::from(detach_unknown(&path)?);
            }
        }
        if other.is_readable() {
            copy_older_flows(&other, pins)?;
        }
        other.remove_layout()?;
        replaced.push(Replaced { layout: other.layout(), adopted, detached, keeps_maps: other.is_readable() });
    }
    Ok(replaced)
}

/// Takes off and removes the dataplanes of other layouts.
///
/// # Errors
/// [`AttachError`].
pub fn detach_other_layouts(pins: &PinDir) -> Result<Vec<Replaced>, AttachError> {
    let mut removed = Vec::new();
    for other in pins.other_layouts()? {
        let mut detached = 0;
        for path in other.list_links()? {
            detached += usize::from(detach_unknown(&path)?);
        }
        other.remove_layout()?;
        removed.push(Replaced { layout: other.layout(), adopted: 0, detached, keeps_maps: false });
    }
    Ok(removed)
}

/// Makes a pin of another layout one of this layout, with the program of this version. False where it is none that this
/// version knows, where this layout has one already, or where the kernel refuses the program there.
fn adopt(pins: &PinDir, path: &Path) -> Result<bool, AttachError> {
    let Some(name) = path.file_name() else { return Ok(false) };
    let ours = pins.links().join(name);
    if ours.exists() {
        return Ok(false);
    }
    if let Some((ifindex, hook)) = parse_pin_name(path) {
        let Some((pin, fd)) = open_pin(path.to_owned(), ifindex, hook)? else { return Ok(false) };
        let moved = Attachment { path: ours.clone(), ..pin };
        pins.rename(path, &ours)?;
        if matches!(upgrade_one(pins, &moved, fd.as_fd()), Ok(true)) {
            return Ok(true);
        }
        detach_unknown(&ours)?;
        pins.unpin(&ours)?;
        return Ok(false);
    }
    cgroup::adopt(pins, path, &ours)
}

/// Takes off what a pin of another layout has attached; false where it is no link, and no filter of a device.
fn detach_unknown(path: &Path) -> Result<bool, AttachError> {
    if let Some((ifindex, hook)) = parse_pin_name(path).filter(|(_, hook)| hook.link().is_none()) {
        return device_name(ifindex).map_or(Ok(false), |device| remove_filter(&device, hook).map(|()| true));
    }
    Ok(sys::link_detach(sys::obj_get(path)?.as_fd()).is_ok())
}

/// Whether anything is attached.
///
/// # Errors
/// [`AttachError`] where a pin cannot be read.
pub fn is_attached(pins: &PinDir) -> Result<bool, AttachError> {
    Ok(!attachments(pins)?.is_empty() || !cgroup::attachments(pins)?.is_empty())
}

fn detach_one(pins: &PinDir, attachment: &Attachment) -> Result<(), AttachError> {
    if attachment.hook.is_ingress() {
        device_flags::withdraw(pins, attachment.ifindex)?;
    }
    if attachment.hook.link().is_some() {
        // The kernel would detach a link without references, but only some time after the pin has gone.
        match sys::obj_get(&attachment.path) {
            Err(error) if error.is_not_found() => {}
            link => sys::link_detach(link?.as_fd())?,
        }
    } else if let Some(device) = attachment.device() {
        remove_filter(&device, attachment.hook)?;
    }
    Ok(pins.unpin(&attachment.path)?)
}

// ---- clsact: kernels before 6.6 ----

const fn clsact_side(hook: Hook) -> TcAttachType {
    if hook.is_ingress() { TcAttachType::Ingress } else { TcAttachType::Egress }
}

fn clsact_failed(device: &str, hook: Hook) -> impl FnOnce(ProgramError) -> AttachError {
    move |source| AttachError::Clsact { device: device.to_owned(), hook, source: Box::new(source) }
}

/// Makes a device run the pinned program of `hook` by a filter: a new one, or in place of the one that is there.
fn set_filter(pins: &PinDir, device: &str, hook: Hook, new: bool) -> Result<(), AttachError> {
    let failed = |source| clsact_failed(device, hook)(source);
    let mut program = SchedClassifier::from_pin(pins.prog(hook.program())).map_err(failed)?;
    let id = if new {
        match qdisc_add_clsact(device) {
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            added => added.map_err(|error| failed(error.into()))?,
        }
        let options = NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, classid: None };
        program.attach_with_options(device, clsact_side(hook), TcAttachOptions::Netlink(options))
    } else {
        program.attach_to_link(filter(device, hook)?)
    };
    let link = id.and_then(|id| program.take_link(id)).map_err(failed)?;
    // Dropped, it would take the filter away again.
    mem::forget(link);
    Ok(())
}

fn filter(device: &str, hook: Hook) -> Result<SchedClassifierLink, AttachError> {
    SchedClassifierLink::attached(device, clsact_side(hook), CLSACT_PRIORITY, CLSACT_HANDLE, None)
        .map_err(|source| AttachError::Refused { device: device.to_owned(), hook, source })
}

fn remove_filter(device: &str, hook: Hook) -> Result<(), AttachError> {
    match filter(device, hook)?.detach() {
        // Someone has removed it, or the whole qdisc.
        Err(ProgramError::NetlinkError(error)) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
            Ok(())
        }
        detached => detached.map_err(clsact_failed(device, hook)),
    }
}

/// As [`upgrade`], for one filter; false where its device has gone.
fn upgrade_filter(pins: &PinDir, pin: &Attachment) -> Result<bool, AttachError> {
    let Some(device) = pin.device() else { return Ok(false) };
    set_filter(pins, &device, pin.hook, false)?;
    // The pin is a note of the program that the filter runs.
    let program = sys::obj_get(&pins.prog(pin.hook.program()))?;
    pins.unpin(&pin.path)?;
    sys::obj_pin(program.as_fd(), &pin.path)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: Option<&str>, has_vlans: bool) -> Device {
        Device {
            index: 1,
            name: "lo".to_owned(),
            kind: kind.map(str::to_owned),
            framing: Framing::Ethernet,
            other_end: OtherEnd::None,
            controller: None,
            mac: None,
            mtu: 1500,
            has_vlans,
        }
    }

    #[test]
    fn xdp_is_native_or_not_used() {
        use Hook::{ClsactIngress, TcxIngress, XdpNative};

        let hooks = |device: &Device, xdp| {
            let options = Options { xdp, ..Options::default() };
            let ruled_out = rules_out_xdp(device, options);
            (ingress_hooks(device, options, ruled_out), ruled_out)
        };
        let tc = || vec![TcxIngress, ClsactIngress];
        let (card, bond, pod) = (device(None, false), device(Some("bond"), true), device(Some("veth"), true));
        assert_eq!(hooks(&card, XdpPolicy::Auto), (vec![XdpNative, TcxIngress, ClsactIngress], None));
        assert_eq!(hooks(&card, XdpPolicy::Native), (vec![XdpNative], None));
        assert_eq!(hooks(&card, XdpPolicy::Generic), (tc(), Some(Note::NotGeneric)));
        assert_eq!(hooks(&card, XdpPolicy::Off), (tc(), None));
        for policy in [XdpPolicy::Auto, XdpPolicy::Native] {
            assert_eq!(hooks(&bond, policy), (tc(), Some(Note::StripsTags)), "a VLAN is on it");
            // The loopback device strips no tags: so does a card with `rxvlan` off.
            assert_eq!(hooks(&device(None, true), policy).1, None);
        }
        assert_eq!(hooks(&pod, XdpPolicy::Auto), (tc(), None), "XDP is not for pods' devices: nothing to say");
        assert_eq!(hooks(&pod, XdpPolicy::Native), (tc(), Some(Note::StripsTags)));
    }
}
