//! What a person would use instead: `nft monitor`, or listing all rules again and searching them.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};
use observer::clock;
use observer::facts::BootNs;

use crate::followed::Sample;
use crate::place::{Cost, Place};
use crate::threads::Threads;
use crate::witness::Witness;

/// Nothing here takes longer; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_mins(1);
/// How `nft monitor` ends a commit.
const END_OF_COMMIT: &[u8] = b"# new generation";

/// A running `nft monitor`.
pub(crate) struct Monitor {
    child: Child,
    commits: Receiver<BootNs>,
    threads: Threads,
    witness: Witness,
}

impl Monitor {
    /// Starts it in a place and waits until it listens.
    pub(crate) fn start(place: &Place, first_commit: impl FnOnce() -> Result<()>) -> Result<Self> {
        place.enter()?;
        let witness = Witness::start()?;
        let mut child = place.tool(&["nft", "monitor"]).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("nft monitor has no output")?;
        let (sender, commits) = sync_channel(1024);
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if line.starts_with(END_OF_COMMIT) && sender.send(clock::now()).is_err() {
                    return;
                }
            }
        });
        let threads = Threads::of_process(child.id());
        let mut monitor = Self { child, commits, threads, witness };
        monitor.threads.cpu_at_rest();
        first_commit()?;
        monitor.commits.recv_timeout(PATIENCE).context("nft monitor shows no commit")?;
        Ok(monitor)
    }

    /// Runs `commit` and waits until it is shown.
    pub(crate) fn measure(&mut self, commit: impl FnOnce() -> Result<()>) -> Result<Sample> {
        let cpu_before = self.threads.cpu_at_rest();
        self.witness.forget();
        commit()?;
        let shown_at = self.commits.recv_timeout(PATIENCE).context("nft monitor is silent")?;
        let cpu = self.threads.cpu_at_rest().saturating_sub(cpu_before);
        Ok(Sample { known_after: shown_at.since(self.witness.delivered_at()?), cpu })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}

/// Lists all rules and counts the words that send to a backend, as the least that finding a change
/// takes. `None` when the listing took too long.
pub(crate) fn list(
    place: &Place,
    words: &[&str],
    mark: &str,
    expected: usize,
) -> Result<Option<Cost>> {
    let Some((printed, mut cost)) = place.print(words)? else { return Ok(None) };
    let (began, cpu_before) = (clock::now(), thread_cpu()?);
    let found = String::from_utf8_lossy(&printed).matches(mark).count();
    ensure!(found == expected, "{} shows {found} of {expected} {mark}", words.join(" "));
    cost.elapsed += clock::now().since(began);
    cost.cpu += thread_cpu()?.saturating_sub(cpu_before);
    Ok(Some(cost))
}

/// What this thread used in the kernel so far; the kernel samples it.
pub(crate) fn thread_cpu_in_kernel() -> Result<Duration> {
    let time = getrusage(UsageWho::RUSAGE_THREAD)?.system_time();
    Ok(Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or_default()))
}

/// What this thread used so far.
pub(crate) fn thread_cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
