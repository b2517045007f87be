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
    standing: Mutex<Standing>,
    failures: AtomicU64,
}

#[derive(Debug)]
enum Standing {
    Up,
    /// With a remark.
    UpAs(String),
    /// With the reason.
    Down(String),
}

/// An item, and what there is to say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The item: `pod watch`, `probe connect_failed` …
    pub name: String,
    /// Why it does not work, with the last error; or in which way it does.
    pub words: String,
}

impl Readiness {
    /// Adds an item that does not work yet.
    #[must_use]
    pub fn expect(&self, name: impl Into<String>, why: impl Into<String>) -> Item {
        let item = Item {
            state: Arc::new(ItemState {
                name: name.into(),
                standing: Mutex::new(Standing::Down(why.into())),
                failures: AtomicU64::new(0),
            }),
        };
        lock(&self.items).push(item.clone());
        item
    }

    /// What does not work now; empty when the daemon is ready.
    #[must_use]
    pub fn missing(&self) -> Vec<Entry> {
        self.entries(|standing| match standing {
            Standing::Down(why) => Some(why.clone()),
            Standing::Up | Standing::UpAs(_) => None,
        })
    }

    /// What there is to say of items that work.
    #[must_use]
    pub fn remarks(&self) -> Vec<Entry> {
        self.entries(|standing| match standing {
            Standing::UpAs(remark) => Some(remark.clone()),
            Standing::Up | Standing::Down(_) => None,
        })
    }

    fn entries(&self, words: impl Fn(&Standing) -> Option<String>) -> Vec<Entry> {
        let entry = |item: &Item| {
            let words = words(&lock(&item.state.standing))?;
            Some(Entry { name: item.state.name.clone(), words })
        };
        lock(&self.items).iter().filter_map(entry).collect()
    }
}

impl Item {
    /// It works now.
    pub fn up(&self) {
        *lock(&self.state.standing) = Standing::Up;
    }

    /// It works now, in a way that a person may want to know.
    pub fn up_as(&self, remark: impl Into<String>) {
        *lock(&self.state.standing) = Standing::UpAs(remark.into());
    }

    /// It does not work; counted in [`Item::failures`].
    pub fn down(&self, why: impl Into<String>) {
        self.state.failures.fetch_add(1, Ordering::Relaxed);
        *lock(&self.state.standing) = Standing::Down(why.into());
    }

    /// How often it failed since the daemon started.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.state.failures.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.words)
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
        assert_eq!(readiness.missing()[0].words, "connection refused");
        assert_eq!((pods.failures(), probe.failures()), (1, 0));
    }

    #[test]
    fn a_remark_is_no_lack() {
        let readiness = Readiness::default();
        let rules = readiness.expect("dataplane", "not read yet");
        assert_eq!(readiness.remarks(), []);
        rules.up_as("nftables serves Services");
        assert_eq!(readiness.missing(), []);
        assert_eq!(readiness.remarks()[0].to_string(), "dataplane: nftables serves Services");
        rules.down("none is found");
        assert_eq!(readiness.remarks(), []);
    }
}
