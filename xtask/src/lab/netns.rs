//! Network namespaces: made by name, entered by a thread.
//!
//! A child started from a thread inherits that thread's network namespace and nothing else
//! changes: `ip netns exec` would also remount `/sys` and hide cgroups and BTF from the agent.
//! Names begin with `obs-<pid>-`, so that a later run can tell whose they are.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};

use super::command;
use super::leftovers::making;

/// Where `ip netns` keeps its names.
pub(crate) const DIRECTORY: &str = "/run/netns";

/// A named network namespace. It lives until the lab is torn down.
#[derive(Clone, Debug)]
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes `obs-<pid>-<role>` with its loopback up and IPv6 addresses usable at once.
    pub(crate) fn create(role: &str) -> Result<Self> {
        let name = format!("{}{role}", prefix(std::process::id()));
        {
            let _making = making();
            command::run(None, Command::new("ip").args(["netns", "add", &name]), "")?;
        }
        let namespace = Self { name };
        // Duplicate address detection would keep an address unusable for its first second.
        namespace.set("net/ipv6/conf/all/accept_dad", "0")?;
        namespace.set("net/ipv6/conf/default/accept_dad", "0")?;
        namespace.ip("link set lo up\n")?;
        Ok(namespace)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Writes a sysctl of this namespace; `key` is its path below `/proc/sys`.
    pub(crate) fn set(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.enter(|| fs::write(&path, value).with_context(|| format!("cannot set {key}")))
    }

    /// Runs `ip -batch` lines in this namespace.
    pub(crate) fn ip(&self, lines: &str) -> Result<()> {
        let mut ip = Command::new("ip");
        command::run(None, ip.args(["-n", &self.name, "-batch", "-"]), lines)
            .with_context(|| format!("in {}: {}", self.name, lines.trim().replace('\n', "; ")))?;
        Ok(())
    }

    /// Runs `job` on a thread that is inside, and waits for it.
    pub(crate) fn enter<T: Send>(&self, job: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = self.path();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                join(&path)?;
                job()
            });
            inside.join().map_err(|_panic| anyhow!("the thread in {} panicked", self.name))?
        })
    }

    /// Starts a thread that stays inside.
    pub(crate) fn thread<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        let path = self.path();
        thread::spawn(move || {
            join(&path)?;
            Ok(job())
        })
    }

    /// Starts a program inside.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        let _making = making();
        self.enter(|| Ok(command.spawn()?))
    }
}

/// What the names of a lab's namespaces begin with.
pub(crate) fn prefix(pid: u32) -> String {
    format!("obs-{pid}-")
}

fn join(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter {}", path.display()))
}
