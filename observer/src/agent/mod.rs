//! `observer run`: wires the shells to the correlator and keeps them running.
//!
//! Everything that can fail without touching the kernel is done first, so a wrong port or
//! kubeconfig leaves nothing attached. Channels are bounded; a task that ends early ends the
//! process, for a daemon that sees only part of the story must not look healthy.

mod desk;
mod hooks;
mod pod_cgroups;
mod sources;

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tracing::{info, warn};

use crate::kernel::addresses::Range;
use crate::kernel::cgroups::Hierarchy;
use crate::kernel::{self, Probes, StartError};
use crate::metrics::Metrics;
use crate::readiness::Readiness;
use crate::{
    api, cluster,
    dataplane::{self, Dataplane, StampsOf},
};

use cluster::Server;
use desk::{Desk, Inbox, Kernel, Shown};
use hooks::{CommitHooks, Maps};
use pod_cgroups::PodCgroups;

/// Facts of one source that may wait for the correlator. A burst of a few thousand fits; beyond
/// that the source waits, and the kernel's ring buffer or the API server holds the rest.
const FACTS: usize = 4096;

/// Facts of the cluster that may wait: one may hold a whole slice of endpoints, and a first list all
/// of a large cluster's.
const CLUSTER_FACTS: usize = 256;

/// Questions of the HTTP API that may wait.
const QUESTIONS: usize = 16;

/// What `observer run` needs to know.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The node's name, as the API server knows it.
    pub node: String,
    /// The kubeconfig; `None` for the pod's ServiceAccount.
    pub kubeconfig: Option<PathBuf>,
    /// Where to serve HTTP.
    pub listen: SocketAddr,
    /// The cgroup v2 hierarchy, or the directory of those of version 1.
    pub cgroup_root: PathBuf,
    /// The cluster's address ranges; empty when sources are not told apart.
    pub cluster: Vec<Range>,
    /// The only dataplane to follow; `None` for whichever there are.
    pub dataplane: Option<Dataplane>,
    /// Where Cilium pins its maps.
    pub cilium_maps: PathBuf,
}

/// A task's name and outcome.
type Ended = (&'static str, anyhow::Result<()>);

type Tasks = JoinSet<Ended>;

/// Observes until SIGTERM or SIGINT (`Ok`) or until a part fails.
///
/// # Errors
/// In one line that says what to do; a [`kernel::StartError`] when the kernel side cannot start.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let listener = api::bind(settings.listen).await?;
    let address = listener.local_addr().context("cannot tell the port")?;
    let server = cluster::server(settings.kubeconfig.as_deref()).await?;
    let hierarchy = Hierarchy::find(&settings.cgroup_root)?;
    let (node, api_server) = (settings.node.clone(), server.address.clone());
    let mut tasks = start(settings, hierarchy, listener, server)?;
    info!(%address, node, %api_server, "started");

    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        ended = tasks.join_next() => Err(describe_end(ended)),
    };
    info!("stopping: detaching the probes");
    tasks.shutdown().await;
    outcome
}

/// Attaches the probes and wires every part to the correlator. All of it ends with the tasks.
fn start(
    settings: Settings,
    hierarchy: Hierarchy,
    listener: TcpListener,
    server: Server,
) -> anyhow::Result<Tasks> {
    let metrics = Metrics::new()?;
    let readiness = Readiness::default();
    let watches = cluster::Health::expect(&readiness);
    let rules = readiness.expect("dataplane", "the node's rules are not read yet");

    info!(%hierarchy, "cgroups that tell pods");
    let cgroups = PodCgroups::expect(&readiness, &hierarchy);
    let mut kernel = kernel::start(hierarchy)?;
    show_probes(&kernel.probes, &readiness, &metrics);
    sources::classify_ranges(&mut kernel.addresses, &settings.cluster)?;
    sources::classify_node(&mut kernel.addresses)?;

    let node: Arc<str> = settings.node.into();
    let (event_sender, events) = mpsc::channel(FACTS);
    let (fact_sender, facts) = mpsc::channel(CLUSTER_FACTS);
    let (update_sender, updates) = mpsc::channel(FACTS);
    let (commit_sender, commit_signals) = mpsc::channel(FACTS);
    let maps = Maps::new(settings.cilium_maps.clone(), kernel.watched);
    let only = settings.dataplane;
    let hooks = CommitHooks::start(commit_sender, maps, only, &mut kernel.probes, &metrics)?;
    let (questions, asked) = mpsc::channel(QUESTIONS);
    let commits = kernel.commits;
    let rule_settings = dataplane::Settings {
        dataplane: settings.dataplane,
        cilium_maps: settings.cilium_maps,
        commit_stamps: Some(StampsOf(Arc::new(move |task| commits.of(task)))),
        ..dataplane::Settings::default()
    };
    let kernel_side = Kernel {
        probes: kernel.probes,
        counters: kernel.counters,
        addresses: kernel.addresses,
        reader: kernel.events.counts(),
    };
    let shown = Shown {
        metrics: metrics.clone(),
        rules,
        cgroups,
        rule_counters: rule_settings.counters.clone(),
        watches: watches.clone(),
        readiness: readiness.clone(),
    };
    let desk = Desk::new(&node, kernel_side, hooks, shown);

    let mut tasks = JoinSet::new();
    let sources =
        api::Sources { node: node.clone(), readiness: readiness.clone(), metrics, questions };
    tasks.spawn(named("HTTP server", api::serve(listener, sources)));
    tasks.spawn(named("event reader", kernel.events.run(event_sender)));
    let rules = dataplane::run(rule_settings, commit_signals, update_sender);
    tasks.spawn(named("dataplane reader", rules));
    tasks.spawn(named("cluster watch", async move {
        cluster::run(&server, &node, fact_sender, watches).await;
        Ok(())
    }));
    tasks.spawn(named("correlator", desk.run(Inbox { events, facts, updates, asked })));
    Ok(tasks)
}

/// A task's outcome with its name.
async fn named(name: &'static str, task: impl Future<Output = anyhow::Result<()>>) -> Ended {
    (name, task.await)
}

fn describe_end(ended: Option<Result<Ended, JoinError>>) -> anyhow::Error {
    match ended {
        Some(Ok((_, Err(error)))) if kernel::is_permission_error(&error) => {
            StartError::NoPermission(error).into()
        }
        Some(Ok((name, Err(error)))) => error.context(format!("the {name} failed")),
        Some(Ok((name, Ok(())))) => anyhow!("the {name} ended early"),
        Some(Err(error)) => anyhow::Error::new(error).context("a task panicked"),
        None => anyhow!("no task is left"),
    }
}

/// A probe that matters and is not attached keeps the daemon from being ready; any other is a
/// warning and a metric.
fn show_probes(probes: &Probes, readiness: &Readiness, metrics: &Metrics) {
    for probe in probes.states() {
        metrics.set_probe(probe.signal, probe.method);
        let Some(problem) = &probe.problem else { continue };
        warn!(signal = probe.signal, problem, "a probe is not attached");
        if probe.essential {
            // Kept by `readiness`: it stays missing.
            let _missing = readiness.expect(format!("probe {}", probe.signal), problem);
        }
    }
    if !probes.missing().is_empty() {
        warn!(fields = ?probes.missing(), "this kernel lacks fields");
    }
}
