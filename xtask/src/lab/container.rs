//! A pod's process, as the lab holds it: started in its namespace and cgroup, listened to, ended.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::clock;
use super::cluster::Cluster;
use super::leftovers::making;
use super::netns::Namespace;
use super::objects::{POD_PORT, Pod};
use super::pod::AtSigterm;
use super::truth::PodTruth;

/// How a pod's process serves and ends.
#[derive(Clone, Copy, Debug, Default)]
pub struct Behaviour {
    /// What it does at SIGTERM.
    pub at_sigterm: AtSigterm,
    /// It stays at least this long after SIGTERM when draining, as one that finishes work does.
    pub linger: Duration,
    /// It keeps connections open until the client closes them.
    pub hold_streams: bool,
    /// When it listens.
    pub listen: Listen,
}

/// When a pod's process begins to listen. The pod becomes Ready when it does, except where a test
/// wants to see that it was Ready too early.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Listen {
    /// Before the pod is Ready.
    #[default]
    AtOnce,
    /// This long after its start (and after a restart of its listener); Ready at its start.
    Late(Duration),
    /// Never; Ready at its start.
    Never,
}

/// A running or ended process.
#[derive(Debug)]
pub(crate) struct Container {
    pid: Pid,
    stdin: Mutex<Option<ChildStdin>>,
    /// Whether it has been reaped; while not, its process id is its own.
    ended: Mutex<bool>,
    end: Condvar,
}

impl Container {
    /// Starts a pod's process. What it reports goes into the truth.
    pub(crate) fn start(
        program: &Path,
        cgroup_root: &Path,
        namespace: &Namespace,
        pod: &Pod,
        behaviour: Behaviour,
        cluster: &Arc<Cluster>,
    ) -> Result<Arc<Self>> {
        let cgroup = cgroup_root.join(cgroup_path(pod));
        {
            let _making = making();
            fs::create_dir_all(&cgroup)
                .with_context(|| format!("cannot make {}", cgroup.display()))?;
        }
        let mut command = Command::new(program);
        command.args(["lab-pod", "--name", &pod.name, "--port", &POD_PORT.to_string()]);
        command.arg("--cgroup").arg(&cgroup);
        command.args(arguments(behaviour));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        // Ctrl-C at the terminal is for the lab, which ends its pods itself.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = namespace
            .spawn(&mut command)
            .with_context(|| format!("cannot start `{} lab-pod`", program.display()))?;
        let pid = i32::try_from(child.id())?;
        cluster.record(&pod.uid, |truth| truth.pid = pid);
        let container = Arc::new(Self {
            pid: Pid::from_raw(pid),
            stdin: Mutex::new(child.stdin.take()),
            ended: Mutex::new(false),
            end: Condvar::new(),
        });
        let stdout = child.stdout.take().context("the pod's stdout")?;
        let watcher = Watcher {
            container: Arc::clone(&container),
            cluster: Arc::clone(cluster),
            uid: pod.uid.clone(),
        };
        std::thread::spawn(move || watcher.run(stdout, child));
        Ok(container)
    }

    /// Sends a signal unless the process has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if !*ended {
            // It may have exited without being reaped yet: then nothing happens.
            kill(self.pid, signal).ok();
        }
    }

    /// Waits for the end, at most until `until_ns`; returns whether it came.
    pub(crate) fn wait_for_end(&self, until_ns: u64) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = Duration::from_nanos(until_ns.saturating_sub(clock::boot_ns()));
        let waited = self.end.wait_timeout_while(ended, limit, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Tells the process to `crash` or to `restart` its listener.
    pub(crate) fn command(&self, command: &str) -> Result<()> {
        let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stdin) = stdin.as_mut() else { bail!("the pod's process has no stdin") };
        // One write: the pod reads a whole line or nothing.
        let line = format!("{command}\n");
        stdin.write_all(line.as_bytes()).context("the pod's process does not listen to commands")
    }
}

/// Follows a process to its end.
struct Watcher {
    container: Arc<Container>,
    cluster: Arc<Cluster>,
    uid: String,
}

impl Watcher {
    fn run(self, stdout: ChildStdout, mut child: Child) {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if let Some((what, at_ns)) = line.split_once(' ')
                && let Ok(at_ns) = at_ns.parse()
            {
                self.cluster.record(&self.uid, |pod| enter(pod, what, at_ns));
            }
        }
        // Waits without reaping, so that the moment is recorded before the process id is free.
        waitid(Id::Pid(self.container.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).ok();
        let exited_ns = clock::boot_ns();
        self.cluster.record(&self.uid, |pod| pod.exited_ns = Some(exited_ns));
        {
            let mut ended = self.container.ended.lock().unwrap_or_else(PoisonError::into_inner);
            child.wait().ok();
            *ended = true;
        }
        self.container.end.notify_all();
        self.cluster.change_pod(&self.uid, |pod| pod.ready = false);
    }
}

fn enter(pod: &mut PodTruth, what: &str, at_ns: u64) {
    match what {
        "listening" => {
            pod.listening_ns.get_or_insert(at_ns);
        }
        "sigterm" => pod.sigterm_ns = Some(at_ns),
        "listener_closed" => pod.listener_closed_ns = Some(at_ns),
        _ => {}
    }
}

/// The directory that the kubelet (systemd driver) and containerd make for a Burstable pod.
fn cgroup_path(pod: &Pod) -> String {
    format!(
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-containerd-{}.scope",
        pod.uid.replace('-', "_"),
        pod.container_id
    )
}

fn arguments(behaviour: Behaviour) -> Vec<String> {
    let at_sigterm = match behaviour.at_sigterm {
        AtSigterm::Drain => "drain",
        AtSigterm::Close => "close",
        AtSigterm::Ignore => "ignore",
    };
    let mut arguments = vec![
        format!("--at-sigterm={at_sigterm}"),
        format!("--linger-ms={}", behaviour.linger.as_millis()),
    ];
    match behaviour.listen {
        Listen::AtOnce => {}
        Listen::Late(delay) => arguments.push(format!("--listen-after-ms={}", delay.as_millis())),
        Listen::Never => arguments.push("--never-listen".to_owned()),
    }
    if behaviour.hold_streams {
        arguments.push("--hold".to_owned());
    }
    arguments
}
