//! Runs the real agent in the node's namespace, as its DaemonSet would, and talks to it over HTTP.
//!
//! Only the network namespace differs from the machine's: `/sys`, cgroups and BTF are its own.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::clock;
use super::leftovers::making;
use super::netns::Namespace;
use super::network::{CLUSTER_CIDRS, NODE_NAME};

const LISTEN: &str = "127.0.0.1:9464";
/// Loading and attaching the programs takes about a second on a quiet machine.
const READY_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// The agent keeps a termination open for some seconds after its end, to learn what comes late.
const CLOSE_LIMIT: Duration = Duration::from_secs(40);
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Where the client's libraries look for a proxy: from inside the namespaces none can be reached.
const PROXIES: [&str; 6] =
    ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];

/// A running agent. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    child: Child,
    node: Namespace,
    log: PathBuf,
    /// Dropped last: the thread that started the agent ends.
    _alive: SyncSender<()>,
}

impl Agent {
    pub(crate) fn start(
        program: &Path,
        node: &Namespace,
        kubeconfig: &Path,
        cgroup_root: &Path,
        directory: &Path,
    ) -> Result<Self> {
        if !program.exists() {
            bail!("{} does not exist: run `cargo xtask build` first", program.display());
        }
        let log = directory.join("agent.log");
        let mut command = without_proxy(Path::new("setpriv"));
        // Also when this process is killed, the agent detaches its programs and ends.
        command.args(["--pdeathsig", "TERM", "--"]).arg(program);
        command.args(["run", "--node-name", NODE_NAME, "--listen", LISTEN]);
        command.arg("--kubeconfig").arg(kubeconfig).arg("--cgroup-root").arg(cgroup_root);
        for cidr in CLUSTER_CIDRS {
            command.args(["--cluster-cidr", cidr]);
        }
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let (child, alive) = spawn_bound(node, command)
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut agent =
            Self { program: program.to_owned(), child, node: node.clone(), log, _alive: alive };
        agent.wait_until_ready()?;
        Ok(agent)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `GET` of a path; the body of a 200.
    ///
    /// # Errors
    /// When it does not answer, or with another status: the error has its body.
    pub fn get(&self, path: &str) -> Result<String> {
        match http_get(&self.node, &format!("http://{LISTEN}{path}"))? {
            (200, body) => Ok(body),
            (status, body) => bail!("GET {path}: {status}: {}", body.trim()),
        }
    }

    /// The terminations of `GET /v1/terminations`.
    ///
    /// # Errors
    /// When the answer is not what the API promises.
    pub fn terminations(&self) -> Result<Vec<Value>> {
        let body = self.get("/v1/terminations")?;
        let mut answer: Value = serde_json::from_str(&body).context("GET /v1/terminations")?;
        match answer["terminations"].take() {
            Value::Array(terminations) => Ok(terminations),
            _ => bail!("GET /v1/terminations has no terminations: {body}"),
        }
    }

    /// What it measured of these pods, in their order, once it has closed all of them.
    ///
    /// # Errors
    /// When it does not within [`CLOSE_LIMIT`]: the error has its log.
    pub fn closed(&self, uids: &[String]) -> Result<Vec<Value>> {
        let until_ns = clock::boot_ns() + clock::nanos(CLOSE_LIMIT);
        loop {
            let mut known = self.terminations()?;
            known.retain(|known| known["state"] == "closed");
            let of = |uid: &String| known.iter().find(|known| known["pod"]["uid"] == uid.as_str());
            let closed: Vec<Value> = uids.iter().filter_map(of).cloned().collect();
            if closed.len() == uids.len() {
                return Ok(closed);
            }
            if clock::boot_ns() > until_ns {
                let (closed, all) = (closed.len(), uids.len());
                bail!("the agent closed {closed} of {all} terminations:\n{}", self.log());
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// The preStop sleep that its report recommends, for the first workload.
    ///
    /// # Errors
    /// When it recommends none.
    pub fn recommended_sleep(&self) -> Result<u64> {
        let report = self.report("json")?;
        let report: Value =
            serde_json::from_str(&report).context("observer report --output json")?;
        report["workloads"][0]["recommendation"]["sleepSeconds"]
            .as_u64()
            .with_context(|| format!("the report recommends no sleep: {report:#}"))
    }

    /// Runs `observer report` against this agent; returns what it printed.
    ///
    /// # Errors
    /// When it fails: the error has what it printed on stderr.
    pub fn report(&self, output: &str) -> Result<String> {
        let mut command = without_proxy(&self.program);
        command.args(["report", "--url", &format!("http://{LISTEN}"), "--output", output]);
        Ok(super::command::run(Some(&self.node), &mut command, "")?.stdout)
    }

    /// What the agent has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Stops it by SIGTERM, as the kubelet does.
    ///
    /// # Errors
    /// When it does not end in time or not with exit code 0.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGTERM)?;
        match self.wait_for_exit(STOP_LIMIT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the agent ended with {status}:\n{}", self.log()),
            None => bail!("the agent does not end by SIGTERM:\n{}", self.log()),
        }
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let until_ns = clock::boot_ns() + clock::nanos(READY_LIMIT);
        loop {
            let answer = match self.get("/readyz") {
                Ok(_) => return Ok(()),
                Err(error) => format!("{error:#}"),
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("the agent ended with {status}:\n{}", self.log());
            }
            if clock::boot_ns() > until_ns {
                bail!("the agent is not ready: {answer}\n{}", self.log());
            }
            std::thread::sleep(LOOK_AGAIN);
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

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail only when it has ended, which is what they are for.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Starts a program on a thread that lives until the sender is dropped or this process ends: that
/// thread's death is what `setpriv --pdeathsig` means.
fn spawn_bound(node: &Namespace, mut command: Command) -> Result<(Child, SyncSender<()>)> {
    let (started, child) = sync_channel(1);
    let (alive, ended) = sync_channel::<()>(0);
    let _making = making();
    node.thread(move || {
        // Nobody listens any more: then there is nothing to stay for either.
        if started.send(command.spawn()).is_ok() {
            ended.recv().ok();
        }
    });
    let child = child.recv().context("the thread that starts it cannot enter the namespace")??;
    Ok((child, alive))
}

fn without_proxy(program: &Path) -> Command {
    let mut command = Command::new(program);
    for variable in PROXIES {
        command.env_remove(variable);
    }
    command
}

/// Status and body of a `GET` from inside a namespace.
pub(crate) fn http_get(namespace: &Namespace, url: &str) -> Result<(u16, String)> {
    namespace.enter(|| {
        let client = ureq::Agent::config_builder()
            .timeout_global(Some(REQUEST_LIMIT))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .new_agent();
        let mut response = client.get(url).call().with_context(|| format!("GET {url}"))?;
        let mut body = String::new();
        response.body_mut().as_reader().read_to_string(&mut body)?;
        Ok((response.status().as_u16(), body))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_of_this_machine_is_none_of_the_agents() {
        let command = without_proxy(Path::new("observer"));
        let removed = command.get_envs().filter(|(_, value)| value.is_none());
        assert_eq!(removed.count(), PROXIES.len());
    }
}
