//! Any sequence of kube-proxy's changes, made with the real tools: what the follower has reported
//! adds up to what a fresh reading of the rules shows, and to what the Services say.
//!
//! A sequence that fails is made as short as possible and printed; it is kept beside this file and
//! tried first from then on.

use std::collections::BTreeSet;
use std::thread;

use observer::clock;
use observer::dataplane::{Counters, Family};
use observer::facts::Protocol;
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestRunner};

use super::following::{ROOMY_BYTES, Running, in_runtime};
use super::kube_proxy::{Condition, Form, Node, Service};
use super::namespace::{MARKERS, dump, legacy_backends, nft, reached};

/// Sequences for each form, and how long they are.
const SEQUENCES: u32 = 12;
const STEPS: std::ops::Range<usize> = 10..20;
/// A failure is shortened by at most so many further runs of some 0.5 s.
const SHORTENINGS: u32 = 60;

const NAMES: [&str; 4] = ["web", "api", "dns", "sip"];
const PODS: std::ops::Range<u8> = 2..8;

/// One change of what the API server holds. Numbers are those of a Service and of a pod.
#[derive(Clone, Debug)]
enum Change {
    /// A Service comes, without endpoints, or goes.
    Service(usize),
    /// A pod becomes an endpoint, perhaps again.
    Ready(usize, u8),
    /// A pod is deleted, and still serves.
    Terminating(usize, u8),
    /// An endpoint is gone.
    Gone(usize, u8),
    /// A pod is gone from all Services at once.
    PodGone(u8),
    Affinity(usize),
    NodePort(usize),
    LoadBalancer(usize),
    LocalOnly(usize),
    /// Nothing: kube-proxy writes the same again.
    Rewritten(usize),
}

/// The changes of one sync, and whether somebody else's rules change at the same time.
type Sync = (Vec<Change>, bool);

fn any_change() -> impl Strategy<Value = Change> {
    let service = 0..NAMES.len();
    let endpoint = (0..NAMES.len(), PODS);
    prop_oneof![
        1 => service.clone().prop_map(Change::Service),
        6 => endpoint.clone().prop_map(|(service, pod)| Change::Ready(service, pod)),
        3 => endpoint.clone().prop_map(|(service, pod)| Change::Terminating(service, pod)),
        3 => endpoint.prop_map(|(service, pod)| Change::Gone(service, pod)),
        1 => PODS.prop_map(Change::PodGone),
        1 => service.clone().prop_map(Change::Affinity),
        1 => service.clone().prop_map(Change::NodePort),
        1 => service.clone().prop_map(Change::LoadBalancer),
        1 => service.clone().prop_map(Change::LocalOnly),
        1 => service.prop_map(Change::Rewritten),
    ]
}

fn service(number: usize, ready: &[u8]) -> Service {
    let protocol = [Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp][number];
    let address = u8::try_from(number + 1).expect("few Services");
    Service::new(NAMES[number], protocol, address, ready)
}

/// Makes the change; gives the Services it touches.
fn make(node: &mut Node, change: &Change) -> BTreeSet<&'static str> {
    if let Change::Service(number) = change {
        if node.services.remove(NAMES[*number]).is_none() {
            node.set(service(*number, &[]));
        }
        return BTreeSet::from([NAMES[*number]]);
    }
    if let Change::PodGone(pod) = change {
        let behind = node.services.values_mut();
        let behind =
            behind.filter_map(|service| service.endpoints.remove(pod).map(|_| service.name));
        return behind.collect();
    }
    let (Change::Ready(number, _)
    | Change::Terminating(number, _)
    | Change::Gone(number, _)
    | Change::Affinity(number)
    | Change::NodePort(number)
    | Change::LoadBalancer(number)
    | Change::LocalOnly(number)
    | Change::Rewritten(number)) = change
    else {
        unreachable!("handled above")
    };
    let Some(service) = node.services.get_mut(NAMES[*number]) else { return BTreeSet::new() };
    match change {
        Change::Ready(_, pod) => service.list(*pod, Condition::Ready),
        Change::Terminating(_, pod) => {
            service.endpoints.entry(*pod).and_modify(|now| *now = Condition::Terminating);
        }
        Change::Gone(_, pod) => service.unlist(*pod),
        Change::Affinity(_) => service.affinity = !service.affinity,
        Change::NodePort(_) => service.node_port = !service.node_port,
        Change::LoadBalancer(_) => service.load_balancer = !service.load_balancer,
        Change::LocalOnly(_) => service.local_only = !service.local_only,
        _ => {}
    }
    BTreeSet::from([NAMES[*number]])
}

/// Somebody else's destination NAT, to an address of this number.
fn foreign(number: usize) -> (String, String) {
    let rules = format!(
        "add table ip foreign
        delete table ip foreign
        table ip foreign {{
            chain c {{
                type nat hook output priority -50;
                tcp dport 99 dnat to 203.0.113.{number}:99
            }}
        }}"
    );
    (rules, format!("- Tcp 203.0.113.{number} 99"))
}

/// What a fresh reading of all rules shows, without our markers.
fn read_anew(node: &Node) -> BTreeSet<String> {
    let mut all = reached(&dump(&Counters::default()));
    all.retain(|backend| !backend.contains(MARKERS));
    if node.form == Form::IptablesLegacy {
        all.extend(legacy_backends(node.version));
    }
    all
}

async fn follow(form: Form, version: Family, syncs: Vec<Sync>) {
    let mut node = Node::start(form, version);
    node.set(service(0, &[2, 3]));
    node.set(service(2, &[3]));
    node.sync(&NAMES);
    let (mut running, present) = Running::start(ROOMY_BYTES).await;
    assert_eq!(present, node.reachable());
    let mut others = BTreeSet::new();
    for (number, (changes, disturbed)) in syncs.iter().enumerate() {
        let before = running.backends();
        let touched: BTreeSet<_> =
            changes.iter().flat_map(|change| make(&mut node, change)).collect();
        let touched: Vec<_> = touched.into_iter().collect();
        let (rules, backend) = foreign(number);
        thread::scope(|threads| {
            if *disturbed {
                others = BTreeSet::from([backend]);
                threads.spawn(|| nft(&rules));
            }
            node.sync(&touched);
        });
        let wanted: BTreeSet<String> = node.reachable().union(&others).cloned().collect();
        let reported = if form == Form::IptablesLegacy {
            running.legacy_committed(clock::now(), version).await;
            running.until_backends(&wanted).await
        } else {
            running.reported().await
        };
        assert_eq!(running.backends(), wanted, "after sync {number}");
        assert_eq!(read_anew(&node), wanted, "read anew after sync {number}");
        assert_eq!(reported.removed(), &before - &wanted, "removed by sync {number}");
        assert_eq!(reported.added(), &wanted - &before, "added by sync {number}");
        let changes = reported.removed.len() + reported.added.len();
        assert_eq!(changes, before.symmetric_difference(&wanted).count(), "each change once");
    }
    let counters = &running.counters;
    assert_eq!(counters.malformed.get() + counters.unknown_expressions.get(), 0);
    assert_eq!(counters.gaps.get() + counters.overruns.get() + counters.resyncs.get(), 0);
}

fn any_sequence_is_followed(form: Form) {
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dataplane/random_changes.failures");
    let mut runner = TestRunner::new(ProptestConfig {
        cases: SEQUENCES,
        max_shrink_iters: SHORTENINGS,
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(kept))),
        ..ProptestConfig::default()
    });
    let sync = (proptest::collection::vec(any_change(), 1..4), proptest::bool::weighted(0.2));
    let syncs = proptest::collection::vec(sync, STEPS);
    let version = prop_oneof![Just(Family::V4), Just(Family::V6)];
    let outcome = runner.run(&(version, syncs), |(version, syncs)| {
        in_runtime(async move || follow(form, version, syncs).await);
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{form:?}: {failure}"));
}

#[test]
fn any_sequence_of_nftables_1_36_syncs_is_followed() {
    any_sequence_is_followed(Form::Nftables136);
}

#[test]
fn any_sequence_of_nftables_1_35_syncs_is_followed() {
    any_sequence_is_followed(Form::Nftables135);
}

#[test]
fn any_sequence_of_iptables_nft_syncs_is_followed() {
    any_sequence_is_followed(Form::IptablesNft);
}

#[test]
fn any_sequence_of_iptables_legacy_syncs_is_followed() {
    any_sequence_is_followed(Form::IptablesLegacy);
}
