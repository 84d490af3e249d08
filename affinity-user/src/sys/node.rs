//! System calls other than bpf(2): about files, network namespaces and network cards.
#![expect(unsafe_code, reason = "these calls have no safe function in rustix")]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use super::{Result, SysError};

/// `F_SETSIG` of asm-generic/fcntl.h.
const F_SETSIG: i32 = 10;

/// Whether any process has this regular file open for writing; `None` if the file system cannot report that, or not to this
/// process.
///
/// The kernel refuses a read lease for exactly that reason, with `EAGAIN`
/// (<https://elixir.bootlin.com/linux/v6.12/source/fs/locks.c>, `check_conflicting_open`). A lease is given back at once. A
/// process that opens the file for writing in between waits for that moment, and this process gets a signal that it ignores by
/// default. The default signal, SIGIO, would end it.
#[must_use]
pub fn is_open_for_writing(file: BorrowedFd<'_>) -> Option<bool> {
    // SAFETY: these commands take a number, no pointer.
    let fcntl = |command: i32, argument: i32| match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    fcntl(F_SETSIG, libc::SIGURG).ok()?;
    match fcntl(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => fcntl(libc::F_SETLEASE, libc::F_UNLCK).ok().map(|()| false),
        Err(error) => (error.raw_os_error() == Some(libc::EAGAIN)).then_some(true),
    }
}

/// `SO_NETNS_COOKIE` of asm-generic/socket.h.
const SO_NETNS_COOKIE: i32 = 71;

/// The cookie of the network namespace that a socket belongs to. Cookies are never reused.
///
/// # Errors
/// [`SysError`] on a kernel before 5.14.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> Result<u64> {
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: both pointers are to locals, with the lengths that the kernel gets.
    let answer = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut len)
    };
    if answer == 0 { Ok(cookie) } else { Err(SysError::new("SO_NETNS_COOKIE", "socket", io::Error::last_os_error())) }
}

/// `SIOCETHTOOL` and commands of linux/ethtool.h.
const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// The name of a device's driver, in this network namespace, and the name that the device has on its bus.
///
/// # Errors
/// [`SysError`] if there is no such device, or it does not report that.
pub fn card_driver(device: &str) -> Result<(String, String)> {
    // `struct ethtool_drvinfo`, 196 bytes: the command, then names of 32 bytes: driver, version, firmware, bus.
    let answer: [u32; 49] = ethtool(device, ETHTOOL_GDRVINFO)?;
    let text = |words: &[u32]| -> String {
        let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).take_while(|byte| *byte != 0);
        String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
    };
    Ok((text(&answer[1..9]), text(&answer[25..33])))
}

/// The enabled offloads of a device: `ETH_FLAG_*`.
///
/// # Errors
/// As [`card_driver`].
pub fn card_flags(device: &str) -> Result<u32> {
    // `struct ethtool_value`.
    let [_, flags]: [u32; 2] = ethtool(device, ETHTOOL_GFLAGS)?;
    Ok(flags)
}

/// How many pairs of queues a device uses, and how many it has at most.
///
/// # Errors
/// As [`card_driver`].
pub fn card_queues(device: &str) -> Result<(u32, u32)> {
    // `struct ethtool_channels`: receive, send, other and combined ones; first the maximum, then those in use.
    let [_, most_rx, _, _, most_both, rx, _, _, both]: [u32; 9] = ethtool(device, ETHTOOL_GCHANNELS)?;
    Ok((rx + both, most_rx + most_both))
}

/// Queries a driver by the ethtool call. `WORDS` is the size of the structure that `command` fills in.
fn ethtool<const WORDS: usize>(device: &str, command: u32) -> Result<[u32; WORDS]> {
    let failed = |error| SysError::new("SIOCETHTOOL", device, error);
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    );
    let socket = socket.map_err(|error| failed(error.into()))?;
    let mut answer = [0; WORDS];
    answer[0] = command;
    // SAFETY: all zeroes are a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if device.len() >= request.ifr_name.len() {
        return Err(failed(io::Error::from_raw_os_error(libc::ENODEV)));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = answer.as_mut_ptr().cast();
    // SAFETY: the request is a local, its name ends with a zero, and the kernel fills in `answer`: its size is what the callers
    // above give for their command.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if done == 0 { Ok(answer) } else { Err(failed(io::Error::last_os_error())) }
}
