//! bpf(2), and objects of any kind: their pins, and the kernel's information about them.
#![expect(unsafe_code, reason = "bpf(2) takes pointers in a union")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

use aya_obj::generated::bpf_cmd;
use bytemuck::{Pod, Zeroable};

use super::{Result, SysError};

/// bpf(2) with the attributes of one command.
///
/// # Safety
/// The pointers in `attr` must be valid for what `command` reads and writes.
pub(super) unsafe fn bpf<A: Pod>(command: bpf_cmd, attr: &mut A) -> io::Result<i64> {
    // SAFETY: `attr` is plain data, valid for its whole size; the pointers in it are the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as u32, ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// bpf(2) with a command that returns a new file descriptor.
///
/// # Safety
/// As [`bpf`]; and `command` returns a descriptor.
pub(super) unsafe fn bpf_fd<A: Pod>(command: bpf_cmd, attr: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just created this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

pub(super) fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().expose_provenance() as u64
}

pub(super) fn address_mut(bytes: &mut [u8]) -> u64 {
    bytes.as_mut_ptr().expose_provenance() as u64
}

pub(super) fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(call: &'static str, path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| SysError::new(call, path.display().to_string(), io::Error::other(error)))
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// Opens what is pinned at `path`: a map, a program or a link.
///
/// # Errors
/// [`SysError::is_not_found`] if nothing is pinned there.
pub fn obj_get(path: &Path) -> Result<OwnedFd> {
    let name = c_path("BPF_OBJ_GET", path)?;
    let mut attr = ObjAttr { pathname: address(name.as_bytes_with_nul()), ..Zeroable::zeroed() };
    // SAFETY: `pathname` is a string that ends in NUL and outlives the call.
    unsafe { bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr) }
        .map_err(|error| SysError::new("BPF_OBJ_GET", path.display().to_string(), error))
}

/// Pins a map, a program or a link at `path`, which must not exist yet.
///
/// # Errors
/// [`SysError`], also if something is pinned there already.
pub fn obj_pin(fd: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let name = c_path("BPF_OBJ_PIN", path)?;
    let mut attr = ObjAttr { pathname: address(name.as_bytes_with_nul()), bpf_fd: raw(fd), ..Zeroable::zeroed() };
    // SAFETY: `pathname` is a string that ends in NUL and outlives the call.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }
        .map_err(|error| SysError::new("BPF_OBJ_PIN", path.display().to_string(), error))?;
    Ok(())
}

/// Reads the first `size_of::<T>()` bytes of the kernel's information about an object. If it has fewer, the rest of `T` stays
/// zero.
pub(super) fn info<T: Pod>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::zeroed();
    let mut attr = InfoAttr {
        bpf_fd: raw(fd),
        info_len: size_of::<T>() as u32,
        info: address_mut(bytemuck::bytes_of_mut(&mut info)),
    };
    // SAFETY: `info` is valid for `info_len` bytes, and any bytes make a valid `T`.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}
