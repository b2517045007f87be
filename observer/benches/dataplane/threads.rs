//! What threads cost, as the kernel's scheduler counts it (`/proc/…/schedstat`, first field, ns).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// How long threads have to be asleep without a slice in between to count as at rest.
const REST: Duration = Duration::from_millis(2);

/// Some threads, and their CPU time in ns when last seen.
#[derive(Default)]
pub(crate) struct Threads {
    cpu_ns: BTreeMap<PathBuf, u64>,
}

impl Threads {
    /// This process's threads now.
    pub(crate) fn of_this_process() -> Result<Self> {
        let tasks = fs::read_dir("/proc/self/task").context("list this process's threads")?;
        let paths = tasks.map(|task| Ok((task?.path(), 0))).collect::<Result<_>>()?;
        Ok(Self { cpu_ns: paths })
    }

    /// The main thread of another process.
    pub(crate) fn of_process(pid: u32) -> Self {
        Self { cpu_ns: BTreeMap::from([(format!("/proc/{pid}").into(), 0)]) }
    }

    /// Without those that `other` has too.
    pub(crate) fn without(mut self, other: &Self) -> Self {
        self.cpu_ns.retain(|path, _| !other.cpu_ns.contains_key(path));
        self
    }

    /// Waits until all of them sleep; gives the CPU time they used so far. One that ended keeps
    /// what it had.
    pub(crate) fn cpu_at_rest(&mut self) -> Duration {
        loop {
            let before = self.cpu();
            let asleep = self.cpu_ns.keys().all(|path| is_asleep(path));
            sleep(REST);
            if asleep && self.cpu() == before {
                return before;
            }
        }
    }

    fn cpu(&mut self) -> Duration {
        for (path, cpu_ns) in &mut self.cpu_ns {
            let schedstat = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
            let used = schedstat.split_ascii_whitespace().next().and_then(|ns| ns.parse().ok());
            *cpu_ns = used.unwrap_or(*cpu_ns);
        }
        Duration::from_nanos(self.cpu_ns.values().sum())
    }
}

/// Sleeping, or gone.
fn is_asleep(path: &std::path::Path) -> bool {
    let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().and_then(|after| after.trim_start().chars().next());
    matches!(state, Some('S' | 'Z') | None)
}
