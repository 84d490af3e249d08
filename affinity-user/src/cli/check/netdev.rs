//! What a network device's driver says of XDP: the kernel's `netdev` family of generic netlink, on kernels that have it
//! (6.3 and later). Asking changes nothing, unlike attaching a program to see whether that works.
//!
//! <https://docs.kernel.org/networking/netlink_spec/netdev.html>

use std::io;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// The driver runs programs (`NETDEV_XDP_ACT_BASIC`).
const XDP_BASIC: u64 = 1;
/// It takes programs although frames may span buffers (`NETDEV_XDP_ACT_RX_SG`).
const XDP_RX_SG: u64 = 1 << 5;

/// A request's header and a response's: `struct nlmsghdr`, then `struct genlmsghdr`.
const HEADER_LEN: usize = 16 + 4;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;

const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

/// What a driver can do for XDP programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct XdpFeatures {
    /// It runs them itself: native XDP.
    pub(super) native: bool,
    /// Also on frames that span several buffers: jumbo frames.
    pub(super) multi_buffer: bool,
}

/// Asks the driver of a device.
///
/// Fails where the kernel has no such family (`ENOENT`), or no such device (`ENODEV`).
pub(super) fn xdp_features(ifindex: u32) -> io::Result<XdpFeatures> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    let family = ask(&socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0")?;
    let family = attribute(&family, CTRL_ATTR_FAMILY_ID).and_then(|bytes| bytes.first_chunk());
    let family = u16::from_ne_bytes(*family.ok_or_else(malformed)?);
    let device = ask(&socket, family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes())?;
    let features = attribute(&device, NETDEV_A_DEV_XDP_FEATURES).and_then(|bytes| bytes.first_chunk());
    let features = u64::from_ne_bytes(*features.ok_or_else(malformed)?);
    Ok(XdpFeatures { native: features & XDP_BASIC != 0, multi_buffer: features & XDP_RX_SG != 0 })
}

/// Sends a request with one attribute and returns the attributes of the answer.
fn ask(socket: &Socket, family: u16, command: u8, attribute: u16, value: &[u8]) -> io::Result<Vec<u8>> {
    let attribute_len = 4 + value.len();
    let len = HEADER_LEN + attribute_len.next_multiple_of(4);
    let mut message = Vec::with_capacity(len);
    message.extend((len as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend((attribute_len as u16).to_ne_bytes());
    message.extend(attribute.to_ne_bytes());
    message.extend(value);
    message.resize(len, 0);
    socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;

    let (answer, _) = socket.recv_from_full()?;
    let kind = answer.get(4..6).and_then(|bytes| bytes.first_chunk()).map(|bytes| u16::from_ne_bytes(*bytes));
    if kind == Some(NLMSG_ERROR) {
        let errno = answer.get(16..20).and_then(|bytes| bytes.first_chunk()).map(|bytes| i32::from_ne_bytes(*bytes));
        return Err(errno.map_or_else(malformed, |errno| io::Error::from_raw_os_error(-errno)));
    }
    Ok(answer.get(HEADER_LEN..).unwrap_or_default().to_vec())
}

/// The value of the first attribute of a kind.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let [a, b, c, d, ..] = *attributes else { return None };
        let len = usize::from(u16::from_ne_bytes([a, b]));
        if u16::from_ne_bytes([c, d]) == wanted {
            return attributes.get(4..len);
        }
        attributes = attributes.get(len.max(4).next_multiple_of(4)..)?;
    }
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer was not understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_cut_ones_are_not() {
        let mut attributes = Vec::new();
        attributes.extend([5u8.to_ne_bytes()[0], 0, 9, 0, 42, 0, 0, 0]);
        attributes.extend([8, 0, 1, 0, 1, 2, 3, 4]);
        assert_eq!(attribute(&attributes, 9), Some([42].as_slice()));
        assert_eq!(attribute(&attributes, 1), Some([1, 2, 3, 4].as_slice()));
        assert_eq!(attribute(&attributes, 2), None);
        assert_eq!(attribute(&attributes[..14], 1), None);
        assert_eq!(attribute(&[0; 8], 7), None);
    }

    #[test]
    fn the_kernel_answers_for_the_loopback_device() {
        match xdp_features(1) {
            Ok(features) => assert!(!features.native, "the loopback device has no driver"),
            // Kernels before 6.3.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOENT), "{error}"),
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        assert!(xdp_features(i32::MAX as u32).is_err());
    }
}
