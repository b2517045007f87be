//! The node's set of backends, and how it changes.
//!
//! Pure. Several tables may reach the same backend (two front ends during a switch, IPv4 and IPv6
//! tables); it is removed when the last of them lets go.

use std::collections::{BTreeSet, HashMap};

use super::Dataplane;
use super::nft::TableId;
use super::reach::{Changes, Reached, Way};
use super::silent::SilentTable;
use super::status::dataplane_of;
use crate::facts::{Backend, BackendStep};

/// Where rules are read from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A table of `nf_tables`.
    Nft(TableId),
    /// A table that does not announce its changes.
    Silent(SilentTable),
}

impl Origin {
    /// The dataplane it is part of, if it is one's.
    #[must_use]
    pub fn dataplane(&self) -> Option<Dataplane> {
        match self {
            Self::Nft(table) => dataplane_of(table),
            Self::Silent(table) => Some(table.dataplane()),
        }
    }
}

/// What becomes of new connections to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// None is sent to it.
    Absent,
    /// None is sent to it any more, but it is kept for those it has.
    Draining,
    /// They are sent to it.
    Present,
}

/// What each origin reaches.
#[derive(Debug, Default)]
pub struct Backends {
    origins: HashMap<Origin, Reached>,
    count: usize,
    changed_last: Option<Dataplane>,
}

impl Backends {
    /// What some origins reach at first sight: whatever made it so was not seen.
    #[must_use]
    pub fn new(now: Vec<(Origin, Reached)>) -> Self {
        let mut backends = Self::default();
        backends.replace(now);
        Self { changed_last: None, ..backends }
    }

    /// Replaces what some origins reach, at one moment; gives what that changed of the whole, in
    /// the order of the backends.
    pub fn replace(&mut self, now: Vec<(Origin, Reached)>) -> Vec<(Backend, BackendStep)> {
        let nothing = Reached::default();
        let mut touched: BTreeSet<Backend> = BTreeSet::new();
        for (origin, reached) in &now {
            let before = self.origins.get(origin).unwrap_or(&nothing);
            let backends = before.backends.symmetric_difference(&reached.backends);
            let draining = before.draining.symmetric_difference(&reached.draining);
            let mut differing = backends.chain(draining).peekable();
            if differing.peek().is_some() {
                self.changed_last = origin.dataplane().or(self.changed_last);
            }
            touched.extend(differing.cloned());
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
        let mut touched = BTreeSet::new();
        for (origin, changes) in changes.iter().filter(|(_, changes)| !changes.backends.is_empty())
        {
            self.changed_last = origin.dataplane().or(self.changed_last);
            touched.extend(changes.backends.iter().map(|(backend, _)| backend.clone()));
        }
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
        let touched: Vec<(State, Backend)> =
            touched.into_iter().map(|backend| (self.state(&backend), backend)).collect();
        change(&mut self.origins);
        let mut steps = Vec::new();
        for (before, backend) in touched {
            let now = self.state(&backend);
            if now == before {
                continue;
            }
            self.count -= usize::from(before == State::Present);
            self.count += usize::from(now == State::Present);
            let step = match now {
                State::Absent => BackendStep::Removed,
                State::Draining => BackendStep::Draining,
                State::Present => BackendStep::Added,
            };
            steps.push((backend, step));
        }
        steps
    }

    /// The dataplane whose own backends changed last, whether or not that changed the whole; `None`
    /// when no change was seen.
    #[must_use]
    pub fn changed_last(&self) -> Option<Dataplane> {
        self.changed_last
    }

    /// How many backends there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// How many of them a dataplane has.
    #[must_use]
    pub fn count_of(&self, dataplane: Dataplane) -> usize {
        let of = |origin: &Origin| origin.dataplane() == Some(dataplane);
        let reached = self.origins.iter().filter(|(origin, _)| of(origin));
        reached.map(|(_, reached)| reached.backends.len()).sum()
    }

    fn state(&self, backend: &Backend) -> State {
        if self.origins.values().any(|reached| reached.backends.contains(backend)) {
            State::Present
        } else if self.origins.values().any(|reached| reached.draining.contains(backend)) {
            State::Draining
        } else {
            State::Absent
        }
    }

    /// Every backend, once.
    #[must_use]
    pub fn all(&self) -> BTreeSet<Backend> {
        self.origins.values().flat_map(|reached| reached.backends.iter().cloned()).collect()
    }

    /// Every backend that is being drained, once.
    #[must_use]
    pub fn draining(&self) -> BTreeSet<Backend> {
        let all = self.origins.values().flat_map(|reached| &reached.draining);
        all.filter(|backend| self.state(backend) == State::Draining).cloned().collect()
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
            Origin::Silent(_) => None,
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
    use super::super::rules::Family;
    use super::*;
    use crate::facts::Protocol;

    fn backend(last: u8) -> Backend {
        let address = [10, 0, 0, last].into();
        Backend { service: None, protocol: Protocol::Tcp, address, port: 80 }
    }

    fn reached(lasts: &[u8]) -> Reached {
        Reached {
            backends: lasts.iter().map(|&last| backend(last)).collect(),
            ..Reached::default()
        }
    }

    fn nft() -> Origin {
        Origin::Nft(TableId { family: TableFamily::Ip, name: "kube-proxy".into() })
    }

    const LEGACY: Origin = Origin::Silent(SilentTable::Legacy(Family::V4));

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
    fn a_drained_backend_is_told_twice_and_may_come_back() {
        let drained = |lasts: &[u8]| Reached { draining: reached(lasts).backends, ..reached(&[]) };
        let mut backends = Backends::default();
        backends.replace(vec![(LEGACY, reached(&[1, 2]))]);
        let steps = backends.replace(vec![(LEGACY, drained(&[1, 2]))]);
        assert_eq!(
            steps,
            [(backend(1), BackendStep::Draining), (backend(2), BackendStep::Draining)]
        );
        assert_eq!((backends.count(), backends.draining().len()), (0, 2));
        let steps = backends.replace(vec![(LEGACY, reached(&[2]))]);
        assert_eq!(steps, [(backend(1), BackendStep::Removed), (backend(2), BackendStep::Added)]);
        assert_eq!((backends.count(), backends.draining().len()), (1, 0));
    }

    #[test]
    fn a_backend_that_another_table_still_uses_is_not_draining() {
        let drained = Reached { draining: reached(&[1]).backends, ..Reached::default() };
        let mut backends = Backends::default();
        backends.replace(vec![(nft(), reached(&[1])), (LEGACY, reached(&[1]))]);
        assert_eq!(backends.replace(vec![(LEGACY, drained)]), []);
        let steps = backends.replace(vec![(nft(), reached(&[]))]);
        assert_eq!(steps, [(backend(1), BackendStep::Draining)]);
    }

    #[test]
    fn a_change_that_another_table_hides_still_tells_which_changed_last() {
        let mut backends = Backends::new(vec![(nft(), reached(&[1, 2])), (LEGACY, reached(&[1]))]);
        assert_eq!((backends.changed_last(), backends.count()), (None, 2), "nothing was seen yet");
        assert_eq!(backends.replace(vec![(LEGACY, reached(&[2])), (nft(), reached(&[1, 2]))]), []);
        assert_eq!(backends.changed_last(), Some(Dataplane::IptablesLegacy));
        let update = |backends| vec![(nft(), Changes { backends, unresolved: 0 })];
        backends.update(update(Vec::new()));
        assert_eq!(backends.changed_last(), Some(Dataplane::IptablesLegacy), "no backend changed");
        assert_eq!(backends.update(update(vec![(backend(2), Way::Removed)])), []);
        assert_eq!(backends.changed_last(), Some(Dataplane::Nftables));
        let others = TableId { family: TableFamily::Ip, name: "firewall".into() };
        backends.replace(vec![(Origin::Nft(others), reached(&[9]))]);
        assert_eq!(backends.changed_last(), Some(Dataplane::Nftables), "no dataplane's table");
        let drained = Reached { draining: reached(&[2]).backends, ..Reached::default() };
        backends.replace(vec![(LEGACY, drained)]);
        assert_eq!(backends.changed_last(), Some(Dataplane::IptablesLegacy), "draining counts");
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
