//! The known objects of one kind, and how current they are.

use std::{collections::BTreeMap, sync::Arc};

use super::decode::{Item, Undecodable, Watched, name_of, version};
use crate::source::{ObjectName, Problem, Sourced};

/// What is known about one kind.
#[derive(Debug)]
pub(super) struct ObjectCache<K> {
    entries: BTreeMap<ObjectName, Entry>,
    /// Changed in place while no snapshot holds a reference.
    objects: Arc<BTreeMap<ObjectName, Sourced<K>>>,
    /// Objects with a last state that cannot be read.
    undecodable: BTreeMap<ObjectName, Undecodable>,
    /// Everything up to this version is known. It comes from a list or a bookmark.
    floor: u64,
    /// When all of it was last known to be current, `CLOCK_MONOTONIC` in nanoseconds; zero until a list was complete.
    current_ns: u64,
}

#[derive(Debug)]
struct Entry {
    version: u64,
    /// If false: it was deleted at that version.
    is_there: bool,
}

impl<K> Default for ObjectCache<K> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            objects: Arc::default(),
            undecodable: BTreeMap::new(),
            floor: 0,
            current_ns: 0,
        }
    }
}

impl<K: Watched> ObjectCache<K> {
    /// Replaces everything with a complete list; objects that cannot be read keep their former state. Returns whether anything
    /// differs.
    pub(super) fn replace(&mut self, items: Vec<Item<K>>, list_version: Option<&str>, now_ns: u64) -> bool {
        let former = std::mem::take(&mut self.objects);
        let not_read = std::mem::take(&mut self.undecodable);
        let mut now = BTreeMap::new();
        let mut changed = self.current_ns == 0;
        self.entries.clear();
        for item in items {
            match item.map(taken) {
                Ok((name, version, object)) => {
                    let (kept, differs) = keep(former.get(&name), object);
                    changed |= differs;
                    self.entries.insert(name.clone(), Entry { version, is_there: true });
                    now.insert(name, kept);
                }
                Err(undecodable) => {
                    let (name, version) = (undecodable.name.clone(), number(&undecodable.version));
                    self.entries.insert(name.clone(), Entry { version, is_there: true });
                    now.extend(former.get(&name).map(|known| (name.clone(), known.clone())));
                    self.undecodable.insert(name, undecodable);
                }
            }
        }
        changed |= self.undecodable != not_read;
        changed |= former.keys().any(|name| !now.contains_key(name));
        self.objects = Arc::new(now);
        self.floor = version(list_version).unwrap_or(0);
        self.current_ns = now_ns;
        changed
    }

    /// Stores an object that was added or modified. Returns whether anything differs.
    pub(super) fn put(&mut self, item: Item<K>, now_ns: u64) -> bool {
        self.current_ns = now_ns;
        let (name, version, object) = match item.map(taken) {
            Ok(taken) => taken,
            Err(undecodable) => return self.note(undecodable),
        };
        if self.is_overtaken(&name, version) {
            return false;
        }
        let was_bad = self.undecodable.remove(&name).is_some();
        self.entries.insert(name.clone(), Entry { version, is_there: true });
        let (kept, differs) = keep(self.objects.get(&name), object);
        if differs {
            Arc::make_mut(&mut self.objects).insert(name, kept);
        }
        differs || was_bad
    }

    /// Records an object that cannot be read; its former state stays. Returns whether that is new.
    fn note(&mut self, undecodable: Undecodable) -> bool {
        let (name, version) = (undecodable.name.clone(), number(&undecodable.version));
        if self.is_overtaken(&name, version) {
            return false;
        }
        self.entries.insert(name.clone(), Entry { version, is_there: true });
        self.undecodable.insert(name, undecodable);
        true
    }

    /// Removes an object that was deleted; its last state does not matter. Returns whether anything differs.
    pub(super) fn remove(&mut self, item: Item<K>, now_ns: u64) -> bool {
        self.current_ns = now_ns;
        let (name, version) = match item.map(taken) {
            Ok((name, version, _)) => (name, version),
            Err(undecodable) => (undecodable.name, number(&undecodable.version)),
        };
        if self.is_overtaken(&name, version) {
            return false;
        }
        let was_bad = self.undecodable.remove(&name).is_some();
        let differs = self.objects.contains_key(&name);
        if differs {
            Arc::make_mut(&mut self.objects).remove(&name);
        }
        self.entries.insert(name, Entry { version, is_there: false });
        differs || was_bad
    }

    /// What is wrong with objects of this kind.
    pub(super) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.undecodable.values().map(|undecodable| undecodable.problem(K::KIND))
    }

    /// Records that all events up to this version were sent.
    pub(super) fn bookmark(&mut self, text: &str, now_ns: u64) {
        self.current_ns = now_ns;
        self.floor = self.floor.max(version(Some(text)).unwrap_or(0));
        // A deletion must be remembered only as long as an older event may still arrive.
        let floor = self.floor;
        self.entries.retain(|_, entry| entry.is_there || entry.version > floor);
    }

    /// Whether a later state is known. Version zero cannot be compared, and counts as the latest.
    fn is_overtaken(&self, name: &ObjectName, version: u64) -> bool {
        let known = self.entries.get(name).map_or(0, |entry| entry.version).max(self.floor);
        version != 0 && version <= known
    }

    /// When everything was last known to be current; `None` until a list was complete.
    pub(super) fn current_ns(&self) -> Option<u64> {
        Some(self.current_ns).filter(|&current_ns| current_ns != 0)
    }

    /// One object.
    pub(super) fn get(&self, name: &ObjectName) -> Option<&K> {
        Some(&*self.objects.get(name)?.object)
    }

    /// The objects, by name.
    pub(super) fn objects(&self) -> Arc<BTreeMap<ObjectName, Sourced<K>>> {
        Arc::clone(&self.objects)
    }
}

/// A version as a number; zero if it cannot be compared.
fn number(text: &str) -> u64 {
    version(Some(text)).unwrap_or(0)
}

/// The name and version of an object, and the object without its version, because a new version alone is no change.
fn taken<K: Watched>(mut object: K) -> (ObjectName, u64, K) {
    let meta = object.meta();
    let name = name_of(meta);
    let version = number(&meta.resource_version.take().unwrap_or_default());
    (name, version, object)
}

/// The known object if the new one is equal, else the new one; and whether they differ.
fn keep<K: PartialEq>(known: Option<&Sourced<K>>, object: K) -> (Sourced<K>, bool) {
    match known {
        Some(known) if *known.object == object => (known.clone(), false),
        _ => (Sourced { origin: None, object: Arc::new(object) }, true),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::decode, *};
    use crate::source::api::Service;

    fn service(name: &str, version: u64, ip: &str) -> Service {
        let json = format!(
            r#"{{"metadata": {{"name": "{name}", "namespace": "a", "resourceVersion": "{version}"}},
                "spec": {{"clusterIP": "{ip}"}}}}"#
        );
        serde_json::from_str(&json).expect("a service")
    }

    /// `name=address`, in order.
    fn shown(cache: &ObjectCache<Service>) -> String {
        let ip = |sourced: &Sourced<Service>| sourced.object.spec.as_ref().and_then(|spec| spec.cluster_ip.clone());
        let shown = |(name, sourced)| format!("{}={}", name, ip(sourced).unwrap_or_default());
        cache.objects().iter().map(|(name, sourced)| shown((&name.name, sourced))).collect::<Vec<_>>().join(" ")
    }

    fn good(objects: Vec<Service>) -> Vec<Item<Service>> {
        objects.into_iter().map(Ok).collect()
    }

    fn cache(objects: Vec<Service>, version: &str) -> ObjectCache<Service> {
        let mut cache = ObjectCache::default();
        assert_eq!(cache.current_ns(), None);
        assert!(cache.replace(good(objects), Some(version), 1));
        cache
    }

    #[test]
    fn outdated_and_repeated_events_are_ignored() {
        let mut cache = cache(vec![service("x", 3, "1"), service("y", 5, "1")], "10");
        assert!(!cache.put(Ok(service("x", 9, "9")), 2), "older than the list");
        assert!(cache.put(Ok(service("x", 12, "2")), 2));
        assert!(!cache.put(Ok(service("x", 11, "9")), 2), "overtaken");
        assert!(!cache.put(Ok(service("x", 12, "2")), 2), "the same once more");
        assert!(cache.put(Ok(service("y", 11, "3")), 2), "another object's events are its own");
        assert!(cache.remove(Ok(service("y", 14, "3")), 2));
        assert!(!cache.put(Ok(service("y", 13, "9")), 2), "deleted since");
        assert!(!cache.remove(Ok(service("y", 14, "3")), 2), "deleted twice");
        assert_eq!(shown(&cache), "x=2");
        assert!(cache.put(Ok(service("y", 15, "4")), 2), "made again");
        assert_eq!(shown(&cache), "x=2 y=4");
    }

    #[test]
    fn deletions_are_forgotten_at_a_bookmark() {
        let mut cache = cache(vec![service("x", 3, "1")], "10");
        assert!(cache.remove(Ok(service("x", 11, "1")), 2));
        cache.bookmark("12", 3);
        assert!(cache.entries.is_empty());
        assert!(!cache.put(Ok(service("x", 10, "9")), 3), "older than the bookmark");
        assert!(cache.put(Ok(service("x", 13, "2")), 3));
        assert_eq!(cache.current_ns(), Some(3));
    }

    #[test]
    fn a_list_takes_the_place_of_everything_and_keeps_what_is_equal() {
        let mut cache = cache(vec![service("x", 3, "1"), service("y", 4, "1"), service("z", 5, "1")], "10");
        let before = cache.objects();
        assert!(cache.replace(good(vec![service("x", 3, "1"), service("y", 15, "2")]), Some("20"), 2));
        let after = cache.objects();
        assert_eq!(shown(&cache), "x=1 y=2");
        let x = ObjectName::new("a", "x");
        assert!(Arc::ptr_eq(&before[&x].object, &after[&x].object));
        // The same list again, with a later version, and even with an earlier one: the API may have been restored.
        assert!(!cache.replace(good(vec![service("x", 3, "1"), service("y", 15, "2")]), Some("30"), 3));
        assert!(!cache.replace(good(vec![service("x", 3, "1"), service("y", 15, "2")]), Some("5"), 3));
        assert!(cache.put(Ok(service("x", 6, "6")), 4));
    }

    #[test]
    fn a_new_version_of_an_equal_object_is_no_change() {
        let mut cache = cache(vec![service("x", 3, "1")], "10");
        let x = ObjectName::new("a", "x");
        let before = cache.objects()[&x].object.clone();
        assert!(!cache.put(Ok(service("x", 11, "1")), 2));
        assert!(Arc::ptr_eq(&before, &cache.objects()[&x].object));
        assert!(!cache.put(Ok(service("x", 11, "9")), 2), "its version counts all the same");
    }

    #[test]
    fn an_unreadable_object_is_reported_and_stays_as_it_was() {
        let bad = |name: &str, version: u64| {
            let json = format!(
                r#"{{"metadata": {{"name": "{name}", "namespace": "a", "resourceVersion": "{version}"}}, "spec": 1}}"#
            );
            decode::object::<Service>(serde_json::from_str(&json).expect("an object")).1
        };
        let problems = |cache: &ObjectCache<Service>| -> Vec<_> {
            cache.problems().filter_map(|problem| Some(problem.object?.name.name.to_string())).collect()
        };
        let mut cache = cache(vec![service("x", 3, "1"), service("y", 5, "1")], "10");
        assert!(!cache.put(bad("x", 9), 2), "older than the list");
        assert!(cache.put(bad("x", 11), 2) && cache.put(bad("z", 12), 2));
        assert_eq!((shown(&cache), problems(&cache)), ("x=1 y=1".to_owned(), ["x", "z"].map(str::to_owned).to_vec()));
        let list = vec![bad("x", 11), Ok(service("y", 5, "1")), bad("z", 12)];
        assert!(!cache.replace(list, Some("20"), 3), "as it was");
        assert!(cache.put(Ok(service("x", 21, "1")), 4), "it can be read again");
        assert!(cache.remove(bad("z", 22), 4), "its last state counts for nothing");
        assert!(!cache.put(bad("z", 21), 4), "deleted since");
        assert_eq!((shown(&cache), problems(&cache)), ("x=1 y=1".to_owned(), vec![]));
        assert!(cache.remove(bad("y", 23), 4));
        assert_eq!(shown(&cache), "x=1");
    }
}
