//! Typed access to one pinned map.
//!
//! A walk reads in batches of [`BATCH`] entries and holds no more than one batch, whatever the size of the map.

use std::{fmt::Debug, io, marker::PhantomData, path::Path};

use bytemuck::Pod;

use crate::{
    store::StoreError,
    sys::{self, Batch, Map, MapInfo, SysError, Write},
};

/// The number of entries that a walk reads at once.
pub const BATCH: usize = 1024;

/// A hash or an array: key -> value.
#[derive(Debug)]
pub struct Table<K, V> {
    map: Map,
    name: &'static str,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod + Debug, V: Pod> Table<K, V> {
    /// Opens the map `name` that is pinned in the directory `maps`.
    ///
    /// # Errors
    /// [`StoreError`] if it does not exist, or has another layout.
    pub fn open(maps: &Path, name: &'static str) -> Result<Self, StoreError> {
        let table = Self { map: open(maps, name)?, name, types: PhantomData };
        table.check_layout(size_of::<V>())?;
        Ok(table)
    }

    fn check_layout(&self, value_len: usize) -> Result<(), StoreError> {
        if (self.map.key_len(), self.map.value_len()) == (size_of::<K>(), value_len) {
            return Ok(());
        }
        let (key, value) = (self.map.key_len(), self.map.value_len());
        let source = io::Error::other(format!(
            "pinned with keys of {key} and values of {value} bytes, expected {} and {value_len}",
            size_of::<K>()
        ));
        Err(StoreError { map: self.name, action: "open".to_owned(), source })
    }

    /// The kernel's information about the map.
    #[must_use]
    pub const fn info(&self) -> &MapInfo {
        self.map.info()
    }

    /// The value of a key.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get(&self, key: &K) -> Result<Option<V>, StoreError> {
        let mut value = V::zeroed();
        let found = self
            .map
            .lookup(bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value))
            .map_err(|error| self.error("get", key, error))?;
        Ok(found.then_some(value))
    }

    /// Writes a value, and replaces any value of the same key.
    ///
    /// # Errors
    /// [`StoreError`], for example if the map is full.
    pub fn put(&self, key: &K, value: &V) -> Result<(), StoreError> {
        self.write("put", key, value, Write::Any).map(|_| ())
    }

    /// Writes a value if the key has none; false if it has one.
    ///
    /// # Errors
    /// [`StoreError`], for example if the map is full.
    pub fn add(&self, key: &K, value: &V) -> Result<bool, StoreError> {
        self.write("add", key, value, Write::New)
    }

    fn write(&self, action: &str, key: &K, value: &V, write: Write) -> Result<bool, StoreError> {
        self.map
            .update(bytemuck::bytes_of(key), bytemuck::bytes_of(value), write)
            .map_err(|error| self.error(action, key, error))
    }

    /// Removes an entry; false if there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove(&self, key: &K) -> Result<bool, StoreError> {
        self.map.delete(bytemuck::bytes_of(key)).map_err(|error| self.error("remove", key, error))
    }

    /// Walks all entries. Entries that are added or removed during the walk may be missed.
    pub fn iter(&self) -> Entries<'_, K, V> {
        Entries { table: self, walk: self.walk() }
    }

    /// A walk in steps, for [`Table::next_batch`].
    #[must_use]
    pub fn walk(&self) -> Walk {
        Walk::new(&self.map)
    }

    /// The next entries of a walk, about [`BATCH`]; `None` at its end.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn next_batch(&self, walk: &mut Walk) -> Result<Option<Vec<(K, V)>>, StoreError> {
        let batch = walk.next_batch(&self.map).map_err(|error| walk_failed(self.name, error))?;
        Ok(batch.map(|(keys, values)| {
            let keys = keys.chunks_exact(size_of::<K>()).map(bytemuck::pod_read_unaligned);
            keys.zip(values.chunks_exact(size_of::<V>()).map(bytemuck::pod_read_unaligned)).collect()
        }))
    }

    fn error(&self, action: &str, key: &K, error: SysError) -> StoreError {
        StoreError { map: self.name, action: format!("{action} {key:?}"), source: error.source }
    }
}

impl<'a, K: Pod + Debug, V: Pod> IntoIterator for &'a Table<K, V> {
    type Item = Result<(K, V), StoreError>;
    type IntoIter = Entries<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The walk of [`Table::iter`].
pub struct Entries<'a, K, V> {
    table: &'a Table<K, V>,
    walk: Walk,
}

impl<K: Pod, V: Pod> Iterator for Entries<'_, K, V> {
    type Item = Result<(K, V), StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Table { map, name, .. } = self.table;
        let entry = self
            .walk
            .next(map)?
            .map(|(key, value)| (bytemuck::pod_read_unaligned::<K>(key), bytemuck::pod_read_unaligned::<V>(value)));
        Some(entry.map_err(|error| walk_failed(name, error)))
    }
}

/// A hash or an array with a value for each CPU.
#[derive(Debug)]
pub struct PerCpu<K, V> {
    table: Table<K, V>,
}

impl<K: Pod + Debug, V: Pod> PerCpu<K, V> {
    const STRIDE: usize = size_of::<V>().next_multiple_of(8);

    /// Like [`Table::open`].
    ///
    /// # Errors
    /// Like [`Table::open`].
    pub fn open(maps: &Path, name: &'static str) -> Result<Self, StoreError> {
        let table = Table { map: open(maps, name)?, name, types: PhantomData };
        table.check_layout(Self::STRIDE * sys::possible_cpus())?;
        Ok(Self { table })
    }

    /// The kernel's information about the map.
    #[must_use]
    pub const fn info(&self) -> &MapInfo {
        self.table.info()
    }

    /// Creates an entry of zeros if there is none.
    ///
    /// # Errors
    /// [`StoreError`], for example if the map is full.
    pub fn make(&self, key: &K) -> Result<(), StoreError> {
        self.write_zeros("make", key, Write::New)
    }

    /// Sets an entry to zeros.
    ///
    /// # Errors
    /// [`StoreError`], for example if the map is full.
    pub fn reset(&self, key: &K) -> Result<(), StoreError> {
        self.write_zeros("reset", key, Write::Any)
    }

    fn write_zeros(&self, action: &str, key: &K, write: Write) -> Result<(), StoreError> {
        let zeros = vec![0; Self::STRIDE * sys::possible_cpus()];
        let written = self.table.map.update(bytemuck::bytes_of(key), &zeros, write);
        written.map(|_| ()).map_err(|error| self.table.error(action, key, error))
    }

    /// Removes an entry; false if there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove(&self, key: &K) -> Result<bool, StoreError> {
        self.table.remove(key)
    }

    /// Walks all entries, each with the values of all CPUs.
    pub fn iter(&self) -> impl Iterator<Item = Result<(K, Vec<V>), StoreError>> {
        let mut walk = Walk::new(&self.table.map);
        std::iter::from_fn(move || {
            let entry = walk.next(&self.table.map)?.map(|(key, values)| {
                let values = values.chunks_exact(Self::STRIDE);
                let values = values.map(|value| bytemuck::pod_read_unaligned(&value[..size_of::<V>()]));
                (bytemuck::pod_read_unaligned(key), values.collect())
            });
            Some(entry.map_err(|error| walk_failed(self.table.name, error)))
        })
    }
}

/// Opens the map `name` that is pinned in the directory `maps`.
pub(super) fn open(maps: &Path, name: &'static str) -> Result<Map, StoreError> {
    Map::open(&maps.join(name)).map_err(|error| StoreError {
        map: name,
        action: format!("open {}", error.object),
        source: error.source,
    })
}

fn walk_failed(map: &'static str, error: SysError) -> StoreError {
    StoreError { map, action: "walk".to_owned(), source: error.source }
}

/// The same number of keys and values, as bytes.
pub type Bytes<'a> = (&'a [u8], &'a [u8]);

/// A walk over the bytes of any hash or array: in batches if the kernel supports them for this type of map, otherwise key by
/// key.
///
/// It holds its position and a batch, but not the map: the caller passes the same map each time.
#[derive(Debug)]
pub struct Walk {
    keys: Vec<u8>,
    values: Vec<u8>,
    /// Where the next batch begins; `None` at the start.
    position: Option<Vec<u8>>,
    /// The number of entries in `keys` and `values`, and how many of them were returned.
    filled: usize,
    given: usize,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Batches,
    /// Key by key, with the maximum number of remaining steps. If the current entry is removed, the kernel starts again from
    /// the beginning, so without a limit a walk over a changing table might never end.
    Keys(u64),
    Done,
}

impl Walk {
    /// A walk at the start of `map`.
    #[must_use]
    pub fn new(map: &Map) -> Self {
        let room = BATCH.min(map.info().max_entries as usize).max(1);
        Self {
            keys: vec![0; room * map.key_len()],
            values: vec![0; room * map.value_len()],
            position: None,
            filled: 0,
            given: 0,
            state: State::Batches,
        }
    }

    /// The next entry: the bytes of its key and its value.
    pub fn next(&mut self, map: &Map) -> Option<Result<Bytes<'_>, SysError>> {
        while self.given == self.filled {
            let filled = match self.state {
                State::Batches => self.fill(map),
                State::Keys(steps) => self.step(map, steps),
                State::Done => return None,
            };
            match filled {
                Ok(filled) => (self.filled, self.given) = (filled, 0),
                Err(error) => {
                    self.state = State::Done;
                    return Some(Err(error));
                }
            }
        }
        let entry = self.given;
        self.given += 1;
        Some(Ok((nth(&self.keys, entry, map.key_len()), nth(&self.values, entry, map.value_len()))))
    }

    /// The rest of the current batch, or the next one; `None` at the end.
    ///
    /// # Errors
    /// [`SysError`] if the map could not be read.
    pub fn next_batch(&mut self, map: &Map) -> Result<Option<Bytes<'_>>, SysError> {
        match self.next(map) {
            None => return Ok(None),
            Some(Err(error)) => return Err(error),
            Some(Ok(_)) => {}
        }
        let (from, to) = (self.given - 1, self.filled);
        self.given = self.filled;
        let (key, value) = (map.key_len(), map.value_len());
        Ok(Some((&self.keys[from * key..to * key], &self.values[from * value..to * value])))
    }

    fn fill(&mut self, map: &Map) -> Result<usize, SysError> {
        let mut next = vec![0; map.position_len()];
        loop {
            let read = map.lookup_batch(self.position.as_deref(), &mut next, &mut self.keys, &mut self.values);
            match read {
                Ok(Batch::More(count)) => {
                    self.position = Some(next);
                    return Ok(count);
                }
                Ok(Batch::Last(count)) => {
                    self.state = State::Done;
                    return Ok(count);
                }
                Ok(Batch::NoRoom) => {
                    self.keys.resize(self.keys.len() * 2, 0);
                    self.values.resize(self.values.len() * 2, 0);
                }
                Err(error) if self.position.is_none() && is_unsupported(&error) => {
                    self.state = State::Keys(2 * u64::from(map.info().max_entries));
                    return Ok(0);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn step(&mut self, map: &Map, steps: u64) -> Result<usize, SysError> {
        let next = &mut self.keys[..map.key_len()];
        if steps == 0 || !map.next_key(self.position.as_deref(), next)? {
            self.state = State::Done;
            return Ok(0);
        }
        self.state = State::Keys(steps - 1);
        self.position = Some(next.to_vec());
        Ok(usize::from(map.lookup(next, &mut self.values[..map.value_len()])?))
    }
}

fn nth(bytes: &[u8], index: usize, len: usize) -> &[u8] {
    &bytes[index * len..][..len]
}

/// The kernel-internal `ENOTSUPP` has no name in libc.
fn is_unsupported(error: &SysError) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(error.source.raw_os_error(), Some(ENOTSUPP | libc::EINVAL | libc::EOPNOTSUPP))
}
