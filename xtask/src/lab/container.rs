//! A pod's process, as a kubelet holds it: started in its namespace and cgroup, listened to, ended.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::clock;
use super::leftovers::making;
use super::netns::Namespace;
use super::pod::AtSigterm;

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

/// What to start, and where.
#[derive(Debug)]
pub(crate) struct Process<'a> {
    /// A program with the subcommand `lab-pod`.
    pub(crate) program: &'a Path,
    /// The directory to make and to enter.
    pub(crate) cgroup: &'a Path,
    pub(crate) namespace: &'a Namespace,
    /// What it answers to every connection.
    pub(crate) name: &'a str,
    pub(crate) port: u16,
    pub(crate) behaviour: Behaviour,
}

/// What a process did, and when (ns of `CLOCK_BOOTTIME`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Its own report: its listener accepts.
    Listening(u64),
    /// Its own report: it got SIGTERM.
    Sigterm(u64),
    /// Its own report, just after the close.
    ListenerClosed(u64),
    /// Its end was seen. Its process id is not free yet.
    Exited(u64, Exit),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Code(i32),
    Killed(Signal),
    /// The kernel did not say.
    Unknown,
}

impl Container {
    /// Starts a pod's process; `witness` is told what it does, on a thread of its own.
    pub(crate) fn start(
        process: &Process<'_>,
        witness: impl FnMut(Event) + Send + 'static,
    ) -> Result<Arc<Self>> {
        let Process { program, cgroup, namespace, name, port, behaviour } = process;
        {
            let _making = making();
            fs::create_dir_all(cgroup)
                .with_context(|| format!("cannot make {}", cgroup.display()))?;
        }
        let mut command = Command::new(program);
        command.args(["lab-pod", "--name", name, "--port", &port.to_string()]);
        command.arg("--cgroup").arg(cgroup);
        command.args(arguments(*behaviour));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        // Ctrl-C at the terminal is for the lab, which ends its pods itself.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = namespace
            .spawn(&mut command)
            .with_context(|| format!("cannot start `{} lab-pod`", program.display()))?;
        let container = Arc::new(Self {
            pid: Pid::from_raw(i32::try_from(child.id())?),
            stdin: Mutex::new(child.stdin.take()),
            ended: Mutex::new(false),
            end: Condvar::new(),
        });
        let stdout = child.stdout.take().context("the pod's stdout")?;
        let watched = Arc::clone(&container);
        std::thread::spawn(move || watched.follow(stdout, child, witness));
        Ok(container)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
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

    /// Follows the process to its end.
    fn follow(&self, stdout: ChildStdout, mut child: Child, mut witness: impl FnMut(Event)) {
        let lines = BufReader::new(stdout).lines().map_while(Result::ok);
        lines.filter_map(|line| reported(&line)).for_each(&mut witness);
        // Waits without reaping, so that the moment is recorded before the process id is free.
        let end = waitid(Id::Pid(self.pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT);
        witness(Event::Exited(clock::boot_ns(), exit(end)));
        {
            let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            child.wait().ok();
            *ended = true;
        }
        self.end.notify_all();
    }
}

/// A line of the process: what, and when.
fn reported(line: &str) -> Option<Event> {
    let (what, at_ns) = line.split_once(' ')?;
    let at_ns = at_ns.parse().ok()?;
    match what {
        "listening" => Some(Event::Listening(at_ns)),
        "sigterm" => Some(Event::Sigterm(at_ns)),
        "listener_closed" => Some(Event::ListenerClosed(at_ns)),
        _ => None,
    }
}

fn exit(end: nix::Result<WaitStatus>) -> Exit {
    match end {
        Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
        Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Killed(signal),
        _ => Exit::Unknown,
    }
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
