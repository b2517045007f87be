//! From the joined facts to one timeline: who owns what, and which of it belongs to this
//! termination.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::evidence::{Count, CountKey, Evidence, Listening, Netns, ProcessFact, ProcessStep};
use super::pods::{Pod, Watched};
use super::removals::{all_removed, endpoint_terminating};
use super::timeline::{Instant, Source, TailEnds, Timeline};
use crate::facts::{BootNs, Origin, Outcome, PodUid};

/// Facts of a termination may precede our own sight of it: kube-proxy commits before a second
/// watcher sees the slice (7.5 ms measured), and watches lag. The API server stamps deletions in
/// whole seconds, so nothing finer could be told from them.
const EARLIEST: Duration = Duration::from_secs(1);

/// All pods, by UID.
pub(super) type Pods = BTreeMap<PodUid, Pod>;

/// Everything a timeline is made from.
#[derive(Clone, Copy)]
pub(super) struct Assembler<'a> {
    /// All pods.
    pub(super) pods: &'a Pods,
    /// All other facts.
    pub(super) evidence: &'a Evidence,
}

impl Assembler<'_> {
    /// The timeline of a pod's termination; `None` while it is not terminating, or when not even
    /// its name is known yet.
    pub(super) fn timeline(&self, uid: &PodUid, pod: &Pod) -> Option<Timeline> {
        let (namespace, name) = pod.names.clone()?;
        let watched = pod.watched.as_ref();
        let deletion = watched.and_then(|watched| watched.deletion);
        let floor = floor(pod)?;
        let requested = deletion.map(|(at, deletion)| Instant {
            at,
            // A bound after the sighting: the API server's clock is ahead, so it bounds nothing.
            uncertainty: at.0.checked_sub(deletion.not_before.0).map(Duration::from_nanos),
            source: Source::PodWatch,
        });
        let removals = self.removals(uid, pod, floor, requested);
        let refusals = self.refusals(uid, pod, floor);
        let processes = self.processes(uid, floor);
        let home = watched.is_some() || pod.listed_here;
        let mut timeline = Timeline {
            uid: uid.clone(),
            namespace,
            name,
            workload: watched.map(|watched| watched.workload.clone()),
            home,
            deletion: deletion.map(|(_, deletion)| deletion),
            pre_stop_sleep: watched.and_then(|watched| watched.pre_stop_sleep),
            grace_period: watched.map(|watched| watched.grace_period),
            deletion_requested: requested,
            endpoint_terminating: earliest(
                pod.endpoints
                    .keys()
                    .filter_map(|key| endpoint_terminating(pod, key, floor, requested)),
            ),
            backend_removed: all_removed(&removals),
            removals: removals.into_iter().map(|(_, removal)| removal).collect(),
            sigterm: processes.sigterm.map(kernel),
            listener_closed: self.listener_closed(uid, pod, floor).map(kernel),
            arrivals: requested
                .filter(|_| pod.owns_its_network())
                .map(|requested| self.tail_ends(uid, pod, requested.at)),
            refused: refusals.count,
            first_refused: refusals.first.map(kernel),
            last_refused: refusals.last.map(kernel),
            sigkill: processes.sigkill.map(kernel),
            process_exited: processes.exited.map(kernel),
            pod_removed: pod.removed.map(|at| Instant {
                at,
                uncertainty: None,
                source: Source::PodWatch,
            }),
            censored: Vec::new(),
        };
        timeline.censored = self.censored(pod, floor, &timeline);
        Some(timeline)
    }

    /// The pod that an address and network namespace stood for at a moment.
    pub(super) fn owner(&self, address: IpAddr, netns: Netns, at: BootNs) -> Option<&PodUid> {
        if let Some(uid) = self.netns_owner(netns) {
            return Some(uid);
        }
        let mut owners: Vec<(BootNs, &PodUid, &Pod)> = self
            .pods
            .iter()
            .filter_map(|(uid, pod)| Some((pod.has_address_since(address)?, uid, pod)))
            .collect();
        owners.sort_by(|one, other| (one.0, one.1).cmp(&(other.0, other.1)));
        let held = owners.iter().rposition(|(since, _, _)| *since <= at).unwrap_or(0);
        let (_, uid, pod) = owners.get(held)?;
        // Gone before the moment: its successor was there before our watch knew.
        let gone = pod.removed.is_some_and(|removed| removed < at);
        Some(owners.get(held + 1).filter(|_| gone).map_or(*uid, |(_, next, _)| *next))
    }

    fn netns_owner(&self, netns: Netns) -> Option<&PodUid> {
        let mut owners = self
            .evidence
            .netns_to_pods
            .get(&netns)?
            .keys()
            .filter(|uid| self.pods.get(*uid).is_some_and(Pod::owns_its_network));
        owners.next().filter(|_| owners.next().is_none())
    }

    /// The earliest of its Service ports that nothing listened on any more; of any port when no
    /// Service port is known. A port is closed by its last close, unless a socket that opened
    /// since the floor still listens: a server that restarts gracefully opens before it closes.
    fn listener_closed(&self, uid: &PodUid, pod: &Pod, floor: BootNs) -> Option<BootNs> {
        let pod_has_network = pod.owns_its_network();
        let mut ports: BTreeMap<u16, (BTreeSet<u64>, Option<BootNs>)> = BTreeMap::new();
        for (whose, listeners) in &self.evidence.listeners {
            let owner = match whose {
                Listening::In(netns) => self.netns_owner(*netns),
                // One with a network of its own has none there that serves.
                Listening::OnNode(pod) => Some(pod).filter(|_| !pod_has_network),
            };
            if owner != Some(uid) {
                continue;
            }
            for listener in listeners.iter().filter(|listener| listener.at >= floor) {
                let (open, closed) = ports.entry(listener.port).or_default();
                if listener.opened {
                    open.insert(listener.socket);
                } else {
                    open.remove(&listener.socket);
                    *closed = (*closed).max(Some(listener.at));
                }
            }
        }
        let service_ports: BTreeSet<u16> = pod.endpoints.keys().map(|key| key.port).collect();
        ports
            .into_iter()
            .filter(|(port, _)| service_ports.is_empty() || service_ports.contains(port))
            .filter(|(_, (open, _))| open.is_empty())
            .filter_map(|(_, (_, closed))| closed)
            .min()
    }

    fn counts<'b>(
        &'b self,
        uid: &'b PodUid,
        pod: &Pod,
    ) -> impl Iterator<Item = (CountKey, Count)> + 'b {
        let addresses = pod.addresses();
        self.evidence
            .counts
            .iter()
            .filter(move |(key, _)| addresses.contains(&key.address))
            .filter(|(key, count)| self.owner(key.address, key.netns, count.last) == Some(uid))
            .map(|(key, count)| (*key, *count))
    }

    fn tail_ends(&self, uid: &PodUid, pod: &Pod, requested: BootNs) -> TailEnds {
        let mut ends = TailEnds::default();
        for (key, count) in self.counts(uid, pod).filter(|(_, count)| count.last > requested) {
            let end = match key.origin {
                Origin::Node | Origin::SameNode => &mut ends.same_node,
                Origin::Cluster => &mut ends.cluster,
                Origin::External => &mut ends.external,
                Origin::Unclassified => &mut ends.unclassified,
            };
            *end = (*end).max(Some(count.last));
        }
        ends
    }

    /// Refusals since the floor: the exact total minus what the details place before it.
    fn refusals(&self, uid: &PodUid, pod: &Pod, floor: BootNs) -> Refusals {
        let (mut detailed, mut before, mut uncounted, mut first, mut last) = (0, 0, 0, None, None);
        for address in pod.addresses() {
            let span = (address, Netns::MIN)..=(address, Netns::MAX);
            for ((_, netns), dropped) in self.evidence.dropped_refusals.range(span.clone()) {
                if self.owner(address, *netns, floor) == Some(uid) {
                    detailed += dropped;
                    before += dropped;
                }
            }
            for ((_, netns), refusals) in self.evidence.refusals.range(span) {
                let mut previous = None;
                for ((at, _, _), (suppressed, counted)) in refusals {
                    if self.owner(address, *netns, *at) != Some(uid) {
                        continue;
                    }
                    let (suppressed, counted) = (u64::from(*suppressed), u64::from(*counted));
                    detailed += counted + suppressed;
                    // A budget lasts a second: what it withheld happened right after the detail
                    // that spent it, however much later the next one tells.
                    if previous.is_none_or(|previous| previous < floor) {
                        before += suppressed;
                    }
                    previous = Some(*at);
                    if *at < floor {
                        before += counted;
                    } else {
                        uncounted += 1 - counted;
                        first = Some(first.map_or(*at, |first: BootNs| first.min(*at)));
                        last = last.max(Some(*at));
                    }
                }
            }
        }
        let mut total = 0;
        for (_, count) in self.counts(uid, pod).filter(|(key, _)| key.outcome == Outcome::Refused) {
            total += count.count;
            last = last.max(Some(count.last).filter(|at| *at >= floor));
        }
        // A reading may be older than the latest details.
        let count = total.max(detailed).saturating_sub(before) + uncounted;
        Refusals { count, first, last }
    }

    /// Signals and exits of the containers that were asked to stop; of all when none was asked.
    /// (The sandbox's own process is killed without being asked.)
    fn processes(&self, uid: &PodUid, floor: BootNs) -> Processes {
        let facts: Vec<&ProcessFact> = self
            .evidence
            .processes
            .get(uid)
            .into_iter()
            .flatten()
            .filter(|fact| fact.at >= floor)
            .collect();
        let asked: BTreeSet<u64> = facts
            .iter()
            .filter(|fact| fact.what == ProcessStep::Terminated)
            .map(|fact| fact.cgroup_id)
            .collect();
        let of = |what: ProcessStep| {
            facts
                .iter()
                .filter(|fact| asked.is_empty() || asked.contains(&fact.cgroup_id))
                .filter(move |fact| fact.what == what)
                .map(|fact| fact.at)
                .collect::<BTreeSet<BootNs>>()
        };
        Processes {
            sigterm: of(ProcessStep::Terminated).first().copied(),
            sigkill: of(ProcessStep::Killed).first().copied(),
            exited: of(ProcessStep::Exited).last().copied(),
        }
    }

    /// Why the timeline is no sample, in words.
    fn censored(&self, pod: &Pod, floor: BootNs, timeline: &Timeline) -> Vec<String> {
        let mut reasons = Vec::new();
        if timeline.deletion.is_some_and(|deletion| deletion.grace.is_zero()) {
            reasons.push("deleted with a grace period of 0".to_owned());
        }
        if let Some(Watched { ended: Some(ended), deletion: Some((deleted, _)), .. }) = pod.watched
            && ended < deleted
        {
            reasons.push("it had ended before it was deleted".to_owned());
        }
        match &pod.watched {
            Some(watched) if watched.first_seen_deleted => {
                reasons.push("already terminating when first seen".to_owned());
            }
            Some(watched) if watched.deletion.is_none() && pod.removed.is_some() => {
                reasons.push("removed before its deletion was seen".to_owned());
            }
            None if pod.terminating_at_first_sight => {
                reasons.push("already terminating when first seen".to_owned());
            }
            _ => {}
        }
        let services: BTreeSet<&Arc<str>> = pod.alone_on.iter().map(|key| &key.service.0).collect();
        for service in services {
            reasons.push(format!(
                "no other endpoint of {service} was ready: rules keep a terminating one by design"
            ));
        }
        let end = timeline.last_instant().unwrap_or(floor);
        let blind: BTreeSet<&str> = self
            .evidence
            .blind
            .iter()
            .filter(|blind| blind.from <= end && blind.until >= floor)
            .map(|blind| blind.source)
            .collect();
        reasons
            .extend(blind.into_iter().map(|source| format!("{source} may have missed something")));
        reasons
    }
}

struct Refusals {
    count: u64,
    first: Option<BootNs>,
    last: Option<BootNs>,
}

struct Processes {
    sigterm: Option<BootNs>,
    sigkill: Option<BootNs>,
    exited: Option<BootNs>,
}

/// The earliest moment at which a fact can belong to this termination; `None` when there is no
/// termination.
pub(super) fn floor(pod: &Pod) -> Option<BootNs> {
    let deletion = pod.watched.as_ref().and_then(|watched| watched.deletion);
    if let Some((at, deletion)) = deletion {
        return Some(deletion.not_before.min(at.minus(EARLIEST)));
    }
    let seen = [pod.first_terminating(), pod.watched.as_ref().and(pod.removed)];
    Some(seen.into_iter().flatten().min()?.minus(EARLIEST))
}

pub(super) fn earliest(instants: impl Iterator<Item = Instant>) -> Option<Instant> {
    instants.min_by_key(|instant| instant.at)
}

/// A kernel stamp is taken when it happens.
fn kernel(at: BootNs) -> Instant {
    Instant { at, uncertainty: Some(Duration::ZERO), source: Source::Kernel }
}
