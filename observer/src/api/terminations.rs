//! `GET /v1/terminations`: the JSON shape of timelines, as docs/api.md describes it.
//!
//! Pure. Boot-clock moments become wall time here and nowhere before; the boot-clock value stays
//! beside it, because differences must not be taken between wall times. The report reads the same
//! types, so what it does not know (a field of a newer agent) it skips.

use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

use crate::clock::WallOffset;
use crate::correlate::{self, Timeline};
use crate::facts::BootNs;

/// Version of this shape: fields may be added to it, never changed or removed.
pub const API_VERSION: &str = "observer/v1";

/// The whole answer of one node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Terminations {
    /// [`API_VERSION`]
    pub api_version: String,
    /// The node's name.
    pub node: String,
    /// How good the node's wall clock is.
    pub clock: ClockState,
    /// Every termination the node still remembers, oldest deletion first.
    pub terminations: Vec<Termination>,
}

/// What the kernel says of its wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClockState {
    /// `adjtimex(2)` `maxerror`, in seconds; null when the kernel does not say.
    #[serde(serialize_with = "to_microseconds")]
    pub max_error_seconds: Option<f64>,
}

/// A pod's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
    /// `metadata.uid`
    pub uid: String,
}

/// A pod's controller.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Workload {
    /// `Deployment`, `StatefulSet` …
    pub kind: String,
    /// Its name, in the pod's namespace.
    pub name: String,
}

/// Whether more may still be learned about a termination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It goes on.
    Open,
    /// It is complete.
    Closed,
}

/// One termination as this node saw it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Termination {
    /// The pod.
    pub pod: Pod,
    /// Its controller; null for a pod of another node.
    pub workload: Option<Workload>,
    /// Whether the pod ran on this node.
    pub home: bool,
    /// Whether it is complete.
    pub state: State,
    /// `spec.terminationGracePeriodSeconds`; null for a pod of another node.
    #[serde(serialize_with = "to_microseconds")]
    pub grace_period_seconds: Option<f64>,
    /// `lifecycle.preStop.sleep`; null without one.
    #[serde(serialize_with = "to_microseconds")]
    pub pre_stop_sleep_seconds: Option<f64>,
    /// What happened when.
    pub instants: Instants,
    /// The latest new connection by where it came from.
    pub last_arrivals: LastArrivals,
    /// The pod's backends on this node.
    pub removals: Vec<Removal>,
    /// Backend removed minus deletion request.
    #[serde(serialize_with = "to_microseconds")]
    pub gap_seconds: Option<f64>,
    /// Listener closed minus deletion request.
    #[serde(serialize_with = "to_microseconds")]
    pub head_start_seconds: Option<f64>,
    /// Last new connection minus deletion request.
    #[serde(serialize_with = "to_microseconds")]
    pub arrival_tail_seconds: Option<f64>,
    /// The larger of gap and arrival tail, as far as this node knows.
    #[serde(serialize_with = "to_microseconds")]
    pub needed_seconds: Option<f64>,
    /// Needed minus head start, not below 0.
    #[serde(serialize_with = "to_microseconds")]
    pub shortfall_seconds: Option<f64>,
    /// SIGTERM to the last process exit.
    #[serde(serialize_with = "to_microseconds")]
    pub drain_seconds: Option<f64>,
    /// Connections refused at the pod after the deletion request.
    pub refused: u64,
    /// Why this is no sample; empty when it is one.
    pub censored: Vec<String>,
}

/// The instants of DESIGN's timeline; null when nobody reported one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Instants {
    /// The deletion request.
    pub deletion_requested: Option<Instant>,
    /// The earliest sight of an endpoint terminating, not ready or gone.
    pub endpoint_terminating: Option<Instant>,
    /// The last of its backends removed.
    pub backend_removed: Option<Instant>,
    /// SIGTERM to a process of the pod.
    pub sigterm: Option<Instant>,
    /// The last of its listeners closed.
    pub listener_closed: Option<Instant>,
    /// The last new connection attempt that arrived.
    pub last_new_connection: Option<Instant>,
    /// The first refused connection.
    pub first_refused: Option<Instant>,
    /// The last refused connection.
    pub last_refused: Option<Instant>,
    /// SIGKILL to a process of the pod.
    pub sigkill: Option<Instant>,
    /// The last of its processes ended.
    pub process_exited: Option<Instant>,
    /// The pod object is gone.
    pub pod_removed: Option<Instant>,
}

/// New connections after the deletion request; null when none came from there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LastArrivals {
    /// From the pod's own node.
    pub same_node: Option<Instant>,
    /// From elsewhere in the cluster.
    pub cluster: Option<Instant>,
    /// From outside the cluster.
    pub external: Option<Instant>,
    /// From an address that no configured range contains.
    pub unclassified: Option<Instant>,
}

/// One instant. It happened within `uncertaintySeconds` before `at`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instant {
    /// Wall time, RFC 3339 with nanoseconds, in UTC.
    pub at: String,
    /// The same on the node's `CLOCK_BOOTTIME`, in ns.
    pub boot_ns: u64,
    /// How much earlier it may have happened; null when nothing bounds it.
    #[serde(serialize_with = "to_microseconds")]
    pub uncertainty_seconds: Option<f64>,
    /// Who reported it.
    pub source: Source,
}

/// Who reported an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// The pod watch.
    PodWatch,
    /// The EndpointSlice watch.
    EndpointSliceWatch,
    /// The node's rules.
    Dataplane,
    /// A kernel program.
    Kernel,
}

/// The backend of one Service port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Removal {
    /// `namespace/name:port`; `address:port` of a front end where the dataplane knows no names
    /// (IPVS, Cilium); null when it does not say.
    pub service: Option<String>,
    /// The first view of the endpoint as terminating, not ready or gone.
    pub endpoint_terminating: Option<Instant>,
    /// When new connections ceased to be sent to it.
    pub backend_removed: Option<Instant>,
    /// Whether it is kept for the connections it has.
    #[serde(default)]
    pub draining: bool,
    /// When a backend that was kept for the connections it had (IPVS: weight 0 since
    /// `backendRemoved`) was deleted; null while it is kept, or when it never was.
    #[serde(default)]
    pub drained: Option<Instant>,
}

/// Seconds as a person reads them: the clocks are no better than microseconds, and a difference of
/// two `f64` has digits of its own.
///
/// # Errors
/// Those of the serializer.
#[expect(clippy::ref_option, reason = "the signature that serde asks for")]
pub(crate) fn to_microseconds<S: Serializer>(
    seconds: &Option<f64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    seconds.map(|seconds| (seconds * 1e6).round() / 1e6 + 0.0).serialize(serializer)
}

impl Termination {
    /// What the correlator knows of one termination, for readers outside this machine.
    #[must_use]
    pub fn new(timeline: &Timeline, closed: bool, offset: WallOffset) -> Self {
        let seconds = |duration: Duration| duration.as_secs_f64();
        let workload = |of: &crate::facts::Workload| Workload {
            kind: of.kind.to_string(),
            name: of.name.to_string(),
        };
        Self {
            pod: Pod {
                namespace: timeline.namespace.to_string(),
                name: timeline.name.to_string(),
                uid: timeline.uid.to_string(),
            },
            workload: timeline.workload.as_ref().map(workload),
            home: timeline.home,
            state: if closed { State::Closed } else { State::Open },
            grace_period_seconds: timeline.grace_period.map(seconds),
            pre_stop_sleep_seconds: timeline.pre_stop_sleep.map(seconds),
            instants: instants(timeline, offset),
            last_arrivals: last_arrivals(timeline, offset),
            removals: timeline.removals.iter().map(|removal| to_removal(removal, offset)).collect(),
            gap_seconds: timeline.gap_seconds(),
            head_start_seconds: timeline.head_start_seconds(),
            arrival_tail_seconds: timeline.arrival_tail_seconds(),
            needed_seconds: timeline.needed_seconds(),
            shortfall_seconds: timeline.shortfall_seconds(),
            drain_seconds: timeline.drain_seconds(),
            refused: timeline.refused,
            censored: timeline.censored.clone(),
        }
    }
}

fn instants(timeline: &Timeline, offset: WallOffset) -> Instants {
    let show = |instant: Option<correlate::Instant>| instant.map(|at| to_instant(at, offset));
    Instants {
        deletion_requested: show(timeline.deletion_requested),
        endpoint_terminating: show(timeline.endpoint_terminating),
        backend_removed: show(timeline.backend_removed),
        sigterm: show(timeline.sigterm),
        listener_closed: show(timeline.listener_closed),
        last_new_connection: timeline.last_arrival().map(|at| arrival(at, offset)),
        first_refused: show(timeline.first_refused),
        last_refused: show(timeline.last_refused),
        sigkill: show(timeline.sigkill),
        process_exited: show(timeline.process_exited),
        pod_removed: show(timeline.pod_removed),
    }
}

fn last_arrivals(timeline: &Timeline, offset: WallOffset) -> LastArrivals {
    let show = |at: Option<BootNs>| at.map(|at| arrival(at, offset));
    let arrivals = timeline.arrivals.unwrap_or_default();
    LastArrivals {
        same_node: show(arrivals.same_node),
        cluster: show(arrivals.cluster),
        external: show(arrivals.external),
        unclassified: show(arrivals.unclassified),
    }
}

fn to_removal(removal: &correlate::Removal, offset: WallOffset) -> Removal {
    Removal {
        service: removal.service.as_ref().map(ToString::to_string),
        endpoint_terminating: removal.endpoint_terminating.map(|at| to_instant(at, offset)),
        backend_removed: removal.backend_removed.map(|at| to_instant(at, offset)),
        draining: removal.draining,
        drained: removal.drained.map(|at| to_instant(at, offset)),
    }
}

/// The kernel stamps each arrival itself, so there is no uncertainty.
fn arrival(at: BootNs, offset: WallOffset) -> Instant {
    let kernel = correlate::Source::Kernel;
    to_instant(correlate::Instant { at, uncertainty: Some(Duration::ZERO), source: kernel }, offset)
}

fn to_instant(instant: correlate::Instant, offset: WallOffset) -> Instant {
    Instant {
        at: format!("{:.9}", offset.to_timestamp(instant.at)),
        boot_ns: instant.at.0,
        uncertainty_seconds: instant.uncertainty.map(|duration| duration.as_secs_f64()),
        source: match instant.source {
            correlate::Source::PodWatch => Source::PodWatch,
            correlate::Source::SliceWatch => Source::EndpointSliceWatch,
            correlate::Source::Dataplane => Source::Dataplane,
            correlate::Source::Kernel => Source::Kernel,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    #[test]
    fn wall_times_have_nanoseconds_and_stand_beside_boot_times() {
        let offset = WallOffset::fixed(1_795_225_474_000_000_000, BootNs(0));
        let instant = correlate::Instant {
            at: BootNs(582_865_001),
            uncertainty: Some(Duration::from_millis(250)),
            source: correlate::Source::SliceWatch,
        };
        let json = serde_json::to_value(to_instant(instant, offset)).expect("JSON");
        let expected = serde_json::json!({
            "at": "2026-11-21T01:44:34.582865001Z",
            "bootNs": 582_865_001_u64,
            "uncertaintySeconds": 0.25,
            "source": "endpointSliceWatch"
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn a_whole_wall_second_still_has_nine_digits() {
        let instant = correlate::Instant {
            at: BootNs(0),
            uncertainty: None,
            source: correlate::Source::Kernel,
        };
        let shown = to_instant(instant, WallOffset::fixed(0, BootNs(0))).at;
        assert_eq!(shown, "1970-01-01T00:00:00.000000000Z");
    }

    #[test]
    fn a_timeline_keeps_its_figures_and_its_unknowns() {
        let offset = WallOffset::fixed(0, BootNs(0));
        let timeline = sample::timeline();
        let shown = Termination::new(&timeline, true, offset);
        let json = serde_json::to_value(&shown).expect("JSON");
        assert_eq!(json["pod"]["uid"], "uid-a");
        assert_eq!(json["workload"]["kind"], "Deployment");
        assert_eq!((&json["state"], &json["home"]), (&"closed".into(), &true.into()));
        assert_eq!(json["gapSeconds"], 3.0);
        assert_eq!(json["headStartSeconds"], 1.0);
        assert_eq!(json["arrivalTailSeconds"], 2.5);
        assert_eq!(json["neededSeconds"], 3.0);
        assert_eq!(json["shortfallSeconds"], 2.0);
        assert_eq!(json["instants"]["lastNewConnection"]["source"], "kernel");
        assert_eq!(json["instants"]["sigkill"], serde_json::Value::Null);
        assert_eq!(json["lastArrivals"]["external"], serde_json::Value::Null);
        let back: Termination = serde_json::from_value(json).expect("the same shape");
        assert_eq!(back, shown);
    }

    #[test]
    fn seconds_are_shown_to_the_microsecond() {
        let offset = WallOffset::fixed(0, BootNs(0));
        let mut termination = Termination::new(&sample::timeline(), true, offset);
        termination.gap_seconds = Some(1.531_986_987_999_999_9);
        termination.arrival_tail_seconds = Some(0.1 + 0.2);
        termination.drain_seconds = Some(-0.000_000_4);
        let json = serde_json::to_string(&termination).expect("JSON");
        assert!(json.contains(r#""gapSeconds":1.531987,"#), "{json}");
        assert!(json.contains(r#""arrivalTailSeconds":0.3,"#), "{json}");
        assert!(json.contains(r#""headStartSeconds":1.0,"#), "{json}");
        assert!(json.contains(r#""drainSeconds":0.0,"#), "{json}");
    }
}
