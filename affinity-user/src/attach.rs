//! Attaches the pinned programs to devices, and detaches them.
//!
//! An attachment is a link, pinned as `links/IFINDEX-HOOK`. It lives without the agent, and stores which device and program it
//! connects. If the kernel has no tcx, the pin holds the program instead: it records which program the clsact filter runs. Each
//! device has one hook for packets from clients, and one for replies to them. If TC redirects what XDP has handled, it has two
//! for packets from clients.

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
    pins::{PinDir, PinError, Pinned},
    store::{StoreError, kernel::copy_older_flows},
    sys::{self, SysError},
};

/// Kinds of devices that lead to pods or guests of this machine. Their frames may have partial checksums, which TC programs can
/// handle and XDP programs cannot.
const INTERNAL_KINDS: [&str; 10] =
    ["veth", "bridge", "tun", "netkit", "dummy", "ifb", "macvlan", "macvtap", "ipvlan", "ipvtap"];

/// The position of our clsact filters: first.
const CLSACT_PRIORITY: u16 = 1;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 0xaff);

/// A device cannot be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Its frames are not in the format that the programs read.
    #[error("{0}: cannot be attached: its frames have no Ethernet header")]
    NotEthernet(String),
    /// The driver rejected XDP programs.
    #[error("{device}: {hook}: {note} ({source}; {card})")]
    NoXdp {
        /// The device.
        device: String,
        /// The hook.
        hook: Hook,
        /// The cause, as far as it is known.
        note: Note,
        /// The properties of the card.
        card: Card,
        /// The kernel's error.
        source: io::Error,
    },
    /// The policy allows only native XDP.
    #[error("{0}: use --xdp auto, which uses TC there")]
    NativeOnly(Box<Self>),
    /// The kernel refused.
    #[error("{device}: {hook}: {source}")]
    Refused {
        /// The device.
        device: String,
        /// The hook.
        hook: Hook,
        /// The kernel's error.
        source: io::Error,
    },
    /// The clsact filter could not be changed.
    #[error("{device}: {hook}: {source}")]
    Clsact {
        /// The device.
        device: String,
        /// The hook.
        hook: Hook,
        /// The cause.
        source: Box<ProgramError>,
    },
    /// A cgroup's directory cannot be opened, or the kernel refused.
    #[error("cgroup {cgroup}: {source}")]
    Cgroup {
        /// Its directory.
        cgroup: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The directory is not a cgroup of version 2, and none is mounted in it.
    #[error(
        "neither {} nor {}/unified is a cgroup of version 2: name one with --cgroup; if the node has only version 1, use \
         --socket off",
        .0.display(),
        .0.display()
    )]
    NotVersion2(PathBuf),
    /// There is no cgroup to attach to.
    #[error("the root of cgroup version 2 is not visible: mount it, or name a cgroup with --cgroup")]
    NoCgroup,
    /// A pin could not be created or read.
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
    /// Why there is no XDP, if this error is about that.
    const fn note(&self) -> Option<Note> {
        if let Self::NoXdp { note, .. } = self { Some(*note) } else { None }
    }

    /// Whether the error only means that the kernel has no tcx. `check` reports that already, and so does each device that uses
    /// clsact instead.
    fn says_no_tcx(&self) -> bool {
        let Self::Refused { hook: Hook::TcxIngress | Hook::TcxEgress, source, .. } = self else { return false };
        source.raw_os_error() == Some(libc::EINVAL)
    }
}

/// How to attach.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// How to use XDP.
    pub xdp: XdpPolicy,
    /// Whether to use tcx if the kernel has it. Otherwise clsact is used.
    pub tcx: bool,
    /// Whether [`XdpPolicy::Auto`] applies to devices of any kind.
    pub any_kind: bool,
    /// Whether devices with XDP also get TC for packets from clients, to redirect what XDP has handled.
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
    /// The hook.
    pub hook: Hook,
    /// The program's id.
    pub prog_id: u32,
    /// The pin.
    pub path: PathBuf,
}

impl Attachment {
    /// The device's name in this network namespace; none if it has gone.
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

/// The result of [`attach`]: what is attached to the device, and what failed before.
#[derive(Debug)]
pub struct Attached {
    /// Its hooks: ingress, the best first; then egress.
    pub hooks: Vec<Hook>,
    /// Why better hooks could not be used.
    pub refused: Vec<AttachError>,
    /// The cause: why there is no XDP although the policy wants it.
    pub note: Option<Note>,
}

impl fmt::Display for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.hooks.iter().map(|hook| hook.name()).collect();
        f.write_str(&names.join(" and "))
    }
}

/// Attaches the forward and the reverse program to a device, at the best hooks that it has. Existing attachments stay. Those of
/// another policy are detached once their replacements are attached.
///
/// # Errors
/// [`AttachError`]: the last one if no hook can be used.
pub fn attach(pins: &PinDir, device: &Device, options: Options) -> Result<Attached, AttachError> {
    if device.framing == Framing::Other {
        return Err(AttachError::NotEthernet(device.name.clone()));
    }
    let mut refused = Vec::new();
    // Replies first: once a client's packets are translated, its replies must be translated too.
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

/// The attachments of one device. The names of its pins are known, so the number of other pins does not matter.
fn attachments_of(pins: &PinDir, ifindex: u32) -> Result<Vec<Attachment>, AttachError> {
    let mut attachments = Vec::new();
    for hook in Hook::ALL {
        if let Some(open) = open_pin(pins.links().join(pin_name(ifindex, hook)), ifindex, hook)? {
            attachments.extend(alive(open)?);
        }
    }
    Ok(attachments)
}

/// The hooks where a device has programs now.
///
/// # Errors
/// [`AttachError`] if a pin cannot be read.
pub fn hooks_of(pins: &PinDir, ifindex: u32) -> Result<Vec<Hook>, AttachError> {
    Ok(attachments_of(pins, ifindex)?.into_iter().map(|attachment| attachment.hook).collect())
}

fn pin_name(ifindex: u32, hook: Hook) -> String {
    format!("{ifindex}-{hook}")
}

/// The device and hook in a pin's name; none if this module did not create the pin.
fn parse_pin_name(path: &Path) -> Option<(u32, Hook)> {
    let (ifindex, hook) = path.file_name()?.to_str()?.split_once('-')?;
    Some((ifindex.parse().ok()?, hook.parse().ok()?))
}

/// Whether XDP programs are attached, and whether socket programs are.
///
/// # Errors
/// [`AttachError`] if the pins cannot be listed.
pub fn hooks_in_use(pins: &PinDir) -> Result<(bool, bool), AttachError> {
    let links = pins.list_links()?;
    let is_xdp = |path: &PathBuf| parse_pin_name(path).is_some_and(|(_, hook)| hook.program() == names::XDP_FORWARD);
    Ok((links.iter().any(is_xdp), links.iter().any(|path| cgroup::is_pin(path))))
}

/// Whether the policy wants XDP on a device. [`XdpPolicy::Auto`] does not want it on devices that lead to pods.
fn wants_xdp(device: &Device, options: Options) -> bool {
    let is_internal_kind = device.kind.as_deref().is_some_and(|kind| INTERNAL_KINDS.contains(&kind));
    let internal = device.framing == Framing::Loopback || is_internal_kind && !options.any_kind;
    match options.xdp {
        XdpPolicy::Native | XdpPolicy::Generic => true,
        XdpPolicy::Auto => !internal,
        XdpPolicy::Off => false,
    }
}

/// Why a device uses TC although the policy wants XDP. It may change while the device is attached.
#[must_use]
pub fn rules_out_xdp(device: &Device, options: Options) -> Option<Note> {
    if !wants_xdp(device, options) {
        None
    } else if options.xdp == XdpPolicy::Generic {
        Some(Note::NotGeneric)
    } else {
        // XDP would send answers without the tag, into another network. A virtual device gets tags outside the frame data,
        // whatever it reports, because the sender stored them there.
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

/// Detaches XDP in the other mode, because a device runs XDP in one mode at a time. TC handles packets meanwhile. Once XDP is
/// attached again, TC is detached like any unwanted hook.
fn make_way(pins: &PinDir, device: &Device, rival: &Attachment) -> Result<(), AttachError> {
    attach_first(pins, device, &[Hook::TcxIngress, Hook::ClsactIngress], &mut Vec::new())?;
    detach_one(pins, rival)
}

fn attach_at(pins: &PinDir, device: &Device, hook: Hook) -> Result<(), AttachError> {
    let program = pins.prog(hook.program());
    let pin = pins.links().join(pin_name(device.index, hook));
    // An existing pin of this name can only belong to a link without its device.
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
/// [`AttachError`] if a pin cannot be read.
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

/// The pins that follow the naming of this module. The program ids are not read yet.
fn open_pins(pins: &PinDir) -> Result<Vec<(Attachment, OwnedFd)>, AttachError> {
    let mut open = Vec::new();
    for path in pins.list_links()? {
        let Some((ifindex, hook)) = parse_pin_name(&path) else { continue };
        open.extend(open_pin(path, ifindex, hook)?);
    }
    Ok(open)
}

/// None if the pin does not exist: another process may have removed it meanwhile.
fn open_pin(path: PathBuf, ifindex: u32, hook: Hook) -> Result<Option<(Attachment, OwnedFd)>, AttachError> {
    match sys::obj_get(&path) {
        Err(error) if error.is_not_found() => Ok(None),
        fd => Ok(Some((Attachment { ifindex, hook, prog_id: 0, path }, fd?))),
    }
}

/// Replaces the program of every attachment by the pinned one; each packet is handled by the old or the new program. Removes
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

/// False if the device has gone.
fn upgrade_one(pins: &PinDir, pin: &Attachment, fd: BorrowedFd<'_>) -> Result<bool, AttachError> {
    if pin.hook.link().is_none() {
        return upgrade_filter(pins, pin);
    }
    let program = sys::obj_get(&pins.prog(pin.hook.program()))?;
    match sys::link_update(fd, program.as_fd()) {
        // A link cannot be updated once its device has gone.
        Err(_) if sys::link_info(fd)?.ifindex == 0 => Ok(false),
        updated => Ok(updated.map(|()| true)?),
    }
}

/// Removes the pins of devices that have gone, and returns how many there were. Pins of `present` devices, by index, are not
/// checked.
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
        // A device that has moved to another namespace is not present here, but still exists.
        let gone = if hook.link().is_some() { alive(open)?.is_none() } else { device_name(ifindex).is_none() };
        if gone {
            pins.unpin(&path)?;
            pruned += 1;
        }
    }
    Ok(pruned)
}

/// Detaches the programs from one device, or from all, and returns what was detached.
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

/// After a failed start, detaches the programs from devices that had none `before`. A device that had some keeps what it has
/// now, because the start may have replaced what was there.
///
/// # Errors
/// The first [`AttachError`]; everything else is detached nevertheless.
pub fn detach_new(pins: &PinDir, before: &Pinned) -> Result<(), AttachError> {
    let devices: BTreeSet<u32> = before.pins().filter_map(|pin| Some(parse_pin_name(pin)?.0)).collect();
    let mut outcome = cgroup::detach_new(pins, before);
    for attachment in attachments(pins)?.iter().filter(|new| !devices.contains(&new.ifindex)) {
        outcome = outcome.and(detach_one(pins, attachment));
    }
    outcome
}

/// What happened to the dataplane of another layout.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replaced {
    /// Its name: `v1`.
    pub layout: String,
    /// Links and filters that now run the programs of this version.
    pub adopted: usize,
    /// Those that were detached instead.
    pub detached: usize,
    /// Whether this version has taken over its maps, and with them its pins and connections.
    pub keeps_maps: bool,
}

/// Replaces the programs that dataplanes of other layouts have attached by those of this version, so that each packet is
/// handled by one of them. Removes the rest of these dataplanes.
///
/// # Errors
/// [`AttachError`] if a pin cannot be moved or removed.
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

/// Detaches and removes the dataplanes of other layouts.
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

/// Turns a pin of another layout into one of this layout, with the program of this version. False if this version does not know
/// the pin, if this layout has it already, or if the kernel rejects the program there.
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

/// Detaches what a pin of another layout has attached. False if it is neither a link nor a filter of a device.
fn detach_unknown(path: &Path) -> Result<bool, AttachError> {
    if let Some((ifindex, hook)) = parse_pin_name(path).filter(|(_, hook)| hook.link().is_none()) {
        return device_name(ifindex).map_or(Ok(false), |device| remove_filter(&device, hook).map(|()| true));
    }
    Ok(sys::link_detach(sys::obj_get(path)?.as_fd()).is_ok())
}

/// Whether anything is attached.
///
/// # Errors
/// [`AttachError`] if a pin cannot be read.
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

/// Makes a device run the pinned program of `hook` by a filter: a new filter, or the existing one with a new program.
fn set_filter(pins: &PinDir, device: &str, hook: Hook, new: bool) -> Result<(), AttachError> {
    let failed = |source| clsact_failed(device, hook)(source);
    let mut program = SchedClassifier::from_pin(pins.prog(hook.program())).map_err(failed)?;
    let id = if new {
        match qdisc_add_clsact(device) {
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            added => added.map_err(|error| failed(error.into()))?,
        }
        let options = NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, classid: None };
        match program.attach_with_options(device, clsact_side(hook), TcAttachOptions::Netlink(options)) {
            // Left by a dataplane that has lost its pins: no other program uses this handle.
            Err(ProgramError::TcError(TcError::NetlinkError(error))) if error.raw_os_error() == Some(libc::EEXIST) => {
                program.attach_to_link(filter(device, hook)?)
            }
            attached => attached,
        }
    } else {
        program.attach_to_link(filter(device, hook)?)
    };
    let link = id.and_then(|id| program.take_link(id)).map_err(failed)?;
    // Dropping the link would remove the filter.
    mem::forget(link);
    Ok(())
}

fn filter(device: &str, hook: Hook) -> Result<SchedClassifierLink, AttachError> {
    SchedClassifierLink::attached(device, clsact_side(hook), CLSACT_PRIORITY, CLSACT_HANDLE, None)
        .map_err(|source| AttachError::Refused { device: device.to_owned(), hook, source })
}

fn remove_filter(device: &str, hook: Hook) -> Result<(), AttachError> {
    match filter(device, hook)?.detach() {
        // The filter, or the whole qdisc, was removed already.
        Err(ProgramError::NetlinkError(error)) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
            Ok(())
        }
        detached => detached.map_err(clsact_failed(device, hook)),
    }
}

/// As [`upgrade`], for one filter. False if its device has gone.
fn upgrade_filter(pins: &PinDir, pin: &Attachment) -> Result<bool, AttachError> {
    let Some(device) = pin.device() else { return Ok(false) };
    set_filter(pins, &device, pin.hook, false)?;
    // The pin records which program the filter runs.
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
            // The loopback device strips no tags, like a card with `rxvlan` off.
            assert_eq!(hooks(&device(None, true), policy).1, None);
        }
        assert_eq!(hooks(&pod, XdpPolicy::Auto), (tc(), None), "XDP is not for pods' devices: nothing to say");
        assert_eq!(hooks(&pod, XdpPolicy::Native), (tc(), Some(Note::StripsTags)));
    }
}
