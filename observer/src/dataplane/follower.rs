//! Follows the rules: sockets and the clock in, updates out.
//!
//! Whatever is reported carries the span it happened in: for a commit that was heard, from its
//! arrival; after a loss, from the last moment when nothing was waiting to be read.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{debug, warn};

use super::backends::{Backends, Origin};
use super::commits::{Commit, Commits};
use super::nft::follow::{Commit as NftCommit, DELIVERY, Follow, Lost};
use super::nft::{Arrival, Dumper, Fault, Subscription};
use super::reach::Reached;
use super::silent::{Reading, SilentTable, SilentTables};
use super::status::Detector;
use super::{CommitSignal, CommitStamps, Counters, Settings, StampsOf, Update};
use crate::clock;
use crate::facts::{Backend, BackendChange, BackendStep, Blindness, BootNs};

/// Pause before a dump is tried again because the rules changed meanwhile.
const DUMP_PAUSE: Duration = Duration::from_millis(50);
/// How long a hook's event for a commit may take to reach us, so that a commit during a read is
/// told from one before it.
const SETTLE: Duration = Duration::from_millis(2);

/// How often a table is read again because a commit fell into the reading. One that changes for
/// longer than so many readings is unknown meanwhile, for the other tables have to be followed too.
const ATTEMPTS: usize = 20;

/// The rules, and who is told of their changes.
pub(super) struct Follower {
    counters: Arc<Counters>,
    subscription: Subscription,
    nft: Follow,
    silent: SilentTables,
    commit_stamps: Option<StampsOf>,
    backends: Backends,
    detector: Detector,
    updates: Sender<Update>,
    /// Signals that were received while a table was read, in their order.
    ahead: VecDeque<CommitSignal>,
}

impl Follower {
    /// Subscribes first and reads everything then, so that no commit falls between.
    pub(super) async fn start(
        settings: &Settings,
        updates: Sender<Update>,
    ) -> anyhow::Result<Self> {
        let subscription = Subscription::open(settings.receive_buffer_bytes)?;
        let mut follower = Self {
            counters: settings.counters.clone(),
            subscription,
            nft: Follow::default(),
            silent: SilentTables::open(settings)?,
            commit_stamps: settings.commit_stamps.clone(),
            backends: Backends::default(),
            detector: Detector::new(settings.dataplane),
            updates,
            ahead: VecDeque::new(),
        };
        let at = clock::now();
        follower.nft = follower.dump().await?;
        // The next commit is a change of its own.
        let until = if follower.nft.was_whole_at_once() { at } else { clock::now() };
        let mut reached = follower.all_nft();
        for table in follower.silent.all() {
            // Whoever only wants to know what is present hears of no commit that tore the reading.
            match follower.silent.read_unannounced(table).await {
                Some(reading) => reached.push((Origin::Silent(table), reading.reached)),
                None => follower.silent.unread(table, at),
            }
        }
        follower.backends = Backends::new(reached);
        let (backends, draining) = (follower.backends.all(), follower.backends.draining());
        follower.send(Update::Present { at, until, backends, draining }).await;
        follower.report_status().await;
        Ok(follower)
    }

    /// The next netlink datagram.
    pub(super) async fn next(&mut self) -> anyhow::Result<Arrival> {
        self.subscription.next().await.context("read netfilter messages")
    }

    /// Takes what arrived into the model; reads everything anew when something was lost.
    pub(super) async fn take(&mut self, arrival: Arrival) -> anyhow::Result<()> {
        // A commit that is lost may have taken effect before its first messages came.
        let begun = self.nft.begun().map(|begun| begun.minus(DELIVERY));
        let mut commits = Vec::new();
        let taken = take(&mut self.nft, &arrival, &self.counters, &mut commits);
        for commit in commits {
            self.take_nft_commit(commit).await;
        }
        if taken.is_err() {
            let complete = arrival.complete_until;
            self.resync(begun.map_or(complete, |begun| begun.min(complete))).await?;
        }
        Ok(())
    }

    async fn take_nft_commit(&mut self, commit: NftCommit) {
        let NftCommit { tables, heard } = commit;
        self.counters.commits.increase();
        let changes = tables.into_iter().filter(|(table, _)| self.detector.follows(table));
        let changes = changes.map(|(table, now)| (Origin::Nft(table), now)).collect();
        let steps = self.backends.update(changes);
        let stamps = heard.task.and_then(|task| self.stamps_of(task));
        self.report(steps, heard.at, heard.uncertainty(stamps)).await;
        self.report_status().await;
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
        let until = clock::now();
        self.send(Update::Blind(Blindness { from, until, source: "netfilter messages" })).await;
        let steps = self.backends.replace(reached);
        self.report(steps, until, until.since(from)).await;
        self.report_status().await;
        Ok(())
    }

    /// When the kernel began the latest commits of a thread, where a hook tells.
    fn stamps_of(&self, task: u32) -> Option<CommitStamps> {
        self.commit_stamps.as_ref()?.0(task)
    }

    /// Reads all `nf_tables` rules, as they are after a commit that may have happened meanwhile.
    async fn dump(&mut self) -> anyhow::Result<Follow> {
        loop {
            let dumper = Dumper::open()?;
            let counters = self.counters.clone();
            let answer = spawn_blocking(move || dumper.dump(&counters));
            match answer.await.context("read all nf_tables rules")? {
                Ok(mut follow) => {
                    if self.catch_up(&mut follow).await? {
                        return Ok(follow);
                    }
                }
                Err(Fault::Absent) => {
                    debug!("this kernel has no nf_tables");
                    return Ok(Follow::default());
                }
                Err(Fault::Changed | Fault::Missing) => sleep(DUMP_PAUSE).await,
                Err(Fault::Unknown) => bail!("the kernel cannot be asked for its nf_tables rules"),
                Err(Fault::Other(error)) => return Err(error),
            }
        }
    }

    /// Takes in the commits during a dump; false when one was missed.
    async fn catch_up(&mut self, follow: &mut Follow) -> anyhow::Result<bool> {
        while !follow.is_whole() {
            let arrival = self.next().await?;
            if take(follow, &arrival, &self.counters, &mut Vec::new()).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn all_nft(&self) -> Vec<(Origin, Reached)> {
        let ruleset = self.nft.ruleset();
        let tables = ruleset.tables().map(|(table, _)| table);
        let tables = tables.filter(|table| self.detector.follows(table));
        tables.map(|table| (Origin::Nft(table.clone()), ruleset.reached(table))).collect()
    }

    /// Takes a signal in; [`Self::take_ahead`] works on it.
    pub(super) fn note_signal(&mut self, signal: CommitSignal) {
        self.ahead.push_back(signal);
    }

    /// Whether signals wait for [`Self::take_ahead`].
    pub(super) fn has_ahead(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Reads the table that the next signal asks for. One signal at a time: while a table changes
    /// without end, the others have to be followed too.
    pub(super) async fn take_ahead(&mut self, signals: &mut Receiver<CommitSignal>) {
        match self.ahead.pop_front() {
            Some(CommitSignal::Missed { from, .. }) => {
                for table in self.silent.all() {
                    self.silent.unread(table, from);
                }
                self.read_unread().await;
            }
            Some(CommitSignal::Look { at, table }) => self.look(at, table).await,
            Some(CommitSignal::Commit(commit)) => {
                self.counters.commits.increase();
                self.take_commit(commit, signals).await;
            }
            None => {}
        }
    }

    /// Reads the table after a commit to it; the commits ahead that the reading shows too are taken
    /// out of there.
    async fn take_commit(&mut self, commit: Commit, signals: &mut Receiver<CommitSignal>) {
        let table = commit.table;
        if self.silent.is_unread(table) {
            self.read_unread().await;
            return;
        }
        let (reading, begun, ended) = self.read_between_commits(&commit, signals).await;
        let shown = commits_shown(&mut self.ahead, commit, begun);
        if let Some(reading) = reading {
            let commits = Commits::new(shown, reading.call, ended);
            self.replace(table, reading, |backend| commits.when(backend)).await;
        } else {
            let begun = shown.iter().map(|commit| commit.begun(Duration::ZERO)).min();
            self.silent.unread(table, begun.unwrap_or(commit.at));
        }
    }

    /// Reads a table whose commits nothing tells of: what changed did so since the last look.
    async fn look(&mut self, asked: BootNs, table: SilentTable) {
        let before = self.silent.read_at(table).unwrap_or(asked);
        if before > asked {
            return;
        }
        if self.silent.is_unread(table) {
            self.read_unread().await;
        } else if let Some(reading) = self.silent.read_unannounced(table).await {
            let at = clock::now();
            self.replace(table, reading, |_| (at, at.since(before))).await;
        } else {
            self.silent.unread(table, before);
        }
    }

    /// Reads a table such that no commit to it falls into the reading, for whether its outcome was
    /// read could then not be told: not `commit`, nor a later one. Gives when the reading began,
    /// everything up to which it shows, and when it ended.
    async fn read_between_commits(
        &mut self,
        commit: &Commit,
        signals: &mut Receiver<CommitSignal>,
    ) -> (Option<Reading>, BootNs, BootNs) {
        let table = commit.table;
        let (mut settled, mut begun, mut ended) = (commit.settled(), commit.at, commit.at);
        for _ in 0..ATTEMPTS {
            sleep(settled.since(clock::now())).await;
            begun = clock::now();
            let reading = self.silent.read(table).await;
            ended = clock::now();
            sleep(SETTLE).await;
            self.ahead.extend(std::iter::from_fn(|| signals.try_recv().ok()));
            let call = reading.as_ref().map_or(Duration::ZERO, |reading| reading.call);
            let torn = self.ahead.iter().filter_map(|signal| match signal {
                CommitSignal::Commit(commit)
                    if commit.table == table && commit.may_fall_into(begun, ended, call) =>
                {
                    Some(commit.settled())
                }
                _ => None,
            });
            match torn.max() {
                Some(last) => settled = last,
                None => return (reading, begun, ended),
            }
        }
        self.counters.table_failures.increase();
        (None, begun, ended)
    }

    /// Whether a table could not be read: what it holds is not known until
    /// [`Self::read_unread`] succeeds.
    pub(super) fn has_unread(&self) -> bool {
        self.silent.has_unread()
    }

    /// Reads the tables that are unknown. One that cannot be read stays so, and the time until now
    /// is blind all the same: a termination may end before the table can be read. Waits for the
    /// commits that may follow the latest one and are not told: nothing else would have them read.
    pub(super) async fn read_unread(&mut self) {
        for (table, from) in self.silent.all_unread() {
            sleep(table.window()).await;
            let reading = self.silent.read(table).await;
            let until = clock::now();
            let source = "commits of a table";
            self.send(Update::Blind(Blindness { from, until, source })).await;
            match reading {
                Some(reading) => {
                    self.replace(table, reading, |_| (until, until.since(from))).await;
                }
                None => self.report_status().await,
            }
        }
    }

    /// Takes what a table holds now; `when` says of a backend when it changed, and how much earlier
    /// that may have been.
    async fn replace(
        &mut self,
        table: SilentTable,
        reading: Reading,
        when: impl Fn(&Backend) -> (BootNs, Duration),
    ) {
        let steps = self.backends.replace(vec![(Origin::Silent(table), reading.reached)]);
        for (backend, step) in steps {
            let (at, uncertainty) = when(&backend);
            self.send(Update::Change(BackendChange { at, uncertainty, backend, step })).await;
        }
        self.report_status().await;
    }

    async fn report(&self, steps: Vec<(Backend, BackendStep)>, at: BootNs, uncertainty: Duration) {
        for (backend, step) in steps {
            self.send(Update::Change(BackendChange { at, uncertainty, backend, step })).await;
        }
    }

    /// Within a commit its end is awaited: a table may be gone that it makes anew.
    async fn report_status(&mut self) {
        if self.nft.is_within_a_commit() {
            return;
        }
        let (in_use, unreadable) = (self.silent.in_use(), self.silent.unreadable());
        let rules = self.nft.ruleset();
        if let Some(status) = self.detector.status(rules, in_use, unreadable, &self.backends) {
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

/// Takes an arrival into the model; gives the commits that it completes.
fn take(
    nft: &mut Follow,
    arrival: &Arrival,
    counters: &Counters,
    commits: &mut Vec<NftCommit>,
) -> Result<(), Lost> {
    let Some(datagram) = &arrival.datagram else {
        counters.overruns.increase();
        return Err(Lost);
    };
    let taken = nft.take(datagram, (arrival.earliest, arrival.read_at), counters, commits);
    taken.inspect_err(|Lost| counters.gaps.increase())
}

/// `commit` and the other commits to its table up to `read_at`, whose outcome was read already:
/// those are taken out of `ahead`.
fn commits_shown(
    ahead: &mut VecDeque<CommitSignal>,
    commit: Commit,
    read_at: BootNs,
) -> Vec<Commit> {
    let mut shown = vec![commit];
    ahead.retain(|signal| match signal {
        CommitSignal::Commit(other)
            if other.table == commit.table && other.settled() <= read_at =>
        {
            shown.push(*other);
            false
        }
        _ => true,
    });
    shown
}
