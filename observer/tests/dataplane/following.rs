//! The whole follower, at work in a test's namespace: what it reports, and what that adds up to.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use observer::clock;
use observer::dataplane::{
    Commit, CommitSignal, Counters, Family, Settings, SilentTable, Status, Update, run,
};
use observer::facts::{Backend, BackendChange, BackendStep, Blindness, BootNs};
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::namespace::{MARKERS, in_namespace, nft, shown};

/// Nothing here takes longer; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for all that any test commits.
pub(crate) const ROOMY_BYTES: usize = 16 << 20;

/// A follower that runs in this namespace.
pub(crate) struct Running {
    updates: Receiver<Update>,
    signals: Sender<CommitSignal>,
    pub(crate) counters: Arc<Counters>,
    markers: u8,
    pub(crate) status: Status,
    /// What was present, and every change since.
    backends: BTreeSet<Backend>,
}

/// What was reported between two moments.
#[derive(Debug, Default)]
pub(crate) struct Reported {
    pub(crate) added: Vec<BackendChange>,
    pub(crate) removed: Vec<BackendChange>,
    pub(crate) blind: Vec<Blindness>,
}

impl Reported {
    pub(crate) fn added(&self) -> BTreeSet<String> {
        shown(self.added.iter().map(|change| &change.backend))
    }

    pub(crate) fn removed(&self) -> BTreeSet<String> {
        shown(self.removed.iter().map(|change| &change.backend))
    }

    fn take(&mut self, update: Update) {
        match update {
            Update::Change(change) => match change.step {
                BackendStep::Added => self.added.push(change),
                BackendStep::Removed => self.removed.push(change),
                BackendStep::Draining => panic!("rules do not drain: {change:?}"),
            },
            Update::Blind(blind) => self.blind.push(blind),
            Update::Present { .. } | Update::Status(_) => {}
        }
    }
}

fn is_marker(backend: &Backend) -> bool {
    backend.address.to_string().starts_with(MARKERS)
}

impl Running {
    /// Starts it; gives what was present.
    pub(crate) async fn start(receive_buffer_bytes: usize) -> (Self, BTreeSet<String>) {
        let counters = Arc::new(Counters::default());
        let settings =
            Settings { receive_buffer_bytes, counters: counters.clone(), ..Settings::default() };
        let (signals, received) = mpsc::channel(16);
        let (sender, updates) = mpsc::channel(1024);
        tokio::spawn(async move {
            run(settings, received, sender).await.expect("follow the rules");
        });
        let (status, backends) = (Status::default(), BTreeSet::new());
        let mut running = Self { updates, signals, counters, markers: 0, status, backends };
        let Update::Present { .. } = running.next().await else {
            panic!("what is present comes first")
        };
        let present = running.backends();
        (running, present)
    }

    /// Tells it of a commit to a legacy table, as the kernel program does.
    pub(crate) async fn legacy_committed(&self, at: BootNs, family: Family) {
        self.signals
            .send(CommitSignal::Commit(Commit::new(at, SilentTable::Legacy(family))))
            .await
            .expect("it still runs");
    }

    /// Tells it of commits to a legacy table, always of some more before it has read one's outcome.
    pub(crate) fn legacy_commits_without_end(&self) {
        let (signals, start) = (self.signals.clone(), clock::now());
        tokio::spawn(async move {
            for step in 0.. {
                let at = start.plus(Duration::from_millis(5) * step);
                let commit = Commit::new(at, SilentTable::Legacy(Family::V4));
                if signals.send(CommitSignal::Commit(commit)).await.is_err() {
                    return;
                }
            }
        });
    }

    /// Tells it that commits to legacy tables may have gone unnoticed.
    pub(crate) async fn legacy_missed(&self, from: BootNs, until: BootNs) {
        self.signals.send(CommitSignal::Missed { from, until }).await.expect("it still runs");
    }

    pub(crate) async fn next(&mut self) -> Update {
        let update = tokio::time::timeout(PATIENCE, self.updates.recv()).await;
        let update = update.expect("an update in time").expect("it still runs");
        self.fold(&update);
        update
    }

    fn fold(&mut self, update: &Update) {
        match update {
            Update::Present { backends, .. } => self.backends.extend(backends.iter().cloned()),
            Update::Change(BackendChange { backend, step: BackendStep::Added, .. }) => {
                assert!(self.backends.insert(backend.clone()), "added twice: {backend:?}");
            }
            Update::Change(BackendChange { backend, step: BackendStep::Removed, .. }) => {
                assert!(self.backends.remove(backend), "removed before it was there: {backend:?}");
            }
            Update::Change(change) => panic!("rules do not drain: {change:?}"),
            Update::Status(status) => self.status = status.clone(),
            Update::Blind(_) => {}
        }
    }

    /// Every backend there is by what was reported so far, as [`shown`], without our markers.
    pub(crate) fn backends(&self) -> BTreeSet<String> {
        shown(self.backends.iter().filter(|backend| !is_marker(backend)))
    }

    /// Everything reported up to now: a table of our own adds a backend that marks the end.
    pub(crate) async fn reported(&mut self) -> Reported {
        self.markers += 1;
        let marker = format!("{MARKERS}{}", self.markers);
        nft(&format!(
            "add table ip marker; delete table ip marker; add table ip marker
            add chain ip marker c {{ type nat hook prerouting priority 0; }}
            add rule ip marker c meta l4proto tcp dnat to {marker}:1"
        ));
        let mut reported = Reported::default();
        loop {
            match self.next().await {
                Update::Change(change) if change.backend.address.to_string() == marker => {
                    // The marker before this one went with the same commit, perhaps after it.
                    return reported;
                }
                Update::Change(change) if is_marker(&change.backend) => {}
                update => reported.take(update),
            }
        }
    }

    /// Waits for updates until one satisfies `last`.
    pub(crate) async fn until(&mut self, last: impl Fn(&Update) -> bool) -> Reported {
        let mut reported = Reported::default();
        loop {
            let update = self.next().await;
            let end = last(&update);
            reported.take(update);
            if end {
                return reported;
            }
        }
    }

    /// Waits until what was reported adds up to `wanted`, and then for everything reported up to
    /// now. For legacy tables, whose commits are read some time after they are signalled.
    pub(crate) async fn until_backends(&mut self, wanted: &BTreeSet<String>) -> Reported {
        let mut reported = Reported::default();
        while self.backends() != *wanted {
            let update = tokio::time::timeout(PATIENCE, self.updates.recv()).await;
            let Ok(Some(update)) = update else {
                panic!("reported {:?}, which should be {wanted:?}", self.backends())
            };
            self.fold(&update);
            if !matches!(&update, Update::Change(change) if is_marker(&change.backend)) {
                reported.take(update);
            }
        }
        let more = self.reported().await;
        reported.added.extend(more.added);
        reported.removed.extend(more.removed);
        reported.blind.extend(more.blind);
        reported
    }
}

/// The follower has a thread of its own.
pub(crate) fn in_runtime<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    in_namespace(move || run_in_runtime(test));
}

/// Runs `test` in this thread's namespace, and what it spawns on one more thread.
pub(crate) fn run_in_runtime<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).enable_all().build().expect("build a runtime");
    runtime.block_on(test());
}
