//! Changes that need care, each by name and in each form of rules, made with the real tools.

use std::collections::BTreeSet;

use observer::clock;
use observer::dataplane::Family;
use observer::facts::Protocol;

use super::following::{ROOMY_BYTES, Reported, Running, in_runtime};
use super::kube_proxy::{Condition, Form, Node, Service};
use super::namespace::feed;

/// A node, and the follower of its rules.
struct Scene {
    node: Node,
    running: Running,
}

impl Scene {
    async fn of(form: Form, services: impl IntoIterator<Item = Service>) -> Self {
        let mut node = Node::start(form, Family::V4);
        let mut names = Vec::new();
        for service in services {
            names.push(service.name);
            node.set(service);
        }
        node.sync(&names);
        let (running, present) = Running::start(ROOMY_BYTES).await;
        assert_eq!(present, node.reachable());
        Self { node, running }
    }

    /// Changes a Service and writes its rules; gives what was reported.
    async fn change(&mut self, name: &'static str, change: impl FnOnce(&mut Service)) -> Reported {
        change(self.node.service(name));
        self.sync(&[name]).await
    }

    async fn sync(&mut self, touched: &[&str]) -> Reported {
        self.node.sync(touched);
        if self.node.form == Form::IptablesLegacy {
            self.running.legacy_committed(clock::now(), Family::V4).await;
        }
        self.running.until_backends(&self.node.reachable()).await
    }
}

/// Runs a scenario in each form of rules, each in a namespace of its own.
fn in_each_form<F: Future<Output = ()>>(scenario: impl Fn(Form) -> F + Copy + Send + 'static) {
    for form in Form::ALL {
        in_runtime(move || scenario(form));
    }
}

fn web(ready: &[u8]) -> Service {
    Service::new("web", Protocol::Tcp, 1, ready)
}

fn api(ready: &[u8]) -> Service {
    Service::new("api", Protocol::Tcp, 2, ready)
}

fn backends<const N: usize>(of: [&str; N]) -> BTreeSet<String> {
    of.map(str::to_owned).into()
}

const NONE: [&str; 0] = [];

#[track_caller]
fn expect<const R: usize, const A: usize>(
    reported: &Reported,
    removed: [&str; R],
    added: [&str; A],
) {
    assert_eq!(reported.removed(), backends(removed), "removed");
    assert_eq!(reported.added(), backends(added), "added");
    assert_eq!(reported.removed.len() + reported.added.len(), R + A, "each once");
}

#[test]
fn of_the_two_commits_of_an_iptables_sync_only_the_second_removes() {
    in_runtime(async || {
        let mut scene = Scene::of(Form::IptablesNft, [web(&[2, 3])]).await;
        scene.running.reported().await;
        let before = scene.running.counters.commits.get();
        let filter_only =
            "*filter\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -d 10.96.0.9 -j REJECT\nCOMMIT\n";
        feed(&["iptables-nft-restore", "--noflush"], filter_only);
        expect(&scene.running.reported().await, NONE, NONE);
        let from = clock::now();
        let reported = scene.change("web", |web| web.unlist(3)).await;
        expect(&reported, ["ns/web:p Tcp 10.244.0.3 8001"], NONE);
        assert!(reported.removed[0].at > from, "not when the filter table was written");
        // Beside the two markers: the filter table twice, nat once.
        assert_eq!(scene.running.counters.commits.get() - before, 2 + 3);
    });
}

#[test]
fn a_pod_behind_several_services_leaves_each_with_its_own_commit() {
    in_each_form(async |form| {
        let dns = Service::new("dns", Protocol::Udp, 3, &[2, 3]);
        let mut scene = Scene::of(form, [web(&[2, 3]), api(&[2, 3]), dns]).await;
        let mut last = None;
        for (name, removed) in [
            ("dns", "ns/dns:p Udp 10.244.0.3 8003"),
            ("api", "ns/api:p Tcp 10.244.0.3 8002"),
            ("web", "ns/web:p Tcp 10.244.0.3 8001"),
        ] {
            let reported = scene.change(name, |service| service.unlist(3)).await;
            expect(&reported, [removed], NONE);
            let at = Some(reported.removed[0].at);
            assert!(at > last, "the pod's last commit is the latest");
            last = at;
        }
    });
}

#[test]
fn an_address_that_comes_back_is_added_and_removed_again() {
    in_each_form(async |form| {
        let mut scene = Scene::of(form, [web(&[2, 3]), api(&[4])]).await;
        let third = "ns/web:p Tcp 10.244.0.3 8001";
        for _ in 0..2 {
            let reported = scene.change("web", |web| web.unlist(3)).await;
            expect(&reported, [third], NONE);
            let reported = scene.change("web", |web| web.list(3, Condition::Ready)).await;
            expect(&reported, NONE, [third]);
        }
        // Another Service's pod takes the address while it is still the first one's.
        let taken = "ns/api:p Tcp 10.244.0.3 8002";
        let reported = scene.change("api", |api| api.list(3, Condition::Ready)).await;
        expect(&reported, NONE, [taken]);
        let reported = scene.change("web", |web| web.unlist(3)).await;
        expect(&reported, [third], NONE);
    });
}

#[test]
fn client_ip_affinity_changes_no_backend_and_removals_under_it_are_seen() {
    in_each_form(async |form| {
        let mut scene = Scene::of(form, [web(&[2, 3, 4])]).await;
        expect(&scene.change("web", |web| web.affinity = true).await, NONE, NONE);
        let reported = scene.change("web", |web| web.unlist(4)).await;
        expect(&reported, ["ns/web:p Tcp 10.244.0.4 8001"], NONE);
        expect(&scene.change("web", |web| web.affinity = false).await, NONE, NONE);
        let reported = scene.change("web", |web| web.unlist(3)).await;
        expect(&reported, ["ns/web:p Tcp 10.244.0.3 8001"], NONE);
    });
}

/// With `externalTrafficPolicy: Local`, external traffic goes on to this node's last pod while it
/// terminates (KEP-1669), though the Service's own address has long left it.
async fn last_local_pod_stays_for_external_traffic(form: Form, open: fn(&mut Service)) {
    let mut service = web(&[2, 3]);
    service.local_only = true;
    open(&mut service);
    let mut scene = Scene::of(form, [service]).await;
    let terminating = |web: &mut Service| web.list(2, Condition::Terminating);
    expect(&scene.change("web", terminating).await, NONE, NONE);
    let local = "ns/web:p Tcp 10.244.0.2 8001";
    expect(&scene.change("web", |web| web.unlist(2)).await, [local], NONE);
}

#[test]
fn the_node_port_keeps_the_last_local_pod_a_backend() {
    in_each_form(async |form| {
        last_local_pod_stays_for_external_traffic(form, |web| web.node_port = true).await;
    });
}

#[test]
fn the_load_balancer_keeps_the_last_local_pod_a_backend() {
    in_each_form(async |form| {
        last_local_pod_stays_for_external_traffic(form, |web| web.load_balancer = true).await;
    });
}

#[test]
fn a_backend_of_the_external_paths_alone_goes_with_the_last_of_them() {
    in_each_form(async |form| {
        let mut service = web(&[3]);
        service.list(2, Condition::Terminating);
        let mut scene = Scene::of(form, [service]).await;
        let local = "ns/web:p Tcp 10.244.0.2 8001";
        expect(&scene.change("web", |web| web.local_only = true).await, NONE, NONE);
        expect(&scene.change("web", |web| web.node_port = true).await, NONE, [local]);
        expect(&scene.change("web", |web| web.load_balancer = true).await, NONE, NONE);
        expect(&scene.change("web", |web| web.node_port = false).await, NONE, NONE);
        expect(&scene.change("web", |web| web.local_only = false).await, [local], NONE);
        expect(&scene.change("web", |web| web.local_only = true).await, NONE, [local]);
        expect(&scene.change("web", |web| web.load_balancer = false).await, [local], NONE);
    });
}

#[test]
fn a_pod_is_removed_from_one_protocol_and_stays_with_the_others() {
    in_each_form(async |form| {
        let protocols = [("web", Protocol::Tcp), ("dns", Protocol::Udp), ("sip", Protocol::Sctp)];
        // The same port of the same pods: only the protocol tells them apart.
        let services = protocols.map(|(name, protocol)| Service::new(name, protocol, 1, &[2, 3]));
        let mut scene = Scene::of(form, services).await;
        for (name, removed) in [
            ("dns", "ns/dns:p Udp 10.244.0.3 8001"),
            ("sip", "ns/sip:p Sctp 10.244.0.3 8001"),
            ("web", "ns/web:p Tcp 10.244.0.3 8001"),
        ] {
            let reported = scene.change(name, |service| service.unlist(3)).await;
            expect(&reported, [removed], NONE);
        }
    });
}

#[test]
fn a_service_without_endpoints_rejects_and_all_its_backends_are_removed() {
    in_each_form(async |form| {
        let mut scene = Scene::of(form, [web(&[2, 3])]).await;
        let both = ["ns/web:p Tcp 10.244.0.2 8001", "ns/web:p Tcp 10.244.0.3 8001"];
        expect(&scene.change("web", |web| web.endpoints.clear()).await, both, NONE);
        // What is left of it goes one commit later, which is no change any more.
        expect(&scene.sync(&[]).await, NONE, NONE);
        let back = |web: &mut Service| *web = self::web(&[2, 3]);
        expect(&scene.change("web", back).await, NONE, both);
    });
}
