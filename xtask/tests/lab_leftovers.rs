//! Nothing of a lab stays on the machine, whatever ends it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xtask::lab::clock::{boot_ns, nanos, seconds_between, sleep_until};
use xtask::lab::network::{Family, Place};
use xtask::lab::rules::Dataplane;
use xtask::lab::{Lab, Options, PodPlan, RunningPod};

/// Tells the lab elsewhere to start an agent too: that takes a second and the observer's program.
const WITH_AGENT: &str = "LAB_WITH_AGENT";
/// How long a process that was told to end may take.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A lab that heeds a signal has ended by then: this one had when it did not look for `nohup`.
const NOTICE_LIMIT: Duration = Duration::from_secs(1);

/// Another lab may have to end first.
const TURN_LIMIT: Duration = Duration::from_mins(5);

/// A lab with a dual-stack Service and two ready pods.
fn with_pods() -> Result<(Lab, Vec<RunningPod>)> {
    let lab = Lab::build(Options {
        pod_program: PathBuf::from(env!("CARGO_BIN_EXE_xtask")),
        dataplane: Dataplane::Nftables,
        slice_delay: Duration::ZERO,
        rules_delay: Duration::ZERO,
    })?;
    lab.add_service("web", "web", &Family::BOTH)?;
    let pods = [0, 1].map(|_| lab.start_pod(&PodPlan::of("web")));
    Ok((lab, pods.into_iter().collect::<Result<_>>()?))
}

/// Not a test of its own: the process that others end before it can clean up.
#[test]
#[ignore = "started by the tests that end it"]
fn a_lab_that_runs_until_it_is_ended() -> Result<()> {
    let (lab, _pods) = with_pods()?;
    let observer = Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name("observer");
    let _agent = std::env::var_os(WITH_AGENT).map(|_| lab.start_agent(&observer)).transpose()?;
    writeln!(std::io::stdout(), "\nready")?;
    std::thread::sleep(Duration::from_mins(2));
    Ok(())
}

fn a_lab_elsewhere() -> Result<Command> {
    let mut test = Command::new(std::env::current_exe()?);
    test.args(["--ignored", "--exact", "a_lab_that_runs_until_it_is_ended", "--nocapture"]);
    test.stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(test)
}

/// Starts one and waits until it is up.
fn start_a_lab_elsewhere() -> Result<Child> {
    start(&mut a_lab_elsewhere()?)
}

fn start(lab: &mut Command) -> Result<Child> {
    let mut child = lab.spawn()?;
    let stdout = BufReader::new(child.stdout.take().context("its stdout")?);
    let ready = stdout.lines().map_while(Result::ok).any(|line| line == "ready");
    ensure!(ready, "it did not start");
    Ok(child)
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(child.id())?), signal)?)
}

/// What is left of a lab: namespaces, its directory, its mount, processes in its cgroups.
fn left_of(pid: u32) -> Result<Vec<String>> {
    let directory = format!("/run/observer-lab/{pid}");
    let mut left: Vec<String> = fs::read_dir("/run/netns")?
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name.starts_with(&format!("obs-{pid}-")))
        .collect();
    left.extend(Path::new(&directory).exists().then(|| directory.clone()));
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    left.extend(mounts.lines().filter(|mount| mount.contains(&directory)).map(str::to_owned));
    for process in fs::read_dir("/proc")?.filter_map(Result::ok) {
        let cgroup = fs::read_to_string(process.path().join("cgroup")).unwrap_or_default();
        // "(deleted)": it has ended, only its parent has not noticed.
        let lives = cgroup.contains(&format!("/obs-{pid}/")) && !cgroup.contains("(deleted)");
        left.extend(lives.then_some(cgroup));
    }
    Ok(left)
}

#[test]
fn nothing_is_left_after_a_drop() -> Result<()> {
    let (lab, _pods) = with_pods()?;
    let name = lab.namespace_name(Place::Node).to_owned();
    drop(lab);
    // Another test of this process may have its own lab by now, with the same name: the process
    // elsewhere shows that for sure.
    let mut child = start_a_lab_elsewhere()?;
    ensure!(!Path::new("/run/netns").join(&name).exists(), "{name} is left");
    signal(&child, Signal::SIGTERM)?;
    assert_eq!(child.wait()?.code(), Some(128 + 15));
    assert_eq!(left_of(child.id())?, Vec::<String>::new(), "after SIGTERM");
    Ok(())
}

#[test]
fn a_closed_terminal_ends_the_lab_as_ctrl_c_does() -> Result<()> {
    let mut child = start_a_lab_elsewhere()?;
    signal(&child, Signal::SIGHUP)?;
    assert_eq!(child.wait()?.code(), Some(128 + 1));
    let mut said = String::new();
    child.stderr.take().context("its stderr")?.read_to_string(&mut said)?;
    assert_eq!(said.matches("interrupted: removing the lab").count(), 1, "{said}");
    assert_eq!(left_of(child.id())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_lab_under_nohup_outlives_its_terminal() -> Result<()> {
    let lab = a_lab_elsewhere()?;
    let mut nohup = Command::new("nohup");
    nohup.arg(lab.get_program()).args(lab.get_args());
    let mut child = start(nohup.stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    signal(&child, Signal::SIGHUP)?;
    sleep_until(boot_ns() + nanos(NOTICE_LIMIT));
    assert_eq!(child.try_wait()?, None, "it lives");
    signal(&child, Signal::SIGTERM)?;
    assert_eq!(child.wait()?.code(), Some(128 + 15));
    assert_eq!(left_of(child.id())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn what_a_killed_lab_left_is_removed_by_the_next() -> Result<()> {
    let mut child = start_a_lab_elsewhere()?;
    signal(&child, Signal::SIGKILL)?;
    assert_eq!(child.wait()?.signal(), Some(9));
    let started_ns = boot_ns();
    let (lab, _pods) = with_pods()?;
    assert_eq!(left_of(child.id())?, Vec::<String>::new());
    drop(lab);
    assert!(seconds_between(started_ns, boot_ns()) < 30.0);
    Ok(())
}

/// Whether an agent lives whose cgroups are those of this lab.
fn agent_of(pid: u32) -> Result<bool> {
    let root = format!("/run/observer-lab/{pid}/cgroup");
    let mut command_lines = fs::read_dir("/proc")?
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("cmdline")).ok());
    Ok(command_lines.any(|line| line.contains(&root) && line.contains("--kubeconfig")))
}

/// Its programs run at every kernel event of the machine: they must not wait for another lab.
#[test]
fn the_agent_of_a_killed_lab_ends_with_it() -> Result<()> {
    let mut child = start(a_lab_elsewhere()?.env(WITH_AGENT, "1"))?;
    ensure!(agent_of(child.id())?, "it runs");
    signal(&child, Signal::SIGKILL)?;
    child.wait()?;
    let until_ns = boot_ns() + nanos(END_LIMIT);
    while agent_of(child.id())? {
        ensure!(boot_ns() < until_ns, "the agent does not end");
        sleep_until(boot_ns() + 10_000_000);
    }
    drop(with_pods()?);
    assert_eq!(left_of(child.id())?, Vec::<String>::new());
    Ok(())
}

/// The thread that builds must neither add to what is being removed nor report that it is gone.
#[test]
fn a_lab_interrupted_while_it_is_built_leaves_nothing_and_exits_as_told() -> Result<()> {
    for after_ms in [0, 10, 30, 60, 100, 150, 200, 300] {
        let mut child = a_lab_elsewhere()?.spawn()?;
        let directory = format!("/run/observer-lab/{}/alive.lock", child.id());
        let until_ns = boot_ns() + nanos(TURN_LIMIT);
        while !Path::new(&directory).exists() {
            ensure!(boot_ns() < until_ns, "its turn does not come");
            sleep_until(boot_ns() + 1_000_000);
        }
        sleep_until(boot_ns() + after_ms * 1_000_000);
        signal(&child, Signal::SIGINT)?;
        let status = child.wait()?;
        assert_eq!(status.code(), Some(128 + 2), "after {after_ms} ms: {status}");
        assert_eq!(left_of(child.id())?, Vec::<String>::new(), "after {after_ms} ms");
    }
    Ok(())
}
