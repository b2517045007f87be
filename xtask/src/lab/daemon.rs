//! A program that runs in a namespace until it is dropped, with its output in a file.
//!
//! It also ends when this process is killed: nothing is left running that nobody waits for.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::clock;
use super::leftovers::making;
use super::netns::Namespace;

/// How much of a log an error shows: the last words before it ended or got stuck.
const SHOWN_LINES: usize = 30;
/// `USER_HZ`, the unit of times in /proc, is 100 on every architecture that Linux runs the observer
/// on.
const TICK_MS: u64 = 10;
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Where clients' libraries look for a proxy: from inside the namespaces none can be reached.
const PROXIES: [&str; 6] =
    ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    /// Dropped last: the thread that started the program ends.
    _alive: SyncSender<()>,
}

impl Daemon {
    /// The command that starts `program`, for the caller to give it arguments. `on_death` is what
    /// the program gets when this process dies first.
    pub(crate) fn command(program: &Path, on_death: Signal) -> Command {
        let mut command = without_proxy(Path::new("setpriv"));
        command.args(["--pdeathsig", on_death.as_str().trim_start_matches("SIG"), "--"]);
        command.arg(program);
        command
    }

    /// Starts it; `name` is what errors call it.
    pub(crate) fn start(
        name: &str,
        namespace: &Namespace,
        mut command: Command,
        log: PathBuf,
    ) -> Result<Self> {
        let output =
            File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        command.process_group(0);
        let (child, alive) =
            spawn_bound(namespace, command).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log, _alive: alive })
    }

    /// Asks `ready` again and again until it agrees.
    ///
    /// # Errors
    /// When the program ends, or the time does: the error has the end of its log.
    pub(crate) fn wait_until(
        &mut self,
        limit: Duration,
        ready: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let until_ns = clock::boot_ns() + clock::nanos(limit);
        loop {
            let Err(error) = ready() else { return Ok(()) };
            let name = &self.name;
            if let Some(status) = self.child.try_wait()? {
                bail!("{name} ended with {status}:\n{}", self.last_lines());
            }
            if clock::boot_ns() > until_ns {
                bail!("{name} is not ready: {error:#}\n{}", self.last_lines());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// How long all its threads together have been on a processor.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .with_context(|| format!("{} has ended", self.name))?;
        // After the name, which is in parentheses: the state is field 3, utime 14, stime 15.
        let (_, fields) = stat.rsplit_once(')').context("/proc/<pid>/stat has no name")?;
        let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
        let ticks = ticks.sum::<Result<u64, _>>()?;
        Ok(Duration::from_millis(ticks * TICK_MS))
    }

    fn last_lines(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }

    /// Ends it by SIGTERM.
    ///
    /// # Errors
    /// When it does not end in time or not with exit code 0.
    pub(crate) fn stop(mut self, limit: Duration) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        match self.wait_for_exit(limit)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.last_lines()),
            None => bail!("{} does not end by SIGTERM:\n{}", self.name, self.last_lines()),
        }
    }

    fn wait_for_exit(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until_ns = clock::boot_ns() + clock::nanos(limit);
        loop {
            let status = self.child.try_wait()?;
            if status.is_some() || clock::boot_ns() > until_ns {
                return Ok(status);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what they are for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Starts a program on a thread that lives until the sender is dropped or this process ends: that
/// thread's death is what `setpriv --pdeathsig` means.
fn spawn_bound(namespace: &Namespace, mut command: Command) -> Result<(Child, SyncSender<()>)> {
    let (started, child) = sync_channel(1);
    let (alive, ended) = sync_channel::<()>(0);
    let _making = making();
    namespace.thread(move || {
        // Nobody listens any more: then there is nothing to stay for either.
        if started.send(command.spawn()).is_ok() {
            ended.recv().ok();
        }
    });
    let child = child.recv().context("the thread that starts it cannot enter the namespace")??;
    Ok((child, alive))
}

/// A command that knows no proxy.
pub(crate) fn without_proxy(program: &Path) -> Command {
    let mut command = Command::new(program);
    for variable in PROXIES {
        command.env_remove(variable);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_of_this_machine_is_none_of_the_programs() {
        let command = Daemon::command(Path::new("observer"), Signal::SIGTERM);
        let removed = command.get_envs().filter(|(_, value)| value.is_none());
        assert_eq!(removed.count(), PROXIES.len());
        let arguments: Vec<_> = command.get_args().collect();
        assert_eq!(arguments, ["--pdeathsig", "TERM", "--", "observer"]);
    }
}
