//! The commits whose outcome one reading of a table shows, and when each backend was changed by
//! them.
//!
//! Pure. One reading may show the outcome of many commits: of one call each, where a dataplane is
//! changed destination by destination. What a hook tells of them narrows down the moment.

use std::net::SocketAddr;
use std::time::Duration;

use super::{Family, SilentTable};
use crate::facts::{Backend, BootNs, Happening, KernelEvent};

/// A change of a table that does not announce its changes, as a kernel hook saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    /// When the call that made it returned; it took effect during the call.
    pub at: BootNs,
    /// Which table.
    pub table: SilentTable,
    /// How long the call took; `None` where the hook does not measure it.
    pub call: Option<Duration>,
    /// The only destination that it can have changed; `None` where it may be any.
    pub destination: Option<SocketAddr>,
}

impl Commit {
    /// From a hook that tells no more than the moment.
    #[must_use]
    pub fn new(at: BootNs, table: SilentTable) -> Self {
        Self { at, table, call: None, destination: None }
    }

    /// What an event of a kernel hook tells, one for each table; nothing when it is of another
    /// kind.
    #[must_use]
    pub fn told_by(event: &KernelEvent) -> Vec<Self> {
        let to = |table, call_ns: u32| Self {
            call: (call_ns > 0).then(|| Duration::from_nanos(call_ns.into())),
            ..Self::new(event.at, table)
        };
        let legacy = |family, call_ns| to(SilentTable::Legacy(family), call_ns);
        match event.happening {
            Happening::LegacyCommit { family: 4, call_ns } => vec![legacy(Family::V4, call_ns)],
            Happening::LegacyCommit { family: 6, call_ns } => vec![legacy(Family::V6, call_ns)],
            Happening::LegacyCommit { call_ns, .. } => {
                vec![legacy(Family::V4, call_ns), legacy(Family::V6, call_ns)]
            }
            Happening::IpvsCommit { call_ns } => vec![Self {
                destination: Some(event.local).filter(|destination| destination.port() != 0),
                ..to(SilentTable::Ipvs, call_ns)
            }],
            Happening::MapCommit { .. } => vec![to(SilentTable::Cilium, 0)],
            _ => Vec::new(),
        }
    }

    /// When it is over, with those after it that are not told.
    pub(super) fn settled(&self) -> BootNs {
        self.at.plus(self.table.window())
    }

    /// Whether it may have taken effect within `(begun, ended]`, where a call that was not measured
    /// may have taken as long as `call`.
    pub(super) fn may_fall_into(&self, begun: BootNs, ended: BootNs, call: Duration) -> bool {
        self.settled() > begun && self.begun(call) <= ended
    }

    /// When its call began, which took `call` if it was not measured.
    pub(super) fn begun(&self, call: Duration) -> BootNs {
        self.at.minus(self.call.unwrap_or(call))
    }

    fn may_change(&self, backend: &Backend) -> bool {
        let own = SocketAddr::new(backend.address, backend.port);
        self.destination.is_none_or(|destination| destination == own)
    }
}

/// The commits that one reading shows: at least one.
#[derive(Debug)]
pub(super) struct Commits {
    /// The one that made us read, and those that came before the reading.
    all: Vec<Commit>,
    /// How long a call may take that was not measured.
    call: Duration,
    /// When the reading was over.
    read_until: BootNs,
}

impl Commits {
    pub(super) fn new(all: Vec<Commit>, call: Duration, read_until: BootNs) -> Self {
        Self { all, call, read_until }
    }

    /// When `backend` changed: within the returned time before the returned moment. What none of
    /// these commits can have done, one did whose event is late: any time up to the reading's end.
    pub(super) fn when(&self, backend: &Backend) -> (BootNs, Duration) {
        let own = self.all.iter().filter(|commit| commit.may_change(backend));
        let (from, until) = self.span(own).unwrap_or_else(|| {
            let (first, _) = self.span(self.all.iter()).unwrap_or_default();
            (first, self.read_until)
        });
        (until, until.since(from))
    }

    /// When the first of some calls began, and when the last of them was over.
    fn span<'a>(&self, commits: impl Iterator<Item = &'a Commit>) -> Option<(BootNs, BootNs)> {
        commits
            .map(|commit| (commit.begun(self.call), commit.settled()))
            .reduce(|one, other| (one.0.min(other.0), one.1.max(other.1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Protocol;

    const BOUND: Duration = Duration::from_nanos(50);
    const READ: BootNs = BootNs(9_000);

    fn backend(address: &str) -> Backend {
        let address: SocketAddr = address.parse().expect("an address");
        let (address, port) = (address.ip(), address.port());
        Backend { service: None, protocol: Protocol::Tcp, address, port }
    }

    fn call(at: u64, ns: u64, destination: &str) -> Commit {
        Commit {
            call: Some(Duration::from_nanos(ns)),
            destination: destination.parse().ok(),
            ..Commit::new(BootNs(at), SilentTable::Ipvs)
        }
    }

    fn when(commits: &[Commit], address: &str) -> (u64, u128) {
        let (at, uncertainty) = Commits::new(commits.to_vec(), BOUND, READ).when(&backend(address));
        (at.0, uncertainty.as_nanos())
    }

    #[test]
    fn each_destination_has_the_moment_of_its_own_call() {
        let commits = [call(1_000, 10, "10.0.0.1:80"), call(2_000, 20, "[fd00::2]:80")];
        assert_eq!(when(&commits, "10.0.0.1:80"), (1_000, 10));
        assert_eq!(when(&commits, "[fd00::2]:80"), (2_000, 20));
    }

    #[test]
    fn calls_for_one_destination_of_several_services_share_their_span() {
        let commits = [
            call(2_000, 20, "10.0.0.1:80"),
            call(1_000, 10, "10.0.0.1:80"),
            call(5_000, 10, "10.0.0.1:81"),
        ];
        assert_eq!(when(&commits, "10.0.0.1:80"), (2_000, 1_010));
    }

    #[test]
    fn a_call_that_names_no_destination_may_have_changed_any() {
        let commits = [call(1_000, 10, "10.0.0.1:80"), call(3_000, 700, "none")];
        assert_eq!(when(&commits, "10.0.0.1:80"), (3_000, 2_010));
        assert_eq!(when(&commits, "10.0.0.2:80"), (3_000, 700));
    }

    #[test]
    fn what_no_call_can_have_changed_happened_before_the_reading_ended() {
        let commits = [call(1_000, 10, "10.0.0.1:80"), call(3_000, 700, "10.0.0.1:80")];
        assert_eq!(when(&commits, "10.0.0.2:80"), (9_000, 8_010));
    }

    #[test]
    fn a_call_that_was_not_measured_may_have_taken_as_long_as_such_calls_take() {
        let commits = [Commit::new(BootNs(1_000), SilentTable::Ipvs)];
        assert_eq!(when(&commits, "10.0.0.1:80"), (1_000, 50));
    }

    #[test]
    fn a_call_that_was_under_way_when_a_reading_ended_may_fall_into_it() {
        let (begun, ended) = (BootNs(1_000), BootNs(2_000));
        let into = |at, ns| call(at, ns, "none").may_fall_into(begun, ended, BOUND);
        assert!(!into(1_000, 10), "it was over");
        assert!(into(1_001, 10));
        assert!(into(2_100, 100));
        assert!(!into(2_100, 99), "it began later");
        let unmeasured = |at| {
            let commit = Commit::new(BootNs(at), SilentTable::Legacy(Family::V4));
            commit.may_fall_into(begun, ended, BOUND)
        };
        assert!(unmeasured(2_050));
        assert!(!unmeasured(2_051), "it cannot have begun before");
    }
}
