//! One termination with round figures, for the tests of what is computed from timelines.

use std::time::Duration;

use crate::correlate::{Instant, Removal, Source, TailEnds, Timeline};
use crate::facts::{BootNs, Deletion, PodUid, ServiceName, ServicePort, Workload};

/// The deletion request of [`timeline`], in s of the boot clock.
const REQUESTED: u64 = 100;

/// A pod `default/web-a` of Deployment `web`: requested at 100 s, listener closed after 1 s, last
/// arrival after 2.5 s, backend removed after 3 s, 7 refused; SIGTERM after 1 s, ended after 6 s.
pub(crate) fn timeline() -> Timeline {
    let backend_removed = after_ms(3_000, Source::Dataplane);
    Timeline {
        uid: PodUid("uid-a".into()),
        namespace: "default".into(),
        name: "web-a".into(),
        workload: Some(Workload { kind: "Deployment".into(), name: "web".into() }),
        home: true,
        deletion: Some(Deletion { not_before: at_ms(0), grace: Duration::from_secs(30) }),
        pre_stop_sleep: Some(Duration::from_secs(1)),
        grace_period: Some(Duration::from_secs(30)),
        deletion_requested: after_ms(0, Source::PodWatch),
        endpoint_terminating: after_ms(20, Source::SliceWatch),
        removals: vec![Removal {
            service: Some(ServiceName::Port(ServicePort("default/web:http".into()))),
            endpoint_terminating: after_ms(20, Source::SliceWatch),
            backend_removed,
            draining: false,
            drained: None,
        }],
        backend_removed,
        sigterm: after_ms(1_000, Source::Kernel),
        listener_closed: after_ms(1_000, Source::Kernel),
        arrivals: Some(TailEnds { cluster: Some(at_ms(2_500)), ..TailEnds::default() }),
        refused: 7,
        first_refused: after_ms(1_100, Source::Kernel),
        last_refused: after_ms(2_500, Source::Kernel),
        sigkill: None,
        process_exited: after_ms(6_000, Source::Kernel),
        pod_removed: after_ms(6_100, Source::PodWatch),
        censored: Vec::new(),
    }
}

fn at_ms(ms: u64) -> BootNs {
    BootNs(REQUESTED * 1_000_000_000 + ms * 1_000_000)
}

#[expect(clippy::unnecessary_wraps, reason = "every instant of a timeline is optional")]
fn after_ms(ms: u64, source: Source) -> Option<Instant> {
    Some(Instant { at: at_ms(ms), uncertainty: Some(Duration::ZERO), source })
}
