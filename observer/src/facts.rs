//! What the sources report: the vocabulary between the shells (kernel, dataplane, cluster) and the
//! correlator.
//!
//! A fact is stamped where it is first seen and never changes afterwards. Facts may arrive in any
//! order and more than once. Nothing here does I/O or reads a clock.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::uid::Uid;

/// A moment of `CLOCK_BOOTTIME`, in ns since boot; suspend counts, NTP steps do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootNs(pub u64);

impl BootNs {
    /// The signed distance `self - earlier`, in seconds.
    #[must_use]
    pub fn seconds_since(self, earlier: Self) -> f64 {
        let magnitude = |ns: u64| Duration::from_nanos(ns).as_secs_f64();
        match self.0.checked_sub(earlier.0) {
            Some(ns) => magnitude(ns),
            None => -magnitude(earlier.0 - self.0),
        }
    }

    /// The time from `earlier` to `self`; zero when it is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// `self + duration`, saturating.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }

    /// `self - duration`, saturating at boot.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// `metadata.uid` of a pod: the only thing that facts belong to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodUid(pub Arc<str>);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Transport protocol of an endpoint or backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp,
    /// User Datagram Protocol.
    Udp,
    /// Stream Control Transmission Protocol.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port of a Service, as kube-proxy names it: `namespace/name:port`, without `:port` when the
/// port has no name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServicePort(pub Arc<str>);

/// What a dataplane calls a Service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ServiceName {
    /// Its own name, which kube-proxy's rules carry.
    Port(ServicePort),
    /// Where clients reach it, which is all that IPVS and Cilium know: one of perhaps several
    /// front ends of the Service port.
    FrontEnd {
        /// A cluster, external or node address; unspecified for a node port on any of them.
        address: IpAddr,
        /// The port there.
        port: u16,
    },
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => f.write_str(&port.0),
            Self::FrontEnd { address, port } => SocketAddr::new(*address, *port).fmt(f),
        }
    }
}

/// An address and port that the node's dataplane sends new connections of a Service to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Backend {
    /// The Service port; `None` when the rules do not say.
    pub service: Option<ServiceName>,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The pod's (or any endpoint's) address.
    pub address: IpAddr,
    /// The endpoint's port.
    pub port: u16,
}

/// Whether a backend began or ceased to receive new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendStep {
    /// New connections are now sent to it.
    Added,
    /// None is sent to it any more, but it is kept for those it has (IPVS: weight 0).
    Draining,
    /// None is sent to it any more, and it is gone.
    Removed,
}

/// One change of the node's set of backends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendChange {
    /// When the rules that say so took effect.
    pub at: BootNs,
    /// The change took effect within `[at - uncertainty, at]`.
    pub uncertainty: Duration,
    /// Which backend.
    pub backend: Backend,
    /// What happened to it.
    pub step: BackendStep,
}

/// The controller that a pod belongs to, for a person: a Deployment rather than its ReplicaSet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// `Deployment`, `StatefulSet`, `DaemonSet`, `Job`, `Pod` …
    pub kind: Arc<str>,
    /// Its name; the namespace is the pod's.
    pub name: Arc<str>,
}

/// A pod's deletion as the API server recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deletion {
    /// `deletionTimestamp - deletionGracePeriodSeconds` on this node's boot clock: no later than
    /// the request, and less than a second before it (both fields are whole seconds), give or take
    /// the distance between the API server's clock and this node's.
    pub not_before: BootNs,
    /// `deletionGracePeriodSeconds`. A forced delete has 0.
    pub grace: Duration,
}

/// One observation of a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodObserved {
    /// When the watch delivered it.
    pub at: BootNs,
    /// `metadata.uid`.
    pub uid: PodUid,
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
    /// Its controller; `Pod` and its own name when it has none.
    pub workload: Workload,
    /// `status.podIPs`, empty until the pod has one, or for a host-network pod.
    pub addresses: Vec<IpAddr>,
    /// Set once `metadata.deletionTimestamp` is.
    pub deletion: Option<Deletion>,
    /// The longest `lifecycle.preStop.sleep` of its containers.
    pub pre_stop_sleep: Option<Duration>,
    /// `spec.terminationGracePeriodSeconds`.
    pub grace_period: Duration,
    /// The ports that the kubelet probes by TCP, HTTP or gRPC.
    pub probed_ports: BTreeSet<u16>,
    /// Whether `status.phase` is `Succeeded` or `Failed`.
    pub ended: bool,
}

/// The conditions of one endpoint (an omitted `ready` or `serving` counts as true, an omitted
/// `terminating` as false: `discovery.k8s.io/v1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// `conditions.ready`
    pub ready: bool,
    /// `conditions.serving`
    pub serving: bool,
    /// `conditions.terminating`
    pub terminating: bool,
}

/// One address of one endpoint in one `EndpointSlice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The endpoint's address.
    pub address: IpAddr,
    /// Its conditions.
    pub conditions: Conditions,
    /// `targetRef` when it is a pod: namespace, name and uid.
    pub pod: Option<TargetPod>,
    /// `nodeName`
    pub node: Option<Arc<str>>,
}

/// A port that every endpoint of an `EndpointSlice` has.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointPort {
    /// The Service port it serves.
    pub service: ServicePort,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The endpoints' port.
    pub port: u16,
}

/// The pod behind an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetPod {
    /// `targetRef.uid`
    pub uid: Uid,
    /// `targetRef.namespace`, or the slice's own.
    pub namespace: Arc<str>,
    /// `targetRef.name`
    pub name: Arc<str>,
}

/// One observation of a whole `EndpointSlice`. `endpoints` is empty when the object is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceObserved {
    /// When the watch delivered it.
    pub at: BootNs,
    /// `namespace/name` of the object.
    pub slice: Arc<str>,
    /// Every port it lists.
    pub ports: Vec<EndpointPort>,
    /// Every address it lists.
    pub endpoints: Vec<Endpoint>,
}

/// What the API server's watches deliver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterFact {
    /// A pod of this node was added or changed.
    Pod(PodObserved),
    /// A pod of this node is gone.
    PodRemoved {
        /// When the watch delivered it.
        at: BootNs,
        /// Which pod.
        uid: PodUid,
    },
    /// An `EndpointSlice` was added, changed or removed.
    Slice(SliceObserved),
    /// A watch could not see changes during this span (disconnected, re-listed): what happened
    /// inside it may be missing or late.
    Blind(Blindness),
}

/// A span during which a source may have missed something. Timelines that overlap it are censored.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blindness {
    /// The last moment known to be complete.
    pub from: BootNs,
    /// The first moment known to be complete again.
    pub until: BootNs,
    /// Which source, for a person: `pod watch`, `ring buffer` …
    pub source: &'static str,
}

/// What a kernel program saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Happening {
    /// A connect from `local` to `remote` failed with this errno (0: kept soft by the kernel).
    ConnectFailed {
        /// `sk_err`.
        errno: u32,
    },
    /// A socket began to listen on the local port.
    ListenerOpened,
    /// A socket ceased to listen on the local port.
    ListenerClosed,
    /// `local` answered a SYN from `remote` with a RST: connection refused.
    Refused,
    /// `local` answered another segment with a RST, without a socket.
    StrayReset,
    /// A socket sent a RST.
    ResetSent {
        /// `enum sk_rst_reason` of the running kernel; 0 when it has none (before Linux 6.10).
        reason: u32,
    },
    /// A socket received a RST.
    ResetReceived {
        /// Its TCP state, as in `struct tcp_info`.
        state: u32,
    },
    /// A connecting socket was told of an error.
    ConnectError {
        /// `sk_err`.
        errno: u32,
    },
    /// This node answered a packet from `remote` to `local` with ICMP "destination unreachable".
    IcmpUnreachable {
        /// The ICMP code.
        code: u32,
    },
    /// Netfilter dropped a TCP segment from `remote` to `local`.
    NetfilterDrop,
    /// A signal was sent to the process.
    Signalled {
        /// 15 (SIGTERM) or 9 (SIGKILL).
        number: u32,
    },
    /// The process ended.
    Exited,
    /// The kernel's out-of-memory killer chose the process.
    OomKilled,
    /// The legacy iptables table `nat` of this node was replaced.
    LegacyCommit {
        /// 4 or 6; 0 when the hook does not tell.
        family: u32,
        /// How long the replacing took, in ns; 0 when that is not known.
        call_ns: u32,
    },
    /// A call that changes the IPVS table of this node returned. `local` is the only destination
    /// that it can have changed; with port 0 it may be any.
    IpvsCommit {
        /// How long it took, in ns; 0 when that is not known.
        call_ns: u32,
    },
    /// Elements of a watched map were changed, and perhaps more within
    /// [`MAP_COMMIT_WINDOW`](crate::kernel::watched::MAP_COMMIT_WINDOW) after it.
    MapCommit {
        /// The map's id.
        map: u32,
    },
}

/// One detail from the kernel. Fields that the hook could not know are zero or unspecified.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelEvent {
    /// When the hook ran.
    pub at: BootNs,
    /// What it saw.
    pub happening: Happening,
    /// The pod whose cgroup the socket or process is in, if it is in one.
    pub pod: Option<PodUid>,
    /// The cgroup: of a pod's process, that of its container.
    pub cgroup_id: u64,
    /// The network namespace, by the kernel's never reused cookie.
    pub netns_cookie: u64,
    /// Whether that is the node's, which host-network pods share.
    pub in_node_network: bool,
    /// The end the hook ran for.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The process, in the root pid namespace.
    pub pid: u32,
    /// The kernel's address of the socket: tells sockets apart while they live.
    pub socket: u64,
    /// Like events of the same pod that were counted but not reported since the last one.
    pub suppressed: u32,
    /// Whether a refusal is part of the pod's [`Arrivals`]: those before its address was known to
    /// the kernel programs are not.
    pub counted: bool,
}

/// What became of new connection attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The handshake completed.
    Accepted,
    /// A RST answered the SYN.
    Refused,
}

/// Where new connections came from, seen from the pod's node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// The node itself: programs in the host's network, and connections that it masquerades.
    Node,
    /// A pod of this node.
    SameNode,
    /// Elsewhere in the cluster.
    Cluster,
    /// Outside the cluster.
    External,
    /// No configured range contains the address.
    Unclassified,
}

/// A reading of the kernel's exact counts for one pod address, port, outcome and origin.
/// Cumulative since the observer started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrivals {
    /// The pod's address.
    pub address: IpAddr,
    /// The pod's network namespace.
    pub netns_cookie: u64,
    /// The pod's port.
    pub port: u16,
    /// What became of them.
    pub outcome: Outcome,
    /// Where they came from.
    pub origin: Origin,
    /// How many.
    pub count: u64,
    /// When the latest happened.
    pub last: BootNs,
}
