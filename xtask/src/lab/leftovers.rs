//! What a lab leaves on the machine, and its removal: on drop, on a signal, and by a later run
//! when the process died without either.
//!
//! Everything is found by the owner's process id: namespaces by name, processes by the namespace
//! they are in, mounts and cgroups below `/run/observer-lab/<pid>`. A lab that still runs holds a
//! lock there; nothing of it is touched.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Once, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use super::{clock, netns};

const RUN_DIRECTORY: &str = "/run/observer-lab";
/// Killed processes leave their namespaces and cgroups within milliseconds; a loaded machine
/// may need longer, a stuck one is reported.
const REMOVAL_ATTEMPTS: u32 = 200;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// Read by whoever makes what a removal must find, written by the removal: else what is made behind
/// its back would stay. A signal's removal never gives it back, so the thread that still builds
/// waits for the exit instead of tripping over what is gone and reporting that.
static REMOVING: RwLock<()> = RwLock::new(());

/// To be held while a namespace, process, mount or cgroup is made. Not twice by one thread: between
/// the two a removal may begin to wait.
pub(crate) fn making() -> RwLockReadGuard<'static, ()> {
    REMOVING.read().unwrap_or_else(PoisonError::into_inner)
}

fn removing() -> RwLockWriteGuard<'static, ()> {
    REMOVING.write().unwrap_or_else(PoisonError::into_inner)
}

/// The directory of the running lab. Dropping it removes everything the lab made.
#[derive(Debug)]
pub(crate) struct Claim {
    directory: PathBuf,
    /// Held while the lab lives; closed, and so released, with the process.
    _alive: File,
    _serial: File,
}

impl Claim {
    /// Waits for any other lab to end (the kernel programs see the whole machine, so labs run one
    /// at a time), removes what dead ones left, and mounts a cgroup v2 tree.
    pub(crate) fn take() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the lab makes network namespaces and mounts: run it as root");
        }
        fs::create_dir_all(RUN_DIRECTORY)
            .with_context(|| format!("cannot make {RUN_DIRECTORY}"))?;
        let serial = File::create(Path::new(RUN_DIRECTORY).join("serial.lock"))?;
        serial.lock().context("cannot wait for the other lab")?;
        sweep()?;
        tear_down_on_signal();
        let made = making();
        let directory = directory_of(std::process::id());
        fs::create_dir_all(&directory)?;
        let alive = File::create(directory.join("alive.lock"))?;
        alive.lock()?;
        let claim = Self { directory, _alive: alive, _serial: serial };
        let mounted = claim.mount_cgroups();
        // Before the claim may be dropped, which removes what there is.
        drop(made);
        mounted.map(|()| claim)
    }

    /// Where files of this run may be put.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The cgroup directory that holds this lab's pods.
    pub(crate) fn cgroup_root(&self) -> PathBuf {
        cgroup_mount(&self.directory).join(format!("obs-{}", std::process::id()))
    }

    fn mount_cgroups(&self) -> Result<()> {
        let target = cgroup_mount(&self.directory);
        fs::create_dir_all(&target)?;
        mount(Some("none"), &target, Some("cgroup2"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount cgroup2 on {}", target.display()))?;
        fs::create_dir(self.cgroup_root()).context("cannot make the lab's cgroup")
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _removing = removing();
        if let Err(error) = tear_down(std::process::id()) {
            super::complain(&format!("lab: not everything was removed: {error:#}"));
        }
    }
}

/// Removes what labs of dead processes left.
fn sweep() -> Result<()> {
    for pid in owners()? {
        if is_dead(pid) {
            tear_down(pid).with_context(|| format!("cannot remove the leftovers of {pid}"))?;
        }
    }
    Ok(())
}

fn is_dead(pid: u32) -> bool {
    match File::open(directory_of(pid).join("alive.lock")) {
        Ok(lock) => lock.try_lock().is_ok(),
        Err(_) => !Path::new("/proc").join(pid.to_string()).exists(),
    }
}

/// The process ids that a directory or a namespace names.
fn owners() -> Result<BTreeSet<u32>> {
    let directories = names(Path::new(RUN_DIRECTORY))?;
    let namespaces = names(Path::new(netns::DIRECTORY))?;
    let of_namespace = |name: &String| name.strip_prefix("obs-")?.split('-').next()?.parse().ok();
    Ok(directories
        .iter()
        .filter_map(|name| name.parse().ok())
        .chain(namespaces.iter().filter_map(of_namespace))
        .collect())
}

fn tear_down(pid: u32) -> Result<()> {
    let prefix = netns::prefix(pid);
    let namespaces: Vec<PathBuf> = names(Path::new(netns::DIRECTORY))?
        .into_iter()
        .filter(|name| name.starts_with(&prefix))
        .map(|name| Path::new(netns::DIRECTORY).join(name))
        .collect();
    end_processes(&namespaces)?;
    for namespace in namespaces {
        // Fails only when the name was never bound to a namespace; the file goes either way.
        umount2(&namespace, MntFlags::MNT_DETACH).ok();
        absent(fs::remove_file(&namespace))
            .with_context(|| format!("cannot remove {}", namespace.display()))?;
    }
    let directory = directory_of(pid);
    let cgroups = cgroup_mount(&directory);
    let root = cgroups.join(format!("obs-{pid}"));
    if root.exists() {
        retry(|| remove_cgroups(&root)).context("cannot remove the cgroups")?;
    }
    if names(&cgroups).is_ok_and(|inside| !inside.is_empty()) {
        umount2(&cgroups, MntFlags::MNT_DETACH).context("cannot unmount the cgroups")?;
    }
    absent(fs::remove_dir_all(&directory))
        .with_context(|| format!("cannot remove {}", directory.display()))
}

/// What is gone is removed: the lab removes a pod's parts itself while a signal's removal, which
/// has listed them already, may want to.
fn absent(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Ends every process that lives in one of these namespaces: nobody else enters them.
fn end_processes(namespaces: &[PathBuf]) -> Result<()> {
    let inodes: BTreeSet<u64> =
        namespaces.iter().filter_map(|path| Some(fs::metadata(path).ok()?.ino())).collect();
    retry(|| {
        let mut remaining = 0;
        for pid in names(Path::new("/proc"))?.iter().filter_map(|name| name.parse::<i32>().ok()) {
            // A process that ends meanwhile has no namespace to look at.
            let inside = fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|namespace| inodes.contains(&namespace.ino()));
            if inside {
                remaining += 1;
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
        }
        ensure!(remaining == 0, "{remaining} processes of the lab do not end");
        Ok(())
    })
}

fn remove_cgroups(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroups(&entry.path())?;
        }
    }
    absent(fs::remove_dir(directory))
        .with_context(|| format!("cannot remove {}", directory.display()))
}

fn retry(mut attempt: impl FnMut() -> Result<()>) -> Result<()> {
    let mut outcome = attempt();
    for _ in 0..REMOVAL_ATTEMPTS {
        if outcome.is_ok() {
            break;
        }
        clock::sleep_until(clock::boot_ns() + clock::nanos(REMOVAL_PAUSE));
        outcome = attempt();
    }
    outcome
}

/// Ctrl-C, SIGTERM and SIGHUP (a closed terminal): remove everything, then exit as a shell reports
/// that signal.
fn tear_down_on_signal() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let (ready, registered) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let (code, why) = match wait_for_signal(&ready) {
                Ok(code) => (code, "interrupted: removing the lab".to_owned()),
                Err(error) => (1, format!("signals are not watched: {error:#}")),
            };
            super::complain(&why);
            let _removing = removing();
            if let Err(error) = tear_down(std::process::id()) {
                super::complain(&format!("lab: not everything was removed: {error:#}"));
            }
            std::process::exit(code);
        });
        registered.recv().ok();
    });
}

fn wait_for_signal(ready: &std::sync::mpsc::SyncSender<()>) -> Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // Under `nohup` it is to outlive its terminal; to listen for the signal would undo that.
        let mut hang_up =
            if ignores_hang_up()? { None } else { Some(signal(SignalKind::hangup())?) };
        ready.send(())?;
        Ok(tokio::select! {
            _ = interrupt.recv() => 128 + 2,
            _ = terminate.recv() => 128 + 15,
            Some(()) = async { hang_up.as_mut()?.recv().await } => 128 + 1,
        })
    })
}

fn ignores_hang_up() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.context("the kernel does not tell ignored signals")?.trim();
    // The lowest bit is signal 1.
    Ok(u64::from_str_radix(ignored, 16)? & 1 == 1)
}

fn directory_of(pid: u32) -> PathBuf {
    Path::new(RUN_DIRECTORY).join(pid.to_string())
}

fn cgroup_mount(directory: &Path) -> PathBuf {
    directory.join("cgroup")
}

/// The names in a directory; none when it does not exist.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot read {}", directory.display()))?,
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_removal_took_away_counts_as_removed() {
        let gone = Path::new("/run/observer-lab/no-such-name");
        absent(fs::remove_file(gone)).expect("a name");
        absent(fs::remove_dir_all(gone)).expect("a directory");
        absent(fs::remove_dir(Path::new("/proc"))).expect_err("it is in use");
    }
}
