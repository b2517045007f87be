//! What a scenario is played on: the cluster, its workloads, and who is connected to them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::objects::{self, Access, Behind, SERVICE_PORT, Workload};
use crate::e2e::api::{Api, Patch};
use crate::e2e::bring_up::cluster_address;
use crate::e2e::cluster::Cluster;
use crate::e2e::kubelet::truth::Lives;
use crate::e2e::until;
use crate::e2e::watcher::{Watcher, changes};
use crate::lab::agent::{self, Agent};
use crate::lab::load::{Attempt, Load, Outcome};
use crate::lab::network::Family;

const PODS: &str = "/api/v1/namespaces/default/pods";
const SERVICES: &str = "/api/v1/namespaces/default/services";
/// A roll takes some seconds per pod; a machine that compiles at the same time needs far longer.
const ROLL_LIMIT: Duration = Duration::from_mins(3);
/// Of each client.
const CONNECTS_PER_SECOND: u32 = 200;
const CLIENT_THREADS: u32 = 4;

/// A running cluster that is watched.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) cluster: Cluster,
    pub(super) watcher: Watcher,
    observer: PathBuf,
    /// Rolls so far: each needs a revision of its own.
    revisions: u32,
}

impl Stage {
    pub(super) fn new(cluster: Cluster, watcher: Watcher, observer: &Path) -> Self {
        Self { cluster, watcher, observer: observer.to_owned(), revisions: 0 }
    }

    pub(super) fn admin(&self) -> &Api {
        &self.cluster.control_plane.admin
    }

    /// Makes a workload and waits until new connections are sent to its pods.
    pub(super) fn create(&self, workload: &Workload) -> Result<()> {
        self.admin().create(&workload.collection(), &workload.object())?;
        self.until_rolled_out(workload)
    }

    /// The agent of a node.
    pub(super) fn agent(&self, node: &str) -> Result<&Agent> {
        let mut agents = self.cluster.network.nodes.iter().zip(&self.cluster.agents);
        let of_node = agents.find(|(known, _)| known.name == node);
        of_node.map(|(_, agent)| agent).with_context(|| format!("no agent is on {node}"))
    }

    /// What the kubelets did to all pods so far.
    pub(super) fn lives(&self) -> Result<Lives> {
        let mut all = Lives::new();
        for kubelet in &self.cluster.kubelets {
            all.extend(kubelet.truth()?);
        }
        Ok(all)
    }

    /// Makes a Service.
    pub(super) fn expose(
        &self,
        workload: &Workload,
        name: &str,
        access: Access,
        families: &[Family],
    ) -> Result<Value> {
        let service = objects::service(name, workload.name, access, families);
        self.admin().create(SERVICES, &service)
    }

    /// Replaces all pods of a workload; gives the UIDs of those that went.
    pub(super) fn roll(&mut self, workload: &Workload) -> Result<Vec<String>> {
        self.revisions += 1;
        let change = Workload::revision(self.revisions);
        self.change(workload, &change)
    }

    /// As [`Stage::roll`], and does something to the cluster once the first pod is to go.
    pub(super) fn roll_through(
        &mut self,
        workload: &Workload,
        disturb: impl FnOnce(&mut Cluster) -> Result<()>,
    ) -> Result<Vec<String>> {
        self.revisions += 1;
        let before = self.uids(workload)?;
        let change = Workload::revision(self.revisions);
        self.admin().patch(&workload.path(), Patch::Strategic, &change)?;
        until(ROLL_LIMIT, "a pod is to go", || {
            let received = self.watcher.received()?;
            let mut old = before.iter();
            ensure!(old.any(|uid| received.deletion_seen_ns(uid).is_some()), "none is");
            Ok(())
        })?;
        disturb(&mut self.cluster)?;
        self.until_rolled_out(workload)?;
        let after = self.uids(workload)?;
        Ok(before.difference(&after).cloned().collect())
    }

    /// Changes a workload, waits until that has rolled out, and gives the UIDs of the pods that
    /// went.
    pub(super) fn change(&self, workload: &Workload, change: &Value) -> Result<Vec<String>> {
        self.ending(workload, |admin| {
            admin.patch(&workload.path(), Patch::Strategic, change).map(drop)
        })
    }

    /// Changes the number of a workload's pods.
    pub(super) fn scale(&self, workload: &Workload, replicas: u32) -> Result<Vec<String>> {
        self.change(workload, &json!({"spec": {"replicas": replicas}}))
    }

    /// Does something that ends pods of a workload, waits until the workload is as it should be,
    /// and gives the UIDs of those that went.
    pub(super) fn ending(
        &self,
        workload: &Workload,
        act: impl FnOnce(&Api) -> Result<()>,
    ) -> Result<Vec<String>> {
        let before = self.uids(workload)?;
        act(self.admin())?;
        self.until_rolled_out(workload)?;
        let after = self.uids(workload)?;
        Ok(before.difference(&after).cloned().collect())
    }

    /// Deletes a pod of a workload as `kubectl delete` does, with these `DeleteOptions`.
    pub(super) fn delete_one(&self, workload: &Workload, options: &Value) -> Result<Vec<String>> {
        let pod = self.pods(workload)?.into_iter().next().context("no pod to delete")?;
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?.to_owned();
        self.ending(workload, |admin| admin.delete(&format!("{PODS}/{name}"), options).map(drop))
    }

    /// Evicts a workload's pods from a node, as `kubectl drain` does.
    pub(super) fn drain(&self, workload: &Workload, node: &str) -> Result<Vec<String>> {
        let path = format!("/api/v1/nodes/{node}");
        self.admin().patch(&path, Patch::Strategic, &objects::unschedulable(true))?;
        let pods = self.pods(workload)?;
        let on_node = pods.iter().filter(|pod| pod["spec"]["nodeName"] == node);
        let names: Vec<&str> = on_node.filter_map(|pod| pod["metadata"]["name"].as_str()).collect();
        ensure!(!names.is_empty(), "{node} has no pod of {} to evict", workload.name);
        let ended = self.ending(workload, |admin| {
            names.iter().try_for_each(|name| {
                let eviction = objects::eviction(name);
                admin.create(&format!("{PODS}/{name}/eviction"), &eviction).map(drop)
            })
        })?;
        self.admin().patch(&path, Patch::Strategic, &objects::unschedulable(false))?;
        Ok(ended)
    }

    pub(super) fn pods(&self, workload: &Workload) -> Result<Vec<Value>> {
        self.admin().list(&format!("{PODS}?labelSelector=app%3D{}", workload.name))
    }

    fn uids(&self, workload: &Workload) -> Result<BTreeSet<String>> {
        let pods = self.pods(workload)?;
        let uids = pods.iter().filter_map(|pod| pod["metadata"]["uid"].as_str());
        Ok(uids.map(str::to_owned).collect())
    }

    /// Waits until a workload has as many pods as it should, all of the latest revision and ready,
    /// the rules of both nodes lead to them, and no other pod of it is left.
    fn until_rolled_out(&self, workload: &Workload) -> Result<()> {
        until(ROLL_LIMIT, &format!("{} is rolled out", workload.name), || {
            let object = self.admin().get(&workload.path())?;
            let (spec, status) = (&object["spec"], &object["status"]);
            ensure!(
                status["observedGeneration"] == object["metadata"]["generation"],
                "its controller has not seen it"
            );
            let wanted = spec["replicas"].as_u64().unwrap_or_default();
            for field in ["replicas", "updatedReplicas", "readyReplicas"] {
                let now = status[field].as_u64().unwrap_or_default();
                ensure!(now == wanted, "{field} is {now} of {wanted}");
            }
            let pods = self.pods(workload)?.len();
            ensure!(u64::try_from(pods)? == wanted, "there are {pods} pods of {wanted}");
            self.is_reached(workload)
        })
    }

    /// Whether the rules of both nodes lead to all pods of a workload.
    fn is_reached(&self, workload: &Workload) -> Result<()> {
        let (lives, changes) = (self.lives()?, self.watcher.changes()?);
        for uid in self.uids(workload)? {
            let life = lives.get(&uid).context("no kubelet runs it yet")?;
            let addresses = life.addresses.context("it has no address yet")?;
            for (node, behind) in self.ways(workload) {
                for family in behind.families {
                    let address = SocketAddr::new(addresses.of(*family), life.port);
                    let leads = changes::leads(&changes, node, behind.service, address);
                    ensure!(leads, "{}: {node} does not lead to {address}", behind.service);
                }
            }
        }
        Ok(())
    }

    /// Each node with each Service that leads to a workload.
    fn ways<'w>(
        &'w self,
        workload: &'w Workload,
    ) -> impl Iterator<Item = (&'static str, &'w Behind)> {
        let nodes = self.cluster.network.nodes.iter().map(|node| node.name);
        nodes.flat_map(|node| workload.behind.iter().map(move |behind| (node, behind)))
    }

    /// What a report over both agents says of a workload.
    pub(super) fn report(&self, workload: &Workload) -> Result<Value> {
        let network = &self.cluster.network;
        let urls: Vec<String> =
            network.nodes.iter().map(|node| agent::url(node.addresses.v4.into())).collect();
        let report = agent::report(&self.observer, &network.control, &urls, "json")?;
        let report: Value =
            serde_json::from_str(&report).context("observer report --output json")?;
        let workloads = report["workloads"].as_array().context("no workloads in the report")?;
        let of = workloads.iter().find(|known| known["name"] == workload.name);
        of.cloned().with_context(|| format!("{} is not in {report:#}", workload.name))
    }

    /// Clients of a Service on both nodes and outside.
    pub(super) fn connect(&self, service: &Value) -> Result<Clients> {
        let family = Family::V4;
        let address = cluster_address(service, family)?;
        let network = &self.cluster.network;
        let start = |place, target| Load::start(place, target, CONNECTS_PER_SECOND, CLIENT_THREADS);
        let within = network
            .nodes
            .iter()
            .map(|node| start(&node.client, SocketAddr::new(address, SERVICE_PORT)))
            .collect();
        let node_port = service["spec"]["ports"][0]["nodePort"].as_u64().unwrap_or_default();
        let outside = (node_port != 0).then(|| -> Result<Load> {
            let node = network.nodes[0].addresses.of(family);
            Ok(start(&network.outside, SocketAddr::new(node, u16::try_from(node_port)?)))
        });
        Ok(Clients { within, outside: outside.transpose()? })
    }
}

/// Steady clients of one Service.
#[derive(Debug)]
pub(super) struct Clients {
    /// One on each node.
    within: Vec<Load>,
    outside: Option<Load>,
}

/// What the clients of one Service saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) attempts: usize,
    /// On each node.
    pub(super) refused_within: [usize; 2],
    pub(super) refused_outside: usize,
    /// Reset, timed out, unreachable: a pod's namespace goes with it, its rules may go later.
    pub(super) lost: usize,
}

impl Seen {
    pub(super) fn refused(&self) -> usize {
        self.refused_within.iter().sum::<usize>() + self.refused_outside
    }

    /// Enters a client's attempts; gives how many were refused.
    fn enter(&mut self, attempts: &[Attempt]) -> usize {
        let count = |wanted: fn(&Outcome) -> bool| {
            attempts.iter().filter(|attempt| wanted(&attempt.outcome)).count()
        };
        let refused = count(|outcome| *outcome == Outcome::Refused);
        let served = count(|outcome| matches!(outcome, Outcome::Served(_)));
        self.attempts += attempts.len();
        self.lost += attempts.len() - refused - served;
        refused
    }
}

impl Clients {
    /// Stops them.
    pub(super) fn stop(self) -> Result<Seen> {
        let mut seen = Seen::default();
        for (node, load) in self.within.into_iter().enumerate() {
            seen.refused_within[node] = seen.enter(&load.stop()?);
        }
        if let Some(load) = self.outside {
            seen.refused_outside = seen.enter(&load.stop()?);
        }
        Ok(seen)
    }
}
