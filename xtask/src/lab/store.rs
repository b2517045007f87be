//! The API server's objects and their recent history. Pure: the HTTP side is `api`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde_json::{Value, json};

/// Enough for any test to fall behind and catch up; small enough to see expiry.
const HISTORY: usize = 1000;

/// The kinds that the agent watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Pod,
    EndpointSlice,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::EndpointSlice => "EndpointSlice",
        }
    }

    pub(crate) fn api_version(self) -> &'static str {
        match self {
            Self::Pod => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
        }
    }
}

/// One change, as a watch shows it.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) version: u64,
    pub(crate) kind: Kind,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub(crate) change: &'static str,
    pub(crate) object: Arc<Value>,
}

/// The version asked for is older than the history reaches (410 Gone).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Expired;

/// Objects by kind and UID, with one version counter for all, as etcd has.
#[derive(Debug, Default)]
pub(crate) struct Store {
    version: u64,
    objects: BTreeMap<(Kind, String), Arc<Value>>,
    history: VecDeque<Event>,
    /// Changes up to this version are forgotten.
    forgotten: u64,
}

impl Store {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Adds or replaces an object.
    pub(crate) fn put(&mut self, kind: Kind, object: Value) {
        let key = (kind, uid(&object));
        let change = if self.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        let object = self.record(kind, change, object);
        self.objects.insert(key, object);
    }

    /// An object as it is now.
    pub(crate) fn get(&self, kind: Kind, uid: &str) -> Option<&Arc<Value>> {
        self.objects.get(&(kind, uid.to_owned()))
    }

    /// Removes an object; its last state gets a version of its own, as the real one does.
    pub(crate) fn remove(&mut self, kind: Kind, uid: &str) {
        if let Some(object) = self.objects.remove(&(kind, uid.to_owned())) {
            self.record(kind, "DELETED", (*object).clone());
        }
    }

    fn record(&mut self, kind: Kind, change: &'static str, mut object: Value) -> Arc<Value> {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let object = Arc::new(object);
        let event = Event { version: self.version, kind, change, object: Arc::clone(&object) };
        self.history.push_back(event);
        if self.history.len() > HISTORY
            && let Some(event) = self.history.pop_front()
        {
            self.forgotten = event.version;
        }
        object
    }

    pub(crate) fn list(&self, kind: Kind) -> impl Iterator<Item = &Arc<Value>> {
        self.objects.iter().filter(move |(key, _)| key.0 == kind).map(|(_, object)| object)
    }

    /// The changes after a version.
    pub(crate) fn since(&self, kind: Kind, version: u64) -> Result<Vec<Event>, Expired> {
        if version < self.forgotten {
            return Err(Expired);
        }
        let later = self.history.iter().filter(|event| event.version > version);
        Ok(later.filter(|event| event.kind == kind).cloned().collect())
    }

    /// Forgets all changes so far: a watch from any older version expires, as after compaction.
    pub(crate) fn forget_history(&mut self) {
        self.version += 1;
        self.forgotten = self.version;
        self.history.clear();
    }
}

fn uid(object: &Value) -> String {
    object["metadata"]["uid"].as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str) -> Value {
        json!({"metadata": {"uid": uid}})
    }

    fn changes(store: &Store, version: u64) -> Result<Vec<&'static str>, Expired> {
        Ok(store.since(Kind::Pod, version)?.iter().map(|event| event.change).collect())
    }

    #[test]
    fn a_watch_sees_what_came_after_its_version_in_order() {
        let mut store = Store::default();
        store.put(Kind::Pod, pod("a"));
        store.put(Kind::EndpointSlice, pod("s"));
        store.put(Kind::Pod, pod("a"));
        store.remove(Kind::Pod, "a");
        assert_eq!(changes(&store, 0), Ok(vec!["ADDED", "MODIFIED", "DELETED"]));
        assert_eq!(changes(&store, 1), Ok(vec!["MODIFIED", "DELETED"]));
        assert_eq!(store.list(Kind::Pod).count(), 0);
    }

    #[test]
    fn a_version_older_than_the_history_has_expired() {
        let mut store = Store::default();
        for _ in 0..=HISTORY {
            store.put(Kind::Pod, pod("a"));
        }
        assert_eq!(changes(&store, 0), Err(Expired));
        assert_eq!(changes(&store, 1).map(|changes| changes.len()), Ok(HISTORY));
    }

    #[test]
    fn a_forgotten_history_expires_every_older_version() {
        let mut store = Store::default();
        store.put(Kind::Pod, pod("a"));
        let version = store.version();
        store.forget_history();
        assert_eq!(changes(&store, version), Err(Expired));
        assert_eq!(changes(&store, store.version()), Ok(vec![]));
    }
}
