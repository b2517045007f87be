//! What was passed over, lost and done again, as plain counters that the metrics read.

use std::sync::atomic::{AtomicU64, Ordering};

/// One cumulative counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(super) fn increase(&self) {
        self.add(1);
    }

    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }
}

/// All counters of the dataplane, since the observer started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Commits that were seen, of any dataplane, whether or not they changed a backend.
    pub commits: Counter,
    /// Netlink messages and legacy tables that are not what the kernel writes.
    pub malformed: Counter,
    /// Rule expressions that are not known. Their rules are read without them.
    pub unknown_expressions: Counter,
    /// Times the kernel dropped notifications because they were not read fast enough.
    pub overruns: Counter,
    /// Times a commit's number or content showed that an earlier one was missed.
    pub gaps: Counter,
    /// Full reads of the rules after a loss.
    pub resyncs: Counter,
    /// Full reads given up because the rules changed meanwhile, and tried again.
    pub interrupted_reads: Counter,
    /// Reads of tables that do not announce their changes.
    pub table_reads: Counter,
    /// Such tables that could not be read, or not between two commits.
    pub table_failures: Counter,
}
