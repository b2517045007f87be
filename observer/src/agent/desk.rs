//! The owner of the correlator: takes facts as they come, and the kernel's counts once per tick.
//!
//! One task, so the correlator needs no lock; what the HTTP API wants of it, it asks here. It never
//! waits for another task, so no two of them can wait for each other.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use observer_common::SignalCounts;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use super::hooks::{CommitHooks, LOOK};
use super::pod_cgroups::PodCgroups;
use super::sources;
use crate::api::Question;
use crate::clock;
use crate::cluster;
use crate::correlate::Correlator;
use crate::dataplane::{self, Dataplane, Status, Update};
use crate::facts::{
    Backend, BackendChange, BackendStep, Blindness, BootNs, ClusterFact, KernelEvent,
};
use crate::kernel::addresses::Addresses;
use crate::kernel::counters::{Counters, Reading, SIGNAL_NAMES};
use crate::kernel::probes::NFT_COMMIT;
use crate::kernel::{EventCounts, Probes};
use crate::metrics::Metrics;
use crate::readiness::{Item, Readiness};

/// How often counts are read and timelines closed: metrics and the API are at most this old.
/// Reading costs two system calls for each pod port, outcome and origin.
const TICK: Duration = Duration::from_secs(1);

/// Counts of addresses that no pod has any more are deleted every so many ticks (a minute): they
/// only take up room.
const TICKS_PER_CLEANING: u32 = 60;

/// The parts of the kernel side that the desk works with.
pub(super) struct Kernel {
    /// Dropped, and so detached, with the desk.
    pub(super) probes: Probes,
    pub(super) counters: Counters,
    pub(super) addresses: Addresses,
    pub(super) reader: Arc<EventCounts>,
}

/// What the desk keeps true for others.
pub(super) struct Shown {
    pub(super) metrics: Metrics,
    /// Readiness of the dataplane's reader.
    pub(super) rules: Item,
    /// Readiness of what tells pods.
    pub(super) cgroups: PodCgroups,
    pub(super) rule_counters: Arc<dataplane::Counters>,
    pub(super) watches: cluster::Health,
    pub(super) readiness: Readiness,
}

/// Where facts and questions arrive.
pub(super) struct Inbox {
    pub(super) events: mpsc::Receiver<KernelEvent>,
    pub(super) facts: mpsc::Receiver<ClusterFact>,
    pub(super) updates: mpsc::Receiver<Update>,
    pub(super) asked: mpsc::Receiver<Question>,
}

/// The correlator with what feeds it and what is made of it.
pub(super) struct Desk {
    correlator: Correlator,
    kernel: Kernel,
    hooks: CommitHooks,
    shown: Shown,
    watched: BTreeSet<IpAddr>,
    /// Whether everything worked at the last tick.
    ready: bool,
    lost: Losses,
    /// The dataplane that serves Services, the latest that was found.
    serving: Option<Dataplane>,
}

/// What the kernel had lost at a moment.
struct Losses {
    /// Details that did not fit the ring buffer.
    events: u64,
    /// New connections that did not fit the map of exact counts.
    counts: u64,
    at: BootNs,
}

impl Desk {
    pub(super) fn new(node: &str, kernel: Kernel, hooks: CommitHooks, shown: Shown) -> Self {
        Self {
            correlator: Correlator::new(node),
            kernel,
            hooks,
            shown,
            watched: BTreeSet::new(),
            ready: false,
            lost: Losses { events: 0, counts: 0, at: clock::now() },
            serving: None,
        }
    }

    /// Works until it is dropped.
    ///
    /// # Errors
    /// When the kernel's maps cannot be read.
    pub(super) async fn run(mut self, mut inbox: Inbox) -> anyhow::Result<()> {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut until_cleaning = TICKS_PER_CLEANING;
        loop {
            tokio::select! {
                Some(event) = inbox.events.recv() => self.take_event(&event),
                Some(fact) = inbox.facts.recv() => self.take_fact(fact),
                Some(update) = inbox.updates.recv() => self.take_update(update)?,
                Some(question) = inbox.asked.recv() => {
                    // Whoever asked may have hung up.
                    let _unheard = question.send(self.correlator.timelines());
                }
                // The condition is asked again for every fact, so it looks at no pod.
                _ = look.tick(), if self.hooks.lack_one() => {
                    if self.correlator.is_terminating() {
                        self.hooks.look(clock::now());
                    }
                }
                _ = tick.tick() => {
                    self.tick(clock::now(), &inbox)?;
                    until_cleaning -= 1;
                    if until_cleaning == 0 {
                        until_cleaning = TICKS_PER_CLEANING;
                        self.clean()?;
                    }
                }
            }
        }
    }

    fn take_event(&mut self, event: &KernelEvent) {
        self.hooks.committed(event);
        self.correlator.record_kernel(event);
    }

    fn take_fact(&mut self, fact: ClusterFact) {
        let pod = matches!(fact, ClusterFact::Pod(_) | ClusterFact::PodRemoved { .. });
        self.correlator.record_cluster(fact);
        if pod {
            self.watch_addresses();
        }
    }

    fn watch_addresses(&mut self) {
        if let Err(error) = self.kernel.addresses.set_probed(&self.correlator.probed_ports()) {
            warn!("probes of some pods count as connections: {error:#}");
        }
        let wanted = self.correlator.local_addresses();
        if wanted == self.watched {
            return;
        }
        let addresses = &mut self.kernel.addresses;
        match addresses.set_local(&wanted).and_then(|()| sources::classify_node(addresses)) {
            Ok(()) => self.watched = wanted,
            Err(error) => warn!("connections at some pods are not counted: {error:#}"),
        }
    }

    fn take_update(&mut self, update: Update) -> anyhow::Result<()> {
        match update {
            Update::Present { at, until, backends, draining } => {
                self.take_present(at, backends, BackendStep::Added);
                self.take_present(at, draining, BackendStep::Draining);
                if until > at {
                    let source = "the first reading of the rules";
                    self.correlator.record_blindness(Blindness { from: at, until, source });
                }
                self.stamp_commits()?;
            }
            Update::Change(change) => self.correlator.record_backend(change),
            Update::Blind(blindness) => self.correlator.record_blindness(blindness),
            Update::Status(status) => self.take_status(&status),
        }
        Ok(())
    }

    /// Reading the rules has loaded the module, if it is one, that the hook's function is in.
    fn stamp_commits(&mut self) -> anyhow::Result<()> {
        let probe = self.kernel.probes.watch(&NFT_COMMIT, true)?;
        let method = probe.and_then(|probe| probe.method);
        self.shown.metrics.set_probe(NFT_COMMIT.name, method);
        info!(method, "stamps of commits to nf_tables; without a hook, of their messages");
        Ok(())
    }

    /// Each came to its state at an unknown time before.
    fn take_present(&mut self, at: BootNs, backends: BTreeSet<Backend>, step: BackendStep) {
        let uncertainty = Duration::from_nanos(at.0);
        for backend in backends {
            self.correlator.record_backend(BackendChange { at, uncertainty, backend, step });
        }
    }

    fn take_status(&mut self, status: &Status) {
        debug!(?status, "the node's rules");
        self.shown.metrics.set_dataplane_status(status);
        let Some(serving) = status.serving else {
            self.shown.rules.down(status.to_string());
            return;
        };
        if self.serving != Some(serving) {
            info!(%serving, "the dataplane that serves Services");
            if self.serving.is_some() {
                self.shown.metrics.count_dataplane_switch();
            }
            self.serving = Some(serving);
        }
        if status.unreadable.is_empty() {
            self.shown.rules.up_as(status.to_string());
        } else {
            self.shown.rules.down(status.to_string());
        }
    }

    fn tick(&mut self, now: BootNs, inbox: &Inbox) -> anyhow::Result<()> {
        self.read_counts(now)?;
        self.hooks.tick(now, &mut self.kernel.probes, &self.shown.metrics)?;
        for timeline in self.correlator.advance(now) {
            info!(
                pod = %format_args!("{}/{}", timeline.namespace, timeline.name),
                gap_seconds = timeline.gap_seconds(),
                refused = timeline.refused,
                censored = ?timeline.censored,
                "a termination is over"
            );
            self.shown.metrics.record_closed(&timeline);
        }
        self.watch_addresses();
        self.show(inbox);
        self.tell_readiness();
        Ok(())
    }

    fn read_counts(&mut self, now: BootNs) -> anyhow::Result<()> {
        let reading = self.kernel.counters.read()?;
        for arrivals in &reading.arrivals {
            self.correlator.record_arrivals(arrivals);
        }
        let metrics = &self.shown.metrics;
        for (name, counts) in SIGNAL_NAMES.iter().zip(&reading.signals) {
            metrics.set_signal(name, *counts);
        }
        for (errno, count) in &reading.errnos {
            metrics.set_connect_failures(*errno, *count);
        }
        self.note_losses(&reading, now);
        Ok(())
    }

    /// What was lost in the kernel between the reading before the last and this one. `now` is from
    /// before this reading, so the next span begins there.
    fn note_losses(&mut self, reading: &Reading, now: BootNs) {
        let until = clock::now();
        let sum = |lost: fn(&SignalCounts) -> u64| reading.signals.iter().map(lost).sum();
        let totals = Losses { events: sum(|c| c.ring_full), counts: sum(|c| c.map_full), at: now };
        let before = std::mem::replace(&mut self.lost, totals);
        let mut blind = |source| {
            self.correlator.record_blindness(Blindness { from: before.at, until, source });
        };
        if self.lost.events > before.events {
            blind("ring buffer");
            self.hooks.missed_since(before.at);
        }
        if self.lost.counts > before.counts {
            blind("arrival counts");
        }
    }

    fn show(&self, inbox: &Inbox) {
        let metrics = &self.shown.metrics;
        for ((namespace, workload), count) in self.correlator.refused_by_workload() {
            metrics.set_refused(&namespace, &workload, count);
        }
        self.shown.cgroups.show(&self.kernel.reader);
        metrics.set_undecodable(self.kernel.reader.undecodable.load(Ordering::Relaxed));
        metrics.set_dataplane(&self.shown.rule_counters);
        metrics.set_queued("kernel", inbox.events.len());
        metrics.set_queued("cluster", inbox.facts.len());
        metrics.set_queued("dataplane", inbox.updates.len());
        metrics.set_unreadable_objects(self.shown.watches.unreadable.load(Ordering::Relaxed));
        metrics.set_watch_failures("pods", self.shown.watches.pods.failures());
        metrics.set_watch_failures("endpointslices", self.shown.watches.slices.failures());
    }

    /// Says in the log when everything began to work, and when something no longer does.
    fn tell_readiness(&mut self) {
        let missing = self.shown.readiness.missing();
        match (std::mem::replace(&mut self.ready, missing.is_empty()), self.ready) {
            (false, true) => info!("ready"),
            (true, false) => {
                let missing: Vec<String> = missing.iter().map(ToString::to_string).collect();
                warn!("not ready: {}", missing.join("; "));
            }
            _ => {}
        }
    }

    fn clean(&mut self) -> anyhow::Result<()> {
        let correlator = &self.correlator;
        self.kernel.counters.forget(|arrivals| correlator.is_retired(arrivals))
    }
}
