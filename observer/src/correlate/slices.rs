//! Whole `EndpointSlice`s to steps of single endpoints.
//!
//! The watch delivers each slice whole and in order, so this is the one place where order counts;
//! the steps it yields may then reach the correlator in any order. Only steps away from "ready"
//! are yielded: nothing else can be part of a termination.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::facts::{BootNs, Conditions, Endpoint, Protocol, ServicePort, SliceObserved, TargetPod};

/// What identifies an endpoint of a pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointKey {
    /// The Service port.
    pub service: ServicePort,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's port.
    pub port: u16,
}

/// What became of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointState {
    /// Listed, not ready, and not terminating.
    NotReady,
    /// Listed as terminating.
    Terminating,
    /// No longer listed.
    Gone,
}

/// One endpoint's step away from ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStep {
    /// When the watch delivered it.
    pub at: BootNs,
    /// The pod behind it.
    pub pod: TargetPod,
    /// The node it runs on, if the slice says so.
    pub node: Option<Arc<str>>,
    /// Which endpoint.
    pub endpoint: EndpointKey,
    /// What it became.
    pub state: EndpointState,
    /// Whether no other endpoint of the Service port was ready then: kube-proxy goes on sending to
    /// the terminating ones by design (KEP-1669).
    pub alone: bool,
    /// Whether this was the first sight of the slice: the step itself was then not seen.
    pub first_sight: bool,
}

/// The latest view of every slice.
#[derive(Default)]
pub(super) struct Slices {
    slices: HashMap<Arc<str>, Vec<Endpoint>>,
    ready: HashMap<ReadyKey, usize>,
}

/// Readiness is counted per Service port and address family: each family has rules of its own.
type ReadyKey = (ServicePort, Protocol, bool);

fn ready_key(endpoint: &Endpoint) -> ReadyKey {
    (endpoint.service.clone(), endpoint.protocol, endpoint.address.is_ipv4())
}

impl Slices {
    /// Takes the next view of a slice and returns what stepped away from ready since the last.
    pub(super) fn observe(&mut self, observed: SliceObserved) -> Vec<EndpointStep> {
        let SliceObserved { at, slice, endpoints } = observed;
        let before = self.slices.remove(&slice);
        let first_sight = before.is_none();
        let before = before.unwrap_or_default();
        self.count_ready(&before, |count| count.saturating_sub(1));
        self.count_ready(&endpoints, |count| count + 1);

        let old: HashMap<EndpointId<'_>, Conditions> = before
            .iter()
            .filter_map(|endpoint| Some((id(endpoint)?, endpoint.conditions)))
            .collect();
        let mut steps = Vec::new();
        for endpoint in &endpoints {
            let Some(id) = id(endpoint) else { continue };
            if let Some(state) = state(endpoint.conditions)
                && old.get(&id).and_then(|conditions| self::state(*conditions)) != Some(state)
            {
                steps.extend(self.step(at, endpoint, state, first_sight));
            }
        }
        let present: HashSet<EndpointId<'_>> = endpoints.iter().filter_map(id).collect();
        for endpoint in &before {
            if id(endpoint).is_some_and(|id| !present.contains(&id)) {
                steps.extend(self.step(at, endpoint, EndpointState::Gone, first_sight));
            }
        }
        let ready = before.iter().filter(|endpoint| endpoint.conditions.ready);
        let lost = ready.map(ready_key).filter(|key| !self.ready.contains_key(key)).collect();
        if !endpoints.is_empty() {
            self.slices.insert(slice, endpoints);
        }
        let left_alone = self.left_alone(at, &lost);
        steps.extend(left_alone.filter(|step| !steps.contains(step)).collect::<Vec<_>>());
        steps
    }

    /// Endpoints of these Service ports that go on serving while they terminate, now that no
    /// endpoint is ready: rules keep them, or take them back (KEP-1669).
    fn left_alone<'s>(
        &'s self,
        at: BootNs,
        ports: &'s HashSet<ReadyKey>,
    ) -> impl Iterator<Item = EndpointStep> + 's {
        let endpoints = self.slices.values().filter(|_| !ports.is_empty()).flatten();
        endpoints
            .filter(|endpoint| endpoint.conditions.terminating && endpoint.conditions.serving)
            .filter(|endpoint| ports.contains(&ready_key(endpoint)))
            .filter_map(move |endpoint| self.step(at, endpoint, EndpointState::Terminating, false))
    }

    fn step(
        &self,
        at: BootNs,
        endpoint: &Endpoint,
        state: EndpointState,
        first_sight: bool,
    ) -> Option<EndpointStep> {
        Some(EndpointStep {
            at,
            pod: endpoint.pod.clone()?,
            node: endpoint.node.clone(),
            endpoint: EndpointKey {
                service: endpoint.service.clone(),
                protocol: endpoint.protocol,
                address: endpoint.address,
                port: endpoint.port,
            },
            state,
            // The endpoint itself is not ready now, so every one counted is another.
            alone: self.ready.get(&ready_key(endpoint)).is_none_or(|count| *count == 0),
            first_sight,
        })
    }

    fn count_ready(&mut self, endpoints: &[Endpoint], change: impl Fn(usize) -> usize) {
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.conditions.ready) {
            let count = self.ready.entry(ready_key(endpoint)).or_default();
            *count = change(*count);
        }
        self.ready.retain(|_, count| *count > 0);
    }
}

type EndpointId<'a> = (&'a str, &'a ServicePort, Protocol, IpAddr, u16);

fn id(endpoint: &Endpoint) -> Option<EndpointId<'_>> {
    let pod = endpoint.pod.as_ref()?;
    Some((&pod.uid.0, &endpoint.service, endpoint.protocol, endpoint.address, endpoint.port))
}

fn state(conditions: Conditions) -> Option<EndpointState> {
    match conditions {
        Conditions { terminating: true, .. } => Some(EndpointState::Terminating),
        Conditions { ready: false, .. } => Some(EndpointState::NotReady),
        Conditions { ready: true, .. } => None,
    }
}
