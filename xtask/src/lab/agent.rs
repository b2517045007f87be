//! Runs the real agent in the node's namespace, as its DaemonSet would, and talks to it over HTTP.
//!
//! Only the network namespace differs from the machine's: `/sys`, cgroups and BTF are its own.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::clock;
use super::daemon::{Daemon, without_proxy};
use super::netns::Namespace;
use super::network::CLUSTER_CIDRS;

/// Where it listens unless it is told otherwise, and where its own node finds it.
const PORT: u16 = 9464;
const HERE: &str = "http://127.0.0.1:9464";
/// Loading and attaching the programs takes about a second on a quiet machine.
pub(crate) const READY_LIMIT: Duration = Duration::from_secs(30);
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// The agent keeps a termination open for some seconds after its end, to learn what comes late.
const CLOSE_LIMIT: Duration = Duration::from_secs(40);
const REQUEST_LIMIT: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How an agent is run on a node.
#[derive(Debug)]
pub(crate) struct Options<'a> {
    /// The observer's program.
    pub(crate) program: &'a Path,
    /// Where it runs.
    pub(crate) node: &'a Namespace,
    /// The node's name in the API.
    pub(crate) node_name: &'a str,
    /// Who it is for the API server.
    pub(crate) kubeconfig: &'a Path,
    /// The cgroup directory that holds the node's pods.
    pub(crate) cgroup_root: &'a Path,
    /// Where its log goes.
    pub(crate) log: PathBuf,
}

/// A running agent. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    program: PathBuf,
    daemon: Daemon,
    node: Namespace,
}

impl Agent {
    /// Starts it and waits until it is ready.
    pub(crate) fn start(options: Options<'_>) -> Result<Self> {
        let mut agent = Self::launch(options)?;
        agent.until_ready(READY_LIMIT)?;
        Ok(agent)
    }

    /// Starts it, and waits for nothing.
    pub(crate) fn launch(options: Options<'_>) -> Result<Self> {
        let Options { program, node, .. } = options;
        if !program.exists() {
            bail!("{} does not exist: run `cargo xtask build` first", program.display());
        }
        // By SIGTERM it detaches its programs and ends, also when this process is killed.
        let mut command = Daemon::command(program, Signal::SIGTERM);
        command.args(["run", "--node-name", options.node_name]);
        command.arg("--kubeconfig").arg(options.kubeconfig);
        command.arg("--cgroup-root").arg(options.cgroup_root);
        for cidr in CLUSTER_CIDRS {
            command.args(["--cluster-cidr", cidr]);
        }
        let daemon = Daemon::start("the agent", node, command, options.log)?;
        Ok(Self { program: program.to_owned(), daemon, node: node.clone() })
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// When it ends, or is not ready within `limit`: the error has the end of its log.
    pub(crate) fn until_ready(&mut self, limit: Duration) -> Result<()> {
        let node = &self.node;
        self.daemon.wait_until(limit, || get(node, "/readyz").map(drop))
    }

    /// What is not ready, in the words of `/readyz`; `None` when it is.
    ///
    /// # Errors
    /// When it does not answer, or with anything but 200 and 503.
    pub(crate) fn unready(&self) -> Result<Option<String>> {
        match http_get(&self.node, &format!("{HERE}/readyz"))? {
            (200, _) => Ok(None),
            (503, body) => Ok(Some(body)),
            (status, body) => bail!("GET /readyz: {status}: {}", body.trim()),
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// `GET` of a path; the body of a 200.
    ///
    /// # Errors
    /// When it does not answer, or with another status: the error has its body.
    pub fn get(&self, path: &str) -> Result<String> {
        get(&self.node, path)
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
        recommended_sleep(&report["workloads"][0])
    }

    /// Runs `observer report` against this agent; returns what it printed.
    ///
    /// # Errors
    /// When it fails: the error has what it printed on stderr.
    pub fn report(&self, output: &str) -> Result<String> {
        report(&self.program, &self.node, &[HERE.to_owned()], output)
    }

    /// How long it has been on a processor.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        self.daemon.cpu_time()
    }

    /// The sum of a metric over all series that have these labels, written as they are exposed.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn metric(&self, name: &str, labels: &str) -> Result<f64> {
        let exposed = self.get("/metrics")?;
        let series = exposed.lines().filter_map(|line| line.strip_prefix(name)?.rsplit_once(' '));
        let of = series.filter(|(known, _)| known.starts_with('{') && known.contains(labels));
        of.map(|(_, value)| value.parse::<f64>().with_context(|| format!("{name} is {value}")))
            .sum()
    }

    /// What the agent has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    /// Stops it by SIGTERM, as the kubelet does.
    ///
    /// # Errors
    /// When it does not end in time or not with exit code 0.
    pub fn stop(self) -> Result<()> {
        self.daemon.stop(STOP_LIMIT)
    }
}

/// Runs `observer report` from a namespace against several agents; returns what it printed.
pub(crate) fn report(
    program: &Path,
    from: &Namespace,
    urls: &[String],
    output: &str,
) -> Result<String> {
    let mut command = without_proxy(program);
    command.arg("report");
    for url in urls {
        command.args(["--url", url]);
    }
    command.args(["--output", output]);
    Ok(super::command::run(Some(from), &mut command, "")?.stdout)
}

/// The URL of the agent on the node with this address.
pub(crate) fn url(address: IpAddr) -> String {
    format!("http://{}", SocketAddr::new(address, PORT))
}

/// The preStop sleep that a report recommends for one of its workloads.
pub(crate) fn recommended_sleep(workload: &Value) -> Result<u64> {
    workload["recommendation"]["sleepSeconds"]
        .as_u64()
        .with_context(|| format!("the report recommends no sleep: {workload:#}"))
}

fn get(node: &Namespace, path: &str) -> Result<String> {
    match http_get(node, &format!("{HERE}{path}"))? {
        (200, body) => Ok(body),
        (status, body) => bail!("GET {path}: {status}: {}", body.trim()),
    }
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
