//! Kernel and dataplane facts, kept under the keys they come with until a timeline asks for them:
//! whose they are may become known later.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::assemble::Pods;
use super::backends::Backends;
use crate::facts::{
    Arrivals, BackendChange, Blindness, BootNs, Happening, KernelEvent, Origin, Outcome, PodUid,
};

/// The network namespace of a pod, which tells apart pods that share an address over time.
pub(super) type Netns = u64;

/// Whose a listener is: where it is tells, except in the node's network, which pods share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Listening {
    /// Whoever owns this network namespace.
    In(Netns),
    /// The pod whose cgroup the socket is in, in the node's network.
    OnNode(PodUid),
}

/// A listener's step: when, on which port, which socket, opened or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Listener {
    /// When the hook ran.
    pub(super) at: BootNs,
    /// The local port.
    pub(super) port: u16,
    /// The socket.
    pub(super) socket: u64,
    /// Opened (true) or closed.
    pub(super) opened: bool,
}

/// Something that happened to a process of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ProcessFact {
    /// When the hook ran.
    pub(super) at: BootNs,
    /// The container.
    pub(super) cgroup_id: u64,
    /// The process.
    pub(super) pid: u32,
    /// A signal or the exit.
    pub(super) what: ProcessStep,
}

/// What happened to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ProcessStep {
    /// SIGTERM was sent to it.
    Terminated,
    /// SIGKILL was sent to it.
    Killed,
    /// It ended.
    Exited,
}

/// Identifies one exact count of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CountKey {
    /// The pod's address.
    pub(super) address: IpAddr,
    /// Its network namespace.
    pub(super) netns: Netns,
    /// Its port.
    pub(super) port: u16,
    /// Accepted or refused.
    pub(super) outcome: Outcome,
    /// Where the connections came from.
    pub(super) origin: Origin,
}

/// One exact count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Count {
    /// How many.
    pub(super) count: u64,
    /// The latest.
    pub(super) last: BootNs,
}

/// Refusals at one address: when, the peer, the local port; how many were suppressed before, and
/// whether the kernel counted it.
pub(super) type Refusals = BTreeMap<(BootNs, SocketAddr, u16), (u32, bool)>;

/// The terminations that are still open: their facts are kept however old they are.
#[derive(Default)]
pub(super) struct Open {
    /// The pods.
    pub(super) pods: BTreeSet<PodUid>,
    /// Their addresses.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// The earliest moment of any of them.
    pub(super) since: Option<BootNs>,
}

/// All facts that no pod UID came with.
#[derive(Default)]
pub(super) struct Evidence {
    /// Whose network namespace it is, from sockets and processes in a pod's cgroup.
    /// With the latest event that says so.
    pub(super) netns_to_pods: BTreeMap<Netns, BTreeMap<PodUid, BootNs>>,
    /// Listeners, but for those of the node itself.
    pub(super) listeners: BTreeMap<Listening, BTreeSet<Listener>>,
    /// Signals and exits per pod.
    pub(super) processes: BTreeMap<PodUid, BTreeSet<ProcessFact>>,
    /// Refusals reported in detail: when and to whom, with the like events suppressed before.
    pub(super) refusals: BTreeMap<(IpAddr, Netns), Refusals>,
    /// How many refusals the dropped details stood for, where the kernel's count still has them.
    pub(super) dropped_refusals: BTreeMap<(IpAddr, Netns), u64>,
    /// The kernel's counts, the latest reading of each.
    pub(super) counts: BTreeMap<CountKey, Count>,
    /// Steps of every backend of this node.
    pub(super) backends: Backends,
    /// Spans during which a source may have missed something.
    pub(super) blind: BTreeSet<Blindness>,
}

impl Evidence {
    /// Takes one kernel event. Those that are no part of a timeline are left to the caller.
    pub(super) fn record_event(&mut self, event: &KernelEvent) {
        // A container's first processes are in the pod's cgroup before they leave the node's network.
        if let Some(pod) = &event.pod
            && event.netns_cookie != 0
            && !event.in_node_network
        {
            let pods = self.netns_to_pods.entry(event.netns_cookie).or_default();
            let latest = pods.entry(pod.clone()).or_insert(event.at);
            *latest = event.at.max(*latest);
        }
        match event.happening {
            Happening::ListenerOpened => self.record_listener(event, true),
            Happening::ListenerClosed => self.record_listener(event, false),
            Happening::Refused => {
                let key = (event.local.ip(), event.netns_cookie);
                let refusal = (event.at, event.remote, event.local.port());
                self.refusals
                    .entry(key)
                    .or_default()
                    .insert(refusal, (event.suppressed, event.counted));
            }
            Happening::Signalled { number: 15 } => {
                self.record_process(event, ProcessStep::Terminated);
            }
            Happening::Signalled { number: 9 } => self.record_process(event, ProcessStep::Killed),
            Happening::Exited => self.record_process(event, ProcessStep::Exited),
            _ => {}
        }
    }

    fn record_listener(&mut self, event: &KernelEvent, opened: bool) {
        let whose = match &event.pod {
            _ if !event.in_node_network => Listening::In(event.netns_cookie),
            Some(pod) => Listening::OnNode(pod.clone()),
            None => return,
        };
        let listener =
            Listener { at: event.at, port: event.local.port(), socket: event.socket, opened };
        self.listeners.entry(whose).or_default().insert(listener);
    }

    fn record_process(&mut self, event: &KernelEvent, what: ProcessStep) {
        if let Some(pod) = &event.pod {
            let fact =
                ProcessFact { at: event.at, cgroup_id: event.cgroup_id, pid: event.pid, what };
            self.processes.entry(pod.clone()).or_default().insert(fact);
        }
    }

    /// Takes a reading of a cumulative count.
    pub(super) fn record_arrivals(&mut self, arrivals: &Arrivals) {
        let key = CountKey {
            address: arrivals.address,
            netns: arrivals.netns_cookie,
            port: arrivals.port,
            outcome: arrivals.outcome,
            origin: arrivals.origin,
        };
        let count = self.counts.entry(key).or_insert(Count { count: 0, last: BootNs(0) });
        count.count = count.count.max(arrivals.count);
        count.last = count.last.max(arrivals.last);
    }

    /// Takes a change of the node's backends.
    pub(super) fn record_backend(&mut self, change: BackendChange) {
        self.backends.record(change);
    }

    /// Drops what happened before `horizon` and belongs to no `open` termination, but for each
    /// backend's latest step and for the namespaces of `living` pods.
    pub(super) fn forget_before(&mut self, horizon: BootNs, living: &Pods, open: &Open) {
        let blind_from = open.since.map_or(horizon, |since| since.min(horizon));
        self.blind.retain(|blind| blind.until >= blind_from);
        self.netns_to_pods.retain(|_, pods| {
            pods.retain(|pod, latest| *latest >= horizon || living.contains_key(pod));
            !pods.is_empty()
        });
        let netns_to_pods = &self.netns_to_pods;
        self.listeners.retain(|whose, steps| {
            let is_open = match whose {
                Listening::In(netns) => {
                    let mut pods = netns_to_pods.get(netns).into_iter().flat_map(BTreeMap::keys);
                    pods.any(|pod| open.pods.contains(pod))
                }
                Listening::OnNode(pod) => open.pods.contains(pod),
            };
            if !is_open {
                steps.retain(|listener| listener.at >= horizon);
            }
            !steps.is_empty()
        });
        self.processes.retain(|pod, facts| {
            if !open.pods.contains(pod) {
                facts.retain(|fact| fact.at >= horizon);
            }
            !facts.is_empty()
        });
        self.forget_refusals(horizon, open);
        self.backends.forget_before(horizon, &open.addresses);
    }

    /// A count goes on when the details that say when it rose are dropped: what they stood for is
    /// remembered, or a later termination would be blamed for it.
    fn forget_refusals(&mut self, horizon: BootNs, open: &Open) {
        let counted: BTreeSet<(IpAddr, Netns)> =
            self.counts.keys().map(|key| (key.address, key.netns)).collect();
        self.dropped_refusals.retain(|place, _| counted.contains(place));
        for (place, refusals) in &mut self.refusals {
            if open.addresses.contains(&place.0) {
                continue;
            }
            let mut dropped = 0;
            refusals.retain(|(at, _, _), (suppressed, counted)| {
                let kept = *at >= horizon;
                dropped += if kept { 0 } else { u64::from(*counted) + u64::from(*suppressed) };
                kept
            });
            if dropped > 0 && counted.contains(place) {
                *self.dropped_refusals.entry(*place).or_default() += dropped;
            }
        }
        self.refusals.retain(|_, refusals| !refusals.is_empty());
    }
}
