//! The correlator by scenario.

use std::sync::Arc;
use std::time::Duration;

use super::story::*;
use super::*;
use crate::facts::{
    BackendStep, Conditions, Deletion, Endpoint, EndpointPort, Happening, PodObserved, Protocol,
    ServicePort, SliceObserved, TargetPod,
};

#[test]
fn a_whole_termination_gives_every_figure() {
    let timeline = timeline(&correlate(TELLER.story()), POD);
    assert_seconds(timeline.gap_seconds(), 1.3);
    assert_seconds(timeline.head_start_seconds(), 0.1);
    assert_seconds(timeline.arrival_tail_seconds(), 1.2);
    assert_seconds(timeline.needed_seconds(), 1.3);
    assert_seconds(timeline.shortfall_seconds(), 1.2);
    assert_seconds(timeline.drain_seconds(), 0.06);
    assert_eq!(timeline.refused, 5);
    assert_eq!(timeline.first_refused.map(|first| first.at), Some(at(10_400)));
    assert_eq!(timeline.last_refused.map(|last| last.at), Some(at(11_400)));
    assert_eq!(timeline.censored, Vec::<String>::new());
    assert!(timeline.home);
    let uncertainty = timeline.deletion_requested.and_then(|instant| instant.uncertainty);
    assert_eq!(uncertainty, Some(Duration::from_millis(200)));
}

#[test]
fn removal_seen_before_the_deletion_still_counts() {
    let mut facts = vec![
        TELLER.backend(500, BackendStep::Added),
        TELLER.seen(1_000),
        TELLER.deleted(10_200),
        TELLER.endpoint(10_210, EndpointState::Terminating, false),
        TELLER.backend(10_195, BackendStep::Removed),
    ];
    let forward = timeline(&correlate(facts.clone()), POD);
    assert_seconds(forward.gap_seconds(), -0.005);
    facts.reverse();
    assert_eq!(timeline(&correlate(facts), POD), forward);
}

#[test]
fn the_last_service_to_drop_the_pod_decides_the_gap() {
    let mut facts = TELLER.story();
    facts.push(TELLER.backend_of("shop/api:http", 600, BackendStep::Added));
    let pending = timeline(&correlate(facts.clone()), POD);
    assert_eq!(pending.backend_removed, None);
    facts.push(TELLER.backend_of("shop/api:http", 12_500, BackendStep::Removed));
    let done = timeline(&correlate(facts), POD);
    assert_seconds(done.gap_seconds(), 2.3);
    assert_eq!(done.removals.len(), 2);
}

#[test]
fn a_backend_that_is_put_back_is_not_removed() {
    let mut facts = TELLER.story();
    facts.push(TELLER.backend(11_600, BackendStep::Added));
    assert_eq!(timeline(&correlate(facts.clone()), POD).gap_seconds(), None);
    facts.push(TELLER.backend(11_800, BackendStep::Removed));
    assert_seconds(timeline(&correlate(facts), POD).gap_seconds(), 1.6);
}

#[test]
fn a_backend_is_removed_when_it_begins_to_drain_and_its_end_is_kept_too() {
    let timeline = timeline(
        &correlate([
            TELLER.backend(500, BackendStep::Added),
            TELLER.seen(1_000),
            TELLER.backend(10_300, BackendStep::Draining),
            TELLER.deleted(10_200),
            TELLER.backend(70_000, BackendStep::Removed),
        ]),
        POD,
    );
    assert_seconds(timeline.gap_seconds(), 0.1);
    let moment = |instant: Option<Instant>| instant.map(|instant| instant.at);
    assert_eq!(timeline.removals.len(), 1);
    assert_eq!(moment(timeline.removals[0].backend_removed), Some(at(10_300)));
    assert_eq!(moment(timeline.removals[0].drained), Some(at(70_000)));
}

#[test]
fn a_closed_timeline_still_learns_when_its_backend_was_drained() {
    let is_removal =
        |fact: &Fact| matches!(fact, Fact::Backend(change) if change.step == BackendStep::Removed);
    let facts = TELLER.story().into_iter().filter(|fact| !is_removal(fact));
    let mut correlator = correlate(facts.chain([TELLER.backend(11_500, BackendStep::Draining)]));
    assert_eq!(correlator.advance(at(60_000)).len(), 1);
    let removal = |correlator: &Correlator| timeline(correlator, POD).removals.remove(0);
    assert!(removal(&correlator).draining);
    record(&mut correlator, TELLER.backend(90_000, BackendStep::Removed));
    correlator.advance(at(91_000));
    let removal = removal(&correlator);
    assert_eq!(removal.drained.map(|drained| drained.at), Some(at(90_000)));
    assert_eq!(
        (removal.backend_removed.map(|at| at.at), removal.draining),
        (Some(at(11_500)), false)
    );
}

#[test]
fn a_drained_backend_that_is_sent_to_again_is_not_removed() {
    let drained = TELLER.story().into_iter().chain([
        TELLER.backend(10_220, BackendStep::Draining),
        TELLER.backend(11_600, BackendStep::Added),
    ]);
    let timeline = timeline(&correlate(drained), POD);
    assert_eq!((timeline.backend_removed, timeline.removals[0].drained), (None, None));
}

#[test]
fn what_drained_long_before_the_deletion_is_no_backend_of_it() {
    let minutes = |count: u64| count * 60_000;
    let mut correlator = correlate([
        TELLER.backend(500, BackendStep::Added),
        TELLER.seen(1_000),
        // Unready; kube-proxy keeps the destination for a connection, at most 15 minutes.
        TELLER.backend(2_000, BackendStep::Draining),
    ]);
    correlator.advance(at(minutes(12)));
    record(&mut correlator, TELLER.deleted(minutes(13)));
    record(&mut correlator, TELLER.backend(minutes(15), BackendStep::Removed));
    let timeline = timeline(&correlator, POD);
    assert_eq!((timeline.removals, timeline.backend_removed), (Vec::new(), None));
}

#[test]
fn a_pod_in_no_rule_has_no_gap_but_a_tail() {
    let facts = TELLER.story().into_iter().filter(|fact| !matches!(fact, Fact::Backend(_)));
    let timeline = timeline(&correlate(facts), POD);
    assert_eq!(timeline.gap_seconds(), None);
    assert_seconds(timeline.needed_seconds(), 1.2);
}

#[test]
fn a_pod_without_an_address_of_its_own_has_no_tail() {
    let host_network = |fact| match fact {
        Fact::Cluster(ClusterFact::Pod(pod)) => {
            Fact::Cluster(ClusterFact::Pod(PodObserved { addresses: vec![], ..pod }))
        }
        fact => fact,
    };
    let timeline = timeline(&correlate(TELLER.story().into_iter().map(host_network)), POD);
    assert!(timeline.home);
    assert_eq!(timeline.arrival_tail_seconds(), None, "nothing is counted at a node's address");
    assert_seconds(timeline.needed_seconds(), 1.3);
}

#[test]
fn an_api_server_whose_clock_is_ahead_bounds_nothing() {
    let ahead = Deletion { not_before: at(11_000), grace: Duration::from_secs(30) };
    let facts = [
        TELLER.seen(1_000),
        TELLER.observed(10_200, Some(ahead)),
        TELLER.endpoint(10_210, EndpointState::Terminating, false),
    ];
    let timeline = timeline(&correlate(facts), POD);
    assert_eq!(timeline.deletion_requested.expect("a deletion").uncertainty, None);
    assert_eq!(timeline.endpoint_terminating.expect("an endpoint").uncertainty, None);
}

#[test]
fn a_reused_address_blames_nobody_else() {
    let reuser = Teller { pod: REUSER, address: 7, netns: 71 };
    let mut facts = TELLER.story();
    facts.extend([
        // The rules know the new owner a little before our watch does.
        reuser.backend(13_900, BackendStep::Added),
        reuser.seen(14_000),
        reuser.kernel(13_800, Happening::ListenerOpened),
        reuser.arrivals(Outcome::Accepted, 10, 15_000),
        reuser.kernel(13_700, Happening::Refused),
        reuser.arrivals(Outcome::Refused, 1, 13_700),
    ]);
    let correlator = correlate(facts);
    let first = timeline(&correlator, POD);
    assert_seconds(first.gap_seconds(), 1.3);
    assert_seconds(first.arrival_tail_seconds(), 1.2);
    assert_eq!(first.refused, 5);
    assert_eq!(correlator.timelines().len(), 1, "the new pod is not terminating");
    let web = (Arc::from("shop"), Workload { kind: Arc::from("Deployment"), name: "web".into() });
    assert_eq!(correlator.refused_by_workload().get(&web), Some(&6));
}

#[test]
fn an_address_taken_over_while_still_in_the_rules_gives_no_gap() {
    let reuser = Teller { pod: REUSER, address: 7, netns: 71 };
    let mut facts: Vec<Fact> =
        TELLER.story().into_iter().filter(|fact| !matches!(fact, Fact::Backend(_))).collect();
    facts.extend([
        TELLER.backend(500, BackendStep::Added),
        reuser.seen(14_000),
        reuser.backend(20_000, BackendStep::Removed),
    ]);
    assert_eq!(timeline(&correlate(facts), POD).gap_seconds(), None);
}

#[test]
fn an_ended_pod_whose_address_went_to_another_has_no_backend() {
    let reuser = Teller { pod: REUSER, address: 7, netns: 71 };
    let mut correlator = correlate([
        TELLER.seen(1_000),
        reuser.seen(50_000),
        reuser.backend(50_100, BackendStep::Added),
        TELLER.deleted(100_200),
        TELLER.removed(100_300),
    ]);
    assert_eq!(timeline(&correlator, POD).removals, []);
    assert_eq!(correlator.advance(at(104_000)).len(), 1, "nothing more is expected");
}

/// As a pod of another node, or one that shares its node's address.
fn elsewhere(fact: Fact) -> Fact {
    match fact {
        Fact::Endpoint(step) => Fact::Endpoint(EndpointStep { home: false, ..step }),
        fact => fact,
    }
}

#[test]
fn a_backend_of_another_pod_at_a_shared_address_is_not_waited_for() {
    let mut facts = vec![
        TELLER.backend(500, BackendStep::Added),
        elsewhere(TELLER.endpoint(10_210, EndpointState::Terminating, false)),
        TELLER.backend(10_400, BackendStep::Removed),
        elsewhere(TELLER.endpoint(12_000, EndpointState::Gone, false)),
    ];
    let Fact::Backend(mut exporter) =
        TELLER.backend_of("kube-system/exporter:metrics", 500, BackendStep::Added)
    else {
        panic!("a backend")
    };
    exporter.backend.port = 9_100;
    facts.push(Fact::Backend(exporter));
    let mut correlator = correlate(facts);
    let removed = timeline(&correlator, POD).backend_removed.map(|removed| removed.at);
    assert_eq!(removed, Some(at(10_400)));
    assert_eq!(correlator.advance(at(16_000)).len(), 1);
}

#[test]
fn a_reused_address_on_another_node_does_not_undo_the_removal() {
    let correlator = correlate([
        TELLER.backend(500, BackendStep::Added),
        elsewhere(TELLER.endpoint(10_210, EndpointState::Terminating, false)),
        TELLER.backend(10_400, BackendStep::Removed),
        elsewhere(TELLER.endpoint(12_000, EndpointState::Gone, false)),
        TELLER.backend(13_000, BackendStep::Added),
    ]);
    let removed = timeline(&correlator, POD).backend_removed.map(|removed| removed.at);
    assert_eq!(removed, Some(at(10_400)));
}

#[test]
fn refusals_before_the_deletion_are_not_counted_to_it() {
    let mut facts = TELLER.story();
    // Not listening yet: two refusals at the start of its life, one of them not reported.
    facts.push(TELLER.kernel(1_050, Happening::Refused));
    facts.push(TELLER.arrivals(Outcome::Refused, 6, 11_400));
    assert_eq!(timeline(&correlate(facts), POD).refused, 5);
}

#[test]
fn refusals_whose_details_were_dropped_are_not_counted_to_a_later_deletion() {
    let mut correlator = correlate([
        TELLER.seen(1_000),
        TELLER.kernel(1_050, Happening::Refused),
        TELLER.kernel(1_100, Happening::ListenerOpened),
        TELLER.arrivals(Outcome::Refused, 1, 1_050),
    ]);
    correlator.advance(at(1_000_000));
    record(&mut correlator, TELLER.deleted(1_200_200));
    record(&mut correlator, TELLER.kernel(1_200_400, Happening::Refused));
    record(&mut correlator, TELLER.arrivals(Outcome::Refused, 2, 1_200_400));
    assert_eq!(timeline(&correlator, POD).refused, 1);
}

#[test]
fn refusals_suppressed_before_the_deletion_are_not_counted_to_it() {
    let mut facts = TELLER.story();
    // Of 98 at the start of its life one was told; the rest came with the next one told, at 10.4 s.
    facts.push(TELLER.kernel(1_050, Happening::Refused));
    facts.retain(|fact| !matches!(fact, Fact::Kernel(event) if event.at == at(10_400)));
    let Fact::Kernel(next) = TELLER.kernel(10_400, Happening::Refused) else { panic!("an event") };
    facts.push(Fact::Kernel(KernelEvent { suppressed: 97, ..next }));
    facts.push(TELLER.arrivals(Outcome::Refused, 103, 11_400));
    assert_eq!(timeline(&correlate(facts), POD).refused, 5);
}

#[test]
fn a_termination_longer_than_facts_are_kept_loses_none_of_them() {
    let asked = Deletion { not_before: at(10_000), grace: Duration::from_hours(1) };
    let mut facts = TELLER.story();
    facts.retain(|fact| !matches!(fact, Fact::Cluster(ClusterFact::PodRemoved { .. })));
    facts.retain(
        |fact| !matches!(fact, Fact::Cluster(ClusterFact::Pod(pod)) if pod.deletion.is_some()),
    );
    facts.push(TELLER.observed(10_200, Some(asked)));
    let mut correlator = correlate(facts);
    let blindness = Blindness { from: at(10_400), until: at(10_500), source: "pod watch" };
    correlator.record_blindness(blindness);
    let before = timeline(&correlator, POD);
    assert_eq!(correlator.advance(at(3_000_000)), []);
    assert_eq!(timeline(&correlator, POD), before);
    assert_eq!(before.censored, ["pod watch may have missed something"]);
    record(&mut correlator, TELLER.removed(3_010_000));
    assert_eq!(correlator.advance(at(3_020_000)).len(), 1);
}

#[test]
fn refusals_before_the_address_was_known_to_the_kernel_hide_no_later_ones() {
    let uncounted = |ms| match TELLER.kernel(ms, Happening::Refused) {
        Fact::Kernel(event) => Fact::Kernel(KernelEvent { counted: false, ..event }),
        fact => fact,
    };
    let mut facts = TELLER.story();
    facts.extend([uncounted(900), uncounted(950)]);
    assert_eq!(timeline(&correlate(facts.clone()), POD).refused, 5);
    facts.push(uncounted(10_350));
    assert_eq!(timeline(&correlate(facts), POD).refused, 6);
}

#[test]
fn other_ports_do_not_decide_the_head_start() {
    let mut facts = TELLER.story();
    facts.push(TELLER.kernel_on(10_220, Happening::ListenerClosed, 9_090, 2));
    assert_seconds(timeline(&correlate(facts), POD).head_start_seconds(), 0.1);
}

#[test]
fn a_listener_that_reopens_has_not_closed() {
    let mut facts = TELLER.story();
    facts.push(TELLER.kernel_on(10_305, Happening::ListenerOpened, 8_080, 2));
    assert_eq!(timeline(&correlate(facts.clone()), POD).head_start_seconds(), None);
    facts.push(TELLER.kernel_on(10_900, Happening::ListenerClosed, 8_080, 2));
    assert_seconds(timeline(&correlate(facts), POD).head_start_seconds(), 0.7);
}

#[test]
fn a_listener_that_was_handed_over_has_not_closed() {
    let mut facts = TELLER.story();
    facts.push(TELLER.kernel_on(10_295, Happening::ListenerOpened, 8_080, 2));
    assert_eq!(timeline(&correlate(facts.clone()), POD).head_start_seconds(), None);
    facts.push(TELLER.kernel_on(10_900, Happening::ListenerClosed, 8_080, 2));
    assert_seconds(timeline(&correlate(facts), POD).head_start_seconds(), 0.7);
}

#[test]
fn the_sandbox_killed_unasked_is_not_the_workload() {
    let mut facts = TELLER.story();
    let sandbox = |ms, happening| match TELLER.kernel(ms, happening) {
        Fact::Kernel(event) => Fact::Kernel(KernelEvent { cgroup_id: 999, pid: 1, ..event }),
        fact => fact,
    };
    facts.push(sandbox(11_950, Happening::Signalled { number: 9 }));
    facts.push(sandbox(11_960, Happening::Exited));
    let timeline = timeline(&correlate(facts), POD);
    assert_eq!(timeline.sigkill, None);
    assert_eq!(timeline.process_exited.map(|exited| exited.at), Some(at(10_310)));
}

#[test]
fn what_is_no_sample_says_why() {
    let forced = Deletion { not_before: at(10_000), grace: Duration::ZERO };
    let facts = [TELLER.seen(1_000), TELLER.observed(10_200, Some(forced))];
    assert_eq!(timeline(&correlate(facts), POD).censored, ["deleted with a grace period of 0"]);

    let facts = [TELLER.deleted(10_200)];
    assert_eq!(timeline(&correlate(facts), POD).censored, ["already terminating when first seen"]);

    let facts = [TELLER.seen(1_000), TELLER.removed(10_000)];
    assert_eq!(timeline(&correlate(facts), POD).censored, ["removed before its deletion was seen"]);

    let ended = match TELLER.seen(5_000) {
        Fact::Cluster(ClusterFact::Pod(pod)) => {
            Fact::Cluster(ClusterFact::Pod(PodObserved { ended: true, ..pod }))
        }
        fact => fact,
    };
    let facts = [TELLER.seen(1_000), ended, TELLER.deleted(10_200)];
    assert_eq!(timeline(&correlate(facts), POD).censored, ["it had ended before it was deleted"]);

    let facts = [
        TELLER.seen(1_000),
        TELLER.deleted(10_200),
        TELLER.endpoint(10_210, EndpointState::Terminating, true),
    ];
    let censored = timeline(&correlate(facts), POD).censored;
    assert_eq!(
        censored,
        ["no other endpoint of shop/web:http was ready: rules keep a terminating one by design"]
    );

    let mut correlator = correlate(TELLER.story());
    let blind = |from, until| Blindness { from: at(from), until: at(until), source: "pod watch" };
    correlator.record_blindness(blind(1_000, 5_000));
    assert_eq!(timeline(&correlator, POD).censored, Vec::<String>::new());
    correlator.record_blindness(blind(5_000, 11_000));
    assert_eq!(timeline(&correlator, POD).censored, ["pod watch may have missed something"]);
}

#[test]
fn a_pod_of_another_node_has_its_removal_only() {
    let facts = [
        TELLER.backend(500, BackendStep::Added),
        elsewhere(TELLER.endpoint(10_210, EndpointState::Terminating, false)),
        TELLER.backend(10_400, BackendStep::Removed),
        elsewhere(TELLER.endpoint(12_000, EndpointState::Gone, false)),
    ];
    let mut correlator = correlate(facts);
    let timeline = timeline(&correlator, POD);
    assert!(!timeline.home);
    assert_eq!(timeline.gap_seconds(), None, "the deletion is not known here");
    assert_eq!(timeline.backend_removed.map(|removed| removed.at), Some(at(10_400)));
    assert_eq!(correlator.advance(at(16_000)).len(), 1);
}

#[test]
fn a_timeline_closes_once_when_nothing_more_is_expected() {
    let mut correlator = correlate(TELLER.story());
    assert_eq!(correlator.advance(at(14_900)), []);
    assert_eq!(correlator.advance(at(15_000)).len(), 1);
    assert_eq!(correlator.advance(at(16_000)), []);
    assert_eq!(correlator.timelines().len(), 1);
    // Its facts go after ten minutes, the timeline and the totals stay.
    let before = correlator.refused_by_workload();
    correlator.advance(at(700_000));
    assert_eq!(correlator.local_addresses(), BTreeSet::new());
    assert_eq!(correlator.timelines().len(), 1);
    assert_eq!(correlator.refused_by_workload(), before);
    // A late reading of the dropped pod's count neither returns nor doubles it.
    record(&mut correlator, TELLER.arrivals(Outcome::Refused, 5, 11_400));
    record(&mut correlator, Teller { pod: REUSER, address: 7, netns: 71 }.seen(700_100));
    assert_eq!(correlator.refused_by_workload(), before);
}

#[test]
fn nothing_is_kept_of_a_pod_long_gone_but_its_timeline() {
    let mut correlator = correlate(TELLER.story());
    correlator.advance(at(16_000));
    correlator.advance(at(700_000));
    assert!(correlator.pods.is_empty() && correlator.evidence.counts.is_empty());
    let Fact::Arrivals(late) = TELLER.arrivals(Outcome::Refused, 5, 11_400) else {
        panic!("a count")
    };
    assert!(correlator.is_retired(&late), "the kernel may delete it");
    correlator.advance(at(1_400_000));
    let evidence = &correlator.evidence;
    assert!(correlator.retired_netns.is_empty() && evidence.netns_to_pods.is_empty());
    assert!(evidence.listeners.is_empty() && evidence.processes.is_empty());
    assert!(evidence.refusals.is_empty() && evidence.dropped_refusals.is_empty());
    assert!(evidence.backends.is_empty() && evidence.blind.is_empty());
}

#[test]
fn a_backend_that_never_leaves_keeps_the_timeline_open_then_says_so() {
    let facts = TELLER.story().into_iter().filter(
        |fact| !matches!(fact, Fact::Backend(change) if change.step == BackendStep::Removed),
    );
    let mut correlator = correlate(facts);
    assert_eq!(correlator.advance(at(20_000)), []);
    let closed = correlator.advance(at(700_000));
    assert_eq!(closed[0].censored, ["it did not end in time"]);
}

fn listed(last: u8, ready: bool, terminating: bool) -> Endpoint {
    Endpoint {
        address: address(last),
        conditions: Conditions { ready, serving: true, terminating },
        pod: Some(TargetPod {
            uid: (if last == 7 { POD } else { OTHER }).into(),
            namespace: "shop".into(),
            name: "web-x".into(),
        }),
        node: Some("node-1".into()),
    }
}

fn view(slice: &str, ms: u64, endpoints: Vec<Endpoint>) -> SliceObserved {
    let service = ServicePort(Arc::from(SERVICE));
    let ports = vec![EndpointPort { service, protocol: Protocol::Tcp, port: 8080 }];
    SliceObserved { at: at(ms), slice: slice.into(), ports, endpoints }
}

fn steps(slices: &mut Slices, ms: u64, endpoints: Vec<Endpoint>) -> Vec<(u8, EndpointState, bool)> {
    let observed = view("shop/web-1", ms, endpoints);
    let last = |address: IpAddr| if address == self::address(7) { 7 } else { 8 };
    slices
        .observe(observed)
        .into_iter()
        .map(|step| (last(step.endpoint.address), step.state, step.alone))
        .collect()
}

#[test]
fn slices_give_steps_away_from_ready_only() {
    use EndpointState::{Gone, Terminating};
    let mut slices = Slices::new("node-1".into());
    let mut observe = |ms, endpoints| steps(&mut slices, ms, endpoints);
    assert_eq!(observe(0, vec![listed(7, true, false), listed(8, true, false)]), []);
    assert_eq!(
        observe(1, vec![listed(7, false, true), listed(8, true, false)]),
        [(7, Terminating, false)]
    );
    assert_eq!(observe(2, vec![listed(7, false, true), listed(8, true, false)]), []);
    assert_eq!(observe(3, vec![listed(8, false, true)]), [(8, Terminating, true), (7, Gone, true)]);
    assert_eq!(observe(4, vec![]), [(8, Gone, true)]);
}

#[test]
fn a_terminating_endpoint_is_left_alone_when_the_last_ready_one_goes() {
    use EndpointState::Terminating;
    let drained = |endpoint: Endpoint| Endpoint {
        conditions: Conditions { serving: false, ..endpoint.conditions },
        ..endpoint
    };
    let ready = vec![listed(7, true, false), listed(8, true, false)];
    let first = vec![listed(7, false, true), listed(8, true, false)];
    let mut slices = Slices::new("node-1".into());
    steps(&mut slices, 0, ready.clone());
    assert_eq!(steps(&mut slices, 1, first.clone()), [(7, Terminating, false)]);
    let both = vec![listed(7, false, true), listed(8, false, true)];
    let left = [(8, Terminating, true), (7, Terminating, true)];
    assert_eq!(steps(&mut slices, 2, both.clone()), left);
    assert_eq!(steps(&mut slices, 3, both), [], "told once");

    // Rules send nothing to one that no longer serves, alone or not.
    let mut slices = Slices::new("node-1".into());
    steps(&mut slices, 0, ready);
    steps(&mut slices, 1, first);
    let both = vec![drained(listed(7, false, true)), listed(8, false, true)];
    assert_eq!(steps(&mut slices, 2, both), [(8, Terminating, true)]);
}

fn states(slices: &mut Slices, observed: SliceObserved) -> Vec<(EndpointState, bool)> {
    slices.observe(observed).into_iter().map(|step| (step.state, step.first_sight)).collect()
}

#[test]
fn an_endpoint_that_another_slice_took_first_is_not_gone() {
    use EndpointState::{Gone, Terminating};
    for moved in [listed(7, true, false), listed(7, false, true)] {
        let mut slices = Slices::new("node-1".into());
        let mut see = |slice, ms, endpoints| states(&mut slices, view(slice, ms, endpoints));
        see("shop/web-1", 0, vec![moved.clone(), listed(8, true, false)]);
        assert_eq!(see("shop/web-2", 1, vec![moved]), []);
        assert_eq!(see("shop/web-1", 2, vec![listed(8, true, false)]), []);
        let later = see("shop/web-2", 3, vec![listed(7, false, true)]);
        assert!(matches!(later[..], [] | [(Terminating, false)]), "{later:?}");
        assert_eq!(see("shop/web-2", 4, vec![]), [(Gone, false)]);
    }
}

#[test]
fn an_endpoint_that_another_slice_takes_later_is_back() {
    use EndpointState::{Back, Gone, Terminating};
    for (moved, back) in [(listed(7, true, false), Back), (listed(7, false, true), Terminating)] {
        let mut slices = Slices::new("node-1".into());
        let mut see = |slice, ms, endpoints| states(&mut slices, view(slice, ms, endpoints));
        see("shop/web-1", 0, vec![moved.clone(), listed(8, true, false)]);
        assert_eq!(see("shop/web-1", 1, vec![listed(8, true, false)]), [(Gone, false)]);
        assert_eq!(see("shop/web-2", 2, vec![moved]), [(back, false)], "no first sight of it");
    }
}

#[test]
fn a_move_between_slices_is_no_part_of_a_termination() {
    let expected = timeline(&correlate(TELLER.story()), POD);
    let mut facts = TELLER.story();
    facts.extend([
        // Within the second before the deletion that may belong to it.
        TELLER.endpoint(9_500, EndpointState::Gone, false),
        TELLER.endpoint(9_510, EndpointState::Back, false),
        TELLER.endpoint(10_900, EndpointState::Gone, false),
        TELLER.endpoint(10_905, EndpointState::Terminating, false),
    ]);
    assert_eq!(timeline(&correlate(facts), POD), expected);
}

#[test]
fn a_service_of_many_slices_is_alone_only_when_none_of_them_has_a_ready_endpoint() {
    use EndpointState::Terminating;
    let mut slices = Slices::new("node-1".into());
    slices.observe(view("shop/web-1", 0, vec![listed(7, true, false)]));
    slices.observe(view("shop/web-2", 0, vec![listed(8, true, false)]));
    let mut end = |slice, endpoint| -> Vec<(EndpointState, bool)> {
        let steps = slices.observe(view(slice, 1, vec![endpoint]));
        steps.into_iter().map(|step| (step.state, step.alone)).collect()
    };
    assert_eq!(end("shop/web-1", listed(7, false, true)), [(Terminating, false)]);
    let both = [(Terminating, true), (Terminating, true)];
    assert_eq!(end("shop/web-2", listed(8, false, true)), both);
}

#[test]
fn a_source_that_stays_away_is_blind_for_one_span_and_censors_all_that_overlap_it() {
    let mut correlator = correlate(TELLER.story());
    for seconds in 0..60 {
        let (from, until) = (at(9_000 + seconds * 2_000), at(11_000 + seconds * 2_000));
        correlator.record_blindness(Blindness { from, until, source: "endpointslice watch" });
    }
    assert_eq!(correlator.evidence.blind.len(), 1);
    let closed = correlator.advance(at(15_000));
    assert_eq!(closed[0].censored, ["endpointslice watch may have missed something"]);
}

#[test]
fn a_step_of_a_pod_that_was_forgotten_begins_no_termination() {
    let Fact::Endpoint(mut step) = TELLER.endpoint(10_000, EndpointState::Terminating, false)
    else {
        panic!("an endpoint's step")
    };
    assert!(correlate(vec![Fact::Endpoint(step.clone())]).is_terminating());
    step.names = None;
    assert!(!correlate(vec![Fact::Endpoint(step)]).is_terminating());
}
