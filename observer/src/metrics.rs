//! What Prometheus reads: the figures of this node, in a registry of their own.
//!
//! Workload labels appear only for pods of this node and the gap histogram carries none, so the
//! number of series is bounded by what runs here. Cumulative values that others keep (the kernel's
//! maps, the watches) are set from their readings: a counter follows its reading up and is never
//! reset. Nothing is computed here.

use anyhow::Context as _;
use nix::errno::Errno;
use observer_common::SignalCounts;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::clock;
use crate::correlate::Timeline;
use crate::dataplane;
use crate::facts::Workload;

/// Labels of a workload; the kind is its own label because two kinds may share a name.
const WORKLOAD: [&str; 3] = ["namespace", "workload_kind", "workload"];

/// Bounds of the per-workload histograms, in s: the values people set as a sleep, and what a small
/// quiet cluster shows. Few, because they multiply with the workloads.
const WORKLOAD_BUCKETS: [f64; 10] = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0];

/// All metrics; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    probe_attached: IntGaugeVec,
    kernel_events: IntCounterVec,
    kernel_events_suppressed: IntCounterVec,
    kernel_events_lost: IntCounterVec,
    connect_failures: IntCounterVec,
    refused: IntCounterVec,
    terminations: IntCounterVec,
    gap: Histogram,
    endpoint_removal: Histogram,
    head_start: HistogramVec,
    arrival_tail: HistogramVec,
    shortfall: HistogramVec,
    clock_max_error: Gauge,
    rules: Rules,
    facts_queued: IntGaugeVec,
    watch_failures: IntCounterVec,
    unreadable_objects: IntCounter,
}

/// Of the reader of the node's rules.
#[derive(Clone, Debug)]
struct Rules {
    commits: IntCounter,
    resyncs: IntCounter,
    troubles: IntCounterVec,
    backends: IntGauge,
    unresolved: IntGauge,
    in_use: IntGaugeVec,
    unreadable: IntGaugeVec,
    serving: IntGaugeVec,
    switches: IntCounter,
}

impl Rules {
    fn new(made: &Made<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            commits: made.add(IntCounter::with_opts(opts(
                "dataplane_commits_total",
                "Changes of the node's rules that were seen.",
            ))?)?,
            resyncs: made.add(IntCounter::with_opts(opts(
                "dataplane_resyncs_total",
                "Times the node's rules were read as a whole because a change was missed.",
            ))?)?,
            troubles: made.counters(
                "dataplane_troubles_total",
                "What the reader of the node's rules passed over, lost or did again, by kind.",
                &["kind"],
            )?,
            unresolved: made.add(IntGauge::with_opts(opts(
                "dataplane_unresolved_rules",
                "Reachable rules whose destination cannot be told.",
            ))?)?,
            in_use: made.gauges(
                "dataplane_in_use",
                "Which dataplanes have backends on this node; rules of an earlier one may stay behind.",
                &["dataplane"],
            )?,
            unreadable: made.gauges(
                "dataplane_unreadable",
                "Dataplanes of which a table cannot be read, which censors every termination.",
                &["dataplane"],
            )?,
            serving: made.gauges(
                "dataplane_serving",
                "Which dataplane serves the node's Services: the one whose backends changed last.",
                &["dataplane"],
            )?,
            switches: made.add(IntCounter::with_opts(opts(
                "dataplane_switches_total",
                "Times another dataplane began to serve the node's Services.",
            ))?)?,
            backends: made.add(IntGauge::with_opts(opts(
                "dataplane_backends",
                "Backends that the node's rules send new connections to.",
            ))?)?,
        })
    }
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// When a name or label is not valid: a mistake in this file.
    pub fn new() -> anyhow::Result<Self> {
        let registry = Registry::new();
        let made = Made { registry: &registry };
        let build = made.gauges("build_info", "Version of this agent.", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let workload_and_censored = [WORKLOAD[0], WORKLOAD[1], WORKLOAD[2], "censored"];
        Ok(Self {
            probe_attached: made.gauges(
                "probe_attached",
                "Whether the probe of a signal is attached, and by which method.",
                &["signal", "method"],
            )?,
            kernel_events: made.counters(
                "kernel_events_total",
                "Kernel events of each signal, counted in the kernel.",
                &["signal"],
            )?,
            kernel_events_suppressed: made.counters(
                "kernel_events_suppressed_total",
                "Kernel events counted without details because their key's budget was spent.",
                &["signal"],
            )?,
            kernel_events_lost: made.counters(
                "kernel_events_lost_total",
                "Kernel events whose details or per-key counts were lost, by the stage that was full.",
                &["signal", "stage"],
            )?,
            connect_failures: made.counters(
                "connect_failures_total",
                "Connects from this node that failed, by error.",
                &["errno"],
            )?,
            refused: made.counters(
                "pod_refused_connections_total",
                "Connections refused at pods of this node.",
                &WORKLOAD,
            )?,
            terminations: made.counters(
                "terminations_total",
                "Terminations of this node's pods that are over, and whether they were censored.",
                &workload_and_censored,
            )?,
            gap: made.removal(
                "propagation_gap_seconds",
                "How long this node's rules kept a pod as backend after its deletion request.",
            )?,
            endpoint_removal: made.removal(
                "endpoint_removal_seconds",
                "How long this node's rules kept any pod as backend after its EndpointSlice changed.",
            )?,
            head_start: made.per_workload(
                "head_start_seconds",
                "How long pods kept accepting connections after their deletion request.",
            )?,
            arrival_tail: made.per_workload(
                "arrival_tail_seconds",
                "How long new connections kept arriving after the deletion request.",
            )?,
            shortfall: made.per_workload(
                "shortfall_seconds",
                "How much longer pods should have kept accepting, as far as this node knows.",
            )?,
            clock_max_error: made.add(Gauge::with_opts(opts(
                "clock_max_error_seconds",
                "The kernel's own bound on the error of the wall clock (adjtimex).",
            ))?)?,
            rules: Rules::new(&made)?,
            facts_queued: made.gauges(
                "facts_queued",
                "Facts that wait for the correlator, by source.",
                &["source"],
            )?,
            watch_failures: made.counters(
                "watch_failures_total",
                "Times a watch of the API server failed and was restarted.",
                &["watch"],
            )?,
            unreadable_objects: made.add(IntCounter::with_opts(opts(
                "unreadable_objects_total",
                "Pods and EndpointSlices that were passed over because they are not as expected.",
            ))?)?,
            registry,
        })
    }

    /// A signal's probe is attached by `method`, or by none.
    pub fn set_probe(&self, signal: &str, method: Option<&str>) {
        let gauge = self.probe_attached.with_label_values(&[signal, method.unwrap_or("none")]);
        gauge.set(method.is_some().into());
    }

    /// What the kernel has counted of a signal, over all CPUs.
    pub fn set_signal(&self, signal: &str, counts: SignalCounts) {
        follow(&self.kernel_events.with_label_values(&[signal]), counts.seen);
        follow(&self.kernel_events_suppressed.with_label_values(&[signal]), counts.suppressed);
        let lost = |stage| self.kernel_events_lost.with_label_values(&[signal, stage]);
        follow(&lost("ring_full"), counts.ring_full);
        follow(&lost("map_full"), counts.map_full);
    }

    /// Records of the ring buffer that are not this version's.
    pub fn set_undecodable(&self, count: u64) {
        let lost = self.kernel_events_lost.with_label_values(&["unknown", "undecodable"]);
        follow(&lost, count);
    }

    /// How many connects have failed with `errno`; 0 is an error the kernel did not keep.
    pub fn set_connect_failures(&self, errno: u32, count: u64) {
        let name = match Errno::from_raw(i32::try_from(errno).unwrap_or_default()) {
            _ if errno == 0 => "unknown".to_owned(),
            Errno::UnknownErrno => errno.to_string(),
            known => format!("{known:?}"),
        };
        follow(&self.connect_failures.with_label_values(&[name]), count);
    }

    /// How many connections the pods of a workload on this node have refused.
    pub fn set_refused(&self, namespace: &str, workload: &Workload, count: u64) {
        follow(&self.refused.with_label_values(&workload_labels(namespace, workload)), count);
    }

    /// A termination is over.
    pub fn record_closed(&self, timeline: &Timeline) {
        let sample = timeline.censored.is_empty();
        if let Some(gap) = timeline.gap_seconds().filter(|_| sample) {
            self.gap.observe(gap);
        }
        if let Some(removal) = timeline.endpoint_removal_seconds().filter(|_| sample) {
            self.endpoint_removal.observe(removal);
        }
        let Some(workload) = timeline.workload.as_ref().filter(|_| timeline.home) else { return };
        let labels = workload_labels(&timeline.namespace, workload);
        let censored = if sample { "false" } else { "true" };
        let [namespace, kind, name] = labels;
        self.terminations.with_label_values(&[namespace, kind, name, censored]).inc();
        let figures = [
            (&self.head_start, timeline.head_start_seconds()),
            (&self.arrival_tail, timeline.arrival_tail_seconds()),
            (&self.shortfall, timeline.shortfall_seconds()),
        ];
        for (histogram, figure) in figures {
            if let Some(seconds) = figure.filter(|_| sample) {
                histogram.with_label_values(&labels).observe(seconds);
            }
        }
    }

    /// What the reader of the node's rules has counted.
    pub fn set_dataplane(&self, counters: &dataplane::Counters) {
        follow(&self.rules.commits, counters.commits.get());
        follow(&self.rules.resyncs, counters.resyncs.get());
        for (kind, counter) in [
            ("malformed", &counters.malformed),
            ("unknown_expression", &counters.unknown_expressions),
            ("overrun", &counters.overruns),
            ("gap", &counters.gaps),
            ("interrupted_read", &counters.interrupted_reads),
            ("table_failure", &counters.table_failures),
        ] {
            follow(&self.rules.troubles.with_label_values(&[kind]), counter.get());
        }
    }

    /// What the node's rules contain.
    pub fn set_dataplane_status(&self, status: &dataplane::Status) {
        self.rules.backends.set(as_gauge(status.backends));
        self.rules.unresolved.set(as_gauge(status.unresolved));
        self.rules.in_use.reset();
        for dataplane in &status.in_use {
            self.rules.in_use.with_label_values(&[dataplane.name()]).set(1);
        }
        self.rules.unreadable.reset();
        for unreadable in &status.unreadable {
            let dataplane = unreadable.table.dataplane().name();
            self.rules.unreadable.with_label_values(&[dataplane]).set(1);
        }
        self.rules.serving.reset();
        if let Some(serving) = status.serving {
            self.rules.serving.with_label_values(&[serving.name()]).set(1);
        }
    }

    /// Another dataplane serves the Services than before.
    pub fn count_dataplane_switch(&self) {
        self.rules.switches.inc();
    }

    /// How many facts of `source` wait.
    pub fn set_queued(&self, source: &str, facts: usize) {
        self.facts_queued.with_label_values(&[source]).set(as_gauge(facts));
    }

    /// How often a watch has failed.
    pub fn set_watch_failures(&self, watch: &str, failures: u64) {
        follow(&self.watch_failures.with_label_values(&[watch]), failures);
    }

    /// How many objects of the API server were passed over.
    pub fn set_unreadable_objects(&self, count: u64) {
        follow(&self.unreadable_objects, count);
    }

    /// Everything, in Prometheus' text format.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub fn render(&self) -> anyhow::Result<String> {
        self.clock_max_error.set(clock::max_error_seconds().unwrap_or(f64::NAN));
        let text = TextEncoder::new().encode_to_string(&self.registry.gather());
        text.context("metrics cannot be written as text")
    }
}

/// A counter follows a cumulative reading; a reading that fell behind changes nothing.
fn follow(counter: &IntCounter, reading: u64) {
    counter.inc_by(reading.saturating_sub(counter.get()));
}

fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn workload_labels<'a>(namespace: &'a str, workload: &'a Workload) -> [&'a str; 3] {
    [namespace, &workload.kind, &workload.name]
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("observer")
}

/// Makes metrics and registers them.
struct Made<'a> {
    registry: &'a Registry,
}

impl Made<'_> {
    fn add<M: prometheus::core::Collector + Clone + 'static>(
        &self,
        metric: M,
    ) -> prometheus::Result<M> {
        self.registry.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(opts(name, help), labels)?)
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(opts(name, help), labels)?)
    }

    fn per_workload(&self, name: &str, help: &str) -> prometheus::Result<HistogramVec> {
        let opts = HistogramOpts::from(opts(name, help)).buckets(WORKLOAD_BUCKETS.to_vec());
        self.add(HistogramVec::new(opts, &WORKLOAD)?)
    }

    /// The bounds of `kubeproxy_network_programming_duration_seconds`, so that the two compare.
    fn removal(&self, name: &str, help: &str) -> prometheus::Result<Histogram> {
        let steps = |from: u32, to: u32, by: usize| (from..=to).step_by(by).map(f64::from);
        let buckets = [0.25, 0.5]
            .into_iter()
            .chain(steps(1, 59, 1))
            .chain(steps(60, 115, 5))
            .chain(steps(120, 300, 30))
            .collect();
        let opts = HistogramOpts::from(opts(name, help)).buckets(buckets);
        self.add(Histogram::with_opts(opts)?)
    }
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
