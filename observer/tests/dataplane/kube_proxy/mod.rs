//! What kube-proxy does to a node's rules, for the real tools: Services and their endpoints, the
//! rules for them in each of its forms, and, told without rules, where they lead.
//!
//! Layouts as recorded from kube-proxy 1.35 and 1.36; only the hashes in names differ.

mod iptables;
mod nftables;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use observer::dataplane::Family;
use observer::facts::Protocol;

use super::namespace::feed;

/// The kinds of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// One map of addresses for each Service.
    Nftables136,
    /// One chain for each endpoint, deleted one commit after it was emptied.
    Nftables135,
    IptablesNft,
    IptablesLegacy,
}

impl Form {
    pub(crate) const ALL: [Self; 4] =
        [Self::Nftables136, Self::Nftables135, Self::IptablesNft, Self::IptablesLegacy];

    fn is_nftables(self) -> bool {
        matches!(self, Self::Nftables136 | Self::Nftables135)
    }

    fn tool(self, version: Family) -> &'static [&'static str] {
        match (self, version) {
            (Self::Nftables136 | Self::Nftables135, _) => &["nft", "-f", "-"],
            (Self::IptablesNft, Family::V4) => &["iptables-nft-restore", "--noflush"],
            (Self::IptablesNft, Family::V6) => &["ip6tables-nft-restore", "--noflush"],
            (Self::IptablesLegacy, Family::V4) => &["iptables-legacy-restore", "--noflush"],
            (Self::IptablesLegacy, Family::V6) => &["ip6tables-legacy-restore", "--noflush"],
        }
    }
}

/// Whether an endpoint is ready, or terminating and still serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Condition {
    Ready,
    Terminating,
}

/// A Service of one port.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "settings of the API, each on or off")]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    pub(crate) protocol: Protocol,
    /// Makes its addresses and node port.
    pub(crate) number: u8,
    /// `sessionAffinity: ClientIP`
    pub(crate) affinity: bool,
    pub(crate) node_port: bool,
    pub(crate) load_balancer: bool,
    /// `externalTrafficPolicy: Local`
    pub(crate) local_only: bool,
    /// By number of the pod. Pods with an even number are on this node.
    pub(crate) endpoints: BTreeMap<u8, Condition>,
}

impl Service {
    pub(crate) fn new(name: &'static str, protocol: Protocol, number: u8, ready: &[u8]) -> Self {
        Self {
            name,
            protocol,
            number,
            affinity: false,
            node_port: false,
            load_balancer: false,
            local_only: false,
            endpoints: ready.iter().map(|&pod| (pod, Condition::Ready)).collect(),
        }
    }

    /// Lists a pod among the endpoints, or changes its condition.
    pub(crate) fn list(&mut self, pod: u8, condition: Condition) {
        self.endpoints.insert(pod, condition);
    }

    /// Takes a pod off the endpoints.
    pub(crate) fn unlist(&mut self, pod: u8) {
        self.endpoints.remove(&pod);
    }

    fn protocol_name(&self) -> &'static str {
        match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        }
    }

    /// The port that its pods listen on.
    fn pod_port(&self) -> u16 {
        8000 + u16::from(self.number)
    }

    fn node_port_number(&self) -> u16 {
        30_000 + u16::from(self.number)
    }

    fn external(&self) -> bool {
        self.node_port || self.load_balancer
    }

    /// Where its own address leads: to what is ready, else to what still serves (KEP-1669).
    fn of_cluster(&self) -> Vec<u8> {
        self.usable(|_| true)
    }

    /// The same of this node's pods: where external traffic goes with `local_only`.
    fn of_node(&self) -> Vec<u8> {
        self.usable(|pod| pod % 2 == 0)
    }

    fn usable(&self, which: fn(u8) -> bool) -> Vec<u8> {
        let those = |wanted: Condition| -> Vec<u8> {
            let with = |(pod, condition): (&u8, &Condition)| {
                (which(*pod) && *condition == wanted).then_some(*pod)
            };
            self.endpoints.iter().filter_map(with).collect()
        };
        let ready = those(Condition::Ready);
        if ready.is_empty() { those(Condition::Terminating) } else { ready }
    }

    /// Every pod that some path leads to.
    fn reached(&self) -> BTreeSet<u8> {
        let mut pods: BTreeSet<u8> = self.of_cluster().into_iter().collect();
        if self.external() && self.local_only {
            pods.extend(self.of_node());
        }
        pods
    }

    /// `namespace/name:port`
    fn port_name(&self) -> String {
        format!("ns/{}:p", self.name)
    }
}

/// Addresses of one IP version.
fn address(version: Family, kind: &str, number: u8) -> String {
    match (version, kind) {
        (Family::V4, "pod") => format!("10.244.0.{number}"),
        (Family::V4, "service") => format!("10.96.0.{number}"),
        (Family::V4, _) => format!("198.51.100.{number}"),
        (Family::V6, "pod") => format!("fd00:10:244::{number:x}"),
        (Family::V6, "service") => format!("fd00:10:96::{number:x}"),
        (Family::V6, _) => format!("2001:db8::{number:x}"),
    }
}

/// An address and port as one.
fn joined(version: Family, pod: u8, port: u16) -> String {
    let address = address(version, "pod", pod);
    if version == Family::V4 { format!("{address}:{port}") } else { format!("[{address}]:{port}") }
}

/// Letters and digits as in kube-proxy's names, the same for the same text.
fn hash(text: &str, length: u8) -> String {
    const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let letter = |position: u8| {
        let mut hasher = DefaultHasher::new();
        (text, position).hash(&mut hasher);
        char::from(BASE32[usize::from(hasher.finish().to_be_bytes()[0] & 31)])
    };
    (0..length).map(letter).collect()
}

/// The rules of one or more Services.
#[derive(Clone, Debug, Default)]
struct Layout {
    /// Rules by chain.
    chains: BTreeMap<String, Vec<String>>,
    /// Verdicts by map and key; nftables only.
    elements: BTreeMap<(&'static str, String), String>,
    /// Sets of clients that stick to an endpoint; nftables only.
    clients: BTreeSet<String>,
}

impl Layout {
    fn add(&mut self, chain: &str, rule: impl Into<String>) {
        self.chains.entry(chain.to_owned()).or_default().push(rule.into());
    }

    fn extend(&mut self, other: Self) {
        for (chain, rules) in other.chains {
            self.chains.entry(chain).or_default().extend(rules);
        }
        self.elements.extend(other.elements);
        self.clients.extend(other.clients);
    }

    /// The chains and sets that are here and not there.
    fn without(&self, there: &Self) -> Self {
        let mut here = self.clone();
        here.chains.retain(|chain, _| !there.chains.contains_key(chain));
        here.clients.retain(|clients| !there.clients.contains(clients));
        here
    }
}

/// A node with one IP version's rules.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) form: Form,
    pub(crate) version: Family,
    pub(crate) services: BTreeMap<&'static str, Service>,
    written: Layout,
    /// Dropped by the last sync, and to be deleted before the next.
    stale: Layout,
}

impl Node {
    /// Writes the rules that do not depend on any Service.
    pub(crate) fn start(form: Form, version: Family) -> Self {
        let base = if form.is_nftables() { nftables::base(version) } else { iptables::base() };
        feed(form.tool(version), &base);
        let (written, stale) = Default::default();
        Self { form, version, services: BTreeMap::new(), written, stale }
    }

    /// Adds a Service, or replaces it.
    pub(crate) fn set(&mut self, service: Service) {
        self.services.insert(service.name, service);
    }

    pub(crate) fn service(&mut self, name: &str) -> &mut Service {
        self.services.get_mut(name).expect("a Service of that name")
    }

    /// What the Services lead to, as [`super::namespace::shown`].
    pub(crate) fn reachable(&self) -> BTreeSet<String> {
        let of = |service: &Service| -> Vec<String> {
            let (name, protocol) = (service.port_name(), service.protocol);
            let port = service.pod_port();
            let shown = |pod| {
                let address = address(self.version, "pod", pod);
                format!("{name} {protocol:?} {address} {port}")
            };
            service.reached().into_iter().map(shown).collect()
        };
        self.services.values().flat_map(of).collect()
    }

    /// Writes the rules of the `touched` Services anew, and what became of the others' addresses.
    pub(crate) fn sync(&mut self, touched: &[&str]) {
        let mut wanted = Layout::default();
        let mut rewritten = BTreeSet::new();
        for service in self.services.values() {
            let layout = if self.form.is_nftables() {
                nftables::layout(self.form, self.version, service)
            } else {
                iptables::layout(self.version, service)
            };
            if touched.contains(&service.name) {
                rewritten.extend(layout.chains.keys().cloned());
            }
            wanted.extend(layout);
        }
        if self.form.is_nftables() {
            self.sync_nftables(&wanted, &rewritten);
        } else {
            self.sync_iptables(&wanted, &rewritten);
        }
        self.written = wanted;
    }

    fn sync_nftables(&mut self, wanted: &Layout, rewritten: &BTreeSet<String>) {
        let tool = self.form.tool(self.version);
        let deletion = nftables::deletion(self.version, &self.stale, wanted);
        if !deletion.is_empty() {
            feed(tool, &deletion);
        }
        feed(tool, &nftables::change(self.form, self.version, &self.written, wanted, rewritten));
        self.stale = self.written.without(wanted);
    }

    fn sync_iptables(&mut self, wanted: &Layout, rewritten: &BTreeSet<String>) {
        let tool = self.form.tool(self.version);
        let services: Vec<&Service> = self.services.values().collect();
        let text = iptables::change(self.version, &services, &self.written, wanted, rewritten);
        feed(tool, &text);
    }
}
