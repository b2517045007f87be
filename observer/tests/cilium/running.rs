//! The follower over the maps of one test.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use observer::dataplane::{CommitSignal, Counters, Dataplane, Settings, Status, Update, run};
use observer::facts::{Backend, BackendChange, BackendStep, Protocol, ServiceName};
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::maps::{PORT, SERVICE_PORT};

/// Nothing here takes longer; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A follower that runs in this thread's namespaces.
pub(crate) struct Running {
    pub(crate) commits: Sender<CommitSignal>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) status: Status,
    updates: Receiver<Update>,
}

impl Running {
    /// Starts it; gives what was present and what was draining.
    pub(crate) async fn start(maps: PathBuf) -> (Self, BTreeSet<Backend>, BTreeSet<Backend>) {
        let counters = Arc::new(Counters::default());
        let settings = Settings {
            dataplane: Some(Dataplane::Cilium),
            cilium_maps: maps,
            counters: counters.clone(),
            ..Settings::default()
        };
        let (commits, signals) = mpsc::channel(4096);
        let (sender, updates) = mpsc::channel(1024);
        tokio::spawn(async move {
            run(settings, signals, sender).await.expect("follow the maps");
        });
        let mut running = Self { commits, counters, status: Status::default(), updates };
        let Update::Present { backends, draining, .. } = running.next().await else {
            panic!("what is present comes first")
        };
        assert!(matches!(running.next().await, Update::Status(_)), "then the status");
        (running, backends, draining)
    }

    pub(crate) async fn next(&mut self) -> Update {
        let update = tokio::time::timeout(PATIENCE, self.updates.recv()).await;
        let update = update.expect("an update in time").expect("it still runs");
        if let Update::Status(status) = &update {
            self.status = status.clone();
        }
        update
    }

    /// The next change of a backend.
    pub(crate) async fn change(&mut self) -> BackendChange {
        loop {
            if let Update::Change(change) = self.next().await {
                return change;
            }
        }
    }

    /// The changes up to the one that takes this step with this backend.
    pub(crate) async fn until(&mut self, backend: &Backend, step: BackendStep) -> BackendChange {
        loop {
            let change = self.change().await;
            if change.backend == *backend && change.step == step {
                return change;
            }
        }
    }

    /// Whether no update is there.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.updates.try_recv().is_err()
    }
}

/// An async runtime whose threads are in this thread's namespaces.
pub(crate) fn in_runtime<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).enable_all().build().expect("build a runtime");
    runtime.block_on(test());
}

/// The backend of this id and of Service 1 in the maps of IPv4.
pub(crate) fn v4(id: u16) -> Backend {
    v4_of(1, id)
}

/// The same of another Service.
pub(crate) fn v4_of(service: u16, id: u16) -> Backend {
    let within = |network, number: u16| {
        let [high, low] = number.to_be_bytes();
        [10, network, high, low].into()
    };
    backend(within(96, service), within(1, id))
}

/// The backend of this id and of Service 1 in the maps of IPv6.
pub(crate) fn v6(id: u16) -> Backend {
    let within = |network, number| [network, 0, 0, 0, 0, 0, 0, number].into();
    backend(within(0xfd60, 1), within(0xfd01, id))
}

fn backend(service: IpAddr, address: IpAddr) -> Backend {
    let service = ServiceName::FrontEnd { address: service, port: SERVICE_PORT };
    Backend { service: Some(service), protocol: Protocol::Tcp, address, port: PORT }
}
