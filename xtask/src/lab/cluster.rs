//! The cluster's state, shared by those who change it: the kubelet, the endpoint controller,
//! kube-proxy. Every change goes to the API and wakes the controller.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail};

use super::api::Api;
use super::clock;
use super::objects::{Pod, Service};
use super::store::Kind;
use super::truth::{PodTruth, Truth};

/// How often a wait looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// What the lab's actors share.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) api: Api,
    /// Pod change to slice change, ns.
    pub(crate) slice_delay_ns: AtomicU64,
    /// Slice change to the start of the rules' rewrite, ns.
    pub(crate) rules_delay_ns: AtomicU64,
    pods: Mutex<BTreeMap<String, Pod>>,
    services: Mutex<Vec<Service>>,
    truth: Mutex<Truth>,
    /// What went wrong on a thread that nobody waits for.
    failures: Mutex<Vec<String>>,
    closing: AtomicBool,
    controller: SyncSender<()>,
}

impl Cluster {
    pub(crate) fn new(api: Api, controller: SyncSender<()>) -> Self {
        Self {
            api,
            slice_delay_ns: AtomicU64::default(),
            rules_delay_ns: AtomicU64::default(),
            pods: Mutex::default(),
            services: Mutex::default(),
            truth: Mutex::default(),
            failures: Mutex::default(),
            closing: AtomicBool::default(),
            controller,
        }
    }

    pub(crate) fn add_service(&self, service: Service) {
        lock(&self.services).push(service);
        self.wake_controller();
    }

    pub(crate) fn services(&self) -> Vec<Service> {
        lock(&self.services).clone()
    }

    pub(crate) fn add_pod(&self, pod: Pod) {
        let truth = PodTruth::new(&pod.name, pod.addresses);
        lock(&self.truth).pods.insert(pod.uid.clone(), truth);
        self.api.change(|store| store.put(Kind::Pod, pod.object()));
        lock(&self.pods).insert(pod.uid.clone(), pod);
        self.wake_controller();
    }

    /// Changes a pod and serves it. Nothing happens when it is gone.
    pub(crate) fn change_pod(&self, uid: &str, change: impl FnOnce(&mut Pod)) {
        if let Some(pod) = lock(&self.pods).get_mut(uid) {
            change(pod);
            self.api.change(|store| store.put(Kind::Pod, pod.object()));
        }
        self.wake_controller();
    }

    pub(crate) fn remove_pod(&self, uid: &str) {
        self.record(uid, |pod| pod.removed_ns = Some(clock::boot_ns()));
        lock(&self.pods).remove(uid);
        self.api.change(|store| store.remove(Kind::Pod, uid));
        self.wake_controller();
    }

    pub(crate) fn pods(&self) -> Vec<Pod> {
        lock(&self.pods).values().cloned().collect()
    }

    /// Records what happened to a pod.
    pub(crate) fn record(&self, uid: &str, entry: impl FnOnce(&mut PodTruth)) {
        if let Some(pod) = lock(&self.truth).pods.get_mut(uid) {
            entry(pod);
        }
    }

    pub(crate) fn truth(&self) -> MutexGuard<'_, Truth> {
        lock(&self.truth)
    }

    /// Reports a failure of a thread that nobody waits for; the next wait returns it.
    pub(crate) fn fail(&self, error: &anyhow::Error) {
        if !self.is_closing() {
            lock(&self.failures).push(format!("{error:#}"));
        }
    }

    /// Waits until `find` finds something in the truth.
    pub(crate) fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        find: impl Fn(&Truth) -> Option<T>,
    ) -> Result<T> {
        let until_ns = clock::boot_ns() + clock::nanos(limit);
        loop {
            if let Some(failure) = lock(&self.failures).first() {
                bail!("the lab failed: {failure}");
            }
            if let Some(found) = find(&lock(&self.truth)) {
                return Ok(found);
            }
            if clock::boot_ns() > until_ns {
                bail!("{what}: not within {limit:?}");
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// A full channel means that it will look anyway; a closed one that the lab ends.
    fn wake_controller(&self) {
        match self.controller.try_send(()) {
            Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
