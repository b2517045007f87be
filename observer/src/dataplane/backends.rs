//! The node's set of backends, and how it changes.
//!
//! Pure. Several tables may reach the same backend (two front ends during a switch, IPv4 and IPv6
//! tables); it is removed when the last of them lets go.

use std::collections::{BTreeSet, HashMap};

use super::nft::TableId;
use super::reach::{Changes, Reached, Way};
use super::rules::Family;
use crate::facts::{Backend, BackendStep};

/// Where rules are read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A table of `nf_tables`.
    Nft(TableId),
    /// The legacy nat table of an IP version.
    Legacy(Family),
}

/// What each origin reaches.
#[derive(Debug, Default)]
pub struct Backends {
    origins: HashMap<Origin, Reached>,
    count: usize,
}

impl Backends {
    /// Replaces what some origins reach, at one moment; gives what that changed of the whole, in
    /// the order of the backends.
    pub fn replace(&mut self, now: Vec<(Origin, Reached)>) -> Vec<(Backend, BackendStep)> {
        let nothing = BTreeSet::new();
        let mut touched: BTreeSet<Backend> = BTreeSet::new();
        for (origin, reached) in &now {
            let before = self.origins.get(origin).map_or(&nothing, |before| &before.backends);
            touched.extend(before.symmetric_difference(&reached.backends).cloned());
        }
        self.stepped(touched, |origins| {
            for (origin, reached) in now {
                put(origins, origin, reached);
            }
        })
    }

    /// Takes in what changed of what some origins reach, at one moment; gives what that changed of
    /// the whole, in the order of the backends.
    pub fn update(&mut self, changes: Vec<(Origin, Changes)>) -> Vec<(Backend, BackendStep)> {
        let touched = changes.iter().flat_map(|(_, changes)| &changes.backends);
        let touched = touched.map(|(backend, _)| backend.clone()).collect();
        self.stepped(touched, |origins| {
            for (origin, changes) in changes {
                let mut reached = origins.remove(&origin).unwrap_or_default();
                reached.unresolved = changes.unresolved;
                for (backend, way) in changes.backends {
                    match way {
                        Way::Added => reached.backends.insert(backend),
                        Way::Removed => reached.backends.remove(&backend),
                    };
                }
                put(origins, origin, reached);
            }
        })
    }

    /// What `change` makes of the `touched` backends.
    fn stepped(
        &mut self,
        touched: BTreeSet<Backend>,
        change: impl FnOnce(&mut HashMap<Origin, Reached>),
    ) -> Vec<(Backend, BackendStep)> {
        let touched: Vec<(bool, Backend)> =
            touched.into_iter().map(|backend| (self.contains(&backend), backend)).collect();
        change(&mut self.origins);
        let mut steps = Vec::new();
        for (was, backend) in touched {
            match (was, self.contains(&backend)) {
                (false, true) => {
                    self.count += 1;
                    steps.push((backend, BackendStep::Added));
                }
                (true, false) => {
                    self.count -= 1;
                    steps.push((backend, BackendStep::Removed));
                }
                _ => {}
            }
        }
        steps
    }

    /// How many backends there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    fn contains(&self, backend: &Backend) -> bool {
        self.origins.values().any(|reached| reached.backends.contains(backend))
    }

    /// Every backend, once.
    #[must_use]
    pub fn all(&self) -> BTreeSet<Backend> {
        self.origins.values().flat_map(|reached| reached.backends.iter().cloned()).collect()
    }

    /// Reachable destination NAT that could not be told, in all origins.
    #[must_use]
    pub fn unresolved(&self) -> usize {
        self.origins.values().map(|reached| reached.unresolved).sum()
    }

    /// The `nf_tables` tables among its origins.
    pub fn tables(&self) -> impl Iterator<Item = &TableId> {
        self.origins.keys().filter_map(|origin| match origin {
            Origin::Nft(table) => Some(table),
            Origin::Legacy(_) => None,
        })
    }
}

fn put(origins: &mut HashMap<Origin, Reached>, origin: Origin, reached: Reached) {
    if reached == Reached::default() {
        origins.remove(&origin);
    } else {
        origins.insert(origin, reached);
    }
}

#[cfg(test)]
mod tests {
    use super::super::nft::TableFamily;
    use super::*;
    use crate::facts::Protocol;

    fn backend(last: u8) -> Backend {
        let address = [10, 0, 0, last].into();
        Backend { service: None, protocol: Protocol::Tcp, address, port: 80 }
    }

    fn reached(lasts: &[u8]) -> Reached {
        Reached { backends: lasts.iter().map(|&last| backend(last)).collect(), unresolved: 0 }
    }

    fn nft() -> Origin {
        Origin::Nft(TableId { family: TableFamily::Ip, name: "kube-proxy".into() })
    }

    const LEGACY: Origin = Origin::Legacy(Family::V4);

    #[test]
    fn a_change_is_what_differs_and_an_identical_rewrite_is_none() {
        let mut backends = Backends::default();
        let added = backends.replace(vec![(nft(), reached(&[1, 2]))]);
        assert_eq!(added, [(backend(1), BackendStep::Added), (backend(2), BackendStep::Added)]);
        assert_eq!(backends.replace(vec![(nft(), reached(&[1, 2]))]), []);
        let changed = backends.replace(vec![(nft(), reached(&[2, 3]))]);
        assert_eq!(changed, [(backend(1), BackendStep::Removed), (backend(3), BackendStep::Added)]);
        assert_eq!(backends.count(), 2);
        let removed = backends.replace(vec![(nft(), reached(&[]))]);
        assert_eq!(removed.len(), 2);
        assert_eq!(backends.count(), 0);
        assert_eq!(backends.tables().count(), 0);
    }

    #[test]
    fn a_backend_of_two_tables_is_removed_with_the_last() {
        let mut backends = Backends::default();
        backends.replace(vec![(nft(), reached(&[1])), (LEGACY, reached(&[1]))]);
        assert_eq!(backends.replace(vec![(nft(), reached(&[]))]), []);
        assert_eq!(
            backends.replace(vec![(LEGACY, reached(&[]))]),
            [(backend(1), BackendStep::Removed)]
        );
    }

    #[test]
    fn an_update_is_the_same_as_a_replacement() {
        let mut backends = Backends::default();
        backends.replace(vec![(nft(), reached(&[1, 2])), (LEGACY, reached(&[2]))]);
        let update = |backends| vec![(nft(), Changes { backends, unresolved: 0 })];
        let steps = backends.update(update(vec![
            (backend(1), Way::Removed),
            (backend(2), Way::Removed),
            (backend(3), Way::Added),
        ]));
        assert_eq!(steps, [(backend(1), BackendStep::Removed), (backend(3), BackendStep::Added)]);
        assert_eq!(backends.count(), 2);
        assert_eq!(backends.all(), BTreeSet::from([backend(2), backend(3)]));
        assert_eq!(backends.update(update(vec![(backend(3), Way::Removed)])).len(), 1);
        assert_eq!(backends.tables().count(), 0);
    }

    #[test]
    fn moving_between_tables_in_one_commit_is_no_change() {
        let mut backends = Backends::default();
        backends.replace(vec![(nft(), reached(&[1]))]);
        assert_eq!(backends.replace(vec![(nft(), reached(&[])), (LEGACY, reached(&[1]))]), []);
    }
}
