//! Facts in any order to one timeline per termination.
//!
//! Pure: time is an argument, nothing is read or written. Facts are joined under the key they come
//! with, and a timeline is computed from them whenever it is asked for; so neither the order of
//! facts nor a repeated fact can change it.

mod assemble;
mod backends;
mod evidence;
mod pods;
mod removals;
mod slices;
mod timeline;

#[cfg(test)]
mod node_network_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod story;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use self::assemble::{Assembler, Pods};
use self::evidence::{Evidence, Open};
use self::slices::Slices;
pub use self::slices::{EndpointKey, EndpointState, EndpointStep};
pub use self::timeline::{Instant, Removal, Source, TailEnds, Timeline};
use crate::facts::{
    Arrivals, BackendChange, Blindness, BootNs, ClusterFact, KernelEvent, Outcome, PodUid, Workload,
};

/// After the last instant of a termination, late facts are waited for this long before its
/// timeline is closed: counts are read once a second, and watches may lag.
const SETTLE: Duration = Duration::from_secs(3);

/// A termination that does not end this long after its grace period is closed as it is.
const MAX_OPEN: Duration = Duration::from_mins(10);

/// Facts are kept this long, and those of an open termination until it closes: rules may change
/// well before or after our watches tell why.
const RETENTION: Duration = Duration::from_mins(10);

/// How often facts past keeping are looked for, which goes through all that are kept.
const FORGETTING: Duration = Duration::from_secs(10);

/// Closed timelines kept for the API; at a kibibyte or two each, some megabytes.
const MAX_CLOSED: usize = 4_096;

/// A workload of a namespace, as metrics are labelled.
pub type WorkloadKey = (Arc<str>, Workload);

/// Joins facts and keeps timelines.
pub struct Correlator {
    pods: Pods,
    slices: Slices,
    evidence: Evidence,
    closed: VecDeque<Timeline>,
    /// Refusals of pods whose facts were dropped.
    retired_refusals: BTreeMap<WorkloadKey, u64>,
    /// Network namespaces of pods whose facts were dropped, and when. Cookies are never reused;
    /// the kernel's counts of them are deleted (`is_retired`) long before these are.
    retired_netns: BTreeMap<u64, BootNs>,
    /// When facts past keeping were dropped last.
    forgot: Option<BootNs>,
}

impl Correlator {
    /// For the agent of `node`.
    #[must_use]
    pub fn new(node: &str) -> Self {
        Self {
            pods: Pods::new(),
            slices: Slices::new(Arc::from(node)),
            evidence: Evidence::default(),
            closed: VecDeque::new(),
            retired_refusals: BTreeMap::new(),
            retired_netns: BTreeMap::new(),
            forgot: None,
        }
    }

    /// Takes what the API server's watches deliver. Views of one slice must come in order.
    pub fn record_cluster(&mut self, fact: ClusterFact) {
        match fact {
            ClusterFact::Pod(observed) => {
                self.pods.entry(observed.uid.clone()).or_default().observe(observed);
            }
            ClusterFact::PodRemoved { at, uid } => self.pods.entry(uid).or_default().remove(at),
            ClusterFact::Slice(observed) => {
                for step in self.slices.observe(observed) {
                    self.record_endpoint(step);
                }
            }
            ClusterFact::Blind(blindness) => self.record_blindness(blindness),
        }
    }

    /// Takes one endpoint's step. One that names no pod is of a pod that is known, or was forgotten.
    pub fn record_endpoint(&mut self, step: EndpointStep) {
        if step.names.is_none() && !self.pods.contains_key(&step.pod) {
            return;
        }
        self.pods.entry(step.pod.clone()).or_default().step(step);
    }

    /// Takes a change of the node's backends.
    pub fn record_backend(&mut self, change: BackendChange) {
        self.evidence.record_backend(change);
    }

    /// Takes a kernel event.
    pub fn record_kernel(&mut self, event: &KernelEvent) {
        self.evidence.record_event(event);
    }

    /// Takes a reading of one of the kernel's counts.
    pub fn record_arrivals(&mut self, arrivals: &Arrivals) {
        if !self.retired_netns.contains_key(&arrivals.netns_cookie) {
            self.evidence.record_arrivals(arrivals);
        }
    }

    /// Takes a span during which a source may have missed something.
    pub fn record_blindness(&mut self, mut blindness: Blindness) {
        let blind = &mut self.evidence.blind;
        // A source that stays away tells so again and again: one span in all.
        let continues = |earlier: &&Blindness| {
            earlier.source == blindness.source && earlier.until == blindness.from
        };
        if let Some(earlier) = blind.iter().find(continues).cloned() {
            blindness.from = earlier.from;
            blind.remove(&earlier);
        }
        blind.insert(blindness);
    }

    /// Every timeline kept, and whether it is closed.
    #[must_use]
    pub fn timelines(&self) -> Vec<(Timeline, bool)> {
        let closed = self.closed.iter().map(|timeline| (timeline.clone(), true));
        closed.chain(self.open(|_| true).map(|timeline| (timeline, false))).collect()
    }

    /// Closes what has ended, drops what is past keeping, and returns the timelines just closed.
    pub fn advance(&mut self, now: BootNs) -> Vec<Timeline> {
        let mut ended: Vec<Timeline> = Vec::new();
        for mut timeline in self.open(|pod| may_be_over(pod, now)) {
            let pod = &self.pods[&timeline.uid];
            let begun = timeline.first_instant().unwrap_or(now);
            // `kubectl delete --grace-period` may ask for more than the pod's own.
            let grace = timeline.grace_period.max(timeline.deletion.map(|asked| asked.grace));
            let overdue = begun.plus(grace.unwrap_or_default()).plus(MAX_OPEN);
            let complete = is_complete(pod, &timeline);
            let last = timeline.last_instant().unwrap_or(begun);
            if complete && now >= last.plus(SETTLE) {
                ended.push(timeline);
            } else if now >= overdue {
                timeline.censored.push("it did not end in time".to_owned());
                ended.push(timeline);
            }
        }
        for timeline in &ended {
            if let Some(pod) = self.pods.get_mut(&timeline.uid) {
                pod.closed = true;
            }
            self.closed.push_back(timeline.clone());
        }
        self.closed.drain(..self.closed.len().saturating_sub(MAX_CLOSED));
        self.note_drained();
        if self.forgot.is_none_or(|forgot| now >= forgot.plus(FORGETTING)) {
            self.forgot = Some(now);
            self.forget(now);
        }
        ended
    }

    /// A backend may be drained long after its pod is gone, when the timeline is closed.
    fn note_drained(&mut self) {
        let mut closed = std::mem::take(&mut self.closed);
        let assembler = self.assembler();
        for timeline in &mut closed {
            if !timeline.removals.iter().any(|removal| removal.draining) {
                continue;
            }
            let pod = self.pods.get(&timeline.uid);
            let Some(now) = pod.and_then(|pod| assembler.timeline(&timeline.uid, pod)) else {
                continue;
            };
            for removal in timeline.removals.iter_mut().filter(|removal| removal.draining) {
                let is_same = |later: &&Removal| {
                    (&later.service, later.backend_removed)
                        == (&removal.service, removal.backend_removed)
                };
                if let Some(later) = now.removals.iter().find(is_same) {
                    (removal.draining, removal.drained) = (later.draining, later.drained);
                }
            }
        }
        self.closed = closed;
    }

    /// The addresses of this node's pods, old ones included while their facts are kept.
    #[must_use]
    pub fn local_addresses(&self) -> BTreeSet<IpAddr> {
        let watched = self.pods.values().filter_map(|pod| pod.watched.as_ref());
        watched.flat_map(|watched| watched.addresses.keys().copied()).collect()
    }

    /// The ports of this node's pods that the kubelet probes.
    #[must_use]
    pub fn probed_ports(&self) -> BTreeSet<(IpAddr, u16)> {
        let mut probed = BTreeSet::new();
        let present = self.pods.values().filter(|pod| pod.removed.is_none());
        for watched in present.filter_map(|pod| pod.watched.as_ref()) {
            for address in watched.addresses.keys() {
                probed.extend(watched.probed_ports.iter().map(|port| (*address, *port)));
            }
        }
        probed
    }

    /// Connections refused at this node's pods since the observer started, at any time of the
    /// pod's life, by workload. Never decreases.
    #[must_use]
    pub fn refused_by_workload(&self) -> BTreeMap<WorkloadKey, u64> {
        let mut refused = self.retired_refusals.clone();
        for (uid, count) in self.refused_by_pod() {
            if let Some(key) = self.workload(&uid) {
                *refused.entry(key).or_default() += count;
            }
        }
        refused
    }

    fn refused_by_pod(&self) -> BTreeMap<PodUid, u64> {
        let assembler = self.assembler();
        let mut refused = BTreeMap::new();
        for (key, count) in &self.evidence.counts {
            if key.outcome == Outcome::Refused
                && let Some(uid) = assembler.owner(key.address, key.netns, count.last)
            {
                *refused.entry(uid.clone()).or_default() += count.count;
            }
        }
        refused
    }

    fn workload(&self, uid: &PodUid) -> Option<WorkloadKey> {
        let pod = self.pods.get(uid)?;
        Some((pod.names.as_ref()?.0.clone(), pod.watched.as_ref()?.workload.clone()))
    }

    /// Whether any pod is on its way out.
    #[must_use]
    pub fn is_terminating(&self) -> bool {
        let mut pods = self.pods.values().filter(|pod| !pod.closed);
        pods.any(|pod| assemble::floor(pod).is_some())
    }

    /// The timelines that are not closed, of the pods that are `wanted`.
    fn open(&self, wanted: impl Fn(&pods::Pod) -> bool) -> impl Iterator<Item = Timeline> {
        let assembler = self.assembler();
        self.pods
            .iter()
            .filter(move |(_, pod)| !pod.closed && wanted(pod))
            .filter_map(move |(uid, pod)| assembler.timeline(uid, pod))
    }

    fn assembler(&self) -> Assembler<'_> {
        Assembler { pods: &self.pods, evidence: &self.evidence }
    }

    fn forget(&mut self, now: BootNs) {
        let horizon = now.minus(RETENTION);
        self.retired_netns.retain(|_, retired| *retired >= horizon);
        let stale: BTreeSet<PodUid> = self
            .pods
            .iter()
            .filter(|(_, pod)| is_stale(pod, horizon))
            .map(|(uid, _)| uid.clone())
            .collect();
        if !stale.is_empty() {
            self.retire(&stale, now);
        }
        let open = self.open_terminations();
        self.evidence.forget_before(horizon, &self.pods, &open);
    }

    fn open_terminations(&self) -> Open {
        let mut open = Open::default();
        for (uid, pod) in self.pods.iter().filter(|(_, pod)| !pod.closed) {
            if let Some(floor) = assemble::floor(pod) {
                open.pods.insert(uid.clone());
                open.addresses.extend(pod.addresses());
                open.since = Some(open.since.map_or(floor, |since| since.min(floor)));
            }
        }
        open
    }

    /// Drops pods, and moves their refusals to the totals.
    fn retire(&mut self, stale: &BTreeSet<PodUid>, now: BootNs) {
        for (uid, count) in self.refused_by_pod() {
            if stale.contains(&uid)
                && let Some(key) = self.workload(&uid)
            {
                *self.retired_refusals.entry(key).or_default() += count;
            }
        }
        let counts = std::mem::take(&mut self.evidence.counts);
        let assembler = self.assembler();
        let (kept, dropped): (BTreeMap<_, _>, BTreeMap<_, _>) =
            counts.into_iter().partition(|(key, count)| {
                assembler
                    .owner(key.address, key.netns, count.last)
                    .is_some_and(|uid| !stale.contains(uid))
            });
        self.evidence.counts = kept;
        self.retired_netns.extend(dropped.keys().map(|key| (key.netns, now)));
        self.pods.retain(|uid, _| !stale.contains(uid));
    }

    /// Whether the kernel may forget a count: its pod's facts were dropped here, or it has no pod.
    #[must_use]
    pub fn is_retired(&self, arrivals: &Arrivals) -> bool {
        let Arrivals { address, netns_cookie, last, .. } = arrivals;
        self.retired_netns.contains_key(netns_cookie)
            || self.assembler().owner(*address, *netns_cookie, *last).is_none()
    }
}

/// Nothing more is expected: the pod is gone, and so are its endpoints and backends.
fn is_complete(pod: &pods::Pod, timeline: &Timeline) -> bool {
    is_gone(pod) && timeline.removals.iter().all(|removal| removal.backend_removed.is_some())
}

fn is_gone(pod: &pods::Pod) -> bool {
    if pod.watched.is_some() { pod.removed.is_some() } else { pod.all_endpoints_gone() }
}

/// Whether its termination can be over: of most that are open it cannot, and their timelines need
/// not be made to tell. No instant of a timeline is before its floor.
fn may_be_over(pod: &pods::Pod, now: BootNs) -> bool {
    is_gone(pod) || assemble::floor(pod).is_some_and(|floor| now >= floor.plus(MAX_OPEN))
}

fn is_stale(pod: &pods::Pod, horizon: BootNs) -> bool {
    let last_step = pod.steps().map(|step| step.0).max();
    match (&pod.watched, pod.removed) {
        (Some(_), None) => false,
        (_, removed) => {
            let terminating = pod.watched.is_some() || pod.first_terminating().is_some();
            (pod.closed || !terminating) && removed.max(last_step).is_none_or(|last| last < horizon)
        }
    }
}
