use crate::api::terminations::ClockState;
use crate::clock::WallOffset;
use crate::facts::BootNs;
use crate::sample;

use super::*;

/// The sample termination as its own node tells it: gap 3 s, head start 1 s, tail 2.5 s.
fn at_home() -> Termination {
    Termination::new(&sample::timeline(), true, WallOffset::fixed(0, BootNs(0)))
}

/// The same termination on another node, which saw the slice change at 1 s of a boot clock of its
/// own and the backend removed `after_seconds` later.
fn elsewhere(after_seconds: u64) -> Termination {
    let mut view = at_home();
    view.home = false;
    view.workload = None;
    view.grace_period_seconds = None;
    view.pre_stop_sleep_seconds = None;
    view.gap_seconds = None;
    view.head_start_seconds = None;
    view.arrival_tail_seconds = None;
    view.drain_seconds = None;
    view.refused = 0;
    view.instants.deletion_requested = None;
    let slice = view.instants.endpoint_terminating.as_mut().expect("seen");
    slice.boot_ns = 1_000_000_000;
    let removed = view.instants.backend_removed.as_mut().expect("removed");
    removed.boot_ns = (1 + after_seconds) * 1_000_000_000;
    view
}

fn another_pod(mut termination: Termination, uid: &str) -> Termination {
    uid.clone_into(&mut termination.pod.uid);
    termination
}

fn node(name: &str, terminations: Vec<Termination>) -> NodeAnswer {
    let clock = ClockState { max_error_seconds: None };
    let api_version = API_VERSION.to_owned();
    let answer = Terminations { api_version, node: name.to_owned(), clock, terminations };
    NodeAnswer { url: format!("http://{name}:9464"), answer: Ok(answer) }
}

fn only_line(answers: &[NodeAnswer]) -> WorkloadLine {
    let mut workloads = merge(answers, 1.0).workloads;
    assert_eq!(workloads.len(), 1);
    workloads.remove(0)
}

fn close_to(actual: Option<f64>, expected: f64) {
    let actual = actual.expect("a figure");
    assert!((actual - expected).abs() < 1e-6, "{actual} is not {expected}");
}

#[test]
fn one_node_gives_its_own_figures() {
    let line = only_line(&[node("n1", vec![at_home()])]);
    assert_eq!(
        (line.namespace.as_str(), line.kind.as_str(), line.name.as_str()),
        ("default", "Deployment", "web")
    );
    assert_eq!((line.terminations, line.censored, line.refused), (1, 0, 7));
    close_to(line.gap_seconds, 3.0);
    close_to(line.head_start_seconds, 1.0);
    close_to(line.arrival_tail_seconds, 2.5);
    close_to(line.shortfall_seconds, 2.0);
    assert_eq!(line.slowest_node.as_deref(), Some("n1"));
    assert_eq!(line.recommendation.sleep_seconds, Some(4));
}

#[test]
fn the_slowest_node_decides_and_its_gap_starts_at_the_deletion_request() {
    let line = only_line(&[
        node("n1", vec![at_home()]),
        node("n2", vec![elsewhere(7)]),
        node("n3", vec![elsewhere(0)]),
    ]);
    close_to(line.gap_seconds, 7.02);
    close_to(line.shortfall_seconds, 6.02);
    assert_eq!(line.slowest_node.as_deref(), Some("n2"));
    assert_eq!(line.recommendation.sleep_seconds, Some(9));
    assert_eq!((line.terminations, line.refused), (1, 7));
}

#[test]
fn a_node_that_never_had_the_backend_adds_nothing() {
    let mut view = elsewhere(7);
    view.instants.backend_removed = None;
    let line = only_line(&[node("n1", vec![at_home()]), node("n2", vec![view])]);
    assert_eq!((line.slowest_node.as_deref(), line.recommendation.samples), (Some("n1"), 1));
}

#[test]
fn a_gap_elsewhere_that_cannot_be_told_is_not_made_up() {
    let mut view = elsewhere(7);
    view.instants.endpoint_terminating = None;
    let line = only_line(&[node("n1", vec![at_home()]), node("n2", vec![view])]);
    assert_eq!((line.censored, line.recommendation.sleep_seconds), (1, None));
}

#[test]
fn an_agent_asked_twice_counts_once() {
    let line = only_line(&[node("n1", vec![at_home()]), node("n1", vec![at_home()])]);
    assert_eq!((line.terminations, line.refused), (1, 7));
}

#[test]
fn a_view_censored_anywhere_is_no_sample_but_is_counted() {
    let mut blind = elsewhere(9);
    blind.censored = vec!["endpointslice watch was blind".to_owned()];
    let line = only_line(&[
        node("n1", vec![at_home(), another_pod(at_home(), "uid-b")]),
        node("n2", vec![blind]),
    ]);
    assert_eq!((line.terminations, line.censored, line.refused), (2, 1, 14));
    assert_eq!(line.recommendation.samples, 1);
    close_to(line.gap_seconds, 3.0);
}

#[test]
fn a_view_still_open_elsewhere_may_yet_turn_out_longer() {
    let mut open = elsewhere(0);
    open.state = State::Open;
    let line = only_line(&[node("n1", vec![at_home()]), node("n2", vec![open])]);
    assert_eq!((line.censored, line.recommendation.sleep_seconds), (1, None));
}

#[test]
fn an_open_termination_is_not_over_but_its_refusals_count() {
    let mut open = at_home();
    open.state = State::Open;
    let line = only_line(&[node("n1", vec![open])]);
    assert_eq!((line.terminations, line.censored, line.refused), (0, 0, 7));
    assert_eq!(line.gap_seconds, None);
    assert_eq!(line.recommendation.because, "no complete termination seen yet");
}

#[test]
fn a_pod_without_a_backend_needs_its_arrival_tail() {
    let mut headless = at_home();
    headless.gap_seconds = None;
    let line = only_line(&[node("n1", vec![headless])]);
    assert_eq!((line.gap_seconds, line.slowest_node), (None, None));
    assert_eq!(line.recommendation.sleep_seconds, Some(4));
}

#[test]
fn extremes_are_taken_over_all_terminations() {
    let mut better = another_pod(at_home(), "uid-b");
    better.gap_seconds = Some(1.0);
    better.head_start_seconds = Some(5.0);
    better.arrival_tail_seconds = Some(0.0);
    let line = only_line(&[node("n1", vec![better, at_home()])]);
    close_to(line.gap_seconds, 3.0);
    close_to(line.head_start_seconds, 1.0);
    close_to(line.arrival_tail_seconds, 2.5);
    close_to(line.shortfall_seconds, 2.0);
}

#[test]
fn the_newest_pod_tells_the_present_sleep() {
    let mut newer = another_pod(at_home(), "uid-b");
    newer.pre_stop_sleep_seconds = Some(20.0);
    newer.instants.deletion_requested.as_mut().expect("requested").at =
        "2030-01-01T00:00:00.000000000Z".to_owned();
    let line = only_line(&[node("n1", vec![newer, at_home()])]);
    assert_eq!(line.recommendation.warnings, ["you wait 20 s, you need 4 s"]);
}

#[test]
fn a_silent_agent_is_named_and_its_pods_workloads_are_unknown() {
    let silent = NodeAnswer { url: "http://n1:9464".to_owned(), answer: Err("refused".to_owned()) };
    let report = merge(&[silent, node("n2", vec![elsewhere(2)])], 1.0);
    assert_eq!((report.workloads.len(), report.unattributed_terminations), (0, 1));
    assert_eq!(report.nodes[0].error.as_deref(), Some("refused"));
    assert_eq!(report.nodes[1].node.as_deref(), Some("n2"));
}

#[test]
fn refusals_beyond_what_can_be_counted_stay_at_the_limit() {
    let mut hostile = at_home();
    hostile.refused = u64::MAX;
    let more = another_pod(at_home(), "another");
    let line = only_line(&[node("n1", vec![hostile, more])]);
    assert_eq!(line.refused, u64::MAX);
}
