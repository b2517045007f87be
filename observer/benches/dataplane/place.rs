//! A network namespace of the bench's own, and the real tools in it.
//!
//! The main thread moves between places; what it starts stays where it was started. A place goes
//! when its last thread, process and file do.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike as _};
use observer::clock;

/// How long a listing may take: iptables-nft-save was seen to need minutes for 10,000 Services.
pub(crate) const LISTING: Duration = Duration::from_secs(15);
/// What `timeout` ends with then.
const TIMED_OUT: i32 = 124;

/// A network namespace.
pub(crate) struct Place {
    namespace: File,
    /// The machine's own lock of the iptables programs is not this namespace's business.
    lock: tempfile::NamedTempFile,
}

/// What a run of a tool took.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) elapsed: Duration,
    /// User and system time.
    pub(crate) cpu: Duration,
}

impl Place {
    /// A new one; this thread is in it afterwards.
    pub(crate) fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET)
            .context("make a network namespace: run the bench as root")?;
        let namespace = File::open("/proc/thread-self/ns/net").context("keep the namespace")?;
        let lock = tempfile::NamedTempFile::new().context("make a file to lock")?;
        Ok(Self { namespace, lock })
    }

    /// Moves this thread here.
    pub(crate) fn enter(&self) -> Result<()> {
        setns(&self.namespace, CloneFlags::CLONE_NEWNET).context("enter a network namespace")
    }

    /// A tool that will run here, once this thread is here.
    pub(crate) fn tool(&self, words: &[&str]) -> Command {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("XTABLES_LOCKFILE", self.lock.path());
        command
    }

    /// Feeds `input` to a tool; it has to succeed.
    pub(crate) fn feed(&self, words: &[&str], input: &str) -> Result<()> {
        self.enter()?;
        let mut child =
            self.tool(words).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(
                || format!("start {} (apt-get install nftables iptables)", words[0]),
            )?;
        let written = child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output().context("wait for a tool")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} failed: {complaint}", words.join(" "));
        written.transpose().with_context(|| format!("write rules to {}", words[0]))?;
        Ok(())
    }

    /// Runs a tool that prints rules and reads what it prints; gives that and what the tool took.
    /// `None` when it was not done after [`LISTING`].
    pub(crate) fn print(&self, words: &[&str]) -> Result<Option<(Vec<u8>, Cost)>> {
        self.enter()?;
        let (began, cpu_before) = (clock::now(), children_cpu()?);
        let limit = LISTING.as_secs().to_string();
        let mut command = self.tool(&["timeout", &limit]);
        let mut child = command.args(words).stdout(Stdio::piped()).spawn().context("timeout")?;
        let mut printed = Vec::new();
        if let Some(mut stdout) = child.stdout.take() {
            stdout.read_to_end(&mut printed).context("read the rules")?;
        }
        let status = child.wait()?;
        if status.code() == Some(TIMED_OUT) {
            return Ok(None);
        }
        ensure!(status.success(), "{} failed", words.join(" "));
        let cpu = children_cpu()?.saturating_sub(cpu_before);
        Ok(Some((printed, Cost { elapsed: clock::now().since(began), cpu })))
    }
}

/// The CPU of all child processes that ended.
fn children_cpu() -> Result<Duration> {
    cpu_of(UsageWho::RUSAGE_CHILDREN)
}

/// The CPU of this process, its threads that ended included.
pub(crate) fn own_cpu() -> Result<Duration> {
    cpu_of(UsageWho::RUSAGE_SELF)
}

fn cpu_of(whose: UsageWho) -> Result<Duration> {
    let usage = getrusage(whose)?;
    let micros = |time: TimeVal| u64::try_from(time.num_microseconds()).unwrap_or_default();
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}
