//! What really happened, as the ones who did it recorded it: the measure for the agent's figures.
//! Moments are ns of `CLOCK_BOOTTIME`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::clock::seconds_between;
use super::load::{Attempt, Outcome};
use super::network::{Addresses, Family};

/// The life of one pod.
#[derive(Clone, Debug)]
pub struct PodTruth {
    /// `metadata.name`
    pub name: String,
    /// Its addresses.
    pub addresses: Addresses,
    /// Its process.
    pub pid: i32,
    /// The pod's own report: its listener accepts. The first one, if it restarted.
    pub listening_ns: Option<u64>,
    /// Just before the API recorded the deletion.
    pub deletion_requested_ns: Option<u64>,
    /// Just before the slices that list it as terminating were served.
    pub slice_terminating_ns: Option<u64>,
    /// Just before the signal was sent.
    pub sigterm_sent_ns: Option<u64>,
    /// The pod's own report of the signal.
    pub sigterm_ns: Option<u64>,
    /// The pod's own report, just after the close; the last one, if it restarted.
    pub listener_closed_ns: Option<u64>,
    /// Just before the signal was sent.
    pub sigkill_sent_ns: Option<u64>,
    /// When its end was seen.
    pub exited_ns: Option<u64>,
    /// Just before the API served its removal.
    pub removed_ns: Option<u64>,
}

impl PodTruth {
    pub(crate) fn new(name: &str, addresses: Addresses) -> Self {
        Self {
            name: name.to_owned(),
            addresses,
            pid: 0,
            listening_ns: None,
            deletion_requested_ns: None,
            slice_terminating_ns: None,
            sigterm_sent_ns: None,
            sigterm_ns: None,
            listener_closed_ns: None,
            sigkill_sent_ns: None,
            exited_ns: None,
            removed_ns: None,
        }
    }
}

/// One change of the node's rules.
#[derive(Clone, Debug)]
pub struct Commit {
    /// Whose rules.
    pub family: Family,
    /// When the tool was started: nothing had changed yet.
    pub started_ns: u64,
    /// When the rules were in force: the kernel's own notice where it gives one (nftables and
    /// iptables-nft), the tool's exit where not (iptables-legacy).
    pub at_ns: u64,
    /// What new connections could be sent to from then on.
    pub backends: BTreeSet<SocketAddr>,
}

impl Commit {
    fn has(&self, address: IpAddr) -> bool {
        self.backends.iter().any(|backend| backend.ip() == address)
    }
}

/// Everything recorded so far.
#[derive(Clone, Debug, Default)]
pub struct Truth {
    /// By `metadata.uid`.
    pub pods: BTreeMap<String, PodTruth>,
    /// In the order they took effect.
    pub commits: Vec<Commit>,
    /// When a change of an `EndpointSlice` was served, with the object's name.
    pub slice_changes: Vec<(u64, String)>,
}

impl Truth {
    /// When the rules stopped sending new connections to a pod, after its deletion: the later of
    /// the families that had it. `None` while one still does, or when none ever did.
    #[must_use]
    pub fn backend_removed_ns(&self, uid: &str) -> Option<u64> {
        let pod = self.pods.get(uid)?;
        let requested_ns = pod.deletion_requested_ns?;
        let mut latest = None;
        for address in Family::BOTH.map(|family| pod.addresses.of(family)) {
            if self.was_backend(address) {
                latest = latest.max(Some(self.removal_ns(address, requested_ns)?));
            }
        }
        latest
    }

    /// Propagation gap in seconds.
    #[must_use]
    pub fn gap_seconds(&self, uid: &str) -> Option<f64> {
        let requested_ns = self.pods.get(uid)?.deletion_requested_ns?;
        Some(seconds_between(requested_ns, self.backend_removed_ns(uid)?))
    }

    /// Head start in seconds.
    #[must_use]
    pub fn head_start_seconds(&self, uid: &str) -> Option<f64> {
        let pod = self.pods.get(uid)?;
        Some(seconds_between(pod.deletion_requested_ns?, pod.listener_closed_ns?))
    }

    /// Arrival tail in seconds, 0 when nothing arrived: from the attempts made between a pod's
    /// deletion and the next one's, so that a refusal can only be this pod's.
    #[must_use]
    pub fn arrival_tail_seconds(&self, uid: &str, attempts: &[Attempt]) -> Option<f64> {
        let pod = self.pods.get(uid)?;
        let requested_ns = pod.deletion_requested_ns?;
        let arrived = |attempt: &&Attempt| match &attempt.outcome {
            Outcome::Served(name) => *name == pod.name,
            Outcome::Refused | Outcome::Reset | Outcome::NoAnswer => true,
            Outcome::TimedOut | Outcome::Failed(_) => false,
        };
        let later = attempts.iter().filter(|attempt| attempt.started_ns >= requested_ns);
        let last_ns = later.filter(arrived).map(|attempt| attempt.started_ns).max();
        Some(last_ns.map_or(0.0, |last_ns| seconds_between(requested_ns, last_ns)))
    }

    fn was_backend(&self, address: IpAddr) -> bool {
        self.commits.iter().any(|commit| commit.has(address))
    }

    /// The first commit without an address, counted from the last one with it.
    fn removal_ns(&self, address: IpAddr, after_ns: u64) -> Option<u64> {
        let of_family = |commit: &&Commit| commit.family == Family::of(address);
        let without = self.commits.iter().rev().filter(of_family).take_while(|c| !c.has(address));
        without.filter(|commit| commit.at_ns >= after_ns).last().map(|commit| commit.at_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUESTED_NS: u64 = 100;

    fn truth(commits: &[(Family, u64, bool)]) -> Truth {
        let addresses = Addresses::of_pod(2);
        let mut pod = PodTruth::new("web", addresses);
        pod.deletion_requested_ns = Some(REQUESTED_NS);
        let commits = commits.iter().map(|&(family, at_ns, listed)| Commit {
            family,
            started_ns: at_ns,
            at_ns,
            backends: listed.then(|| (addresses.of(family), 8080).into()).into_iter().collect(),
        });
        Truth {
            pods: BTreeMap::from([("uid".to_owned(), pod)]),
            commits: commits.collect(),
            slice_changes: Vec::new(),
        }
    }

    #[test]
    fn the_later_family_decides_when_the_backend_is_gone() {
        let both = [(Family::V4, 50, true), (Family::V6, 51, true), (Family::V4, 130, false)];
        assert_eq!(truth(&both).backend_removed_ns("uid"), None);
        let both = [&both[..], &[(Family::V6, 140, false)]].concat();
        assert_eq!(truth(&both).backend_removed_ns("uid"), Some(140));
    }

    #[test]
    fn a_rewrite_of_rules_without_it_is_not_another_removal() {
        let commits = [(Family::V4, 50, true), (Family::V4, 130, false), (Family::V4, 150, false)];
        assert_eq!(truth(&commits).backend_removed_ns("uid"), Some(130));
    }

    #[test]
    fn a_pod_that_never_was_a_backend_has_no_removal() {
        assert_eq!(truth(&[(Family::V4, 130, false)]).backend_removed_ns("uid"), None);
    }
}
