//! Which parts of the daemon work, for `/readyz`: one item per probe and per watch.
//!
//! Every shell owns its items and keeps them true; nothing here decides what is worth having.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// All items, in the order they were expected.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    items: Arc<Mutex<Vec<Item>>>,
}

/// One thing that must work before the daemon's figures mean anything.
#[derive(Clone, Debug)]
pub struct Item {
    state: Arc<ItemState>,
}

#[derive(Debug)]
struct ItemState {
    name: String,
    missing: Mutex<Option<String>>,
    failures: AtomicU64,
}

/// An item that does not work, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The item: `pod watch`, `probe connect_failed` …
    pub name: String,
    /// In words, with the last error.
    pub why: String,
}

impl Readiness {
    /// Adds an item that does not work yet.
    #[must_use]
    pub fn expect(&self, name: impl Into<String>, why: impl Into<String>) -> Item {
        let item = Item {
            state: Arc::new(ItemState {
                name: name.into(),
                missing: Mutex::new(Some(why.into())),
                failures: AtomicU64::new(0),
            }),
        };
        lock(&self.items).push(item.clone());
        item
    }

    /// What does not work now; empty when the daemon is ready.
    #[must_use]
    pub fn missing(&self) -> Vec<Missing> {
        let missing = |item: &Item| {
            let why = lock(&item.state.missing).clone()?;
            Some(Missing { name: item.state.name.clone(), why })
        };
        lock(&self.items).iter().filter_map(missing).collect()
    }
}

impl Item {
    /// It works now.
    pub fn up(&self) {
        *lock(&self.state.missing) = None;
    }

    /// It does not work; counted in [`Item::failures`].
    pub fn down(&self, why: impl Into<String>) {
        self.state.failures.fetch_add(1, Ordering::Relaxed);
        *lock(&self.state.missing) = Some(why.into());
    }

    /// How often it failed since the daemon started.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.state.failures.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.why)
    }
}

/// The values behind these locks are replaced whole, so a panic elsewhere cannot leave half of one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_expected_is_ready() {
        assert_eq!(Readiness::default().missing(), []);
    }

    #[test]
    fn an_item_is_missing_until_it_is_up_and_again_after_it_failed() {
        let readiness = Readiness::default();
        let pods = readiness.expect("pod watch", "not listed yet");
        let probe = readiness.expect("probe refused", "not attached yet");
        probe.up();
        let lines: Vec<String> = readiness.missing().iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["pod watch: not listed yet"]);
        pods.up();
        assert_eq!(readiness.missing(), []);
        pods.down("connection refused");
        assert_eq!(readiness.missing()[0].why, "connection refused");
        assert_eq!((pods.failures(), probe.failures()), (1, 0));
    }
}
