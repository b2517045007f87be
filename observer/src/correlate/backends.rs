//! What the node's backends did, kept small: there are as many as the cluster has endpoints, and
//! nearly all of them were only ever added.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::slice;
use std::time::Duration;

use crate::facts::{Backend, BackendChange, BackendStep, BootNs, Protocol, ServiceName};

/// One thing that a backend did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// When the rules that say so took effect.
    pub(super) at: BootNs,
    /// How much earlier it may have been, in ns.
    uncertainty_ns: u64,
    /// What it did.
    pub(super) what: BackendStep,
}

impl Step {
    /// How much earlier it may have been.
    pub(super) fn uncertainty(&self) -> Duration {
        Duration::from_nanos(self.uncertainty_ns)
    }
}

/// A backend, in the order in which timelines ask for them: by address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    address: IpAddr,
    service: Option<ServiceName>,
    protocol: Protocol,
    port: u16,
}

/// Steps in the order of time.
#[derive(Debug)]
enum Steps {
    One(Step),
    /// More than one, and boxed so that the others are small.
    #[expect(clippy::box_collection, reason = "a vector would take more room than one step")]
    More(Box<Vec<Step>>),
}

impl Steps {
    fn as_slice(&self) -> &[Step] {
        match self {
            Self::One(step) => slice::from_ref(step),
            Self::More(steps) => steps,
        }
    }

    /// Puts a step in its place; it replaces one of the same moment.
    fn insert(&mut self, step: Step) {
        let mut steps = self.as_slice().to_vec();
        match steps.binary_search_by_key(&step.at, |step| step.at) {
            Ok(same) => steps[same] = step,
            Err(place) => steps.insert(place, step),
        }
        *self = match steps[..] {
            [step] => Self::One(step),
            _ => Self::More(Box::new(steps)),
        };
    }

    fn latest(&self) -> Step {
        match self {
            Self::One(step) => *step,
            // Never empty: steps are only ever dropped before the latest.
            Self::More(steps) => steps[steps.len() - 1],
        }
    }
}

/// Every backend of this node.
#[derive(Debug, Default)]
pub(super) struct Backends {
    steps: BTreeMap<Key, Steps>,
    /// Those that have something to be forgotten, now or later.
    changed: BTreeSet<Key>,
}

impl Backends {
    /// Takes a change.
    pub(super) fn record(&mut self, change: BackendChange) {
        let BackendChange { at, uncertainty, backend, step: what } = change;
        let Backend { service, protocol, address, port } = backend;
        let uncertainty_ns = u64::try_from(uncertainty.as_nanos()).unwrap_or(u64::MAX);
        let step = Step { at, uncertainty_ns, what };
        let key = Key { address, service, protocol, port };
        match self.steps.get_mut(&key) {
            Some(steps) => steps.insert(step),
            None if what == BackendStep::Removed => {
                self.steps.insert(key.clone(), Steps::One(step));
            }
            None => {
                self.steps.insert(key, Steps::One(step));
                return;
            }
        }
        self.changed.insert(key);
    }

    /// The backends with an address, each with its steps in the order of time.
    pub(super) fn of(&self, address: IpAddr) -> impl Iterator<Item = (Backend, &[Step])> {
        let first = Key { address, service: None, protocol: Protocol::Tcp, port: 0 };
        let with_address =
            self.steps.range(first..).take_while(move |(key, _)| key.address == address);
        with_address.map(|(key, steps)| {
            let Key { address, service, protocol, port } = key.clone();
            (Backend { service, protocol, address, port }, steps.as_slice())
        })
    }

    /// Whether none is known.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.changed.is_empty()
    }

    /// Drops what happened before `horizon`, but for each backend's latest step and for `open`
    /// addresses. A backend that was removed before it is dropped whole. One that drains is not: its
    /// removal, however much later, must not pass for the end of new connections.
    pub(super) fn forget_before(&mut self, horizon: BootNs, open: &BTreeSet<IpAddr>) {
        self.changed.retain(|key| {
            let Some(steps) = self.steps.get_mut(key) else { return false };
            if open.contains(&key.address) {
                return true;
            }
            let latest = steps.latest();
            if latest.what == BackendStep::Removed && latest.at < horizon {
                self.steps.remove(key);
                return false;
            }
            if let Steps::More(several) = steps {
                several.retain(|step| step.at >= horizon || step.at == latest.at);
                if several.len() == 1 {
                    *steps = Steps::One(latest);
                }
            }
            latest.what == BackendStep::Removed || matches!(steps, Steps::More(_))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(seconds: u64, step: BackendStep) -> BackendChange {
        BackendChange {
            at: BootNs(seconds * 1_000_000_000),
            uncertainty: Duration::from_millis(1),
            backend: Backend {
                service: None,
                protocol: Protocol::Tcp,
                address: IpAddr::from([10, 0, 0, 1]),
                port: 80,
            },
            step,
        }
    }

    fn steps(backends: &Backends) -> Vec<(u64, BackendStep)> {
        let of = backends.of(IpAddr::from([10, 0, 0, 1]));
        of.flat_map(|(_, steps)| steps).map(|step| (step.at.0 / 1_000_000_000, step.what)).collect()
    }

    #[test]
    fn steps_come_in_the_order_of_time_whatever_order_they_came_in() {
        use BackendStep::{Added, Draining, Removed};
        let mut backends = Backends::default();
        for (seconds, step) in [(9, Removed), (1, Added), (5, Draining), (5, Draining)] {
            backends.record(change(seconds, step));
        }
        assert_eq!(steps(&backends), [(1, Added), (5, Draining), (9, Removed)]);
    }

    #[test]
    fn a_backend_that_only_stays_is_never_looked_at_again() {
        let mut backends = Backends::default();
        backends.record(change(1, BackendStep::Added));
        assert!(backends.changed.is_empty());
        backends.record(change(2, BackendStep::Removed));
        backends.record(change(3, BackendStep::Added));
        backends.forget_before(BootNs(10_000_000_000), &BTreeSet::new());
        assert_eq!(steps(&backends), [(3, BackendStep::Added)]);
        assert!(backends.changed.is_empty());
    }

    #[test]
    fn a_removed_backend_goes_when_its_address_is_no_longer_open() {
        let mut backends = Backends::default();
        backends.record(change(1, BackendStep::Added));
        backends.record(change(2, BackendStep::Removed));
        backends.forget_before(BootNs(10_000_000_000), &BTreeSet::from([[10, 0, 0, 1].into()]));
        assert_eq!(steps(&backends).len(), 2);
        backends.forget_before(BootNs(10_000_000_000), &BTreeSet::new());
        assert!(backends.is_empty());
    }

    #[test]
    fn a_backend_takes_little_room() {
        assert_eq!(size_of::<(Key, Steps)>(), 72);
    }
}
