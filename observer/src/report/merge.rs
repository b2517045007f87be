//! The answers of all nodes to one line per workload.
//!
//! Pure. A termination is one pod, seen by its own node (head start, arrival tail, refused, drain)
//! and by every node whose rules had it as a backend (gap). Only a termination that is over, and
//! that no node's view censors, is a sample; the others are counted as censored.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::terminations::{
    API_VERSION, Instant, State, Termination, Terminations, Workload, to_microseconds,
};
use crate::recommend::{Evidence, Recommendation, recommend};

/// What one agent answered.
#[derive(Clone, Debug)]
pub struct NodeAnswer {
    /// Where it was asked.
    pub url: String,
    /// Its answer, or in words why there is none.
    pub answer: Result<Terminations, String>,
}

/// The whole report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`API_VERSION`]
    pub api_version: String,
    /// Every agent that was asked.
    pub nodes: Vec<NodeLine>,
    /// Every workload that had a termination, by namespace, kind and name.
    pub workloads: Vec<WorkloadLine>,
    /// Terminations that only other nodes than the pod's own have seen: their workload is unknown.
    pub unattributed_terminations: usize,
}

/// One agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeLine {
    /// Where it was asked.
    pub url: String,
    /// Its node; null without an answer.
    pub node: Option<String>,
    /// Why there is no answer.
    pub error: Option<String>,
}

/// One workload. Figures are over its samples, except `refused` (over all its terminations).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadLine {
    /// Its namespace.
    pub namespace: String,
    /// `Deployment`, `StatefulSet` …
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Terminations that are over.
    pub terminations: usize,
    /// How many of them are no samples.
    pub censored: usize,
    /// The largest gap over all nodes.
    #[serde(serialize_with = "to_microseconds")]
    pub gap_seconds: Option<f64>,
    /// The node it was seen on.
    pub slowest_node: Option<String>,
    /// The smallest head start.
    #[serde(serialize_with = "to_microseconds")]
    pub head_start_seconds: Option<f64>,
    /// The largest arrival tail.
    #[serde(serialize_with = "to_microseconds")]
    pub arrival_tail_seconds: Option<f64>,
    /// The largest shortfall.
    #[serde(serialize_with = "to_microseconds")]
    pub shortfall_seconds: Option<f64>,
    /// Connections refused, in all.
    pub refused: u64,
    /// What to set.
    pub recommendation: Recommendation,
}

/// One pod's termination with the node of each view.
struct Views<'a> {
    home: Option<(&'a str, &'a Termination)>,
    others: Vec<(&'a str, &'a Termination)>,
}

/// One complete termination.
struct Sample<'a> {
    gap: Option<(f64, &'a str)>,
    needed_seconds: f64,
    home: &'a Termination,
}

/// Merges what the agents answered.
#[must_use]
pub fn merge(answers: &[NodeAnswer], margin_seconds: f64) -> Report {
    let by_pod = by_pod(answers);
    let mut by_workload: BTreeMap<(&str, &Workload), Vec<&Views<'_>>> = BTreeMap::new();
    let mut unattributed_terminations = 0;
    for views in by_pod.values() {
        let home = views.home.map(|(_, home)| home);
        match home.and_then(|home| Some((home.pod.namespace.as_str(), home.workload.as_ref()?))) {
            Some(workload) => by_workload.entry(workload).or_default().push(views),
            None => unattributed_terminations += 1,
        }
    }
    Report {
        api_version: API_VERSION.to_owned(),
        nodes: answers.iter().map(node_line).collect(),
        workloads: by_workload
            .into_iter()
            .map(|((namespace, workload), views)| {
                workload_line(namespace, workload, &views, margin_seconds)
            })
            .collect(),
        unattributed_terminations,
    }
}

/// Views by pod uid. An agent that was asked under two addresses counts once.
fn by_pod(answers: &[NodeAnswer]) -> BTreeMap<&str, Views<'_>> {
    let nodes: BTreeMap<&str, &Terminations> = answers
        .iter()
        .filter_map(|answer| answer.answer.as_ref().ok())
        .map(|answer| (answer.node.as_str(), answer))
        .collect();
    let mut by_pod = BTreeMap::new();
    for (node, answer) in nodes {
        for termination in &answer.terminations {
            let views = by_pod
                .entry(termination.pod.uid.as_str())
                .or_insert_with(|| Views { home: None, others: Vec::new() });
            if termination.home {
                views.home = Some((node, termination));
            } else {
                views.others.push((node, termination));
            }
        }
    }
    by_pod
}

fn node_line(answer: &NodeAnswer) -> NodeLine {
    NodeLine {
        url: answer.url.clone(),
        node: answer.answer.as_ref().ok().map(|answer| answer.node.clone()),
        error: answer.answer.as_ref().err().cloned(),
    }
}

fn workload_line(
    namespace: &str,
    workload: &Workload,
    views: &[&Views<'_>],
    margin_seconds: f64,
) -> WorkloadLine {
    let homes: Vec<&Termination> = views.iter().filter_map(|views| Some(views.home?.1)).collect();
    let terminations = homes.iter().filter(|home| home.state == State::Closed).count();
    let samples: Vec<Sample<'_>> = views.iter().filter_map(|views| sample(views)).collect();
    let censored = terminations - samples.len();
    let gap =
        samples.iter().filter_map(|sample| sample.gap).reduce(|a, b| if b.0 > a.0 { b } else { a });
    let over_samples = |figure: fn(&Sample<'_>) -> Option<f64>, choose: fn(f64, f64) -> f64| {
        samples.iter().filter_map(figure).reduce(choose)
    };
    let newest = homes.iter().max_by_key(|home| requested(home).map(|instant| &instant.at));
    let evidence = Evidence {
        needed_seconds: samples.iter().map(|sample| sample.needed_seconds).collect(),
        censored,
        drain_seconds: over_samples(|sample| sample.home.drain_seconds, f64::max),
        pre_stop_sleep_seconds: newest.and_then(|home| home.pre_stop_sleep_seconds),
        grace_period_seconds: newest.and_then(|home| home.grace_period_seconds),
    };
    WorkloadLine {
        namespace: namespace.to_owned(),
        kind: workload.kind.clone(),
        name: workload.name.clone(),
        terminations,
        censored,
        gap_seconds: gap.map(|(seconds, _)| seconds),
        slowest_node: gap.map(|(_, node)| node.to_owned()),
        head_start_seconds: over_samples(|sample| sample.home.head_start_seconds, f64::min),
        arrival_tail_seconds: over_samples(|sample| sample.home.arrival_tail_seconds, f64::max),
        shortfall_seconds: over_samples(shortfall_seconds, f64::max),
        refused: homes.iter().map(|home| home.refused).fold(0, u64::saturating_add),
        recommendation: recommend(&evidence, margin_seconds),
    }
}

fn shortfall_seconds(sample: &Sample<'_>) -> Option<f64> {
    Some((sample.needed_seconds - sample.home.head_start_seconds?).max(0.0))
}

/// `None` unless the termination is over and complete in the view of every node that has one.
fn sample<'a>(views: &Views<'a>) -> Option<Sample<'a>> {
    let (home_node, home) = views.home?;
    let complete = |view: &Termination| view.state == State::Closed && view.censored.is_empty();
    if !complete(home) || !views.others.iter().all(|(_, view)| complete(view)) {
        return None;
    }
    let mut gap = home.gap_seconds.map(|seconds| (seconds, home_node));
    for (node, view) in &views.others {
        if view.instants.backend_removed.is_none() {
            continue;
        }
        let seconds = gap_elsewhere(home, view)?;
        if gap.is_none_or(|(largest, _)| seconds > largest) {
            gap = Some((seconds, node));
        }
    }
    let gap_seconds = gap.map(|(seconds, _)| seconds);
    let needed_seconds = match (gap_seconds, home.arrival_tail_seconds) {
        (Some(gap), Some(tail)) => gap.max(tail),
        (gap, tail) => gap.or(tail)?,
    };
    Some(Sample { gap, needed_seconds, home })
}

/// The gap of a node other than the pod's, which saw the deletion only as the EndpointSlice's
/// change: from there to the removal of the backend, plus from the deletion request to the slice as
/// the pod's own node saw them. Each part is measured on one clock. `None` when a part is unknown.
fn gap_elsewhere(home: &Termination, view: &Termination) -> Option<f64> {
    let slice_at_home = seconds(home.instants.endpoint_terminating.as_ref()?);
    let slice = seconds(view.instants.endpoint_terminating.as_ref()?);
    let removed = seconds(view.instants.backend_removed.as_ref()?);
    Some((slice_at_home - seconds(requested(home)?)) + (removed - slice))
}

fn seconds(instant: &Instant) -> f64 {
    Duration::from_nanos(instant.boot_ns).as_secs_f64()
}

fn requested(termination: &Termination) -> Option<&Instant> {
    termination.instants.deletion_requested.as_ref()
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
