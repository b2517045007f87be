//! Legacy iptables: attaches the hook for its commits while such tables exist, and tells the
//! dataplane's reader of commits and of spans in which one may have been missed.
//!
//! The hook runs at every system call of the machine, so it is attached only while it is needed.

use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::clock;
use crate::dataplane::{Family, LegacySignal, legacy_tables_in_use};
use crate::facts::BootNs;
use crate::kernel::Probes;
use crate::kernel::probes::LEGACY_COMMIT;
use crate::metrics::Metrics;
use crate::readiness::Item;

/// Commits to legacy tables, on their way to the dataplane's reader.
pub(super) struct LegacyCommits {
    signals: mpsc::Sender<LegacySignal>,
    /// Ready while no legacy tables exist or their commits are seen.
    readiness: Item,
    attached: bool,
    /// The last moment when no legacy tables existed, or the start.
    absent_at: BootNs,
    /// Since when commits may have gone unreported.
    missed_from: Option<BootNs>,
}

impl LegacyCommits {
    /// Attaches the hook at once if it is needed: the dataplane's reader starts later and reads
    /// every table then, so nothing before that counts as missed.
    ///
    /// # Errors
    /// When the hook cannot be detached.
    pub(super) fn start(
        signals: mpsc::Sender<LegacySignal>,
        readiness: Item,
        probes: &mut Probes,
        metrics: &Metrics,
    ) -> anyhow::Result<Self> {
        let attached = legacy_tables_in_use();
        let this =
            Self { signals, readiness, attached, absent_at: clock::now(), missed_from: None };
        probes.watch_legacy_commits(attached)?;
        this.show(probes, metrics);
        Ok(this)
    }

    /// A commit was seen. Where it cannot be passed on at once it becomes a missed span.
    pub(super) fn committed(&mut self, at: BootNs, family: u32) {
        let family = if family == 4 { Family::V4 } else { Family::V6 };
        if self.signals.try_send(LegacySignal::Commit { at, family }).is_err() {
            self.missed_since(at);
        }
    }

    /// Commits since `from` may have gone unreported.
    pub(super) fn missed_since(&mut self, from: BootNs) {
        if self.attached {
            self.missed_from = Some(self.missed_from.map_or(from, |earlier| earlier.min(from)));
        }
    }

    /// Attaches or detaches the hook as tables come and go, and reports a missed span.
    ///
    /// # Errors
    /// When the hook cannot be detached.
    pub(super) fn tick(
        &mut self,
        now: BootNs,
        probes: &mut Probes,
        metrics: &Metrics,
    ) -> anyhow::Result<()> {
        let in_use = legacy_tables_in_use();
        if in_use != self.attached {
            probes.watch_legacy_commits(in_use)?;
            self.attached = in_use;
            self.show(probes, metrics);
            if in_use {
                self.missed_since(self.absent_at);
            }
        }
        if !in_use {
            self.absent_at = now;
        }
        if let Some(from) = self.missed_from
            && self.signals.try_send(LegacySignal::Missed { from, until: now }).is_ok()
        {
            self.missed_from = None;
        }
        Ok(())
    }

    fn show(&self, probes: &Probes, metrics: &Metrics) {
        let probe = probes.states().iter().find(|probe| probe.signal == LEGACY_COMMIT.name);
        metrics.set_probe(LEGACY_COMMIT.name, probe.and_then(|probe| probe.method));
        if let Some(problem) = probe.and_then(|probe| probe.problem.as_ref()) {
            warn!(problem, "commits to legacy iptables are not seen");
            self.readiness.down(problem);
        } else {
            info!(attached = self.attached, "legacy iptables");
            self.readiness.up();
        }
    }
}
