//! The rules of kube-proxy's nftables mode under a kernel where `nf_tables` is a module.

use std::collections::BTreeSet;
use std::time::Duration;

use observer::dataplane::{self, Dataplane, Settings, Update};
use observer::facts::BackendStep;
use tokio::sync::mpsc::{Receiver, channel};

use super::machine::{in_namespace, require_guest, run, runtime};

/// Far more than an emulated guest needs; it ends a wait that would never end.
const PATIENCE: Duration = Duration::from_secs(60);

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
                        BackendStep::Draining => panic!("nothing drains here: {backend}"),
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
