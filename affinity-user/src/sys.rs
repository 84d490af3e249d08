//! The only file of user space with `unsafe`: bpf(2), and the memory that it shares, behind safe functions.
//!
//! aya has no batch operations, falls back from link to netlink silently, and reuses pinned maps unchecked. So what the store,
//! the loader and the attachments need is here, on file descriptors and byte slices. Each call is sound because every function
//! checks the lengths of its slices against what the kernel reports about the object. Errors name the call and the object.
#![expect(unsafe_code, reason = "bpf(2) takes pointers in a union; maps are shared with the kernel by mmap")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
    sync::{
        LazyLock,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
    thread,
    time::{Duration, Instant},
};

use aya_obj::generated::{
    BPF_NOEXIST, bpf_cmd,
    bpf_map_type::{
        BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_ARRAY_OF_MAPS, BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY,
        BPF_MAP_TYPE_PERCPU_HASH, BPF_MAP_TYPE_RINGBUF,
    },
};
use bytemuck::{Pod, Zeroable};
use memmap2::{MmapOptions, MmapRaw};

/// A call failed.
#[derive(Debug, thiserror::Error)]
#[error("{call} {object}: {source}")]
pub struct SysError {
    /// The command or system call.
    pub call: &'static str,
    /// The object of the call.
    pub object: String,
    /// The kernel's error.
    pub source: io::Error,
}

impl SysError {
    /// From a call, its object and the kernel's error.
    pub fn new(call: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self { call, object: object.into(), source }
    }

    /// Whether there is no such object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

/// What the functions of this module return.
pub type Result<T> = std::result::Result<T, SysError>;

/// CPUs that could ever be online: the number of values in an entry of a per-CPU map.
#[must_use]
pub fn possible_cpus() -> usize {
    static CPUS: LazyLock<usize> = LazyLock::new(|| {
        aya::util::nr_cpus().expect("/sys/devices/system/cpu/possible says how much the kernel writes for each value")
    });
    *CPUS
}

/// bpf(2) with the attributes of one command.
///
/// # Safety
/// The pointers in `attr` must be valid for what `command` reads and writes.
unsafe fn bpf<A: Pod>(command: bpf_cmd, attr: &mut A) -> io::Result<i64> {
    // SAFETY: `attr` is plain data, valid for its whole size; the pointers in it are the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as u32, ptr::from_mut(attr), size_of::<A>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// bpf(2) with a command that returns a new file descriptor.
///
/// # Safety
/// As [`bpf`]; and `command` returns a descriptor.
unsafe fn bpf_fd<A: Pod>(command: bpf_cmd, attr: &mut A) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just created this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().expose_provenance() as u64
}

fn address_mut(bytes: &mut [u8]) -> u64 {
    bytes.as_mut_ptr().expose_provenance() as u64
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn c_path(call: &'static str, path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| SysError::new(call, path.display().to_string(), io::Error::other(error)))
}

// ---- objects and pins ----

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
fn info<T: Pod>(fd: BorrowedFd<'_>) -> io::Result<T> {
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

// ---- maps ----

/// The kernel's information about a map: the start of `struct bpf_map_info`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct MapInfo {
    /// A `bpf_map_type`.
    pub kind: u32,
    /// Its id.
    pub id: u32,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value, of one CPU in a per-CPU map.
    pub value_size: u32,
    /// Entries; bytes in a ring buffer.
    pub max_entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    map_name: [u8; 16],
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    /// The value; or the next key.
    value: u64,
    flags: u64,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// When an update may write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Write {
    /// Always.
    Any,
    /// Only if there is no entry.
    New,
}

impl Write {
    const fn flags(self) -> u64 {
        match self {
            Self::Any => 0,
            Self::New => BPF_NOEXIST as u64,
        }
    }
}

/// The result of one step of [`Map::lookup_batch`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Batch {
    /// This many entries were read, and there are more.
    More(usize),
    /// This many entries were read, and these were the last.
    Last(usize),
    /// One bucket has more entries than the slices have room for. Nothing was read: call again with more room.
    NoRoom,
}

/// An open map.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    name: String,
    info: MapInfo,
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Map {
    /// Creates a map; `spec.id` is not used. The kernel keeps the first 15 bytes of the name.
    ///
    /// # Errors
    /// [`SysError`] if the kernel refuses it.
    pub fn create(name: &str, spec: &MapInfo) -> Result<Self> {
        Self::create_with_inner(name, spec, None)
    }

    fn create_with_inner(name: &str, spec: &MapInfo, inner: Option<&Self>) -> Result<Self> {
        let mut attr = CreateAttr {
            map_type: spec.kind,
            key_size: spec.key_size,
            value_size: spec.value_size,
            max_entries: spec.max_entries,
            map_flags: spec.flags,
            inner_map_fd: inner.map_or(0, |map| raw(map.as_fd())),
            ..Zeroable::zeroed()
        };
        let len = name.len().min(attr.map_name.len() - 1);
        attr.map_name[..len].copy_from_slice(&name.as_bytes()[..len]);
        // SAFETY: the attributes of this command hold no pointer.
        let fd = unsafe { bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr) }
            .map_err(|error| SysError::new("BPF_MAP_CREATE", name, error))?;
        Self::from_fd(fd, name)
    }

    /// Opens a pinned map. Its name is the file's.
    ///
    /// # Errors
    /// [`SysError::is_not_found`] if nothing is pinned there.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self::from_fd(obj_get(path)?, &name)
    }

    /// Takes a map's descriptor.
    ///
    /// # Errors
    /// [`SysError`] if it is not a map's.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Self> {
        let target = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())
            .map_err(|error| SysError::new("readlink", name, error.into()))?;
        if !target.as_bytes().windows(7).any(|part| part == b"bpf-map") {
            return Err(SysError::new("BPF_OBJ_GET", name, io::Error::other("not a map")));
        }
        let info = info::<MapInfo>(fd.as_fd()).map_err(|error| SysError::new("BPF_OBJ_GET_INFO_BY_FD", name, error))?;
        Ok(Self { fd, name: name.to_owned(), info })
    }

    /// The kernel's information about it.
    #[must_use]
    pub const fn info(&self) -> &MapInfo {
        &self.info
    }

    /// The name it was opened by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of a key.
    #[must_use]
    pub const fn key_len(&self) -> usize {
        self.info.key_size as usize
    }

    /// Bytes of a value: in a per-CPU map, those of all CPUs, each rounded up to eight.
    #[must_use]
    pub fn value_len(&self) -> usize {
        const PER_CPU: [u32; 3] =
            [BPF_MAP_TYPE_PERCPU_HASH as u32, BPF_MAP_TYPE_PERCPU_ARRAY as u32, BPF_MAP_TYPE_LRU_PERCPU_HASH as u32];
        let size = self.info.value_size as usize;
        if PER_CPU.contains(&self.info.kind) { size.next_multiple_of(8) * possible_cpus() } else { size }
    }

    fn error(&self, call: &'static str, source: io::Error) -> SysError {
        SysError::new(call, self.name.clone(), source)
    }

    /// Panics unless the slices have the lengths that the kernel will read and write.
    fn check(&self, entries: usize, keys: &[u8], values: Option<&[u8]>) {
        assert_eq!(keys.len(), entries * self.key_len(), "length of the keys of {}", self.name);
        if let Some(values) = values {
            assert_eq!(values.len(), entries * self.value_len(), "length of the values of {}", self.name);
        }
    }

    fn element(&self, key: &[u8], value: u64, flags: u64) -> ElementAttr {
        ElementAttr { map_fd: raw(self.as_fd()), pad: 0, key: address(key), value, flags }
    }

    /// Reads one value; false if there is no entry.
    ///
    /// # Errors
    /// [`SysError`].
    pub fn lookup(&self, key: &[u8], value: &mut [u8]) -> Result<bool> {
        self.check(1, key, Some(value));
        let mut attr = self.element(key, address_mut(value), 0);
        // SAFETY: `check` has seen that both slices have the map's lengths.
        found(unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) })
            .map_err(|error| self.error("BPF_MAP_LOOKUP_ELEM", error))
    }

    /// Writes one value; false if [`Write::New`] found an entry.
    ///
    /// # Errors
    /// [`SysError`]; `E2BIG` if a hash is full.
    pub fn update(&self, key: &[u8], value: &[u8], write: Write) -> Result<bool> {
        self.check(1, key, Some(value));
        let mut attr = self.element(key, address(value), write.flags());
        // SAFETY: `check` has seen that both slices have the map's lengths; the kernel only reads them.
        match patiently(|| unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) }) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(self.error("BPF_MAP_UPDATE_ELEM", error)),
        }
    }

    /// Removes an entry; false if there was none.
    ///
    /// # Errors
    /// [`SysError`].
    pub fn delete(&self, key: &[u8]) -> Result<bool> {
        self.check(1, key, None);
        let mut attr = self.element(key, 0, 0);
        // SAFETY: `check` has seen that the key has the map's length; the kernel only reads it.
        found(unsafe { bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) })
            .map_err(|error| self.error("BPF_MAP_DELETE_ELEM", error))
    }

    /// Writes the key after `key` (the first key if that is none) into `next`; false at the end.
    ///
    /// # Errors
    /// [`SysError`].
    pub fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> Result<bool> {
        self.check(1, next, None);
        let mut attr = self.element(&[], address_mut(next), 0);
        attr.key = key.map_or(0, |key| {
            self.check(1, key, None);
            address(key)
        });
        // SAFETY: `check` has seen that both keys have the map's length; a null key asks for the first.
        found(unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) })
            .map_err(|error| self.error("BPF_MAP_GET_NEXT_KEY", error))
    }

    /// Bytes of the position in a batched walk: an index of a bucket, or a key.
    #[must_use]
    pub fn position_len(&self) -> usize {
        self.key_len().max(size_of::<u32>())
    }

    /// Reads the entries after `from` (from the start if that is none) and writes the new position into `to`. Entries that are
    /// added or removed meanwhile may be read or not. No other entry is missed or read twice.
    ///
    /// # Errors
    /// [`SysError`]; `ENOTSUPP` (524) or `EINVAL` if the kernel does not support it for this type of map.
    pub fn lookup_batch(
        &self,
        from: Option<&[u8]>,
        to: &mut [u8],
        keys: &mut [u8],
        values: &mut [u8],
    ) -> Result<Batch> {
        let entries = keys.len() / self.key_len();
        self.check(entries, keys, Some(values));
        assert!(
            to.len() >= self.position_len() && from.is_none_or(|from| from.len() >= self.position_len()),
            "length of a position in {}",
            self.name
        );
        let mut attr = BatchAttr {
            in_batch: from.map_or(0, address),
            out_batch: address_mut(to),
            keys: address_mut(keys),
            values: address_mut(values),
            count: entries as u32,
            map_fd: raw(self.as_fd()),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: keys and values have room for `count` entries, the positions for what the kernel keeps in them.
        let result = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) };
        let count = attr.count as usize;
        match result {
            Ok(_) => Ok(Batch::More(count)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Batch::Last(count)),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => Ok(Batch::NoRoom),
            Err(error) => Err(self.error("BPF_MAP_LOOKUP_BATCH", error)),
        }
    }

    /// Writes entries, replaces any under their keys, and returns how many were written.
    ///
    /// # Errors
    /// [`SysError`]; the entries before the one that failed are written.
    pub fn update_batch(&self, keys: &[u8], values: &[u8]) -> Result<usize> {
        let entries = keys.len() / self.key_len();
        self.check(entries, keys, Some(values));
        let mut attr = BatchAttr {
            keys: address(keys),
            values: address(values),
            count: entries as u32,
            map_fd: raw(self.as_fd()),
            ..Zeroable::zeroed()
        };
        let written = patiently(|| {
            attr.count = entries as u32;
            // SAFETY: keys and values hold `count` entries; the kernel only reads them.
            unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) }
        });
        written.map_err(|error| self.error("BPF_MAP_UPDATE_BATCH", error))?;
        Ok(attr.count as usize)
    }

    /// Maps the values of an array created with `BPF_F_MMAPABLE` into memory, to read and write.
    ///
    /// # Errors
    /// [`SysError`] if the map is not of that kind.
    pub fn words(&self) -> Result<Words> {
        let stride = (self.info.value_size as usize).next_multiple_of(8);
        let len = stride * self.info.max_entries as usize;
        if self.info.kind != BPF_MAP_TYPE_ARRAY as u32 {
            return Err(self.error("mmap", io::Error::other("not an array")));
        }
        let map = MmapOptions::new().len(len).map_raw(&self.fd).map_err(|error| self.error("mmap", error))?;
        Ok(Words { map, stride, entries: self.info.max_entries })
    }

    /// Maps a ring buffer into memory, to read it.
    ///
    /// # Errors
    /// [`SysError`] if the map is no ring buffer.
    pub fn ring(&self) -> Result<Ring> {
        if self.info.kind != BPF_MAP_TYPE_RINGBUF as u32 {
            return Err(self.error("mmap", io::Error::other("not a ring buffer")));
        }
        let page = rustix::param::page_size();
        let size = self.info.max_entries as usize;
        // The producer's page, and the data twice in a row, so that a record never ends at the buffer's end.
        let shared = MmapOptions::new().offset(page as u64).len(page + 2 * size).map_raw_read_only(&self.fd);
        let shared = shared.map_err(|error| self.error("mmap", error))?;
        Ok(Ring { shared, page, size })
    }

    /// Maps the page with the consumer's position of a ring buffer into memory.
    ///
    /// # Errors
    /// [`SysError`] if the map is no ring buffer.
    pub fn ring_consumer(&self) -> Result<RingConsumer> {
        if self.info.kind != BPF_MAP_TYPE_RINGBUF as u32 {
            return Err(self.error("mmap", io::Error::other("not a ring buffer")));
        }
        let page = MmapOptions::new().len(rustix::param::page_size()).map_raw(&self.fd);
        Ok(RingConsumer { page: page.map_err(|error| self.error("mmap", error))? })
    }
}

fn found(result: io::Result<i64>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits until every program that runs now has ended.
///
/// An update of a map of maps does that before it returns: the kernel promises its caller that no program still uses the old
/// inner map (`maybe_wait_bpf_programs` in <https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/syscall.c#L148>). A sleep
/// would guarantee nothing.
///
/// # Errors
/// [`SysError`] if such a map cannot be created.
pub fn synchronize() -> Result<()> {
    let inner =
        MapInfo { kind: BPF_MAP_TYPE_ARRAY as u32, key_size: 4, value_size: 4, max_entries: 1, ..Zeroable::zeroed() };
    let outer = MapInfo { kind: BPF_MAP_TYPE_ARRAY_OF_MAPS as u32, ..inner };
    let inner = Map::create("grace_inner", &inner)?;
    let outer = Map::create_with_inner("grace", &outer, Some(&inner))?;
    outer.update(&[0; 4], &inner.as_fd().as_raw_fd().to_ne_bytes(), Write::Any)?;
    Ok(())
}

/// How long a map may lack memory before that is an error, and how often to retry.
///
/// A hash without preallocation takes its elements from a stock that the kernel refills in the background, without waiting for
/// memory (`alloc_bulk` in <https://github.com/torvalds/linux/blob/v6.12/kernel/bpf/memalloc.c#L212>). Many writes at once can
/// empty the stock, above all if an element has a value for each CPU: those pages come a few at a time.
const REFILL_PATIENCE: Duration = Duration::from_secs(2);
const REFILL_PAUSE: Duration = Duration::from_millis(1);

/// Makes a call that writes to a map, and repeats it while the map's stock of elements is empty.
fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let mut result = call();
    let begun = Instant::now();
    while result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::ENOMEM))
        && begun.elapsed() < REFILL_PATIENCE
    {
        thread::sleep(REFILL_PAUSE);
        result = call();
    }
    result
}

// ---- memory shared with the kernel ----

/// The values of an array, shared with the programs. Every access is one atomic load or store.
#[derive(Debug)]
pub struct Words {
    map: MmapRaw,
    stride: usize,
    entries: u32,
}

impl Words {
    /// Number of values.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.entries
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Panics if `index` is out of range.
    fn at(&self, index: u32) -> *mut u8 {
        assert!(index < self.entries, "index {index} of {} values", self.entries);
        self.map.as_mut_ptr().wrapping_add(index as usize * self.stride)
    }

    fn u32_at(&self, index: u32) -> &AtomicU32 {
        // SAFETY: within the mapping by the check in `at`; aligned, because the stride is a multiple of eight; and all accesses
        // of this process are atomic.
        unsafe { AtomicU32::from_ptr(self.at(index).cast()) }
    }

    fn u64_at(&self, index: u32) -> &AtomicU64 {
        // SAFETY: as in `u32_at`.
        unsafe { AtomicU64::from_ptr(self.at(index).cast()) }
    }

    /// A value of four bytes.
    #[must_use]
    pub fn load_u32(&self, index: u32) -> u32 {
        self.u32_at(index).load(Ordering::Acquire)
    }

    /// Writes a value of four bytes.
    pub fn store_u32(&self, index: u32, value: u32) {
        self.u32_at(index).store(value, Ordering::Release);
    }

    /// A value of eight bytes.
    #[must_use]
    pub fn load_u64(&self, index: u32) -> u64 {
        self.u64_at(index).load(Ordering::Acquire)
    }

    /// Writes a value of eight bytes.
    pub fn store_u64(&self, index: u32, value: u64) {
        self.u64_at(index).store(value, Ordering::Release);
    }

    /// Adds to a value of eight bytes; wraps.
    pub fn add_u64(&self, index: u32, difference: i64) {
        self.u64_at(index).fetch_add(difference as u64, Ordering::AcqRel);
    }

    /// Sets bits of a value of eight bytes.
    pub fn set_bits(&self, index: u32, bits: u64) {
        self.u64_at(index).fetch_or(bits, Ordering::AcqRel);
    }

    /// Clears bits of a value of eight bytes.
    pub fn clear_bits(&self, index: u32, bits: u64) {
        self.u64_at(index).fetch_and(!bits, Ordering::AcqRel);
    }
}

/// A ring buffer, read only: <https://docs.kernel.org/bpf/ringbuf.html>.
#[derive(Debug)]
pub struct Ring {
    shared: MmapRaw,
    page: usize,
    size: usize,
}

impl Ring {
    /// Bytes of the buffer.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// How many bytes were produced so far.
    #[must_use]
    pub fn produced(&self) -> u64 {
        // SAFETY: the producer's position is the first word of the first page of this mapping.
        unsafe { load_read_only(self.shared.as_mut_ptr().cast()) }
    }

    /// The eight bytes at a position, which must be a multiple of eight.
    ///
    /// The kernel may overwrite them meanwhile: compare [`Ring::produced`] after reading.
    #[must_use]
    pub fn word(&self, position: u64) -> u64 {
        assert_eq!(position % 8, 0, "a position in the ring is a multiple of eight");
        let offset = self.page + (position as usize & (self.size - 1));
        // SAFETY: the data follow the first page, `size` bytes (a power of two) twice; the mask keeps the offset within the
        // first copy, and it is aligned.
        unsafe { load_read_only(self.shared.as_mut_ptr().add(offset).cast()) }
    }
}

/// An acquiring load from memory that this process may not write. The only atomic access that is defined there is a relaxed
/// load of at most a machine word.
///
/// # Safety
/// `word` is aligned and valid to read, and all accesses of this process are atomic.
unsafe fn load_read_only(word: *mut u64) -> u64 {
    // SAFETY: the caller's promise.
    let value = unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Relaxed);
    fence(Ordering::Acquire);
    value
}

/// How far a ring buffer was consumed: the kernel may overwrite everything before that.
#[derive(Debug)]
pub struct RingConsumer {
    page: MmapRaw,
}

impl RingConsumer {
    fn position(&self) -> &AtomicU64 {
        // SAFETY: the consumer's position is the first word of the buffer's first page; all access is atomic.
        unsafe { AtomicU64::from_ptr(self.page.as_mut_ptr().cast()) }
    }

    /// How many bytes were consumed.
    #[must_use]
    pub fn consumed(&self) -> u64 {
        self.position().load(Ordering::Acquire)
    }

    /// Gives everything before `position` back to the kernel.
    pub fn consume(&self, position: u64) {
        self.position().store(position, Ordering::Release);
    }
}

// ---- programs and links ----

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

// ---- files ----

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

// ---- network namespaces ----

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

// ---- network cards ----

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
