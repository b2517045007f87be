//! `cargo xtask e2e`: a real Kubernetes on one machine, with the observer on each of its two nodes.
//!
//! Real: etcd, the API server with RBAC, the controllers, the scheduler, kube-proxy and its rules,
//! the agents with the rights that `deploy/` gives them. Played: the kubelets. In the order of the
//! start:
//! - `binaries` Kubernetes' programs, compiled once
//! - `network` the nodes, in namespaces without a way out
//! - `access`, `api`, `control_plane` the API server, who may do what there, and a client of it
//! - [`kubelet`], `proxy` what makes the namespaces nodes; `follow` how the API is followed
//! - `manifest` what `deploy/` asks of a cluster
//! - `cluster` all of it, `bring_up` whether it is one
//! - [`watcher`] what the agents' figures are compared with
//!
//! It refuses to run beside a lab, without root, or after one whose remains it cannot remove.

mod access;
pub(crate) mod api;
mod binaries;
mod bring_up;
mod cluster;
mod control_plane;
mod follow;
pub mod kubelet;
mod manifest;
pub(crate) mod network;
mod proxy;
mod scenarios;
pub mod watcher;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::clock;
use crate::lab::leftovers::Claim;
use crate::step;
use binaries::Binaries;
use cluster::Cluster;
pub use proxy::Dataplane;

const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Arguments of `cargo xtask e2e`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// What kube-proxy writes on the nodes [default: one after the other]
    #[arg(long, value_enum)]
    dataplane: Option<Dataplane>,
    /// Leave out that the API server and the agents go and come back, which takes minutes
    #[arg(long)]
    without_outages: bool,
    /// A directory with etcd and Kubernetes' programs [default: compile them, once]
    #[arg(long, value_name = "DIR", value_parser = binaries)]
    binaries: Option<Binaries>,
    /// The agent to run [default: `observer` beside this program]
    #[arg(long, value_name = "FILE")]
    observer: Option<PathBuf>,
}

impl Args {
    /// Whether Kubernetes has to be compiled first, which takes Go.
    #[must_use]
    pub fn compiles(&self) -> bool {
        self.binaries.is_none() && Binaries::kept().is_none()
    }
}

/// Checked with the command line: what comes before takes a while.
fn binaries(text: &str) -> Result<Binaries, String> {
    Binaries::in_directory(&PathBuf::from(text)).map_err(|error| error.to_string())
}

/// Starts the cluster once for each dataplane; removes everything it made, whatever happens.
///
/// # Errors
/// When a part does not start: the error has the end of its log.
pub fn run(args: &Args) -> Result<()> {
    let this_program = std::env::current_exe().context("where is this program?")?;
    let observer = args.observer.clone().unwrap_or_else(|| this_program.with_file_name("observer"));
    let binaries = args.binaries.clone().map_or_else(Binaries::get, Ok)?;
    let dataplanes = args.dataplane.map_or(Dataplane::ALL.to_vec(), |only| vec![only]);
    for dataplane in dataplanes {
        let claim = Claim::take()?;
        let started = step::now();
        let cluster = Cluster::start(claim, &binaries, dataplane, &observer, &this_program)?;
        let name = dataplane.name();
        let seconds = started.elapsed().as_secs_f64();
        step::say(&format!("e2e: {name}: the cluster and both agents are ready ({seconds:.1} s)"));
        bring_up::check(&cluster.control_plane.admin, &cluster.network)
            .with_context(|| format!("{name}: the cluster is none"))?;
        step::say(&format!("e2e: {name}: a Service is reached over both nodes' rules"));
        scenarios::play(cluster, dataplane, &observer, !args.without_outages).context(name)?;
    }
    Ok(())
}

/// Looks again and again until `condition` holds.
fn until<T>(limit: Duration, what: &str, condition: impl Fn() -> Result<T>) -> Result<T> {
    let until_ns = clock::boot_ns() + clock::nanos(limit);
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if clock::boot_ns() > until_ns => {
                return Err(error.context(format!("waited in vain until {what}")));
            }
            Err(_) => std::thread::sleep(LOOK_AGAIN),
        }
    }
}
