//! An independent watcher of the cluster, to compare the agents' figures with: its own watch of
//! the API, its own netlink, the real tools for the rules. Nothing of it is the agent's code.
//!
//! - [`slices`] what the API said of pods and endpoints
//! - `node` the rules of one node: `netlink` the kernel's notices, `legacy` tables without any,
//!   `listing` what the tools say
//! - [`changes`] when backends came and went: from both
//!
//! Its own uncertainty: a commit's stamp is taken when its notice is received, which is after the
//! new rules are in force, by as long as the kernel takes to send it and this thread to run.

pub mod changes;
mod legacy;
mod listing;
mod netlink;
mod node;
pub mod slices;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};

use super::Dataplane;
use super::api::Api;
use super::control_plane::PATIENCE;
use super::follow::{News, follow};
use super::network::Network;
use changes::Change;
pub use listing::Backend;
use node::NodeWatch;
use slices::Received;

const PODS: &str = "/api/v1/pods";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

/// A running watch. Dropping it ends it.
#[derive(Debug)]
pub struct Watcher {
    nodes: Vec<NodeWatch>,
    received: Arc<Mutex<Received>>,
    failures: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
}

impl Watcher {
    /// Begins to watch the API and the rules of all nodes; what changes after this returns is seen.
    ///
    /// # Errors
    /// When a tool is missing or a socket cannot be opened.
    pub(crate) fn start(api: &Api, network: &Network, dataplane: Dataplane) -> Result<Self> {
        let mut watcher = Self {
            nodes: Vec::new(),
            received: Arc::default(),
            failures: Arc::default(),
            stop: Arc::default(),
        };
        watcher.follow(api, PODS, Received::pod_news);
        watcher.follow(api, SLICES, Received::slice_news);
        for node in &network.nodes {
            watcher.nodes.push(NodeWatch::start(node, dataplane, &watcher.stop)?);
        }
        Ok(watcher)
    }

    fn follow(&self, api: &Api, path: &'static str, enter: fn(&mut Received, u64, News)) {
        let (api, stop) = (api.patient(PATIENCE), Arc::clone(&self.stop));
        let (received, failures) = (Arc::clone(&self.received), Arc::clone(&self.failures));
        std::thread::spawn(move || {
            let tell = |at_ns, news| enter(&mut lock(&received), at_ns, news);
            let complain = |error: &anyhow::Error| lock(&failures).push(format!("{error:#}"));
            follow(&api, path, &stop, tell, complain);
        });
    }

    /// What the API said so far.
    ///
    /// # Errors
    /// When a watch could not go on: events may be missing.
    pub fn received(&self) -> Result<Received> {
        if let Some(failure) = lock(&self.failures).first() {
            bail!("the watcher failed: {failure}");
        }
        Ok(lock(&self.received).clone())
    }

    /// How the rules of all nodes changed so far.
    ///
    /// # Errors
    /// When a node's rules could not be listed.
    pub fn changes(&self) -> Result<Vec<Change>> {
        let changes: Result<Vec<Vec<Change>>> = self.nodes.iter().map(NodeWatch::changes).collect();
        Ok(changes?.concat())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for node in std::mem::take(&mut self.nodes) {
            node.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
