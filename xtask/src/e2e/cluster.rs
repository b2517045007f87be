//! The whole cluster, started in order and removed when dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};

use super::access::Identity;
use super::binaries::Binaries;
use super::control_plane::{ControlPlane, PATIENCE};
use super::kubelet::{CgroupLayout, Kubelet, KubeletOptions};
use super::network::{Network, Node};
use super::proxy::Dataplane;
use super::{manifest, proxy};
use crate::lab::agent::{self, Agent};
use crate::lab::daemon::Daemon;
use crate::lab::leftovers::Claim;
use crate::lab::run_ahead_of_others;

/// Of the network's nodes, in their order: agents find pods in either.
const CGROUP_LAYOUTS: [CgroupLayout; 2] = [CgroupLayout::Systemd, CgroupLayout::Cgroupfs];

/// A running cluster with an agent on each node.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// In the order of the network's nodes.
    pub(crate) agents: Vec<Agent>,
    _proxies: Vec<Daemon>,
    /// In the order of the network's nodes.
    pub(crate) kubelets: Vec<Kubelet>,
    pub(crate) control_plane: ControlPlane,
    pub(crate) network: Arc<Network>,
    observer: PathBuf,
    /// Last: its removal needs the others to have let go.
    claim: Claim,
}

impl Cluster {
    /// Starts all parts and waits until each is ready.
    ///
    /// # Errors
    /// When a tool is missing, or a part does not start.
    pub(crate) fn start(
        claim: Claim,
        binaries: &Binaries,
        dataplane: Dataplane,
        observer: &Path,
        pod_program: &Path,
    ) -> Result<Self> {
        run_ahead_of_others()?;
        let directory = claim.directory();
        let network = Arc::new(Network::build()?);
        let control_plane = ControlPlane::start(binaries, &network.control, directory)
            .context("cannot start the control plane")?;
        manifest::apply(&control_plane.admin)?;
        let kubeconfig = directory.join("kube-proxy.kubeconfig");
        control_plane.server.write_kubeconfig(&kubeconfig, &control_plane.proxy.token)?;
        let kubelets = start_kubelets(&control_plane, &network, &claim, pod_program)?;
        let mut proxies = Vec::new();
        for node in &network.nodes {
            proxies.push(proxy::start(binaries, node, dataplane, &kubeconfig, directory)?);
        }
        let observer = observer.to_owned();
        let mut cluster = Self {
            agents: Vec::new(),
            _proxies: proxies,
            kubelets,
            control_plane,
            network,
            observer,
            claim,
        };
        for node in &Arc::clone(&cluster.network).nodes {
            let mut agent = cluster.launch_agent(node)?;
            agent.until_ready(agent::READY_LIMIT).with_context(|| format!("on {}", node.name))?;
            cluster.agents.push(agent);
        }
        Ok(cluster)
    }

    /// Ends a node's agent in some way, and starts it anew without waiting until it is ready.
    ///
    /// # Errors
    /// When it does not end so, or cannot be started.
    pub(crate) fn restart_agent(
        &mut self,
        node: usize,
        end: impl FnOnce(Agent) -> Result<()>,
    ) -> Result<()> {
        end(self.agents.remove(node))?;
        let agent = self.launch_agent(&self.network.nodes[node])?;
        self.agents.insert(node, agent);
        Ok(())
    }

    /// Starts an agent as the service account that `deploy/` gives it.
    fn launch_agent(&self, node: &Node) -> Result<Agent> {
        let (namespace, account) = manifest::ACCOUNT;
        let directory = self.claim.directory();
        let token = self.control_plane.admin.service_account_token(namespace, account)?;
        let kubeconfig = directory.join(format!("observer-{}.kubeconfig", node.name));
        self.control_plane.server.write_kubeconfig(&kubeconfig, &token)?;
        Agent::launch(agent::Options {
            program: &self.observer,
            node: &node.namespace,
            node_name: node.name,
            kubeconfig: &kubeconfig,
            cgroup_root: &cgroup_root(&self.claim, node),
            log: directory.join(format!("observer-{}.log", node.name)),
        })
        .with_context(|| format!("on {}", node.name))
    }
}

/// A kubelet for each node, each as its own identity and over its own cgroups.
fn start_kubelets(
    control_plane: &ControlPlane,
    network: &Arc<Network>,
    claim: &Claim,
    pod_program: &Path,
) -> Result<Vec<Kubelet>> {
    let start = |(index, identity): (usize, &Identity)| {
        let node = &network.nodes[index];
        let cgroup_root = cgroup_root(claim, node);
        fs::create_dir(&cgroup_root).context("cannot make a node's cgroup")?;
        Kubelet::start(KubeletOptions {
            api: control_plane.api(&identity.token, &node.namespace)?.patient(PATIENCE),
            network: Arc::clone(network),
            node: index,
            pod_program: pod_program.to_owned(),
            cgroup_root,
            cgroup_layout: CGROUP_LAYOUTS[index],
        })
    };
    control_plane.kubelets.iter().enumerate().map(start).collect()
}

fn cgroup_root(claim: &Claim, node: &Node) -> PathBuf {
    claim.cgroup_root().join(node.name)
}
