use std::collections::BTreeSet;

use crate::sample;

use super::*;

fn metrics() -> Metrics {
    Metrics::new().expect("valid names")
}

/// The value of the series with exactly this name and label set.
fn value(metrics: &Metrics, series: &str) -> Option<String> {
    let text = metrics.render().expect("text");
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned))
}

fn assert_value(metrics: &Metrics, series: &str, expected: &str) {
    assert_eq!(value(metrics, series).as_deref(), Some(expected), "{series}");
}

const WEB: &str = r#"namespace="default",workload="web",workload_kind="Deployment""#;

#[test]
fn the_version_is_exported() {
    let series = format!("observer_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_value(&metrics(), &series, "1");
}

#[test]
fn a_closed_termination_is_counted_under_its_workload() {
    let metrics = metrics();
    metrics.record_closed(&sample::timeline());
    let series = format!("observer_terminations_total{{censored=\"false\",{WEB}}}");
    assert_value(&metrics, &series, "1");
    assert_value(&metrics, "observer_propagation_gap_seconds_sum", "3");
    assert_value(&metrics, &format!("observer_head_start_seconds_sum{{{WEB}}}"), "1");
    assert_value(&metrics, &format!("observer_arrival_tail_seconds_sum{{{WEB}}}"), "2.5");
    assert_value(&metrics, &format!("observer_shortfall_seconds_sum{{{WEB}}}"), "2");
}

#[test]
fn a_censored_termination_is_counted_but_measures_nothing() {
    let metrics = metrics();
    let mut timeline = sample::timeline();
    timeline.censored = vec!["forced".to_owned()];
    metrics.record_closed(&timeline);
    let series = format!("observer_terminations_total{{censored=\"true\",{WEB}}}");
    assert_value(&metrics, &series, "1");
    assert_value(&metrics, "observer_propagation_gap_seconds_count", "0");
    assert_eq!(value(&metrics, &format!("observer_shortfall_seconds_count{{{WEB}}}")), None);
}

#[test]
fn a_pod_of_another_node_adds_to_the_gap_only() {
    let metrics = metrics();
    let timeline = Timeline { home: false, workload: None, ..sample::timeline() };
    metrics.record_closed(&timeline);
    assert_value(&metrics, "observer_propagation_gap_seconds_count", "1");
    let text = metrics.render().expect("text");
    assert!(!text.contains("observer_terminations_total"), "{text}");
}

#[test]
fn gap_bounds_are_those_of_kube_proxy() {
    let metrics = metrics();
    let text = metrics.render().expect("text");
    let bounds: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("observer_propagation_gap_seconds_bucket{le=\""))
        .filter_map(|rest| rest.split('"').next())
        .collect();
    assert_eq!(bounds.len(), 2 + 59 + 12 + 7 + 1);
    assert_eq!(bounds[..4], ["0.25", "0.5", "1", "2"]);
    assert_eq!(bounds[60..63], ["59", "60", "65"]);
    assert_eq!(bounds[72..], ["115", "120", "150", "180", "210", "240", "270", "300", "+Inf"]);
}

#[test]
fn kernel_counts_follow_their_readings_and_never_fall() {
    let metrics = metrics();
    let counts = SignalCounts { seen: 9, suppressed: 4, ring_full: 2, map_full: 1 };
    metrics.set_signal("refused", counts);
    metrics.set_signal("refused", SignalCounts { seen: 12, ..counts });
    metrics.set_signal("refused", SignalCounts { seen: 3, ..counts });
    assert_value(&metrics, r#"observer_kernel_events_total{signal="refused"}"#, "12");
    assert_value(&metrics, r#"observer_kernel_events_suppressed_total{signal="refused"}"#, "4");
    let lost = |stage| {
        format!("observer_kernel_events_lost_total{{signal=\"refused\",stage=\"{stage}\"}}")
    };
    assert_value(&metrics, &lost("ring_full"), "2");
    assert_value(&metrics, &lost("map_full"), "1");
}

#[test]
fn errors_have_names() {
    let metrics = metrics();
    for (errno, count) in [(111, 5), (110, 6), (0, 7), (4000, 8)] {
        metrics.set_connect_failures(errno, count);
    }
    let series = |name| format!("observer_connect_failures_total{{errno=\"{name}\"}}");
    assert_value(&metrics, &series("ECONNREFUSED"), "5");
    assert_value(&metrics, &series("ETIMEDOUT"), "6");
    assert_value(&metrics, &series("unknown"), "7");
    assert_value(&metrics, &series("4000"), "8");
}

#[test]
fn refusals_are_exported_under_their_workload() {
    let metrics = metrics();
    let web = Workload { kind: "Deployment".into(), name: "web".into() };
    metrics.set_refused("default", &web, 5);
    metrics.set_refused("default", &web, 7);
    assert_value(&metrics, &format!("observer_pod_refused_connections_total{{{WEB}}}"), "7");
}

#[test]
fn a_missing_probe_is_exported_as_missing() {
    let metrics = metrics();
    metrics.set_probe("refused", Some("tp_btf"));
    metrics.set_probe("oom_killed", None);
    let series = |signal, method| {
        format!("observer_probe_attached{{method=\"{method}\",signal=\"{signal}\"}}")
    };
    assert_value(&metrics, &series("refused", "tp_btf"), "1");
    assert_value(&metrics, &series("oom_killed", "none"), "0");
}

#[test]
fn the_readme_lists_every_metric_and_no_other() {
    let metrics = metrics();
    metrics.record_closed(&sample::timeline());
    metrics.set_signal("refused", SignalCounts::default());
    metrics.set_probe("refused", None);
    metrics.set_connect_failures(0, 1);
    let web = Workload { kind: "Deployment".into(), name: "web".into() };
    metrics.set_refused("default", &web, 1);
    set_the_rest(&metrics);
    let text = metrics.render().expect("text");
    let exported: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_whitespace().next())
        .collect();
    let readme = include_str!("../../README.md");
    let listed: BTreeSet<&str> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"))
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("observer_"))
        .collect();
    assert_eq!(exported, listed);
}

fn set_the_rest(metrics: &Metrics) {
    metrics.set_dataplane(&dataplane::Counters::default());
    let in_use = [dataplane::Dataplane::Nftables].into();
    metrics.set_dataplane_status(&dataplane::Status {
        serving: Some(dataplane::Dataplane::Nftables),
        in_use,
        backends: 300,
        unresolved: 1,
        unreadable: vec![dataplane::Unreadable {
            table: dataplane::SilentTable::Ipvs,
            since: jiff::Timestamp::UNIX_EPOCH,
            why: "not permitted".to_owned(),
        }],
    });
    metrics.set_queued("kernel", 4);
    metrics.set_watch_failures("pods", 2);
}

#[test]
fn the_rest_is_set_from_readings() {
    let metrics = metrics();
    set_the_rest(&metrics);
    assert_value(&metrics, "observer_dataplane_commits_total", "0");
    assert_value(&metrics, r#"observer_dataplane_troubles_total{kind="overrun"}"#, "0");
    assert_value(&metrics, r#"observer_dataplane_in_use{dataplane="nftables"}"#, "1");
    assert_value(&metrics, "observer_dataplane_unresolved_rules", "1");
    assert_value(&metrics, r#"observer_dataplane_unreadable{dataplane="ipvs"}"#, "1");
    metrics.set_dataplane_status(&dataplane::Status::default());
    assert_eq!(value(&metrics, r#"observer_dataplane_unreadable{dataplane="ipvs"}"#), None);
    set_the_rest(&metrics);
    assert_value(&metrics, "observer_dataplane_backends", "300");
    assert_value(&metrics, r#"observer_facts_queued{source="kernel"}"#, "4");
    assert_value(&metrics, r#"observer_watch_failures_total{watch="pods"}"#, "2");
    assert!(value(&metrics, "observer_clock_max_error_seconds").is_some());
}
