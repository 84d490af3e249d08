//! Maps: their entries, one by one and in batches.
//!
//! aya has no batch operations. Each call is sound because every function checks the lengths of its slices against what the
//! kernel reports about the map.
#![expect(unsafe_code, reason = "bpf(2) takes pointers in a union")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use aya_obj::generated::{
    BPF_NOEXIST, bpf_cmd,
    bpf_map_type::{
        BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_ARRAY_OF_MAPS, BPF_MAP_TYPE_LRU_PERCPU_HASH, BPF_MAP_TYPE_PERCPU_ARRAY,
        BPF_MAP_TYPE_PERCPU_HASH,
    },
};
use bytemuck::{Pod, Zeroable};

use super::{
    Result, SysError,
    bpf::{address, address_mut, bpf, bpf_fd, info, obj_get, raw},
};

/// CPUs that could ever be online: the number of values in an entry of a per-CPU map.
#[must_use]
pub fn possible_cpus() -> usize {
    static CPUS: LazyLock<usize> = LazyLock::new(|| {
        aya::util::nr_cpus().expect("/sys/devices/system/cpu/possible says how much the kernel writes for each value")
    });
    *CPUS
}

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

    pub(super) fn error(&self, call: &'static str, source: io::Error) -> SysError {
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
