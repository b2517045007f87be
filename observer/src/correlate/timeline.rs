//! The timeline of one termination: the value that everything else is computed from.

use std::sync::Arc;
use std::time::Duration;

use crate::facts::{BootNs, Deletion, PodUid, ServiceName, Workload};

/// Who reported an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The pod watch.
    PodWatch,
    /// The EndpointSlice watch.
    SliceWatch,
    /// The node's rules.
    Dataplane,
    /// A kernel program.
    Kernel,
}

/// One instant of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instant {
    /// When it was seen. It happened within `[at - uncertainty, at]`.
    pub at: BootNs,
    /// How much earlier it may have happened; `None` when nothing bounds it.
    pub uncertainty: Option<Duration>,
    /// Who says so.
    pub source: Source,
}

/// The backend of one Service port that was taken out of this node's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    /// The Service port, when the rules name it or its front end.
    pub service: Option<ServiceName>,
    /// The first sight of the endpoint as terminating, not ready or gone.
    pub endpoint_terminating: Option<Instant>,
    /// When new connections ceased to be sent to it; `None` while they still are.
    pub backend_removed: Option<Instant>,
    /// Whether it is kept for the connections it has.
    pub draining: bool,
    /// When a backend that was kept for the connections it had (IPVS: weight 0 since
    /// `backend_removed`) was deleted; `None` while it is kept, or when it never was.
    pub drained: Option<Instant>,
}

/// The last new connection attempts at the pod after the deletion request, by where they came
/// from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TailEnds {
    /// The latest from this node.
    pub same_node: Option<BootNs>,
    /// The latest from elsewhere in the cluster.
    pub cluster: Option<BootNs>,
    /// The latest from outside the cluster.
    pub external: Option<BootNs>,
    /// The latest from an address that no configured range contains.
    pub unclassified: Option<BootNs>,
}

impl TailEnds {
    /// The latest from anywhere.
    #[must_use]
    pub fn last(&self) -> Option<BootNs> {
        self.same_node.max(self.cluster).max(self.external).max(self.unclassified)
    }
}

/// One termination as this node saw it. An instant that nobody reported is `None`; no value is
/// ever made up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline {
    /// The pod.
    pub uid: PodUid,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its controller; unknown for a pod of another node.
    pub workload: Option<Workload>,
    /// Whether the pod ran on this node. Only then are kernel instants known.
    pub home: bool,
    /// What the API server recorded of the deletion.
    pub deletion: Option<Deletion>,
    /// `lifecycle.preStop.sleep` of the pod, if it has one.
    pub pre_stop_sleep: Option<Duration>,
    /// `spec.terminationGracePeriodSeconds` of the pod; unknown for a pod of another node.
    pub grace_period: Option<Duration>,
    /// The deletion request.
    pub deletion_requested: Option<Instant>,
    /// The earliest sight of one of its endpoints terminating, not ready or gone.
    pub endpoint_terminating: Option<Instant>,
    /// Its backends on this node, one per Service port, protocol and address family.
    pub removals: Vec<Removal>,
    /// The last of its backends removed; `None` while one remains, or when it never was a backend.
    pub backend_removed: Option<Instant>,
    /// SIGTERM to a process of the pod.
    pub sigterm: Option<Instant>,
    /// Nothing listens any more on one of its Service ports, the first for which this is so.
    pub listener_closed: Option<Instant>,
    /// New connections after the deletion request; `None` when they are not counted: a pod of
    /// another node, or without an address of its own.
    pub arrivals: Option<TailEnds>,
    /// Connections refused at the pod after the deletion request.
    pub refused: u64,
    /// The first of them.
    pub first_refused: Option<Instant>,
    /// The last of them.
    pub last_refused: Option<Instant>,
    /// SIGKILL to a process of the pod.
    pub sigkill: Option<Instant>,
    /// The last of the processes that were asked to stop ended.
    pub process_exited: Option<Instant>,
    /// The pod object is gone.
    pub pod_removed: Option<Instant>,
    /// Why this timeline is not a sample of the gap or tail, in words; empty when it is.
    pub censored: Vec<String>,
}

impl Timeline {
    /// Propagation gap of this node: backend removed minus deletion request, in seconds.
    #[must_use]
    pub fn gap_seconds(&self) -> Option<f64> {
        Some(self.backend_removed?.at.seconds_since(self.deletion_requested?.at))
    }

    /// The node's own part of the gap, known for pods of any node: backend removed minus endpoint
    /// terminating, in seconds; 0 when the rules were faster than our watch.
    #[must_use]
    pub fn endpoint_removal_seconds(&self) -> Option<f64> {
        let removed = self.backend_removed?.at;
        Some(removed.seconds_since(self.endpoint_terminating?.at).max(0.0))
    }

    /// Arrival tail: last new connection attempt minus deletion request, in seconds; 0 when
    /// arrivals are counted and there was none after the request.
    #[must_use]
    pub fn arrival_tail_seconds(&self) -> Option<f64> {
        let (requested, arrivals) = (self.deletion_requested?, self.arrivals?);
        Some(arrivals.last().map_or(0.0, |last| last.seconds_since(requested.at).max(0.0)))
    }

    /// The last new connection attempt after the deletion request.
    #[must_use]
    pub fn last_arrival(&self) -> Option<BootNs> {
        self.arrivals?.last()
    }

    /// Head start: listener closed minus deletion request, in seconds.
    #[must_use]
    pub fn head_start_seconds(&self) -> Option<f64> {
        Some(self.listener_closed?.at.seconds_since(self.deletion_requested?.at))
    }

    /// What the head start should have been: the larger of gap and arrival tail, in seconds.
    #[must_use]
    pub fn needed_seconds(&self) -> Option<f64> {
        match (self.gap_seconds(), self.arrival_tail_seconds()) {
            (Some(gap), Some(tail)) => Some(gap.max(tail)),
            (gap, tail) => gap.or(tail),
        }
    }

    /// Shortfall: needed minus head start, not below 0, in seconds.
    #[must_use]
    pub fn shortfall_seconds(&self) -> Option<f64> {
        Some((self.needed_seconds()? - self.head_start_seconds()?).max(0.0))
    }

    /// The earliest instant known.
    #[must_use]
    pub fn first_instant(&self) -> Option<BootNs> {
        self.instants().min()
    }

    /// The latest instant known.
    #[must_use]
    pub fn last_instant(&self) -> Option<BootNs> {
        self.instants().max()
    }

    fn instants(&self) -> impl Iterator<Item = BootNs> {
        let single = [
            self.deletion_requested,
            self.endpoint_terminating,
            self.sigterm,
            self.listener_closed,
            self.first_refused,
            self.last_refused,
            self.sigkill,
            self.process_exited,
            self.pod_removed,
        ];
        let removals = self.removals.iter();
        let removals = removals.flat_map(|removal| [removal.backend_removed, removal.drained]);
        let instants = single.into_iter().chain(removals).flatten().map(|instant| instant.at);
        instants.chain(self.last_arrival())
    }

    /// Drain: SIGTERM to the last process exit, in seconds.
    #[must_use]
    pub fn drain_seconds(&self) -> Option<f64> {
        Some(self.process_exited?.at.seconds_since(self.sigterm?.at))
    }
}
