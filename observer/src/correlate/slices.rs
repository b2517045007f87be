//! Whole `EndpointSlice`s to steps of single endpoints.
//!
//! The watch delivers each slice whole and in order, so this is the one place where order counts;
//! the steps it yields may then reach the correlator in any order. Only steps away from "ready"
//! are yielded, and the return of an endpoint that was gone: nothing else can be part of a
//! termination.
//!
//! It holds every endpoint of the cluster: so no names, which the steps bring that need them.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use foldhash::{HashMap, HashMapExt as _};

use crate::facts::{
    BootNs, Conditions, Endpoint, EndpointPort, PodUid, Protocol, ServicePort, SliceObserved,
};
use crate::uid::Uid;

/// The controller moves endpoints between slices of a Service: an endpoint that another slice lists
/// within this time was not gone. All slices of a Service are written one after the other; a minute
/// is far more than that takes.
const MOVE: Duration = Duration::from_mins(1);

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

impl EndpointKey {
    fn new(port: &EndpointPort, address: IpAddr) -> Self {
        let EndpointPort { service, protocol, port } = port.clone();
        Self { service, protocol, address, port }
    }
}

/// What became of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointState {
    /// Listed as ready again, after it was gone.
    Back,
    /// Listed, not ready, and not terminating.
    NotReady,
    /// Listed as terminating.
    Terminating,
    /// No longer listed by any slice of its Service.
    Gone,
}

/// One endpoint's step away from ready, or its return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStep {
    /// When the watch delivered it.
    pub at: BootNs,
    /// The pod behind it.
    pub pod: PodUid,
    /// The pod's namespace and name, where it is listed.
    pub names: Option<(Arc<str>, Arc<str>)>,
    /// Whether the slice says that it runs on this node.
    pub home: bool,
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
pub(super) struct Slices {
    node: Arc<str>,
    views: HashMap<Arc<str>, Slice>,
    ports: HashMap<PortKey, Port>,
    /// Endpoints that no slice lists any more, since when.
    gone: HashMap<(Uid, EndpointKey), BootNs>,
}

/// A Service port.
type PortKey = (ServicePort, Protocol);

fn key(port: &EndpointPort) -> PortKey {
    (port.service.clone(), port.protocol)
}

/// What all slices of a Service port say.
#[derive(Default)]
struct Port {
    /// Endpoints that are ready: each family has rules of its own.
    ready: PerFamily,
    /// The slices that list it.
    slices: Vec<Arc<str>>,
}

/// A number for IPv4 and one for IPv6.
type PerFamily = [u32; 2];

fn family(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

/// What is kept of a slice.
#[derive(Default)]
struct Slice {
    ports: Box<[EndpointPort]>,
    endpoints: Box<[Listed]>,
    ready: PerFamily,
}

/// What is kept of a pod's endpoint.
#[derive(PartialEq, Eq)]
struct Listed {
    pod: Uid,
    address: IpAddr,
    conditions: Conditions,
    home: bool,
}

impl Slice {
    /// Without endpoints of pods, and none of others that is ready, it says nothing.
    fn is_worth_keeping(&self) -> bool {
        !self.endpoints.is_empty() || self.ready != PerFamily::default()
    }

    fn find(&self, pod: &Uid, address: IpAddr) -> Option<&Listed> {
        self.endpoints.iter().find(|listed| listed.address == address && listed.pod == *pod)
    }
}

/// What a step is made of, but for its port.
struct Sight<'a> {
    at: BootNs,
    listed: &'a Listed,
    names: Option<(Arc<str>, Arc<str>)>,
    first: bool,
}

impl Slices {
    /// For the agent of `node`.
    pub(super) fn new(node: Arc<str>) -> Self {
        Self { node, views: HashMap::new(), ports: HashMap::new(), gone: HashMap::new() }
    }

    /// Takes the next view of a slice and returns what stepped away from ready since the last.
    pub(super) fn observe(&mut self, observed: SliceObserved) -> Vec<EndpointStep> {
        let SliceObserved { at, slice: name, ports, endpoints } = observed;
        self.gone.retain(|_, gone| gone.plus(MOVE) >= at);
        let before = self.views.remove(&name);
        let first = before.is_none();
        let before = before.unwrap_or_default();
        let after = self.reduce(ports, &endpoints);
        let after = if after.is_worth_keeping() { after } else { Slice::default() };
        let lost = self.count(&name, &before, &after);

        let mut steps = Vec::new();
        let (gone_or_changed, new_or_changed) = differing(&before, &after);
        for listed in new_or_changed {
            let was = before.find(&listed.pod, listed.address).map(|was| was.conditions);
            if was == Some(listed.conditions) && before.ports == after.ports {
                continue;
            }
            let mut sight = Sight { at, listed, names: None, first };
            for port in &after.ports {
                let was = was.filter(|_| before.ports.contains(port));
                if let Some(state) = self.stepped(&mut sight, port, was) {
                    sight.names = names(&endpoints, listed);
                    steps.push(self.step(&sight, port, state));
                }
            }
        }
        for listed in gone_or_changed {
            let is_present = after.find(&listed.pod, listed.address).is_some();
            for port in &before.ports {
                if is_present && after.ports.contains(port)
                    || self.elsewhere(port, listed).is_some()
                {
                    continue;
                }
                let sight = Sight { at, listed, names: None, first: false };
                steps.push(self.step(&sight, port, EndpointState::Gone));
                let endpoint = EndpointKey::new(port, listed.address);
                self.gone.insert((listed.pod.clone(), endpoint), at);
            }
        }
        if after.is_worth_keeping() {
            self.views.insert(name, after);
        }
        self.add_left_alone(at, &lost, &mut steps);
        steps
    }

    /// What is worth keeping of a slice.
    fn reduce(&self, ports: Vec<EndpointPort>, endpoints: &[Endpoint]) -> Slice {
        let mut ready = PerFamily::default();
        for endpoint in endpoints.iter().filter(|endpoint| endpoint.conditions.ready) {
            ready[family(endpoint.address)] += 1;
        }
        let listed = |endpoint: &Endpoint| {
            Some(Listed {
                pod: endpoint.pod.as_ref()?.uid.clone(),
                address: endpoint.address,
                conditions: endpoint.conditions,
                home: endpoint.node.as_ref() == Some(&self.node),
            })
        };
        let listed = endpoints.iter().filter_map(listed).collect();
        Slice { ports: ports.into(), endpoints: listed, ready }
    }

    /// Counts what is ready from now on; the Service ports and families that just lost the last
    /// ready endpoint.
    fn count(
        &mut self,
        name: &Arc<str>,
        before: &Slice,
        after: &Slice,
    ) -> HashSet<(PortKey, usize)> {
        let mut touched = HashSet::new();
        for port in &before.ports {
            let counted = self.ports.entry(key(port)).or_default();
            counted.slices.retain(|slice| slice != name);
            for family in [0, 1] {
                if before.ready[family] > 0 {
                    counted.ready[family] -= before.ready[family];
                    touched.insert((key(port), family));
                }
            }
        }
        for port in &after.ports {
            let counted = self.ports.entry(key(port)).or_default();
            counted.slices.push(name.clone());
            for family in [0, 1] {
                counted.ready[family] += after.ready[family];
            }
        }
        touched.retain(|(port, family)| self.is_none_ready(port, *family));
        for port in &before.ports {
            let key = key(port);
            if self.ports.get(&key).is_some_and(|counted| counted.slices.is_empty()) {
                self.ports.remove(&key);
            }
        }
        touched
    }

    fn is_none_ready(&self, port: &PortKey, family: usize) -> bool {
        self.ports.get(port).is_none_or(|counted| counted.ready[family] == 0)
    }

    /// What an endpoint became, if that is a step, after what it `was` in this slice.
    fn stepped(
        &mut self,
        sight: &mut Sight<'_>,
        port: &EndpointPort,
        was: Option<Conditions>,
    ) -> Option<EndpointState> {
        let Sight { listed, .. } = sight;
        let now = state(listed.conditions);
        if let Some(was) = was {
            return now.filter(|now| state(was) != Some(*now));
        }
        let identity = (listed.pod.clone(), EndpointKey::new(port, listed.address));
        if self.gone.remove(&identity).is_some() {
            sight.first = false;
            return Some(now.unwrap_or(EndpointState::Back));
        }
        let now = now?;
        let elsewhere = self.elsewhere(port, listed);
        sight.first &= elsewhere.is_none();
        Some(now).filter(|now| elsewhere.and_then(state) != Some(*now))
    }

    /// What another slice says of an endpoint that this one does not list, or not yet.
    fn elsewhere(&self, port: &EndpointPort, listed: &Listed) -> Option<Conditions> {
        let others = self.ports.get(&key(port))?.slices.iter();
        let others = others.filter_map(|name| self.views.get(name));
        let mut others = others.filter(|slice| slice.ports.contains(port));
        others
            .find_map(|slice| slice.find(&listed.pod, listed.address))
            .map(|listed| listed.conditions)
    }

    /// Endpoints of these Service ports that go on serving while they terminate, now that no
    /// endpoint is ready: rules keep them, or take them back (KEP-1669).
    fn add_left_alone(
        &self,
        at: BootNs,
        ports: &HashSet<(PortKey, usize)>,
        steps: &mut Vec<EndpointStep>,
    ) {
        let told: HashSet<(PodUid, EndpointKey)> =
            steps.iter().map(|step| (step.pod.clone(), step.endpoint.clone())).collect();
        for (port, of_family) in ports {
            let names = self.ports.get(port).into_iter().flat_map(|counted| &counted.slices);
            for slice in names.filter_map(|name| self.views.get(name)) {
                let kept = slice.endpoints.iter().filter(|listed| {
                    listed.conditions.terminating
                        && listed.conditions.serving
                        && family(listed.address) == *of_family
                });
                for listed in kept {
                    let sight = Sight { at, listed, names: None, first: false };
                    let ports = slice.ports.iter().filter(|listed| key(listed) == *port);
                    steps.extend(
                        ports
                            .map(|port| self.step(&sight, port, EndpointState::Terminating))
                            .filter(|step| {
                                !told.contains(&(step.pod.clone(), step.endpoint.clone()))
                            }),
                    );
                }
            }
        }
    }

    fn step(&self, sight: &Sight<'_>, port: &EndpointPort, state: EndpointState) -> EndpointStep {
        let Sight { at, listed, names, first } = sight;
        EndpointStep {
            at: *at,
            pod: (&listed.pod).into(),
            names: names.clone(),
            home: listed.home,
            endpoint: EndpointKey::new(port, listed.address),
            state,
            // The endpoint itself is not ready now, so every one counted is another.
            alone: self.is_none_ready(&key(port), family(listed.address)),
            first_sight: *first,
        }
    }
}

/// The endpoints of two views without those that both begin or end with. With the same ports those
/// have no step, and they are nearly all: most changes are of one endpoint.
fn differing<'a>(before: &'a Slice, after: &'a Slice) -> (&'a [Listed], &'a [Listed]) {
    let (mut before_rest, mut after_rest) = (&*before.endpoints, &*after.endpoints);
    if before.ports != after.ports {
        return (before_rest, after_rest);
    }
    while let ([was, befores @ ..], [now, afters @ ..]) = (before_rest, after_rest)
        && was == now
    {
        (before_rest, after_rest) = (befores, afters);
    }
    while let ([befores @ .., was], [afters @ .., now]) = (before_rest, after_rest)
        && was == now
    {
        (before_rest, after_rest) = (befores, afters);
    }
    (before_rest, after_rest)
}

/// The namespace and name of a pod in the view that lists it.
fn names(endpoints: &[Endpoint], listed: &Listed) -> Option<(Arc<str>, Arc<str>)> {
    let mut pods = endpoints.iter().filter_map(|endpoint| endpoint.pod.as_ref());
    let pod = pods.find(|pod| pod.uid == listed.pod)?;
    Some((pod.namespace.clone(), pod.name.clone()))
}

fn state(conditions: Conditions) -> Option<EndpointState> {
    match conditions {
        Conditions { terminating: true, .. } => Some(EndpointState::Terminating),
        Conditions { ready: false, .. } => Some(EndpointState::NotReady),
        Conditions { ready: true, .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{Protocol, ServicePort};

    #[test]
    fn nothing_is_kept_of_a_slice_that_lists_nothing() {
        let port = EndpointPort {
            service: ServicePort(Arc::from("shop/web:http")),
            protocol: Protocol::Tcp,
            port: 8080,
        };
        let observed = || SliceObserved {
            at: BootNs(1),
            slice: Arc::from("shop/web-abc"),
            ports: vec![port.clone()],
            endpoints: Vec::new(),
        };
        let mut slices = Slices::new(Arc::from("node-1"));
        assert!(slices.observe(observed()).is_empty() && slices.observe(observed()).is_empty());
        assert_eq!((slices.views.len(), slices.ports.len()), (0, 0));
    }
}
