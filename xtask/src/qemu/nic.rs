//! `cargo xtask test --nic`: network cards that QEMU emulates for a guest, in two pairs.
//!
//! QEMU runs in a network namespace with two bridges, each of which connects two cards:
//!
//! ```text
//!  guest, node A:  card 0 ---- tap0 - bridge0 - tap1 ---- card 1: guest, clients
//!                  card 2 ---- tap2 - bridge1 - tap3 ---- card 3: guest, node B
//! ```
//!
//! The taps pass frames with the state of the checksum (`vnet_hdr`), as hypervisors do: a virtio-net guest gets frames with
//! partial checksums, unless it disables that.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;

use super::{
    guest::Qemu,
    packages::{Apt, Installed, Mirror},
};
use crate::run::{command, output, run as run_command};

/// The prefix of the namespaces' names; the id of the process that made one follows.
const PREFIX: &str = "affinity-qemu-";

/// How many cards a guest has.
const CARDS: usize = 4;

/// Cards send frames of up to this many bytes, so the devices between them must too.
const MTU: u32 = 9000;

/// A model of network card.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum Model {
    /// The usual card of guests, with and without control of its offloads
    VirtioNet,
    /// An Intel server card
    Igb,
    /// The card of VMware's guests
    Vmxnet3,
    /// An Intel desktop card, whose driver has no XDP
    E1000e,
}

impl Model {
    /// The variants to run, each in a separate guest: a name, and QEMU's device.
    pub(crate) fn variants(self) -> &'static [(&'static str, &'static str)] {
        match self {
            // QEMU gets the state of the checksum only from taps, and offers it to the guest only if the guest may refuse it.
            Self::VirtioNet => &[
                ("virtio-net", "virtio-net-pci"),
                ("virtio-net-fixed-offloads", "virtio-net-pci,ctrl_guest_offloads=off"),
            ],
            Self::Igb => &[("igb", "igb")],
            Self::Vmxnet3 => &[("vmxnet3", "vmxnet3")],
            Self::E1000e => &[("e1000e", "e1000e")],
        }
    }

    /// The type of device that QEMU must have.
    fn device(self) -> &'static str {
        match self {
            Self::VirtioNet => "virtio-net-pci",
            Self::Igb => "igb",
            Self::Vmxnet3 => "vmxnet3",
            Self::E1000e => "e1000e",
        }
    }
}

/// The namespace that QEMU runs in. Dropping this removes it.
pub(crate) struct Cable {
    /// Its name, for `ip netns`.
    pub(crate) namespace: String,
}

impl Cable {
    /// Creates it.
    ///
    /// # Errors
    /// If `ip` fails.
    pub(crate) fn lay() -> Result<Self> {
        ensure!(fs::exists("/dev/net/tun")?, "/dev/net/tun is missing: QEMU's network cards need tap devices");
        remove_stale()?;
        let cable = Self { namespace: format!("{PREFIX}{}", std::process::id()) };
        let name = &cable.namespace;
        run_command(command("ip").args(["netns", "add", name]))?;
        let mut script = "link set lo up\n".to_owned();
        for bridge in 0..CARDS / 2 {
            script += &format!("link add bridge{bridge} type bridge mcast_snooping 0\n");
        }
        for card in 0..CARDS {
            let bridge = card / 2;
            script += &format!("tuntap add dev tap{card} mode tap vnet_hdr\n");
            script += &format!("link set tap{card} mtu {MTU} master bridge{bridge}\nlink set tap{card} up\n");
        }
        for bridge in 0..CARDS / 2 {
            script += &format!("link set bridge{bridge} mtu {MTU}\nlink set bridge{bridge} up\n");
        }
        let mut ip = command("sh");
        ip.args(["-c", "printf '%s' \"$1\" | ip -n \"$2\" -batch -", "sh", &script, name]);
        run_command(&mut ip)?;
        // The bridges have no addresses, and must not send packets.
        let quiet = "for device in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $device; done";
        let mut sysctl = command("nsenter");
        sysctl.arg(format!("--net=/run/netns/{name}")).args(["--", "sh", "-c", quiet]);
        run_command(&mut sysctl)?;
        Ok(cable)
    }

    /// QEMU's arguments for the cards, each on a separate port, because an igb also takes the slots of its virtual functions.
    /// The last byte of a card's address is its number.
    pub(crate) fn arguments(device: &str) -> Vec<String> {
        let card = |number| {
            let tap = format!("tap,id=card{number},ifname=tap{number},script=no,downscript=no,vhost=off");
            let port = format!("pcie-root-port,id=port{number},chassis={number}");
            let card = format!("{device},bus=port{number},netdev=card{number},mac=52:54:00:af:f1:{number:02x}");
            ["-netdev", &tap, "-device", &port, "-device", &card].map(str::to_owned)
        };
        (0..CARDS).flat_map(card).collect()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let _ = run_command(command("ip").args(["netns", "del", &self.namespace]));
    }
}

/// Removes namespaces of processes that were killed.
fn remove_stale() -> Result<()> {
    let names = output(command("ip").args(["netns", "list"]))?;
    let names = names.lines().filter_map(|line| line.split_whitespace().next());
    let ours = names.filter_map(|name| Some((name, name.strip_prefix(PREFIX)?)));
    for (name, _) in ours.filter(|(_, process)| !Path::new("/proc").join(process).exists()) {
        run_command(command("ip").args(["netns", "del", name]))?;
    }
    Ok(())
}

/// A QEMU that has this model: the installed one, or a newer one from this release's backports.
///
/// # Errors
/// If neither has it, or the newer one cannot be downloaded.
pub(crate) fn qemu_with(installed: Qemu, model: Model, mirror: &Mirror) -> Result<Qemu> {
    if has_device(&installed, model)? {
        return Ok(installed);
    }
    let prefix = installed.dir.join("backports");
    let newer = Qemu { program: prefix.join("usr/bin/qemu-system-x86_64"), prefix: Some(prefix.clone()), ..installed };
    if !newer.program.exists() {
        let suite = format!("{}-backports", mirror.codename());
        println!("qemu: this QEMU has no {}; fetching the one of {suite}", model.device());
        let suites = [mirror.codename(), &suite];
        let apt = Apt::open(&newer.dir.join("apt").join(&suite), mirror, &suites, Installed::AsHere)?;
        apt.unpack_with_needs("qemu-system-x86", &suite, &prefix).context("a newer QEMU")?;
    }
    ensure!(
        has_device(&newer, model)?,
        "neither the installed QEMU nor that of the backports has the card {}",
        model.device()
    );
    Ok(newer)
}

/// Asks about this device only, because the list of all devices loads every module of QEMU, including those of another version.
/// The output is the device's options, or nothing; QEMU's exit status is the same in both cases.
fn has_device(qemu: &Qemu, model: Model) -> Result<bool> {
    let answer = qemu.command().arg("-device").arg(format!("{},help", model.device())).output();
    Ok(!answer.with_context(|| qemu.program.display().to_string())?.stdout.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_card_has_an_address_of_its_own() {
        let arguments = Cable::arguments("igb");
        assert_eq!(arguments.len(), CARDS * 6);
        assert_eq!(arguments[5], "igb,bus=port0,netdev=card0,mac=52:54:00:af:f1:00");
        assert_eq!(arguments[23], "igb,bus=port3,netdev=card3,mac=52:54:00:af:f1:03");
    }
}
