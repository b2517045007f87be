//! A follower in the guest, with or without the kernel's hook for commits, and what it tells.

use std::sync::Arc;
use std::time::Duration;

use observer::clock;
use observer::dataplane::{self, Commit, CommitSignal, Counters, SilentTable, Update};
use observer::facts::{Backend, BackendChange, BackendStep, BootNs};
use observer::kernel::addresses::Addresses;
use observer::kernel::probes::Signal;
use observer::kernel::{self, Probes, Started};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::machine::hierarchy;

/// Far more than an emulated guest needs; it ends a wait that would never end.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// `service protocol address port`
pub(crate) fn shown(backend: &Backend) -> String {
    let service = backend.service.as_ref().map_or("-".to_owned(), ToString::to_string);
    format!("{service} {:?} {} {}", backend.protocol, backend.address, backend.port)
}

/// What runs and what it says.
pub(crate) struct Running {
    _hooked: Option<Hooked>,
    signals: Sender<CommitSignal>,
    updates: Receiver<Update>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) present: Vec<String>,
}

impl Running {
    /// Follows this namespace, by the kernel's hook if one is given.
    pub(crate) async fn start(hook: Option<&'static Signal>) -> Self {
        let (signals, commits) = channel(1024);
        let hooked = hook.map(|hook| Hooked::start(hook, signals.clone()));
        let settings = dataplane::Settings::default();
        let counters = settings.counters.clone();
        let (sender, mut updates) = channel(1024);
        tokio::spawn(dataplane::run(settings, commits, sender));
        let first = updates.recv().await;
        let Some(Update::Present { backends, .. }) = first else { panic!("first came {first:?}") };
        let present = backends.iter().map(shown).collect();
        Self { _hooked: hooked, signals, updates, counters, present }
    }

    /// The next `count` changes, by backend; anything blind fails.
    pub(crate) async fn changes(&mut self, count: usize) -> Vec<BackendChange> {
        let mut changes = Vec::new();
        while changes.len() < count {
            let update = tokio::time::timeout(PATIENCE, self.updates.recv()).await;
            let update = update.unwrap_or_else(|_| panic!("only {changes:?}"));
            match update.expect("it still runs") {
                Update::Change(change) => changes.push(change),
                Update::Status(_) => {}
                other => panic!("{other:?}"),
            }
        }
        changes.sort_by(|one, other| one.backend.cmp(&other.backend));
        changes
    }

    /// Runs `write`, which has to make these steps, within the run.
    pub(crate) async fn expect(
        &mut self,
        write: impl FnOnce(),
        steps: &[(&str, BackendStep)],
    ) -> Vec<BackendChange> {
        let before = clock::now();
        write();
        let after = clock::now();
        let changes = self.changes(steps.len()).await;
        let seen: Vec<_> =
            changes.iter().map(|change| (shown(&change.backend), change.step)).collect();
        let expected: Vec<_> =
            steps.iter().map(|(backend, step)| ((*backend).to_owned(), *step)).collect();
        assert_eq!(seen, expected);
        for change in &changes {
            let from = change.at.minus(change.uncertainty);
            assert!(before <= from && change.at <= after, "{before:?} {change:?} {after:?}");
        }
        changes
    }

    /// Asks for a look, and returns when.
    pub(crate) async fn look(&self, table: SilentTable) -> BootNs {
        let at = clock::now();
        let look = CommitSignal::Look { at, table };
        self.signals.send(look).await.expect("it still runs");
        at
    }
}

/// The kernel side: its programs, and the maps without which they cannot be loaded again.
pub(crate) struct Hooked {
    hook: &'static Signal,
    probes: Probes,
    _maps: (kernel::counters::Counters, Addresses),
}

impl Hooked {
    /// Attaches the hook and has what it tells passed on.
    pub(crate) fn start(hook: &'static Signal, signals: Sender<CommitSignal>) -> Self {
        let started = kernel::start(hierarchy());
        let Started { probes, events, counters, addresses, .. } = started.expect("the kernel side");
        let (sender, mut told) = channel(1024);
        tokio::spawn(events.run(sender));
        tokio::spawn(async move {
            while let Some(event) = told.recv().await {
                for commit in Commit::told_by(&event) {
                    signals.send(CommitSignal::Commit(commit)).await.expect("it still runs");
                }
            }
        });
        let mut hooked = Self { hook, probes, _maps: (counters, addresses) };
        hooked.attach();
        hooked
    }

    pub(crate) fn attach(&mut self) {
        let state = self.probes.watch(self.hook, true).expect("attach").expect("asked for");
        assert_eq!((state.method, &state.problem), (Some("kprobe"), &None));
    }

    pub(crate) fn detach(&mut self) {
        self.probes.watch(self.hook, false).expect("detach");
    }
}
