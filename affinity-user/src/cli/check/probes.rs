//! The single checks. They only read.

use std::{collections::BTreeMap, fs, io, net::IpAddr, path::Path};

use affinity_common::{
    abi::{V4, V6},
    names,
};
use aya_obj::generated::bpf_attach_type::BPF_TCX_INGRESS;

use super::{Finding, State};
use crate::{
    attach::{self, Device, XdpFeatures, xdp_features},
    load::{self, JIT_ADVICE, Kernel, Memory, Refusal, Sizes, cost, mib},
    local_ports::{LocalPorts, UsedPorts},
    objects::PROGRAMS,
    pins::{self, PinDir},
    store::kernel::{Family, KernelStore},
    sys, view,
};

/// Bits of `CapEff`, from `linux/capability.h`.
const CAPABILITIES: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
const CAP_SYS_ADMIN: u32 = 21;

/// The maximum number of devices shown of each kind.
const DEVICES_NAMED: usize = 8;

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Loads the real programs, with one finding for each that is rejected. Without `permissions` nothing can be tried.
pub(super) fn programs(permissions: &Finding) -> Vec<Finding> {
    const PROGRAMS_CHECK: &str = "programs";
    if PROGRAMS.is_empty() {
        let advice = "build it without AFFINITY_SKIP_EBPF=1";
        return vec![Finding::missing(PROGRAMS_CHECK, "this build has no kernel programs", advice)];
    }
    let size = PROGRAMS.len().div_ceil(1024);
    if permissions.state == State::Missing {
        let found = format!("built in, {size} KiB; without permissions they cannot be loaded to test this kernel");
        return vec![Finding::ok(PROGRAMS_CHECK, found)];
    }
    let refusals = match load::trial(&load::Options::default()) {
        Ok(refusals) => refusals,
        Err(error) => {
            let advice = "see the other findings: permissions, memory";
            return vec![Finding::missing(PROGRAMS_CHECK, format!("cannot be loaded: {error}"), advice)];
        }
    };
    if refusals.is_empty() {
        return vec![Finding::ok(PROGRAMS_CHECK, format!("this kernel accepts all of them, {size} KiB"))];
    }
    refusals.iter().map(refused).collect()
}

/// Without the socket programs a node works, except for its own connections.
fn refused(refusal: &Refusal) -> Finding {
    let Refusal { program, reason, log } = refusal;
    let log = log.as_ref().map_or_else(String::new, |log| format!("; the verifier's log: {}", log.display()));
    let advice = format!("use a kernel from the README's list of tested kernels{log}");
    let found = format!("this kernel rejects {program}: {reason}");
    if names::SOCKET_PROGRAMS.contains(program) {
        return Finding::limited("programs", found, advice);
    }
    Finding::missing("programs", found, advice)
}

pub(super) fn kernel() -> Finding {
    kernel_found(&Kernel::running())
}

fn kernel_found(kernel: &Kernel) -> Finding {
    match kernel.suits() {
        Ok(()) => Finding::ok("kernel", format!("Linux {}", kernel.release)),
        Err(unsuitable) => {
            let found = format!("Linux {}: {unsuitable}", kernel.release);
            Finding::missing("kernel", found, unsuitable.advice())
        }
    }
}

pub(super) fn permissions() -> Finding {
    let status = read("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    let has = |bit: u32| effective & (1 << bit) != 0;
    let lacking: Vec<_> =
        CAPABILITIES.iter().filter(|&&(bit, _)| !has(bit) && !has(CAP_SYS_ADMIN)).map(|&(_, name)| name).collect();
    if !lacking.is_empty() {
        let advice = "run it as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON";
        return Finding::missing("permissions", format!("no {}", lacking.join(", no ")), advice);
    }
    let names: Vec<_> = CAPABILITIES.iter().map(|&(_, name)| name).collect();
    Finding::ok("permissions", if has(CAP_SYS_ADMIN) { "CAP_SYS_ADMIN".to_owned() } else { names.join(", ") })
}

pub(super) fn pin_directory(pin_dir: &Path) -> Finding {
    let mount = Path::new("/sys/fs/bpf");
    let existing = pin_dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let is_bpf = rustix::fs::statfs(existing).is_ok_and(|stat| stat.f_type as u32 == libc::BPF_FS_MAGIC as u32);
    let shown = pin_dir.display();
    if is_bpf {
        return Finding::ok("pin-dir", format!("{shown}, on a BPF filesystem"));
    }
    if pin_dir.starts_with(mount) {
        return Finding::ok("pin-dir", format!("{shown}; the BPF filesystem will be mounted at {}", mount.display()));
    }
    let advice = "choose a directory under /sys/fs/bpf, or mount one: mount -t bpf bpf DIR";
    Finding::missing("pin-dir", format!("{shown}, not on a BPF filesystem"), advice)
}

pub(super) fn jit() -> Finding {
    if load::jit_is_off() {
        return Finding::missing("jit", "off: the kernel rejects programs with function calls", JIT_ADVICE);
    }
    match read("/proc/sys/net/core/bpf_jit_enable") {
        Some(_) => Finding::ok("jit", "on"),
        None => Finding::ok("jit", "the setting is not readable; if the programs load, it is on"),
    }
}

pub(super) fn btf() -> Finding {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Finding::ok("btf", "/sys/kernel/btf/vmlinux");
    }
    // The programs need no kernel types.
    Finding::ok("btf", "none; not needed")
}

pub(super) fn tc() -> Finding {
    /// The loopback device exists in each network namespace.
    const LOOPBACK: u32 = 1;
    match sys::tcx_programs(LOOPBACK, BPF_TCX_INGRESS as u32) {
        Ok(_) => Finding::ok("tc", "tcx links will be used"),
        Err(error) if error.source.raw_os_error() == Some(libc::EINVAL) => {
            let advice = "use Linux 6.6 or later: other programs cannot remove tcx links";
            Finding::limited("tc", "this kernel has no tcx: clsact filters will be used", advice)
        }
        Err(error) => Finding::ok("tc", format!("tcx links or clsact filters: cannot be determined ({error})")),
    }
}

/// The devices that would be attached without `--device`, one finding each, and how many are skipped.
pub(super) fn devices(pin_dir: &Path) -> Vec<Finding> {
    let (devices, network) = match attach::survey() {
        Ok(survey) => survey,
        Err(error) => {
            let found = format!("cannot be listed: {error}");
            return vec![Finding::limited("device", found, "name them with --device")];
        }
    };
    let roles = attach::roles(&devices, &network);
    let unserved: Vec<_> = attach::unserved(&devices, &network)
        .iter()
        .map(|device| {
            let advice = "let clients reach the node through a device with Ethernet frames";
            Finding::limited("device", attach::unserved_text(&device.name), advice)
        })
        .collect();
    let with_role = devices.iter().filter_map(|device| {
        let found = roles.get(&device.index)?;
        Some((device, found.role?, &found.why))
    });
    let mut findings: Vec<_> = with_role
        .take(DEVICES_NAMED)
        .map(|(device, role, why)| Finding::ok("device", format!("{}: {}, {why}", device.name, role.name())))
        .collect();
    findings.extend(vlans(&devices, &roles));
    let number = roles.values().filter(|found| found.role.is_some()).count();
    if number == 0 {
        let advice = "name the devices that receive clients' packets with --device";
        findings.push(Finding::limited(
            "device",
            "none found: no device with a default route, an address or a pod",
            advice,
        ));
    }
    if number > DEVICES_NAMED {
        findings.push(Finding::ok("device", format!("and {} more", number - DEVICES_NAMED)));
    }
    let others = devices.iter().filter_map(|device| {
        let found = roles.get(&device.index).filter(|found| found.role.is_none())?;
        Some(format!("{} ({})", device.name, found.why))
    });
    let others: Vec<_> = others.take(DEVICES_NAMED).collect();
    if !others.is_empty() {
        findings.push(Finding::ok("device", format!("not attached unless named with --device: {}", others.join("; "))));
    }
    findings.extend(unserved);
    let found = devices.iter().filter(|device| roles.get(&device.index).is_some_and(|found| found.role.is_some()));
    let found = found.map(|device| (device.index, device.name.clone())).collect();
    findings.extend(others_on(pin_dir, &found));
    findings
}

/// Other programs that handle packets.
fn others_on(pin_dir: &Path, devices: &BTreeMap<u32, String>) -> Vec<Finding> {
    let programs = attach::others::programs(&PinDir::new(pin_dir), devices);
    let more = programs.len().saturating_sub(DEVICES_NAMED);
    let mut findings: Vec<_> =
        programs.into_iter().take(DEVICES_NAMED).map(|line| Finding::ok("others", line)).collect();
    if more > 0 {
        findings.push(Finding::ok("others", format!("and {more} more programs")));
    }
    findings.extend(attach::others::kube_proxy().map(|way| {
        let found = format!("kube-proxy's rules ({way}): they handle the services that affinity does not handle");
        Finding::ok("others", found)
    }));
    findings
}

/// The devices on which `--xdp auto` uses TC because of their VLANs.
fn vlans(devices: &[Device], roles: &BTreeMap<u32, attach::Finding>) -> Vec<Finding> {
    let has_role = |device: &&Device| roles.get(&device.index).is_some_and(|found| found.role.is_some());
    let finding = |device: &Device| {
        let note = attach::rules_out_xdp(device, attach::Options::default())?;
        Some(Finding::limited(
            "xdp",
            format!("{}: {note}", device.name),
            "TC will be used, which costs more per packet",
        ))
    };
    devices.iter().filter(has_role).filter_map(finding).collect()
}

pub(super) fn xdp(device: &str) -> Finding {
    let Some(index) = read(&format!("/sys/class/net/{device}/ifindex")).and_then(|index| index.parse().ok()) else {
        return Finding::missing("xdp", format!("{device}: no such device"), "`ip link` lists all");
    };
    let driver = fs::read_link(format!("/sys/class/net/{device}/device/driver")).ok();
    let driver = driver
        .as_deref()
        .and_then(Path::file_name)
        .map_or_else(|| "virtual".to_owned(), |name| name.to_string_lossy().into_owned());
    let features = xdp_features()
        .and_then(|devices| devices.get(&index).copied().ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV)));
    match features {
        Ok(XdpFeatures { native: true, multi_buffer: true, .. }) => {
            Finding::ok("xdp", format!("{device} ({driver}): native, also with jumbo frames"))
        }
        Ok(XdpFeatures { native: true, multi_buffer: false, .. }) => Finding::ok(
            "xdp",
            format!("{device} ({driver}): native, if a frame fits into one buffer (no jumbo frames)"),
        ),
        Ok(XdpFeatures { native: false, .. }) => {
            let found = format!("{device} ({driver}): the driver has no native XDP");
            Finding::limited("xdp", found, "TC will be used, which costs more per packet")
        }
        Err(error) => {
            let found = format!("{device} ({driver}): cannot query native XDP support ({error})");
            Finding::limited("xdp", found, "`--xdp auto` tries native, then TC")
        }
    }
}

/// The memory that the maps would use; the object file contains their layout.
fn cost_of(sizes: &Sizes) -> Option<u64> {
    Some(load::needed(sizes).ok()?.iter().map(|(_, info)| cost(info)).sum())
}

pub(super) fn memory(sizes: &Sizes) -> Finding {
    let info = rustix::system::sysinfo();
    let unit = u64::from(info.mem_unit);
    let memory = Memory::of_this_process();
    let free = available().unwrap_or(info.freeram as u64 * unit).min(memory.limit.unwrap_or(u64::MAX));
    let Some(cost) = cost_of(sizes) else { return Finding::ok("memory", format!("{sizes}")) };
    let found = format!(
        "{} sessions and {} connections for each IP family: {} MiB of {memory}",
        sizes.sessions,
        sizes.flows / 2,
        mib(cost),
    );
    if cost > free {
        let advice = format!("only {} MiB are free: lower --max-sessions and --max-flows", mib(free));
        return Finding::missing("memory", found, advice);
    }
    Finding::ok("memory", found)
}

/// Memory that is available without swapping, in bytes.
fn available() -> Option<u64> {
    let info = read("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

pub(super) fn cgroup() -> Finding {
    let mounts = read("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4)).flatten()
    });
    match mounted {
        Some(path) => Finding::ok("cgroup", format!("version 2 at {path}")),
        None => Finding::ok("cgroup", "version 2 is not mounted"),
    }
}

pub(super) fn sockets() -> Finding {
    let Some(root) = attach::cgroup::root() else {
        let found = "the root of cgroup version 2 is not visible: connections of the node itself are not translated";
        return Finding::limited("sockets", found, "mount it: mount -t cgroup2 none /sys/fs/cgroup");
    };
    let root = root.display();
    if !attach::cgroup::in_node_namespace().unwrap_or(false) {
        let found =
            format!("`--socket auto` has no effect: this is not the node's network namespace; cgroup root {root}");
        return Finding::limited("sockets", found, "run affinity in the host's network namespace, or use --socket on");
    }
    Finding::ok("sockets", format!("translated at connect(), for all processes below {root}"))
}

/// Whether Linux may give ports that a present or future dataplane uses to the node's own connections.
pub(super) fn local_ports(pin_dir: &Path) -> Finding {
    match LocalPorts::read() {
        Ok(local) => ports_found(&local, &used_ports(pin_dir).unwrap_or_default()),
        Err(error) => Finding::ok("ports", format!("cannot read which ports the node's own connections get: {error}")),
    }
}

fn ports_found(local: &LocalPorts, used: &UsedPorts) -> Finding {
    match local.overlap(used) {
        None => Finding::ok(
            "ports",
            format!("affinity uses no port that Linux assigns to the node's own connections: {local}"),
        ),
        Some(overlap) => {
            let advice = format!("start with --reserve-ports, or {}", local.command(&overlap));
            Finding::limited("ports", local.describe(&overlap), advice)
        }
    }
}

/// The ports that the dataplane uses; `None` if there is none that can be read.
fn used_ports(pin_dir: &Path) -> Option<UsedPorts> {
    let store = KernelStore::open(pin_dir).ok()?;
    let (_, network) = attach::survey().ok()?;
    let node = store.node.get(&0).ok()?.unwrap_or_default();
    let first = node.port_first.get();
    let masquerade = node.port_count.checked_sub(1).map(|more| first..=first.saturating_add(more));
    let frontends = frontends::<V4>(&store).chain(frontends::<V6>(&store));
    Some(UsedPorts::new(frontends, &network.own_addresses().into_iter().collect(), masquerade))
}

/// The addresses and ports of the frontends of one family.
fn frontends<A: Family>(store: &KernelStore) -> impl Iterator<Item = (IpAddr, u16)> {
    let entries = store.family::<A>().frontends.iter().filter_map(Result::ok);
    entries.map(|(key, _)| (view::ip(key.address), key.port.get()))
}

pub(super) fn clock() -> Finding {
    let source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let source = source.unwrap_or_else(|| "unknown".to_owned());
    // The programs read jiffies; only the agent reads this clock.
    Finding::ok("clock", format!("{source}; the programs read jiffies instead of this clock"))
}

/// There may be one that is not visible from here, or one of another version.
fn no_dataplane(pins: &PinDir) -> Finding {
    if let Some(why) = pins::hidden() {
        return Finding::limited("dataplane", "not visible here", why);
    }
    let others: Vec<_> = pins.other_layouts().unwrap_or_default().iter().map(PinDir::layout).collect();
    if others.is_empty() {
        return Finding::ok("dataplane", "none yet");
    }
    let found = format!("one of another version (map layout {})", others.join(", "));
    Finding::limited("dataplane", found, "`affinity run` replaces it, `affinity detach` removes it")
}

pub(super) fn dataplane(pin_dir: &Path) -> Finding {
    let pins = PinDir::new(pin_dir);
    match pins.exists() {
        Ok(false) => return no_dataplane(&pins),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Finding::ok("dataplane", "not visible without root");
        }
        _ => {}
    }
    match (KernelStore::open(pin_dir), attach::attachments(&pins)) {
        (Ok(store), Ok(attachments)) => {
            let bytes: u64 = store.maps().iter().map(|(_, info)| cost(info)).sum();
            let mut devices: Vec<_> = attachments.iter().map(|attachment| attachment.ifindex).collect();
            devices.dedup();
            Finding::ok("dataplane", format!("running on {} devices, {} MiB", devices.len(), mib(bytes)))
        }
        (Err(error), _) => Finding::missing(
            "dataplane",
            error.to_string(),
            "remove it with `affinity detach`, then start affinity again",
        ),
        (_, Err(error)) => Finding::missing(
            "dataplane",
            error.to_string(),
            "remove it with `affinity detach`, then start affinity again",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_on_disk_cannot_hold_pins() {
        let finding = pin_directory(Path::new("/proc/self/affinity"));
        assert_eq!(finding.state, State::Missing, "{finding:?}");
        assert!(finding.advice.is_some());
    }

    #[test]
    fn a_realtime_kernel_is_missing_what_it_takes() {
        let kernel = |version: &str| Kernel {
            machine: "x86_64".to_owned(),
            release: "6.12.0-rt".to_owned(),
            version: version.to_owned(),
            realtime: None,
        };
        assert_eq!(kernel_found(&kernel("#1 SMP PREEMPT_DYNAMIC")).state, State::Ok);
        let finding = kernel_found(&kernel("#1 SMP PREEMPT_RT"));
        assert_eq!(finding.state, State::Missing, "{finding:?}");
        assert!(finding.found.contains("PREEMPT_RT") && finding.advice.is_some(), "{finding:?}");
    }

    #[test]
    fn a_card_below_a_vlan_is_said_to_be_left_to_tc() {
        let device = |index, has_vlans| Device {
            index,
            name: format!("bond{index}"),
            kind: Some("bond".to_owned()),
            framing: attach::Framing::Ethernet,
            other_end: attach::OtherEnd::None,
            controller: None,
            mac: None,
            mtu: 1500,
            has_vlans,
        };
        let found = |role| attach::Finding { role, why: attach::Why::DefaultRoute };
        let devices = [device(1, true), device(2, false), device(3, true)];
        let external = || found(Some(attach::Role::External));
        let findings = vlans(&devices, &BTreeMap::from([(1, external()), (2, external()), (3, found(None))]));
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert!(findings[0].found.contains("bond1") && findings[0].found.contains("strips VLAN tags"), "{findings:?}");
    }

    #[test]
    fn ports_that_linux_gives_away_are_named_with_what_to_do() {
        let finding = |range| ports_found(&LocalPorts::parse(range, "8080").expect("ports"), &UsedPorts::default());
        assert_eq!(finding("32768 60999").state, State::Ok);
        let Finding { state, found, advice, .. } = finding("32000 60999");
        assert_eq!(state, State::Limited, "{found}");
        assert!(found.contains("node ports 32000-32767"), "{found}");
        let advice = advice.expect("advice");
        assert!(advice.contains("sysctl -w net.ipv4.ip_local_reserved_ports=8080,32000-32767"), "{advice}");
    }

    #[test]
    fn what_is_missing_says_what_to_do() {
        let finding = xdp("no-such-device");
        assert_eq!((finding.state, finding.advice.is_some()), (State::Missing, true));
    }
}
