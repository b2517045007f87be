//! When commits to `nf_tables` began, on kernels with kprobes.

use anyhow::Context as _;
use aya::maps::{HashMap, Map, MapData};

use crate::dataplane::nft::follow::CommitStamps;
use crate::facts::BootNs;

/// Reads the stamps that the program at `nf_tables_commit` takes.
pub struct Commits {
    task_to_commits: HashMap<MapData, u32, [u64; 2]>,
}

impl Commits {
    /// Takes its map out of the loaded object.
    pub(super) fn new(take: &mut impl FnMut(&str) -> anyhow::Result<Map>) -> anyhow::Result<Self> {
        let map = take("TASK_TO_COMMITS")?;
        let task_to_commits =
            HashMap::try_from(map).context("TASK_TO_COMMITS is of another type")?;
        Ok(Self { task_to_commits })
    }

    /// When the kernel began the latest commits on behalf of a thread (its id in the root pid
    /// namespace) in the agent's network namespace; `None` when it is not known to have made one.
    #[must_use]
    pub fn of(&self, task: u32) -> Option<CommitStamps> {
        let [latest, before] = self.task_to_commits.get(&task, 0).ok()?;
        Some(CommitStamps {
            latest: BootNs(latest),
            before: (before != 0).then_some(BootNs(before)),
        })
    }
}
