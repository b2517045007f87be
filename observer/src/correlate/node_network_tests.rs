//! Pods and others that share the node's network: nothing is said of the wrong one.

use super::story::*;
use super::*;
use crate::facts::{Happening, PodObserved};

/// The node's network namespace.
const NODE: u64 = 1;
const NEIGHBOUR: Teller = Teller { pod: OTHER, address: 7, netns: NODE };

/// The same in the node's network, by a process of this pod.
fn on_node(fact: Fact, pod: Option<&str>) -> Fact {
    match fact {
        Fact::Kernel(event) => Fact::Kernel(KernelEvent {
            pod: event.pod.and(pod.map(uid)),
            netns_cookie: NODE,
            in_node_network: true,
            ..event
        }),
        fact => fact,
    }
}

/// A host-network pod has no address of its own.
fn host_network(fact: Fact) -> Fact {
    match fact {
        Fact::Cluster(ClusterFact::Pod(pod)) => {
            Fact::Cluster(ClusterFact::Pod(PodObserved { addresses: vec![], ..pod }))
        }
        fact => on_node(fact, Some(POD)),
    }
}

#[test]
fn a_host_network_pods_listener_is_told_by_its_cgroup() {
    let mut facts: Vec<Fact> = TELLER.story().into_iter().map(host_network).collect();
    facts.extend([NEIGHBOUR.seen(1_000), NEIGHBOUR.deleted(10_200)].map(host_network));
    for (ms, pod) in [(10_400, None), (10_700, Some(OTHER))] {
        facts.push(on_node(TELLER.kernel_on(ms, Happening::ListenerClosed, 8_080, 9), pod));
    }
    let correlator = correlate(facts);
    assert_eq!(timeline(&correlator, POD).head_start_seconds(), Some(0.1));
    assert_eq!(timeline(&correlator, OTHER).head_start_seconds(), Some(0.5));
}

#[test]
fn refusals_at_the_nodes_address_are_no_pods() {
    let correlator = correlate(TELLER.story().into_iter().map(host_network));
    let timeline = timeline(&correlator, POD);
    assert_eq!((timeline.refused, timeline.first_refused), (0, None));
    assert_eq!(correlator.refused_by_workload(), BTreeMap::new());
}

/// A runtime puts its own process in the pod's cgroup before it enters the pod's network.
#[test]
fn a_runtimes_process_does_not_give_its_pod_the_nodes_network() {
    let mut facts = TELLER.story();
    facts.push(on_node(TELLER.kernel(5_000, Happening::Exited), Some(POD)));
    for (ms, pod) in [(10_600, None), (10_700, Some(POD)), (10_900, Some(OTHER))] {
        facts.push(on_node(TELLER.kernel_on(ms, Happening::ListenerClosed, 8_080, 9), pod));
    }
    assert_eq!(timeline(&correlate(facts), POD).head_start_seconds(), Some(0.1));
}
