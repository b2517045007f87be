//! Test data: one pod's termination, told fact by fact.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::facts::{
    Backend, BackendStep, Deletion, Happening, Origin, PodObserved, Protocol, ServiceName,
    ServicePort,
};

pub(super) const POD: &str = "aaaaaaaa-0000-0000-0000-000000000001";
pub(super) const REUSER: &str = "bbbbbbbb-0000-0000-0000-000000000002";
pub(super) const OTHER: &str = "cccccccc-0000-0000-0000-000000000003";
pub(super) const SERVICE: &str = "shop/web:http";

/// Milliseconds after an arbitrary moment well after boot.
pub(super) fn at(ms: u64) -> BootNs {
    BootNs(3_600_000_000_000 + ms * 1_000_000)
}

pub(super) fn uid(name: &str) -> PodUid {
    PodUid(Arc::from(name))
}

pub(super) fn address(last: u8) -> IpAddr {
    IpAddr::from([10, 244, 0, last])
}

/// One fact of any source, so that a test can shuffle them.
#[derive(Clone, Debug)]
pub(super) enum Fact {
    Cluster(ClusterFact),
    Endpoint(EndpointStep),
    Backend(BackendChange),
    Kernel(KernelEvent),
    Arrivals(Arrivals),
}

pub(super) fn record(correlator: &mut Correlator, fact: Fact) {
    match fact {
        Fact::Cluster(fact) => correlator.record_cluster(fact),
        Fact::Endpoint(step) => correlator.record_endpoint(step),
        Fact::Backend(change) => correlator.record_backend(change),
        Fact::Kernel(event) => correlator.record_kernel(&event),
        Fact::Arrivals(arrivals) => correlator.record_arrivals(&arrivals),
    }
}

pub(super) fn correlate(facts: impl IntoIterator<Item = Fact>) -> Correlator {
    let mut correlator = Correlator::new("node-1");
    for fact in facts {
        record(&mut correlator, fact);
    }
    correlator
}

pub(super) fn timeline(correlator: &Correlator, pod: &str) -> Timeline {
    let mut timelines = correlator.timelines().into_iter().map(|(timeline, _)| timeline);
    timelines.find(|timeline| *timeline.uid.0 == *pod).expect("a timeline of the pod")
}

/// A pod of this node, as its facts are told.
#[derive(Clone, Copy)]
pub(super) struct Teller {
    pub(super) pod: &'static str,
    pub(super) address: u8,
    pub(super) netns: u64,
}

pub(super) const TELLER: Teller = Teller { pod: POD, address: 7, netns: 70 };

impl Teller {
    pub(super) fn observed(self, ms: u64, deletion: Option<Deletion>) -> Fact {
        Fact::Cluster(ClusterFact::Pod(PodObserved {
            at: at(ms),
            uid: uid(self.pod),
            namespace: Arc::from("shop"),
            name: Arc::from(format!("web-{}", &self.pod[..4])),
            workload: Workload { kind: Arc::from("Deployment"), name: Arc::from("web") },
            addresses: vec![address(self.address)],
            deletion,
            pre_stop_sleep: None,
            grace_period: Duration::from_secs(30),
            probed_ports: BTreeSet::new(),
            ended: false,
        }))
    }

    pub(super) fn seen(self, ms: u64) -> Fact {
        self.observed(ms, None)
    }

    pub(super) fn deleted(self, ms: u64) -> Fact {
        let not_before = at(ms - ms % 1_000);
        self.observed(ms, Some(Deletion { not_before, grace: Duration::from_secs(30) }))
    }

    pub(super) fn removed(self, ms: u64) -> Fact {
        Fact::Cluster(ClusterFact::PodRemoved { at: at(ms), uid: uid(self.pod) })
    }

    pub(super) fn endpoint(self, ms: u64, state: EndpointState, alone: bool) -> Fact {
        Fact::Endpoint(EndpointStep {
            at: at(ms),
            pod: uid(self.pod),
            names: Some((Arc::from("shop"), Arc::from(format!("web-{}", &self.pod[..4])))),
            home: true,
            endpoint: EndpointKey {
                service: ServicePort(Arc::from(SERVICE)),
                protocol: Protocol::Tcp,
                address: address(self.address),
                port: 8080,
            },
            state,
            alone,
            first_sight: false,
        })
    }

    pub(super) fn backend(self, ms: u64, step: BackendStep) -> Fact {
        self.backend_of(SERVICE, ms, step)
    }

    pub(super) fn backend_of(self, service: &str, ms: u64, step: BackendStep) -> Fact {
        Fact::Backend(BackendChange {
            at: at(ms),
            uncertainty: Duration::from_millis(1),
            backend: Backend {
                service: Some(ServiceName::Port(ServicePort(Arc::from(service)))),
                protocol: Protocol::Tcp,
                address: address(self.address),
                port: 8080,
            },
            step,
        })
    }

    pub(super) fn kernel(self, ms: u64, happening: Happening) -> Fact {
        self.kernel_on(ms, happening, 8080, 1)
    }

    pub(super) fn kernel_on(self, ms: u64, happening: Happening, port: u16, socket: u64) -> Fact {
        // Soft interrupts know the network namespace, not the pod.
        let in_process = happening != Happening::Refused;
        Fact::Kernel(KernelEvent {
            at: at(ms),
            happening,
            pod: in_process.then(|| uid(self.pod)),
            cgroup_id: if in_process { self.netns + 1 } else { 0 },
            netns_cookie: self.netns,
            in_node_network: false,
            local: SocketAddr::new(address(self.address), port),
            remote: SocketAddr::new(address(200), 40_000),
            pid: 4_242,
            socket,
            suppressed: 0,
            counted: happening == Happening::Refused,
        })
    }

    pub(super) fn arrivals(self, outcome: Outcome, count: u64, last_ms: u64) -> Fact {
        Fact::Arrivals(Arrivals {
            address: address(self.address),
            netns_cookie: self.netns,
            port: 8080,
            outcome,
            origin: Origin::Cluster,
            count,
            last: at(last_ms),
        })
    }

    /// Deleted at 10.2 s, listener closed at 10.3 s, backend removed at 11.5 s, last refusal at
    /// 11.4 s, gone at 12 s.
    pub(super) fn story(self) -> Vec<Fact> {
        vec![
            self.backend(500, BackendStep::Added),
            self.seen(1_000),
            self.kernel(1_100, Happening::ListenerOpened),
            self.deleted(10_200),
            self.endpoint(10_210, EndpointState::Terminating, false),
            self.kernel(10_250, Happening::Signalled { number: 15 }),
            self.kernel(10_300, Happening::ListenerClosed),
            self.kernel(10_310, Happening::Exited),
            self.kernel(10_400, Happening::Refused),
            self.kernel(11_400, Happening::Refused),
            self.arrivals(Outcome::Accepted, 90, 10_290),
            self.arrivals(Outcome::Refused, 5, 11_400),
            self.backend(11_500, BackendStep::Removed),
            self.endpoint(11_900, EndpointState::Gone, false),
            self.removed(12_000),
        ]
    }
}

pub(super) fn assert_seconds(actual: Option<f64>, expected: f64) {
    let actual = actual.expect("a figure");
    assert!((actual - expected).abs() < 1e-6, "{actual} is not {expected}");
}
