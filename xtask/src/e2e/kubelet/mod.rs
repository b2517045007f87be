//! A played kubelet: runs the pods that the scheduler gives its node as real processes, and starts
//! and ends them in the order and with the pauses that were recorded on a real node.
//!
//! In the order of a pod's life:
//! - `spec` what its object asks for
//! - `pod`, `ending` its life: one thread per pod
//! - `sandbox`, `addresses`, `cgroups` where its process is
//! - `probe` its readiness
//! - `status` what is written about it
//! - [`truth`] what really happened
//! - `node` the node's own objects
//!
//! It refuses what it does not do (more than one container, other hooks and probes): a test that
//! asks for it fails. Pods of images other than the lab's stay Pending, as where an image cannot be
//! pulled.

mod addresses;
mod cgroups;
mod ending;
mod node;
mod pod;
mod probe;
mod sandbox;
mod spec;
mod status;
pub mod truth;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::api::{self, Api, Patch};
use super::follow::{News, follow};
use super::network::{Network, Node};
use crate::lab::clock;
use crate::lab::container::Container;
use addresses::Numbers;
pub use cgroups::CgroupLayout;
use pod::{Note, Worker};
use spec::{Deletion, IMAGE, Identity, PodSpec};
use truth::Lives;

/// As a real kubelet renews its Lease.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Notes that may wait for a pod's thread: far more than come while it makes one request.
const NOTES: usize = 256;
const NODES: &str = "/api/v1/nodes";
/// "It exists already."
const CONFLICT: u16 = 409;

/// What a kubelet is started with.
#[derive(Debug)]
pub struct KubeletOptions {
    /// As the node.
    pub(crate) api: Api,
    pub(crate) network: Arc<Network>,
    /// Its node, as an index of the network's.
    pub(crate) node: usize,
    /// A program with the hidden subcommand `lab-pod`: this workspace's `xtask`.
    pub(crate) pod_program: PathBuf,
    /// The cgroup directory that holds its pods.
    pub(crate) cgroup_root: PathBuf,
    pub(crate) cgroup_layout: CgroupLayout,
}

/// A running kubelet. Dropping it kills its pods' processes and leaves the API as it is.
#[derive(Debug)]
pub struct Kubelet {
    shared: Arc<Shared>,
    /// Dropped with it: the heartbeat ends.
    _alive: SyncSender<()>,
}

/// What its threads share.
#[derive(Debug)]
struct Shared {
    options: KubeletOptions,
    numbers: Mutex<Numbers>,
    /// Pods started so far: each namespace has its own number.
    started: AtomicU32,
    workers: Mutex<BTreeMap<String, Known>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    lives: Mutex<Lives>,
    /// What went wrong on threads that nobody waits for.
    failures: Mutex<Vec<String>>,
    stopping: AtomicBool,
}

/// A pod that has a thread.
#[derive(Debug)]
struct Known {
    notes: SyncSender<Note>,
    /// The deletion that it has been told.
    told: Option<Deletion>,
    thread: JoinHandle<()>,
}

impl Kubelet {
    /// Registers the node, ready, and starts to run its pods.
    ///
    /// # Errors
    /// When the API server refuses the node or does not answer.
    pub fn start(options: KubeletOptions) -> Result<Self> {
        let shared = Arc::new(Shared {
            options,
            numbers: Mutex::default(),
            started: AtomicU32::default(),
            workers: Mutex::default(),
            containers: Mutex::default(),
            lives: Mutex::default(),
            failures: Mutex::default(),
            stopping: AtomicBool::default(),
        });
        shared.register().context("cannot register the node")?;
        let (alive, ended) = sync_channel(0);
        let beating = Arc::clone(&shared);
        std::thread::spawn(move || beating.beat(&ended));
        let following = Arc::clone(&shared);
        std::thread::spawn(move || following.follow_pods());
        Ok(Self { shared, _alive: alive })
    }

    /// What really happened to its pods so far.
    ///
    /// # Errors
    /// When the kubelet could not do its work: what is recorded is not all.
    pub fn truth(&self) -> Result<Lives> {
        if let Some(failure) = lock(&self.shared.failures).first() {
            bail!("the kubelet of {} failed: {failure}", self.shared.node().name);
        }
        Ok(lock(&self.shared.lives).clone())
    }

    /// A pod's process exits by itself, with code 1 and without a signal.
    ///
    /// # Errors
    /// When it has no process.
    pub fn crash(&self, uid: &str) -> Result<()> {
        self.shared.command(uid, "crash")
    }

    /// A pod's process closes its listener and opens it again.
    ///
    /// # Errors
    /// When it has no process.
    pub fn restart_listener(&self, uid: &str) -> Result<()> {
        self.shared.command(uid, "restart")
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.options.api.give_up();
        let workers = std::mem::take(&mut *lock(&self.shared.workers));
        let threads: Vec<_> = workers
            .into_values()
            .map(|known| {
                // A thread that has ended needs no telling.
                known.notes.send(Note::Stop).ok();
                known.thread
            })
            .collect();
        for thread in threads {
            // A panic was reported by the thread itself.
            thread.join().ok();
        }
    }
}

impl Shared {
    fn node(&self) -> &Node {
        &self.options.network.nodes[self.options.node]
    }

    fn register(&self) -> Result<()> {
        let (api, node) = (&self.options.api, self.node());
        let object = node::node(node.name, &node.pod_cidrs());
        create_or_merge(api, NODES, node.name, &object)?;
        let now = clock::rfc3339(clock::wall_seconds());
        let status = node::ready(node.name, node.addresses, &now);
        api.patch(&format!("{NODES}/{}/status", node.name), Patch::Merge, &status)?;
        create_or_merge(api, node::LEASES, node.name, &node::lease(node.name, &micro_time()))
    }

    fn beat(&self, ended: &Receiver<()>) {
        let name = self.node().name;
        let path = format!("{}/{name}", node::LEASES);
        while ended.recv_timeout(HEARTBEAT) == Err(RecvTimeoutError::Timeout) {
            let renewal = node::renewal(&micro_time());
            if let Err(error) = self.options.api.patch(&path, Patch::Merge, &renewal) {
                self.fail(&error.context("cannot renew the Lease"));
            }
        }
    }

    fn follow_pods(self: &Arc<Self>) {
        let path = format!("/api/v1/pods?fieldSelector=spec.nodeName={}", self.node().name);
        let tell = |at_ns, news| match news {
            News::Listed(pods) => self.listed(&pods, at_ns),
            News::Changed(pod) => self.changed(&pod, at_ns),
            News::Deleted(pod) => {
                self.vanished(pod["metadata"]["uid"].as_str().unwrap_or_default(), at_ns);
            }
        };
        follow(&self.options.api, &path, &self.stopping, tell, |error| self.fail(error));
    }

    fn listed(self: &Arc<Self>, pods: &[Value], at_ns: u64) {
        let uid = |pod: &Value| pod["metadata"]["uid"].as_str().map(str::to_owned);
        let uids: BTreeSet<String> = pods.iter().filter_map(uid).collect();
        let known: Vec<String> = lock(&self.workers).keys().cloned().collect();
        for gone in known.iter().filter(|uid| !uids.contains(*uid)) {
            self.vanished(gone, at_ns);
        }
        for pod in pods {
            self.changed(pod, at_ns);
        }
    }

    /// Starts a pod's life, or tells it that it is to end.
    fn changed(self: &Arc<Self>, pod: &Value, at_ns: u64) {
        let outcome = Identity::of(pod).and_then(|identity| match Deletion::of(pod) {
            Some(deletion) if !is_ours(pod) => self.remove_foreign(&identity, deletion),
            _ if !is_ours(pod) => Ok(()),
            deletion => self.changed_of_ours(identity, pod, deletion, at_ns),
        });
        if let Err(error) = outcome {
            self.fail(&error);
        }
    }

    fn changed_of_ours(
        self: &Arc<Self>,
        identity: Identity,
        pod: &Value,
        deletion: Option<Deletion>,
        at_ns: u64,
    ) -> Result<()> {
        let mut workers = lock(&self.workers);
        if self.stopping.load(Ordering::Relaxed) {
            return Ok(());
        }
        let uid = identity.uid.clone();
        if !workers.contains_key(&uid) {
            let named = format!("pod {}/{}", identity.namespace, identity.name);
            let spec = PodSpec::of(pod).context(named)?;
            let (notes, receiver) = sync_channel(NOTES);
            let worker = Worker::new(Arc::clone(self), identity, spec, notes.clone(), receiver);
            let thread = std::thread::spawn(move || worker.run());
            workers.insert(uid.clone(), Known { notes, told: None, thread });
        }
        if let Some(known) = workers.get_mut(&uid)
            && let Some(deletion) = deletion
            && known.told != Some(deletion)
        {
            known.told = Some(deletion);
            // A pod whose life is over needs no telling.
            known.notes.send(Note::Deletion(deletion, at_ns)).ok();
        }
        Ok(())
    }

    /// A pod that never ran has nothing to wait for.
    fn remove_foreign(&self, identity: &Identity, deletion: Deletion) -> Result<()> {
        if deletion.grace.is_zero() { Ok(()) } else { self.remove(identity) }
    }

    /// The last request about a pod: the object goes.
    fn remove(&self, identity: &Identity) -> Result<()> {
        let options = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": identity.uid}});
        match self.options.api.delete(&identity.path(), &options) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn vanished(&self, uid: &str, at_ns: u64) {
        if let Some(known) = lock(&self.workers).remove(uid) {
            // A pod whose life is over needs no telling.
            known.notes.send(Note::Vanished(at_ns)).ok();
        }
    }

    fn command(&self, uid: &str, command: &str) -> Result<()> {
        let container = lock(&self.containers).get(uid).cloned();
        container.with_context(|| format!("pod {uid} has no process here"))?.command(command)
    }

    fn fail(&self, error: &anyhow::Error) {
        if !self.stopping.load(Ordering::Relaxed) {
            lock(&self.failures).push(format!("{error:#}"));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_ours(pod: &Value) -> bool {
    let containers = pod["spec"]["containers"].as_array().map(Vec::as_slice).unwrap_or_default();
    containers.iter().all(|container| container["image"] == IMAGE)
}

/// Whether the object is not there any more, or is another one by now.
fn is_gone(error: &anyhow::Error) -> bool {
    matches!(api::status(error), Some(404 | 409))
}

fn create_or_merge(api: &Api, collection: &str, name: &str, object: &Value) -> Result<()> {
    match api.create(collection, object) {
        Err(error) if api::status(&error) == Some(CONFLICT) => {
            api.patch(&format!("{collection}/{name}"), Patch::Merge, object)?;
            Ok(())
        }
        outcome => outcome.map(|_created| ()),
    }
}

/// Now, as `metav1.MicroTime` writes it.
fn micro_time() -> String {
    let now = clock::rfc3339(clock::wall_seconds());
    now.replace('Z', ".000000Z")
}
