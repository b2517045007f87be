//! A small cluster on one machine: network namespaces, real processes in the kubelet's cgroups,
//! real rules, real connections, and the API over HTTP; so that the agent runs unchanged and what
//! it measures can be compared with what really happened.
//!
//! In the order of a pod's life:
//! - [`network`] node, client, outside and pods, in namespaces without a way out
//! - `container`, [`pod`] the process of a pod, and its behaviour
//! - `kubelet` starts and ends pods
//! - `cluster`, `objects`, `store`, [`api`] the API server
//! - `endpoints` the endpoint controller
//! - `proxy`, [`rules`] kube-proxy; `commits`, `legacy` when its rules were in force
//! - [`load`] clients
//! - [`truth`] what really happened
//! - [`agent`], `daemon` the agent under test, and any program that runs as long
//! - `leftovers` removes everything, whatever ended the lab
//!
//! It refuses to run beside another lab, without root, or after one whose remains it cannot remove.

pub mod agent;
pub mod api;
pub mod clock;
mod cluster;
pub(crate) mod command;
mod commits;
pub(crate) mod container;
pub(crate) mod daemon;
mod endpoints;
pub(crate) mod kubelet;
pub(crate) mod leftovers;
pub(crate) mod legacy;
pub mod load;
pub(crate) mod netns;
pub mod network;
pub(crate) mod objects;
pub mod pod;
mod proxy;
pub mod rules;
pub(crate) mod store;
pub mod truth;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use agent::Agent;
use api::Api;
use cluster::Cluster;
use commits::Notices;
pub use container::{Behaviour, Listen};
use kubelet::Kubelet;
pub use kubelet::{PodPlan, RunningPod, Termination};
use leftovers::Claim;
use load::Load;
use network::{Family, NODE_NAME, Network, Place};
use objects::Service;
use proxy::{Job, Proxy};
use rules::Dataplane;
use truth::Truth;

/// Rules written at once are in force within tens of ms; a loaded machine may need longer.
const RULES_LIMIT: Duration = Duration::from_secs(10);
/// Changes that may wait for kube-proxy: far more than any roll makes.
const JOBS: usize = 1024;
/// The first Service's cluster address ends in it.
const FIRST_SERVICE: u8 = 10;

/// What a lab is built with.
#[derive(Clone, Debug)]
pub struct Options {
    /// A program with the hidden subcommand `lab-pod`: this workspace's `xtask`.
    pub pod_program: PathBuf,
    /// What writes the rules.
    pub dataplane: Dataplane,
    /// Pod change to EndpointSlice change.
    pub slice_delay: Duration,
    /// EndpointSlice change to the rewrite of the rules.
    pub rules_delay: Duration,
}

/// A running lab. Dropping it removes all that it made.
#[derive(Debug)]
pub struct Lab {
    kubelet: Kubelet,
    cluster: Arc<Cluster>,
    notices: Arc<Notices>,
    network: Network,
    kubeconfig: PathBuf,
    /// Last: its removal needs the others to have let go.
    claim: Claim,
}

impl Lab {
    /// Builds the node, without Services and pods. Waits for any other lab to end first.
    ///
    /// # Errors
    /// Without root, when a tool is missing, or when the remains of an earlier lab cannot be
    /// removed.
    pub fn build(options: Options) -> Result<Self> {
        let claim = Claim::take()?;
        run_ahead_of_others()?;
        let network = Network::build().context("cannot build the lab's network")?;
        let notices = Notices::listen(&network.node)?;
        let api = Api::serve(&network.node)?;
        let kubeconfig = claim.directory().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig)?;
        // One waiting wake-up is enough: the controller looks at everything.
        let (controller, woken) = sync_channel(1);
        let cluster = Arc::new(Cluster::new(api, controller));
        let mut proxies = BTreeMap::new();
        for family in Family::BOTH {
            let proxy = Proxy {
                dataplane: options.dataplane,
                family,
                node: network.node.clone(),
                notices: Arc::clone(&notices),
                xtables_lock: claim.directory().join("xtables.lock"),
            };
            proxy.install().context("cannot write the node's rules")?;
            let (sender, jobs) = sync_channel::<Job>(JOBS);
            proxies.insert(family, sender);
            let cluster = Arc::clone(&cluster);
            std::thread::spawn(move || proxy.run(&cluster, &jobs));
        }
        let kubelet = Kubelet {
            program: options.pod_program,
            cgroup_root: claim.cgroup_root(),
            cluster: Arc::clone(&cluster),
            started: AtomicU32::default(),
        };
        let lab = Self { kubelet, cluster, notices, network, kubeconfig, claim };
        lab.set_slice_delay(options.slice_delay);
        lab.set_rules_delay(options.rules_delay);
        let cluster = Arc::clone(&lab.cluster);
        std::thread::spawn(move || endpoints::run(&cluster, &woken, &proxies));
        Ok(lab)
    }

    /// Changes how late slices follow pods, from the next change on.
    pub fn set_slice_delay(&self, delay: Duration) {
        self.cluster.slice_delay_ns.store(clock::nanos(delay), Ordering::Relaxed);
    }

    /// Changes how late the rules follow slices, from the next change on.
    pub fn set_rules_delay(&self, delay: Duration) {
        self.cluster.rules_delay_ns.store(clock::nanos(delay), Ordering::Relaxed);
    }

    /// Adds a Service that selects a workload's pods.
    ///
    /// # Errors
    /// When there are too many.
    pub fn add_service(&self, name: &str, workload: &str, families: &[Family]) -> Result<()> {
        let number = u8::try_from(self.cluster.services().len())
            .ok()
            .and_then(|count| count.checked_add(FIRST_SERVICE))
            .ok_or_else(|| anyhow!("a lab has addresses for 245 Services"))?;
        self.cluster.add_service(Service {
            name: name.to_owned(),
            workload: workload.to_owned(),
            families: families.to_vec(),
            number,
        });
        Ok(())
    }

    /// The cluster address and port of a Service, when it has that family.
    ///
    /// # Errors
    /// When it does not.
    pub fn service_address(&self, name: &str, family: Family) -> Result<SocketAddr> {
        let services = self.cluster.services();
        let service = services
            .iter()
            .find(|service| service.name == name && service.families.contains(&family))
            .with_context(|| format!("no Service {name} with {}", family.address_type()))?;
        Ok((family.service_address(service.number), endpoints::SERVICE_PORT).into())
    }

    /// Starts a pod and waits until it is Ready (not until the rules have it).
    ///
    /// # Errors
    /// When its process does not start.
    pub fn start_pod(&self, plan: &PodPlan) -> Result<RunningPod> {
        self.kubelet.start(&self.network, plan).context("cannot start a pod")
    }

    /// Deletes a pod as `kubectl delete --wait=false` does.
    #[must_use]
    pub fn delete_pod(&self, pod: &RunningPod) -> Termination {
        self.kubelet.delete(pod)
    }

    /// Deletes a pod with grace 0.
    #[must_use]
    pub fn force_delete_pod(&self, pod: &RunningPod) -> Termination {
        self.kubelet.force_delete(pod)
    }

    /// Writes rules of IPv4 as `dataplane` would, past the lab's own controllers.
    pub(crate) fn write_rules(&self, dataplane: Dataplane, rules: &str) -> Result<()> {
        let mut tool = dataplane.tool(Family::V4);
        command::run(Some(&self.network.node), &mut tool, rules).map(drop)
    }

    /// Waits until new connections of both families can be sent to these pods and no others.
    ///
    /// # Errors
    /// When it does not happen within the rules' delay and some seconds, or a thread of the lab
    /// failed.
    pub fn wait_for_backends(&self, families: &[Family], pods: &[RunningPod]) -> Result<()> {
        let wanted: BTreeMap<Family, BTreeSet<IpAddr>> = families
            .iter()
            .map(|family| (*family, pods.iter().map(|pod| pod.addresses.of(*family)).collect()))
            .collect();
        let settled = |truth: &Truth| {
            let settled = wanted.iter().all(|(family, addresses)| {
                let mut commits = truth.commits.iter().rev();
                let last = commits.find(|commit| commit.family == *family);
                last.is_some_and(|commit| {
                    &commit.backends.iter().map(SocketAddr::ip).collect::<BTreeSet<_>>()
                        == addresses
                })
            });
            settled.then_some(())
        };
        let delay = Duration::from_nanos(self.cluster.rules_delay_ns.load(Ordering::Relaxed));
        self.cluster.wait_for("the rules have the pods as backends", RULES_LIMIT + delay, settled)
    }

    /// Waits until the truth has something.
    ///
    /// # Errors
    /// When it does not within `limit`, or a thread of the lab failed.
    pub fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        find: impl Fn(&Truth) -> Option<T>,
    ) -> Result<T> {
        self.cluster.wait_for(what, limit, find)
    }

    /// What has happened so far.
    #[must_use]
    pub fn truth(&self) -> Truth {
        self.cluster.truth().clone()
    }

    /// The API server, to disturb it.
    #[must_use]
    pub fn api(&self) -> &Api {
        &self.cluster.api
    }

    /// Starts clients that connect `per_second` times a second, on `threads` threads.
    #[must_use]
    pub fn start_load(
        &self,
        from: Place,
        target: SocketAddr,
        per_second: u32,
        threads: u32,
    ) -> Load {
        Load::start(self.network.place(from), target, per_second, threads)
    }

    /// Connects once and records it.
    ///
    /// # Errors
    /// When the place cannot be entered.
    pub fn attempt(&self, from: Place, target: SocketAddr) -> Result<load::Attempt> {
        self.network.place(from).enter(|| Ok(load::attempt(target)))
    }

    /// Opens a connection for the caller to keep.
    ///
    /// # Errors
    /// When it is not accepted.
    pub fn connect(&self, from: Place, target: SocketAddr) -> Result<TcpStream> {
        self.network.place(from).enter(|| Ok(TcpStream::connect(target)?))
    }

    /// Status and body of a `GET` from the node.
    ///
    /// # Errors
    /// When nothing answers.
    pub fn http_get(&self, url: &str) -> Result<(u16, String)> {
        agent::http_get(&self.network.node, url)
    }

    /// The name of a place's network namespace, as `ip netns` knows it.
    #[must_use]
    pub fn namespace_name(&self, place: Place) -> &str {
        self.network.place(place).name()
    }

    /// Starts the agent on the node and waits until it is ready.
    ///
    /// # Errors
    /// When the program is missing, ends, or is not ready in time: the error has its log.
    pub fn start_agent(&self, program: &Path) -> Result<Agent> {
        Agent::start(agent::Options {
            program,
            node: &self.network.node,
            node_name: NODE_NAME,
            kubeconfig: &self.kubeconfig,
            cgroup_root: &self.claim.cgroup_root(),
            log: self.claim.directory().join("agent.log"),
        })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.cluster.close();
        self.notices.close();
        self.cluster.api.stop();
    }
}

/// Gives the calling thread, and what it starts from now on (the lab's threads, pods, agent and
/// tools), a higher priority than the machine's other work: the lab measures milliseconds, not how
/// long a compiler kept the processor.
pub(crate) fn run_ahead_of_others() -> Result<()> {
    let thread = nix::unistd::gettid().to_string();
    let mut renice = std::process::Command::new("renice");
    command::run(None, renice.args(["-n", "-10", "-p", &thread]), "")?;
    Ok(())
}

/// Says on stderr what nobody can be told otherwise: in a drop, or when a signal ends the process.
fn complain(message: &str) {
    writeln!(std::io::stderr(), "{message}").ok();
}
