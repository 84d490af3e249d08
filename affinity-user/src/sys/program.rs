//! Programs, and the links that attach them.
//!
//! aya falls back from link to netlink silently; these functions do not.
#![expect(unsafe_code, reason = "bpf(2) takes pointers in a union")]

use std::os::fd::{BorrowedFd, OwnedFd};

use aya_obj::generated::bpf_cmd;
use bytemuck::{Pod, Zeroable};

use super::{
    Result, SysError,
    bpf::{address, address_mut, bpf, bpf_fd, info, raw},
};

/// The kernel's information about a program: the start of `struct bpf_prog_info`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct ProgInfo {
    /// A `bpf_prog_type`.
    pub kind: u32,
    /// Its id.
    pub id: u32,
    /// Hash of its instructions.
    pub tag: [u8; 8],
}

/// The kernel's information about a link: the start of `struct bpf_link_info`, as XDP and tcx links fill it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct LinkInfo {
    /// A `bpf_link_type`.
    pub kind: u32,
    /// Its id.
    pub id: u32,
    /// The program.
    pub prog_id: u32,
    pad: u32,
    /// The device; zero once it has gone.
    pub ifindex: u32,
    /// A `bpf_attach_type`; zero for XDP.
    pub attach_type: u32,
}

/// The ids of the programs that are attached to a device by tcx, in the order in which they run.
///
/// # Errors
/// [`SysError`]; `EINVAL` on a kernel without tcx.
pub fn tcx_programs(ifindex: u32, attach_type: u32) -> Result<Vec<u32>> {
    /// `BPF_MPROG_MAX` of <https://elixir.bootlin.com/linux/v6.12/source/include/linux/bpf_mprog.h>.
    const MOST: usize = 64;
    let mut ids = [0u32; MOST];
    let mut attr = QueryAttr {
        target: ifindex,
        attach_type,
        prog_ids: address_mut(bytemuck::bytes_of_mut(&mut ids)),
        count: MOST as u32,
        ..Zeroable::zeroed()
    };
    // SAFETY: `prog_ids` has room for `count` ids.
    unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) }
        .map_err(|error| SysError::new("BPF_PROG_QUERY", format!("device {ifindex}"), error))?;
    Ok(ids[..(attr.count as usize).min(MOST)].to_vec())
}

/// The kernel's information about a link to a cgroup.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct CgroupLinkInfo {
    /// A `bpf_link_type`.
    pub kind: u32,
    /// Its id.
    pub id: u32,
    /// The program.
    pub prog_id: u32,
    pad: u32,
    /// The cgroup's id; zero once it has gone.
    pub cgroup: u64,
    /// A `bpf_attach_type`.
    pub attach_type: u32,
    fill: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkCreateAttr {
    prog_fd: u32,
    /// A device's index, or the descriptor of a cgroup's directory.
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    pad: u32,
    expected_revision: u64,
}

/// The part of `BPF_PROG_QUERY` that kernels with tcx know. Older kernels know its start.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    pad: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// The kernel's information about a program.
///
/// # Errors
/// [`SysError`] if the descriptor is no program's.
pub fn prog_info(prog: BorrowedFd<'_>) -> Result<ProgInfo> {
    info(prog).map_err(|error| SysError::new("BPF_OBJ_GET_INFO_BY_FD", "program", error))
}

/// The kernel's information about a link.
///
/// # Errors
/// [`SysError`] if the descriptor is no link's.
pub fn link_info(link: BorrowedFd<'_>) -> Result<LinkInfo> {
    info(link).map_err(|error| SysError::new("BPF_OBJ_GET_INFO_BY_FD", "link", error))
}

/// Attaches a program to a device. The attachment lives as long as the link: its descriptor or its pin.
///
/// `flags` are `XDP_FLAGS_*`, or for tcx `BPF_F_BEFORE` and similar ones.
///
/// # Errors
/// [`SysError`]. Unlike aya, it never attaches by netlink instead.
pub fn link_create(prog: BorrowedFd<'_>, ifindex: u32, attach_type: u32, flags: u32) -> Result<OwnedFd> {
    let mut attr = LinkCreateAttr { prog_fd: raw(prog), target: ifindex, attach_type, flags, ..Zeroable::zeroed() };
    // SAFETY: the attributes of this command hold no pointer.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
        .map_err(|error| SysError::new("BPF_LINK_CREATE", format!("device {ifindex}"), error))
}

/// The kernel's information about a link to a cgroup.
///
/// # Errors
/// [`SysError`] if the descriptor is no link's.
pub fn cgroup_link_info(link: BorrowedFd<'_>) -> Result<CgroupLinkInfo> {
    info(link).map_err(|error| SysError::new("BPF_OBJ_GET_INFO_BY_FD", "link", error))
}

/// Attaches a program to a cgroup, next to other programs. The attachment lives as long as the link: its descriptor or its pin.
///
/// # Errors
/// [`SysError`].
pub fn link_create_cgroup(prog: BorrowedFd<'_>, cgroup: BorrowedFd<'_>, attach_type: u32) -> Result<OwnedFd> {
    let mut attr = LinkCreateAttr { prog_fd: raw(prog), target: raw(cgroup), attach_type, ..Zeroable::zeroed() };
    // SAFETY: the attributes of this command hold no pointer.
    unsafe { bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr) }
        .map_err(|error| SysError::new("BPF_LINK_CREATE", "cgroup", error))
}

/// Replaces the program of a link: each packet is handled by the old or the new one.
///
/// # Errors
/// [`SysError`] if the programs are of different types, or the device has gone (`ENOLINK`).
pub fn link_update(link: BorrowedFd<'_>, prog: BorrowedFd<'_>) -> Result<()> {
    let mut attr = LinkUpdateAttr { link_fd: raw(link), new_prog_fd: raw(prog), ..Zeroable::zeroed() };
    // SAFETY: the attributes of this command hold no pointer.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }
        .map_err(|error| SysError::new("BPF_LINK_UPDATE", "link", error))?;
    Ok(())
}

/// Detaches a link's program at once. The link stays, without effect.
///
/// # Errors
/// [`SysError`].
pub fn link_detach(link: BorrowedFd<'_>) -> Result<()> {
    let mut attr = raw(link);
    // SAFETY: the attribute of this command is the descriptor.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }
        .map_err(|error| SysError::new("BPF_LINK_DETACH", "link", error))?;
    Ok(())
}

/// The result of running a program on a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TestRun {
    /// What the program returned.
    pub retval: u32,
    /// The frame as the program left it; after several runs, as the last run left it.
    pub data_out: Vec<u8>,
    /// Nanoseconds of a run, averaged over all runs.
    pub duration_ns: u32,
}

/// Runs a program on a frame of at least 14 bytes, `repeat` times. Each run starts with the result of the previous one.
///
/// # Errors
/// [`SysError`] if the kernel refuses the frame or the program's type.
pub fn test_run(prog: BorrowedFd<'_>, frame: &[u8], repeat: u32) -> Result<TestRun> {
    // Room for what a program may add: headers, or a tail.
    let mut data_out = vec![0; frame.len() + 512];
    let mut attr = TestRunAttr {
        prog_fd: raw(prog),
        data_size_in: frame.len() as u32,
        data_size_out: data_out.len() as u32,
        data_in: address(frame),
        data_out: address_mut(&mut data_out),
        repeat,
        ..Zeroable::zeroed()
    };
    // SAFETY: `data_in` and `data_out` are valid for their given sizes.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr) }
        .map_err(|error| SysError::new("BPF_PROG_TEST_RUN", format!("frame of {} bytes", frame.len()), error))?;
    data_out.truncate(attr.data_size_out as usize);
    Ok(TestRun { retval: attr.retval, data_out, duration_ns: attr.duration })
}
