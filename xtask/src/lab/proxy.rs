//! kube-proxy: writes each change of a family's Services with the real tool when it is due, and
//! records when the rules were in force.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use anyhow::{Context, Result};

use super::clock;
use super::cluster::Cluster;
use super::command;
use super::commits::Notices;
use super::netns::Namespace;
use super::network::Family;
use super::rules::{Dataplane, ServicePort, Sync};
use super::truth::Commit;

/// How long kube-proxy 1.35 leaves an emptied chain, at the least.
const STALE_NS: u64 = 1_000_000_000;

/// What one family's Services are to be.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) due_ns: u64,
    pub(crate) ports: Vec<ServicePort>,
    /// The Services whose slices changed.
    pub(crate) touched: BTreeSet<String>,
}

/// One family's half of kube-proxy.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) dataplane: Dataplane,
    pub(crate) family: Family,
    pub(crate) node: Namespace,
    pub(crate) notices: Arc<Notices>,
    /// The legacy tools take this lock: the lab's own, so that it waits for nobody else.
    pub(crate) xtables_lock: PathBuf,
}

impl Proxy {
    /// Writes the rules that every node has.
    pub(crate) fn install(&self) -> Result<()> {
        self.apply(&self.dataplane.base(self.family))?;
        Ok(())
    }

    /// Runs until the lab ends.
    pub(crate) fn run(&self, cluster: &Cluster, jobs: &Receiver<Job>) {
        let mut current = Vec::new();
        let mut stale = BTreeMap::new();
        while let Ok(job) = jobs.recv() {
            clock::sleep_until(job.due_ns);
            if cluster.is_closing() {
                return;
            }
            let sync = Sync { before: current, after: job.ports, touched: job.touched };
            if let Err(error) = self.sync(cluster, &sync, &mut stale) {
                cluster.fail(&error.context("kube-proxy cannot write the rules"));
                return;
            }
            current = sync.after;
        }
    }

    fn sync(
        &self,
        cluster: &Cluster,
        sync: &Sync,
        stale: &mut BTreeMap<String, u64>,
    ) -> Result<()> {
        self.delete_stale(stale)?;
        let started_ns = clock::boot_ns();
        let rules = self.dataplane.sync(self.family, sync);
        let at_ns = self.apply(&rules)?;
        // A chain that this sync fills again is not stale any more.
        stale.retain(|chain, _| !rules.contains(chain.as_str()));
        let backends = sync.after.iter().flat_map(|port| port.backends.iter().copied()).collect();
        let commit = Commit { family: self.family, started_ns, at_ns, backends };
        cluster.truth().commits.push(commit);
        let emptied = self.dataplane.stale_chains(sync);
        stale.extend(emptied.into_iter().map(|chain| (chain, at_ns + STALE_NS)));
        Ok(())
    }

    fn delete_stale(&self, stale: &mut BTreeMap<String, u64>) -> Result<()> {
        let now_ns = clock::boot_ns();
        let due: BTreeSet<String> = stale
            .iter()
            .filter(|(_, at_ns)| **at_ns <= now_ns)
            .map(|(chain, _)| chain.clone())
            .collect();
        if !due.is_empty() {
            self.apply(&Dataplane::delete_chains(self.family, &due))?;
            stale.retain(|chain, _| !due.contains(chain));
        }
        Ok(())
    }

    /// Runs the tool; returns when the rules were in force.
    fn apply(&self, rules: &str) -> Result<u64> {
        let mut tool = self.dataplane.tool(self.family);
        tool.env("XTABLES_LOCKFILE", &self.xtables_lock);
        let finished = command::run(Some(&self.node), &mut tool, rules)
            .with_context(|| format!("the rules were:\n{rules}"))?;
        let exited_ns = clock::boot_ns();
        if !self.dataplane.announces_commits() {
            return Ok(exited_ns);
        }
        Ok(self.notices.wait_for(finished.pid)?.min(exited_ns))
    }
}
