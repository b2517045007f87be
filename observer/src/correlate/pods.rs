//! What is known of each pod, joined so that the order of facts does not matter: every field is a
//! minimum, a maximum or a union.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::slices::{EndpointKey, EndpointState, EndpointStep};
use crate::facts::{BootNs, Deletion, PodObserved, Workload};

/// One pod: of this node (watched), of another (known from `EndpointSlice`s only), or both.
#[derive(Clone, Debug, Default)]
pub(super) struct Pod {
    /// What the pod watch said; `None` for a pod of another node.
    pub(super) watched: Option<Watched>,
    /// The pod object was seen to be gone.
    pub(super) removed: Option<BootNs>,
    /// Namespace and name, from whichever source came first.
    pub(super) names: Option<(Arc<str>, Arc<str>)>,
    /// Whether an `EndpointSlice` says that it runs on this node.
    pub(super) listed_here: bool,
    /// Its endpoints' steps.
    pub(super) endpoints: BTreeMap<EndpointKey, BTreeSet<(BootNs, EndpointState)>>,
    /// Service ports on which no other endpoint was ready when this one began to terminate.
    pub(super) alone_on: BTreeSet<EndpointKey>,
    /// Its endpoints were already terminating when their slice was first seen.
    pub(super) terminating_at_first_sight: bool,
    /// Its timeline was closed.
    pub(super) closed: bool,
}

/// What the pod watch said of a pod.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    /// The earliest observation.
    pub(super) first_seen: BootNs,
    /// Whether that one already carried the deletion.
    pub(super) first_seen_deleted: bool,
    /// Its controller.
    pub(super) workload: Workload,
    /// Its addresses, with the earliest observation of each.
    pub(super) addresses: BTreeMap<IpAddr, BootNs>,
    /// The earliest observation of its deletion.
    pub(super) deletion: Option<(BootNs, Deletion)>,
    /// The earliest observation of its end (`status.phase`).
    pub(super) ended: Option<BootNs>,
    /// `lifecycle.preStop.sleep`
    pub(super) pre_stop_sleep: Option<Duration>,
    /// `spec.terminationGracePeriodSeconds`
    pub(super) grace_period: Duration,
    /// The ports that the kubelet probes.
    pub(super) probed_ports: BTreeSet<u16>,
}

impl Pod {
    /// Joins one observation by the pod watch.
    pub(super) fn observe(&mut self, observed: PodObserved) {
        self.names.get_or_insert((observed.namespace, observed.name));
        let watched = self.watched.get_or_insert_with(|| Watched {
            first_seen: observed.at,
            first_seen_deleted: observed.deletion.is_some(),
            workload: observed.workload,
            addresses: BTreeMap::new(),
            deletion: None,
            ended: None,
            pre_stop_sleep: observed.pre_stop_sleep,
            grace_period: observed.grace_period,
            probed_ports: observed.probed_ports,
        });
        if observed.at < watched.first_seen {
            watched.first_seen = observed.at;
            watched.first_seen_deleted = observed.deletion.is_some();
        }
        for address in observed.addresses {
            let since = watched.addresses.entry(address).or_insert(observed.at);
            *since = observed.at.min(*since);
        }
        if observed.ended {
            let earlier = watched.ended.unwrap_or(observed.at);
            watched.ended = Some(observed.at.min(earlier));
        }
        // The last change before the removal rewrites the timestamp with a grace of 0
        // (Kubernetes 1.36, seen in recordings): the earliest one is the request's.
        if let Some(deletion) = observed.deletion
            && watched.deletion.is_none_or(|(at, _)| observed.at < at)
        {
            watched.deletion = Some((observed.at, deletion));
        }
    }

    /// Joins one step of one of its endpoints.
    pub(super) fn step(&mut self, step: EndpointStep) {
        self.names = self.names.take().or(step.names);
        self.listed_here |= step.home;
        if matches!(step.state, EndpointState::Terminating | EndpointState::Gone) {
            if step.alone {
                self.alone_on.insert(step.endpoint.clone());
            }
            self.terminating_at_first_sight |= step.first_sight;
        }
        self.endpoints.entry(step.endpoint).or_default().insert((step.at, step.state));
    }

    /// Joins the removal of the pod object.
    pub(super) fn remove(&mut self, at: BootNs) {
        self.removed = Some(self.removed.map_or(at, |earlier| earlier.min(at)));
    }

    /// The earliest sight of a terminating endpoint.
    pub(super) fn first_terminating(&self) -> Option<BootNs> {
        self.steps().filter(|step| step.1 == EndpointState::Terminating).map(|step| step.0).min()
    }

    /// Whether every endpoint that was seen is no longer listed.
    pub(super) fn all_endpoints_gone(&self) -> bool {
        self.endpoints
            .values()
            .all(|steps| steps.last().is_some_and(|step| step.1 == EndpointState::Gone))
    }

    /// Since when none of these endpoints is listed; `None` while one is, or when there are none.
    pub(super) fn gone_from(&self, keys: &[&EndpointKey]) -> Option<BootNs> {
        let gone = |key: &&EndpointKey| match self.endpoints.get(*key)?.last()? {
            (at, EndpointState::Gone) => Some(*at),
            _ => None,
        };
        keys.iter().map(gone).collect::<Option<Vec<_>>>()?.into_iter().max()
    }

    /// Every step of every endpoint.
    pub(super) fn steps(&self) -> impl Iterator<Item = (BootNs, EndpointState)> {
        self.endpoints.values().flatten().copied()
    }

    /// Every address that is or was the pod's.
    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        let watched = self.watched.iter().flat_map(|watched| watched.addresses.keys());
        watched.chain(self.endpoints.keys().map(|key| &key.address)).copied().collect()
    }

    /// When this node first knew the address to be this pod's.
    pub(super) fn has_address_since(&self, address: IpAddr) -> Option<BootNs> {
        self.watched.as_ref()?.addresses.get(&address).copied()
    }

    /// Whether a network namespace with one of its sockets is its own: a host-network pod has no
    /// address here and shares the node's.
    pub(super) fn owns_its_network(&self) -> bool {
        self.watched.as_ref().is_some_and(|watched| !watched.addresses.is_empty())
    }
}
