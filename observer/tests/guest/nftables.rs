//! The rules of kube-proxy's nftables mode under a kernel where `nf_tables` is a module.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use observer::clock;
use observer::dataplane::{self, Dataplane, Settings, StampsOf, Update};
use observer::facts::{BackendChange, BackendStep};
use observer::kernel;
use observer::kernel::probes::NFT_COMMIT;
use tokio::sync::mpsc::{Receiver, channel};

use super::machine::{hierarchy, in_namespace, require_guest, run, runtime};

/// Far more than an emulated guest needs; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_mins(1);

/// What the follower said, put together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    backends: BTreeSet<String>,
    in_use: BTreeSet<Dataplane>,
}

impl Seen {
    /// Takes updates until the backends are these; anything but that in time fails.
    async fn until(&mut self, updates: &mut Receiver<Update>, expected: &Seen) {
        while self != expected {
            let update = tokio::time::timeout(PATIENCE, updates.recv()).await;
            let update = update.unwrap_or_else(|_| panic!("{self:?} is not {expected:?}"));
            match update.expect("it still runs") {
                Update::Present { .. } => panic!("what is present comes once"),
                Update::Change(change) => {
                    let backend = format!("{} {}", change.backend.address, change.backend.port);
                    match change.step {
                        BackendStep::Added => self.backends.insert(backend),
                        BackendStep::Removed => self.backends.remove(&backend),
                        BackendStep::Draining => panic!("rules do not drain: {change:?}"),
                    };
                }
                Update::Status(status) => self.in_use = status.in_use,
                Update::Blind(blind) => panic!("missed something: {blind:?}"),
            }
        }
    }
}

fn nftables(backends: &[&str]) -> Seen {
    let in_use = if backends.is_empty() { None } else { Some(Dataplane::Nftables) };
    Seen {
        backends: backends.iter().map(|&backend| backend.to_owned()).collect(),
        in_use: in_use.into_iter().collect(),
    }
}

/// A Service's table as kube-proxy writes it, with these pods.
fn table(pods: &[&str]) -> String {
    let elements: Vec<String> =
        pods.iter().enumerate().map(|(index, pod)| format!("{index} : {pod} . 8080")).collect();
    format!(
        "table ip kube-proxy
        delete table ip kube-proxy
        table ip kube-proxy {{
            map service-ips {{
                type ipv4_addr . inet_proto . inet_service : verdict
                elements = {{ 10.96.0.80 . tcp . 80 : goto service-X-default/web/tcp/http }}
            }}
            chain nat-prerouting {{
                type nat hook prerouting priority dstnat
                ip daddr . meta l4proto . th dport vmap @service-ips
            }}
            chain service-X-default/web/tcp/http {{
                meta l4proto tcp dnat ip to numgen random mod {} map {{ {} }}
            }}
        }}",
        pods.len(),
        elements.join(", ")
    )
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn backends_and_their_removal_are_followed() {
    require_guest();
    in_namespace(|| runtime().block_on(follow()));
}

async fn follow() {
    let (_legacy, signals) = channel(1);
    let (sender, mut updates) = channel(1024);
    let following = tokio::spawn(dataplane::run(Settings::default(), signals, sender));
    let first = updates.recv().await;
    let Some(Update::Present { backends, .. }) = first else { panic!("first came {first:?}") };
    assert_eq!(backends, BTreeSet::new());

    let mut seen = Seen::default();
    run("nft -f -", &table(&["10.244.0.18", "10.244.0.19"]));
    seen.until(&mut updates, &nftables(&["10.244.0.18 8080", "10.244.0.19 8080"])).await;
    run("nft -f -", &table(&["10.244.0.18"]));
    seen.until(&mut updates, &nftables(&["10.244.0.18 8080"])).await;
    run("nft delete table ip kube-proxy", "");
    seen.until(&mut updates, &nftables(&[])).await;
    following.abort();
}

#[test]
#[ignore = "runs in a guest: cargo xtask guest"]
fn a_kprobe_bounds_each_commit_from_below() {
    require_guest();
    in_namespace(|| runtime().block_on(stamped()));
}

async fn stamped() {
    const COMMITS: usize = 20;
    let mut kernel = kernel::start(hierarchy()).expect("the kernel side starts");
    let (stamps, told) = (kernel.commits, Arc::new(Mutex::new(None)));
    let tell = told.clone();
    let stamps_of = move |task| {
        *tell.lock().expect("no panic") = stamps.of(task);
        stamps.of(task)
    };
    let settings =
        Settings { commit_stamps: Some(StampsOf(Arc::new(stamps_of))), ..Settings::default() };
    let (_signals, signals) = channel(1);
    let (sender, mut updates) = channel(1024);
    let following = tokio::spawn(dataplane::run(settings, signals, sender));
    assert!(matches!(updates.recv().await, Some(Update::Present { .. })));
    kernel.probes.watch(&NFT_COMMIT, true).expect("attach");

    for index in 0..COMMITS {
        let pod = format!("10.244.0.{index}");
        let before = clock::now();
        run("nft -f -", &table(&[&pod]));
        let change = added(&mut updates, &pod).await;
        let stamps = told.lock().expect("no panic").expect("the kernel stamped the commit");
        let begun = stamps.latest;
        assert!(before < begun && begun < change.at, "{before:?} {begun:?} {change:?}");
        assert_eq!(change.uncertainty, change.at.since(begun));
    }
    following.abort();
}

async fn added(updates: &mut Receiver<Update>, pod: &str) -> BackendChange {
    loop {
        let update = tokio::time::timeout(PATIENCE, updates.recv()).await;
        match update.expect("an update in time").expect("it still runs") {
            Update::Change(change)
                if change.step == BackendStep::Added
                    && change.backend.address.to_string() == pod =>
            {
                return change;
            }
            _ => {}
        }
    }
}
