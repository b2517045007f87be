//! Hooks for commits to tables that do not announce them: attached while such a table exists, for
//! most run at every system call of the machine. Tells the dataplane's reader of commits and of
//! spans in which one may have been missed.
//!
//! Where a hook cannot be attached the table is looked at instead, and only while a termination is
//! open: a change is then known as exactly as the looks are apart.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::clock;
use crate::dataplane::{
    Commit, CommitSignal, Dataplane, SilentTable, cilium, ipvs_in_use, legacy_tables_in_use,
};
use crate::facts::{BootNs, KernelEvent};
use crate::kernel::Probes;
use crate::kernel::probes::{IPVS_COMMIT, LEGACY_COMMIT, MAP_COMMIT, Signal};
use crate::kernel::watched::WatchedMaps;
use crate::metrics::Metrics;

/// How far apart looks at a table without a hook are, and so the uncertainty of what they find.
/// Far below the whole seconds of a preStop sleep.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// Its hook ends with the module, and is attached anew when [`CommitHooks::tick`] saw the module
/// gone. What is unloaded and loaded again between two ticks, with a service, is not followed any
/// more: no kube-proxy unloads it.
const IPVS: &[SilentTable] = &[SilentTable::Ipvs];

const CILIUM: &[SilentTable] = &[SilentTable::Cilium];

/// Cilium's maps, and the programs that are to tell of their changes.
pub(super) struct Maps {
    /// Where they are pinned.
    directory: PathBuf,
    watched: WatchedMaps,
    ids: BTreeSet<u32>,
}

impl Maps {
    pub(super) fn new(directory: PathBuf, watched: WatchedMaps) -> Self {
        Self { directory, watched, ids: BTreeSet::new() }
    }

    /// Has those watched that are pinned now; whether they are others than before.
    fn follow(&mut self) -> bool {
        let ids = cilium::map_ids(&self.directory);
        if ids == self.ids {
            return false;
        }
        match self.watched.set(&ids) {
            Ok(()) => self.ids = ids,
            Err(error) => warn!("changes of Cilium's maps are seen late: {error:#}"),
        }
        true
    }
}

/// A hook that tells of commits to some tables.
struct Hook {
    signal: &'static Signal,
    tables: &'static [SilentTable],
    /// Whether one of the tables exists.
    in_use: fn(&Maps) -> bool,
    wanted: bool,
    /// Whether it could be attached.
    attached: bool,
    /// The last moment when it was not needed, or the start.
    absent_at: BootNs,
}

/// All hooks, and the way to the dataplane's reader.
pub(super) struct CommitHooks {
    signals: mpsc::Sender<CommitSignal>,
    hooks: Vec<Hook>,
    maps: Maps,
    /// When they were looked for last.
    maps_at: BootNs,
    /// Since when commits may have gone unreported.
    missed_from: Option<BootNs>,
}

impl CommitHooks {
    /// Attaches those that are needed at once, of the `only` dataplane followed or of all: the
    /// dataplane's reader starts later and reads every table then, so nothing before that counts as
    /// missed.
    ///
    /// # Errors
    /// When a hook cannot be detached.
    pub(super) fn start(
        signals: mpsc::Sender<CommitSignal>,
        mut maps: Maps,
        only: Option<Dataplane>,
        probes: &mut Probes,
        metrics: &Metrics,
    ) -> anyhow::Result<Self> {
        let hook = |signal, tables, in_use| Hook {
            signal,
            tables,
            in_use,
            wanted: false,
            attached: false,
            absent_at: clock::now(),
        };
        let legacy_in_use: fn(&Maps) -> bool = |_| legacy_tables_in_use();
        let mut hooks = vec![
            hook(&LEGACY_COMMIT, &SilentTable::LEGACY, legacy_in_use),
            hook(&IPVS_COMMIT, IPVS, |_| ipvs_in_use()),
            hook(&MAP_COMMIT, CILIUM, |maps| !maps.ids.is_empty()),
        ];
        let is_followed = |table: &SilentTable| only.is_none_or(|only| table.dataplane() == only);
        hooks.retain(|hook| hook.tables.iter().any(is_followed));
        let maps_at = clock::now();
        maps.follow();
        for hook in &mut hooks {
            hook.want((hook.in_use)(&maps), probes, metrics)?;
        }
        Ok(Self { signals, hooks, maps, maps_at, missed_from: None })
    }

    /// A kernel event: a commit is passed on. Where that cannot be at once it becomes a missed
    /// span.
    pub(super) fn committed(&mut self, event: &KernelEvent) {
        for commit in Commit::told_by(event) {
            if self.signals.try_send(CommitSignal::Commit(commit)).is_err() {
                self.missed_since(event.at);
            }
        }
    }

    /// Commits since `from` may have gone unreported.
    pub(super) fn missed_since(&mut self, from: BootNs) {
        if self.hooks.iter().any(|hook| hook.wanted) {
            self.unread_since(from);
        }
    }

    fn unread_since(&mut self, from: BootNs) {
        self.missed_from = Some(self.missed_from.map_or(from, |earlier| earlier.min(from)));
    }

    /// Attaches or detaches hooks as tables come and go, and reports a missed span.
    ///
    /// # Errors
    /// When a hook cannot be detached.
    pub(super) fn tick(
        &mut self,
        now: BootNs,
        probes: &mut Probes,
        metrics: &Metrics,
    ) -> anyhow::Result<()> {
        let mut missed = Vec::new();
        if self.maps.follow() {
            missed.push(self.maps_at);
        }
        self.maps_at = now;
        for hook in &mut self.hooks {
            let in_use = (hook.in_use)(&self.maps);
            if in_use != hook.wanted {
                hook.want(in_use, probes, metrics)?;
                if in_use {
                    missed.push(hook.absent_at);
                }
            }
            if !in_use {
                hook.absent_at = now;
            }
        }
        for from in missed {
            self.unread_since(from);
        }
        if let Some(from) = self.missed_from
            && self.signals.try_send(CommitSignal::Missed { from, until: now }).is_ok()
        {
            self.missed_from = None;
        }
        Ok(())
    }

    /// Whether nothing tells of the commits of some table.
    pub(super) fn lack_one(&self) -> bool {
        self.lacking().next().is_some()
    }

    fn lacking(&self) -> impl Iterator<Item = &Hook> {
        self.hooks.iter().filter(|hook| hook.wanted && !hook.attached)
    }

    /// Has the tables looked at whose commits nothing tells of. One look more or less does not
    /// matter, so a full queue is no loss.
    pub(super) fn look(&self, now: BootNs) {
        for hook in self.lacking() {
            for table in hook.tables {
                let _full = self.signals.try_send(CommitSignal::Look { at: now, table: *table });
            }
        }
    }
}

impl Hook {
    fn want(&mut self, wanted: bool, probes: &mut Probes, metrics: &Metrics) -> anyhow::Result<()> {
        let probe = probes.watch(self.signal, wanted)?;
        self.wanted = wanted;
        self.attached = probe.is_some_and(|probe| probe.method.is_some());
        metrics.set_probe(self.signal.name, probe.and_then(|probe| probe.method));
        let signal = self.signal.name;
        if let Some(problem) = probe.and_then(|probe| probe.problem.as_ref()) {
            warn!(signal, problem, "no hook for commits: looking every {LOOK:?} while a pod ends");
        } else {
            info!(signal, attached = self.attached, "hook for commits");
        }
        Ok(())
    }
}
