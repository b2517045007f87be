//! Follows the rules: sockets and the clock in, updates out.
//!
//! Whatever is reported carries the span it happened in: for a commit that was heard, from its
//! arrival; after a loss, from the last moment when nothing was waiting to be read.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::backends::{Backends, Origin};
use super::legacy::Reader;
use super::nft::follow::{Follow, Step};
use super::nft::{Arrival, Dumper, Fault, Message, Subscription, read_datagram};
use super::reach::{self, Reached};
use super::rules::Family;
use super::{Counters, Dataplane, LegacySignal, Settings, Status, Update};
use crate::clock;
use crate::facts::{Backend, BackendChange, BackendStep, Blindness, BootNs};

/// Pause before a dump is tried again because the rules changed meanwhile.
const DUMP_PAUSE: Duration = Duration::from_millis(50);
/// How long the kernel program's event for a legacy commit may take to reach us, so that a commit
/// during a read is told from one before it.
const LEGACY_SETTLE: Duration = Duration::from_millis(2);
/// A legacy commit took effect during the setsockopt call, whose end is what is reported. The call
/// was measured with 83 MB of rules (10,000 Services of 5 endpoints): 0.49 s, which is 6 ns for
/// each byte; and with the smallest table, well below the constant part.
const LEGACY_CALL: Duration = Duration::from_millis(2);
const LEGACY_CALL_PER_BYTE: Duration = Duration::from_nanos(10);
/// The chain that marks a table as kube-proxy's, in iptables mode.
const KUBE_SERVICES: &str = "KUBE-SERVICES";
/// kube-proxy's table in nftables mode, and iptables' own.
const KUBE_PROXY: &str = "kube-proxy";
const NAT: &str = "nat";

/// What legacy tables need.
#[derive(Default)]
struct Legacy {
    readers: HashMap<Family, Arc<Reader>>,
    /// Which hold kube-proxy's rules.
    in_use: BTreeSet<Family>,
    /// The tables that could not be read, and since when they are unknown.
    unread_since: BTreeMap<Family, BootNs>,
}

impl Legacy {
    /// What became of a table since `from` is unknown until it is read.
    fn unread(&mut self, family: Family, from: BootNs) {
        let since = self.unread_since.entry(family).or_insert(from);
        *since = from.min(*since);
    }
}

/// The rules, and who is told of their changes.
pub(super) struct Follower {
    counters: Arc<Counters>,
    subscription: Subscription,
    nft: Follow,
    legacy: Legacy,
    backends: Backends,
    status: Option<Status>,
    updates: Sender<Update>,
}

impl Follower {
    /// Subscribes first and reads everything then, so that no commit falls between.
    pub(super) async fn start(
        settings: &Settings,
        updates: Sender<Update>,
    ) -> anyhow::Result<Self> {
        let subscription = Subscription::open(settings.receive_buffer_bytes)?;
        let mut legacy = Legacy::default();
        for family in [Family::V4, Family::V6] {
            if let Some(reader) = Reader::open(family)? {
                legacy.readers.insert(family, Arc::new(reader));
            }
        }
        let mut follower = Self {
            counters: settings.counters.clone(),
            subscription,
            nft: Follow::default(),
            legacy,
            backends: Backends::default(),
            status: None,
            updates,
        };
        // Taken before the reads: a later commit is a change of its own.
        let at = clock::now();
        follower.nft = follower.dump().await?;
        let mut reached = follower.all_nft();
        for family in follower.legacy_families() {
            match follower.legacy_table(family).await {
                Some((table, _)) => reached.push(table),
                None => follower.legacy.unread(family, at),
            }
        }
        follower.backends.replace(reached);
        let backends = follower.backends.all().into_iter().collect();
        follower.send(Update::Present { at, backends }).await;
        follower.report_status().await;
        Ok(follower)
    }

    /// The next netlink datagram.
    pub(super) async fn next(&mut self) -> anyhow::Result<Arrival> {
        self.subscription.next().await.context("read netfilter messages")
    }

    /// Takes what arrived into the model; reads everything anew when something was lost.
    pub(super) async fn take(&mut self, arrival: Arrival) -> anyhow::Result<()> {
        let lost = if let Some(datagram) = &arrival.datagram {
            let messages = read_datagram(datagram, &self.counters);
            self.step(messages, arrival.earliest, arrival.read_at).await
        } else {
            self.counters.overruns.increase();
            true
        };
        if lost {
            self.resync(arrival.complete_until).await?;
        }
        Ok(())
    }

    /// Takes the messages of one datagram; true when they show that others were missed.
    async fn step(&mut self, messages: Vec<Message>, earliest: BootNs, read_at: BootNs) -> bool {
        for message in messages {
            match self.nft.step(message, earliest, read_at) {
                Step::Nothing => {}
                Step::Commit(commit) => {
                    self.counters.commits.increase();
                    let changes =
                        commit.tables.into_iter().map(|(table, now)| (Origin::Nft(table), now));
                    let steps = self.backends.update(changes.collect());
                    self.report(steps, commit.at, commit.uncertainty).await;
                    self.report_status().await;
                }
                Step::Lost => {
                    self.counters.gaps.increase();
                    return true;
                }
            }
        }
        false
    }

    /// Reads all `nf_tables` rules anew: what changed since `from` took effect at some time since.
    async fn resync(&mut self, from: BootNs) -> anyhow::Result<()> {
        warn!("netfilter messages were lost; reading all rules again");
        self.counters.resyncs.increase();
        self.nft = self.dump().await?;
        let mut reached = self.all_nft();
        let present: HashSet<Origin> = reached.iter().map(|(origin, _)| origin.clone()).collect();
        let gone = self.backends.tables().map(|table| Origin::Nft(table.clone()));
        let gone = gone.filter(|origin| !present.contains(origin));
        reached.extend(gone.map(|origin| (origin, Reached::default())));
        self.replace_blindly(reached, from, "netfilter messages").await;
        Ok(())
    }

    async fn dump(&self) -> anyhow::Result<Follow> {
        loop {
            let dumper = Dumper::open()?;
            let counters = self.counters.clone();
            let answer = spawn_blocking(move || dumper.dump(&counters));
            match answer.await.context("read all nf_tables rules")? {
                Ok(follow) => return Ok(follow),
                Err(Fault::Absent) => {
                    debug!("this kernel has no nf_tables");
                    return Ok(Follow::default());
                }
                Err(Fault::Changed) => {
                    self.counters.interrupted_reads.increase();
                    sleep(DUMP_PAUSE).await;
                }
                Err(Fault::Other(error)) => return Err(error),
            }
        }
    }

    fn all_nft(&self) -> Vec<(Origin, Reached)> {
        let ruleset = self.nft.ruleset();
        let tables = ruleset.tables().map(|(table, _)| table);
        tables.map(|table| (Origin::Nft(table.clone()), ruleset.reached(table))).collect()
    }

    /// Reads the legacy tables that `signal` and those waiting behind it ask for.
    pub(super) async fn read_legacy(
        &mut self,
        signal: LegacySignal,
        signals: &mut Receiver<LegacySignal>,
    ) {
        let mut ahead = VecDeque::from([signal]);
        while let Some(signal) = ahead.pop_front() {
            match signal {
                LegacySignal::Missed { from, .. } => {
                    for family in self.legacy_families() {
                        self.legacy.unread(family, from);
                    }
                    self.read_unread().await;
                }
                LegacySignal::Commit { at, family } => {
                    self.counters.commits.increase();
                    if self.legacy.unread_since.contains_key(&family) {
                        self.read_unread().await;
                        continue;
                    }
                    let (reading, read_at) =
                        self.read_between_commits(family, &mut ahead, signals).await;
                    let (first, last) = commits_seen(&mut ahead, at, family, read_at);
                    match reading {
                        Some((reached, call)) => {
                            let uncertainty = call + last.since(first);
                            self.replace(vec![reached], last, uncertainty).await;
                        }
                        None => self.legacy.unread(family, first),
                    }
                }
            }
        }
    }

    /// Reads a table such that no commit to it falls into the reading, for whether its outcome was
    /// read could then not be told. Everything up to the returned moment was read. `ahead` takes
    /// what is signalled meanwhile.
    async fn read_between_commits(
        &mut self,
        family: Family,
        ahead: &mut VecDeque<LegacySignal>,
        signals: &mut Receiver<LegacySignal>,
    ) -> (Option<((Origin, Reached), Duration)>, BootNs) {
        loop {
            let begun = clock::now();
            let reading = self.legacy_table(family).await;
            let ended = clock::now();
            sleep(LEGACY_SETTLE).await;
            ahead.extend(std::iter::from_fn(|| signals.try_recv().ok()));
            let torn = ahead.iter().any(|signal| {
                matches!(signal, LegacySignal::Commit { at, family: other }
                    if *other == family && *at > begun && *at <= ended)
            });
            if !torn {
                return (reading, begun);
            }
        }
    }

    /// Whether a table could not be read: what it holds is not known until
    /// [`Self::read_unread`] succeeds.
    pub(super) fn has_unread(&self) -> bool {
        !self.legacy.unread_since.is_empty()
    }

    /// Reads the tables that are unknown. One that cannot be read stays so, and the time until now
    /// is blind all the same: a termination may end before the table can be read.
    pub(super) async fn read_unread(&mut self) {
        for (family, from) in self.legacy.unread_since.clone() {
            let reading = self.legacy_table(family).await;
            if reading.is_some() {
                self.legacy.unread_since.remove(&family);
            }
            let tables = reading.into_iter().map(|(table, _)| table).collect();
            self.replace_blindly(tables, from, "legacy commits").await;
        }
    }

    /// The IP versions that this kernel has.
    fn legacy_families(&self) -> Vec<Family> {
        self.legacy.readers.keys().copied().collect()
    }

    /// What the legacy table of an IP version reaches, and how long the call that wrote it may
    /// have taken; `None` when it cannot be read.
    async fn legacy_table(&mut self, family: Family) -> Option<((Origin, Reached), Duration)> {
        let reader = self.legacy.readers.get(&family)?.clone();
        self.counters.legacy_reads.increase();
        let reading = match spawn_blocking(move || reader.read()).await.map_err(anyhow::Error::new)
        {
            Ok(Ok(reading)) => reading,
            Ok(Err(error)) | Err(error) => {
                self.counters.legacy_failures.increase();
                if self.legacy.unread_since.contains_key(&family) {
                    debug!("still: {error:#}");
                } else {
                    warn!("{error:#}; trying again until it works");
                }
                return None;
            }
        };
        if reading.table.chains.contains_key(KUBE_SERVICES) {
            self.legacy.in_use.insert(family);
        } else {
            self.legacy.in_use.remove(&family);
        }
        let size = u32::try_from(reading.size_bytes).unwrap_or(u32::MAX);
        let reached = (Origin::Legacy(family), reach::walk(&reading.table));
        Some((reached, LEGACY_CALL + LEGACY_CALL_PER_BYTE * size))
    }

    /// Reports what changed at some time between `from` and now, and that it was not watched.
    async fn replace_blindly(
        &mut self,
        reached: Vec<(Origin, Reached)>,
        from: BootNs,
        source: &'static str,
    ) {
        let until = clock::now();
        self.send(Update::Blind(Blindness { from, until, source })).await;
        self.replace(reached, until, until.since(from)).await;
    }

    async fn replace(
        &mut self,
        reached: Vec<(Origin, Reached)>,
        at: BootNs,
        uncertainty: Duration,
    ) {
        let steps = self.backends.replace(reached);
        self.report(steps, at, uncertainty).await;
        self.report_status().await;
    }

    async fn report(&self, steps: Vec<(Backend, BackendStep)>, at: BootNs, uncertainty: Duration) {
        for (backend, step) in steps {
            self.send(Update::Change(BackendChange { at, uncertainty, backend, step })).await;
        }
    }

    async fn report_status(&mut self) {
        let tables = self.nft.ruleset().tables().filter_map(|(id, table)| match &*id.name {
            KUBE_PROXY => Some(Dataplane::Nftables),
            NAT if table.chains.contains_key(KUBE_SERVICES) => Some(Dataplane::IptablesNft),
            _ => None,
        });
        let legacy = self.legacy.in_use.iter().map(|_| Dataplane::IptablesLegacy);
        let status = Status {
            in_use: tables.chain(legacy).collect(),
            backends: self.backends.count(),
            unresolved: self.backends.unresolved(),
        };
        if self.status.as_ref() != Some(&status) {
            self.status = Some(status.clone());
            self.send(Update::Status(status)).await;
        }
    }

    /// A receiver that is gone ends [`run`](super::run()) soon.
    async fn send(&self, update: Update) {
        if self.updates.send(update).await.is_err() {
            debug!("nobody listens to the dataplane any more");
        }
    }
}

/// Takes out of `ahead` the other commits of the same table up to `read_at`, whose outcome was
/// read already; gives the first and last moment of all of them.
fn commits_seen(
    ahead: &mut VecDeque<LegacySignal>,
    at: BootNs,
    family: Family,
    read_at: BootNs,
) -> (BootNs, BootNs) {
    let (mut first, mut last) = (at, at);
    ahead.retain(|signal| match signal {
        LegacySignal::Commit { at, family: other } if *other == family && *at <= read_at => {
            (first, last) = (first.min(*at), last.max(*at));
            false
        }
        _ => true,
    });
    (first, last)
}
